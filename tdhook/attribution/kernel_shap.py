"""KernelSHAP: Shapley values by weighted least squares on coalitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.checks import require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.estimate import Estimate
from ..core.progress import Progress
from ..core.randomness import require_generator, uniform_rows
from ..core.targets import Targets, check
from ..core.transforms import Sites
from .coalitions import Game, game, tracked
from .paths import straight_path
from .regression import least_squares
from .shapley import exact_values


def kernel_shap(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    groups: Any = None,
    at: Sites | None = None,
    samples: int = 1024,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """Shapley values of groups of features, by least squares on coalitions under the Shapley kernel.

        minimise sum_S p(S) (v(S) - v(0) - sum_{g in S} attribution_g)^2,  p(S) ~ 1 / (C(G, |S|) |S| (G - |S|))
        such that sum_g attribution_g = F(x) - F(x')

    Where 2^G <= samples all coalitions are run and the result is exact. Otherwise coalitions S are drawn from p, each together
    with its complement, so that the kernel is in the draws and all weights are 1. The sum holds exactly in both cases.

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them. Floating-point tensors are explained, others are passed through.
        targets: as for `feature_ablation`.
        baselines: as for `feature_ablation`.
        groups: as for `feature_ablation`.
        at: sites: explain activations there instead of the inputs.
        samples: how many coalitions to run, beside the full and the empty one; even, and at least 2 G (better several times
            that) if it is less than 2^G. The same ones for all examples and targets.
        generator: source of the coalitions; None for the global one, as it has to be inside of `torch.compile`. Under `vmap`
            give `randomness="same"` or `"different"`.
        chunk_size: how many copies of the batch run at once; None for all.
        progress: called as `progress(done, total)`, in coalitions or, where they are sampled, pairs of them.

    Returns:
        `Estimate` of the attributions, its value and standard error as the result of `feature_ablation`: in the structure of
        `inputs`, or with `groups` a Tensor [B, G] or [T, B, G] each. An exact one has the standard error 0 and 2^G samples.
        Otherwise it is the heteroscedasticity-consistent (HC2) one of the regression over pairs; NaN
        where the coalitions drawn do not determine the attributions (more samples are needed).

    Raises:
        InputError: too few or an odd number of `samples`; otherwise as `feature_ablation`.

    Cost: min(samples + 2, 2^G) forward passes for G groups, vmapped, whatever the number of targets. Beside `chunk_size` copies
    of the inputs, memory is for samples * G / 2 bits of coalitions (a byte each), samples * B * T values and a G * G matrix.

    Source: Lundberg, Lee, "A Unified Approach to Interpreting Model Predictions" (2017); for pairs and the constrained solution
    Covert, Lee, "Improving KernelSHAP: Practical Shapley Value Estimation via Linear Regression" (2021).

    Examples:
        >>> f = lambda params, x: x.prod(-1)
        >>> kernel_shap(f, None, torch.tensor([[1.0, 2.0, 3.0]])).value
        tensor([[2., 2., 2.]])
    """
    require_positive("samples", samples, least=2)
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)
    check(targets)
    warn_if_stochastic(f, "kernel_shap")
    path = straight_path(f, params, inputs, baselines, at)
    played = game(path.explained, path.starts, targets, groups)
    count = played.groups.count
    if 2**count <= samples:
        values = exact_values(played, chunk_size, progress)
        return Estimate(played.result(values), played.result(torch.zeros_like(values)))
    if samples % 2 or samples < 2 * count:
        raise InputError(
            f"samples={samples} for {count} groups; give an even number of at least {2 * count}, or fewer groups: up to "
            f"{samples.bit_length() - 1} of them would be exact."
        )
    values, errors = _sampled(played, samples // 2, generator, chunk_size, progress)
    return Estimate(played.result(values), played.result(errors))


def _sampled(
    played: Game, pairs: int, generator: torch.Generator | None, chunk_size: int | None, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """Attributions and their standard errors, each [*B, T, G] in float64."""
    count = played.groups.count
    whole, empty = played.whole.double(), played.empty().double()
    difference = whole - empty
    coalitions, outcomes = [], []
    for part in tracked(pairs, None if chunk_size is None else max(1, chunk_size // 2), progress):
        drawn = _coalitions(part.stop - part.start, count, generator, played.device)
        both = [drawn, ~drawn]
        runs = [played.play(torch.cat(both))] if chunk_size != 1 else [played.play(each) for each in both]
        first, second = torch.cat(runs).double().chunk(2)
        # By the constraint the sum over S and the rest depends on the attributions through their half difference only.
        share = drawn.double().mean(-1).reshape(-1, *[1] * difference.ndim)
        outcomes.append((first - second + difference) / 2 - share * difference)
        coalitions.append(drawn)
    # What is left sums to 0 over the groups: a row minus its mean says the same, and the penalty fixes the free direction.
    values = torch.cat(outcomes)
    free = torch.ones(count, count, dtype=torch.float64, device=played.device)
    rest, errors = least_squares(torch.cat(coalitions), None, None, values.flatten(1), free)
    shape = (*difference.shape, count)
    return rest.reshape(shape) + difference[..., None] / count, errors.reshape(shape)


def _coalitions(number: int, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Coalitions [number, G] drawn from the Shapley kernel: a size, and that many random members."""
    sizes = torch.arange(1, count, dtype=torch.float64, device=device)
    chances = (1 / (sizes * (count - sizes))).cumsum(0)
    drawn = uniform_rows(number, count + 1, generator, device)
    size = 1 + torch.searchsorted(chances / chances[-1], drawn[:, 0].double(), right=True).clamp(max=count - 2)
    return drawn[:, 1:].argsort(-1) < size[:, None]
