"""One masked forward: every reader of the residual stream has its own copy, in which chosen writers are ablated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ...core.errors import InputError, SiteError
from ...core.functional import Execution, FunctionalModel
from ...core.reading import capture
from ...core.scope import Handler
from ...core.sites import Site, Want
from ...core.structure import describe
from ...core.transforms import Transform, exact_wants, require_sites, take
from ..prompt_pairs import require_aligned
from .graph import EdgeGraph
from .parts import ReaderGroup, WriterGroup, differences_into

Ablation = Tensor | float


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
        `ablation`: what the writers write instead, Tensor [U, B, *stream] or what expands to it (`writer_values`,
        `mean_values`), or a number for all.
        `mask`: Tensor [E], or [B, E] with a mask for each example; or a mapping from readers to tensors [n] or [B, n] over the
        writers before them, in which readers left out have mask 0.

    Raises:
        SiteError: as `intervene`. InputError: an ablation or mask of the wrong shape.

    Cost: the forward pass and about E products of a number with the stream; with heads also the norm of each block and the
    projections of queries, keys and values once more for each reader. Memory: the U written values.

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
    return MaskEdges(f, exact_wants(f, sites_of(graph.parts), "mask_edges"), graph, written)


def require_graph(f: FunctionalModel, graph: Any) -> None:
    """Raises `ModelError` for a model without sites, and `InputError` for what is no graph."""
    require_sites(f)
    if not isinstance(graph, EdgeGraph):
        raise InputError(f"graph is {describe(graph)}; give what edge_graph(f, params) or EdgeGraph.of(nodes) returned.")


def writer_values(f: FunctionalModel, params: Any, inputs: Any, graph: EdgeGraph) -> Tensor:
    """What each writer adds to the stream: Tensor [U, B, *stream], in the order of `graph.writers`.

    Cost: one forward pass.

    Examples:
        >>> from tdhook.latent.circuits import EdgeGraph, Reader, Writer
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Tanh()))
        >>> graph = EdgeGraph.of([Writer("x", "0"), Writer("a", "1"), Reader("y", "1:in")])
        >>> writer_values(f, params, torch.zeros(1, 2), graph).shape
        torch.Size([2, 1, 2])
    """
    require_graph(f, graph)
    writers = [part for part in graph.parts if isinstance(part, WriterGroup)]
    _, values = capture(f, sites_of(writers))(params, inputs)
    return gathered(params, writers, {part.site: values[part.site] for part in writers})


def mean_values(f: FunctionalModel, params: Any, batches: Iterable[Any], graph: EdgeGraph, *, positions: bool = True) -> Tensor:
    """The mean of what each writer adds over a data set: an ablation for `mask_edges`.

    Args:
        f: functional model.
        params: its parameters.
        batches: inputs as `f` takes them, of B examples each (as many as they come), of one length.
        graph: writers and readers.
        positions: whether each position has a mean of its own; else one for all, [U, 1, 1, D] for a stream [B, S, D].

    Returns:
        Tensor [U, 1, *stream].

    Raises:
        InputError: no batch; batches of different lengths where positions are kept apart.

    Cost: one forward pass for each batch. Memory: one batch and the means.
    """
    total: Tensor | None = None
    count = 0
    for inputs in batches:
        values = writer_values(f, params, inputs, graph)
        axes = [1] if positions else list(range(1, max(2, values.ndim - 1)))
        if total is not None and positions and values.shape[2:] != total.shape[2:]:
            raise InputError(
                f"batches holds streams of shape {list(total.shape[2:])} and {list(values.shape[2:])}; give prompts of one "
                "length, or positions=False."
            )
        here = math.prod(values.shape[axis] for axis in axes)
        added = values.to(torch.promote_types(values.dtype, torch.float32)).sum(axes, keepdim=True)
        total, count, dtype = added if total is None else total + added, count + here, values.dtype
    if total is None:
        raise InputError("batches is empty; give at least one batch of inputs.")
    return (total / count).to(dtype)


def ablation_values(
    f: FunctionalModel, params: Any, clean: Any, corrupted: Any, graph: EdgeGraph, ablation: Ablation | None
) -> Ablation:
    """What the writers write instead: what they write for the corrupted inputs, unless an ablation is given."""
    require_graph(f, graph)
    if ablation is None:
        if corrupted is None:
            raise InputError(
                "corrupted is None, and so is ablation; give the inputs that activations are taken from, or values."
            )
        require_aligned(clean, corrupted)
        return writer_values(f, params, corrupted, graph)
    if corrupted is not None:
        raise InputError(
            "corrupted and ablation are both given, but only one of them can say what writers write; leave one None."
        )
    if isinstance(ablation, bool) or not isinstance(ablation, (int, float, Tensor)):
        raise InputError(f"ablation is {describe(ablation)}; give a number or a tensor [{len(graph.writers)}, ...].")
    return ablation if isinstance(ablation, Tensor) else float(ablation)


def gathered(params: Any, writers: Sequence[WriterGroup], values: dict[str, Tensor]) -> Tensor:
    """The values of all writers, in the shape of the first: Tensor [U, B, *stream]."""
    first = writers[0].values(params, values[writers[0].site]).shape[1:]
    return torch.cat([part.values(params, values[part.site]).reshape(-1, *first) for part in writers])


def as_mask(graph: EdgeGraph, mask: Any) -> Tensor:
    """The mask as a tensor [E] or [B, E]; raises `InputError` for another shape, or a reader that is not there."""
    if isinstance(mask, (dict, TensorDictBase)):
        given: dict[str, Any] = {str(name): value for name, value in mask.items()}
        for name in given:
            if name not in graph.readers:
                graph.index([(graph.writers[0], name)])
        if not given:
            raise InputError("mask is empty; give a tensor for at least one reader.")
        like: Tensor = next(iter(given.values()))
        rows: list[Tensor] = []
        for name, n in zip(graph.readers, graph.before):
            row = given.get(name, like.new_zeros((*like.shape[:-1], n)))
            if row.shape != (*like.shape[:-1], n):
                raise InputError(f"mask[{name!r}] is {describe(row)}; {n} writers come before it.")
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
        written: where the differences come from: `"live"`, what is written in the run; `"detached"`, the same without its
            gradient, which at mask 0 is 0 anyway; `"given"`: `ablation` is the difference itself.
    """

    graph: EdgeGraph
    written: str = "live"

    def key(self) -> tuple:
        return (*super().key(), self.graph, self.written)

    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        ablation, extra = take(extra, "ablation, mask")
        mask, extra = take(extra, "mask")
        mask = as_mask(self.graph, mask)
        if isinstance(ablation, Tensor) and (ablation.ndim == 0 or len(ablation) != len(self.graph.writers)):
            raise InputError(
                f"ablation is {describe(ablation)}; give a number or a tensor "
                f"[{len(self.graph.writers)}, ...], an entry for each writer."
            )
        handler = _EdgeMasker(self.wants, self.graph, params, ablation, mask, self.written)
        output = self.inner._run(params, inputs, extra, execution.within(handler))
        handler.finish()
        return output


