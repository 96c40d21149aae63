"""SmoothGrad and its kin: any attribution, averaged over noisy copies of the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.batching import chunks, vmap_or_loop
from ..core.checks import require_positive
from ..core.errors import InputError
from ..core.estimate import Estimate, Moments
from ..core.explained import Explained, explained_inputs, moving_leaves
from ..core.randomness import normal_like, require_generator, stacked
from ..core.structure import describe

KINDS = ("mean", "square", "variance")


def smooth(
    method: Callable,
    *,
    samples: int = 25,
    noise: Any = 0.15,
    relative: bool = True,
    kind: str = "mean",
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Callable[..., Estimate]:
    """An attribution method averaged over Gaussian noise on the inputs.

        a_s = method(f, params, x + sigma * z_s), z_s ~ N(0, 1)
        mean:     value = 1/n sum_s a_s                     (SmoothGrad)
        square:   value = 1/n sum_s a_s^2                   (SmoothGrad-squared)
        variance: value = 1/(n-1) sum_s (a_s - mean)^2      (VarGrad)

    Args:
        method: function of (f, params, inputs) and keyword options whose result is made of floating-point tensors and None:
            `saliency`, `functools.partial(integrated_gradients, steps=20)`. SmoothGrad is that of `saliency`; the authors
            average the signed gradient, `absolute=False`.
        samples: the number n of noisy copies.
        noise: how strong: a number, or the structure of the inputs with one number for each tensor (0: none, for an attention
            mask of floats, say). Integer tensors are never noised.
        relative: `sigma = noise * (max x - min x)`, for each example and input tensor its own; a single example has to be a
            batch of one. False: `sigma = noise`, in the units of the inputs.
        kind: `"mean"`, `"square"` or `"variance"`.
        chunk_size: how many noisy copies run at once; None for all. It bounds memory and does not change the draws or the
            result. The method has its own `chunk_size`, given when the result is called.
        generator: source of the noise; it moves on with every call. None: torch's global one.

    Returns:
        `smoothed(f, params, inputs, **options) -> Estimate`: called as `method` is, with `value` in the structure of what that
        returns, its `standard_error`, and `samples`. The error of a variance is that for attributions that are normal,
        `value * sqrt(2 / (n - 1))`: too small where they have heavy tails. It is NaN for one sample.

    Raises:
        InputError: a bad option; and when called: inputs without a floating-point tensor, a noise of another structure,
            relative noise for a tensor [B] (which has no range within an example), a method that returns something else than
            tensors. What `method` raises.

    Cost: n times that of `method`, vmapped. Inside `vmap` the random draws need its `randomness="same"` or `"different"`; a
    `generator` cannot be compiled with `fullgraph=True`, the global one can.

    captum's NoiseTunnel has absolute noise (`relative=False`; its default is 1.0), and its VarGrad is the biased variance: ours
    times (n - 1) / n.

    Source: Smilkov et al., "SmoothGrad: removing noise by adding noise" (2017); for the square Hooker et al., "A Benchmark for
    Interpretability Methods in Deep Neural Networks" (2019); for the variance Adebayo et al., "Local Explanation Methods for
    Deep Neural Networks Lack Sensitivity to Parameter Values" (2018).

    Examples:
        >>> from tdhook.attribution.saliency import saliency
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2))
        >>> smoothgrad = smooth(saliency, samples=10, generator=torch.Generator().manual_seed(0))
        >>> estimate = smoothgrad(f, params, torch.randn(4, 3), targets=0, absolute=False)
        >>> torch.allclose(estimate.value, params["weight"][0].expand(4, 3))
        True
    """
    if not callable(method):
        raise InputError(f"method is {describe(method)}; give an attribution function such as tdhook.attribution.saliency.")
    require_positive("samples", samples)
    if kind not in KINDS:
        raise InputError(f"kind={kind!r} is unknown; choose one of {', '.join(map(repr, KINDS))}.")
    if kind == "variance" and samples < 2:
        raise InputError(f"samples={samples} has no variance; give at least 2.")
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)
    if isinstance(noise, (bool, int, float)):
        _require_strength(noise)

    def smoothed(f: Callable, params: Any, inputs: Any, **options: Any) -> Estimate:
        if not moving_leaves(pytree.tree_flatten(inputs)[0]):
            raise InputError(
                f"inputs is {describe(inputs)}, which has no floating-point tensor to add noise to; for token ids smooth the "
                "model after the embedding: f=lambda params, value: tdhook.start_from(f, site)(params, ids, value)."
            )
        what = explained_inputs(lambda _, noisy: method(f, params, noisy, **options), params, inputs)
        scales = _scales(what, noise, relative)
        structures = []

        def attributed(noisy: list[Tensor]) -> list[Tensor]:
            result = what.evaluate(noisy)
            if isinstance(result, Estimate):
                raise InputError(
                    "method returned an Estimate, whose standard error is no attribution; smooth its value: "
                    "smooth(lambda *args, **options: method(*args, **options).value), say."
                )
            leaves, spec = pytree.tree_flatten(result)
            structures.append((leaves, spec))
            return _tensors(leaves)

        totals: list[Moments] = []
        for chunk in chunks(samples, chunk_size):
            noisy = _noisy(what.values, scales, chunk.stop - chunk.start, generator)
            drawn = vmap_or_loop(attributed, noisy)
            drawn = [d.square() if kind == "square" else d for d in map(_at_least_float32, drawn)]
            moments = [Moments.of(d) for d in drawn]
            totals = [t + m for t, m in zip(totals, moments)] if totals else moments
            del noisy, drawn  # or they would be kept while the next chunk runs

        leaves, spec = structures[-1]

        def assembled(numbers: list[Tensor]) -> Any:
            # Where the method returned None there is no estimate either.
            left = iter(numbers)
            return pytree.tree_unflatten([None if x is None else next(left).to(x.dtype) for x in leaves], spec)

        if kind == "variance":
            values = [t.variance for t in totals]
            errors = [v * math.sqrt(2 / (samples - 1)) for v in values]
        else:
            values, errors = [t.mean for t in totals], [t.standard_error for t in totals]
        return Estimate(assembled(values), assembled(errors))

    return smoothed


def _require_strength(noise: Any) -> None:
    if not isinstance(noise, (int, float)) or isinstance(noise, bool) or not 0 <= noise < math.inf:
        raise InputError(f"noise holds {describe(noise)}; give a number of at least 0, or one for each tensor of the inputs.")


def _scales(what: Explained, noise: Any, relative: bool) -> list[Tensor | float]:
    """The standard deviation of the noise of each tensor: a number, or [B, 1, ..., 1]."""
    given = [noise] * len(what.values) if isinstance(noise, (int, float)) else what.flatten("noise", noise)
    for strength in given:
        _require_strength(strength)
    return [_range(value) * s if relative and s else float(s) for value, s in zip(what.values, given)]


def _range(value: Tensor) -> Tensor:
    if value.ndim < 2:
        raise InputError(
            f"inputs holds {describe(value)}, which has no range within an example for relative noise; give a single example "
            "as a batch of one, this tensor a noise of 0, or relative=False."
        )
    axes = tuple(range(1, value.ndim))
    return value.amax(axes, keepdim=True) - value.amin(axes, keepdim=True)


def _noisy(values: list[Tensor], scales: list[Tensor | float], count: int, generator: torch.Generator | None) -> list[Tensor]:
    """Noisy copies of the values, each [count, *shape], drawn one copy after the other so that chunks do not change them."""
    return stacked(lambda: [value + scale * normal_like(value, generator) for value, scale in zip(values, scales)], count)


def _tensors(leaves: list[Any]) -> list[Tensor]:
    """The leaves of what the method returned, without None."""
    for leaf in leaves:
        if leaf is not None and not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            raise InputError(f"method returned something that holds {describe(leaf)}; smooth averages floating-point tensors.")
    return [leaf for leaf in leaves if leaf is not None]


def _at_least_float32(sample: Tensor) -> Tensor:
    """Moments of bfloat16 samples would be mostly rounding."""
    return sample.to(torch.promote_types(sample.dtype, torch.float32))
