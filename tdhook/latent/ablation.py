"""Ablation: what a model does without a part, which is set to zero, a mean or another example's, or drowned in noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase, tensorclass
from torch import Tensor

from ..core.checks import require_number, require_positive, warn_if_stochastic
from ..core.errors import InputError, SiteError, did_you_mean
from ..core.estimate import Moments
from ..core.functional import FunctionalModel
from ..core.progress import Progress
from ..core.randomness import integers, normal_like, require_generator
from ..core.reading import Capture
from ..core.replay import Tape
from ..core.structure import describe
from .patches import (
    Axis,
    Indices,
    Metric,
    Source,
    View,
    Where,
    as_axes,
    at_indices,
    grid,
    measured,
    same_grids,
    sweep,
    views,
    wants_of,
    writes,
)
from .streaming import count_examples

KINDS = ("zero", "resample", "noise")
To = str | float | Mapping[Any, Any] | TensorDictBase


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
    indices: Indices = None,
    reference: Any = None,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Any:
    """The output with parts of the activations ablated, all at once.

        zero:      a_s <- 0
        a number:  a_s <- that number
        means:     a_s <- means[s]
        resample:  a_s <- a_s of another example, drawn at random, the same one at all sites
        noise:     a_s <- a_s + scale * std(a_s) * e,    e standard normal

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them.
        sites: addresses; patterns stand for all modules that they match. A `HeadLayout` of `tdhook.latent.names` stands for the
            heads at its site, as a value [..., heads, size]: `sites=names.head_output[3], axis=-2, indices=[0, 2]`. A mapping
            gives each site indices of its own: `sites={names.head_output[3]: [0], names.head_output[5]: [1, 4]}, axis=-2`.
        to: `"zero"`, a number, `"resample"` or `"noise"`; or a mapping from sites to tensors that broadcast to the values there
            (without their heads apart), such as what `mean_activations` returns.
        axis: axis of the values that `indices` count: 1 for the tokens of [B, L, D], -1 for neurons; several for the parts
            where they meet. None for whole values.
        indices: what is ablated along it; None for all. For several axes a sequence with one such for each.
        reference: for `"resample"`: inputs to draw examples from, of the shapes of `inputs`; None for the other examples of
            `inputs`.
        scale: of the noise.
        generator: for `"resample"` and `"noise"`; None for the global one.

    Returns:
        What `f` returns.

    Raises:
        InputError: an unknown kind, indices out of range, no other example to draw.
        SiteError: as `capture`, a site without a mean, a mean of another shape. Warns for a model in train mode.

    Cost: one forward pass, and what comes after the first site again; one more for a reference. Eager only, with a generator.

    Source: Meyes et al., "Ablation Studies in Artificial Neural Networks" (2019); for means and resampling Wang et al.,
    "Interpretability in the Wild" (2022), and Chan et al., "Causal Scrubbing" (2022).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity()))
        >>> ablate(f, params, torch.tensor([[1.0, 2, 3]]), sites="0", axis=-1, indices=[0, 2])
        tensor([[0., 2., 0.]])
        >>> ablate(f, params, torch.tensor([[1.0, 2, 3]]), sites="0", to={"0": torch.tensor([4.0, 5, 6])}, axis=-1, indices=[1])
        tensor([[1., 5., 3.]])
    """
    if isinstance(sites, Mapping):
        if indices is not None:
            raise InputError("indices are given twice, by sites and by indices; leave out indices.")
        groups = [(views(f, where), chosen) for where, chosen in sites.items()]
    else:
        groups = [(views(f, sites), indices)]
    seen = tuple(view for each, _ in groups for view in each)
    if not seen:
        raise SiteError("sites is empty: no site was given; give at least one.")
    axes = as_axes(axis)
    _check(to, seen, reference, scale, generator)
    warn_if_stochastic(f, "ablate")

    base = Tape(f, params, inputs, wants_of(seen))
    lists = {view: grid(view, base.values[view.want], axes, chosen, "indices") for each, chosen in groups for view in each}
    draw = _Draw(f, params, inputs, base, seen, to, reference, scale, generator)
    patches = []
    for view, source in draw().items():
        mask = (lambda part, chosen=lists[view]: at_indices(part, axes, chosen)) if axes else None
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
        sites: as for `ablate`.
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
    random = isinstance(to, str) and to != "zero"
    if samples > 1 and not random:
        raise InputError(f"samples={samples}, but only 'resample' and 'noise' are random; take samples=1.")
    _check(to, seen, reference, scale, generator)
    warn_if_stochastic(f, "ablation_effects")

    base = Tape(f, params, inputs, wants_of(seen))
    intact = measured(metric, base.output)
    grids = same_grids(seen, base.values, axes, positions)
    draw = _Draw(f, params, inputs, base, seen, to, reference, scale, generator)
    total, done = samples * len(seen), 0
    if progress is not None:
        progress(0, total)
    moments = None
    for _ in range(samples):
        sources, rows = draw(), []
        for view, lists in zip(seen, grids):
            source = sources[view]
            new = source(view.of(base.values[view.want])) if callable(source) else source
            rows.append(sweep(base, metric, intact, [(view, new)], axes, lists, chunk_size))
            done += 1
            if progress is not None:
                progress(done, total)
        sample = Moments.of(torch.stack(rows)[None])
        moments = sample if moments is None else moments + sample
    assert moments is not None
    error = moments.standard_error if random else torch.zeros_like(moments.mean)
    return Ablation(ablated=moments.mean, standard_error=error, intact=intact, batch_size=[])  # type: ignore[call-arg]


def _check(to: Any, seen: tuple[View, ...], reference: Any, scale: Any, generator: Any) -> None:
    """What can be said of the arguments before anything runs."""
    require_generator(generator)
    require_number("scale", scale)
    if isinstance(to, (Mapping, TensorDictBase)):
        known = list(to.keys())
        for view in seen:
            if view.name not in known:
                raise SiteError(f"to has no {view.name!r}." + did_you_mean(view.name, map(str, known)))
    elif isinstance(to, str):
        if to not in KINDS:
            raise InputError(
                f"to={to!r} is unknown; choose from {', '.join(KINDS)}, a number, or means by site (mean_activations)."
            )
    elif not isinstance(to, (int, float)) or isinstance(to, bool):
        raise InputError(f"to is {describe(to)}; give {', '.join(map(repr, KINDS))}, a number, or means by site.")
    if reference is not None and to != "resample":
        raise InputError("reference is what to='resample' draws from; leave it out, or take to='resample'.")


class _Draw:
    """Draws what replaces the values; each call is a new draw, of the same thing where nothing is random."""

    def __init__(
        self,
        f: FunctionalModel,
        params: Any,
        inputs: Any,
        base: Tape,
        seen: tuple[View, ...],
        to: To,
        reference: Any,
        scale: float,
        generator: torch.Generator | None,
    ):
        self.base, self.seen, self.to, self.scale, self.generator = base, seen, to, scale, generator
        self.pool = dict(base.values)
        self.others = reference is None
        if to == "resample":
            self.count = count_examples(inputs)
            if reference is not None:
                _, values = Capture(f, wants_of(seen))(params, reference)
                self.pool = {want: values[str(want.site)] for want in wants_of(seen)}
                _require_like(self.pool, base.values)
            self.size = count_examples(inputs if reference is None else reference)
            if self.others and self.size < 2:
                raise InputError("to='resample' has one example and no other to draw; give reference=inputs to draw from.")

    def __call__(self) -> dict[View, Source]:
        if self.to == "resample":
            return self._resampled()
        return {view: self._source(view) for view in self.seen}

    def _resampled(self) -> dict[View, Source]:
        device = next(iter(self.pool.values())).device
        if self.others:  # an example is never replaced by itself
            shift = integers(1, self.size, (self.count,), self.generator, device)
            rows = (torch.arange(self.count, device=device) + shift) % self.size
        else:
            rows = integers(0, self.size, (self.count,), self.generator, device)
        for want, value in self.pool.items():
            if value.ndim == 0 or len(value) != self.size:
                raise SiteError(
                    f"site {str(want.site)!r} holds {describe(value)}, whose first dimension is not that of the {self.size} "
                    "examples; choose a site where each example has its own value."
                )
        return {view: view.of(self.pool[view.want][rows]) for view in self.seen}

    def _source(self, view: View) -> Source:
        value = self.base.values[view.want]
        part = view.of(value)
        if self.to == "noise":
            noise = normal_like(part, self.generator)
            return lambda there: there + self.scale * there.std() * noise
        if isinstance(self.to, (Mapping, TensorDictBase)):
            mean = self.to[view.name]
            try:
                return view.of(mean.to(value).expand_as(value))
            except (RuntimeError, AttributeError):
                raise SiteError(
                    f"to has {describe(mean)} for {view.name!r}, which holds {describe(value)}; give a tensor that broadcasts "
                    "to it (means per position need prompts of the same length; mean_activations(pooled=True) does not)."
                ) from None
        return torch.full_like(part, 0.0 if self.to == "zero" else float(self.to))


def _require_like(pool: Mapping, values: Mapping) -> None:
    for want, value in values.items():
        if pool[want].shape[1:] != value.shape[1:]:
            raise InputError(
                f"reference gives {describe(pool[want])} at {str(want.site)!r}, inputs {describe(value)}; give examples of the "
                "same length."
            )
