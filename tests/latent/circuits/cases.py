"""What the tests of circuits share: prompt pairs of tiny transformers, and a model whose edges can be worked out by hand."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tdhook
from tdhook.latent.circuits import EdgeGraph, Reader, Writer, edge_graph, writer_values

from ..families import model, named
from .oracle import ORACLES, Streams


class Case(NamedTuple):
    f: Any
    params: Any
    clean: Any
    corrupted: Any
    graph: EdgeGraph
    values: Tensor
    name: str

    @property
    def ends(self) -> tuple[Any, Any, Any, Any]:
        return self.f, self.params, self.clean, self.corrupted

    def oracle(self, mask: Tensor, values: Tensor | None = None, **options: Any) -> Tensor:
        streams = Streams(self.graph, self.values if values is None else values, mask, options.pop("differences", None))
        return ORACLES[self.name](model(self.name), self.clean["input_ids"], streams, **options)


@cache
def case(name: str, heads: bool = True) -> Case:
    f, params, clean, found = named(name)
    clean = {"input_ids": clean["input_ids"]}
    corrupted = {"input_ids": (clean["input_ids"] * 7 + 3) % 50}
    graph = edge_graph(f, params, clean, names=found, heads=heads)
    return Case(f, params, clean, corrupted, graph, writer_values(f, params, corrupted, graph), name)


def difference(output: Any) -> Tensor:
    """Logit 3 minus logit 5 at the last position, for each example."""
    logits = output if isinstance(output, Tensor) else output.logits
    return logits[:, -1, 3] - logits[:, -1, 5]


class Block(nn.Module):
    """A block of a transformer with a norm that is given."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm, self.qkv, self.out = norm, nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm_2, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (6, 4)).transpose(1, 2).chunk(3, 1)
        x = x + self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(self.norm_2(x)).relu())

    def project(self, x: Tensor) -> Tensor:
        return self.qkv(self.norm(x))


class MicroBlock(nn.Module):
    """Two heads that multiply what they read by [1, 2] and [3, 4], as in the tests of auto-circuit."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Identity(), nn.Identity()
        self.weights = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.read(torch.stack([x, x], 2)) * self.weights).sum(2)


class MicroModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input, self.output = nn.Identity(), nn.Identity()
        self.blocks = nn.ModuleList([MicroBlock(), MicroBlock()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        for block in self.blocks:
            x = x + block(x)
        return self.output(x)


def micro() -> tuple[Any, Any, EdgeGraph]:
    f, params = tdhook.functionalize(MicroModel())
    nodes: list[Any] = [Writer("in", "input")]
    for layer in range(2):
        at = f"blocks.{layer}"
        nodes += [Reader(f"in {layer}.{h}", f"{at}.read", axis=2, index=h, feeds=(f"{layer}.{h}",)) for h in range(2)]
        nodes += [Writer(f"{layer}.{h}", f"{at}.write", axis=2, index=h) for h in range(2)]
    nodes.append(Reader("out", "output:in"))
    return f, params, EdgeGraph.of(nodes)
