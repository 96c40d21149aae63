"""Edge patching: the exact effect of ablating single edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.batching import vmap_or_loop
from ...core.checks import require_positive, warn_if_stochastic
from ...core.errors import InputError, TargetError
from ...core.functional import FunctionalModel
from ...core.progress import Progress
from ...core.replay import Tape
from ...core.structure import describe
from ..patches import Metric, measured, require_metric
from .graph import Edge, EdgeGraph
from .masking import too_early
from .parts import ReaderGroup, WriterGroup
from .written import Ablation, ablation_values, gathered, require_ablation, require_graph, wants_at


def edge_patching(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    graph: EdgeGraph,
    edges: Sequence[Edge] | Tensor | None = None,
    ablation: Ablation | None = None,
    per_example: bool = False,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The exact effect of ablating each edge alone.

        effect[e] = metric(mask 1 at e, 0 elsewhere) - metric(clean)

    What `eap` estimates, with the same sign: an edge that the metric needs has an effect below 0.

    Args:
        f: functional model.
        params: its parameters.
        clean: the inputs of the run that is explained, of B examples.
        corrupted: the inputs of the other run, of the same structure and shapes.
        metric: function of the output to a tensor [B], one number for each example, or [].
        graph: writers and readers, as `edge_graph` finds them.
        ablation: as `eap`.
        edges: (writer, reader) pairs, or integer Tensor [K] of their numbers (not compiled: its values matter); None for all.
        per_example: whether each example has effects of its own; else those of the mean of the metric.
        chunk_size: how many edges run at once, of those into the readers of one site (the queries, keys and values of a block,
            say); None for all of them. It bounds memory and does not change the result.
        progress: called as `progress(done, total)` after the edges of each group of readers; see `tdhook.tqdm_progress`.

    Returns:
        Tensor [K], or [B, K].

    Raises:
        InputError: as `eap`; an edge that the graph does not have. TargetError: a metric of another shape, or of shape [] with
            `per_example`.

    Cost: two forward passes, and for each edge one vmapped pass that runs only what lies after the reader. Memory: the written
    values, and the activations of each edge that runs at once.

    Source: Conmy et al., "Towards Automated Circuit Discovery for Mechanistic Interpretability" (2023); Goldowsky-Dill et al.,
    "Localizing Model Behavior with Path Patching" (2023).

    Examples:
        >>> from tdhook.latent.circuits import EdgeGraph, Reader, Writer
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()))
        >>> graph = EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in")])
        >>> edge_patching(f, params, torch.full((1, 1), 3.0), torch.ones(1, 1), lambda out: out[:, 0].square(), graph=graph)
        tensor([-8.])
    """
    require_positive("chunk_size", chunk_size, optional=True)
    require_metric(metric)
    require_graph(f, graph)
    numbers = _numbers(graph, edges)
    wants = wants_at(f, graph.parts, "edge_patching")
    warn_if_stochastic(f, "edge_patching")
    ablated = ablation_values(f, params, clean, corrupted, graph, ablation)
    base = Tape(f, params, clean, tuple(dict.fromkeys(wants.values())))
    _require_order(graph, {site: base.time_of(want) for site, want in wants.items()})
    before = measured(metric, base.output)
    if per_example and before.ndim == 0:
        raise TargetError("metric returned one number; per_example=True needs a tensor of shape [B], one for each example.")
    written = gathered(params, graph, {site: base.values[want] for site, want in wants.items()})
    require_ablation(graph, ablated, written.shape[1:])
    differences = (ablated.to(written.dtype) if isinstance(ablated, Tensor) else ablated) - written

    effects: list[Tensor] = []
    order: list[int] = []
    for part, first in _groups(graph):
        rows, reads, start = len(part.names), graph.reads[first], graph.starts[first]
        n = len(reads)
        chosen = [i for i, number in enumerate(numbers) if start <= number < start + rows * n]
        if not chosen:
            continue
        read = base.values[wants[part.site]]

        def patched(local: Tensor, part: Any = part, read: Tensor = read, reads: range = reads) -> Tensor:
            row, writer = local.div(len(reads), rounding_mode="floor"), reads.start + local % len(reads)
            move = differences.index_select(0, writer.reshape(1))[0]
            writes: dict[Any, Any] = {}
            for door, change in zip(part.doors, part.changes_by(params, read, move, row)):
                writes[wants[door.site]] = _then(writes.get(wants[door.site]), door, change)
            return metric(base.resume(writes)) - before

        at = torch.tensor([numbers[i] - start for i in chosen], device=differences.device)
        effects.append(vmap_or_loop(patched, at, chunk_size))
        order += chosen
        if progress is not None:
            progress(len(order), len(numbers))
    back = sorted(range(len(order)), key=order.__getitem__)
    found = torch.cat(effects)[torch.tensor(back, device=differences.device)]
    if per_example:
        return found.movedim(0, -1)
    return found if found.ndim == 1 else found.mean(1)


def _then(before: Any, door: Any, change: Tensor) -> Any:
    """A write after another one at the same site."""
    return lambda value: door.write(value if before is None else before(value), change)


def _numbers(graph: EdgeGraph, edges: Any) -> list[int]:
    if edges is None:
        return list(range(len(graph)))
    if isinstance(edges, Tensor):
        if edges.ndim != 1 or edges.is_floating_point() or edges.dtype is torch.bool:
            raise InputError(f"edges is {describe(edges)}; give an integer tensor [K], or pairs (writer, reader).")
        numbers = edges.tolist()
        for number in numbers:
            graph.edge(number)
    else:
        numbers = graph.numbers(edges)
    if not numbers:
        raise InputError("edges is empty; give at least one, or None for all.")
    return numbers


def _require_order(graph: EdgeGraph, times: dict[str, int]) -> None:
    """Raises `SiteError` for a reader that runs before a writer that the graph puts before it."""
    latest = 0
    for part in graph.parts:
        if isinstance(part, WriterGroup):
            latest = max(latest, times[part.site])
        elif times[part.site] < latest:
            raise too_early(part)


def _groups(graph: EdgeGraph) -> list[tuple[ReaderGroup, int]]:
    """The groups of readers that have edges, with the number of their first reader."""
    found = []
    first = 0
    for part in graph.parts:
        if isinstance(part, ReaderGroup):
            if graph.reads[first]:
                found.append((part, first))
            first += len(part.names)
    return found
