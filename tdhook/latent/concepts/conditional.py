"""Concept-conditioned attribution: the model with a backward pass that goes through some units or directions of a site only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.functional import FunctionalModel
from ...core.sites import Site
from ...core.structure import describe
from ...core.transforms import exact_wants, require_sites
from ...core.units import through, unit_mask
from ...core.writing import intervene
from .directions import as_directions, checked_axis, orthonormal, rows_of


def through_units(f: FunctionalModel, site: str | Site, units: Any, *, axis: int | None = None) -> FunctionalModel:
    """The same function, with a derivative that passes a site through some of its units only.

        h' = h in the units,  sg(h) elsewhere        (sg: no gradient)

    Args:
        f: functional model.
        site: an exact address.
        units: an index, several, an integer tensor [] or [U], or a boolean mask [C]. A tensor can be vmapped: many concepts in
            one call.
        axis: the axis of the units: 1 for the channels of [B, C, H, W], -1 for the features of tokens [B, L, D]. It may be left
            out where the value is [B, C].

    Returns:
        A functional model with the same values. Every gradient method explains it: saliency, input x gradient, integrated
        gradients and its kin, Grad-CAM before the site, propagation rules. Methods that compare outputs only (occlusion,
        Shapley sampling, LIME) see no difference. `at=` sites come before the site: at the site itself, and after it,
        gradients are those of `f`. Paths that pass the site by, such as the residual stream beside a branch, keep their
        gradients: choose a site that everything passes, or freeze the others. Conditions at several sites are nested, and then
        only what passes through the units of each counts, as in concept relevance propagation.

    Raises:
        InputError: units that are no indices or are out of range, an axis that does not fit (when called). SiteError: as
            `capture`; a pattern.

    Cost: none beside the passes of `f`.

    Source: Achtibat et al., "From attribution maps to human-understandable explanations through Concept Relevance Propagation"
    (2023), the conditional backward pass.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)))
        >>> def one(unit):
        ...     g = through_units(f, "0", unit)
        ...     return tdhook.attribution.input_x_gradient(g, params, torch.ones(5, 3), targets=[0, 1])
        >>> by_unit = torch.func.vmap(one)(torch.arange(4))
        >>> by_unit.shape
        torch.Size([4, 2, 5, 3])
        >>> whole = tdhook.attribution.input_x_gradient(f, params, torch.ones(5, 3), targets=[0, 1])
        >>> torch.allclose(by_unit.sum(0), whole, atol=1e-6)
        True
    """
    name = _one_site(f, site)
    chosen = _as_units(units)

    def restricted(value: Tensor) -> Tensor:
        return through(value, unit_mask(chosen.reshape(-1), value, axis, name))

    return intervene(f, {site: restricted})


def through_direction(f: FunctionalModel, site: str | Site, direction: Any, *, axis: int | None = None) -> FunctionalModel:
    """The same function, with a derivative that passes a site along a direction only, or within the span of several.

        h' = sg(h) + P (h - sg(h)),    P the orthogonal projection on the direction        (sg: no gradient)

    Args:
        f: functional model.
        site: an exact address, whose value is [B, *features].
        direction: Tensor [*features] or, for the span of several, [K, *features]; `ConceptVectors`, or a fitted probe. Of any
            length; a tensor can be vmapped: many concepts in one call.
        axis: the axis along which the direction lies at every position: 1 for a direction [C] of maps [B, C, H, W], -1 for [D]
            of tokens [B, L, D]. None: it is as large as an example.

    Returns:
        A functional model with the same values; what `through_units` says of it holds here too. With P = v v', the gradient
        before the site is the directional derivative along v (what `tcav` measures) times the gradient of v . h.

    Raises:
        InputError: a direction that is zero, or does not fit the site (when called). SiteError: as `capture`; a pattern.

    Cost: the projection; none else beside the passes of `f`.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)))
        >>> g = through_direction(f, "0", torch.tensor([0.0, 2.0, 0.0, 0.0]))
        >>> x = torch.ones(1, 3)
        >>> torch.equal(g(params, x), f(params, x))
        True
        >>> attribution, row = tdhook.attribution.saliency(g, params, x, targets=0)[0], params["0", "weight"][1].abs()
        >>> torch.allclose(attribution / attribution.max(), row / row.max())
        True
    """
    name = _one_site(f, site)
    vectors = as_directions("direction", direction)

    def restricted(value: Tensor) -> Tensor:
        rows, lead = rows_of("direction", vectors, value, axis, name)
        if len(lead) > 1:
            raise InputError(f"direction has shape {list(vectors.shape)} at {name!r}; give one, or K with one more dimension.")
        basis = orthonormal(rows.to(torch.promote_types(value.dtype, torch.float32))).to(value)
        still = value.detach()
        moving = torch.where(still.isfinite(), value - still, 0)  # inf - inf is NaN
        where = checked_axis(axis, value, name)
        flat = moving.flatten(1) if where is None else moving.movedim(where, -1)
        projected = (flat @ basis.mT) @ basis
        return still + (projected.reshape(value.shape) if where is None else projected.movedim(-1, where))

    return intervene(f, {site: restricted})


def _one_site(f: Any, site: Any) -> str:
    require_sites(f)
    if not isinstance(site, (str, Site)):
        raise InputError(f"site is {describe(site)}; give one address, and nest the calls for several.")
    return str(exact_wants(f, site, "site")[0].site)


def _as_units(units: Any) -> Tensor:
    """Units as an integer tensor [] or [U], or a boolean mask [C]."""
    if isinstance(units, int) and not isinstance(units, bool):
        return torch.tensor(units)
    if isinstance(units, (list, tuple, range)) and len(units) and all(isinstance(u, int) for u in units):
        return torch.tensor(list(units))
    integers = isinstance(units, Tensor) and not (units.is_floating_point() or units.is_complex())
    if not integers or units.ndim > 1 or not units.numel() or (units.dtype == torch.bool and units.ndim == 0):
        raise InputError(f"units is {describe(units)}; give an index, several, an integer tensor [] or [U], or a mask [C].")
    return units
