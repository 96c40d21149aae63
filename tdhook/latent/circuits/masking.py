"""One masked forward: every reader of the residual stream has its own copy, in which chosen writers are ablated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ...core.errors import InputError, SiteError
from ...core.functional import Execution, FunctionalModel
from ...core.scope import Handler
from ...core.sites import Site, Want
from ...core.structure import describe
from ...core.transforms import Transform, take
from .graph import EdgeGraph
from .parts import ReaderGroup, WriterGroup, differences_into
from .written import Ablation, require_ablation, require_graph, wants_at


def mask_edges(f: FunctionalModel, graph: EdgeGraph) -> FunctionalModel:
    """A model whose edges between writers and readers can be ablated, each by a number of its own.

        input of reader r = stream_r + sum over writers u before r of mask[u -> r] * (ablation_u - written_u)

    `written_u` is what u writes in this very run, so that with all masks 1 each reader sees the ablated writers alone. Mask 0
    is the edge as it is, and 1 the ablated edge. The gradient at mask 0 is edge attribution patching, a mask that is 1 at one
    edge is edge patching, one that is 1 outside of a circuit runs the circuit.

    Args:
        f: functional model.
        graph: its writers and readers.

    Returns:
        `g(params, inputs, ablation, mask) -> output`.
        `ablation`: what the writers write instead: Tensor [U, B, *stream], with 1 in place of any but U (`writer_values`,
        `mean_values`), or a number for all.
        `mask`: Tensor [E], or [B, E] with a mask for each example; or a mapping from readers to tensors [n] or [B, n] over the
        writers before them, in which readers left out have mask 0.

    Raises:
        SiteError: as `intervene`; a reader that runs before its writers; values that have not the shape of the stream.
        InputError: an ablation or mask of the wrong shape.

    Cost: the forward pass and about E products of a number with the stream; with heads also the norm of each block and the
    projections of queries, keys and values once more for each reader. Memory: the U written values, and for one block at a time
    a copy of the stream for each of its readers; for a gradient the copies of all blocks.

    A norm that heads read through is run on its own: transforms inside of `f` do not reach these copies.

    Source: Conmy et al., "Towards Automated Circuit Discovery for Mechanistic Interpretability" (2023); for the gradient of the
    mask Syed et al., "Attribution Patching Outperforms Automated Circuit Discovery" (2023).

    Examples:
        >>> from tdhook.latent.circuits import EdgeGraph, Reader, Writer
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Tanh(), torch.nn.Identity()))
        >>> graph = EdgeGraph.of([Writer("x", "0"), Reader("a", "1:in"), Reader("y", "2:in")])
        >>> g = mask_edges(f, graph)
        >>> g(params, torch.ones(1, 1), 0.0, torch.tensor([1.0, 0.0]))
        tensor([[0.]])
    """
    return masked(f, graph)


def masked(f: FunctionalModel, graph: EdgeGraph, written: str = "live") -> MaskEdges:
    """As `mask_edges`, with a choice of what is taken as written: see `MaskEdges`."""
    require_graph(f, graph)
    sites = wants_at(f, graph.parts, "mask_edges")
    return MaskEdges(f, tuple(dict.fromkeys(sites.values())), graph, sites, written)


def as_mask(graph: EdgeGraph, mask: Any) -> Tensor:
    """The mask as a tensor [E] or [B, E]; raises `InputError` for another shape, or a reader that is not there."""
    if isinstance(mask, (dict, TensorDictBase)):
        given: dict[str, Any] = {str(name): value for name, value in mask.items()}
        for name, row in given.items():
            if name not in graph.readers:
                graph.of_reader(name)
            if not isinstance(row, Tensor) or row.ndim not in (1, 2):
                raise InputError(f"mask[{name!r}] is {describe(row)}; give a tensor [n] or [B, n] over the writers before it.")
        if not given:
            raise InputError("mask is empty; give a tensor for at least one reader.")
        like: Tensor = next(iter(given.values()))
        rows: list[Tensor] = []
        for name, n in zip(graph.readers, map(len, graph.reads)):
            row = given.get(name, like.new_zeros((*like.shape[:-1], n)))
            if row.shape != (*like.shape[:-1], n):
                raise InputError(f"mask[{name!r}] is {describe(row)}; it reads {n} writers.")
            rows.append(row)
        return torch.cat(rows, -1)
    graph.require_edges("mask", mask)
    if mask.ndim > 2:
        raise InputError(f"mask is {describe(mask)}; give [E] or [B, E], and vmap for more.")
    return mask


@dataclass(frozen=True, eq=False, repr=False)
class MaskEdges(Transform):
    """See `mask_edges`.

    Attributes:
        graph: writers and readers.
        sites: what the sites of the graph mean in the model.
        written: where the differences come from: `"live"`, what is written in the run; `"detached"`, the same without its
            gradient, which at mask 0 is 0 anyway; `"given"`: `ablation` is the difference itself.
    """

    graph: EdgeGraph
    sites: dict[str, Want]
    written: str = "live"

    def key(self) -> tuple:
        return (*super().key(), self.graph, self.written)

    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        ablation, extra = take(extra, "ablation, mask")
        mask, extra = take(extra, "mask")
        mask = as_mask(self.graph, mask)
        require_ablation(self.graph, ablation)
        handler = _EdgeMasker(self, params, ablation, mask)
        output = self.inner._run(params, inputs, extra, execution.within(handler))
        handler.finish()
        return output


class _EdgeMasker(Handler):
    """Notes what is written, and moves what is read by it."""

    def __init__(self, masked: MaskEdges, params: Any, ablation: Ablation, mask: Tensor):
        super().__init__(masked.wants)
        self.params, self.ablation, self.mask, self.written = params, ablation, mask, masked.written
        self.graph = masked.graph
        self.plan = _plan(masked.graph, masked.sites)
        self.differences: dict[int, Tensor] = {}  # from the number of the first writer of a group
        self.waiting: dict[tuple[int, int], Tensor] = {}
        self.stream: torch.Size | None = None

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        for kind, place, part, first in self.plan[want]:
            if kind == "write":
                self._note(part, first, value)
            elif kind == "read":
                value = self._read(place, part, first, value)
            else:
                value = part.doors[first].write(value, self.waiting.pop((place, first)))
        return value

    def _note(self, part: WriterGroup, first: int, value: Tensor) -> None:
        ablation = self.ablation
        mine = ablation[first : first + len(part.names)] if isinstance(ablation, Tensor) else ablation
        if self.written == "given":
            self.differences[first] = mine  # type: ignore[assignment]
            return
        values = part.values(self.params, value, self.stream)
        if self.stream is None:
            self.stream = values.shape[1:]
            require_ablation(self.graph, ablation, self.stream)
            if self.mask.ndim == 2 and len(self.mask) not in (1, len(values[0])):
                raise InputError(f"mask is {describe(self.mask)} for {len(values[0])} examples; give a row for each, or [E].")
        values = values.detach() if self.written == "detached" else values
        self.differences[first] = (mine.to(values.dtype) if isinstance(mine, Tensor) else mine) - values

    def _read(self, place: int, part: ReaderGroup, first: int, value: Tensor) -> Tensor:
        rows, reads = len(part.names), self.graph.reads[first]
        n = len(reads)
        if n == 0:
            return value
        start = self.graph.starts[first]
        mask = self.mask[..., start : start + rows * n].unflatten(-1, (rows, n))
        known = [self.differences[w] for w in sorted(self.differences) if w in reads]
        if sum(map(len, known)) != n:
            raise too_early(part)
        changes = part.changes(self.params, value, differences_into(mask, known))
        if not part.entrances:
            return value + changes[0]
        for number, change in enumerate(changes):
            self.waiting[place, number] = change
        return value


def too_early(part: ReaderGroup) -> SiteError:
    """The error of a reader that runs before writers that the graph puts before it."""
    return SiteError(
        f"{part.names[0]!r} at {part.site!r} reads before all writers that the graph puts before it have written; list the "
        "nodes in the order of the run."
    )


def _plan(graph: EdgeGraph, sites: dict[str, Want]) -> dict[Want, list[tuple[str, int, Any, int]]]:
    """What to do at each site, in the order of the graph: (what, number of the part, the part, number of its first node)."""
    plan: dict[Want, list[tuple[str, int, Any, int]]] = {}
    writers = readers = 0
    for place, part in enumerate(graph.parts):
        if isinstance(part, WriterGroup):
            plan.setdefault(sites[part.site], []).append(("write", place, part, writers))
            writers += len(part.names)
        else:
            plan.setdefault(sites[part.site], []).append(("read", place, part, readers))
            for number, entrance in enumerate(part.entrances):
                plan.setdefault(sites[entrance.site], []).append(("enter", place, part, number))
            readers += len(part.names)
    return plan
