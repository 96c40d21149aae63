"""Infidelity: how badly an attribution predicts what perturbations do to the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.batching import chunks, vmap_or_loop
from ..core.checks import require_number, require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.estimate import Estimate, Moments
from ..core.randomness import normal_like, require_generator, stacked, uniform_like
from ..core.structure import describe
from ..core.targets import Targets
from ..core.transforms import Sites
from .features import Features, features, flattened

Perturbation = Callable[[Any, torch.Generator | None], Any]


def gaussian_noise(std: float = 0.1) -> Perturbation:
    """Perturbations I ~ N(0, std^2), of every element.

    Args:
        std: standard deviation, in units of the inputs.

    Returns:
        A function for the argument `perturbation` of `infidelity`.

    Raises:
        InputError: `std` that is not positive.

    Examples:
        >>> gaussian_noise(0.1)(torch.zeros(4, 3), None).shape
        torch.Size([4, 3])
    """
    require_number("std", std, strict=True)
    return lambda inputs, generator: _each(lambda value: std * normal_like(value, generator), inputs)


def square_removal(size: int, baseline: float = 0.0) -> Perturbation:
    """Perturbations I = x - baseline within one random square of an image and 0 elsewhere: x - I has the square removed.

    Args:
        size: edge of the square, in pixels; it lies inside of the image, at every place equally often, at another one for
            each example, and at the same one in all channels.
        baseline: value that the square gets.

    Returns:
        A function for the argument `perturbation` of `infidelity`, for tensors [B, C, H, W] (or [C, H, W] inside a vmap).

    Raises:
        InputError: `size` that is no positive integer; and when called, one that is larger than the image.

    Source: Yeh et al., "On the (In)fidelity and Sensitivity of Explanations" (2019).

    Examples:
        >>> (square_removal(2)(torch.ones(5, 1, 8, 8), None) != 0).sum((1, 2, 3))
        tensor([4, 4, 4, 4, 4])
    """
    require_positive("size", size)

    def square(value: Tensor, generator: torch.Generator | None) -> Tensor:
        if value.ndim < 3 or min(value.shape[-2:]) < size:
            raise InputError(f"square_removal({size}) takes images [B, C, H, W] of at least that size, got {describe(value)}.")
        inside = torch.ones_like(value, dtype=torch.bool)
        for axis in (-2, -1):
            length = value.shape[axis]
            drawn = uniform_like(value[..., :1, :1, :1].to(torch.promote_types(value.dtype, torch.float32)), generator)
            start = (drawn * (length - size + 1)).long()
            places = torch.arange(length, device=value.device).reshape(-1, *[1] * (-1 - axis))
            inside = inside & (places >= start) & (places < start + size)
        return torch.where(inside, value - baseline, torch.zeros_like(value))

    return lambda inputs, generator: _each(lambda value: square(value, generator), inputs)


def infidelity(
    f: Callable,
    params: Any,
    inputs: Any,
    attributions: Any,
    *,
    targets: Targets = None,
    perturbation: Perturbation | None = None,
    samples: int = 100,
    normalize: bool = False,
    at: Sites | None = None,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The mean squared error of an attribution as a linear model of what perturbations do.

        infidelity = E_I [(I . phi - (F(x) - F(x - I)))^2]
        normalize: phi is first scaled by beta = E[(I . phi) (F(x) - F(x - I))] / E[(I . phi)^2], the best factor

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them.
        attributions: phi, in the structure of `inputs` (or keyed by site) and of its shapes, with a leading dimension T for
            plural targets.
        targets: the scalars F that were explained; see `tdhook.targets`. All of them see the same perturbations.
        perturbation: function of `(inputs, generator)` to one draw of I, in the structure of the inputs; with `at` it gets the
            values at the sites, keyed by site. What is not floating-point is None in both. Attributions that are multiplied
            by the input predict removals (`square_removal`, or `lambda x, generator: x - baseline`) when they are divided by
            x - baseline; gradients predict small noise. None: `gaussian_noise(0.1)`.
        samples: number of perturbations, each drawn for all examples at once.
        normalize: make the result independent of the scale of the attributions.
        at: sites, if the attributions are those of activations.
        chunk_size: how many perturbations run at once; None for all. It bounds memory and does not change the result.
        generator: source of the draws. None: torch's global one.

    Returns:
        `Estimate` with `value` and `standard_error` Tensor [B], or [T, B] for plural targets; the error is NaN for one sample.
        The normalised value is NaN for attributions that predict 0 everywhere, for which there is no best factor. Half types
        give float32.

    Raises:
        InputError: attributions that do not fit, a perturbation of another structure or shape, a bad `samples`, `chunk_size` or
            `generator`. TargetError, SiteError. Warns for a model in train mode.

    Cost: `samples` + 1 forward passes, vmapped. Two numbers per sample, example and target are kept. Inside a vmap the draws
    need its `randomness="different"` or `"same"`; a `generator` cannot be compiled with `fullgraph=True`, the global one can.

    captum's perturbation function returns the pair (I, x - I) for a batch repeated in place; ours returns I. Its default is 10
    samples, without an error; its normalised value is 0/0 := 0 where ours is NaN. Quantus perturbs patches at several sizes.

    Source: Yeh et al., "On the (In)fidelity and Sensitivity of Explanations" (2019).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2))
        >>> x = torch.randn(4, 3)
        >>> weights = params["weight"][:, None].expand(2, 4, 3)
        >>> infidelity(f, params, x, weights, targets=[0, 1]).value.max() < 1e-6
        tensor(True)
    """
    require_positive("samples", samples)
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)
    if perturbation is not None and not callable(perturbation):
        raise InputError(
            f"perturbation is {describe(perturbation)}; give a function such as tdhook.metrics.gaussian_noise(0.1)."
        )
    warn_if_stochastic(f, "infidelity")
    scored = features(f, params, inputs, attributions, targets, at)
    if not scored.groups.single:
        raise InputError("attributions has size 1 along an axis of the inputs; infidelity needs one for every element.")
    draw = perturbation or gaussian_noise()
    parts = [
        _predicted_and_seen(scored, stacked(lambda: _draw(scored, draw, generator), chunk.stop - chunk.start))
        for chunk in chunks(samples, chunk_size)
    ]
    predicted, seen = (torch.cat(each) for each in zip(*parts))  # [S, T, *B]
    if normalize:
        # The value is at its minimum in beta, so that the error of beta does not add to its own, to first order.
        predicted = predicted * ((predicted * seen).mean(0) / predicted.square().mean(0))
    moments = Moments.of((predicted - seen).square())
    return Estimate(scored.result(moments.mean), scored.result(moments.standard_error))


