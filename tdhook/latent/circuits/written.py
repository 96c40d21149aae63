"""What writers add to the residual stream, and what may take its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.checks import warn_if_stochastic
from ...core.errors import InputError
from ...core.functional import FunctionalModel
from ...core.progress import Progress
from ...core.reading import stop_at
from ...core.sites import Want
from ...core.structure import describe
from ...core.transforms import exact_wants, require_sites
from ..prompt_pairs import mask_of, require_aligned
from ..streaming import numbered
from .graph import EdgeGraph
from .parts import ReaderGroup, WriterGroup

Ablation = Tensor | float


def writer_values(f: FunctionalModel, params: Any, inputs: Any, graph: EdgeGraph) -> Tensor:
    """What each writer adds to the stream: Tensor [U, B, *stream], in the order of `graph.writers`.

    Cost: the forward pass up to the last writer.

    Examples:
        >>> from tdhook.latent.circuits import EdgeGraph, Reader, Writer
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Tanh()))
        >>> graph = EdgeGraph.of([Writer("x", "0"), Writer("a", "1"), Reader("y", "1:in")])
        >>> writer_values(f, params, torch.zeros(1, 2), graph).shape
        torch.Size([2, 1, 2])
    """
    require_graph(f, graph)
    sites = wants_at(f, writers_of(graph), "writer_values")
    values = stop_at(f, _addresses(sites))(params, inputs)
    return gathered(params, graph, {site: values[str(want.site)] for site, want in sites.items()})


def mean_values(
    f: FunctionalModel,
    params: Any,
    batches: Iterable[Any],
    graph: EdgeGraph,
    *,
    pooled: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """The mean of what each writer adds over a data set: an ablation for `mask_edges`.

    Positions that an `"attention_mask"` [B, S] of the inputs leaves out do not count; one that never counts has the mean 0.

    Args:
        f: functional model.
        params: its parameters.
        batches: inputs as `f` takes them, of B examples each (as many as they come), of one length unless pooled.
        graph: writers and readers.
        pooled: whether all positions have one mean, [U, 1, 1, D] for a stream [B, S, D]; else each has its own.
        progress: called as `progress(done, total)`, in batches.

    Returns:
        Tensor [U, 1, *stream].

    Raises:
        InputError: no batch; batches of different lengths where positions are kept apart; pooled, where there are none.

    Cost: one forward pass for each batch, without gradients. Memory: one batch and the means.

    Source: Wang et al., "Interpretability in the Wild" (2022): means per position.

    Examples:
        >>> from tdhook.latent.circuits import EdgeGraph, Reader, Writer
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()))
        >>> graph = EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in")])
        >>> mean_values(f, params, [torch.tensor([[1.0, 2]]), torch.tensor([[3.0, 6]])], graph)
        tensor([[[2., 4.]]])
    """
    require_graph(f, graph)
    warn_if_stochastic(f, "mean_values")
    mean, count = None, torch.zeros(())
    for _, inputs in numbered(batches, progress):
        with torch.no_grad():
            values = writer_values(f, params, inputs, graph)
        if pooled and values.ndim < 4:
            raise InputError(
                f"pooled=True needs a stream [B, S, D], but each writer adds {list(values.shape[1:])}; leave it out."
            )
        if mean is not None and mean.shape[2:] != values.shape[2:] and not pooled:
            raise InputError(
                f"batches holds streams of shape {list(mean.shape[2:])} and {list(values.shape[2:])}; give prompts of one "
                "length, or pooled=True."
            )
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        counts = _counts(inputs, exact)
        axes = (1, 2) if pooled else (1,)
        total, here = torch.where(counts > 0, exact, 0).sum(axes, keepdim=True), counts.sum(axes, keepdim=True)
        # a running mean, since a sum of many values loses digits
        before = torch.zeros_like(total) if mean is None else mean
        count = count.to(here) + here
        mean = before + (total - here * before) / count.clamp(min=1)
    assert mean is not None
    return mean.to(values.dtype)


def _counts(inputs: Any, values: Tensor) -> Tensor:
    """1 for each value [U, B, *stream] that counts and 0 for padding, as [1, B, S, 1, ...]."""
    mask = mask_of(inputs)
    lead = values.shape[1:3] if values.ndim > 3 else values.shape[1:2]
    weights = values.new_ones(lead) if mask is None or mask.shape != lead else mask.to(values)
    return weights.reshape(1, *lead, *[1] * (values.ndim - 1 - len(lead)))


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
    require_ablation(graph, ablation)
    return ablation if isinstance(ablation, Tensor) else float(ablation)


def require_ablation(graph: EdgeGraph, ablation: Any, stream: torch.Size | None = None) -> None:
    """Raises `InputError` unless an ablation is a number, or a tensor with a value for each writer: of the stream, if known."""
    if isinstance(ablation, (int, float)) and not isinstance(ablation, bool):
        return
    writers = len(graph.writers)
    fits = isinstance(ablation, Tensor) and ablation.ndim > 0 and len(ablation) == writers
    wanted = f"[{writers}, ...], an entry for each writer"
    if stream is not None:
        # Aligned from the left: the axis of writers must not meet one of examples or positions.
        fits = fits and ablation.ndim == 1 + len(stream) and all(n in (1, m) for n, m in zip(ablation.shape[1:], stream))
        wanted = f"{[writers, *stream]}, or with 1 in place of any but {writers}"
    if not fits:
        raise InputError(f"ablation is {describe(ablation)}; give a number or a tensor {wanted}.")


def gathered(params: Any, graph: EdgeGraph, values: Mapping[str, Tensor]) -> Tensor:
    """What all writers add, given the values at their sites: Tensor [U, B, *stream], in the shape of the first."""
    found: list[Tensor] = []
    for part in writers_of(graph):
        found.append(part.values(params, values[part.site], found[0].shape[1:] if found else None))
    return torch.cat(found)


def writers_of(graph: EdgeGraph) -> list[WriterGroup]:
    return [part for part in graph.parts if isinstance(part, WriterGroup)]


def wants_at(f: FunctionalModel, parts: Sequence[WriterGroup | ReaderGroup], method: str) -> dict[str, Want]:
    """What the sites of parts mean in a model, by the spelling that the parts have, in the order of the run."""
    sites = list(dict.fromkeys(site for part in parts for site in part.sites))
    wants = exact_wants(f, sites, method)
    if len(wants) < len(sites):  # two spellings of one site
        wants = tuple(exact_wants(f, site, method)[0] for site in sites)
    return dict(zip(sites, wants))


def _addresses(sites: Mapping[str, Want]) -> list[str]:
    return list(dict.fromkeys(str(want.site) for want in sites.values()))


def require_graph(f: FunctionalModel, graph: Any) -> None:
    """Raises `ModelError` for a model without sites, and `InputError` for what is no graph."""
    require_sites(f)
    if not isinstance(graph, EdgeGraph):
        raise InputError(f"graph is {describe(graph)}; give what edge_graph(f, params) or EdgeGraph.of(nodes) returned.")
