"""What the estimators of intrinsic dimension return, and for which layouts of points."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, tensorclass
from torch import Tensor

from ...core.compat import is_compiling, is_wrapped
from ...core.errors import InputError
from ...core.neighbours import nearest, require_points
from ...core.structure import describe


@tensorclass
class Dimension:
    """An intrinsic dimension, for each set of points.

    Attributes:
        value: Tensor [*lead]; NaN for a set with too few distinct points.
        standard_error: Tensor [*lead]; NaN where no closed form is known: see `confidence_interval`.
        local: Tensor [*lead, N]: the dimension around each point, of methods that have one; else None.
    """

    value: Tensor
    standard_error: Tensor
    local: Tensor | None = None


def of_sites(position: int) -> Callable[[Callable], Callable]:
    """Lets a function of points, which are its argument at a position, also take a mapping from sites to points."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def each(*arguments: Any, **options: Any) -> Any:
            if len(arguments) <= position or not isinstance(arguments[position], (Mapping, TensorDictBase)):
                return function(*arguments, **options)
            before, x, after = arguments[:position], arguments[position], arguments[position + 1 :]
            return TensorDict({site: each(*before, points, *after, **options) for site, points in x.items()})

        return each

    return decorate


@dataclass(frozen=True)
class Distinct:
    """Each point with its nearest neighbours among the distinct points.

    Attributes:
        distances: Tensor [*lead, N, k]; infinite where there are fewer than k others.
        indices: Tensor [*lead, N, k].
        kept: Tensor [*lead, N]: False for a copy of an earlier point, which is nobody's neighbour.
        original: Tensor [*lead, N]: the index of the point that a copy is a copy of; of a distinct point its own.
    """

    distances: Tensor
    indices: Tensor
    kept: Tensor
    original: Tensor

    @classmethod
    def of(cls, x: Tensor, k: int, chunk_size: int | None) -> Distinct:
        """The k nearest neighbours of points that the caller has checked."""
        found = nearest(x, k, chunk_size=chunk_size)
        place = torch.arange(x.shape[-2], device=x.device)
        # Of several neighbours at 0 the one of smallest index comes first: the original, unless the point is that itself.
        copies = (found.distances[..., 0] == 0) & (found.indices[..., 0] < place)
        original = torch.where(copies, found.indices[..., 0], place)
        if is_compiling() or is_wrapped(x) or bool(copies.any()):
            found = nearest(x, k, leave_out=copies, chunk_size=chunk_size)
        return cls(found.distances, found.indices, ~copies, original)

    @property
    def number(self) -> Tensor:
        """The number of distinct points [*lead]."""
        return self.kept.sum(-1)

    def dimension(self, value: Tensor, local: Tensor | None = None, standard_error: Tensor | None = None) -> Dimension:
        """The result; NaN for sets with too few distinct points, and for a copy what its original has."""
        enough = self.number > self.distances.shape[-1]
        value = torch.where(enough, value, torch.nan)
        error = torch.full_like(value, torch.nan) if standard_error is None else torch.where(enough, standard_error, torch.nan)
        if local is not None:
            local = torch.where(enough[..., None], local.gather(-1, self.original), torch.nan)
        return Dimension(value=value, standard_error=error, local=local, batch_size=value.shape)  # type: ignore[call-arg]

    def mean(self, local: Tensor) -> Tensor:
        """The mean [*lead] over the distinct points of numbers [*lead, N]."""
        return torch.where(self.kept, local, 0).sum(-1) / self.number


def require_enough(x: Any, neighbours: int, method: str) -> None:
    """Raises `InputError` unless `x` is [*lead, N, D] with more than `neighbours` points."""
    require_points("x", x)
    if x.shape[-2] <= neighbours:
        raise InputError(f"x is {describe(x)}: {x.shape[-2]} points, where {method} needs at least {neighbours + 1}.")
