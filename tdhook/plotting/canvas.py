"""What all pictures share: figures without pyplot, arrays from tensors, texts that can be read."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy
import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.structure import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches that pyplot neither knows nor shows. Raises ImportError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("tdhook.plotting needs matplotlib; install it with: pip install 'tdhook[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def as_array(name: str, values: Any, *, missing: bool = False) -> numpy.ndarray:
    """A real array of a tensor or of anything that numpy takes.

    Raises `InputError` for something else, for infinity, and for NaN unless values may be missing.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    try:
        array = numpy.asarray(values)
    except ValueError:
        raise InputError(f"{name} is {describe(values)}; give a tensor or an array.") from None
    if array.dtype.kind not in "fiub":
        raise InputError(f"{name} is {describe(values)}; give a tensor or an array of real numbers.")
    if missing and not numpy.isfinite(array).any():
        raise InputError(f"{name} holds no finite number.")
    if missing and numpy.isinf(array).any():
        raise InputError(f"{name} holds infinity; give NaN where there is no value.")
    if not missing and not numpy.isfinite(array).all():
        raise InputError(f"{name} holds NaN or infinity; replace them first, for example with torch.nan_to_num.")
    return array


def as_texts(name: str, texts: Any) -> list[str]:
    """A list of texts; raises `InputError` for one text, whose letters would be taken one by one, and for numbers."""
    single = isinstance(texts, (str, Tensor))
    wrong = [texts] if single else [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise InputError(f"{name} is or holds {describe(wrong[0])}; give a list of texts (for ids: what they decode to).")
    return list(texts)


def visible(token: str) -> str:
    """A token with its spaces, line breaks and characters that cannot be printed made visible.

    Examples:
        >>> visible(" a\\n"), visible("\\x1b[31m")
        ('␣a⏎', '\\\\x1b[31m')
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in token.translate(VISIBLE))


def columns_of(text: str) -> int:
    """How many columns a text takes in a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def wrapped(text: str, width: float) -> str:
    """A text broken into lines that fit a width in inches at matplotlib's size of titles."""
    return "\n".join(textwrap.fill(line, max(8, int(width * 9.5))) for line in text.split("\n"))


def label_tokens(axes: Axes, side: Literal["x", "y"], tokens: Sequence[str], name: str, most: int = 48) -> None:
    """Labels an axis with tokens, every second or third one where there are more than `most`."""
    step = -(-len(tokens) // most)
    shown = [visible(str(token)) for token in tokens[::step]]
    places = range(0, len(tokens), step)
    if side == "x":
        axes.set_xticks(places, shown, rotation=60, ha="right", rotation_mode="anchor")
    else:
        axes.set_yticks(places, shown)
    for text in axes.get_xticklabels() if side == "x" else axes.get_yticklabels():
        text.set_parse_math(False)  # a token may hold "$"
    (axes.set_xlabel if side == "x" else axes.set_ylabel)(name)
