"""Attribution patching with the gradient averaged over a line of points between the two runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.batching import chunks, vmap_or_loop
from ..core.errors import InputError, SiteError
from ..core.functional import FunctionalModel
from ..core.quadrature import quadrature_rule
from ..core.replay import Tape
from ..core.sites import SiteLike, Want
from ..core.structure import describe
from ..core.transforms import exact_wants
from .attribution_patching import (
    AttributionPatching,
    checked,
    contracted,
    difference,
    measure_largest,
    require_scores,
    site_gradients,
)
from .patches import Axis, Indices, Metric, Where, same_grids, wants_of
from .runs import two_runs, wide


def integrated_gradient_patching(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    sites: Where,
    along: SiteLike | None = None,
    positions: Indices = None,
    axis: Axis = 1,
    direction: str = "denoise",
    steps: int = 8,
    quadrature: str = "gauss_legendre",
    exact: int = 0,
    chunk_size: int | None = None,
) -> AttributionPatching:
    """`attribution_patching` with the gradient averaged over a line between the two runs.

        effect[s, p] = < D_s[p],  integral_0^1  d metric / d a_s[p]  at  f(base; do(a_s <- a_s(base) + t D_s))  dt >
        D_s = a_s(source) - a_s(base)

    The effects of all places of a site then sum to the effect of patching the whole site. With `along` the line is that of the
    values of one early site (the embedding), for all sites at once.

    Args:
        f: functional model.
        params: its parameters.
        clean: as for `attribution_patching`.
        corrupted: as for `attribution_patching`.
        metric: as for `attribution_patching`.
        sites: as for `attribution_patching`.
        along: None for a line at each site by itself; or one site that the run reaches before all others, whose values move.
        positions: as for `activation_patching`.
        axis: as for `activation_patching`.
        direction: as for `attribution_patching`; t runs from the run that is patched to the other one.
        steps: nodes of the quadrature, m.
        quadrature: see `tdhook.core.quadrature`. With `direction="noise"` and `along` the embedding, EAP-IG takes
            `"riemann_left"` for nodes (the clean end, not the corrupted one) and `"riemann_right"` for edges; with
            `along=None` sparse feature circuits take `"riemann_left"`.
        exact: as for `attribution_patching`.
        chunk_size: how many nodes, and how many exact patches of one site, run at once; None for all.

    Returns:
        `AttributionPatching`.

    Raises:
        InputError: as `attribution_patching`, and its other errors; an unknown quadrature.
        SiteError: as there; `along` that is not one site before all others.

    Cost: two forward passes, and for each site `steps` forward and backward passes of what comes after it; with `along`
    `steps` forward and backward passes in all.

    Source: Hanna et al., "Have Faith in Faithfulness" (2024); Marks et al., "Sparse Feature Circuits" (2024).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU()))
        >>> run = (f, params, torch.tensor([[3.0]]), torch.tensor([[-1.0]]), lambda out: out.sum())
        >>> integrated_gradient_patching(*run, sites="0", steps=40, quadrature="midpoint").effects
        tensor([[3.]])
    """
    seen, axes = checked("integrated_gradient_patching", f, sites, clean, corrupted, metric, axis, direction, exact, chunk_size)
    nodes, weights = quadrature_rule(quadrature, steps)
    lane = None if along is None else _lane(f, along)
    wants = wants_of(seen) if lane is None else tuple(dict.fromkeys((lane, *wants_of(seen))))
    runs = two_runs(f, params, clean, corrupted, metric, wants, direction)
    grids = same_grids(seen, runs.base.values, axes, positions)
    require_scores(runs, seen, axes, exact)
    if lane is not None:
        _require_first(runs.base, lane)

    def mean_gradients(moved: Want, shift: Tensor, at: tuple[Want, ...]) -> dict[Want, Tensor]:
        """The gradients at sites, averaged while the value at one site goes from the base by `shift`."""

        def gradients(node: Tensor) -> list[Tensor]:
            there = runs.base.values[moved] + (node * shift).to(shift.dtype)
            found = site_gradients(runs.base, metric, at, {moved: lambda value: there})
            return [found[want] for want in at]

        # In half precision a sum of many stops growing.
        sums = [torch.zeros_like(wide(runs.base.values[want])) for want in at]
        points, scale = (torch.tensor(each, dtype=wide(shift).dtype, device=shift.device) for each in (nodes, weights))
        for part in chunks(steps, chunk_size):
            several = vmap_or_loop(gradients, points[part])
            sums = [total + torch.tensordot(scale[part].to(total), wide(each), 1) for total, each in zip(sums, several)]
        return {want: total.to(runs.base.values[want].dtype) for want, total in zip(at, sums)}

    rows = []
    joint = {} if lane is None else mean_gradients(lane, runs.source[lane] - runs.base.values[lane], wants_of(seen))
    for view, lists in zip(seen, grids):
        there = runs.base.values[view.want]
        if lane is None:
            shift = view.within(there, view.of(runs.source[view.want])) - there
            gradient = mean_gradients(view.want, shift, (view.want,))[view.want]
        else:
            gradient = joint[view.want]
        rows.append(contracted(difference(runs, view) * view.of(gradient), axes, lists, runs.base_metric.ndim))
    return measure_largest(runs, metric, seen, torch.stack(rows), axes, grids, exact, chunk_size)


def _lane(f: FunctionalModel, along: SiteLike) -> Want:
    wants = exact_wants(f, along, "along")
    if len(wants) > 1:
        raise SiteError(f"along is one site, got {len(wants)}: {', '.join(str(want.site) for want in wants)}.")
    return Want(wants[0].site, str(wants[0].site), exact=True)  # as a view of the same site has it


def _require_first(base: Tape, lane: Want) -> None:
    if not (value := base.values[lane]).is_floating_point():
        raise InputError(f"along={str(lane.site)!r} holds {describe(value)}; give a site of floating-point values.")
    if (first := next(iter(base.values))) != lane:
        raise SiteError(
            f"along={str(lane.site)!r} is reached after {str(first.site)!r}, whose gradient it would cut off; give a site "
            "before all others, such as the embedding."
        )
