"""Prompts: what the arguments of a language model say about padding, and the positions that go with it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ...core.functional import FunctionalModel
from ..prompt_pairs import mask_of


def accepted(f: Any) -> frozenset[str]:
    """The names of the arguments that a model takes; none for a plain function, which cannot be asked."""
    if not isinstance(f, FunctionalModel):
        return frozenset()
    return _parameters(f.base.blueprint.template.root) - frozenset(f.base.constants)


@torch.compiler.assume_constant_result
def _parameters(module: Any) -> frozenset[str]:
    return frozenset(inspect.signature(module.forward).parameters)


@torch.compiler.assume_constant_result
def _counts_by_itself(module: Any) -> bool:
    """Whether the model finds the positions in the token ids (RoBERTa and its kin, which begin at 2): it knows better."""
    return any(hasattr(part, "create_position_ids_from_inputs_embeds") for part in module.modules())


def without_first(mask: Tensor | None, value: Tensor, skip: int) -> Tensor | None:
    """A mask of the positions of a value [B, P, ...], less the first `skip` of each example that it leaves."""
    if not skip or value.ndim < 2:
        return mask
    if mask is None:
        mask = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
    return mask & (mask.long().cumsum(1) > skip)


def positions_of(mask: Tensor) -> Tensor:
    """The position of each token among those that are no padding, Tensor [B, S]; 0 for padding."""
    return torch.where(mask.bool(), mask.long().cumsum(-1) - 1, 0)


def with_position_ids(f: Any, inputs: Any) -> Any:
    """The inputs with the positions of tokens, where the model takes them and a mask says what is padding.

    Without them, models with learned or rotary positions count the padding.
    """
    mask = mask_of(inputs)
    if mask is None or "position_ids" in inputs.keys() or "position_ids" not in accepted(f):
        return inputs
    if _counts_by_itself(f.base.blueprint.template.root):
        return inputs
    if isinstance(inputs, TensorDictBase):
        return TensorDict({**inputs, "position_ids": positions_of(mask)}, batch_size=inputs.batch_size)
    return {**inputs, "position_ids": positions_of(mask)}
