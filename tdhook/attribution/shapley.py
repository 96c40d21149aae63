"""Shapley values, exact over all coalitions of few features, or sampled over orders of many."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.checks import require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.estimate import Estimate, Moments
from ..core.progress import Progress
from ..core.randomness import require_generator, uniform_rows
from ..core.targets import Targets, check
from ..core.transforms import Sites
from .coalitions import Game, game, tracked
from .paths import straight_path


def shapley_values(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    groups: Any = None,
    at: Sites | None = None,
    max_features: int = 16,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Exact Shapley values of groups of features, from all coalitions of them.

        attribution_g = sum_{S without g} |S|! (G - |S| - 1)! / G! (v(S with g) - v(S)),  v(S) = F(x in S, x' elsewhere)

    They sum to F(x) - F(x') over the groups. Sums over coalitions are made in float64.

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them. Floating-point tensors are explained, others are passed through.
        targets: as for `feature_ablation`.
        baselines: as for `feature_ablation`.
        groups: as for `feature_ablation`.
        at: sites: explain activations there instead of the inputs.
        max_features: refuse more groups than that; G groups need 2^G passes.
        chunk_size: how many copies of the batch run at once; None for all, 2^G.
        progress: called as `progress(done, total)`, in coalitions.

    Returns:
        Attributions as of `feature_ablation`: in the structure of `inputs`, or with `groups` one Tensor [B, G] or [T, B, G].

    Raises:
        InputError: more groups than `max_features`; otherwise as `feature_ablation`.

    Cost: 2^G forward passes for G groups, vmapped, whatever the number of targets; no pass is kept.

    Source: Shapley, "A Value for n-Person Games" (1953).

    Examples:
        >>> f = lambda params, x: x.prod(-1)
        >>> shapley_values(f, None, torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[2., 2., 2.]])
        >>> shapley_values(f, None, torch.tensor([[1.0, 2.0, 3.0]]), groups=torch.tensor([0, 0, 1]))
        tensor([[3., 3.]])
    """
    require_positive("max_features", max_features)
    require_positive("chunk_size", chunk_size, optional=True)
    check(targets)
    warn_if_stochastic(f, "shapley_values")
    path = straight_path(f, params, inputs, baselines, at)
    played = game(path.explained, path.starts, targets, groups)
    count = played.groups.count
    if count > max_features:
        raise InputError(
            f"{count} groups need 2^{count} = {2**count:,} forward passes; give fewer groups, raise "
            f"max_features={max_features}, or use shapley_value_sampling or kernel_shap."
        )
    return played.result(exact_values(played, chunk_size, progress))


def exact_values(played: Game, chunk_size: int | None, progress: Progress | None) -> Tensor:
    """Shapley values [*B, T, G] of a game, in float64."""
    count = played.groups.count
    codes = torch.arange(2**count, device=played.device)
    bits = torch.arange(count, device=played.device)
    # In one sum over all coalitions S, v(S) counts for its members as what they make, for others as what they start from.
    weight = [1 / (count * math.comb(count - 1, size)) for size in range(count)]
    joined = torch.tensor([0.0, *weight], dtype=torch.float64, device=played.device)
    absent = torch.tensor([*weight, 0.0], dtype=torch.float64, device=played.device)
    # The last coalition has everything, and is known.
    total = played.whole.double()[..., None] / count
    for part in tracked(len(codes) - 1, chunk_size, progress):
        present = (codes[part, None] >> bits) & 1 == 1
        size = present.sum(-1)
        weights = torch.where(present, joined[size, None], -absent[size, None])
        total = total + torch.tensordot(played.play(present).double(), weights, ([0], [0]))
    return total


