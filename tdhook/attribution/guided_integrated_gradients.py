"""Guided integrated gradients: a path that first moves the features with the smallest gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.batching import chunks
from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.structure import describe
from ..core.targets import Targets, check, select
from ..core.transforms import Sites
from .ascent import own, own_gradients, own_units, require_batched
from .paths import Path, straight_path


def guided_integrated_gradients(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    at: Sites | None = None,
    steps: int = 200,
    fraction: float = 0.25,
    max_dist: float = 0.02,
    chunk_size: int | None = None,
) -> Any:
    """Integrated gradients along a path that avoids large gradients, each target and example on a path of its own.

        attribution_i = sum_s dF/dx_i(x_s) * (x_{s+1} - x_s)_i,   x_0 = x',   x_steps = x

    Step s brings the L1 distance to the inputs down to `(1 - (s + 1) / steps)` of what it was. First, features that lag more
    than `max_dist` behind the straight line catch up. Then the `fraction` of features with the smallest |dF/dx_i| move towards
    the inputs, at most `max_dist` ahead of the line, then the next such fraction, until the distance is right.

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them: Tensor [B, *features], or a structure of such. The features of all floating-point tensors of
            an example are ranked together; others are passed through.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        baselines: x', as in `integrated_gradients`.
        at: sites: the path runs between the activations of baselines and inputs there.
        steps: number of path points.
        fraction: of the features to move at once, in (0, 1]. 1 moves all together: integrated gradients, left Riemann sums.
        max_dist: how far, in alpha, a feature may be from the straight line, in [0, 1]. 0 is the straight line, 1 sets no
            limit.
        chunk_size: how many targets are followed at once; None for all. It bounds memory and does not change the result.

    Returns:
        Attributions in the structure of `inputs` (None in place of what does not move), or a TensorDict keyed by site for `at`;
        each has the shape of what it explains, with a leading dimension T for plural targets. Their sum approaches
        F(x) - F(x') as `steps` grow.

    Raises:
        InputError: baselines that do not fit, a bad `steps`, `fraction`, `max_dist` or `chunk_size`.
            TargetError, SiteError, GradientError (grad mode is off). Warns for a model in train mode.

    Cost: one forward pass, then `steps * T` forward and backward passes, T at a time and one step after the other; in each step
    one sort of the features and about 1 / `fraction` masked updates. A compiled graph has all steps unrolled.

    Source: Kapishnikov et al., "Guided Integrated Gradients: an Adaptive Path Method for Removing Noise" (2021).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2, bias=False))
        >>> x = torch.randn(4, 3)
        >>> attributions = guided_integrated_gradients(f, params, x, targets=[0, 1], steps=10)
        >>> torch.allclose(attributions, params["weight"][:, None] * x, atol=1e-5)
        True
    """
    require_positive("steps", steps)
    require_positive("chunk_size", chunk_size, optional=True)
    for name, value, allowed in (("fraction", fraction, "above 0 and up to 1"), ("max_dist", max_dist, "from 0 to 1")):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1 or (name == "fraction" and value == 0):
            raise InputError(f"{name} is a number {allowed}, got {describe(value)}.")
    check(targets)
    require_gradients("guided_integrated_gradients")
    warn_if_stochastic(f, "guided_integrated_gradients")
    path = straight_path(f, params, inputs, baselines, at)
    first, plural = select(targets, path.explained.evaluate(path.starts))
    require_batched(path.ends, first.shape[:-1])
    parts = []
    for chunk in chunks(first.shape[-1], chunk_size):
        parts.append(_followed(path, targets, first, chunk, steps, fraction, max_dist))
    results = [torch.cat(each) for each in zip(*parts)]
    return path.explained.restructure(results if plural else [r[0] for r in results])


def _followed(
    path: Path, targets: Targets, first: Tensor, chunk: slice, steps: int, fraction: float, max_dist: float
) -> list[Tensor]:
    """The attributions of some of the targets, each [K, *shape]."""
    lead = first.ndim - 1
    units = own_units(first.shape[-1], chunk, first)
    # Half precision could not tell apart two points of a path of 200 steps.
    dtype = torch.promote_types(path.ends[0].dtype, torch.float32)

    def flat(tensors: list[Tensor], lead: int) -> Tensor:
        return torch.cat([t.to(dtype).reshape(*t.shape[:lead], -1) for t in tensors], -1)

    def split(features: Tensor) -> list[Tensor]:
        sizes = [end.shape[lead:].numel() for end in path.ends]
        return [part.reshape(len(units), *end.shape) for part, end in zip(features.split(sizes, -1), path.ends)]

    def value(moved: list[Tensor], unit: Tensor) -> Tensor:
        return own(select(targets, path.explained.evaluate(moved))[0], unit)

    starts = flat(path.starts, lead)
    differences = flat(path.ends, lead) - starts
    distances = differences.abs()
    # Where each feature is on its way: 0 at the baseline, 1 at the input.
    alphas = torch.zeros_like(differences).expand(len(units), *differences.shape)
    totals = torch.zeros_like(alphas)
    for step in range(steps):
        points = [point.to(end.dtype) for point, end in zip(split(starts + alphas * differences), path.ends)]
        gradients = flat(own_gradients(value, points, units)[0], lead + 1)
        moved = advance(alphas, gradients.abs(), distances, (step + 1) / steps, fraction, max_dist)
        totals = totals + gradients * differences * (moved - alphas)
        alphas = moved
    return [total.to(end.dtype) for total, end in zip(split(totals), path.ends)]


def advance(alphas: Tensor, sizes: Tensor, distances: Tensor, alpha: float, fraction: float, max_dist: float) -> Tensor:
    """One step of the path.

    Args:
        alphas: where the features are, Tensor [K, *B, n].
        sizes: of their gradients, of the same shape.
        distances: |x - x'|, Tensor [*B, n].
        alpha: where the straight line is after the step.
        fraction: as in `guided_integrated_gradients`.
        max_dist: as in `guided_integrated_gradients`.

    Returns:
        Where the features are after the step.
    """
    low, high = max(alpha - max_dist, 0.0), min(alpha + max_dist, 1.0)
    count = alphas.shape[-1]
    at_once = math.floor(fraction * (count - 1)) + 1
    alphas = alphas.clamp(min=low)
    gap = ((alpha - alphas) * distances).sum(-1, keepdim=True).clamp(min=0)
    free = (alphas < high) & (distances > 0)
    ranked = torch.where(free, sizes, torch.full_like(sizes, torch.inf)).sort(-1).values
    taken = torch.zeros_like(gap, dtype=torch.long)
    # Where the gap is closed sooner, what is left of the loop moves nothing. Equal gradients move together.
    for _ in range(math.ceil(count / at_once)):
        threshold = ranked.gather(-1, (taken + at_once - 1).clamp(max=count - 1))
        chosen = free & (sizes <= threshold)
        room = ((high - alphas) * distances * chosen).sum(-1, keepdim=True)
        part = torch.where(room > 0, gap / room, torch.zeros_like(gap)).clamp(0, 1)
        alphas = torch.where(chosen, alphas + part * (high - alphas), alphas)
        gap = gap - part * room
        taken = taken + chosen.sum(-1, keepdim=True)
        free = free & ~chosen
    return alphas
