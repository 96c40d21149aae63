"""Circuit pruning: a model of which only the units that matter are left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ..core.errors import InputError, SiteError
from ..core.functional import FunctionalModel
from ..core.structure import describe
from ..core.transforms import by_want, require_sites, values_at
from ..core.writing import intervene
from .pruning import SCOPES
from .ranking import Amount, above_lowest, count_of, require_amount, require_ordered

Replacement = float | Mapping[str, Tensor] | TensorDictBase


class Circuit(NamedTuple):
    """A pruned model.

    Attributes:
        f: functional model in which the units outside of the circuit are ablated.
        mask: TensorDict keyed by canonical site of bool tensors [U]: True for the units in the circuit.
    """

    f: FunctionalModel
    mask: TensorDict


def prune_circuit(
    f: FunctionalModel,
    relevance: Mapping[str, Tensor] | TensorDictBase,
    amount: Amount,
    *,
    axis: int = -1,
    scope: str = "global",
    ablation: Replacement = 0.0,
) -> Circuit:
    """Keeps the units of highest relevance at sites and ablates the others.

        a'_u = a_u if rank(R_u) >= k else ablation_u,    k = round(amount * U)

    Args:
        f: functional model.
        relevance: for each site a Tensor [U] of one number per unit, from any attribution: `attribution.abs().mean(0)`, say.
        amount: how much to ablate: a fraction (float) or number (int) of units, or a tensor [] of either.
        axis: axis of the values at the sites that counts the units: -1 for neurons, 1 for channels of [B, C, H, W] and for
            heads of [B, H, L, D].
        scope: rank the units of all sites together (`"global"`) or those of each site (`"tensor"`).
        ablation: what takes the place of a unit: a number, or for each site a tensor that broadcasts to the value there, such
            as its mean over a data set.

    Returns:
        `Circuit(f, mask)`: the pruned model, a functional model again, and what it keeps.

    Raises:
        InputError: an amount or option out of range, relevance that is no vector. SiteError: an unknown site; in the call, a
            relevance or an ablation that does not fit the value.

    Cost: one sort of the relevance; the model costs what it did.

    Source: Conmy et al., "Towards Automated Circuit Discovery for Mechanistic Interpretability" (2023), for what a circuit is;
    Yeom et al., "Pruning by explaining" (2021), for relevance as the criterion.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()))
        >>> circuit = prune_circuit(f, {"0": torch.tensor([1.0, 3.0, 2.0])}, 2)
        >>> circuit.f(params, torch.ones(1, 3)), circuit.mask["0"]
        (tensor([[0., 1., 0.]]), tensor([False,  True, False]))
    """
    require_sites(f)
    require_amount(amount)
    if scope not in SCOPES[:2]:
        raise InputError(f"scope={scope!r} is unknown; choose 'global' or 'tensor'.")
    table = by_want(f, relevance, "relevance")
    for want, scores in table.items():
        if not isinstance(scores, Tensor) or scores.ndim != 1 or not scores.is_floating_point():
            raise InputError(f"relevance[{want.request!r}] is {describe(scores)}; give a floating-point tensor [U].")
        require_ordered(f"relevance[{want.request!r}]", scores)
    wants, parts = tuple(table), list(table.values())
    if scope == "global":
        joined = torch.cat(parts)
        masks = list(above_lowest(joined, count_of(amount, len(joined), "all sites")).split([len(part) for part in parts]))
    else:
        masks = [above_lowest(part, count_of(amount, len(part), repr(str(want.site)))) for want, part in table.items()]
    if isinstance(ablation, (Mapping, TensorDictBase)):
        replacements = list(values_at(wants, ablation, "ablation").values())
    elif isinstance(ablation, (int, float)) and not isinstance(ablation, bool):
        replacements = [ablation] * len(wants)
    else:
        raise InputError(f"ablation is a number or a mapping from sites to tensors, got {describe(ablation)}.")
    named = {str(want.site): mask for want, mask in zip(wants, masks)}
    writes: dict[str, Callable] = {
        want.request if not want.exact else str(want.site): partial(
            _ablated, site=str(want.site), mask=m, ablation=r, axis=axis
        )
        for want, m, r in zip(wants, masks, replacements)
    }
    return Circuit(intervene(f, writes), TensorDict(named, batch_size=[]))


def _ablated(value: Tensor, site: str, mask: Tensor, ablation: Any, axis: int) -> Tensor:
    if not -value.ndim <= axis < value.ndim or value.shape[axis] != len(mask):
        raise SiteError(
            f"relevance at {site!r} has {len(mask)} units, but axis={axis} of the value there is {describe(value)}."
        )
    dims = [1] * value.ndim
    dims[axis] = -1
    if isinstance(ablation, Tensor):
        try:
            fits = torch.broadcast_shapes(ablation.shape, value.shape) == value.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise SiteError(f"ablation at {site!r} is {describe(ablation)}, which does not broadcast to {describe(value)}.")
        ablation = ablation.to(value)
    return torch.where(mask.reshape(dims), value, ablation)