def _each(function: Callable[[Tensor], Tensor], structure: Any) -> Any:
    """A function of each tensor in a structure, whose None stay."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, structure)


def _draw(scored: Features, perturbation: Perturbation, generator: torch.Generator | None) -> list[Tensor]:
    """One perturbation of every tensor."""
    what = scored.what
    drawn = what.flatten("perturbation", perturbation(what.restructure(what.values), generator))
    for each, value in zip(drawn, what.values):
        if not isinstance(each, Tensor) or each.shape != value.shape or each.dtype != value.dtype:
            raise InputError(f"perturbation returned {describe(each)} for {describe(value)}; return the I of F(x - I).")
    return drawn


def _predicted_and_seen(scored: Features, drawn: list[Tensor]) -> tuple[Tensor, Tensor]:
    """I . phi and F(x) - F(x - I) of some perturbations, each [S, T, *B]."""
    values = scored.what.values
    outputs = vmap_or_loop(lambda moved: scored.evaluate(moved), [v - d for v, d in zip(values, drawn)])
    batch = scored.outputs.ndim - 1
    flat = flattened(drawn, 1 + batch)  # [S, *B, D]
    predicted = (flat[:, None].to(scored.scores.dtype) * scored.scores).sum(-1)
    return predicted, scored.outputs - outputs
