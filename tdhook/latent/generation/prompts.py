"""The prompt of a generation, and what the model is run on at each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ...core.compat import visible
from ...core.errors import InputError
from ...core.functional import FunctionalModel
from ...core.structure import describe
from ..steering.prompts import accepted, positions_of

LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length")


@dataclass(frozen=True)
class Prompt:
    """Token ids and what goes with them.

    Attributes:
        ids: Tensor [B, L].
        name: of the token ids among the arguments; None where they are the only one.
        mask: Tensor [B, L] and its name, or None.
        positions: Tensor [B, L], or None.
        types: token types, Tensor [B, L], or None.
        others: arguments that stay as they are.
        batch_size: of a TensorDict, where the model takes one.
    """

    ids: Tensor
    name: str | None
    mask: tuple[str, Tensor] | None
    positions: Tensor | None
    types: Tensor | None
    others: dict[str, Any]
    batch_size: torch.Size | None

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def inputs(self, tokens: Tensor, start: int, cache: Any) -> Any:
        """What the model is run on: the columns of the tokens from `start` on, after those that are in the cache."""
        if self.name is None:
            return tokens[:, start:]
        new = tokens.shape[1] - self.length
        named = {**self.others, self.name: tokens[:, start:]}
        if self.mask is not None:
            name, mask = self.mask
            named[name] = torch.cat([mask, torch.ones_like(mask[:, -1:]).expand(-1, new)], 1)
        if self.positions is not None:
            later = self.positions[:, -1:] + torch.arange(1, new + 1, device=self.positions.device)
            named["position_ids"] = torch.cat([self.positions, later], 1)[:, start:]
        if self.types is not None:  # a new token is of the type of the last one
            named["token_type_ids"] = torch.cat([self.types, self.types[:, -1:].expand(-1, new)], 1)[:, start:]
        if cache is not None:
            return {**named, "past_key_values": cache}
        return named if self.batch_size is None else TensorDict(named, batch_size=self.batch_size)


def read_prompt(f: Any, inputs: Any) -> Prompt:
    """The prompt in what the caller gives. Raises `InputError` for what is none."""
    takes = accepted(f)
    named: dict[str, Any] = {}
    if isinstance(inputs, (Mapping, TensorDictBase)):
        named = {str(name): value for name, value in inputs.items()}
        name: str | None = _name_of_tokens(named)
    elif takes & {"attention_mask", "position_ids", "past_key_values"} and "input_ids" in takes:
        name, named = "input_ids", {"input_ids": inputs}
    else:
        name, named = None, {"": inputs}
    ids = named.pop(name or "")
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.ndim != 2 or not ids.numel():
        raise InputError(f"{name or 'inputs'} is {describe(ids)}; give token ids, an integer tensor [B, L].")
    if "past_key_values" in named:
        raise InputError("inputs has 'past_key_values'; give the whole prompt, the cache is made from it.")
    prefix = "decoder_" if name == "decoder_input_ids" else ""
    takes = frozenset() if prefix else takes  # what goes with the tokens of the encoder stays as it is
    mask = _mask(named, f"{prefix}attention_mask", ids, takes)
    positions = _positions(named, ids, mask, takes)
    types = None if prefix else _of_tokens(named, "token_type_ids", ids)
    batch_size = inputs.batch_size[:1] if isinstance(inputs, TensorDictBase) else None
    return Prompt(ids.long(), name, mask, positions, types, named, batch_size)


def positions_of_model(f: Any) -> int | None:
    """How many positions the model was made for; None where it does not say."""
    config = getattr(f.base.blueprint.template.root, "config", None) if isinstance(f, FunctionalModel) else None
    found = [getattr(config, name, None) for name in LIMITS]
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def _name_of_tokens(named: Mapping[str, Any]) -> str:
    for name in ("decoder_input_ids", "input_ids"):
        if name in named:
            return name
    if len(named) == 1:
        return next(iter(named))
    raise InputError(f"inputs has {', '.join(map(repr, named)) or 'nothing'}; one of them has to be called 'input_ids'.")


def _mask(named: dict[str, Any], name: str, ids: Tensor, takes: frozenset[str]) -> tuple[str, Tensor] | None:
    mask = named.pop(name, None)
    if mask is None:
        # Given although it says nothing: without it some models look for several texts in one row, which vmap cannot do.
        return (name, torch.ones(ids.shape, dtype=torch.int64, device=ids.device)) if name in takes else None
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise InputError(f"{name} is {describe(mask)} for token ids of shape {list(ids.shape)}; give one of the same shape.")
    if visible(mask):
        if not mask[:, -1].bool().all():
            raise InputError(f"{name} masks the last token of a prompt; pad on the left, so that all prompts end together.")
        if (mask[:, 1:].long() < mask[:, :-1].long()).any():
            raise InputError(f"{name} has a gap; padding comes before the prompt, nowhere else.")
    return name, mask


def _positions(named: dict[str, Any], ids: Tensor, mask: tuple[str, Tensor] | None, takes: frozenset[str]) -> Tensor | None:
    given = _of_tokens(named, "position_ids", ids)
    if given is not None:
        return given
    return positions_of(mask[1]) if mask is not None and "position_ids" in takes else None


def _of_tokens(named: dict[str, Any], name: str, ids: Tensor) -> Tensor | None:
    """An argument with a number for each token, which goes on as the tokens do."""
    given = named.pop(name, None)
    if given is None or (isinstance(given, Tensor) and given.ndim == 2 and given.shape in (ids.shape, (1, ids.shape[1]))):
        return given
    raise InputError(f"{name} is {describe(given)} for token ids of shape {list(ids.shape)}; give [B, L].")
