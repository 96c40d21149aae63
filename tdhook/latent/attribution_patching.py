"""Attribution patching: activation patching to first order, all sites in one backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import tensorclass
from torch import Tensor
from torch.func import grad

from ..core.checks import require_gradients, require_positive
from ..core.compat import is_compiling, unwrapped
from ..core.errors import InputError, SiteError
from ..core.functional import FunctionalModel
from ..core.replay import Tape
from ..core.sites import Want
from ..core.structure import describe
from .patches import Axis, Indices, Metric, View, Where, as_axes, at_each_place, same_grids, views, wants_of, writes
from .runs import Runs, check_runs, two_runs

Edit = Callable[[Tensor], Tensor]
Grids = Sequence[Sequence[Sequence[int]]]


@tensorclass
class AttributionPatching:
    """Estimated effects of patches.

    Attributes:
        effects: Tensor [S, P, *M]: an estimate of `patched - base` of `activation_patching`, where the base is the corrupted
            run to denoise and the clean one to noise. [S, *M] for whole sites, [S, P, Q, *M] for two axes.
        exact: bool Tensor [S, P]: which of them were measured.
        clean, corrupted: Tensor [*M], the metric of the two runs.
    """

    effects: Tensor
    exact: Tensor
    clean: Tensor
    corrupted: Tensor


def attribution_patching(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    sites: Where,
    positions: Indices = None,
    axis: Axis = 1,
    direction: str = "denoise",
    exact: int = 0,
    chunk_size: int | None = None,
) -> AttributionPatching:
    """`activation_patching` to first order, for all sites at once.

        denoise: effect[s, p] = < a_s[p] (clean) - a_s[p] (corrupted),  d metric / d a_s[p] (corrupted) >
        noise:   effect[s, p] = < a_s[p] (corrupted) - a_s[p] (clean),  d metric / d a_s[p] (clean) >

    With another backward it is another method: `f = with_rules(f, relp())` gives RelP.

    Args:
        f: functional model.
        params: its parameters.
        clean: one input.
        corrupted: the other one, of the same structure and shapes.
        metric: function of the output to a tensor [] or [B]. With [B] each example is taken to depend on itself alone, and the
            first axis of the values to be that of the examples.
        sites: as for `activation_patching`.
        positions: as for `activation_patching`.
        axis: as for `activation_patching`.
        direction: `"denoise"` or `"noise"`: which run is patched, and where the gradient is taken.
        exact: how many of the largest effects (in absolute value, averaged over examples) are measured by a patch each.
        chunk_size: how many of these patches of one site run at once; None for all.

    Returns:
        `AttributionPatching`: `effects` have the sign of `patched - base`.

    Raises:
        InputError: as `activation_patching`, and its other errors; a site of integers; an axis of examples with a metric [B];
            `exact` under vmap or compilation, which hide what is largest.
        SiteError: with a metric [B], a value that has not one row for each example.
        GradientError: grad mode is off.

    Cost: three forward passes, of which the third begins at the first site, and one backward pass; and `exact` patches.

    Source: Nanda, "Attribution Patching" (2023); for RelP Rezaei Jafari et al. (2025).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten(), torch.nn.Linear(3, 1, bias=False))
        >>> f, params = tdhook.functionalize(model)
        >>> run = (f, params, torch.ones(1, 3), torch.zeros(1, 3), lambda out: out.sum())
        >>> torch.allclose(attribution_patching(*run, sites="0").effects[0], params["2", "weight"][0])
        True
    """
    seen, axes = checked("attribution_patching", f, sites, clean, corrupted, metric, axis, direction, exact, chunk_size)
    runs = two_runs(f, params, clean, corrupted, metric, wants_of(seen), direction)
    grids = same_grids(seen, runs.base.values, axes, positions)
    require_scores(runs, seen, axes, exact)
    gradients = site_gradients(runs.base, metric, wants_of(seen))
    rows = [
        contracted(difference(runs, view) * view.of(gradients[view.want]), axes, lists, runs.base_metric.ndim)
        for view, lists in zip(seen, grids)
    ]
    return measure_largest(runs, metric, seen, torch.stack(rows), axes, grids, exact, chunk_size)


def checked(
    method: str,
    f: Any,
    sites: Where,
    clean: Any,
    corrupted: Any,
    metric: Any,
    axis: Axis,
    direction: str,
    exact: int,
    chunk_size: int | None,
) -> tuple[tuple[View, ...], tuple[int, ...]]:
    """What can be said of the arguments before anything runs; the views and axes."""
    require_gradients(method)
    seen, axes = views(f, sites), as_axes(axis)
    require_positive("exact", exact, least=0)
    check_runs(method, f, clean, corrupted, metric, direction, chunk_size)
    return seen, axes


def require_scores(runs: Runs, seen: Sequence[View], axes: tuple[int, ...], exact: int) -> None:
    """Raises unless the gradient at each view gives a number for each place and, for a metric [B], each example."""
    if exact and (is_compiling() or any(unwrapped(m).ndim > m.ndim for m in (runs.base_metric, runs.source_metric))):
        raise InputError(f"exact={exact} has to see which effects are largest; under vmap and compilation give exact=0.")
    for view in seen:
        part = view.of(runs.base.values[view.want])
        if not part.is_floating_point():
            raise InputError(f"sites has {view.name!r}, which holds {describe(part)}; give sites of floating-point values.")
        if runs.base_metric.ndim:
            if 0 in [axis % part.ndim for axis in axes]:
                raise InputError(
                    "axis=0 is that of the examples, for each of which the metric gives a number; take another axis."
                )
            if part.shape[:1] != runs.base_metric.shape:
                raise SiteError(
                    f"site {view.name!r} holds {describe(part)}, which is not one row for each of {len(runs.base_metric)} "
                    "examples; give a metric that is one number."
                )


def site_gradients(
    base: Tape,
    metric: Metric,
    wants: tuple[Want, ...],
    before: Mapping[Want, Edit] | None = None,
    after: Mapping[Want, Edit] | None = None,
) -> dict[Want, Tensor]:
    """The gradient of the metric, summed over examples, at every site, in one backward pass.

    Args:
        base: a run that has the sites.
        metric: to differentiate.
        wants: the sites.
        before: for some sites of the run an edit of the value; the gradient is taken behind it.
        after: for some sites an edit of what goes on from there; the gradient is taken before it.
    """
    before, after = before or {}, after or {}

    def total(shifts: list[Tensor]) -> Tensor:
        added = dict(zip(wants, shifts))
        table = {
            want: _shifting(before.get(want), added.get(want), after.get(want))
            for want in dict.fromkeys((*wants, *before, *after))
        }
        return metric(base.resume(table)).sum()

    return dict(zip(wants, grad(total)([torch.zeros_like(base.values[want]) for want in wants])))


def _shifting(before: Edit | None, shift: Tensor | None, after: Edit | None) -> Edit:
    def write(value: Tensor) -> Tensor:
        value = value if before is None else before(value)
        value = value if shift is None else value + shift
        return value if after is None else after(value)

    return write


def difference(runs: Runs, view: View) -> Tensor:
    """What a patch adds: the value of the source run minus that of the base."""
    return view.of(runs.source[view.want]) - view.of(runs.base.values[view.want])


def contracted(product: Tensor, axes: tuple[int, ...], lists: Sequence[Sequence[int]], metric_ndim: int) -> Tensor:
    """A product of differences and gradients summed over all but the places and, for a metric [B], the examples: [*P, *M]."""
    kept = [*(axis % product.ndim for axis in axes), *[0] * metric_ndim]
    rest = [axis for axis in range(product.ndim) if axis not in kept]
    product = product.permute(*kept, *rest)
    scores = product.reshape(*product.shape[: len(kept)], -1).sum(-1)
    for axis, chosen in enumerate(lists):
        scores = scores.index_select(axis, torch.tensor(list(chosen), device=scores.device))
    return scores


def measure_largest(
    runs: Runs,
    metric: Metric,
    seen: Sequence[View],
    effects: Tensor,
    axes: tuple[int, ...],
    grids: Grids,
    count: int,
    chunk_size: int | None,
    magnitude: bool = False,
) -> AttributionPatching:
    """The estimates, with the largest `count` of them measured by patches."""
    shape = effects.shape[: 1 + len(axes)]
    sizes = effects.abs().flatten(len(shape)).mean(-1) if effects.ndim > len(shape) else effects.abs()
    done = torch.zeros(shape, dtype=torch.bool, device=effects.device)
    if count:
        largest = sizes.flatten().topk(min(count, sizes.numel())).indices
        done = done.flatten().scatter(0, largest, torch.ones_like(largest, dtype=torch.bool)).reshape(shape)
        rows = []
        for view, lists, row, chosen in zip(seen, grids, effects, done):
            rows.append(_measured_row(runs, metric, view, row, axes, lists, chosen, chunk_size, magnitude))
        effects = torch.stack(rows)
    return AttributionPatching(  # type: ignore[call-arg]
        effects=effects, exact=done, clean=runs.clean_metric, corrupted=runs.corrupted_metric, batch_size=[]
    )


def _measured_row(
    runs: Runs,
    metric: Metric,
    view: View,
    row: Tensor,
    axes: tuple[int, ...],
    lists: Sequence[Sequence[int]],
    chosen: Tensor,
    chunk_size: int | None,
    magnitude: bool,
) -> Tensor:
    """The effects at one site, where `chosen` from patches."""
    which = chosen.flatten().nonzero()[:, 0].tolist()
    if not which:
        return row
    places = list(itertools.product(*lists))
    patch = (view, view.of(runs.source[view.want]))
    patched = at_each_place(
        runs.base,
        lambda mask: metric(runs.base.resume(writes([(*patch, mask)]))),
        runs.base_metric,
        [patch],
        axes,
        [places[i] for i in which],
        chunk_size,
    )
    measured = patched - runs.base_metric
    flat = row.reshape(len(places), *runs.base_metric.shape).clone()
    flat[torch.tensor(which, device=flat.device)] = (measured.abs() if magnitude else measured).to(flat)
    return flat.reshape(row.shape)
