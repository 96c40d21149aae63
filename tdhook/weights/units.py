"""Units of weights: neurons, channels and heads, which are pruned as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.errors import InputError, ParamsError
from ..core.structure import describe
from .selection import Key, parameter_name


@dataclass(frozen=True)
class Units:
    """Slices of a weight that are pruned as a whole.

    Attributes:
        dim: the dimension that counts them: 0 for output neurons and channels, 1 for input ones.
        size: how many neighbours along `dim` make one unit: the head size for attention heads.
    """

    dim: int
    size: int = 1

    def rows(self, tensor: Tensor) -> Tensor:
        """The elements of each unit: Tensor [U, elements]."""
        return tensor.movedim(self.dim, 0).reshape(tensor.shape[self.dim] // self.size, -1)

    def spread(self, mask: Tensor, like: Tensor) -> Tensor:
        """A mask of units [U] as a mask of elements."""
        along = mask[:, None].expand(-1, self.size).reshape(-1)
        dims = [1] * like.ndim
        dims[self.dim] = -1
        return along.reshape(dims).expand(like.shape)


def units_of(structure: Any) -> Units | None:
    """The units that one `structure` of `prune` means; None for single weights."""
    if structure is None or isinstance(structure, Units):
        return structure
    if isinstance(structure, int) and not isinstance(structure, bool):
        return Units(structure)
    raise InputError(f"structure is None, a dimension, Units or a mapping to these, got {describe(structure)}.")


def require_scores(scores: dict[Key, Tensor], tensors: dict[Key, Tensor]) -> None:
    """Raises `ParamsError` unless the scores are floating-point ones of parameters that there are."""
    for key, score in scores.items():
        if key not in tensors:
            raise ParamsError(f"scores has {parameter_name(key)!r}, which params has not.")
        if not score.is_floating_point() or not tensors[key].is_floating_point():
            raise ParamsError(
                f"scores[{parameter_name(key)!r}] is {describe(score)} for {describe(tensors[key])}; both have to be "
                "floating-point."
            )


def require_fit(key: Key, scores: Tensor, weight: Tensor, unit: Units | None) -> None:
    """Raises `ParamsError` unless units divide a weight, and there is a score for each weight or each unit."""
    name = parameter_name(key)
    if unit is not None:
        if not -weight.ndim <= unit.dim < weight.ndim:
            raise ParamsError(f"structure: {name!r} is {describe(weight)}, which has no dimension {unit.dim}.")
        if unit.size < 1 or weight.shape[unit.dim] % unit.size:
            raise ParamsError(
                f"structure: units of size {unit.size} do not divide dimension {unit.dim} of {name!r}, {describe(weight)}."
            )
        if scores.shape == (weight.shape[unit.dim] // unit.size,):
            return
    if scores.shape != weight.shape:
        raise ParamsError(f"scores[{name!r}] is {describe(scores)}, but the parameter is {describe(weight)}.")


def unit_scores(scores: Tensor, weight: Tensor, unit: Units | None, order: int) -> Tensor:
    """One score for each unit, Tensor [U]."""
    if unit is None:
        return scores.reshape(-1)
    if scores.ndim == 1 and scores.shape != weight.shape:
        return scores
    rows = unit.rows(scores)
    return rows.sum(1) if order == 1 else rows.square().sum(1)
