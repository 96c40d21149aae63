"""Affine layers of all kinds, and what rules give for them, by plain matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import tdhook
from tdhook.attribution.lrp import lrp

LAYERS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda bias: nn.Linear(6, 5, bias=bias), (6,)),
    "linear of tokens": (lambda bias: nn.Linear(4, 3, bias=bias), (3, 4)),
    "conv1d": (lambda bias: nn.Conv1d(3, 4, 3, bias=bias), (3, 6)),
    "conv1d, dilated": (lambda bias: nn.Conv1d(1, 2, 2, dilation=2, bias=bias), (1, 6)),
    "conv2d": (lambda bias: nn.Conv2d(3, 4, 3, padding=1, bias=bias), (3, 4, 4)),
    "conv2d, strided": (lambda bias: nn.Conv2d(3, 2, 2, stride=2, padding="valid", bias=bias), (3, 4, 4)),
    "conv2d, grouped": (lambda bias: nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=bias), (4, 3, 3)),
    "conv3d": (lambda bias: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=(0, 1, 0), bias=bias), (2, 3, 3, 3)),
    "transposed conv1d": (lambda bias: nn.ConvTranspose1d(3, 4, 2, bias=bias), (3, 4)),
    "transposed conv2d": (
        lambda bias: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1, bias=bias),
        (3, 3, 3),
    ),
    "transposed conv2d, grouped": (lambda bias: nn.ConvTranspose2d(4, 2, 2, groups=2, bias=bias), (4, 3, 3)),
    "transposed conv3d": (lambda bias: nn.ConvTranspose3d(1, 2, 2, bias=bias), (1, 3, 2, 2)),
}


def example(name: str, bias: bool, sign: str, batch: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, an operand, and a cotangent of its output."""
    make, shape = LAYERS[name]
    layer = make(bias).double()
    if bias:
        nn.init.normal_(layer.bias)
    x = torch.randn(batch, *shape).double()
    x = x.abs() if sign == "nonnegative" else x
    return layer, x, torch.randn_like(layer(x)).detach()


def ours(layer: nn.Module, rule: object, x: Tensor, cotangent: Tensor) -> Tensor:
    """The relevance of `x` where that of the output is the output times a cotangent."""
    f, params = tdhook.functionalize(layer)
    return lrp(f, params, x, rules={("linear", "convolution"): rule}, targets=lambda y: (y * cotangent).flatten(1).sum(1))


def matrix(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A layer as W [outputs, inputs] and b [outputs] on flattened values."""
    zero = torch.zeros(1, *shape).double()
    bias = layer(zero).flatten().detach()
    weight = torch.func.jacrev(lambda x: layer(x).flatten())(zero).flatten(1).detach()
    return weight, bias
