"""Forward-mode derivatives of models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.func import jvp


def push_forward(function: Callable, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    """The value of a function and its derivative along tangents: `torch.func.jvp`, also through fused attention.

    The fused kernels have no forward-mode derivative, so attention runs in its plain form, equal up to rounding.
    """
    with plain_attention():
        value, tangent, *_ = jvp(function, primals, tangents)
    return value, tangent


def plain_attention() -> AbstractContextManager:
    """Attention in its plain form, which has every derivative and a batching rule."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch < 2.3
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)
