"""Progress of long computations. The library prints nothing: methods call `progress(done, total)` where one is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[int, int], None]


def tqdm_progress(description: str = "", **options: Any) -> Progress:
    """A progress callback that shows a tqdm bar; `options` go to tqdm. Needs the extra `demo`.

    Raises:
        ImportError: tqdm is not installed.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("tqdm_progress needs tqdm; install it with: pip install 'tdhook[demo]'") from error
    bar: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc=description, **options)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            bar = None

    return progress
