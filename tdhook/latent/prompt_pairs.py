"""Prompt pairs: two inputs that differ in what is studied and match, position by position, in everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ..core.checks import flatten_as
from ..core.compat import visible
from ..core.errors import InputError
from ..core.structure import describe

MASK = "attention_mask"


def require_aligned(clean: Any, corrupted: Any) -> None:
    """Raises `InputError` unless two inputs have one structure, the same shapes and dtypes, and padding at the same places."""
    try:
        pairs = list(zip(flatten_as("clean", clean, clean), flatten_as("corrupted", corrupted, clean)))
        alike = all(isinstance(a, Tensor) == isinstance(b, Tensor) for a, b in pairs)
    except InputError:
        alike = False
    if not alike:
        raise InputError(
            f"clean is {describe(clean)} but corrupted is {describe(corrupted)}; give inputs of the same structure."
        )
    for a, b in pairs:
        if isinstance(a, Tensor) and (a.shape != b.shape or a.dtype != b.dtype):
            raise InputError(
                f"clean holds {describe(a)} but corrupted {describe(b)}; patching needs aligned inputs, token by token, so "
                "choose prompts of the same length."
            )
    here, there = mask_of(clean), mask_of(corrupted)
    if here is not None and there is not None and visible(here, there) and not torch.equal(here, there):
        example = int(torch.atleast_2d(here != there).flatten(1).any(1).nonzero()[0])
        raise InputError(
            f"clean and corrupted are padded at different places in example {example}; patching needs aligned inputs, token "
            "by token, so choose prompts of the same length."
        )


def mask_of(inputs: Any) -> Tensor | None:
    """Which tokens are no padding, bool Tensor [B, S]; None where the inputs do not say so."""
    mask = inputs[MASK] if isinstance(inputs, (Mapping, TensorDictBase)) and MASK in inputs.keys() else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def differing_positions(clean: Any, corrupted: Any) -> Tensor:
    """Where the prompts of pairs differ.

        differs[b, l] = clean[b, l] != corrupted[b, l]

    Args:
        clean: token ids, Tensor [B, L], or a mapping with them as `"input_ids"`.
        corrupted: of the same structure and shapes.

    Returns:
        bool Tensor [B, L]. In a causal model no patch before the first of these changes anything.

    Raises:
        InputError: inputs that do not align; a pair without a difference, of which no patch can say anything.

    Cost: no pass.

    Source: Heimersheim and Nanda, "How to use and interpret activation patching" (2024), on choosing pairs.

    Examples:
        >>> differing_positions(torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]]))
        tensor([[False,  True, False]])
    """
    require_aligned(clean, corrupted)
    first, second = _tokens("clean", clean), _tokens("corrupted", corrupted)
    differs = first != second
    alike = ~differs.any(1)
    if visible(alike) and alike.any():
        raise InputError(
            f"pair {int(alike.nonzero()[0])} has no difference; give a corrupted prompt that differs from the clean one."
        )
    return differs


def token_span(inputs: Any, tokens: Sequence[int] | Sequence[Sequence[int]], *, occurrence: int = -1) -> Tensor:
    """Where a sequence of tokens, such as the subject of a sentence, lies in each prompt.

    Args:
        inputs: token ids, Tensor [B, L], or a mapping with them as `"input_ids"`.
        tokens: the sequence; or one for each example.
        occurrence: which one, if there are several: 0 for the first, -1 for the last.

    Returns:
        bool Tensor [B, L], true at the tokens of the sequence.

    Raises:
        InputError: an example that does not hold the sequence (so often).

    Cost: no pass.

    Examples:
        >>> token_span(torch.tensor([[5, 6, 7, 8], [6, 7, 6, 7]]), [6, 7])
        tensor([[False,  True,  True, False],
                [False, False,  True,  True]])
    """
    ids = _tokens("inputs", inputs)
    if not isinstance(tokens, (Sequence, Tensor)):
        raise InputError(f"tokens is {describe(tokens)}; give a sequence of token ids, or one for each prompt.")
    given = [each.tolist() if isinstance(each, Tensor) else each for each in tokens]
    one = bool(given) and isinstance(given[0], int)
    spans: list[Any] = [given] * len(ids) if one else [list(span) for span in given]  # type: ignore[arg-type]
    if len(spans) != len(ids) or not all(spans):
        raise InputError(f"tokens has {len(spans)} sequences for {len(ids)} prompts; give one, or one for each, not empty.")
    found = torch.zeros_like(ids, dtype=torch.bool)
    for row, (line, span) in enumerate(zip(ids.tolist(), spans)):
        starts = [i for i in range(len(line) - len(span) + 1) if line[i : i + len(span)] == span]
        if not -len(starts) <= occurrence < len(starts):
            raise InputError(
                f"tokens={span} comes {len(starts)} times in example {row}, which is {line}; a word that begins a text often "
                "has other tokens than in the middle of one."
            )
        found[row, starts[occurrence] : starts[occurrence] + len(span)] = True
    return found


def _tokens(name: str, inputs: Any) -> Tensor:
    ids = inputs["input_ids"] if isinstance(inputs, (Mapping, TensorDictBase)) and "input_ids" in inputs.keys() else inputs
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise InputError(f"{name} is {describe(inputs)}; give token ids [B, L], or a mapping with them as 'input_ids'.")
    return ids
