"""Operation sites: every torch function that a module calls itself, seen through a `TorchFunctionMode`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .scope import Frame

_REFLECTED = {"rsub": "rsub", "rdiv": "rdiv", "rtruediv": "rdiv", "rmatmul": "rmatmul", "rpow": "rpow"}
_RENAMED = {"truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub"}
_COMMUTING = {"radd": "add", "rmul": "mul", "rand": "and", "ror": "or", "rxor": "xor"}


@torch.compiler.assume_constant_result
def operation_name(function: Callable) -> str:
    """One name for all spellings of an operation: `x + y`, `x += y`, `torch.add` and `Tensor.add_` are all `add`.

    Examples:
        >>> operation_name(torch.Tensor.__iadd__), operation_name(torch.relu_), operation_name(torch.Tensor.__getitem__)
        ('add', 'relu', 'getitem')
    """
    name = getattr(function, "__name__", type(function).__name__)
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name.startswith("i") and hasattr(Tensor, f"__{name[1:]}__"):
            name = name[1:]
        name = _COMMUTING.get(name, _REFLECTED.get(name, name))
    elif name.endswith("_") and not name.startswith("_"):
        name = name[:-1]
    return _RENAMED.get(name, name)


@torch.compiler.assume_constant_result
def is_in_place(function: Callable) -> bool:
    """Whether an operation overwrites its first argument and returns it.

    Examples:
        >>> is_in_place(torch.Tensor.__iadd__), is_in_place(torch.relu_), is_in_place(torch.Tensor.__invert__)
        (True, True, False)
    """
    name = getattr(function, "__name__", "")
    augmented = name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}")
    return augmented or (name.endswith("_") and not name.endswith("__"))


class OperationMode(TorchFunctionMode):
    """Reports each torch function to the frame. Entered only when a transform asks for operations: it costs per call."""

    def __init__(self, frame: Frame):
        super().__init__()
        self.frame = frame

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        if name == "get" or self.frame.paused:  # "get": attribute access such as x.shape
            return func(*args, **kwargs)
        in_place = is_in_place(func) or bool(kwargs.get("inplace"))
        return self.frame.call_operation(name, func, in_place, args, kwargs)
