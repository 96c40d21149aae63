"""Patching of random subsets: what single patches and their estimates have missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.batching import vmap_or_loop
from ..core.checks import require_number, require_positive
from ..core.errors import InputError
from ..core.estimate import Estimate
from ..core.functional import FunctionalModel
from ..core.randomness import require_generator, stacked, uniform
from ..core.structure import describe
from .patches import Axis, Indices, Metric, View, Where, as_axes, same_grids, views, wants_of, writes
from .runs import check_runs, two_runs, wide


class SubsetPatching(NamedTuple):
    """What patches of random subsets do.

    Attributes:
        effects: Tensor [N, *M]: `patched - base` for each of N subsets, patched all at once.
        contributions: `Estimate` of [S, P, *M]: how much larger the effect is where a node is in the subset. NaN for a node
            that is in all or in none of them.
    """

    effects: Tensor
    contributions: Estimate


def subset_patching(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    sites: Where,
    positions: Indices = None,
    axis: Axis = 1,
    exclude: Tensor | None = None,
    probability: float = 0.5,
    samples: int = 64,
    direction: str = "denoise",
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> SubsetPatching:
    """The effect of patching random subsets of all nodes, and the share of each node in it.

        effect_k        = metric(f(base; do(all nodes of subset k <- source run))) - metric(f(base))
        contribution[n] = mean_k (effect_k | n in k)  -  mean_k (effect_k | n not in k)

    A diagnosis of `attribution_patching` and `atp_star`: of the nodes that they have not found (`exclude=result.exact`), one
    whose contribution lies several standard errors from zero was missed; where all lie within, what a node can still hide is
    bounded by these errors: `|value| + 2 * standard_error`, say. A node whose effect is the same in all company has its own
    effect as contribution.

    Args:
        f: functional model.
        params: its parameters.
        clean: as for `activation_patching`.
        corrupted: as for `activation_patching`.
        metric: as for `activation_patching`.
        sites: the nodes, as for `activation_patching`.
        positions: as there.
        axis: as there.
        exclude: bool Tensor [S, P], the nodes that are never patched; None for none.
        probability: with which a node is in a subset, independently of the others.
        samples: how many subsets, N.
        direction: as for `activation_patching`.
        generator: for the subsets, which do not depend on `chunk_size`; None for the global one.
        chunk_size: how many subsets run at once; None for all.

    Returns:
        `SubsetPatching` with `effects` and `contributions`, whose standard errors are those of a difference of two means.

    Raises:
        as `activation_patching`. InputError: a probability that is not between 0 and 1, `exclude` of another shape.

    Cost: two forward passes, and one for each subset.

    Source: after the diagnostics of Kramar et al., "AtP*" (2024); the contribution is the Banzhaf value for
    `probability=0.5`.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten(), torch.nn.Linear(3, 1, bias=False))
        >>> f, params = tdhook.functionalize(model)
        >>> result = subset_patching(f, params, torch.ones(1, 3), torch.zeros(1, 3), torch.sum, sites="0", samples=200)
        >>> error = (result.contributions.value[0] - params["2", "weight"][0]).abs()
        >>> bool((error < 5 * result.contributions.standard_error[0]).all())
        True
    """
    seen, axes = views(f, sites), as_axes(axis)
    require_positive("samples", samples, least=2)
    require_number("probability", probability, strict=True)
    if probability >= 1:
        raise InputError(f"probability={probability} puts every node into every subset; give a number between 0 and 1.")
    require_generator(generator)
    check_runs("subset_patching", f, clean, corrupted, metric, direction, chunk_size)
    runs = two_runs(f, params, clean, corrupted, metric, wants_of(seen), direction)
    base, values = runs.base, runs.base.values
    grids = same_grids(seen, values, axes, positions)
    shape = (len(seen), *map(len, grids[0]))
    if exclude is not None and (not isinstance(exclude, Tensor) or exclude.shape != shape or exclude.dtype != torch.bool):
        raise InputError(f"exclude is {describe(exclude)}; give a bool tensor of shape {list(shape)}.")

    device = runs.base_metric.device
    (draws,) = stacked(lambda: [uniform(shape, generator, device)], samples)
    subsets = draws < probability
    if exclude is not None:
        subsets = subsets & ~exclude.to(device)

    def effect(subset: Tensor) -> Tensor:
        patches = []
        for view, lists, bits in zip(seen, grids, subset):
            patches.append((view, view.of(runs.source[view.want]), _chosen(view, bits, axes, lists)))
        return metric(base.resume(writes(patches))) - runs.base_metric

    effects = vmap_or_loop(effect, subsets, chunk_size)
    return SubsetPatching(effects, _contributions(effects, subsets))


def _chosen(view: View, bits: Tensor, axes: tuple[int, ...], lists: Sequence[Sequence[int]]) -> Callable[[Tensor], Tensor]:
    """The mask of the places whose bit is set; `bits` is [*P]."""

    def mask(part: Tensor) -> Tensor:
        chosen = bits
        for number, (axis, indices) in enumerate(zip(axes, lists)):
            here = torch.arange(part.shape[axis], device=part.device)[:, None] == torch.tensor(indices, device=part.device)
            # along each axis, from the places asked for to all of them
            chosen = (chosen.movedim(number, -1)[..., None, :] & here).any(-1).movedim(-1, number)
        counted = [axis % part.ndim for axis in axes]
        order = sorted(range(len(axes)), key=counted.__getitem__)
        chosen = chosen.permute(order)
        return chosen.reshape([part.shape[axis] if axis in counted else 1 for axis in range(part.ndim)])

    return mask


def _contributions(effects: Tensor, subsets: Tensor) -> Estimate:
    """The difference of the mean effects with and without each node, and its standard error."""
    flat = wide(effects.reshape(len(effects), -1))  # bfloat16 cannot count to 300
    centred = flat - flat.mean(0)
    means, errors = [], []
    for group in (subsets, ~subsets):
        weights = group.flatten(1).to(flat)
        count = weights.sum(0)[:, None]
        mean = weights.T @ centred / count
        squares = weights.T @ centred.square() - count * mean.square()
        means.append(mean)
        errors.append(squares.clamp(min=0) / (count - 1) / count)
    shape = (*subsets.shape[1:], *effects.shape[1:])
    value, error = means[0] - means[1], (errors[0] + errors[1]).sqrt()
    return Estimate(value.reshape(shape).to(effects.dtype), error.reshape(shape).to(effects.dtype))
