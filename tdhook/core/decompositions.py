"""Fused operations written out, so that rules reach their parts: multi-head attention, recurrent layers, gated units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import RuleError


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Three projections, scores, softmax, the weighted sum and the projection back; [L, B, D] or [L, D]."""
    if any(given is not None for given in (bias_k, bias_v, static_k, static_v)) or add_zero_attn:
        raise RuleError("rules cannot be given to multi-head attention with bias_k, bias_v, add_zero_attn or static keys.")
    if training and dropout_p > 0:
        raise RuleError("rules cannot be given to multi-head attention that drops values; call model.eval() first.")
    batched = query.dim() == 3
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if use_separate_proj_weight:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        weights = in_proj_weight.chunk(3)  # type: ignore[union-attr]
    biases: Any = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (_heads(F.linear(x, w, b), num_heads) for x, w, b in zip((query, key, value), weights, biases))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, L, S]
    for mask in _masks(attn_mask, key_padding_mask, scores):
        scores = scores.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    pattern = scores.softmax(-1)
    mixed = pattern @ v  # [B, H, L, D / H]
    output = F.linear(mixed.permute(2, 0, 1, 3).flatten(-2), out_proj_weight, out_proj_bias)
    shown = pattern.mean(1) if average_attn_weights else pattern
    if not batched:
        output, shown = output.squeeze(1), shown.squeeze(0)
    return output, shown if need_weights else None


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, x.shape[-1] // count)).permute(1, 2, 0, 3)  # [L, B, D] -> [B, H, L, D / H]


def _masks(attn_mask: Tensor | None, padding: Tensor | None, scores: Tensor) -> list[Tensor]:
    masks = []
    if attn_mask is not None:
        per_head = attn_mask.dim() == 3
        masks.append(attn_mask.unflatten(0, scores.shape[:2]) if per_head else attn_mask)
    if padding is not None:
        masks.append(padding[:, None, None])
    return masks


def _gates(x: Tensor, h: Tensor, weights: tuple) -> Tensor:
    w_x, w_h, *biases = weights
    b_x, b_h = biases if biases else (None, None)
    return F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)


def _lstm_cell(x: Tensor, state: tuple[Tensor, ...], weights: tuple) -> tuple[Tensor, ...]:
    i, f, g, o = _gates(x, state[0], weights).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_cell(x: Tensor, state: tuple[Tensor, ...], weights: tuple) -> tuple[Tensor, ...]:
    w_x, w_h, *biases = weights
    b_x, b_h = biases if biases else (None, None)
    r, z, n = F.linear(x, w_x, b_x).chunk(3, -1)
    r_h, z_h, n_h = F.linear(state[0], w_h, b_h).chunk(3, -1)
    update = torch.sigmoid(z + z_h)
    new = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
    return ((1 - update) * new + update * state[0],)


def _simple_cell(activation: Callable[[Tensor], Tensor]) -> Callable:
    return lambda x, state, weights: (activation(_gates(x, state[0], weights)),)


def _recurrent(cell: Callable) -> Callable:
    def run(
        x: Tensor,
        state: Any,
        weights: Any,
        bias: Any,
        layers: int,
        dropout: float,
        training: bool,
        bidirectional: bool,
        batch_first: bool = False,
    ) -> tuple[Tensor, ...]:
        if isinstance(weights, Tensor):
            raise RuleError("rules cannot be given to a recurrent layer on a packed sequence; pass padded tensors.")
        if training and dropout > 0 and layers > 1:
            raise RuleError("rules cannot be given to a recurrent layer that drops values; call model.eval() first.")
        states = tuple(state) if isinstance(state, (tuple, list)) else (state,)
        directions = 2 if bidirectional else 1
        each = len(weights) // (layers * directions)
        steps = x.transpose(0, 1) if batch_first and x.dim() == 3 else x
        last: list[tuple[Tensor, ...]] = []
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                number = layer * directions + direction
                own = tuple(weights[number * each : (number + 1) * each])
                if each not in (2, 4):
                    raise RuleError("rules cannot be given to an LSTM with a projection (proj_size).")
                h = tuple(s[number] for s in states)
                sequence = []
                for step in steps.unbind(0)[:: -1 if direction else 1]:
                    h = cell(step, h, own)
                    sequence.append(h[0])
                outputs.append(torch.stack(sequence[:: -1 if direction else 1]))
                last.append(h)
            steps = torch.cat(outputs, -1) if directions == 2 else outputs[0]
        result = steps.transpose(0, 1) if batch_first and x.dim() == 3 else steps
        return (result, *(torch.stack(parts) for parts in zip(*last)))

    return run


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """A product with a sigmoid."""
    kept, gate = x.chunk(2, dim)
    return kept * torch.sigmoid(gate)


DECOMPOSITIONS: Mapping[str, Callable] = {
    "glu": glu,
    "multi_head_attention_forward": multi_head_attention_forward,
    "lstm": _recurrent(_lstm_cell),
    "gru": _recurrent(_gru_cell),
    "rnn_tanh": _recurrent(_simple_cell(torch.tanh)),
    "rnn_relu": _recurrent(_simple_cell(torch.relu)),
}
