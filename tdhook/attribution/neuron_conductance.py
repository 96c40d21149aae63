"""Neuron conductance: the part of integrated gradients that flows through chosen units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from ..core.batching import vmap_or_loop
from ..core.checks import warn_if_stochastic
from ..core.errors import InputError
from ..core.functional import FunctionalModel
from ..core.structure import describe
from ..core.targets import Targets
from ..core.transforms import Sites
from .walks import checked_rule, gradients_at_sites, parts_of, walk_of

Unit = int | slice | tuple[int | slice, ...] | Tensor


def neuron_conductance(
    f: FunctionalModel,
    params: Any,
    inputs: Any,
    *,
    through: Mapping[Any, Unit],
    targets: Targets = None,
    baselines: Any = 0.0,
    along: Sites | None = None,
    steps: int = 50,
    quadrature: str = "gauss_legendre",
    chunk_size: int | None = None,
) -> Any:
    """The part of integrated gradients that flows through chosen units: conditional integrated gradients.

        attribution_i = (x_i - x'_i) * sum_s w_s sum_j m_j dF/dA_j * dA_j/dx_i,   both at x' + alpha_s (x - x')

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them. All floating-point tensors move together; others are passed through.
        through: for each site the units m: an index of the last axes (an int, a slice, or a tuple of them: `(c, h, w)` is one
            unit of feature maps [B, C, H, W]), or a mask or weights, Tensor that broadcasts to the value there. What flows
            through several sites is added up, so that of two sites, one after the other, what passes both counts twice.
        targets: as in `internal_influence`.
        baselines: as in `internal_influence`.
        along: as in `internal_influence`.
        steps: as in `internal_influence`.
        quadrature: as in `internal_influence`.
        chunk_size: as in `internal_influence`.

    Returns:
        Attributions in the structure of `inputs` (None in place of what does not move), or a TensorDict keyed by site for
        `along`, with a leading dimension T for plural targets. All units of a layer that cuts the graph give integrated
        gradients.

    Raises:
        InputError: units that do not fit the value at their site. Otherwise as `internal_influence`.

    Cost: one forward pass up to the sites; `steps` forward passes and `steps` more up to the sites, vmapped; `steps * T`
    backward passes, vmapped.

    Source: Dhamdhere, Sundararajan, Yan, "How Important is a Neuron?" (2018).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))
        >>> x = torch.randn(5, 3)
        >>> attribution = neuron_conductance(f, params, x, through={"0": 2}, targets=1)
        >>> torch.allclose(attribution, x * params["0", "weight"][2] * params["1", "weight"][1, 2])
        True
    """
    nodes, weights = checked_rule("neuron_conductance", f, targets, steps, quadrature, chunk_size)
    warn_if_stochastic(f, "neuron_conductance")
    if not isinstance(through, Mapping) or not through:
        raise InputError(f"through is a mapping from sites to units, got {describe(through)}.")
    for site, unit in through.items():
        _require_unit(site, unit)
    walk = walk_of(f, params, inputs, baselines, along, list(through), "through")
    masks = [_mask(site, unit, value) for (site, unit), value in zip(through.items(), walk.reached)]
    totals: list[Tensor] = []
    plural = False
    for chunk, at_once in parts_of(steps, chunk_size):
        points = walk.points(nodes[chunk])

        def head(shifts: list[Tensor], points: list[Tensor] = points) -> list[Tensor]:
            return vmap_or_loop(walk.values, [point + shift for point, shift in zip(points, shifts)])

        _, pull, *_ = vjp(head, [torch.zeros_like(end) for end in walk.path.ends])

        def through_units(gradients: list[Tensor], pull: Callable = pull) -> list[Tensor]:
            return pull([g * mask for g, mask in zip(gradients, masks)])[0]

        parts, plural = gradients_at_sites(walk, targets, points, weights[chunk], through_units, at_once)
        totals = [t + p for t, p in zip(totals, parts)] if totals else parts
    totals = [t * (end - start) for t, start, end in zip(totals, walk.path.starts, walk.path.ends)]
    return walk.path.explained.restructure(totals if plural else [t[0] for t in totals])


def _require_unit(site: Any, unit: Any) -> None:
    parts = unit if isinstance(unit, tuple) else (unit,)
    known = isinstance(unit, Tensor) or all(isinstance(p, (int, slice)) and not isinstance(p, bool) for p in parts)
    if not known or (isinstance(unit, tuple) and not unit):
        raise InputError(f"through[{site!r}] is {describe(unit)}; give an int, a slice, a tuple of them, or a mask.")


def _mask(site: Any, unit: Unit, value: Tensor) -> Tensor:
    """The weight of every unit, in the shape of the value at the site."""
    try:
        if isinstance(unit, Tensor):
            return unit.to(value).expand(value.shape)
        mask = torch.zeros_like(value)
        mask[(..., *(unit if isinstance(unit, tuple) else (unit,)))] = 1
    except (IndexError, RuntimeError):
        raise InputError(f"through[{site!r}] is {describe(unit)}, which does not fit {describe(value)} there.") from None
    return mask
