"""Edge attribution patching of GPT-2 by heads, against the same by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

import tdhook
from tdhook.latent.circuits import eap, edge_graph

from .case import Case, Competitor, Goal, Options
from .gpt2 import SHAPES, gpt2, logit_difference, prompts
from .remote import Remote

TITLE = "Edge attribution patching of GPT-2"
INTRODUCTION = """\
The score of every edge between embedding, heads, MLPs and logits, where each head reads queries, keys and values
(Syed et al. 2023): two forward passes and one backward pass over a batch of prompt pairs of 15 tokens (random weights,
metric: a logit difference). `forward and backward hooks` is written for GPT-2 alone: it takes gradients at the fused
projection of each block and pulls them back through its columns and the norm by formula. The way of the published
implementations splits the stream into one copy for each head and reader, with the hook points of TransformerLens. The
graph of ours, which takes a run to find, is found once, outside of what is timed."""

LENGTH = 15
HOOKS, LENS = "forward and backward hooks", "TransformerLens 3.9.0, hooks"


def cases(options: Options) -> Iterator[Case]:
    for size, batch in [("shallow", 2)] if options.quick else [("small", 1), ("small", 8)]:
        yield Case(
            f"{size}, {batch} pair{'s' * (batch > 1)}",
            {"size": size, "pairs": batch, "tokens": LENGTH},
            partial(_competitors, size, batch, options),
            tolerance=1e-3,  # sums of many small products that cancel
            goals=(Goal("ours", HOOKS, 1.0), Goal("ours", LENS, 1.0)),
            memory=not options.quick,
            seconds=5 if options.quick else 60,
        )


def _competitors(size: str, batch: int, options: Options) -> list[Competitor]:
    model = gpt2(size, 0.1).requires_grad_(False)
    clean, corrupted = prompts(batch, LENGTH, 1)
    f, params = tdhook.functionalize(model, use_cache=False)
    graph = edge_graph(f, params)

    def ours() -> Tensor:
        return eap(f, params, clean, corrupted, lambda output: logit_difference(output.logits), graph=graph)

    layers = SHAPES[size]["n_layer"]
    found = [
        Competitor("ours", {f"{len(graph)} edges": ours}),
        Competitor(HOOKS, {"": lambda: _Hooks(model, layers).scores(clean, corrupted)}),
    ]
    if options.peers.exists():
        task = {"size": size, "batch": batch, "length": LENGTH, "differing": 1}
        parameters = {"method": "edge_attribution", "threads": options.threads, **task}
        found.append(Competitor(LENS, {"": Remote(options.peers, "on_transformer_lens.py", parameters)}))
    return found


class _Hooks:
    """What is written in the run, and the gradients where it is read."""

    def __init__(self, model: Any, layers: int):
        self.model, self.layers, self.heads = model, layers, model.config.n_head
        self.written: list[Tensor] = []
        self.norms: list[tuple[Any, Tensor]] = []  # in the order of the run
        self.gradients: list[Tensor] = []

    def scores(self, clean: Tensor, corrupted: Tensor) -> Tensor:
        """[E], reader by reader."""
        with torch.no_grad():
            self._run(corrupted, gradients=False)
        other, self.written, self.norms = self.written, [], []
        with torch.enable_grad():
            logit_difference(self._run(clean, gradients=True)).mean().backward()
        differences = torch.cat([a - b for a, b in zip(other, self.written)])
        # backwards: the end of the stream, then the MLP and the attention of each block
        last, *others = self.gradients
        found = [_products(differences, last[None])]
        for i in reversed(range(self.layers)):
            before = 1 + i * (self.heads + 1)
            mlp, attention = others.pop(0), others.pop(0)
            at_mlp, at_attention = self.norms.pop(), self.norms.pop()
            found.append(_products(differences[: before + self.heads], _through(at_mlp, mlp[None])))
            weight = rearrange(self.model.transformer.h[i].attn.c_attn.weight, "d (r h) -> r h d", r=3 * self.heads)
            split = rearrange(attention, "b s (r h) -> r b s h", r=3 * self.heads)
            read = torch.einsum("rbsh,rhd->rbsd", split, weight)
            found.append(_products(differences[:before], _through(at_attention, read)))
        return torch.cat(found[::-1])

    def _run(self, ids: Tensor, gradients: bool) -> Tensor:
        handles = [self.model.transformer.drop.register_forward_hook(partial(self._embedding, gradients))]
        for i, block in enumerate(self.model.transformer.h):
            handles += [
                block.ln_1.register_forward_pre_hook(self._norm),
                block.attn.c_proj.register_forward_pre_hook(self._attention),
                block.ln_2.register_forward_pre_hook(self._norm),
                block.mlp.register_forward_hook(self._mlp),
            ]
            if gradients:
                handles += [
                    block.attn.c_attn.register_forward_hook(self._gradient),
                    block.ln_2.register_forward_hook(self._gradient),
                ]
                if i == self.layers - 1:
                    handles.append(block.register_forward_hook(self._gradient))
        try:
            return self.model(ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()

    def _embedding(self, gradients: bool, module: Any, args: Any, output: Tensor) -> Tensor:
        self.written.append(output.detach()[None])
        return output.detach().requires_grad_(gradients)

    def _attention(self, module: Any, args: Any) -> None:
        heads = rearrange(args[0].detach(), "b s (n h) -> n b s h", n=self.heads)
        weight = rearrange(module.weight, "(n h) d -> n h d", n=self.heads)
        self.written.append(torch.einsum("nbsh,nhd->nbsd", heads, weight))

    def _mlp(self, module: Any, args: Any, output: Tensor) -> None:
        self.written.append(output.detach()[None])

    def _norm(self, module: Any, args: Any) -> None:
        self.norms.append((module, args[0].detach()))

    def _gradient(self, module: Any, args: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: self.gradients.append(gradient))


def _products(differences: Tensor, read: Tensor) -> Tensor:
    """[U, B, S, D] and [R, B, S, D] -> [R * U]"""
    return torch.einsum("ubsd,rbsd->ru", differences, read).flatten()


def _through(norm: tuple[Any, Tensor], gradient: Tensor) -> Tensor:
    """The pull-back of a layer norm at its input: [R, B, S, D] -> [R, B, S, D]."""
    module, x = norm
    deviation = (x.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt()
    normal = (x - x.mean(-1, keepdim=True)) / deviation
    g = gradient * module.weight
    return (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)) / deviation
