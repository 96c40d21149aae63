"""Activation maximisation: inputs that drive an output, or a unit at a site, as high as they can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.batching import chunks, vmap_or_loop
from ..core.checks import require_gradients, require_number, require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.explained import explained
from ..core.randomness import integers, require_generator
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


class Maximization(NamedTuple):
    """Optimised inputs.

    Attributes:
        inputs: in the structure of the inputs (or a TensorDict keyed by site), with a leading dimension T for plural targets.
        values: the target values there, Tensor [B], or [T, B] for plural targets.
    """

    inputs: Any
    values: Tensor


def activation_maximization(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    at: Sites | None = None,
    steps: int = 100,
    learning_rate: float = 1.0,
    update: str = "normalized",
    bounds: Bounds | None = None,
    regularizers: Sequence[Callable[[Any], Tensor]] = (),
    transform: Callable[[Any], Any] | None = None,
    project: Callable[[Any], Any] | None = None,
    jitter: int = 0,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Maximization:
    """Gradient ascent of target values over the inputs, for each target from the same start.

        x <- clamp(project(x + learning_rate * u(d/dx [F(transform(x)) - sum_r R_r(x)])))

    To maximise a unit of a site, explain the head of the model: `activation_maximization(tdhook.stop_at(f, site), ...)` with
    `targets` that choose from the value there.

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: where to start, as `f` takes them: Tensor [B, *features], or a structure of such. Floating-point tensors move.
        targets: which scalars F of the output to maximise; see `tdhook.targets`. None: the output is Tensor [B].
        at: sites: optimise the values there (an embedding, say) instead of the inputs.
        steps: number of updates.
        learning_rate: factor of u, the length of an update where u is normalised.
        update: u is `"normalized"` (the gradient of an example, over all of its tensors, scaled to Euclidean norm 1), `"sign"`,
            or `"gradient"` itself.
        bounds: pair (lowest, highest) of numbers, tensors that broadcast to the inputs, or None.
        regularizers: functions of the inputs to Tensor [B] that are subtracted, such as `lambda x: 0.1 * total_variation(x)`.
        transform: function of the inputs to what the model sees, of the same structure and shapes; differentiated.
        project: function of the inputs to inputs, applied after every update (not differentiated); `bounds` come after it.
        jitter: rolls the last two axes of what the model sees by up to so many places, drawn anew in every step.
        chunk_size: how many targets are optimised at once; None for all. It bounds memory and does not change the result.
        generator: source of the jitter; None for the global one.

    Returns:
        `Maximization`: the inputs that were reached (before `transform`; what does not move is as it was), and the values of
        the targets there, without jitter and regularisers.

    Raises:
        InputError: a bad `steps`, `learning_rate`, `update`, `bounds`, `jitter`, `chunk_size` or `generator`; functions that
            return other shapes. TargetError, SiteError, GradientError (grad mode is off). Warns for a model in train mode.

    Cost: one forward pass, then `(steps + 1) * T` forward and `steps * T` backward passes, T at a time and one step after the
    other. The result can be differentiated, for which autograd keeps all steps where params or inputs require gradients: detach
    them. A compiled graph has all steps unrolled; with a generator torch cannot compile, without one it can.

    Source: Erhan et al., "Visualizing Higher-Layer Features of a Deep Network" (2009); Olah, Mordvintsev, Schubert, "Feature
    Visualization" (2017) for the jitter.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(2, 3, bias=False))
        >>> options = {"steps": 2, "update": "sign", "bounds": (-1, 1)}
        >>> best, values = activation_maximization(f, params, torch.zeros(1, 2), targets=[0, 2], **options)
        >>> torch.allclose(values[:, 0], params["weight"][[0, 2]].abs().sum(1)), best.shape
        (True, torch.Size([2, 1, 2]))
    """
    require_positive("steps", steps)
    require_positive("jitter", jitter, least=0)
    require_positive("chunk_size", chunk_size, optional=True)
    require_number("learning_rate", learning_rate)
    require_update("update", update)
    require_bounds(bounds)
    require_generator(generator)
    for name, function in (("transform", transform), ("project", project)):
        if function is not None and not callable(function):
            raise InputError(f"{name} is {describe(function)}; give a function of the inputs, or None.")
    if not isinstance(regularizers, Sequence) or not all(callable(r) for r in regularizers):
        raise InputError(f"regularizers is a sequence of functions of the inputs, got {describe(regularizers)}.")
    check(targets)
    require_gradients("activation_maximization")
    warn_if_stochastic(f, "activation_maximization")
    what = explained(f, params, inputs, at)
    packing = Packing.of(what, inputs, at)
    shifts = _jitters(steps, jitter, what.values, generator)

    def scores(moved: list[Tensor], shift: Tensor | None = None) -> tuple[Tensor, bool]:
        seen = moved if transform is None else packing.unpack("what transform returned", transform(packing.pack(moved)))
        return select(targets, what.evaluate(seen if shift is None else [_rolled(s, shift) for s in seen]))

    first, plural = scores(what.values)
    require_batched(what.values, first.shape[:-1])
    penalty = _penalty(regularizers, packing, first.shape[:-1])

    def projected(moved: list[Tensor]) -> list[Tensor]:
        return moved if project is None else packing.unpack("what project returned", project(packing.pack(moved)))

    parts = []
    for chunk in chunks(first.shape[-1], chunk_size):
        units = own_units(first.shape[-1], chunk, first)
        points = [value.expand(len(units), *value.shape) for value in what.values]
        for shift in shifts:

            def value(moved: list[Tensor], unit: Tensor, shift: Tensor | None = shift) -> Tensor:
                return own(scores(moved, shift)[0], unit) - penalty(moved)

            ways = direction(own_gradients(value, points, units)[0], update, first.ndim)
            points = [point + learning_rate * way for point, way in zip(points, ways)]
            points = bounded(vmap_or_loop(projected, points) if project is not None else points, bounds)
        reached = vmap_or_loop(lambda both: own(scores(both[0])[0], both[1]), (points, units))
        parts.append((points, reached))
    best = [torch.cat(each) for each in zip(*(points for points, _ in parts))]
    values = torch.cat([reached for _, reached in parts])
    return Maximization(packing.result(best if plural else [b[0] for b in best], plural), values if plural else values[0])


def total_variation(inputs: Tensor) -> Tensor:
    """The sum of absolute differences between neighbours along the last two axes.

        R(x) = sum |x[..., i + 1, j] - x[..., i, j]| + sum |x[..., i, j + 1] - x[..., i, j]|

    Args:
        inputs: Tensor [B, ..., H, W].

    Returns:
        Tensor [B].

    Raises:
        InputError: no tensor with at least three dimensions.

    Source: Rudin, Osher, Fatemi, "Nonlinear total variation based noise removal algorithms" (1992), the anisotropic form.

    Examples:
        >>> total_variation(torch.eye(2)[None])
        tensor([4.])
    """
    if not isinstance(inputs, Tensor) or inputs.ndim < 3:
        raise InputError(f"total_variation takes a tensor [B, ..., H, W], got {describe(inputs)}.")
    return inputs.diff(dim=-1).abs().flatten(1).sum(1) + inputs.diff(dim=-2).abs().flatten(1).sum(1)


def l2_norm(inputs: Tensor) -> Tensor:
    """The Euclidean norm of each example; its gradient at zero is zero.

    Args:
        inputs: Tensor [B, *features].

    Returns:
        Tensor [B].

    Raises:
        InputError: no tensor with at least two dimensions.

    Examples:
        >>> l2_norm(torch.tensor([[3.0, 4.0]]))
        tensor([5.])
    """
    if not isinstance(inputs, Tensor) or inputs.ndim < 2:
        raise InputError(f"l2_norm takes a tensor [B, *features], got {describe(inputs)}.")
    return torch.linalg.vector_norm(inputs.flatten(1), dim=1)


def _penalty(
    regularizers: Sequence[Callable[[Any], Tensor]], packing: Packing, batch: Sequence[int]
) -> Callable[[list[Tensor]], Any]:
    """The sum of the regularisers as a function of the tensors that move, tried once."""
    for i, regularizer in enumerate(regularizers):
        found = regularizer(packing.pack(packing.what.values))
        if not isinstance(found, Tensor) or list(found.shape) != list(batch):
            raise InputError(f"regularizers[{i}] returned {describe(found)}; return a tensor of shape {list(batch)}.")
    return lambda moved: sum(regularizer(packing.pack(moved)) for regularizer in regularizers)


def _jitters(steps: int, jitter: int, values: Sequence[Tensor], generator: torch.Generator | None) -> list[Tensor] | list[None]:
    """For each step the shifts along the last two axes, all drawn at once."""
    if not jitter:
        return [None] * steps
    for value in values:
        if value.ndim < 3:
            raise InputError(f"jitter={jitter} rolls the last two axes of [B, ..., H, W], but inputs hold {describe(value)}.")
    return list(integers(-jitter, jitter + 1, (steps, 2), generator, values[0].device))


def _rolled(value: Tensor, shift: Tensor) -> Tensor:
    """`torch.roll` of the last two axes by amounts in a tensor."""
    for axis, amount in zip((-2, -1), shift):
        places = (torch.arange(value.shape[axis], device=value.device) - amount) % value.shape[axis]
        value = value.index_select(axis, places)
    return value
