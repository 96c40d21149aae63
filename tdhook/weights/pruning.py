"""Pruning: weights with the lowest scores set to zero, one by one or in units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ..core.errors import InputError, ParamsError
from .ranking import Amount, above_lowest, count_of, ranks, require_amount, require_ordered
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
from .units import Units, require_fit, require_scores, unit_scores, units_of

SCOPES = ("global", "tensor", "output")


class Pruned(NamedTuple):
    """Pruned parameters.

    Attributes:
        params: with zeros in place of what was pruned.
        mask: TensorDict of bool tensors for the weights that were ranked: True where a weight is kept.
    """

    params: TensorDict
    mask: TensorDict


Structure = None | int | Units | Mapping[str, Any]
Scores = TensorDictBase | Callable[[TensorDictBase], TensorDictBase]
Masks = Callable[[Amount], dict[Key, Tensor]]
Keeper = Callable[[Tensor], Callable[[int | Tensor], Tensor]]


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

    `pruner` ranks once for many amounts.

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

    Cost: one selection among the scores (a sort where values cannot be looked at).

    Source: Han et al. (2015) for weights; Li et al., "Pruning Filters for Efficient ConvNets" (2017) for units. Amounts count
    as in `torch.nn.utils.prune`.

    Examples:
        >>> from tdhook.weights import magnitude
        >>> f, params = tdhook.functionalize(torch.nn.Linear(4, 2))
        >>> pruned = prune(params, magnitude, 0.25)
        >>> (pruned.params["weight"] == 0).sum()
        tensor(2)
    """
    require_amount(amount)
    return _pruner(params, scores, scope, structure, order, tied, select, once=True)(amount)


def pruner(
    params: TensorDictBase,
    scores: Scores,
    *,
    scope: str = "global",
    structure: Structure = None,
    order: int = 1,
    tied: Callable[[str], str] | None = None,
    select: Select = None,
) -> Callable[[Amount], Pruned]:
    """Pruning by any amount, ranked once: for sweeps.

        pruner(params, scores)(amount) = prune(params, scores, amount)

    Args:
        params: as in `prune`.
        scores: as in `prune`.
        scope: as in `prune`.
        structure: as in `prune`.
        order: as in `prune`.
        tied: as in `prune`.
        select: as in `prune`.

    Returns:
        Function from an amount to `Pruned`. Vmapped over amounts it runs that many models at once, for which convolutions on a
        CPU have no fast kernel: there `vmap(..., chunk_size=1)` is faster.

    Raises:
        InputError: as `prune`; ParamsError: as `prune`; the function for an amount out of range.

    Cost: one sort of the scores; then a comparison for each amount.

    Source: as `prune`.

    Examples:
        >>> from tdhook.weights import magnitude
        >>> f, params = tdhook.functionalize(torch.nn.Linear(4, 2))
        >>> x, pruned_by = torch.randn(3, 4), pruner(params, magnitude)
        >>> torch.func.vmap(lambda amount: f(pruned_by(amount).params, x))(torch.tensor([0.0, 0.5, 1.0])).shape
        torch.Size([3, 3, 2])
    """
    return _pruner(params, scores, scope, structure, order, tied, select, once=False)


