"""Causal tracing: which activations carry a fact, told by restoring them in runs whose subject is drowned in noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import require_number, require_positive, warn_if_stochastic
from ..core.compat import visible
from ..core.errors import InputError, SiteError
from ..core.estimate import Estimate, Moments
from ..core.functional import FunctionalModel
from ..core.progress import Progress
from ..core.randomness import normal_like, require_generator
from ..core.reading import Capture
from ..core.replay import Tape
from ..core.sites import SiteLike
from ..core.structure import describe
from ..core.transforms import exact_wants
from ..core.writing import Intervene
from .patches import Axis, Indices, Metric, Where, as_axes, measured, require_metric, same_grids, sweep, views, wants_of
from .runs import wide


class CausalTrace(NamedTuple):
    """The metric in the clean run, in noisy ones, and in noisy ones with one thing restored. Estimates are float32 at least.

    Attributes:
        restored: `Estimate` of [S, P, *M], for S sites (or windows around them), P positions and a metric of shape M.
        indirect_effect: `Estimate` of [S, P, *M]: restored - corrupted, of the same noise, averaged over the samples.
        corrupted: `Estimate` of [*M].
        clean: Tensor [*M].
    """

    restored: Estimate
    indirect_effect: Estimate
    corrupted: Estimate
    clean: Tensor

    @property
    def total_effect(self) -> Tensor:
        """`clean - corrupted`, Tensor [*M]."""
        return self.clean - self.corrupted.value


def causal_trace(
    f: FunctionalModel,
    params: Any,
    inputs: Any,
    metric: Metric,
    *,
    embedding: SiteLike,
    subject: Tensor | Sequence[int],
    sites: Where,
    window: int = 1,
    axis: Axis = 1,
    positions: Indices = None,
    noise: float = 3.0,
    sigma: float | None = None,
    samples: int = 10,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> CausalTrace:
    """How much of a metric comes back when clean values are restored in runs with a noisy subject.

        corrupted_k      = metric(f(x; do(e <- e + noise * sigma * e_k at the subject)))
        restored_k[s, p] = metric(the same; do(a_t[p] <- a_t[p] of the clean run, for the sites t in the window around s))
        indirect_effect  = mean_k (restored_k - corrupted_k)

    Args:
        f: functional model.
        params: its parameters.
        inputs: B prompts as `f` takes them, without noise.
        metric: function of the output to a tensor [] or [B]; in the paper the probability of the answer.
        embedding: the site that gets the noise, with values [B, L, D].
        subject: which tokens: bool Tensor [B, L], as `token_span` gives, or indices along L for all prompts.
        sites: what is restored, in the order of the layers; as for `activation_patching`. Kinds of sites (blocks, attention,
            MLPs) have a call each.
        window: how many neighbouring sites are restored at once: of site s those from s - window // 2 on, fewer at the ends.
            The paper takes 1 for blocks and 10 for attention and MLPs.
        axis: as for `activation_patching`.
        positions: as for `activation_patching`.
        noise: in units of `sigma`.
        sigma: None for the standard deviation of all numbers of the clean embeddings of the subjects in `inputs`. The paper
            takes it over the subjects of a whole data set.
        samples: K, how many times noise is drawn.
        generator: for the noise, which does not depend on `chunk_size`; None for the global one.
        chunk_size: how many positions of one site run at once; None for all.
        progress: called as `progress(done, total)` at the start and after every site of every sample.

    Returns:
        `CausalTrace`; the standard errors are over the samples, NaN for one sample.

    Raises:
        InputError: a subject out of range or empty, as `activation_patching` otherwise.
        SiteError: as `capture`.
        TargetError: a metric of another shape. Warns for a model in train mode.

    Cost: one forward pass, and for each sample another one, and for each site one vmapped pass over its positions that runs
    only what comes after the (first) site. The samples come one after the other: memory does not grow with them. Eager only,
    with a generator.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022), section 2.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(6, 1))
        >>> f, params = tdhook.functionalize(model)
        >>> x = torch.randn(1, 3, 2)
        >>> trace = causal_trace(f, params, x, lambda out: out[:, 0], embedding="0", subject=[1], sites="1")
        >>> torch.allclose(trace.restored.value[0, 1], trace.clean), trace.indirect_effect.value[0, 0]
        (True, tensor([0.]))
    """
    seen, axes = views(f, sites), as_axes(axis)
    places = exact_wants(f, embedding, "embedding")
    if len(places) > 1:
        raise SiteError(f"embedding has {len(places)} sites; give the one that gets the noise.")
    (place,) = places
    for name, number in (("window", window), ("samples", samples)):
        require_positive(name, number)
    require_positive("chunk_size", chunk_size, optional=True)
    require_number("noise", noise)
    require_metric(metric)
    if sigma is not None:
        require_number("sigma", sigma)
    require_generator(generator)
    warn_if_stochastic(f, "causal_trace")

    wants = wants_of(seen)
    output, values = Capture(f, tuple(dict.fromkeys((*wants, place))))(params, inputs)
    clean = measured(metric, output)
    quiet = {want: values[str(want.site)] for want in wants}
    embedded = values[str(place.site)]
    where = _subject(subject, embedded)
    grids = same_grids(seen, quiet, axes, positions)
    level = noise * (_spread(embedded, where) if sigma is None else sigma)

    total, done = samples * len(seen), 0
    if progress is not None:
        progress(0, total)
    moments: list[Moments] = []
    for _ in range(samples):
        shift = torch.where(where, level * normal_like(embedded, generator), torch.zeros_like(embedded))
        noisy = Intervene(f, (place,), {place: partial(torch.add, shift)})
        base = Tape(noisy, params, inputs, wants)
        corrupted = measured(metric, base.output)
        rows = []
        for number, lists in enumerate(grids):
            near = seen[max(0, number - window // 2) : number - window // 2 + window]
            patches = [(view, view.of(quiet[view.want])) for view in near]
            rows.append(sweep(base, metric, corrupted, patches, axes, lists, chunk_size))
            done += 1
            if progress is not None:
                progress(done, total)
        restored, without = wide(torch.stack(rows)), wide(corrupted)
        new = [Moments.of(each[None]) for each in (restored, restored - without, without)]
        moments = [a + b for a, b in zip(moments, new)] if moments else new
    restored_, effect, corrupted_ = (Estimate(each.mean, each.standard_error) for each in moments)
    return CausalTrace(restored_, effect, corrupted_, clean)


def _subject(subject: Any, embedded: Tensor) -> Tensor:
    """The tokens of the subject as a bool tensor that broadcasts to the embeddings."""
    if embedded.ndim < 2:
        raise InputError(f"embedding holds {describe(embedded)}; give a site of values [B, L, D].")
    shape = embedded.shape[:2]
    if isinstance(subject, Tensor) and subject.dtype == torch.bool:
        if subject.shape != shape:
            raise InputError(f"subject is {describe(subject)} for embeddings {describe(embedded)}; give a bool tensor [B, L].")
        mask = subject
    else:
        places = subject.tolist() if isinstance(subject, Tensor) else subject
        length = shape[1]
        integers = isinstance(places, Sequence) and all(isinstance(p, int) and not isinstance(p, bool) for p in places)
        if not integers or not all(-length <= p < length for p in places):
            raise InputError(f"subject={subject!r} are no indices of {length} tokens; give such, or a bool tensor [B, L].")
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[:, list(places)] = True
    if visible(mask) and not mask.any(1).all():
        raise InputError("subject is empty for an example; give at least one token.")
    return mask.to(embedded.device).reshape(*shape, *[1] * (embedded.ndim - 2))


def _spread(embedded: Tensor, where: Tensor) -> Tensor:
    """The standard deviation of the numbers of some tokens."""
    embedded = wide(embedded)
    weights = where.expand_as(embedded).to(embedded)
    count = weights.sum()
    if visible(count) and count < 2:
        raise InputError("the embedding of the subject is one number, which has no standard deviation; give sigma.")
    mean = (embedded * weights).sum() / count
    return (((embedded - mean).square() * weights).sum() / (count - 1)).sqrt()
