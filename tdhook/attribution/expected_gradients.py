"""Expected gradients (GradientSHAP): integrated gradients averaged over a set of baselines, by sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.func import vjp
from torch.utils import _pytree as pytree

from ..core.batching import chunks, pull_each, vmap_or_loop
from ..core.checks import flatten_as, require_gradients, require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.estimate import Estimate, Moments
from ..core.explained import Explained, explained
from ..core.randomness import integers, normal, require_generator, stacked, uniform
from ..core.reading import stop_at
from ..core.structure import describe
from ..core.targets import Targets, check, select
from ..core.transforms import Sites, exact_wants, values_at


def expected_gradients(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    baselines: Any,
    targets: Targets = None,
    at: Sites | None = None,
    samples: int = 50,
    noise: float = 0.0,
    stratified: bool = False,
    multiply_by_inputs: bool = True,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The mean of integrated gradients over a set of baselines, one random path point of one random baseline per sample.

        attribution_i = mean_s (z_i - b_i) * dF/dx_i(b + alpha (z - b))
        b ~ baselines, alpha ~ U(0, 1), z = x + noise * N(0, 1), all drawn anew in each sample s

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them: Tensor [B, *features], or a structure of such. Floating-point tensors move, others are passed
            through.
        baselines: the set, in the structure of `inputs`: Tensor [N, *features], from which each example draws for itself. A set
            [N, *shape of inputs] (N batches, or N baselines of a lone example without batch dimension) is drawn from as a
            whole, with one draw for all examples. With `at` also a mapping from each site to a set of values there.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        at: sites: draw between the activations there of baselines and inputs, and add the noise there.
        samples: number of draws.
        noise: standard deviation of the Gaussian noise on the inputs (or on the values at the sites).
        stratified: draws one alpha in each of `samples` equal parts of [0, 1]. The error is smaller, and the standard error
            then says more than there is.
        multiply_by_inputs: False leaves out the factor z - b.
        chunk_size: how many copies of the model run at once (samples, times targets in the backward); None for all. It bounds
            memory and changes neither the draws nor the result.
        generator: source of the draws; None for the global one.

    Returns:
        `Estimate`: value, its standard error, and the number of samples. Both in the structure of `inputs` (None in place of
        what does not move), or TensorDicts keyed by site for `at`, with a leading dimension T for plural targets. The sum of an
        attribution is F(x) minus the mean of F over the baselines, up to the error of sampling. A lone sample has no standard
        error (NaN).

    Raises:
        InputError: baselines that are no set for the inputs, a bad `samples`, `noise`, `chunk_size` or `generator`.
            TargetError, SiteError, GradientError (grad mode is off). Warns for a model in train mode.

    Cost: `samples` forward passes, vmapped, whatever the number of targets; `samples * T` backward passes, vmapped. With `at`
    one pass for the inputs and one for all baselines come before. Memory does not grow with `samples` where `chunk_size` is
    given. Under `vmap` it needs `randomness="different"` or `"same"`. torch cannot compile with a generator; without one it
    compiles.

    Source: Erion et al., "Improving performance of deep learning models with axiomatic attribution priors and expected
    gradients" (2021); GradientSHAP in Lundberg and Lee, "A Unified Approach to Interpreting Model Predictions" (2017).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2, bias=False))
        >>> x, baselines = torch.randn(4, 3), torch.zeros(10, 3)
        >>> value, error = expected_gradients(f, params, x, baselines=baselines, targets=[0, 1])
        >>> torch.allclose(value, params["weight"][:, None] * x, atol=1e-6)
        True
    """
    require_positive("samples", samples)
    require_positive("chunk_size", chunk_size, optional=True)
    if not isinstance(noise, (int, float)) or isinstance(noise, bool) or not noise >= 0:
        raise InputError(f"noise is a standard deviation of at least 0, got {describe(noise)}.")
    require_generator(generator)
    check(targets)
    require_gradients("expected_gradients")
    warn_if_stochastic(f, "expected_gradients")
    what = explained(f, params, inputs, at)
    draws = Draws(
        what.values, baseline_sets(f, params, inputs, baselines, at, what), samples, float(noise), stratified, generator
    )
    moments: list[Moments] = []
    plural = False
    for chunk in chunks(samples, chunk_size):
        count = chunk.stop - chunk.start
        at_once = None if chunk_size is None else max(1, chunk_size // count)
        differences, points = draws.next(chunk)
        factors = differences if multiply_by_inputs else [torch.ones_like(d) for d in differences]
        parts, plural = _moments(what, targets, points, factors, at_once)
        moments = [total + part for total, part in zip(moments, parts)] if moments else parts

    def structured(results: list[Tensor]) -> Any:
        kept = [r.to(value.dtype) for r, value in zip(results, what.values)]
        return what.restructure(kept if plural else [r[0] for r in kept])

    return Estimate(structured([m.mean for m in moments]), structured([m.standard_error for m in moments]))


@dataclass(frozen=True)
class BaselineSet:
    """The baselines of one tensor: [N, *features] for an example each, or [N, *shape] for the whole tensor."""

    values: Tensor
    whole: bool


class Draws:
    """Random baselines, path points and noise.

    What is small is drawn at once, the noise sample by sample, so that the draws do not depend on the chunks.
    """

    def __init__(
        self,
        ends: list[Tensor],
        sets: list[BaselineSet],
        samples: int,
        noise: float,
        stratified: bool,
        generator: torch.Generator | None,
    ):
        self.ends, self.sets, self.noise, self.generator = ends, sets, noise, generator
        device = ends[0].device
        shape = (samples,) if sets[0].whole else (samples, len(ends[0]))
        self.rows = integers(0, len(sets[0].values), shape, generator, device)
        self.alphas = uniform(shape, generator, device, self._dtype(ends[0]))
        if stratified:
            parts = torch.arange(samples, dtype=self.alphas.dtype, device=device)
            self.alphas = (self.alphas + parts.reshape(-1, *[1] * (len(shape) - 1))) / samples

    def next(self, chunk: slice) -> tuple[list[Tensor], list[Tensor]]:
        """For the next chunk of samples z - b and the path points, each [S, *shape]."""
        rows, alphas = self.rows[chunk], self.alphas[chunk]
        noises = self._noises(len(rows))
        starts = [each.values[rows] for each in self.sets]
        differences = [end + noise - start for end, noise, start in zip(self.ends, noises, starts)]
        points = []
        for start, difference in zip(starts, differences):
            alpha = alphas.to(start.dtype).reshape(*alphas.shape, *[1] * (start.ndim - alphas.ndim))
            points.append(start + alpha * difference)
        return differences, points

    def _noises(self, count: int) -> list[Any]:
        if not self.noise:
            return [0.0] * len(self.ends)
        drawn = stacked(lambda: [normal(e.shape, self.generator, e.device, self._dtype(e)) for e in self.ends], count)
        return [self.noise * parts.to(end.dtype) for parts, end in zip(drawn, self.ends)]

    @staticmethod
    def _dtype(end: Tensor) -> torch.dtype:
        return torch.promote_types(end.dtype, torch.float32)


def _moments(
    what: Explained, targets: Targets, points: list[Tensor], factors: list[Tensor], targets_at_once: int | None
) -> tuple[list[Moments], bool]:
    """The moments [T, *shape] of gradients times factors over some points, and whether there are several targets."""
    several = []

    def values(moved: list[Tensor]) -> Tensor:
        chosen, plural = select(targets, what.evaluate(moved))
        several.append(plural)
        return chosen

    chosen, pull, *_ = vjp(lambda moved: vmap_or_loop(values, moved), points)

    def pulled(cotangent: Tensor) -> list[tuple[Tensor, Tensor]]:
        # The samples of one target are summed up before those of the next are there.
        samples = [gradient * factor for gradient, factor in zip(pull(cotangent)[0], factors)]
        found = [Moments.of(s.to(torch.promote_types(s.dtype, torch.float32))) for s in samples]
        return [(m.mean, m.squares) for m in found]

    each = pull_each(pulled, chosen, torch.ones_like(chosen[..., :1]), targets_at_once)
    return [Moments(len(points[0]), mean, squares) for mean, squares in each], several[0]


def baseline_sets(f: Any, params: Any, inputs: Any, baselines: Any, at: Sites | None, what: Explained) -> list[BaselineSet]:
    """The set of baselines of each tensor."""
    if at is None:
        given, names = what.flatten("baselines", baselines), ["baselines"] * len(what.values)
    else:
        wants = exact_wants(f, at, "at")
        sites = [str(want.site) for want in wants]
        names = [f"baselines for {site!r}" for site in sites]
        spellings = {*sites, *(want.request for want in wants)}
        if isinstance(baselines, (Mapping, TensorDictBase)) and spellings & {str(key) for key in baselines.keys()}:
            given = list(values_at(wants, baselines, "baselines").values())
        else:
            given = _activations(f, params, inputs, baselines, sites)
    sets = [_set(name, value, end) for name, value, end in zip(names, given, what.values)]
    if len({(s.whole, len(s.values), () if s.whole else len(end)) for s, end in zip(sets, what.values)}) > 1:
        raise InputError(
            "baselines and inputs hold tensors of several lengths, "
            + ", ".join(describe(s.values) for s in sets)
            + "; give as many baselines for each tensor, and all as [N, *features] or all as [N, *shape of inputs]."
        )
    return sets


def _set(name: str, value: Any, end: Tensor) -> BaselineSet:
    wanted = f"[N, {', '.join(map(str, end.shape[1:]))}]" if end.ndim > 1 else "[N]"
    if not isinstance(value, Tensor) or value.dtype != end.dtype or value.device != end.device:
        raise InputError(
            f"{name} holds {describe(value)}; give a set for {describe(end)} on {end.device}: a tensor {wanted} like it."
        )
    whole = value.shape[1:] == end.shape and value.ndim > 0
    if not whole and (end.ndim == 0 or value.ndim != end.ndim or value.shape[1:] != end.shape[1:]):
        raise InputError(
            f"{name} holds {describe(value)}, which is no set for {describe(end)}; give {wanted}, or [N, *{list(end.shape)}]."
        )
    if not len(value):
        raise InputError(f"{name} is an empty set; give at least one baseline.")
    return BaselineSet(value, whole)


def _activations(f: Any, params: Any, inputs: Any, baselines: Any, sites: list[str]) -> list[Tensor]:
    """The values at sites of a set of inputs: N inputs make a batch, N batches are vmapped."""
    head = stop_at(f, sites)
    leaves = pytree.tree_flatten(inputs)[0]
    deeper = set()
    for value, leaf in zip(flatten_as("baselines", baselines, inputs), leaves):
        if isinstance(leaf, Tensor):
            if not isinstance(value, Tensor) or value.dtype != leaf.dtype or value.ndim - leaf.ndim not in (0, 1):
                raise InputError(
                    f"baselines holds {describe(value)} for {describe(leaf)}; give a set of inputs of that kind, or a set of "
                    "values for each site of at."
                )
            deeper.add(value.ndim - leaf.ndim)
    found = vmap_or_loop(lambda each: dict(head(params, each).items()), baselines) if deeper == {1} else head(params, baselines)
    return [found[site] for site in sites]
