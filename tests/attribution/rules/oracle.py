"""Zennit as an oracle, on a deep copy of the model, since it changes modules."""

from __future__ import annotations

import copy
import sys
import types


def zennit():
    """The package. It imports two classes of torchvision, which would bring a second torch along, to recognise its ResNets."""
    if "torchvision" not in sys.modules:
        for name in ("torchvision", "torchvision.models", "torchvision.models.resnet", "torchvision.ops", "torchvision.ops.misc"):
            sys.modules[name] = types.ModuleType(name)
        for name in ("Bottleneck", "BasicBlock"):
            setattr(sys.modules["torchvision.models.resnet"], name, type(name, (), {}))
    import zennit
    import zennit.attribution
    import zennit.canonizers
    import zennit.composites
    import zennit.rules

    return zennit


def relevance(model, x, composite, target):
    """Zennit's relevance of `x`, with 1 as the relevance of the output."""
    import torch

    model = copy.deepcopy(model)
    one_hot = lambda y: torch.eye(y.shape[-1], dtype=y.dtype)[[target] * len(y)]  # noqa: E731
    with zennit().attribution.Gradient(model=model, composite=composite, attr_output=one_hot) as attributor:
        _, relevance = attributor(x.detach().clone())
    return relevance