def _pruner(
    params: TensorDictBase,
    scores: Scores,
    scope: str,
    structure: Structure,
    order: int,
    tied: Callable[[str], str] | None,
    select: Select,
    once: bool,
) -> Callable[[Amount], Pruned]:
    """`pruner`; `once` where it is called once, for which ranks are not needed."""
    require_params("params", params, single=True)
    if scope not in SCOPES:
        raise InputError(f"scope={scope!r} is unknown; choose from {', '.join(map(repr, SCOPES))}.")
    if order not in (1, 2):
        raise InputError(f"order={order!r} is unknown; choose 1 (sum of scores) or 2 (sum of squares).")
    given = scores(params) if callable(scores) and not isinstance(scores, TensorDictBase) else scores
    require_params("scores", given, single=True)
    tensors = flat(params)
    require_scores(flat(given), tensors)
    ranked = select_parameters(given, select)
    if isinstance(structure, Mapping):
        named = by_parameter(given, structure, "structure")
        units = {key: units_of(named[key]) for key in tensors if key in ranked and key in named}
    else:
        units = {key: units_of(structure) for key in tensors if key in ranked}
    if not units:
        raise ParamsError("structure names no parameter that select names too.")
    for key, unit in units.items():
        require_fit(key, ranked[key], tensors[key], unit)
        require_ordered(f"scores[{parameter_name(key)!r}]", ranked[key])
    keeper: Keeper = (lambda scores: partial(above_lowest, scores)) if once else _ranked
    by_output = scope == "output"
    kept_at = (
        _by_output(units, ranked, tied, keeper) if by_output else _by_group(units, ranked, tensors, scope, order, tied, keeper)
    )

    def pruned_by(amount: Amount) -> Pruned:
        require_amount(amount)
        kept = kept_at(amount)
        pruned = {key: torch.where(mask, tensors[key], 0) for key, mask in kept.items()}
        return Pruned(replaced(params, pruned), nest(kept))

    return pruned_by


def _ranked(scores: Tensor) -> Callable[[int | Tensor], Tensor]:
    """As `above_lowest` of scores that are sorted here."""
    places = ranks(scores)
    return lambda count: places >= count


def _by_output(units: dict[Key, Units | None], ranked: dict[Key, Tensor], tied: Callable | None, keeper: Keeper) -> Masks:
    """Masks where each output is ranked by itself."""
    if tied is not None or any(unit is not None for unit in units.values()):
        raise InputError("scope='output' ranks the single weights of each output; leave structure and tied out.")
    rows = {key: ranked[key].reshape(len(ranked[key]), -1) for key in units}
    kept = {key: keeper(row) for key, row in rows.items()}

    def kept_at(amount: Amount) -> dict[Key, Tensor]:
        counts = {key: count_of(amount, row.shape[1], f"one output of {parameter_name(key)!r}") for key, row in rows.items()}
        return {key: kept[key](counts[key]).reshape(ranked[key].shape) for key in units}

    return kept_at


def _by_group(
    units: dict[Key, Units | None],
    ranked: dict[Key, Tensor],
    tensors: dict[Key, Tensor],
    scope: str,
    order: int,
    tied: Callable[[str], str] | None,
    keeper: Keeper,
) -> Masks:
    """Masks where the weights or units of all tensors, or of each (or each group that is tied), are ranked together."""
    groups: dict[Any, list[Key]] = {}
    for key in units:
        groups.setdefault(tied(parameter_name(key)) if tied else key, []).append(key)
    names = [f"group {group!r}" if tied else repr(parameter_name(group)) for group in groups]
    by_group = []
    for keys in groups.values():
        parts = [unit_scores(ranked[key], tensors[key], units[key], order) for key in keys]
        if len({len(part) for part in parts}) > 1:
            counts = ", ".join(f"{len(part)} in {parameter_name(key)!r}" for key, part in zip(keys, parts))
            raise ParamsError(f"tied parameters need the same number of units: {counts}.")
        by_group.append(sum(parts[1:], start=parts[0]))
    sizes = [len(part) for part in by_group]
    together = scope == "global"
    kept = [keeper(torch.cat(by_group))] if together else [keeper(part) for part in by_group]

    def kept_at(amount: Amount) -> dict[Key, Tensor]:
        if together:
            masks = list(kept[0](count_of(amount, sum(sizes), "all scores")).split(sizes))
        else:
            masks = [keep(count_of(amount, size, name)) for keep, size, name in zip(kept, sizes, names)]
        found = {}
        for keys, mask in zip(groups.values(), masks):
            for key in keys:
                unit, like = units[key], tensors[key]
                found[key] = mask.reshape(like.shape) if unit is None else unit.spread(mask, like)
        return {key: found[key] for key in units}

    return kept_at
