"""What a circuit does on its own: faithfulness, completeness, and scores over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from tensordict import tensorclass
from torch import Tensor

from ...core import structure
from ...core.batching import vmap_or_loop
from ...core.checks import require_positive, warn_if_stochastic
from ...core.errors import InputError, TargetError
from ...core.estimate import Estimate, Moments
from ...core.functional import FunctionalModel
from ...core.progress import Progress
from ...core.structure import describe
from ..activation_patching import restored
from ..patches import Metric, measured, require_metric
from ..streaming import numbered
from .circuit import Circuit
from .masking import mask_edges
from .written import Ablation, ablation_values


@tensorclass
class CircuitMetric:
    """The metric of circuits, and of the two ends.

    Attributes:
        value: Tensor [K, *M] for K circuits and a metric of shape M ([] or [B]); [*M] for a single circuit.
        clean: Tensor [*M], with nothing ablated.
        ablated: Tensor [*M], with every edge ablated.
    """

    value: Tensor
    clean: Tensor
    ablated: Tensor

    @property
    def normalized(self) -> Tensor:
        """`(value - ablated) / (clean - ablated)` of the means over examples: 0 is the ablated model, 1 the whole one.

        Raises `InputError` where the two do not differ.
        """
        value = self.value if self.clean.ndim == 0 else self.value.mean(-1)
        return restored(value, self.clean.mean(), self.ablated.mean())


def evaluate(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    circuits: Circuit | Sequence[Circuit],
    metric: Metric,
    *,
    ablation: Ablation | None = None,
    chunk_size: int | None = None,
) -> CircuitMetric:
    """The metric of circuits: the model runs on the clean inputs with every edge outside of the circuit ablated.

    Args:
        f: functional model.
        params: its parameters.
        clean: the inputs of the run that is explained, of B examples.
        corrupted: the inputs of the other run, of the same structure and shapes.
        circuits: one, or K of one graph.
        metric: function of the output to a tensor [B] or [].
        ablation: as `eap`.
        chunk_size: how many circuits run at once; None for all. It bounds memory and does not change the result.

    Returns:
        `CircuitMetric`: `value`, `clean`, `ablated`, and `normalized`.

    Raises:
        InputError: as `eap`; no circuit, or circuits of several graphs. TargetError: a metric of another shape.

    Cost: K + 3 forward passes, those of the circuits vmapped.

    Source: Wang et al., "Interpretability in the Wild" (2022); Hanna et al. (2024).

    Examples:
        >>> from tdhook.latent.circuits import Circuit, EdgeGraph, Reader, Writer
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()))
        >>> circuit = Circuit.of(EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in")]), [])
        >>> evaluate(f, params, torch.full((1, 1), 3.0), torch.ones(1, 1), circuit, lambda out: out[:, 0]).value
        tensor([1.])
    """
    require_positive("chunk_size", chunk_size, optional=True)
    require_metric(metric)
    several = _as_circuits(circuits)
    graph = several[0].graph
    warn_if_stochastic(f, "evaluate")
    values = ablation_values(f, params, clean, corrupted, graph, ablation)
    before = measured(metric, f(params, clean))
    g = mask_edges(f, graph)

    def run(mask: Tensor) -> Tensor:
        return measured(metric, g(params, clean, values, mask))

    masks = torch.stack([circuit.mask(before.dtype).to(before.device) for circuit in several])
    found = vmap_or_loop(run, masks, chunk_size)
    ablated = run(torch.ones_like(masks[0]))
    value = found[0] if isinstance(circuits, Circuit) else found
    return CircuitMetric(value=value, clean=before, ablated=ablated, batch_size=[])  # type: ignore[call-arg]


def faithfulness(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    circuits: Circuit | Sequence[Circuit],
    metric: Metric,
    **options: Any,
) -> Tensor:
    """How much of the metric circuits recover on their own.

        faithfulness(C) = (m(C) - m(nothing)) / (m(everything) - m(nothing))

    Args, errors and cost as `evaluate`; `InputError` too where everything and nothing have the same metric.

    Returns:
        Tensor [K], or [] for a single circuit: 1 for the whole graph, 0 for no edge. Values outside of [0, 1] mean that
        a circuit leaves out edges that work against each other.

    Source: Marks et al., "Sparse Feature Circuits" (2024); Hanna et al. (2024), as normalised faithfulness.

    Examples:
        >>> from tdhook.latent.circuits import Circuit, EdgeGraph, Reader, Writer
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()))
        >>> circuit = Circuit.of(EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in")]), [("x", "y")])
        >>> faithfulness(f, params, torch.full((1, 1), 3.0), torch.ones(1, 1), circuit, lambda out: out[:, 0])
        tensor(1.)
    """
    return evaluate(f, params, clean, corrupted, circuits, metric, **options).normalized


def completeness(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    circuits: Circuit | Sequence[Circuit],
    metric: Metric,
    **options: Any,
) -> Tensor:
    """How much of the metric is left without circuits: the faithfulness of all that is outside of them.

    Args, errors and cost as `evaluate`; `InputError` too where everything and nothing have the same metric.

    Returns:
        Tensor [K], or [] for a single circuit: near 0 where a circuit holds all that matters.

    Source: Wang et al. (2022); in this form Marks et al. (2024).

    Examples:
        >>> from tdhook.latent.circuits import Circuit, EdgeGraph, Reader, Writer
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()))
        >>> circuit = Circuit.of(EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in")]), [("x", "y")])
        >>> completeness(f, params, torch.full((1, 1), 3.0), torch.ones(1, 1), circuit, lambda out: out[:, 0])
        tensor(0.)
    """
    rest = [circuit.complement for circuit in _as_circuits(circuits)]
    found = evaluate(f, params, clean, corrupted, rest, metric, **options).normalized
    return found[0] if isinstance(circuits, Circuit) else found


def _as_circuits(circuits: Any) -> list[Circuit]:
    """One or several circuits as a list; raises `InputError` for anything else, none, and those of several graphs."""
    several = list(circuits) if isinstance(circuits, Iterable) else [circuits]
    for circuit in several:
        if not isinstance(circuit, Circuit):
            raise InputError(f"circuits holds {describe(circuit)}; give what top_edges or Circuit.of returned.")
        if circuit.graph != several[0].graph:
            raise InputError("circuits are of several graphs; evaluate those of one graph at a time.")
    if not several:
        raise InputError("circuits is empty; give at least one.")
    return several


def mean_over_pairs(
    scores: Callable[..., Tensor], pairs: Iterable[Sequence[Any]], *, progress: Progress | None = None
) -> Estimate:
    """The mean of scores over a data set of prompt pairs, and its standard error.

    Args:
        scores: function of the elements of a pair to Tensor [B, E], such as `eap` with `per_example=True`; or [B, K], as
            `evaluate(...).value.mT` of K circuits.
        pairs: tuples (clean, corrupted, ...) of B pairs each, as many as they come; what follows goes to `scores` too.
        progress: called as `progress(done, total)`, in batches; of an iterable without a length only the end is known.

    Returns:
        `Estimate(value, standard_error)`, Tensors [E] each; the error of a single pair is NaN.

    Raises:
        InputError: no batch, or one that is no tuple; scores of another shape.

    Cost: that of `scores` for each batch, in the memory of one.

    Examples:
        >>> mean_over_pairs(lambda clean, corrupted: corrupted - clean, [(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]))])
        Estimate(value=tensor([2.]), standard_error=tensor([1.]))
    """
    moments: Moments | None = None
    for number, pair in numbered(pairs, progress):
        if not isinstance(pair, (tuple, list)):
            raise InputError(f"batch {number} of pairs is {describe(pair)}; give a tuple (clean, corrupted, ...).")
        found = scores(*pair)
        if not isinstance(found, Tensor) or found.ndim < 2:
            raise InputError(f"scores returned {describe(found)}; return [B, E], with per_example=True.")
        # in half precision a long stream would stop moving its mean
        part = Moments.of(found.detach().to(torch.promote_types(found.dtype, torch.float32)))
        moments = part if moments is None else moments + part
    assert moments is not None
    return Estimate(moments.mean.to(found.dtype), moments.standard_error.to(found.dtype))


def kl_divergence_from(output: Any, *, key: int | str | None = None, position: int | None = None) -> Callable[[Any], Tensor]:
    """A metric: how far the distribution over classes has moved from that of another output.

        D = sum_c p_c (log p_c - log q_c),    p = softmax(output), q = softmax(the output measured)

    Args:
        output: of the clean run: logits [B, C], or [B, S, C]; of a structure, with `key`.
        key: of the logits in the output, such as `"logits"`.
        position: which of S positions; None for the mean over all.

    Returns:
        A function of an output to Tensor [B], 0 for the same distributions: lower is better, as `acdc` needs it.

    Raises:
        TargetError: no such tensor, or no such position, in an output.

    Examples:
        >>> kl_divergence_from(torch.zeros(1, 2))(torch.tensor([[0.0, 1.0]]))
        tensor([0.1201])
    """

    def log_probabilities(output: Any) -> Tensor:
        try:
            logits = output if key is None else structure.get(output, key)
        except (LookupError, AttributeError):
            logits = None
        if not isinstance(logits, Tensor) or logits.ndim < 2:
            raise TargetError(f"the output is {describe(output)}; kl_divergence_from needs logits [B, ..., C]; give key=...")
        if position is None:
            return logits.log_softmax(-1)
        if logits.ndim < 3 or not -logits.shape[1] <= position < logits.shape[1]:
            raise TargetError(
                f"position={position} is out of range for logits that are {describe(logits)}; give one of [B, S, C]."
            )
        return logits[:, position].log_softmax(-1)

    reference = log_probabilities(output).detach()

    def divergence(output: Any) -> Tensor:
        apart = reference.exp() * (reference - log_probabilities(output))
        found = torch.where(reference == -torch.inf, 0, apart).sum(-1)  # a class that cannot be adds nothing
        return found.flatten(1).mean(1) if found.ndim > 1 else found

    return divergence
