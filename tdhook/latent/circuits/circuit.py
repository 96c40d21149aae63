"""Circuits: subsets of the edges of a graph."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.checks import require_positive
from ...core.errors import InputError
from ...core.structure import describe
from .graph import Edge, EdgeGraph

METHODS = ("top", "greedy")


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Some edges of a graph; all others are ablated when the circuit runs.

    To keep one in a file write `edges`, plain pairs of names: `Circuit.of(graph, json.load(file))`.

    Attributes:
        graph: of which it is a part.
        kept: bool Tensor [E], which edges belong to it.
    """

    graph: EdgeGraph
    kept: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.graph, EdgeGraph):
            raise InputError(
                f"graph is {describe(self.graph)}; give what edge_graph(f, params) or EdgeGraph.of(nodes) returned."
            )
        self.graph.require_edges("kept", self.kept)
        if self.kept.dtype is not torch.bool or self.kept.ndim != 1:
            raise InputError(f"kept is {describe(self.kept)}; give a bool tensor [{len(self.graph)}].")

    @classmethod
    def of(cls, graph: EdgeGraph, edges: Iterable[Edge]) -> Circuit:
        """The circuit of edges given as (writer, reader). Raises `InputError` for nodes that the graph does not have.

        Examples:
            >>> from tdhook.latent.circuits import EdgeGraph, Reader, Writer
            >>> nodes = [Writer("x", "0"), Reader("a in", "1:in", feeds=("a",)), Writer("a", "1"), Reader("y", "2:in")]
            >>> graph = EdgeGraph.of(nodes)
            >>> Circuit.of(graph, [("x", "a in"), ("a", "y")])
            Circuit(2 of 3 edges)
        """
        kept = torch.zeros(len(graph), dtype=torch.bool)
        kept[graph.index(edges)] = True
        return cls(graph, kept)

    @classmethod
    def of_nodes(cls, graph: EdgeGraph, nodes: Iterable[str]) -> Circuit:
        """The circuit of whole nodes: all edges that leave these writers. To run it is to ablate all other writers.

        Raises `InputError` for nodes that the graph does not have.

        Examples:
            >>> from tdhook.latent.circuits import EdgeGraph, Reader, Writer
            >>> nodes = [Writer("x", "0"), Reader("a in", "1:in", feeds=("a",)), Writer("a", "1"), Reader("y", "2:in")]
            >>> Circuit.of_nodes(EdgeGraph.of(nodes), ["x"]).edges
            (('x', 'a in'), ('x', 'y'))
        """
        kept = torch.zeros(len(graph), dtype=torch.bool)
        for node in nodes:
            kept[graph.of_writer(node)] = True
        return cls(graph, kept)

    def __len__(self) -> int:
        return int(self.kept.sum())

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Its edges as (writer, reader)."""
        return tuple(self.graph.edge(number) for number in self.kept.nonzero()[:, 0].tolist())

    @property
    def nodes(self) -> tuple[str, ...]:
        """The writers that it uses, in the order of the graph."""
        used = {writer for writer, _ in self.edges}
        return tuple(writer for writer in self.graph.writers if writer in used)

    @property
    def complement(self) -> Circuit:
        """All other edges."""
        return Circuit(self.graph, ~self.kept)

    def mask(self, dtype: torch.dtype | None = None) -> Tensor:
        """For `mask_edges`: Tensor [E], 0 at its edges and 1 at all others."""
        return (~self.kept).to(torch.get_default_dtype() if dtype is None else dtype)

    def pruned(self) -> Circuit:
        """Without the edges that lie on no path from a source to an output.

        A source is a writer that no reader feeds (the embedding), an output a reader that feeds no writer (the logits). With
        the activations of corrupted inputs as ablation that changes nothing of what the circuit computes: a node of which
        everything is ablated writes its ablation. With other ablations it may.
        """
        graph = self.graph
        fed = {writer for writers in graph.feeds for writer in writers}
        alive = torch.tensor([writer not in fed for writer in range(len(graph.writers))])
        useful = torch.zeros(len(graph.writers), dtype=torch.bool)
        kept = self.kept.cpu().clone()
        rows = [slice(start, start + len(reads)) for start, reads in zip(graph.starts, graph.reads)]
        sources = [slice(reads.start, reads.stop) for reads in graph.reads]
        for row, source, feeds in zip(rows, sources, graph.feeds):
            kept[row] &= alive[source]
            if kept[row].any():
                alive[list(feeds)] = True
        for row, source, feeds in reversed(list(zip(rows, sources, graph.feeds))):
            if feeds and not useful[list(feeds)].any():
                kept[row] = False
            useful[source] |= kept[row]
        return Circuit(graph, kept.to(self.kept.device))

    def __repr__(self) -> str:
        return f"Circuit({len(self)} of {len(self.graph)} edges)"

    def __str__(self) -> str:
        return "\n".join([repr(self), *(f"{writer} -> {reader}" for writer, reader in self.edges)])


def top_edges(
    graph: EdgeGraph, scores: Tensor, count: int, *, method: str = "top", absolute: bool = True, prune: bool = True
) -> Circuit:
    """The circuit of the edges with the highest scores.

    Args:
        graph: writers and readers.
        scores: Tensor [E], as from `eap`.
        count: how many edges, at most.
        method: `"top"`, the highest of all; `"greedy"`: starting from the outputs, again and again the highest of those that
            lead to what is in the circuit already, so that nothing dangles on the side of the outputs.
        absolute: whether the size of a score counts and not its sign; False takes the largest scores (give `-scores` for the
            edges that a metric needs).
        prune: whether edges on no path from a source to an output are left out, which can leave fewer than `count`.

    Returns:
        `Circuit`.

    Raises:
        InputError: scores of another shape, a negative count, an unknown method.

    Cost: no pass.

    Source: Syed et al. (2023) for `"top"`; Hanna et al. (2024) for `"greedy"`.

    Examples:
        >>> from tdhook.latent.circuits import EdgeGraph, Reader, Writer
        >>> nodes = [Writer("x", "0"), Reader("a in", "1:in", feeds=("a",)), Writer("a", "1"), Reader("y", "2:in")]
        >>> graph = EdgeGraph.of(nodes)
        >>> top_edges(graph, torch.tensor([3.0, -1.0, 2.0]), 2).edges
        (('x', 'a in'), ('a', 'y'))
    """
    graph.require_scores(scores)
    require_positive("count", count, least=0)
    if method not in METHODS:
        raise InputError(f"method={method!r} is unknown; choose from {', '.join(METHODS)}.")
    scores = scores.detach().abs() if absolute else scores.detach()
    if method == "top":
        chosen = scores.topk(min(count, len(graph))).indices
    else:
        chosen = torch.tensor(_greedy(graph, scores, count), dtype=torch.long, device=scores.device)
    kept = torch.zeros(len(graph), dtype=torch.bool, device=scores.device)
    kept[chosen] = True
    circuit = Circuit(graph, kept)
    return circuit.pruned() if prune else circuit


def _greedy(graph: EdgeGraph, scores: Tensor, count: int) -> list[int]:
    numbers = scores.tolist()
    feeders: dict[int, list[int]] = {}
    for reader, feeds in enumerate(graph.feeds):
        for writer in feeds:
            feeders.setdefault(writer, []).append(reader)
    heap: list[tuple[float, int, int]] = []
    opened: set[int] = set()

    def open_reader(reader: int) -> None:
        if reader not in opened:
            opened.add(reader)
            for number, writer in enumerate(graph.reads[reader], start=graph.starts[reader]):
                heapq.heappush(heap, (-numbers[number], number, writer))

    for reader, feeds in enumerate(graph.feeds):
        if not feeds:
            open_reader(reader)
    chosen: list[int] = []
    while heap and len(chosen) < count:
        _, number, writer = heapq.heappop(heap)
        chosen.append(number)
        for reader in feeders.get(writer, ()):
            open_reader(reader)
    return chosen


def edge_overlap(first: Tensor, second: Tensor, count: int, *, absolute: bool = True) -> float:
    """The share of the `count` highest edges that two scores [E] have in common: 1 for the same edges.

    Examples:
        >>> edge_overlap(torch.tensor([3.0, -2.0, 1.0]), torch.tensor([2.0, 0.0, 5.0]), 2)
        0.5
    """
    require_positive("count", count)
    if first.shape != second.shape or first.ndim != 1 or count > len(first):
        raise InputError(
            f"the scores are {describe(first)} and {describe(second)} for count={count}; give two tensors "
            "[E] with E of at least count."
        )
    tops = [set((scores.abs() if absolute else scores).topk(count).indices.tolist()) for scores in (first, second)]
    return len(tops[0] & tops[1]) / count
