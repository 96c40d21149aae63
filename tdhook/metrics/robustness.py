"""Robustness: how much an attribution changes when its input hardly does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.batching import chunks, vmap_or_loop
from ..core.checks import require_number, require_positive
from ..core.errors import InputError
from ..core.estimate import Estimate, Moments
from ..core.explained import explained_inputs
from ..core.randomness import require_generator, stacked, uniform_like
from ..core.structure import describe
from .features import flat_scores, flattened


def max_sensitivity(
    f: Callable,
    params: Any,
    inputs: Any,
    method: Callable,
    *,
    radius: float = 0.02,
    samples: int = 10,
    relative: bool = True,
    batch_dims: int = 1,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The largest change of an attribution under small uniform noise on the inputs.

        max_s |phi(x + e_s) - phi(x)| / |phi(x)|, e_s uniform in [-radius, radius] in every element
        not relative: without the denominator, which is the paper's definition

    Args:
        f: the model, passed to `method`.
        params: its parameters.
        inputs: all floating-point tensors are perturbed; others are passed through.
        method: function of (f, params, inputs) to attributions: `functools.partial(saliency, targets=3)`. The target should not
            depend on the noise. It may return any structure of tensors (None is left out); norms are Euclidean over all of it.
        radius: of the noise, in units of the inputs.
        samples: number of perturbations.
        relative: divide by the norm of the attribution.
        batch_dims: how many of the first dimensions of the attributions count examples: 1 for [B, ...], 2 for plural targets
            [T, B, ...], 0 inside a vmap.
        chunk_size: how many perturbed copies run at once; None for all. It bounds memory and does not change the result.
        generator: source of the noise. None: torch's global one.

    Returns:
        Tensor [B], or [T, B] for plural targets. For an attribution of zeros the relative change is infinite, or NaN if it does
        not change. Half types give float32.

    Raises:
        InputError: inputs without a floating-point tensor, attributions that do not fit `batch_dims`, a bad option. What
            `method` raises.

    Cost: `samples` + 1 calls of `method`, vmapped. Inside a vmap the draws need its `randomness="different"` or `"same"`; a
    `generator` cannot be compiled with `fullgraph=True`, the global one can.

    captum's sensitivity_max is the relative one and divides by 1 for an attribution of zeros. Quantus has radius 0.2 and 200
    samples. The reference tdhook returns the mean change of one sample.

    Source: Yeh et al., "On the (In)fidelity and Sensitivity of Explanations" (2019).

    Examples:
        >>> def gradient(f, params, x):
        ...     return torch.func.grad(lambda x: f(params, x).sum())(x)
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 1))
        >>> max_sensitivity(f, params, torch.randn(2, 3), gradient)
        tensor([0., 0.])
    """
    largest: Tensor | None = None
    options = (radius, samples, batch_dims, chunk_size, generator)
    for changes, scale, _ in _changes(f, params, inputs, method, *options):
        most = (changes / scale if relative else changes).amax(0)
        largest = most if largest is None else torch.maximum(largest, most)
    assert largest is not None
    return largest


def average_sensitivity(
    f: Callable,
    params: Any,
    inputs: Any,
    method: Callable,
    *,
    radius: float = 0.02,
    samples: int = 10,
    relative: bool = True,
    batch_dims: int = 1,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The mean change of an attribution under small uniform noise on the inputs.

        1/n sum_s |phi(x + e_s) - phi(x)| / |phi(x)|, e_s uniform in [-radius, radius] in every element

    Args, Raises, Cost: as `max_sensitivity`.

    Returns:
        `Estimate` with `value` and `standard_error` Tensor [B] (or [T, B] for plural targets); the error is NaN for one sample.

    Source: Yeh et al., "On the (In)fidelity and Sensitivity of Explanations" (2019).

    Examples:
        >>> def gradient(f, params, x):
        ...     return torch.func.grad(lambda x: f(params, x).sum())(x)
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 1))
        >>> average_sensitivity(f, params, torch.randn(2, 3), gradient).value
        tensor([0., 0.])
    """
    total: Moments | None = None
    options = (radius, samples, batch_dims, chunk_size, generator)
    for changes, scale, _ in _changes(f, params, inputs, method, *options):
        moments = Moments.of(changes / scale if relative else changes)
        total = moments if total is None else total + moments
    assert total is not None
    return Estimate(total.mean, total.standard_error)


def local_lipschitz(
    f: Callable,
    params: Any,
    inputs: Any,
    method: Callable,
    *,
    radius: float = 0.02,
    samples: int = 10,
    batch_dims: int = 1,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The largest ratio of the change of an attribution to the change of the inputs: a lower bound of its Lipschitz constant.

        max_s |phi(x + e_s) - phi(x)| / |e_s|, e_s uniform in [-radius, radius] in every element

    Args, Raises, Cost: as `max_sensitivity`; `radius` is above 0.

    Returns:
        Tensor [B], or [T, B] for plural targets.

    The paper maximises over the ball instead of sampling it. Quantus has Gaussian noise of standard deviation 0.1.

    Source: Alvarez-Melis and Jaakkola, "On the Robustness of Interpretability Methods" (2018).

    Examples:
        >>> def gradient(f, params, x):
        ...     return torch.func.grad(lambda x: f(params, x).sum())(x)
        >>> constant = local_lipschitz(lambda params, x: 3 * x.square().sum(-1), {}, torch.randn(2, 4), gradient, radius=0.5)
        >>> torch.allclose(constant, torch.full((2,), 6.0), rtol=1e-4)
        True
    """
    require_number("radius", radius, strict=True)
    largest: Tensor | None = None
    options = (radius, samples, batch_dims, chunk_size, generator)
    for changes, _, distances in _changes(f, params, inputs, method, *options):
        most = (changes / distances).amax(0)
        largest = most if largest is None else torch.maximum(largest, most)
    assert largest is not None
    return largest


def _changes(
    f: Callable,
    params: Any,
    inputs: Any,
    method: Callable,
    radius: float,
    samples: int,
    batch_dims: int,
    chunk_size: int | None,
    generator: torch.Generator | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """In chunks: |phi(x') - phi(x)| as [S, *lead], |phi(x)| as [*lead], and |x' - x| as [S, *lead or 1]."""
    if not callable(method):
        raise InputError(f"method is {describe(method)}; give a function of (f, params, inputs).")
    require_number("radius", radius)
    require_positive("samples", samples)
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)
    what = explained_inputs(lambda _, moved: method(f, params, moved), params, inputs)

    def attributed(values: list[Tensor]) -> Tensor:
        return flat_scores("what method returned", what.evaluate(values), batch_dims)

    def noise() -> list[Tensor]:
        return [radius * (2 * uniform_like(value, generator) - 1) for value in what.values]

    original = attributed(what.values)
    for chunk in chunks(samples, chunk_size):
        moved = [value + drawn for value, drawn in zip(what.values, stacked(noise, chunk.stop - chunk.start))]
        changes = (vmap_or_loop(attributed, moved) - original).norm(dim=-1)
        # As they are after rounding, which in bfloat16 is far from what was drawn.
        steps = [(m.to(original.dtype) - v.to(original.dtype)) for m, v in zip(moved, what.values)]
        distances = flattened(steps, 1 + min(batch_dims, 1)).norm(dim=-1)
        yield changes, original.norm(dim=-1), distances[:, None] if batch_dims == 2 else distances
