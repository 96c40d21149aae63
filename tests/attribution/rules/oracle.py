"""Zennit as an oracle, on a deep copy of the model, since it changes modules."""

from __future__ import annotations

import copy
import sys
import types
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

INSTALLED = find_spec("zennit") is not None
_TORCHVISION = (
    "torchvision",
    "torchvision.models",
    "torchvision.models.resnet",
    "torchvision.ops",
    "torchvision.ops.misc",
)


@cache
def zennit() -> Any:
    """The package. It imports two classes of torchvision, which would bring a second torch along, to recognise its ResNets."""
    lent = [] if find_spec("torchvision") else _TORCHVISION
    for name in lent:
        sys.modules[name] = types.ModuleType(name)
    if lent:
        for name in ("Bottleneck", "BasicBlock"):
            setattr(sys.modules["torchvision.models.resnet"], name, type(name, (), {}))
    try:
        import zennit
        import zennit.attribution
        import zennit.canonizers
        import zennit.composites
        import zennit.rules
        import zennit.types
    finally:
        for name in lent:  # transformers would take the stub for the real thing
            del sys.modules[name]
    return zennit


def relevance(model: nn.Module, x: Tensor, composite: Any, target: int) -> Tensor:
    """Zennit's relevance of `x`, with 1 as the relevance of the output."""
    model = copy.deepcopy(model)

    def one_hot(y: Tensor) -> Tensor:
        return torch.eye(y.shape[-1], dtype=y.dtype)[[target] * len(y)]

    with zennit().attribution.Gradient(model=model, composite=composite, attr_output=one_hot) as attributor:
        return attributor(x.detach().clone())[1]


def layer_relevance(layer: nn.Module, rule: Any, x: Tensor, start: Tensor) -> Tensor:
    """Zennit's relevance of the input of one layer."""
    layer = copy.deepcopy(layer)
    handles = rule.register(layer)
    x = x.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(layer(x), x, start)
    handles.remove()
    return result
