"""Forwards of the twin for layers of torch whose own one does not suit function transforms.

Where operations are sites both run as the layer itself does, so that its operations keep their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .compat import is_batched, is_compiling, is_wrapped

_BatchNorm = nn.modules.batchnorm._BatchNorm


def batch_norm(self: Any, input: Tensor) -> Tensor:
    """Batch normalisation; with running statistics and under a transform as the affine map of each channel that it then is.

    The batching rules of torch move the axis of vmap into the channels: the input is copied, the next convolution copies it
    back, weight and bias come in passes of their own. That is about 4 times the cost, forward and backward.
    """
    plain = self.training or self.running_mean is None or self.running_var is None
    if plain or is_compiling() or not is_wrapped(input) or _operations_are_sites(self):
        return _BatchNorm.forward(self, input)
    self._check_input_dim(input)
    exact = torch.promote_types(input.dtype, torch.float32)
    scale = (self.running_var.to(exact) + self.eps).rsqrt()
    if self.weight is not None:
        scale = scale * self.weight
    shift = -self.running_mean * scale
    if self.bias is not None:
        shift = shift + self.bias
    channels = (-1, *[1] * (input.ndim - 2))
    scaled, shift = input.to(exact) * scale.reshape(channels), shift.reshape(channels)
    # In place saves a tensor as large as the activations; vmap refuses it where only the bias has its axis.
    return (scaled + shift if is_wrapped(shift) else scaled.add_(shift)).to(input.dtype)


def attention(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Multi-head attention; under a transform never by the fused kernel of inference.

    That has no derivative, no forward mode and no batching rule, but is taken wherever no tensor shows `requires_grad`, as in
    vjp over vmap. It serves one tensor in three roles only, so key and value get another name.
    """
    if query is key and key is value and not is_compiling() and _transformed(self, query) and not _operations_are_sites(self):
        key = value = query.view_as(query)
    return nn.MultiheadAttention.forward(self, query, key, value, *args, **kwargs)


def linear(self: Any, input: Tensor) -> Tensor:
    """An affine map; under vmap of a slice whose rows do not follow each other (`hidden[:, -1:]`) on a copy of it.

    Of such rows torch makes a batch of products, which reads the weight once for each: 65 ms instead of 5 for the unembedding
    of 14 last tokens of GPT-2.
    """
    weight = self._parameters.get("weight")  # None where a parametrization computes it
    plain = is_compiling() or not is_batched(input) or weight is None or is_wrapped(weight)
    if not plain and not _operations_are_sites(self):
        shape, stride = input.shape, input.stride()
        if any(stride[i] != stride[i + 1] * shape[i + 1] for i in range(input.ndim - 2)):
            input = input.clone()
    return nn.Linear.forward(self, input)


FORWARDS: dict[Callable, Callable] = {
    _BatchNorm.forward: batch_norm,
    nn.MultiheadAttention.forward: attention,
    nn.Linear.forward: linear,
}


def _transformed(module: Any, query: Tensor) -> bool:
    return is_wrapped(query) or (module.in_proj_weight is not None and is_wrapped(module.in_proj_weight))


def _operations_are_sites(module: Any) -> bool:
    frame = module._tdhook_cell.frame
    return frame is not None and frame.wants_operations
