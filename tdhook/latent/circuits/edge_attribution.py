"""Edge attribution patching: the effect of every edge at once, to first order or along a path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.batching import chunks, vmap_or_loop
from ...core.checks import require_gradients, require_positive, warn_if_stochastic
from ...core.compat import visible
from ...core.errors import InputError, TargetError
from ...core.functional import FunctionalModel
from ...core.quadrature import quadrature_rule
from ...core.structure import describe, tensors
from ...core.writing import intervene
from ..patches import Metric, measured, require_metric
from .graph import EdgeGraph
from .masking import masked
from .parts import WriterGroup
from .written import Ablation, ablation_values, require_graph, writer_values, writers_of

PATHS = ("inputs", "mask", "activations")


def eap(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    graph: EdgeGraph,
    ablation: Ablation | None = None,
    per_example: bool = False,
) -> Tensor:
    """Edge attribution patching: the effect of ablating each edge, to first order.

        score[u -> r] = (ablation_u - a_u(clean)) . d metric / d input_r  =  d metric / d mask[u -> r]  at mask 0

    It is an estimate of `metric(edge ablated) - metric(clean)`: an edge that the metric needs has a score below 0. With
    ablation None, `ablation_u` is what u writes for the corrupted inputs.

    Args:
        f: functional model.
        params: its parameters.
        clean: the inputs of the run that is explained, of B examples.
        corrupted: the inputs of the other run, of the same structure and shapes.
        metric: function of the output to a tensor [B], one number for each example, or [].
        graph: writers and readers, as `edge_graph` finds them.
        ablation: what is put in place of corrupted activations: a tensor [U, ...] (`mean_values`), or a number, 0 for zero
            ablation; then `corrupted` is None.
        per_example: whether each example has scores of its own. Examples have to be independent of each other.

    Returns:
        Tensor [E], the scores for the mean of the metric over the examples (for the metric itself, where that is []); with
        `per_example` Tensor [B, E].

    Raises:
        InputError: inputs that do not align; both or neither of corrupted and ablation. TargetError: a metric of another shape,
            or of shape [] with `per_example`. GradientError: grad mode is off.

    Cost: two forward passes and one backward pass. Memory: as `mask_edges`, and the activations of a backward pass.

    Source: Syed et al., "Attribution Patching Outperforms Automated Circuit Discovery" (2023).

    Examples:
        >>> from tdhook.latent.circuits import EdgeGraph, Reader, Writer
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()))
        >>> graph = EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in")])
        >>> eap(f, params, torch.full((1, 1), 3.0), torch.ones(1, 1), lambda out: out[:, 0].square(), graph=graph)
        tensor([-12.])
    """
    _check("eap", f, metric)
    values = ablation_values(f, params, clean, corrupted, graph, ablation)
    mask = _zeros(graph, params, clean, values, per_example)
    # The gradient of what is written is 0 at mask 0 and costs a third; only a derivative of the scores themselves needs it.
    leaves = [tensor for _, tensor in tensors((params, clean, values))]
    nobody_asks = visible(*leaves) and not any(leaf.requires_grad for leaf in leaves)
    g = masked(f, graph, "detached" if nobody_asks else "live")
    return _gradient(lambda m: g(params, clean, values, m), metric, mask, per_example)


def eap_ig(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    graph: EdgeGraph,
    path: str = "inputs",
    steps: int = 5,
    quadrature: str = "gauss_legendre",
    ablation: Ablation | None = None,
    per_example: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Edge attribution patching with integrated gradients.

        score[u -> r] = sum_k w_k (ablation_u - a_u) . d metric / d input_r  at the point t_k of a path, 0 clean and 1 ablated

    - `path="inputs"`: what the first writer (the embedding) writes goes from its clean to its corrupted value, and the rest
      of the model follows; `a_u` is that of the clean run.
    - `path="mask"`: the masks of all edges go from 0 to 1 together; `a_u` is what u writes at `t_k`. The scores sum to
      `metric(everything ablated) - metric(clean)`, up to the quadrature.
    - `path="activations"`: writer group by writer group (the heads of a layer, an MLP), the masks of the edges that leave it go
      from 0 to 1. The scores of each group sum to the effect of patching the group.

    Args:
        f: functional model.
        params: its parameters.
        clean: the inputs of the run that is explained, of B examples.
        corrupted: the inputs of the other run, of the same structure and shapes.
        metric: function of the output to a tensor [B], one number for each example, or [].
        graph: writers and readers, as `edge_graph` finds them.
        per_example: whether each example has scores of its own; else those of the mean of the metric.
        path: see above.
        steps: number of points.
        quadrature: the points and their weights. The code of Hanna et al. takes `"riemann_right"` (corrupted but not clean),
            their formula `"riemann_left"`; "clean-corrupted" is `"trapezoid"` with 2 steps.
        ablation: as `eap`; None for `path="inputs"`.
        chunk_size: how many points run at once; None for all. It bounds memory and does not change the result.

    Returns:
        Tensor [E], or [B, E], as `eap`, with the same sign.

    Raises:
        As `eap`; InputError: an unknown path or quadrature; an ablation along `"inputs"`.

    Cost: two or three forward passes, and `steps` forward and backward passes, for `"activations"` once for each writer group.

    Source: Hanna et al., "Have Faith in Faithfulness: Going Beyond Circuit Overlap When Finding Model Mechanisms" (2024); along
    activations Marks et al., "Sparse Feature Circuits" (2024).

    Examples:
        >>> from tdhook.latent.circuits import EdgeGraph, Reader, Writer
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()))
        >>> graph = EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in")])
        >>> eap_ig(f, params, torch.full((1, 1), 3.0), torch.ones(1, 1), lambda out: out[:, 0].square(), graph=graph).round()
        tensor([-8.])
    """
    _check("eap_ig", f, metric)
    if path not in PATHS:
        raise InputError(f"path={path!r} is unknown; choose from {', '.join(PATHS)}.")
    if path == "inputs" and ablation is not None:
        raise InputError("path='inputs' goes from clean to corrupted inputs; give corrupted and no ablation, or another path.")
    require_positive("chunk_size", chunk_size, optional=True)
    require_graph(f, graph)
    source = writers_of(graph)[0]
    if path == "inputs" and (source.axis is not None or source.layout is not None):
        raise InputError(
            f"path='inputs' moves what the first writer writes, but {source.names[0]!r} is a slice of the value at "
            f"{source.site!r}; put a writer of a whole value first, or take another path."
        )
    nodes, weights = quadrature_rule(quadrature, steps)
    values = ablation_values(f, params, clean, corrupted, graph, ablation)
    mask = _zeros(graph, params, clean, values, per_example)

    def along(gradient_at: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros_like(mask)
        for part in chunks(len(nodes), chunk_size):
            points, here = (mask.new_tensor(numbers[part]) for numbers in (nodes, weights))
            # A single point needs no vmap, under which fused attention is slow.
            found = gradient_at(points[0])[None] if len(points) == 1 else vmap_or_loop(gradient_at, points)
            total = total + torch.tensordot(here, found, 1)
        return total

    if path == "inputs":
        before = writer_values(f, params, clean, graph)
        assert isinstance(values, Tensor)
        first, last, differences = before[0], values[0], values - before

        def at_point(t: Tensor) -> Tensor:
            g = masked(
                intervene(f, {source.site: lambda value: (first + t * (last - first)).reshape(value.shape)}), graph, "given"
            )
            return _gradient(lambda m: g(params, clean, differences, m), metric, mask, per_example)

        return along(at_point)

    g = masked(f, graph)
    if path == "mask":
        return along(lambda t: _gradient(lambda m: g(params, clean, values, m), metric, mask + t, per_example))

    scores = torch.zeros_like(mask)
    for leaving in _edges_of_groups(graph):
        chosen = leaving.to(mask)

        def leaving_at(t: Tensor, chosen: Tensor = chosen) -> Tensor:
            return chosen * _gradient(lambda m: g(params, clean, values, m), metric, mask + t * chosen, per_example)

        scores = scores + along(leaving_at)
    return scores


def _check(method: str, f: FunctionalModel, metric: Any) -> None:
    require_gradients(method)
    require_metric(metric)
    warn_if_stochastic(f, method)


def _zeros(graph: EdgeGraph, params: Any, clean: Any, ablation: Ablation, per_example: bool) -> Tensor:
    """Mask 0, of the dtype and device of what is written."""
    first = next((tensor for _, tensor in tensors(clean)), None)
    if first is None or first.ndim == 0:
        raise InputError(f"clean is {describe(clean)}; give a tensor of B examples, or a structure of them.")
    known = [ablation] if isinstance(ablation, Tensor) else [first, *(tensor for _, tensor in tensors(params))]
    like = next((tensor for tensor in known if tensor.is_floating_point()), None)
    dtype = torch.get_default_dtype() if like is None else like.dtype
    return torch.zeros(*first.shape[: int(per_example)], len(graph), dtype=dtype, device=first.device)


def _gradient(run: Callable[[Tensor], Any], metric: Metric, mask: Tensor, per_example: bool) -> Tensor:
    """The derivative of the metric: of its mean for a mask [E], of each example for [B, E]."""

    def total(mask: Tensor) -> Tensor:
        value = measured(metric, run(mask))
        if per_example and value.ndim == 0:
            raise TargetError("metric returned one number; per_example=True needs a tensor of shape [B], one for each example.")
        return value.sum() if per_example else value.mean()

    return torch.func.grad(total)(mask)


def _edges_of_groups(graph: EdgeGraph) -> list[Tensor]:
    """For each group of writers which edges leave it: bool Tensors [E]."""
    found = []
    first = 0
    for part in graph.parts:
        if isinstance(part, WriterGroup):
            leaving = torch.zeros(len(graph), dtype=torch.bool)
            for writer in range(first, first + len(part.names)):
                leaving[graph.of_writer(graph.writers[writer])] = True
            first += len(part.names)
            found.append(leaving)
    return found
