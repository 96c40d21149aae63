"""Which positions of a value an edit is for. Positions are columns of the token array, counted over the whole sequence.

| positions | columns |
|---|---|
| `None` | all, also those that are generated |
| `"prompt"`, `"generated"` | those of the prompt; those after it |
| `"last"`, or -1 | the last of the prompt |
| an integer, or a sequence of them | these; negative ones count from the end of the prompt |
| `slice(5, None)` | from 5 on, also those that are generated; negative bounds count from the end of the prompt |
| a boolean Tensor [S] or [B, S] | where it is True; columns after it are left alone |

In a call of a model all that it is given is the prompt. Padding counts: the columns of a left-padded batch start there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.structure import describe

Positions = str | int | Sequence[int] | slice | Tensor | None
NAMES = ("last", "prompt", "generated")


class Where(NamedTuple):
    """Where in a sequence the value at a site lies.

    Attributes:
        start: column of its first position.
        stop: one more than the column of its last.
        prompt: how many columns the prompt has.
        total: how many columns will have been run in the end.
    """

    start: int
    stop: int
    prompt: int
    total: int


def require_positions(positions: Any) -> None:
    """Raises `InputError` for what does not say positions."""
    fix = "give an integer, a sequence of integers, a slice, a boolean tensor, 'last', 'prompt', 'generated' or None"
    if isinstance(positions, str):
        if positions not in NAMES:
            raise InputError(f"positions={positions!r} is unknown; {fix}.")
    elif isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim not in (1, 2):
            raise InputError(f"positions is {describe(positions)}; give a boolean tensor [S] or [B, S], or a list of integers.")
    elif isinstance(positions, slice):
        bounds = (positions.start, positions.stop, positions.step)
        if not all(bound is None or _is_integer(bound) for bound in bounds) or (positions.step or 1) < 1:
            raise InputError(f"positions={positions!r} is no range that goes forward; {fix}.")
    elif positions is None or _is_integer(positions):
        return
    elif not isinstance(positions, Sequence) or not positions or not all(map(_is_integer, positions)):
        raise InputError(f"positions is {describe(positions)}; {fix}.")


def selected(positions: Positions, value: Tensor, where: Where) -> Tensor | bool:
    """Which positions of a value [*B, S, D]: True for all, False for none, or a boolean tensor that broadcasts to the value."""
    if positions is None:
        return True
    require_columns(value, where)
    require_within(positions, where)
    if isinstance(positions, Tensor):
        return _masked(positions, value, where)
    wanted = columns(positions, where)
    chosen = [column in wanted for column in range(where.start, where.stop)]
    if all(chosen):
        return True
    return torch.tensor(chosen, dtype=torch.bool, device=value.device)[:, None] if any(chosen) else False


def require_columns(value: Tensor, where: Where) -> None:
    """Raises `InputError` unless axis -2 of the value counts the positions that are run."""
    if value.ndim < 2 or value.shape[-2] != where.stop - where.start:
        raise InputError(
            f"positions count along axis -2; of {where.stop - where.start} positions that are run the site holds "
            f"{describe(value)}. Choose another site, or give positions=None."
        )


def require_within(positions: Positions, where: Where) -> None:
    """Raises `InputError` for positions that the sequence does not have."""
    if isinstance(positions, Tensor):
        size = positions.shape[-1]
        if not where.prompt <= size <= where.total:
            expected = where.prompt if where.prompt == where.total else f"{where.prompt} to {where.total}"
            raise InputError(f"positions is a mask of {size} positions, the prompt has {expected}.")
    elif positions is not None:
        columns(positions, where)


def columns(positions: Any, where: Where) -> range | list[int]:
    """The columns that positions other than a mask mean, in their order."""
    end = where.prompt
    if positions == "prompt":
        return range(end)
    if positions == "generated":
        return range(end, where.total)
    if isinstance(positions, slice):
        start, stop = (
            bound if bound is None or bound >= 0 else max(0, bound + end) for bound in (positions.start, positions.stop)
        )
        return range(start or 0, where.total if stop is None else min(stop, where.total), positions.step or 1)
    given: list[int] = [-1] if positions == "last" else [positions] if isinstance(positions, int) else list(positions)
    for position in given:
        if not -end <= position < where.total:
            after = f" and {where.total - end} after it" if where.total > end else ""
            raise InputError(f"positions has {position}, out of range for {end} positions{after}.")
    return [position + end if position < 0 else position for position in given]


def _masked(mask: Tensor, value: Tensor, where: Where) -> Tensor:
    size, length = mask.shape[-1], where.stop - where.start
    if mask.ndim == 2 and (value.ndim < 3 or mask.shape[0] != value.shape[0]):
        raise InputError(f"positions is a mask {list(mask.shape)} of [B, S], the value is {describe(value)}.")
    missing = max(0, where.stop - size)
    longer = torch.cat([mask, mask.new_zeros(*mask.shape[:-1], missing)], -1).to(value.device)
    here = longer[..., where.start : where.stop]
    return here.reshape(*here.shape[:-1], *[1] * (value.ndim - 2 - (mask.ndim - 1)), length, 1)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
