"""Single examples of a batch, and the loss of one: what per-example gradients and curvature are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ..core.errors import InputError, TargetError
from ..core.forward_mode import plain_attention
from ..core.structure import describe, tensors
from .moving import Moving

Loss = Callable[..., Tensor]
LossOfExample = Callable[[Sequence[Tensor], Tensor], Tensor]


def example(data: Any, index: Tensor) -> Any:
    """A batch of one: every tensor [B, *shape] becomes [1, *shape]; what is no tensor is passed through."""
    if isinstance(data, Tensor):
        return data.index_select(0, index.reshape(1))
    if isinstance(data, TensorDictBase):
        return TensorDict({name: example(value, index) for name, value in data.items()}, batch_size=[1])
    if isinstance(data, Mapping):
        return {name: example(value, index) for name, value in data.items()}
    if isinstance(data, (tuple, list)):
        parts = [example(value, index) for value in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
    return data


def count_examples(name: str, inputs: Any, labels: Any = None) -> int:
    """How many examples there are. Raises `InputError` unless all tensors have the same first dimension."""
    found = [t for _, t in tensors((inputs, labels))]
    if not found or not any(True for _ in tensors(inputs)):
        raise InputError(f"{name} is {describe(inputs)}, which holds no tensor; give a batch of examples.")
    for tensor in found:
        if tensor.ndim == 0 or len(tensor) != len(found[0]):
            raise InputError(
                f"{name} holds {describe(found[0])} and {describe(tensor)}; inputs and labels have one first dimension, "
                "that of the examples."
            )
    if not len(found[0]):
        raise InputError(f"{name} is empty; give at least one example.")
    return len(found[0])


def pair(name: str, data: Any) -> tuple[Any, Any]:
    """The inputs and labels of a data set. Raises `InputError` for what is no pair."""
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise InputError(f"{name} is {describe(data)}; give a pair (inputs, labels), with labels None for loss(output).")
    return data[0], data[1]


def require_loss(loss: Any) -> None:
    """Raises `InputError` for what is no function."""
    if not callable(loss):
        raise InputError(f"loss is {describe(loss)}; give a function loss(output, labels), or loss(output) without labels.")


def measured(loss: Loss, output: Any, labels: Any) -> Tensor:
    """The loss of a batch of one: Tensor []. Raises `TargetError` for another shape."""
    value = loss(output) if labels is None else loss(output, labels)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise TargetError(f"loss returned {describe(value)} for a batch of one; return one floating-point number.")
    return value.reshape(())


def output_of_example(f: Any, moved: Moving, inputs: Any) -> Callable[[Sequence[Tensor], Tensor], Any]:
    """The output for a batch of one as a function of the moving parameters and the index of an example."""

    def evaluate(values: Sequence[Tensor], index: Tensor) -> Any:
        # torch 2.13 runs the fused kernels of attention one example after the other inside a vmap, with a warning.
        with plain_attention():
            return f(moved.put(values), example(inputs, index))

    return evaluate


def loss_of_example(f: Any, moved: Moving, inputs: Any, labels: Any, loss: Loss) -> LossOfExample:
    """The loss as a function of the moving parameters and the index of an example."""
    output = output_of_example(f, moved, inputs)
    return lambda values, index: measured(loss, output(values, index), example(labels, index))


def indices(count: int, inputs: Any, part: slice = slice(None)) -> Tensor:
    """The numbers of the examples, where these are."""
    device = next(t.device for _, t in tensors(inputs))
    return torch.arange(count, device=device)[part]
