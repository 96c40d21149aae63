"""Scores of words and spans, from those of their tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.groups import INTEGERS
from ..core.structure import describe

NEW_LINES = ("\n", "Ċ", "<0x0A>")


def aggregate_tokens(scores: Tensor, groups: Sequence[int] | Tensor, *, axis: int = -1, reduce: str = "sum") -> Tensor:
    """Merges the scores of sub-words into those of words, or of tokens into those of spans, along one axis.

        S_w = sum, mean, or the one of largest magnitude, of { s_i : groups_i = w }

    Args:
        scores: floating-point Tensor [*, N, *], such as [B, G, L].
        groups: N group ids from 0 to W - 1, as `word_groups` makes them. An id that is left out scores 0.
        axis: the axis of N: -1 for the source, -2 for the generated tokens (with the groups of those only). A sum over
            generated tokens explains the sum of their quantities: the log-probability of the word.
        reduce: `"sum"`, `"mean"`, or `"max_abs"`, which keeps the sign.

    Returns:
        Tensor [*, W, *].

    Raises:
        InputError: scores that are no floating-point tensor, groups of another length or not from 0 on, no such axis, an
            unknown reduction.

    Examples:
        >>> aggregate_tokens(torch.tensor([[1.0, -3.0, 5.0]]), [0, 0, 1])
        tensor([[-2.,  5.]])
        >>> aggregate_tokens(torch.tensor([[1.0, -3.0, 5.0]]), [0, 0, 1], reduce="max_abs")
        tensor([[-3.,  5.]])
    """
    if reduce not in ("sum", "mean", "max_abs"):
        raise InputError(f"reduce={reduce!r} is unknown; choose one of 'sum', 'mean', 'max_abs'.")
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise InputError(f"scores is {describe(scores)}; give a floating-point tensor.")
    if not isinstance(axis, int) or not -scores.ndim <= axis < scores.ndim:
        raise InputError(f"axis={axis!r} is out of range for scores of shape {list(scores.shape)}.")
    group_of = _group_ids(groups, scores.shape[axis])
    count = max(group_of) + 1
    index = torch.tensor(group_of, device=scores.device)
    moved = scores.movedim(axis, -1)
    if reduce == "max_abs":
        member = index == torch.arange(count, device=scores.device)[:, None]
        apart = torch.where(member, moved[..., None, :], torch.zeros_like(moved[..., None, :]))  # [*, W, N]
        merged = apart.gather(-1, apart.abs().argmax(-1, keepdim=True))[..., 0]
    else:
        merged = moved.new_zeros(*moved.shape[:-1], count).index_add(-1, index, moved)
        if reduce == "mean":
            sizes = [max(group_of.count(w), 1) for w in range(count)]
            merged = merged / torch.tensor(sizes, dtype=merged.dtype, device=merged.device)
    return merged.movedim(-1, axis)


def word_groups(tokens: Sequence[str]) -> list[int]:
    """Which word each token belongs to, by the signs that tokenizers leave in the text of tokens.

    Where some token begins with "##" (WordPiece), or none has a mark at all, "##" continues a word and all others begin one;
    if in doubt use the `word_ids()` of a fast tokenizer of transformers. Else a word begins with a
    space, "Ġ" (byte-level BPE) or "▁" (SentencePiece), after a line break, at the first token, and around a special token
    (`<s>`, `[CLS]`), which is a word of its own. A mark of punctuation without a space belongs to the word before it.

    Args:
        tokens: N texts, such as `tokenizer.convert_ids_to_tokens(ids)`.

    Returns:
        N group ids from 0 on, in order, for `aggregate_tokens`.

    Raises:
        InputError: no tokens, or something that is no text.

    Examples:
        >>> word_groups(["The", " un", "believ", "able", " cat"])
        [0, 1, 1, 1, 2]
        >>> word_groups(["[CLS]", "un", "##believ", "##able", "cat"])
        [0, 1, 1, 1, 2]
    """
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not tokens:
        raise InputError(f"tokens is {describe(tokens)}; give a list of the texts of tokens.")
    for token in tokens:
        if not isinstance(token, str):
            raise InputError(f"tokens holds {describe(token)}; give texts, as tokenizer.convert_ids_to_tokens(ids).")
    marked = any(token[:1].isspace() or token.startswith(("Ġ", "▁")) for token in tokens)
    pieces = not marked or any(token.startswith("##") for token in tokens)
    groups = [0]
    for before, token in pairwise(tokens):
        if pieces:
            begins = not token.startswith("##")
        else:
            begins = token[:1].isspace() or token.startswith(("Ġ", "▁", *NEW_LINES)) or before.endswith(NEW_LINES)
            begins = begins or _is_special(token) or _is_special(before)
        groups.append(groups[-1] + begins)
    return groups


def _is_special(token: str) -> bool:
    return re.fullmatch(r"<[^<>\s]+>|\[[A-Z]+\d*\]", token) is not None


def _group_ids(groups: Any, length: int) -> list[int]:
    if isinstance(groups, Tensor):
        if groups.dtype not in INTEGERS or groups.ndim != 1:
            raise InputError(f"groups is {describe(groups)}; give one integer for each token.")
        groups = groups.tolist()
    if not isinstance(groups, Sequence) or len(groups) != length:
        raise InputError(f"groups is {describe(groups)}; give one id for each of {length} tokens on this axis.")
    for group in groups:
        if not isinstance(group, int) or isinstance(group, bool) or group < 0:
            raise InputError(f"groups holds {describe(group)}; ids are integers from 0 on.")
    if not groups:
        raise InputError("groups is empty; scores has no token on this axis.")
    return list(groups)
