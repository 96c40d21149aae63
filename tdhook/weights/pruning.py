"""Pruning: weights with the lowest scores set to zero, one by one or in units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ..core.errors import InputError, ParamsError
from ..core.structure import describe
from .ranking import Amount, above_lowest, count_of, require_amount, require_ordered
from .selection import (
    Key,
    Select,
    by_parameter,
    flat,
    nest,
    parameter_name,
    replaced,
    require_params,
    select_parameters,
)

SCOPES = ("global", "tensor", "output")


class Pruned(NamedTuple):
    """Pruned parameters.

    Attributes:
        params: with zeros in place of what was pruned.
        mask: TensorDict of bool tensors for the weights that were ranked: True where a weight is kept.
    """

    params: TensorDict
    mask: TensorDict


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


Structure = None | int | Units | Mapping[str, Any]
Scores = TensorDictBase | Callable[[TensorDictBase], TensorDictBase]


def prune(
    params: TensorDictBase,
    scores: Scores,
    amount: Amount,
    *,
    scope: str = "global",
    structure: Structure = None,
    order: int = 1,
    tied: Callable[[str], str] | None = None,
    select: Select = None,
) -> Pruned:
    """Sets the weights with the lowest scores to zero.

        theta'_i = theta_i if rank(s_i) >= k else 0,     k = round(amount * n)

    A sweep over amounts ranks once: `vmap(lambda a: metric(f(prune(params, scores, a).params, x)))(amounts)`.

    Args:
        params: nested TensorDict.
        scores: TensorDict that holds, for each weight to rank, a tensor of its shape, or of one number per unit; or a function
            params -> scores, such as `magnitude`. Low ones go first, negative ones before all; of equal ones the first, in
            the order of `params`.
        amount: how much to prune: a float from 0 to 1 is the fraction, an int the number, of weights or units; or a tensor []
            of either (float64, where the exact number in millions of weights matters).
        scope: what is ranked together: all weights (`"global"`), each tensor (`"tensor"`), or each output neuron or channel of
            each tensor (`"output"`).
        structure: None prunes weight by weight; a dimension (0 for output neurons or channels, 1 for input ones) or `Units`
            (attention heads: `Units(1, size=head_size)` on the output projection) whole slices. A mapping from names or
            patterns to these ranks only what it names.
        order: the score of a unit is the sum of its scores (1), or of their squares (2, the ranking of the L2 norm).
        tied: function from the name of a parameter to the name of a group: units of the same number in one group (a neuron's
            weights, bias and scale; a head's rows in three projections) are one unit.
        select: which of the scored weights to rank; None: all of them.

    Returns:
        `Pruned(params, mask)`. What is not ranked is shared with the caller's `params`.

    Raises:
        InputError: an amount or option out of range, NaN among the scores (where values can be looked at, which is not under
            vmap or compilation: there an amount below 0 is 0, and one above all is all).
        ParamsError: scores that do not fit `params`, an unknown name, units that do not divide a tensor.

    Cost: one sort of the scores.

    Source: Han et al. (2015) for weights; Li et al., "Pruning Filters for Efficient ConvNets" (2017) for units. Amounts count
    as in `torch.nn.utils.prune`.

    Examples:
        >>> from tdhook.weights import magnitude
        >>> f, params = tdhook.functionalize(torch.nn.Linear(4, 2))
        >>> pruned = prune(params, magnitude, 0.25)
        >>> (pruned.params["weight"] == 0).sum()
        tensor(2)
        >>> x = torch.randn(3, 4)
        >>> torch.func.vmap(lambda a: f(prune(params, magnitude, a).params, x))(torch.tensor([0.0, 0.5, 1.0])).shape
        torch.Size([3, 3, 2])
    """
    require_params("params", params, single=True)
    require_amount(amount)
    if scope not in SCOPES:
        raise InputError(f"scope={scope!r} is unknown; choose from {', '.join(map(repr, SCOPES))}.")
    if order not in (1, 2):
        raise InputError(f"order={order!r} is unknown; choose 1 (sum of scores) or 2 (sum of squares).")
    given = scores(params) if callable(scores) and not isinstance(scores, TensorDictBase) else scores
    require_params("scores", given, single=True)
    tensors = flat(params)
    _require_scores(flat(given), tensors)
    ranked = select_parameters(given, select)
    if isinstance(structure, Mapping):
        named = by_parameter(given, structure, "structure")
        units = {key: _units(named[key]) for key in tensors if key in ranked and key in named}
    else:
        units = {key: _units(structure) for key in tensors if key in ranked}
    if not units:
        raise ParamsError("structure names no parameter that select names too.")
    for key, unit in units.items():
        _require_fit(key, ranked[key], tensors[key], unit)
        require_ordered(f"scores[{parameter_name(key)!r}]", ranked[key])
    if scope == "output":
        kept = _by_output(units, ranked, amount, tied)
    else:
        kept = _by_group(units, ranked, tensors, amount, scope, order, tied)
    pruned = {key: torch.where(mask, tensors[key], 0) for key, mask in kept.items()}
    return Pruned(replaced(params, pruned), nest(kept))


def _units(structure: Any) -> Units | None:
    if structure is None or isinstance(structure, Units):
        return structure
    if isinstance(structure, int) and not isinstance(structure, bool):
        return Units(structure)
    raise InputError(f"structure is None, a dimension, Units or a mapping to these, got {describe(structure)}.")


def _require_scores(scores: dict[Key, Tensor], tensors: dict[Key, Tensor]) -> None:
    for key, score in scores.items():
        if key not in tensors:
            raise ParamsError(f"scores has {parameter_name(key)!r}, which params has not.")
        if not score.is_floating_point() or not tensors[key].is_floating_point():
            raise ParamsError(
                f"scores[{parameter_name(key)!r}] is {describe(score)} for {describe(tensors[key])}; both have to be "
                "floating-point."
            )


def _require_fit(key: Key, scores: Tensor, weight: Tensor, unit: Units | None) -> None:
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


def _by_output(
    units: dict[Key, Units | None], ranked: dict[Key, Tensor], amount: Amount, tied: Callable | None
) -> dict[Key, Tensor]:
    """Masks where each output is ranked by itself."""
    if tied is not None or any(unit is not None for unit in units.values()):
        raise InputError("scope='output' ranks the single weights of each output; leave structure and tied out.")
    kept = {}
    for key in units:
        rows = ranked[key].reshape(len(ranked[key]), -1)
        count = count_of(amount, rows.shape[1], f"one output of {parameter_name(key)!r}")
        kept[key] = above_lowest(rows, count).reshape(ranked[key].shape)
    return kept


def _by_group(
    units: dict[Key, Units | None],
    ranked: dict[Key, Tensor],
    tensors: dict[Key, Tensor],
    amount: Amount,
    scope: str,
    order: int,
    tied: Callable[[str], str] | None,
) -> dict[Key, Tensor]:
    """Masks where the weights or units of all tensors, or of each (or each group that is tied), are ranked together."""
    groups: dict[Any, list[Key]] = {}
    for key in units:
        groups.setdefault(tied(parameter_name(key)) if tied else key, []).append(key)
    by_group = []
    for keys in groups.values():
        parts = [_unit_scores(ranked[key], tensors[key], units[key], order) for key in keys]
        if len({len(part) for part in parts}) > 1:
            counts = ", ".join(f"{len(part)} in {parameter_name(key)!r}" for key, part in zip(keys, parts))
            raise ParamsError(f"tied parameters need the same number of units: {counts}.")
        by_group.append(sum(parts[1:], start=parts[0]))
    if scope == "global":
        joined = torch.cat(by_group)
        masks = list(above_lowest(joined, count_of(amount, len(joined), "all scores")).split([len(g) for g in by_group]))
    else:
        names = [f"group {group!r}" if tied else repr(parameter_name(group)) for group in groups]
        masks = [above_lowest(s, count_of(amount, len(s), name)) for s, name in zip(by_group, names)]
    kept = {}
    for keys, mask in zip(groups.values(), masks):
        for key in keys:
            unit, like = units[key], tensors[key]
            kept[key] = mask.reshape(like.shape) if unit is None else unit.spread(mask, like)
    return {key: kept[key] for key in units}


def _unit_scores(scores: Tensor, weight: Tensor, unit: Units | None, order: int) -> Tensor:
    if unit is None:
        return scores.reshape(-1)
    if scores.ndim == 1 and scores.shape != weight.shape:
        return scores
    rows = unit.rows(scores)
    return rows.sum(1) if order == 1 else rows.square().sum(1)
