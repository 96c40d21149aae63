"""Ablation: what a model does without a part, which is set to zero, a mean or another example's, or drowned in noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import tensorclass
from torch import Tensor

from ..core.checks import require_positive, warn_if_stochastic
from ..core.errors import InputError, SiteError
from ..core.estimate import Moments
from ..core.functional import FunctionalModel
from ..core.progress import Progress
from ..core.replay import Tape
from .patches import (
    Axis,
    Indices,
    Metric,
    Where,
    as_axes,
    at_indices,
    grid,
    measured,
    require_metric,
    same_grids,
    sweep,
    views,
    wants_of,
    writes,
)
from .replacements import To, is_random, replacements, require_replacement
from .runs import wide


@tensorclass
class Ablation:
    """The metric after every ablation, and without any.

    Attributes:
        ablated: Tensor [S, P, *M] for S sites, P places along an axis and a metric of shape M ([] or [B]); [S, *M] for whole
            sites, [S, P, Q, *M] for two axes. The mean over the samples of a random ablation.
        standard_error: of `ablated`, in its shape: 0 where nothing is random, NaN for one sample.
        intact: Tensor [*M], without an ablation.
    """

    ablated: Tensor
    standard_error: Tensor
    intact: Tensor

    @property
    def effect(self) -> Tensor:
        """`ablated - intact`: negative where the part worked in favour of the metric."""
        return self.ablated - self.intact


def ablate(
    f: FunctionalModel,
    params: Any,
    inputs: Any,
    *,
    sites: Where | Mapping[Any, Any],
    to: To = "zero",
    axis: Axis = None,
    positions: Indices = None,
    reference: Any = None,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Any:
    """The output with parts of the activations ablated, all at once.

        zero:      a_s <- 0
        a number:  a_s <- that number
        means:     a_s <- means[s]
        resample:  a_s <- a_s of another example, drawn at random, the same one at all sites
        noise:     a_s <- a_s + scale * std(a_s) * e,    e standard normal, std over all numbers of a_s

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them.
        sites: addresses; patterns stand for all modules that they match. A `HeadLayout` of `tdhook.latent.names` stands for the
            heads at its site, as a value [..., heads, size]: `sites=names.head_output[3], axis=-2, positions=[0, 2]`. A mapping
            gives each site positions of its own: `sites={names.head_output[3]: [0], names.head_output[5]: [1, 4]}, axis=-2`.
        to: `"zero"`, a number, `"resample"` or `"noise"`; or a mapping from sites to tensors that broadcast to the values there
            (without their heads apart), such as what `mean_activations` returns.
        axis: axis of the values that `positions` count: 1 for the tokens of [B, L, D], -1 for neurons; several for the parts
            where they meet. None for whole values.
        positions: indices along it that are ablated; None for all. For several axes a sequence with one such for each.
        reference: for `"resample"`: inputs to draw examples from, of the shapes of `inputs`; None for the other examples of
            `inputs`.
        scale: of the noise.
        generator: for `"resample"` and `"noise"`; None for the global one.

    Returns:
        What `f` returns.

    Raises:
        InputError: an unknown kind, positions out of range, no other example to draw, padding that would be drawn for tokens.
        SiteError: as `capture`, a site without a mean, a mean of another shape. Warns for a model in train mode.

    Cost: one forward pass, and what comes after the first site again; one more for a reference. Eager only, with a generator.

    Source: Meyes et al., "Ablation Studies in Artificial Neural Networks" (2019); for means and resampling Wang et al.,
    "Interpretability in the Wild" (2022), and Chan et al., "Causal Scrubbing" (2022).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity()))
        >>> ablate(f, params, torch.tensor([[1.0, 2, 3]]), sites="0", axis=-1, positions=[0, 2])
        tensor([[0., 2., 0.]])
        >>> means = {"0": torch.tensor([4.0, 5, 6])}
        >>> ablate(f, params, torch.tensor([[1.0, 2, 3]]), sites="0", to=means, axis=-1, positions=[1])
        tensor([[1., 5., 3.]])
    """
    if isinstance(sites, Mapping):
        if positions is not None:
            raise InputError("positions are given twice, by sites and by positions; leave out positions.")
        groups = [(views(f, where), chosen) for where, chosen in sites.items()]
    else:
        groups = [(views(f, sites), positions)]
    seen = tuple(view for each, _ in groups for view in each)
    if not seen:
        raise SiteError("sites is empty: no site was given; give at least one.")
    for number, view in enumerate(seen):
        if view in seen[:number]:
            raise SiteError(f"sites means {view.name!r} twice; give all positions of a site together.")
    axes = as_axes(axis)
    require_replacement(inputs, seen, to, reference, scale, generator)
    warn_if_stochastic(f, "ablate")

    base = Tape(f, params, inputs, wants_of(seen))
    grids = {view: grid(view, base.values[view.want], axes, chosen) for each, chosen in groups for view in each}
    options: Any = {"to": to, "reference": reference, "scale": scale, "generator": generator}
    patches = []
    for view, source in replacements(f, params, inputs, base.values, grids, axes, **options)().items():
        mask = (lambda part, chosen=grids[view]: at_indices(part, axes, chosen)) if axes else None
        patches.append((view, source, mask))
    return base.resume(writes(patches))


def ablation_effects(
    f: FunctionalModel,
    params: Any,
    inputs: Any,
    metric: Metric,
    *,
    sites: Where,
    to: To = "zero",
    axis: Axis = None,
    positions: Indices = None,
    reference: Any = None,
    scale: float = 1.0,
    samples: int = 1,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Ablation:
    """The metric after each single ablation: of one site, one place in it, at a time.

        ablated[s, p] = metric(f(x; do(a_s[p] <- replacement)))

    `sites=names.head_output, axis=-2` ablates every head of every layer.

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them.
        metric: function of the output to a tensor [] or [B].
        sites: as for `ablate`, but no mapping.
        to: as for `ablate`.
        axis: axis of the values along which places are ablated one by one, or several for all combinations; None for whole
            sites.
        positions: indices along it; None for all. For several axes a sequence with one such for each.
        reference: as for `ablate`.
        scale: as for `ablate`.
        samples: how many draws of `"resample"` or `"noise"` the mean is taken over. A draw is used for all sites and places.
        generator: for the draws, which do not depend on `chunk_size`; None for the global one.
        chunk_size: how many ablations of one site run at once; None for all. It does not change the result.
        progress: called as `progress(done, total)` at the start and after every site of every sample.

    Returns:
        `Ablation` with `ablated`, `standard_error`, `intact`, and `effect`.

    Raises:
        InputError: as `ablate`, and SiteError.
        TargetError: a metric of another shape.

    Cost: one forward pass, and for each sample and site one vmapped pass over its places that runs only what lies after the
    site. An ablation that would write what is already there is not run.

    Source: as `ablate`.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(3, 1, bias=False))
        >>> f, params = tdhook.functionalize(model)
        >>> result = ablation_effects(f, params, torch.ones(1, 3), lambda out: out[:, 0], sites="0", axis=-1)
        >>> torch.allclose(result.effect[0, :, 0], -params["1", "weight"][0], atol=1e-6)
        True
    """
    seen, axes = views(f, sites), as_axes(axis)
    require_positive("chunk_size", chunk_size, optional=True)
    require_positive("samples", samples)
    require_metric(metric)
    if samples > 1 and not is_random(to):
        raise InputError(f"samples={samples}, but only 'resample' and 'noise' are random; take samples=1.")
    require_replacement(inputs, seen, to, reference, scale, generator)
    warn_if_stochastic(f, "ablation_effects")

    base = Tape(f, params, inputs, wants_of(seen))
    intact = measured(metric, base.output)
    grids = dict(zip(seen, same_grids(seen, base.values, axes, positions)))
    options: Any = {"to": to, "reference": reference, "scale": scale, "generator": generator}
    draw = replacements(f, params, inputs, base.values, grids, axes, **options)
    total, done = samples * len(seen), 0
    if progress is not None:
        progress(0, total)
    moments = None
    for _ in range(samples):
        sources, rows = draw(), []
        for view, lists in grids.items():
            source = sources[view]
            new = source(view.of(base.values[view.want])) if callable(source) else source
            rows.append(sweep(base, metric, intact, [(view, new)], axes, lists, chunk_size))
            done += 1
            if progress is not None:
                progress(done, total)
        sample = Moments.of(wide(torch.stack(rows))[None])
        moments = sample if moments is None else moments + sample
    assert moments is not None
    mean = moments.mean.to(intact.dtype)
    error = moments.standard_error.to(intact.dtype) if is_random(to) else torch.zeros_like(mean)
    return Ablation(ablated=mean, standard_error=error, intact=intact, batch_size=[])  # type: ignore[call-arg]