def shapley_value_sampling(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    groups: Any = None,
    at: Sites | None = None,
    samples: int = 24,
    antithetic: bool = False,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """Shapley values of groups of features, estimated from random orders in which they are switched on.

        attribution_g = E_pi [v(g and what comes before it in the order pi) - v(what comes before it)]

    The estimate is unbiased, and for every order it sums to F(x) - F(x').

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them. Floating-point tensors are explained, others are passed through.
        targets: as for `feature_ablation`.
        baselines: as for `feature_ablation`.
        groups: as for `feature_ablation`.
        at: sites: explain activations there instead of the inputs.
        samples: how many orders; the same ones for all examples and targets.
        antithetic: follow each order by its reverse; `samples` is then even. Interactions of two features cancel in a pair, so
            the error is often much smaller at the same cost.
        generator: source of the orders; None for the global one, as it has to be inside of `torch.compile`. Under `vmap`
            give `randomness="same"` or `"different"`.
        chunk_size: how many copies of the batch run at once; None for all, samples * (G - 1).
        progress: called as `progress(done, total)`, in orders.

    Returns:
        `Estimate` of the attributions, its value and standard error as the result of `feature_ablation`: in the structure of
        `inputs`, or with `groups` a Tensor [B, G] or [T, B, G] each. The standard error is that of the mean over orders, or
        over pairs of them, which are independent; NaN for a single one.

    Raises:
        InputError: an odd number of `samples` with `antithetic`; otherwise as `feature_ablation`.

    Cost: samples * (G - 1) + 2 forward passes for G groups, vmapped, whatever the number of targets.

    Source: Castro, Gomez, Tejada, "Polynomial calculation of the Shapley value based on sampling" (2009); for reversed orders
    Mitchell, Cooper, Frank, Holmes, "Sampling Permutations for Shapley Value Estimation" (2022).

    Examples:
        >>> f = lambda params, x: x.prod(-1)
        >>> estimate = shapley_value_sampling(f, None, torch.tensor([[2.0, 3.0]]), samples=2, antithetic=True)
        >>> estimate.value
        tensor([[3., 3.]])
    """
    require_positive("samples", samples)
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)
    if antithetic and samples % 2:
        raise InputError(f"samples={samples} is odd, but antithetic runs pairs of orders; give an even number.")
    check(targets)
    warn_if_stochastic(f, "shapley_value_sampling")
    path = straight_path(f, params, inputs, baselines, at)
    played = game(path.explained, path.starts, targets, groups)
    empty = played.empty()
    pair = 2 if antithetic else 1
    runs = pair * max(1, played.groups.count - 1)
    at_once = None if chunk_size is None else max(1, chunk_size // runs)
    moments = None
    for part in tracked(samples // pair, at_once, None if progress is None else lambda i, n: progress(pair * i, pair * n)):
        ranks = uniform_rows(part.stop - part.start, played.groups.count, generator, played.device).argsort(-1)
        if antithetic:
            ranks = torch.stack([ranks, played.groups.count - 1 - ranks], 1).flatten(0, 1)
        marginal = _marginals(played, empty, ranks, chunk_size)
        drawn = Moments.of(marginal.unflatten(0, (-1, pair)).mean(1))
        moments = drawn if moments is None else moments + drawn
    assert moments is not None
    return Estimate(played.result(moments.mean), played.result(moments.standard_error))


def _marginals(played: Game, empty: Tensor, ranks: Tensor, chunk_size: int | None) -> Tensor:
    """What each group adds [m, *B, T, G] in m orders, given by the place of each group in them, [m, G]."""
    orders, count = ranks.shape
    ends = [v.double().expand(orders, 1, *empty.shape) for v in (empty, played.whole)]
    if count > 1:
        runs = torch.arange(orders * (count - 1), device=ranks.device)
        parts = [runs[part] for part in tracked(len(runs), chunk_size, None)]
        between = torch.cat([played.play(ranks[p // (count - 1)] <= (p % (count - 1))[:, None]) for p in parts])
        ends.insert(1, between.double().unflatten(0, (orders, count - 1)))
    gains = torch.cat(ends, 1).diff(dim=1)  # by place in the order
    each = gains[torch.arange(orders, device=ranks.device)[:, None], ranks]
    return each.movedim(1, -1)
