"""The graph of a residual stream: who writes to it, who reads from it, and the edges between them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...core.checks import require_positive
from ...core.errors import InputError, did_you_mean
from ...core.structure import describe
from .parts import ReaderGroup, WriterGroup

Edge = tuple[str, str]


@dataclass(frozen=True)
class Writer:
    """A node that adds to the residual stream, given by hand.

    Attributes:
        name: of the node.
        site: address of what it adds, a tensor of the shape of the stream.
        axis: where several writers lie side by side in one value: the axis that they lie along; None for the whole value.
        index: which of them; below 0 from the end.
        restarts: whether the stream starts anew with it (the output of a norm that the stream goes through), so that readers
            after it read no writer before it.
    """

    name: str
    site: str
    axis: int | None = None
    index: int = 0
    restarts: bool = False


@dataclass(frozen=True)
class Reader:
    """A place where a node reads the residual stream, given by hand.

    Attributes:
        name: of the place.
        site: address of the stream as only this reader sees it, such as the input of a norm.
        axis, index: as for `Writer`, where each reader has a copy of the stream.
        feeds: names of the writers that depend on it.
    """

    name: str
    site: str
    axis: int | None = None
    index: int = 0
    feeds: tuple[str, ...] = ()


Part = WriterGroup | ReaderGroup


@dataclass(frozen=True, repr=False)
class EdgeGraph:
    """Writers and readers of a residual stream in the order of the run. Immutable; prints as a table.

    There is an edge from each writer to each reader that comes after it, up to where the stream starts anew. Edges are numbered
    reader by reader: those of one reader are next to each other, in the order of the writers.

    Attributes:
        parts: writers and readers that share a site, in the order of the run.
        writers: names of the U writers.
        readers: names of the R readers.
        reads: for each reader the numbers of the writers that it reads, a range.
        starts: for each reader the number of its first edge.
        feeds: for each reader the numbers of the writers that depend on it.
    """

    parts: tuple[Part, ...]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    reads: tuple[range, ...]
    starts: tuple[int, ...]
    feeds: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, nodes: Sequence[Writer | Reader]) -> EdgeGraph:
        """A graph given by hand: writers and readers in the order of the run, each reader before what it feeds.

        Raises `InputError` for a node that is neither, a name that is taken, two readers of one copy of the stream, a reader
        that feeds an unknown or an earlier writer, and a graph without an edge.

        Examples:
            >>> nodes = [Writer("x", "0"), Reader("a in", "1:in", feeds=("a",)), Writer("a", "1"), Reader("y", "2:in")]
            >>> graph = EdgeGraph.of(nodes)
            >>> graph.edges
            (('x', 'a in'), ('x', 'y'), ('a', 'y'))
        """
        parts: list[Part] = []
        for node in nodes:
            if isinstance(node, Writer):
                parts.append(WriterGroup(node.site, (node.name,), axis=node.axis, index=node.index, restarts=node.restarts))
            elif isinstance(node, Reader):
                feeds = (node.feeds,) if isinstance(node.feeds, str) else tuple(node.feeds)
                parts.append(ReaderGroup(node.site, (node.name,), (feeds,), axis=node.axis, index=node.index))
            else:
                raise InputError(f"nodes holds {describe(node)}; give Writer(name, site) and Reader(name, site).")
        return cls.from_parts(parts)

    @classmethod
    def from_parts(cls, parts: Iterable[Part]) -> EdgeGraph:
        """The graph of parts in the order of the run."""
        parts = tuple(parts)
        writers: dict[str, int] = {}
        readers: dict[str, int] = {}
        reads: list[range] = []
        first = 0
        taken: dict[tuple[str, str], list[tuple[int | None, int]]] = {}
        for part in parts:
            _require_own_place(part, taken)
            if isinstance(part, WriterGroup) and part.restarts:
                first = len(writers)
            table = writers if isinstance(part, WriterGroup) else readers
            for name in part.names:
                if name in table:
                    raise InputError(f"two {'writers' if table is writers else 'readers'} are called {name!r}.")
                table[name] = len(table)
                if isinstance(part, ReaderGroup):
                    reads.append(range(first, len(writers)))
        feeds = []
        for group in parts:
            for name, fed in zip(group.names, group.feeds if isinstance(group, ReaderGroup) else ()):
                for writer in fed:
                    if writer not in writers or writers[writer] < reads[readers[name]].stop:
                        raise InputError(
                            f"reader {name!r} feeds {writer!r}, which is no writer that comes after it."
                            + did_you_mean(writer, writers)
                        )
                feeds.append(tuple(writers[writer] for writer in fed))
        starts = tuple(accumulate(map(len, reads), initial=0))
        if not starts[-1]:
            raise InputError("the graph has no edge; list nodes in the order of the run, a writer before each reader.")
        return cls(parts, tuple(writers), tuple(readers), tuple(reads), starts[:-1], tuple(feeds))

    def __len__(self) -> int:
        """E, the number of edges."""
        return self.starts[-1] + len(self.reads[-1])

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All edges as (writer, reader), in their order."""
        return tuple((self.writers[w], reader) for reader, reads in zip(self.readers, self.reads) for w in reads)

    def edge(self, number: int) -> Edge:
        """The (writer, reader) of an edge."""
        if not 0 <= number < len(self):
            raise InputError(f"edge {number} is out of range; the graph has {len(self)} edges.")
        reader = bisect_right(self.starts, number) - 1
        return self.writers[self.reads[reader][number - self.starts[reader]]], self.readers[reader]

    def index(self, edges: Iterable[Edge]) -> Tensor:
        """The numbers of edges given as (writer, reader): integer Tensor [K].

        Raises `InputError` for a node that the graph does not have, and for a pair without an edge.
        """
        return torch.tensor(self.numbers(edges), dtype=torch.long)

    def numbers(self, edges: Iterable[Edge]) -> list[int]:
        """As `index`, as a list."""
        writers, readers = _numbered(self.writers), _numbered(self.readers)
        found = []
        for edge in edges:
            if not isinstance(edge, (tuple, list)) or len(edge) != 2:
                raise InputError(f"an edge is a pair (writer, reader) of names, got {describe(edge)}.")
            writer, reader = _number("writer", edge[0], writers), _number("reader", edge[1], readers)
            reads = self.reads[reader]
            if writer not in reads:
                reason = "the writer comes after the reader" if writer >= reads.stop else "the stream starts anew between them"
                raise InputError(f"there is no edge {edge[0]!r} -> {edge[1]!r}: {reason}.")
            found.append(self.starts[reader] + reads.index(writer))
        return found

    def of_writer(self, writer: str) -> Tensor:
        """The numbers of all edges that leave a writer."""
        number = _number("writer", writer, _numbered(self.writers))
        edges = [start + reads.index(number) for start, reads in zip(self.starts, self.reads) if number in reads]
        return torch.tensor(edges, dtype=torch.long)

    def of_reader(self, reader: str) -> Tensor:
        """The numbers of all edges that enter a reader."""
        number = _number("reader", reader, _numbered(self.readers))
        return torch.arange(len(self.reads[number])) + self.starts[number]

    def writer_scores(self, scores: Tensor) -> Tensor:
        """The sum over the edges that leave each writer: [..., E] gives [..., U]."""
        self.require_edges("scores", scores)
        total = [scores.new_zeros(*scores.shape[:-1], len(self.writers))]
        for start, reads in zip(self.starts, self.reads):
            part = scores[..., start : start + len(reads)]
            total.append(torch.nn.functional.pad(part, (reads.start, len(self.writers) - reads.stop)))
        return torch.stack(total).sum(0)

    def table(self, scores: Tensor, count: int = 10) -> str:
        """The edges with the largest |score| of [E], largest first, one a line."""
        self.require_scores(scores)
        require_positive("count", count)
        rows = [
            (f"{w} -> {r}", float(scores[i]))
            for i in scores.abs().topk(min(count, len(self))).indices.tolist()
            for w, r in [self.edge(i)]
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {score:+.4g}" for name, score in rows)

    def require_edges(self, name: str, value: Any) -> None:
        """Raises `InputError` unless a tensor has one entry for each edge along its last axis."""
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[-1] != len(self):
            raise InputError(f"{name} is {describe(value)}; give a tensor [..., {len(self)}], one entry for each edge.")

    def require_scores(self, scores: Any) -> None:
        """Raises `InputError` unless there is one score for each edge, a tensor [E]."""
        self.require_edges("scores", scores)
        if scores.ndim != 1:
            raise InputError(f"scores is {describe(scores)}; give [{len(self)}], such as the mean over examples.")

    def __repr__(self) -> str:
        return f"EdgeGraph({len(self.writers)} writers, {len(self.readers)} readers, {len(self)} edges)"

    def __str__(self) -> str:
        rows = [(part.kind, _shown(part.names), part.site) for part in self.parts]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        return "\n".join([repr(self), *(f"{kind:<{widths[0]}}  {names:<{widths[1]}}  {site}" for kind, names, site in rows)])


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _number(kind: str, name: Any, numbers: dict[str, int]) -> int:
    if not isinstance(name, str) or name not in numbers:
        raise InputError(f"the graph has no {kind} {name!r}." + did_you_mean(str(name), numbers))
    return numbers[name]


def _require_own_place(part: Part, taken: dict[tuple[str, str], list[tuple[int | None, int]]]) -> None:
    """Raises `InputError` for a second node at one place; notes the first. Readers behind a norm share a site."""
    if isinstance(part, ReaderGroup) and part.entrances:
        return
    there = taken.setdefault((part.kind, part.site), [])
    if there and (part.axis is None or any(axis is None or (axis, index) == (part.axis, part.index) for axis, index in there)):
        raise InputError(
            f"{part.names[0]!r} {part.kind} what another node {part.kind} at {part.site!r}; give each node a site, or a slice "
            "of one by axis and index, of its own."
        )
    there.append((part.axis, part.index))


def _shown(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"
