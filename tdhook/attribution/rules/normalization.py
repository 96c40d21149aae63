"""The rule for norms: the scale is a constant, so that what remains is linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.errors import RuleError
from ...core.rules import Operation, Rule


@dataclass(frozen=True)
class FrozenScale(Rule):
    """Layer, RMS, group and instance norms, and `normalize`, with a constant scale (LN-rule).

        y = (x - mean(x)) * constant(1 / std(x)) * w + b         RMS: without the mean

    The plain gradient of a layer norm conserves nothing: its sum of x * gradient is 0. A norm that is written out gets the same
    by `Stop` at its `rsqrt`, `sqrt` or `std`, as the presets have it.

    Source: Ali et al., "XAI for Transformers" (2022).
    """

    groups: ClassVar = frozenset({"normalization"})

    def __call__(self, operation: Operation) -> Tensor:
        name, y, x = operation.name, operation.evaluate(), operation.x
        given = dict(zip(_NAMES.get(name, ()), operation.args)) | dict(operation.kwargs)
        weight = given.get("weight")
        if name == "normalize":
            size = operation.constant(x).norm(given.get("p", 2.0), given.get("dim", 1), keepdim=True)
            return operation.same_value(y, x / operation.constant(size.clamp(min=given.get("eps", 1e-12))))
        if name == "instance_norm" and not given.get("use_input_stats", True):
            return y  # with running statistics it is linear as it is
        if name in ("layer_norm", "rms_norm"):
            axes: Any = tuple(range(-len(given["normalized_shape"]), 0))
            centred = x - x.mean(axes, keepdim=True) if name == "layer_norm" else x
        elif name in ("group_norm", "instance_norm"):
            batched = x.unflatten(1, (given["num_groups"] if name == "group_norm" else x.shape[1], -1))
            axes = tuple(range(2, batched.ndim))
            centred = (batched - batched.mean(axes, keepdim=True)).reshape(x.shape)
            weight = None if weight is None else weight.reshape(-1, *[1] * (x.ndim - 2))
        else:
            raise RuleError(
                f"FrozenScale does not know {name!r} at {operation.site}; it is for layer, RMS, group and instance norms."
            )
        fixed = operation.constant(centred)
        epsilon = given.get("eps")
        exact = fixed.to(torch.promote_types(x.dtype, torch.float32))
        if epsilon is None:
            epsilon = torch.finfo(exact.dtype).eps if name == "rms_norm" else 1e-5
        squares = exact.square()
        if name in ("group_norm", "instance_norm"):
            variance = squares.reshape(batched.shape).mean(axes, keepdim=True).expand(batched.shape).reshape(x.shape)
        else:
            variance = squares.mean(axes, keepdim=True)
        scale = operation.constant((variance + epsilon).rsqrt().to(x.dtype))
        moving = (centred - fixed) * scale
        return operation.constant(y) + (moving if weight is None else moving * weight)


_NAMES = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "normalize": ("input", "p", "dim", "eps"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
}
