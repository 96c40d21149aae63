"""The two runs that a patch goes between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.functional import FunctionalModel
from ..core.reading import Capture
from ..core.replay import Tape
from ..core.sites import Want
from .patches import Metric, measured, require_metric
from .prompt_pairs import require_aligned

DIRECTIONS = ("denoise", "noise")


@dataclass(frozen=True)
class Runs:
    """The run that is patched, kept on a tape, and the values of the other one.

    Attributes:
        base: the run that is patched: the corrupted one to denoise, the clean one to noise.
        base_metric: its metric.
        source: the values of the other run.
        source_metric: its metric.
        denoise: whether clean values go into the corrupted run.
    """

    base: Tape
    base_metric: Tensor
    source: Mapping[Want, Tensor]
    source_metric: Tensor
    denoise: bool

    @property
    def clean_metric(self) -> Tensor:
        return self.source_metric if self.denoise else self.base_metric

    @property
    def corrupted_metric(self) -> Tensor:
        return self.base_metric if self.denoise else self.source_metric


def wide(value: Tensor) -> Tensor:
    """In float32 at least: a mean of many numbers is taken in it."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def require_direction(direction: Any) -> None:
    if direction not in DIRECTIONS:
        raise InputError(
            f"direction={direction!r} is unknown; choose 'denoise' (clean into corrupted) or 'noise' (the reverse)."
        )


def check_runs(
    method: str, f: FunctionalModel, clean: Any, corrupted: Any, metric: Any, direction: str, chunk_size: int | None
) -> None:
    """What can be said of the arguments before anything runs."""
    require_metric(metric)
    require_direction(direction)
    require_positive("chunk_size", chunk_size, optional=True)
    require_aligned(clean, corrupted)
    warn_if_stochastic(f, method)


def two_runs(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    wants: tuple[Want, ...],
    direction: str,
) -> Runs:
    """Runs both. Cost: two forward passes."""
    source_inputs, base_inputs = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    output, values = Capture(f, wants)(params, source_inputs)
    source_metric = measured(metric, output)
    base = Tape(f, params, base_inputs, wants)
    source = {want: values[str(want.site)] for want in wants}
    return Runs(base, measured(metric, base.output), source, source_metric, direction == "denoise")
