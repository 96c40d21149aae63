"""Attention patterns, also where a fused kernel never forms them, and scores of what heads attend to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.checks import require_positive
from ...core.errors import InputError, SiteError
from ...core.functional import Execution, FunctionalModel
from ...core.reading import capture
from ...core.sites import Site
from ...core.structure import describe
from ..names import Names
from .stream import Calls, named


def _probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` multiplies the values with, dropout aside."""
    if key.ndim > 2 and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        rows, columns = (torch.arange(n, device=query.device) for n in scores.shape[-2:])
        attn_mask = columns <= rows[:, None]
    if attn_mask is None:
        return scores.softmax(-1)
    if attn_mask.dtype is not torch.bool:
        return (scores + attn_mask).softmax(-1)
    # A row that may attend to nothing, such as that of padding, attends to nothing.
    something = attn_mask.any(-1, keepdim=True)
    weights = scores.masked_fill(~attn_mask & something, float("-inf")).softmax(-1)
    return torch.where(something, weights, 0)


def attention_patterns(f: FunctionalModel, params: Any, inputs: Any, *, names: Names | None = None) -> Tensor:
    """Which positions each head attends to.

        pattern = softmax(scale q k^T + mask)

    Read where the model forms it, and computed from queries, keys and mask where it calls fused attention, in the same run.

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them, B examples.
        names: standard names; None to find them.

    Returns:
        Tensor [L, B, H, Q, K] over the L layers that have attention.

    Raises:
        SiteError: attention inside of `nn.MultiheadAttention`, which is one function of torch.

    Cost: one forward pass, and where attention is fused the product of queries and keys once more.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> f, params = tdhook.functionalize(GPT2LMHeadModel(config).eval(), use_cache=False)
        >>> patterns = attention_patterns(f, params, {"input_ids": torch.tensor([[1, 2, 3]])})
        >>> patterns.shape, torch.allclose(patterns.sum(-1), torch.ones(()))
        (torch.Size([2, 1, 2, 3, 3]), True)
    """
    found = named(f, params, inputs, names)
    formed = [site for site in found.pattern if site is not None]
    fused = [op for op, site in zip(found.attention_operation, found.pattern) if op is not None and site is None]
    for site in fused:
        if Site.parse(site).op != "scaled_dot_product_attention":
            raise SiteError(
                f"the attention of {site!r} is one function of torch, whose pattern cannot be computed from its inputs."
            )
    if not formed and not fused:
        raise SiteError("the model has no attention that names(...) found; print(names) says what there is.")
    mixing = Calls(fused, _probabilities)
    execution = Execution(observer=mixing) if fused else Execution()
    if formed:
        _, values = capture(f, formed)._run(params, inputs, (), execution)
    else:
        f._run(params, inputs, (), execution)
        values = {}
    for site in fused:
        if site not in mixing.found:
            raise SiteError(
                f"the model never ran {site!r}; give names that were found with this model and the same options of it "
                "(attention implementation, cache)."
            )
    chosen = []
    for op, pattern in zip(found.attention_operation, found.pattern):
        if op is not None:
            chosen.append(values[pattern] if pattern is not None else mixing.found[op])
    # [B * H, Q, K] where the model joins batch and heads, and [B, Q, K] where there is one head
    return torch.stack([each.unflatten(0, (-1, found.head_count)) if each.ndim == 3 else each for each in chosen])


def previous_token_scores(patterns: Tensor) -> Tensor:
    """How much of its attention each head gives to the position before, on average over positions.

    Args:
        patterns: Tensor [..., S, S], as `attention_patterns` returns them.

    Returns:
        Tensor [...]: 1 for a perfect previous-token head. The first position counts for nothing.

    Examples:
        >>> previous_token_scores(torch.eye(4).roll(-1, -1))
        tensor(1.)
    """
    return _offset_mean(patterns, 1, 1)


def induction_scores(patterns: Tensor, period: int) -> Tensor:
    """How much each head attends to what followed the present token the last time, on average over repeated positions.

        score = mean over q >= period of  pattern[q, q - period + 1]

    Args:
        patterns: Tensor [..., S, S] of inputs in which a random sequence of `period` tokens is repeated: token q is token
            q - period. `repeated_tokens` makes such; leave out a token in front of them (BOS) by `patterns[..., 1:, 1:]`.
        period: length of the sequence.

    Returns:
        Tensor [...]: 1 for a perfect induction head.

    Raises:
        InputError: fewer positions than one more than the period.

    Source: Olsson et al., "In-context Learning and Induction Heads" (2022).

    Examples:
        >>> pattern = torch.eye(6).roll(2, 0)  # position 3 attends to 1, 4 to 2, 5 to 3
        >>> induction_scores(pattern, 3)
        tensor(1.)
    """
    return _offset_mean(patterns, period - 1, period)


def duplicate_token_scores(patterns: Tensor, period: int) -> Tensor:
    """How much each head attends to the last occurrence of the present token; arguments as `induction_scores`.

    Examples:
        >>> duplicate_token_scores(torch.eye(6).roll(3, 0), 3)
        tensor(1.)
    """
    return _offset_mean(patterns, period, period)


def repeated_tokens(
    vocabulary: int, period: int, batch: int, *, repeats: int = 2, generator: torch.Generator | None = None
) -> Tensor:
    """Random tokens, the same sequence again and again: integer Tensor [batch, repeats * period].

    Examples:
        >>> ids = repeated_tokens(100, 4, 2)
        >>> ids.shape, torch.equal(ids[:, :4], ids[:, 4:])
        (torch.Size([2, 8]), True)
    """
    for name, value in {"vocabulary": vocabulary, "period": period, "batch": batch, "repeats": repeats}.items():
        require_positive(name, value)
    device = None if generator is None else generator.device
    return torch.randint(0, vocabulary, (batch, period), generator=generator, device=device).repeat(1, repeats)


def _offset_mean(patterns: Tensor, offset: int, first: int) -> Tensor:
    """The mean of `patterns[..., q, q - offset]` over the queries from `first` on."""
    if patterns.ndim < 2 or patterns.shape[-1] != patterns.shape[-2]:
        raise InputError(f"patterns is {describe(patterns)}; give attention within one sequence, [..., S, S].")
    if not isinstance(first, int) or first < 1 or patterns.shape[-1] <= first:
        raise InputError(
            f"the score starts at position {first!r}, but patterns has {patterns.shape[-1]} positions; give more of them, or a "
            "period that is shorter, and at least 1."
        )
    return patterns.diagonal(-offset, -2, -1)[..., first - offset :].mean(-1)