class _EdgeMasker(Handler):
    """Notes what is written, and moves what is read by it."""

    def __init__(self, wants: tuple[Want, ...], graph: EdgeGraph, params: Any, ablation: Ablation, mask: Tensor, written: str):
        super().__init__(wants)
        self.params, self.ablation, self.mask, self.written = params, ablation, mask, written
        self.plan = _plan(graph)
        self.before, self.starts = graph.before, graph.starts
        self.differences: dict[int, Tensor] = {}  # from the number of the first writer of a group
        self.waiting: dict[tuple[int, int], Tensor] = {}
        self.stream: torch.Size | None = None

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        for kind, place, part, first in self.plan[str(want.site)]:
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
        values = part.values(self.params, value)
        self.stream = values.shape[1:] if self.stream is None else self.stream
        values = values.reshape(len(part.names), *self.stream)
        self.differences[first] = mine - (values.detach() if self.written == "detached" else values)

    def _read(self, place: int, part: ReaderGroup, first: int, value: Tensor) -> Tensor:
        rows, n = len(part.names), self.before[first]
        if n == 0:
            return value
        start = self.starts[first]
        mask = self.mask[..., start : start + rows * n].unflatten(-1, (rows, n))
        known = [self.differences[w] for w in sorted(self.differences) if w < n]
        if sum(map(len, known)) != n:
            raise SiteError(
                f"{part.names[0]!r} at {part.site!r} reads before all writers that the graph puts before it have "
                "written; list the nodes in the order of the run."
            )
        changes = part.changes(self.params, value, differences_into(mask, known))
        if not part.entrances:
            return value + changes[0]
        for number, change in enumerate(changes):
            self.waiting[place, number] = change
        return value


def sites_of(parts: Sequence[WriterGroup | ReaderGroup]) -> list[str]:
    return list(dict.fromkeys(site for part in parts for site in part.sites))


def _plan(graph: EdgeGraph) -> dict[str, list[tuple[str, int, Any, int]]]:
    """What to do at each site, in the order of the graph: (what, number of the part, the part, number of its first node)."""
    plan: dict[str, list[tuple[str, int, Any, int]]] = {}
    writers = readers = 0
    for place, part in enumerate(graph.parts):
        if isinstance(part, WriterGroup):
            plan.setdefault(part.site, []).append(("write", place, part, writers))
            writers += len(part.names)
        else:
            plan.setdefault(part.site, []).append(("read", place, part, readers))
            for number, entrance in enumerate(part.entrances):
                plan.setdefault(entrance.site, []).append(("enter", place, part, number))
            readers += len(part.names)
    return plan
