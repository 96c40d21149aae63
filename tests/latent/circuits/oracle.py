"""GPT-2, Llama and BERT written out in plain torch, each reader (query, key, value, MLP, logits) with a stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdhook.latent.circuits import EdgeGraph

Stream = Callable[[str], Tensor]


class Streams:
    """What was written so far, and what a reader sees of it.

    `ablation[u]` is what writer u writes instead where the edge from it has mask 1. With `differences` these are added in place
    of ablation minus written.
    """

    def __init__(self, graph: EdgeGraph, ablation: Tensor, mask: Tensor, differences: Tensor | None = None):
        self.graph, self.ablation, self.differences = graph, ablation, differences
        edges = [f"{writer} -> {reader}" for writer, reader in graph.edges]
        self.mask = dict(zip(edges, mask.unbind(-1)))
        self.written: dict[str, Tensor] = {}
        self.total: Tensor | float = 0.0

    def write(self, parts: dict[str, Tensor], rest: Tensor | float = 0.0) -> None:
        self.written.update(parts)
        self.total = self.total + sum(parts.values()) + rest

    def restart(self, writer: str, value: Tensor) -> None:
        """The stream starts anew with what a norm of it writes."""
        self.written, self.total = {}, 0.0
        self.write({writer: value})

    def seen(self, reader: str) -> Tensor:
        stream = self.total
        for writer, value in self.written.items():
            number = self.graph.writers.index(writer)
            move = self.ablation[number] - value if self.differences is None else self.differences[number]
            stream = stream + self.mask[f"{writer} -> {reader}"] * move
        return stream  # type: ignore[return-value]


def gpt2(net: nn.Module, ids: Tensor, streams: Streams, embedding: Tensor | None = None) -> Tensor:
    body: Any = net.transformer
    heads = net.config.n_head
    start = body.wte.weight[ids] + body.wpe.weight[: ids.shape[1]]
    streams.write({"embedding": start if embedding is None else embedding})
    for layer, block in enumerate(body.h):
        width = start.shape[-1]
        size = width // heads
        weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
        outs = {}
        for head in range(heads):
            part = {}
            for number, kind in enumerate(("query", "key", "value")):
                columns = slice(number * width + head * size, number * width + (head + 1) * size)
                part[kind] = block.ln_1(streams.seen(f"{kind} {layer}.{head}")) @ weight[:, columns] + bias[columns]
            z = attend(part["query"], part["key"], part["value"])
            outs[f"head {layer}.{head}"] = z @ block.attn.c_proj.weight[head * size : (head + 1) * size]
        streams.write(outs, block.attn.c_proj.bias)
        hidden = F.gelu(
            block.ln_2(streams.seen(f"mlp {layer}")) @ block.mlp.c_fc.weight + block.mlp.c_fc.bias, approximate="tanh"
        )
        streams.write({f"mlp {layer}": hidden @ block.mlp.c_proj.weight + block.mlp.c_proj.bias})
    return body.ln_f(streams.seen("logits")) @ body.wte.weight.T


def llama(net: nn.Module, ids: Tensor, streams: Streams, embedding: Tensor | None = None) -> Tensor:
    body, config = net.model, net.config
    start = body.embed_tokens.weight[ids]
    streams.write({"embedding": start if embedding is None else embedding})
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = start.shape[-1] // heads

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        single = x.float()  # as the library does
        return weight * (single / (single.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()).to(x.dtype)

    def rotated(x: Tensor) -> Tensor:
        frequency = 1 / 10000.0 ** (torch.arange(0, size, 2).float() / size)  # in single precision, as the library does
        angle = torch.arange(x.shape[-2])[:, None] * frequency
        cos, sin = (torch.cat([part, part], -1).to(x.dtype) for part in (angle.cos(), angle.sin()))
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    for layer, block in enumerate(body.layers):
        attention = block.self_attn

        def read(kind: str, matrix: nn.Module, number: int, layer: int = layer, block: Any = block) -> Tensor:
            stream = norm(streams.seen(f"{kind} {layer}.{number}"), block.input_layernorm.weight)
            return stream @ matrix.weight[number * size : (number + 1) * size].T

        outs = {}
        for head in range(heads):
            group = head // (heads // groups)
            query = rotated(read("query", attention.q_proj, head))
            key = rotated(read("key", attention.k_proj, group))
            z = attend(query, key, read("value", attention.v_proj, group))
            outs[f"head {layer}.{head}"] = z @ attention.o_proj.weight[:, head * size : (head + 1) * size].T
        streams.write(outs)
        stream = norm(streams.seen(f"mlp {layer}"), block.post_attention_layernorm.weight)
        hidden = F.silu(stream @ block.mlp.gate_proj.weight.T) * (stream @ block.mlp.up_proj.weight.T)
        streams.write({f"mlp {layer}": hidden @ block.mlp.down_proj.weight.T})
    return norm(streams.seen("logits"), body.norm.weight) @ net.lm_head.weight.T


def bert(net: nn.Module, ids: Tensor, streams: Streams, embedding: Tensor | None = None) -> Tensor:
    body, heads = net.bert, net.config.num_attention_heads
    start = body.embeddings(ids)
    streams.write({"embedding": start if embedding is None else embedding})
    size = start.shape[-1] // heads
    for layer, block in enumerate(body.encoder.layer):
        attention = block.attention
        outs = {}
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            part = {}
            for kind in ("query", "key", "value"):
                linear = getattr(attention.self, kind)
                part[kind] = streams.seen(f"{kind} {layer}.{head}") @ linear.weight[rows].T + linear.bias[rows]
            z = attend(part["query"], part["key"], part["value"], causal=False)
            outs[f"head {layer}.{head}"] = z @ attention.output.dense.weight[:, rows].T
        streams.write(outs, attention.output.dense.bias)
        norm = f"attention norm {layer}"
        streams.restart(norm, attention.output.LayerNorm(streams.seen(norm)))
        hidden = F.gelu(block.intermediate.dense(streams.seen(f"mlp {layer}")))
        streams.write({f"mlp {layer}": block.output.dense(hidden)})
        norm = f"mlp norm {layer}"
        streams.restart(norm, block.output.LayerNorm(streams.seen(norm)))
    return net.cls(streams.seen("logits"))


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool = True) -> Tensor:
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1) @ value


ORACLES = {"gpt2": gpt2, "llama": llama, "bert": bert}
