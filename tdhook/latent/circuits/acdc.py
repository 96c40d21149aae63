"""ACDC: the edges that a behaviour needs, found by trying to remove each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.batching import vmap_or_loop
from ...core.checks import require_positive, warn_if_stochastic
from ...core.errors import InputError
from ...core.functional import FunctionalModel
from ...core.progress import Progress
from ...core.structure import describe
from ..patches import Metric, measured, require_metric
from .circuit import Circuit
from .graph import EdgeGraph
from .masking import mask_edges
from .written import Ablation, ablation_values


def acdc(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    graph: EdgeGraph,
    threshold: float,
    ablation: Ablation | None = None,
    chunk_size: int = 32,
    progress: Progress | None = None,
) -> Circuit:
    """Automatic circuit discovery: goes through all edges from the output to the input, and removes those that hardly matter.

        edge e is removed if  metric(circuit without e) - metric(circuit) < threshold

    `circuit` is what is left of the graph at that time, and all that is outside of it is ablated. Readers are visited from the
    last to the first, and the edges of each from the last writer to the first.

    Args:
        f: functional model.
        params: its parameters.
        clean: the inputs of the run that is explained, of B examples.
        corrupted: the inputs of the other run, of the same structure and shapes.
        graph: writers and readers, as `edge_graph` finds them.
        ablation: as `eap`.
        metric: function of the output to a tensor [B] or [] (its mean counts) that is lower for outputs nearer to those wanted,
            such as `kl_divergence_from(f(params, clean), key="logits", position=-1)`.
        threshold: how much worse the metric may become by one edge.
        chunk_size: how many removals are tried at once, at most: it bounds memory and does not change the result.
        progress: called as `progress(edges decided, E)`.

    Returns:
        `Circuit` of the edges that were kept. They are not pruned; see `Circuit.pruned`.

    Raises:
        InputError: as `eap`; a threshold that is no number. TargetError: a metric of another shape.

    Cost: for each edge that is kept about one batch of up to `chunk_size` passes, and for those that are removed together one.
    The next removals run at once as if all of them succeeded, and what follows the first that fails is tried again, so each
    decision is the one that trying edge after edge makes. Edges into a node of which nothing is left need no pass. Decisions
    depend on values, so it does not run under vmap or torch.compile.

    Source: Conmy et al., "Towards Automated Circuit Discovery for Mechanistic Interpretability" (2023).

    Examples:
        >>> from tdhook.latent.circuits import EdgeGraph, Reader, Writer
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()))
        >>> graph = EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in")])
        >>> loss = lambda out: (out - 3).square().sum(1)
        >>> acdc(f, params, torch.full((1, 1), 3.0), torch.ones(1, 1), loss, graph=graph, threshold=0.1).edges
        (('x', 'y'),)
    """
    require_positive("chunk_size", chunk_size)
    require_metric(metric)
    if not isinstance(threshold, (int, float)) or isinstance(threshold, bool) or threshold != threshold:
        raise InputError(f"threshold is {describe(threshold)}; give a number.")
    warn_if_stochastic(f, "acdc")
    with torch.no_grad():
        values = ablation_values(f, params, clean, corrupted, graph, ablation)
        current = measured(metric, f(params, clean)).mean()
        g = mask_edges(f, graph)

        def run(mask: Tensor) -> Tensor:
            return measured(metric, g(params, clean, values, mask)).mean()

        mask = torch.zeros(len(graph), dtype=current.dtype, device=current.device)
        kept = torch.ones(len(graph), dtype=torch.bool)
        done, size = 0, 1
        for reader in reversed(range(len(graph.readers))):
            start = graph.starts[reader]
            waiting = list(reversed(range(start, start + len(graph.reads[reader]))))
            if _leads_nowhere(graph, kept, reader):
                done += len(waiting)
                if threshold > 0:
                    kept[waiting] = False
                    mask[waiting] = 1
                waiting = []
                if progress is not None:
                    progress(done, len(graph))
            while waiting:
                tried = waiting[:size]
                masks = mask.repeat(len(tried), 1)
                for row, number in enumerate(tried):
                    masks[row:, number] = 1
                removed = 0
                for value in vmap_or_loop(run, masks):
                    if not value - current < threshold:
                        break
                    current = value
                    removed += 1
                kept[tried[:removed]] = False
                mask[tried[:removed]] = 1
                decided = min(removed + 1, len(tried))
                waiting = waiting[decided:]
                done += decided
                size = min(chunk_size, 2 * size) if removed == len(tried) else max(1, size // 2)
                if progress is not None:
                    progress(done, len(graph))
    return Circuit(graph, kept)


def _leads_nowhere(graph: EdgeGraph, kept: Tensor, reader: int) -> bool:
    """Whether nothing that a reader feeds has an edge left."""
    feeds = graph.feeds[reader]
    return bool(feeds) and not any(
        bool(kept[start + reads.index(writer)])
        for writer in feeds
        for start, reads in zip(graph.starts, graph.reads)
        if writer in reads
    )
