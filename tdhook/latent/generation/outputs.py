"""What a language model returns at a step: logits, a key-value cache, and what was captured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ...core import structure
from ...core.compat import visible
from ...core.errors import InputError
from ...core.structure import describe


def unwrapped(output: Any) -> tuple[Any, Any]:
    """The output of the model, and what `capture` read: a TensorDict, or the outermost first where captures are nested."""
    values = []
    while type(output) is tuple and len(output) == 2 and isinstance(output[1], TensorDictBase):
        values.append(output[1])
        output = output[0]
    return output, values[0] if len(values) == 1 else tuple(values) or None


def last_logits(output: Any, batch: int, key: int | str) -> Tensor:
    """The logits [B, V] that predict the next token, in float32 at least."""
    try:
        logits = output if isinstance(output, Tensor) else structure.get(output, key)
    except (LookupError, AttributeError):
        raise InputError(f"the output is {describe(output)}, which has no {key!r}; give key.") from None
    if not isinstance(logits, Tensor) or logits.ndim != 3 or len(logits) != batch or not logits.shape[1]:
        raise InputError(f"the logits are {describe(logits)} for {batch} prompts; a language model returns [B, S, V].")
    return logits[:, -1].to(torch.promote_types(logits.dtype, torch.float32))


def require_numbers(log: Tensor, done: Tensor, step: int) -> None:
    """Raises `InputError` where the logits of a prompt that still goes on are NaN: the token would be an arbitrary one."""
    if visible(log, done) and (wrong := (log.isnan() & ~done).nonzero()).numel():
        raise InputError(
            f"the logits of prompt {int(wrong[0])} at step {step} hold NaN; write smaller values, or run in a wider dtype."
        )


def cache_in(output: Any, cache: bool | None) -> Any:
    """The key-value cache that goes with the output, if there is one. Raises `InputError` where one was asked for."""
    past = output.get("past_key_values") if isinstance(output, Mapping) else getattr(output, "past_key_values", None)
    if past is None and cache:
        raise InputError(f"cache=True, but the output, {describe(output)}, has no past_key_values; give cache=False.")
    return past
