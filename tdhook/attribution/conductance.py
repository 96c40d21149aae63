"""What hidden units pass on while the inputs move from baselines: internal influence and layer conductance."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch import Tensor

from ..core.batching import vmap_or_loop
from ..core.checks import warn_if_stochastic
from ..core.forward_mode import push_forward
from ..core.functional import FunctionalModel
from ..core.targets import Targets
from ..core.transforms import Sites
from .walks import checked_rule, gradients_at_sites, parts_of, walk_of


def internal_influence(
    f: FunctionalModel,
    params: Any,
    inputs: Any,
    *,
    at: Sites,
    targets: Targets = None,
    baselines: Any = 0.0,
    along: Sites | None = None,
    steps: int = 50,
    quadrature: str = "gauss_legendre",
    chunk_size: int | None = None,
) -> TensorDict:
    """The mean gradient at sites while the inputs move from baselines to their values.

        influence_j = sum_s w_s dF/dA_j(x' + alpha_s (x - x'))

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them. All floating-point tensors move together; others are passed through.
        at: exact sites A, one or several. Of two sites, one after the other, each gets its total derivative.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        baselines: x': a number, or the structure of `inputs`. With `along` also a mapping from each of those sites to a value.
        along: sites whose values move instead of the inputs, such as the embedding of token ids.
        steps: number of path points.
        quadrature: as in `integrated_gradients`.
        chunk_size: how many copies of the model run at once (path points, times targets in the backward); None for all. It
            bounds memory and does not change the result.

    Returns:
        TensorDict keyed by site: each has the shape of the value there, with a leading dimension T for plural targets.

    Raises:
        InputError: baselines that do not fit, a bad `steps`, `quadrature` or `chunk_size`. SiteError: as `capture`.
            TargetError, GradientError (grad mode is off), ModelError (a plain function). Warns for a model in train mode.

    Cost: one forward pass up to the sites, `steps` forward passes, vmapped; `steps * T` backward passes to the sites, vmapped.

    Source: Leino et al., "Influence-Directed Explanations for Deep Convolutional Networks" (2018).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))
        >>> influence = internal_influence(f, params, torch.randn(5, 3), at="0", targets=1)
        >>> torch.allclose(influence["0"], params["1", "weight"][1].expand(5, 4))
        True
    """
    nodes, weights = checked_rule("internal_influence", f, targets, steps, quadrature, chunk_size)
    warn_if_stochastic(f, "internal_influence")
    walk = walk_of(f, params, inputs, baselines, along, at, "at")
    totals: list[Tensor] = []
    plural = False
    for chunk, at_once in parts_of(steps, chunk_size):
        points = walk.points(nodes[chunk])
        summed, plural = gradients_at_sites(walk, targets, points, weights[chunk], _over_points, at_once)
        totals = [t + g for t, g in zip(totals, summed)] if totals else summed
    return TensorDict(dict(zip(walk.sites, totals if plural else [t[0] for t in totals])), batch_size=[])


def layer_conductance(
    f: FunctionalModel,
    params: Any,
    inputs: Any,
    *,
    at: Sites,
    targets: Targets = None,
    baselines: Any = 0.0,
    along: Sites | None = None,
    steps: int = 50,
    quadrature: str = "gauss_legendre",
    chunk_size: int | None = None,
) -> TensorDict:
    """How much of the change of the output from baselines to inputs passes each unit at sites.

        conductance_j = sum_s w_s dF/dA_j * dA_j/dalpha,   both at x' + alpha_s (x - x')

    The units of a layer that all of the output depends on, and depends on only through it, sum to F(x) - F(x').

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them. All floating-point tensors move together; others are passed through.
        at: exact sites A, one or several, each explained for itself.
        targets: as in `internal_influence`.
        baselines: as in `internal_influence`.
        along: as in `internal_influence`.
        steps: as in `internal_influence`.
        quadrature: as in `internal_influence`.
        chunk_size: as in `internal_influence`.

    Returns:
        TensorDict keyed by site: each has the shape of the value there, with a leading dimension T for plural targets.

    Raises:
        InputError: as `internal_influence`.

    Cost: as `internal_influence`, and `steps` forward-mode passes up to the sites, vmapped. The derivative dA/dalpha is exact;
    with the difference of A between path points in its place the error would be of order 1 / steps. Fused attention runs in
    its plain form there.

    Source: Dhamdhere, Sundararajan, Yan, "How Important is a Neuron?" (2018).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)))
        >>> x = torch.randn(5, 3)
        >>> conductance = layer_conductance(f, params, x, at="1", targets=0)["1"]
        >>> torch.allclose(conductance.sum(1), (f(params, x) - f(params, 0 * x))[:, 0], atol=1e-5)
        True
    """
    nodes, weights = checked_rule("layer_conductance", f, targets, steps, quadrature, chunk_size)
    warn_if_stochastic(f, "layer_conductance")
    walk = walk_of(f, params, inputs, baselines, along, at, "at")
    totals: list[Tensor] = []
    plural = False
    for chunk, at_once in parts_of(steps, chunk_size):
        points = walk.points(nodes[chunk])
        velocities = [(e - s).expand(p.shape) for s, e, p in zip(walk.path.starts, walk.path.ends, points)]
        _, rates = push_forward(lambda moved: vmap_or_loop(walk.values, moved), (points,), (velocities,))

        def products(gradients: list[Tensor], rates: list[Tensor] = rates) -> list[Tensor]:
            return _over_points([g * rate for g, rate in zip(gradients, rates)])

        summed, plural = gradients_at_sites(walk, targets, points, weights[chunk], products, at_once)
        totals = [t + s for t, s in zip(totals, summed)] if totals else summed
    return TensorDict(dict(zip(walk.sites, totals if plural else [t[0] for t in totals])), batch_size=[])


def _over_points(gradients: list[Tensor]) -> list[Tensor]:
    return [g.sum(0) for g in gradients]
