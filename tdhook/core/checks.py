"""Checks that several methods make of their arguments before anything is computed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase

from .errors import GradientError, InputError, TdhookWarning
from .functional import FunctionalModel
from .structure import describe


def require_gradients(method: str) -> None:
    """Raises `GradientError` where autograd is off: a gradient would be computed behind the caller's back, or be zero."""
    if not torch.is_grad_enabled():
        raise GradientError(
            f"{method} needs gradients, but grad mode is off; call it outside of torch.no_grad and inference_mode."
        )


def warn_if_stochastic(f: Any, method: str) -> None:
    """Warns when dropout or batch statistics make the model random or couple the examples of a batch."""
    modules = f.base.blueprint.stochastic if isinstance(f, FunctionalModel) else ()
    if modules:
        warnings.warn(
            f"{method}: the model is in train mode, where {modules[0]!r}"
            + (f" and {len(modules) - 1} more modules drop" if len(modules) > 1 else " drops")
            + " values or mix examples; call model.eval() before tdhook.functionalize(model).",
            TdhookWarning,
            stacklevel=3,
        )


def require_number(name: str, value: Any, least: float = 0.0, strict: bool = False) -> None:
    """Raises `InputError` unless `value` is a finite number of at least `least` (more than that, if `strict`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (value > least if strict else value >= least) or value == float("inf"):
        raise InputError(f"{name} is a number {'above' if strict else 'of at least'} {least:g}, got {describe(value)}.")


def flatten_as(name: str, value: Any, inputs: Any) -> list[Any]:
    """The leaves of `value` in the order of those of `inputs`, whose structure it has; its mappings may be in another order.

    Raises `InputError` for another structure. What stands for a whole tensor may be None or a number.
    """
    if isinstance(inputs, (Mapping, TensorDictBase)):
        if isinstance(value, (Mapping, TensorDictBase)) and set(value.keys()) == set(inputs.keys()):
            return [leaf for key in inputs.keys() for leaf in flatten_as(name, value[key], inputs[key])]
    elif isinstance(inputs, (tuple, list)):
        if isinstance(value, (tuple, list)) and len(value) == len(inputs):
            return [leaf for v, i in zip(value, inputs) for leaf in flatten_as(name, v, i)]
    else:
        return [value]
    raise InputError(f"{name} is {describe(value)}, which is not the structure of inputs, {describe(inputs)}.")


def require_positive(name: str, value: Any, least: int = 1, optional: bool = False) -> None:
    """Raises `InputError` unless `value` is an integer of at least `least` (or None where that is allowed)."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        allowed = f"an integer of at least {least}" + (" or None" if optional else "")
        raise InputError(f"{name} is {allowed}, got {describe(value)}.")
