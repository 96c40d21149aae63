"""Prompts: what the arguments of a language model say about padding, and the positions that go with it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ...core.functional import FunctionalModel


def accepted(f: Any) -> frozenset[str]:
    """The names of the arguments that a model takes; none for a plain function, which cannot be asked."""
    if not isinstance(f, FunctionalModel):
        return frozenset()
    return _parameters(f.base.blueprint.template.root) - frozenset(f.base.constants)


@torch.compiler.assume_constant_result
def _parameters(module: Any) -> frozenset[str]:
    return frozenset(inspect.signature(module.forward).parameters)


def mask_of(inputs: Any) -> Tensor | None:
    """Which tokens are no padding, a boolean Tensor [B, S]; None where nothing says so."""
    mask = inputs.get("attention_mask", None) if isinstance(inputs, (Mapping, TensorDictBase)) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def positions_of(mask: Tensor) -> Tensor:
    """The position of each token among those that are no padding, Tensor [B, S]; 0 for padding."""
    return torch.where(mask.bool(), mask.long().cumsum(-1) - 1, 0)


def with_position_ids(f: Any, inputs: Any) -> Any:
    """The inputs with the positions of tokens, where the model takes them and a mask says that there is padding.

    Without them, models with learned or rotary positions count the padding.
    """
    mask = mask_of(inputs)
    if mask is None or "position_ids" in inputs.keys() or "position_ids" not in accepted(f):
        return inputs
    if isinstance(inputs, TensorDictBase):
        return TensorDict({**inputs, "position_ids": positions_of(mask)}, batch_size=inputs.batch_size)
    return {**inputs, "position_ids": positions_of(mask)}
