"""Adversarial examples: small changes of the inputs that change what a model says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.batching import chunks
from ..core.checks import require_gradients, require_number, require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.explained import Explained, explained
from ..core.randomness import require_generator
from ..core.structure import describe
from ..core.targets import Targets, check, select
from ..core.transforms import Sites
from .ascent import (
    Bounds,
    Packing,
    bounded,
    direction,
    own,
    own_gradients,
    own_units,
    require_batched,
    require_bounds,
    require_update,
)
from .balls import NORMS, Ball


def cross_entropy(logits: Tensor) -> Tensor:
    """The cross-entropy of every class, for the argument `loss` of a model that returns logits.

        loss_c = -log softmax(logits)_c

    Args:
        logits: Tensor [B, C].

    Returns:
        Tensor [B, C].

    Examples:
        >>> cross_entropy(torch.tensor([[0.0, 0.0]]))
        tensor([[0.6931, 0.6931]])
    """
    return -logits.log_softmax(-1)


def fgsm(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    epsilon: float,
    targets: Targets = None,
    loss: Callable[[Any], Tensor] | None = None,
    targeted: bool = False,
    at: Sites | None = None,
    bounds: Bounds | None = None,
    mask: Any = None,
    chunk_size: int | None = None,
) -> Any:
    """The fast gradient sign method: one step of equal size in every feature.

        x* = clamp(x + epsilon * sign(dL/dx)),   away from a class; with a minus towards it (`targeted`)

    Every gradient that is not zero counts, however small it is.

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them: Tensor [B, *features], or a structure of such. Floating-point tensors are changed.
        epsilon: size of the step.
        targets: class to leave, or to reach; see `tdhook.targets`. Plural targets give one example for each.
        loss: function of the output to the losses L, Tensor [B], or [B, C] from which `targets` choose. None: the negative
            logarithm of the target value, for a model that returns probabilities. For logits pass `cross_entropy`.
        targeted: whether to lower the loss instead of raising it.
        at: sites: change the values there instead of the inputs.
        bounds: pair (lowest, highest) of numbers, tensors that broadcast to the inputs, or None.
        mask: what may change, in the structure of what is changed: tensors that broadcast to it, or None for all of a tensor.
        chunk_size: how many targets are attacked at once; None for all. It bounds memory and does not change the result.

    Returns:
        Changed inputs in the structure of `inputs` (what does not move is as it was), or a TensorDict keyed by site for `at`,
        with a leading dimension T for plural targets.

    Raises:
        InputError: a bad `epsilon`, `bounds`, `mask` or `chunk_size`. TargetError, SiteError, GradientError (grad mode is off).
            Warns for a model in train mode.

    Cost: one forward pass, then T forward and backward passes, vmapped.

    Source: Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples" (2015).

    Examples:
        >>> f = lambda params, x: (x @ params).softmax(-1)
        >>> fgsm(f, torch.eye(2), torch.tensor([[1.0, 0.0]]), epsilon=0.5, targets=0)
        tensor([[0.5000, 0.5000]])
    """
    require_number("epsilon", epsilon)
    warn_if_stochastic(f, "fgsm")
    ball = Ball(None, epsilon)
    return _attack("fgsm", f, params, inputs, targets, loss, targeted, at, bounds, mask, chunk_size, ball, 1, epsilon, "sign")


def pgd(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    radius: float,
    targets: Targets = None,
    loss: Callable[[Any], Tensor] | None = None,
    targeted: bool = False,
    norm: str = "linf",
    steps: int = 10,
    step_size: float | None = None,
    update: str | None = None,
    random_start: bool = False,
    at: Sites | None = None,
    bounds: Bounds | None = None,
    mask: Any = None,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """Projected gradient descent: steps along the gradient, each followed by a projection into a ball around the inputs.

        x* <- clamp(x + P(x* + step_size * u(dL/dx*) - x)),   away from a class; with a minus towards it (`targeted`)

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them: Tensor [B, *features], or a structure of such. Floating-point tensors are changed.
        radius: of the ball: the largest change of a feature (`"linf"`), or the largest Euclidean norm of the change of an
            example, over all of its tensors (`"l2"`).
        targets: as in `fgsm`.
        loss: as in `fgsm`.
        targeted: as in `fgsm`.
        norm: `"linf"` or `"l2"`.
        steps: number of steps.
        step_size: None for 2.5 * radius / steps.
        update: u is `"sign"`, `"normalized"` (the gradient of an example scaled to Euclidean norm 1) or `"gradient"`. None:
            `"sign"` for `"linf"`, `"normalized"` for `"l2"`.
        random_start: begins at a point drawn uniformly from the ball, the same for all targets.
        at: as in `fgsm`.
        bounds: as in `fgsm`.
        mask: as in `fgsm`.
        chunk_size: as in `fgsm`.
        generator: source of the random start; None for the global one.

    Returns:
        As `fgsm`.

    Raises:
        InputError: a bad `radius`, `norm`, `steps`, `step_size`, `update` or `generator`. Otherwise as `fgsm`.

    Cost: one forward pass, then `steps * T` forward and backward passes, T at a time and one step after the other. The result
    can be differentiated, for which autograd keeps all steps where params or inputs require gradients: detach them in
    adversarial training. A compiled graph has all steps unrolled; with a generator torch cannot compile, without one it can.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (2018).

    Examples:
        >>> f = lambda params, x: x @ params
        >>> pgd(f, torch.eye(2), torch.zeros(1, 2), radius=1.0, norm="l2", targets=1, loss=cross_entropy, targeted=True)
        tensor([[-0.7071, 0.7071]])
    """
    require_number("radius", radius)
    if norm not in NORMS:
        raise InputError(f"norm={norm!r} is unknown; choose 'linf' or 'l2'.")
    require_positive("steps", steps)
    if step_size is not None:
        require_number("step_size", step_size)
    if update is not None:
        require_update("update", update)
    require_generator(generator)
    if not isinstance(random_start, bool):
        raise InputError(f"random_start is a bool, got {describe(random_start)}.")
    warn_if_stochastic(f, "pgd")
    ball = Ball(norm, radius, random_start, generator)
    size = 2.5 * radius / steps if step_size is None else step_size
    kind = update or ("sign" if norm == "linf" else "normalized")
    return _attack("pgd", f, params, inputs, targets, loss, targeted, at, bounds, mask, chunk_size, ball, steps, size, kind)


def _attack(
    method: str,
    f: Callable,
    params: Any,
    inputs: Any,
    targets: Targets,
    loss: Callable[[Any], Tensor] | None,
    targeted: bool,
    at: Sites | None,
    bounds: Bounds | None,
    mask: Any,
    chunk_size: int | None,
    ball: Ball,
    steps: int,
    size: float,
    update: str,
) -> Any:
    """`steps` steps of a size, each kept in the ball and in the bounds."""
    require_positive("chunk_size", chunk_size, optional=True)
    require_bounds(bounds)
    if loss is not None and not callable(loss):
        raise InputError(f"loss is a function of the output, such as cross_entropy, or None, got {describe(loss)}.")
    if not isinstance(targeted, bool):
        raise InputError(f"targeted is a bool, got {describe(targeted)}.")
    check(targets)
    require_gradients(method)
    what = explained(f, params, inputs, at)
    values = what.values
    masks = _masks(what, mask)

    def scores(moved: list[Tensor]) -> tuple[Tensor, bool]:
        output = what.evaluate(moved)
        return select(targets, output if loss is None else loss(output))

    def raised(moved: list[Tensor], unit: Tensor) -> Tensor:
        score = own(scores(moved)[0], unit)
        rising = -score.log() if loss is None else score
        return -rising if targeted else rising

    first, plural = scores(values)
    require_batched(values, first.shape[:-1])
    begin = values
    if ball.random_start:
        drawn = ball.drawn(values, first.ndim - 1)
        begin = bounded([v + m * d for v, m, d in zip(values, masks, drawn)], bounds)
    parts = []
    for chunk in chunks(first.shape[-1], chunk_size):
        units = own_units(first.shape[-1], chunk, first)
        points = [value.expand(len(units), *value.shape) for value in begin]
        for _ in range(steps):
            ways = direction(own_gradients(raised, points, units)[0], update, first.ndim)
            changes = [p + size * way * m - v for p, way, m, v in zip(points, ways, masks, values)]
            points = bounded([v + c for v, c in zip(values, ball.inside(changes, first.ndim))], bounds)
        parts.append(points)
    results = [torch.cat(each) for each in zip(*parts)]
    return Packing.of(what, inputs, at).result(results if plural else [r[0] for r in results], plural)


def _masks(what: Explained, mask: Any) -> list[Any]:
    """A factor for each tensor: 0 where it must not change."""
    if mask is None:
        return [1] * len(what.values)
    masks: list[Any] = []
    for given, value in zip(what.flatten("mask", mask), what.values):
        if given is not None and not isinstance(given, Tensor):
            raise InputError(f"mask holds {describe(given)}; give a tensor, or None to change all of {describe(value)}.")
        try:
            masks.append(1 if given is None else given.to(value).expand(value.shape))
        except RuntimeError:
            raise InputError(f"mask holds {describe(given)}, which does not broadcast to {describe(value)}.") from None
    return masks
