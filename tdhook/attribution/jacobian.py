"""The whole Jacobian of the output, one matrix for each example, with respect to inputs or activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.func import vjp
from torch.utils import _pytree as pytree

from ..core.batching import pull_each, vmap_or_loop
from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.errors import GradientError, InputError, TargetError
from ..core.explained import explained
from ..core.forward_mode import push_forward
from ..core.structure import describe, entries
from ..core.transforms import Sites, edits_backward

MODES = ("auto", "reverse", "forward")


def jacobian(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    outputs: Callable[[Any], Tensor] | None = None,
    at: Sites | None = None,
    mode: str = "auto",
    chunk_size: int | None = None,
) -> Any:
    """The derivative of every output of an example with respect to every input, or activation, of the same example.

        J[b, o, i] = d out[b, o] / d x[b, i]

    The examples are taken to be independent, as they are in a model in eval mode: then a derivative summed over the batch is
    that of the one example. Where they are not (batch statistics, attention across the batch), call it with one example.

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them, its floating-point tensors of shape [B, *features]; others are passed through. Inside a vmap
            over examples give a batch of one: `x[None]`.
        outputs: function of the output to the Tensor [B, *out] to differentiate. None: the output is that tensor.
        at: sites, with activations of shape [B, *features], instead of the inputs. Of two sites, one after the other, both have
            their total derivative.
        mode: `"reverse"` pulls back one cotangent for each output coordinate of an example, `"forward"` pushes one tangent for
            each of its input coordinates. `"auto"` takes the one with fewer coordinates, and reverse where an operation has no
            forward-mode derivative or where `edit_gradient` gave it another backward, which only reverse sees.
        chunk_size: how many cotangents or tangents at once; None for all. It does not change the result.

    Returns:
        Tensors [B, *out, *features] in the structure of `inputs` (None in place of what is no floating-point tensor), or a
        TensorDict of them keyed by site for `at`.

    Raises:
        InputError: integer inputs without `at`, tensors of another first dimension than the output, a bad `mode`, `outputs` or
            `chunk_size`. TargetError: `outputs` gives no floating-point tensor [B, *out]. GradientError: grad mode is off, or
            `mode="forward"` meets an operation without forward-mode derivative. SiteError. Warns for a model in train mode.

    Cost: one forward pass and as many vmapped backward passes (reverse) or tangent passes (forward) as there are coordinates.
    `"auto"` adds a forward pass where it chooses forward, `at` adds one always. Forward mode runs attention unfused.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))
        >>> x = torch.randn(5, 3)
        >>> jacobian(f, params, x).shape
        torch.Size([5, 2, 3])
        >>> torch.equal(jacobian(f, params, x, at="0")["0"][0], params["1", "weight"])
        True
    """
    if mode not in MODES:
        raise InputError(f"mode={mode!r} is unknown; choose one of {', '.join(map(repr, MODES))}.")
    if outputs is not None and not callable(outputs):
        raise InputError(f"outputs is a function of the output or None, got {describe(outputs)}.")
    require_positive("chunk_size", chunk_size, optional=True)
    require_gradients("jacobian")
    warn_if_stochastic(f, "jacobian")
    what = explained(f, params, inputs, at)
    for value in what.values:
        if value.ndim == 0:
            raise InputError(f"what is explained holds {describe(value)}; a jacobian needs shape [B, *features].")

    def run(shifts: Sequence[Tensor]) -> Tensor:
        return _output(outputs, what.shifted(shifts), what.values)

    if mode == "forward":
        try:
            parts = _pushed(run, what.values, chunk_size)
        except NotImplementedError as error:
            reason = str(error).split("\n")[0]
            raise GradientError(f"mode='forward' is not possible for this model ({reason}); use 'reverse'.") from error
    elif mode == "reverse" or edits_backward(f):
        parts = _pulled(run, what.values, chunk_size)
    else:
        parts = _cheaper(run, what.values, chunk_size)
    return _examples_first(what.restructure(parts), parts[0].ndim - what.values[0].ndim)


def _output(outputs: Callable[[Any], Tensor] | None, output: Any, values: Sequence[Tensor]) -> Tensor:
    """The tensor [B, *out] to differentiate."""
    if outputs is None and not isinstance(output, Tensor):
        keys = [key for key, _ in entries(output)]
        raise TargetError(
            f"the output is {describe(output)}, not one tensor; pass outputs=lambda out: out[{keys[0] if keys else 0!r}], say."
        )
    chosen = output if outputs is None else outputs(output)
    if not isinstance(chosen, Tensor) or chosen.ndim == 0 or not chosen.is_floating_point():
        what = "the output" if outputs is None else "what outputs returned"
        raise TargetError(f"{what} is {describe(chosen)}; a jacobian needs a floating-point tensor of shape [B, *out].")
    for value in values:
        if value.shape[0] != chosen.shape[0]:
            raise InputError(
                f"the output is {describe(chosen)} but what is explained holds {describe(value)}: their first dimension counts "
                "the examples; bind in f what is not one per example, and give a single example as x[None]."
            )
    return chosen


def _cheaper(run: Callable, values: list[Tensor], chunk_size: int | None) -> list[Tensor]:
    """By the mode that takes fewer passes."""
    if (parts := _pulled(run, values, chunk_size, at_most=sum(math.prod(value.shape[1:]) for value in values))) is not None:
        return parts
    try:
        return _pushed(run, values, chunk_size)
    except NotImplementedError:  # an operation without forward-mode derivative
        return _pulled(run, values, chunk_size)


def _pulled(run: Callable, values: list[Tensor], chunk_size: int | None, at_most: float = math.inf) -> Any:
    """Each part [*out, B, *features] by reverse mode; None where an example has more outputs than `at_most`."""
    output, pull, *_ = vjp(run, [torch.zeros_like(value) for value in values])
    count = math.prod(output.shape[1:])
    if count > at_most:
        return None

    def pull_flat(cotangent: Tensor) -> Any:
        return pull(cotangent.reshape(output.shape))

    flat = output.reshape(len(output), count)
    (parts,) = pull_each(pull_flat, flat, torch.ones_like(flat[:, :1]), chunk_size)
    return [part.reshape(*output.shape[1:], *value.shape) for part, value in zip(parts, values)]


def _pushed(run: Callable, values: list[Tensor], chunk_size: int | None) -> list[Tensor]:
    """Each part [*out, B, *features] by forward mode."""
    zeros = [torch.zeros_like(value) for value in values]
    parts = []
    for k, value in enumerate(values):
        coordinates = torch.arange(math.prod(value.shape[1:]), device=value.device)

        def push(i: Tensor, k: int = k, value: Tensor = value, coordinates: Tensor = coordinates) -> Tensor:
            unit = (coordinates == i).to(value.dtype).reshape(value.shape[1:]).expand(value.shape)
            return push_forward(lambda shift: run([*zeros[:k], shift, *zeros[k + 1 :]]), (zeros[k],), (unit,))[1]

        columns = vmap_or_loop(push, coordinates, chunk_size)  # [F, B, *out]
        parts.append(columns.movedim((0, 1), (-1, -2)).reshape(*columns.shape[2:], *value.shape))
    return parts


def _examples_first(result: Any, count: int) -> Any:
    """[*out, B, *features] to [B, *out, *features] in every tensor, for `count` dimensions of out."""
    if isinstance(result, TensorDictBase):
        batch = list(result.batch_size)
        batch = [batch[count], *batch[:count], *batch[count + 1 :]] if len(batch) > count else []
        return result.apply(lambda part: part.movedim(count, 0), batch_size=batch)
    return pytree.tree_map(lambda part: part.movedim(count, 0) if isinstance(part, Tensor) else part, result)
