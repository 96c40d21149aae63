"""What all pictures share: figures without pyplot, arrays from tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.structure import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches that pyplot neither knows nor shows. Raises ImportError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("tdhook.plotting needs matplotlib; install it with: pip install 'tdhook[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def as_array(name: str, values: Any) -> numpy.ndarray:
    """A real array of a tensor or of anything that numpy takes; raises `InputError` for something else or for NaN."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    try:
        array = numpy.asarray(values)
    except ValueError:
        raise InputError(f"{name} is {describe(values)}; give a tensor or an array.") from None
    if array.dtype.kind not in "fiub":
        raise InputError(f"{name} is {describe(values)}; give a tensor or an array of real numbers.")
    if not numpy.isfinite(array).all():
        raise InputError(f"{name} holds NaN or infinity; replace them first, for example with torch.nan_to_num.")
    return array


def require_percentile(percentile: float) -> None:
    """Raises `InputError` unless 0 < percentile <= 100."""
    if not 0 < percentile <= 100:
        raise InputError(f"percentile is above 0 and at most 100, got {percentile!r}.")


def symmetric_limit(values: numpy.ndarray, percentile: float) -> float:
    """The percentile of the magnitudes; 1 where everything is zero, so that a colour range is never empty."""
    return float(numpy.percentile(numpy.abs(values), percentile)) or float(numpy.abs(values).max()) or 1.0
