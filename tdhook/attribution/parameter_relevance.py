"""Relevance of parameters: the share of each weight in what a layer passes on."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.func import vjp

from ..core.batching import pull_each
from ..core.errors import ParamsError, RuleError
from ..core.functional import FunctionalModel
from ..core.plan import addresses, live_numbers
from ..core.structure import describe
from ..core.targets import Targets, select
from .relevance import check_options, ready, ruled


def parameter_relevance(
    f: Any,
    params: Any,
    inputs: Any,
    *,
    rules: Any = None,
    targets: Targets = None,
    start: str = "value",
    chunk_size: int | None = None,
) -> TensorDict:
    """Relevance of every parameter, summed over the examples.

        R_w = w * dF/dw  of the model with rules
        for z = W x + b:    sum_j R_W[j, i] = R_x[i],    sum_i R_W[j, i] + R_b[j] + what is absorbed = R_z[j]

    A weight gets the relevance that flows along it from the unit above to the unit below, so the sum over what leaves a unit is
    the relevance that it gets from the layer (less what other layers that read it give), and the sum over what enters a unit is
    its relevance less what bias and stabilizer absorb (for rules that conserve it).

    The weights inside the parts of a rule (W+ of z+, W + gamma W+) are differentiated; the coefficients are constants. What a
    rule takes for a constant gets none: the parameters of norms with `FrozenScale` and of batch norms with `Pass` (merge these,
    `merge_batch_norm`), weights that a rule has cut off with `Stop`.

    Args:
        f: functional model, with rules or without.
        params: its parameters.
        inputs: as `f` takes them.
        rules: as for `lrp`.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        start: the relevance that F starts with: `"value"` for F itself, `"one"` for 1.
        chunk_size: how many targets are pulled back at once; None for all. It bounds memory and does not change the result.

    Returns:
        TensorDict like `params`, of the floating-point parameters without the buffers; with a leading dimension T for plural
        targets. Its absolute values, or those of the loss of a class, are scores for `tdhook.weights.prune`.

    Raises:
        RuleError: as `with_rules`; a first-layer rule (`Flat`, `WSquare`, `ZBox`), for which weights are constants. InputError,
        TargetError, ParamsError: as elsewhere. GradientError: grad mode is off. Warns for a model in train mode.

    Cost: one forward with rules and T vmapped backward passes; memory for T copies of the parameters.

    Source: Yeom et al., "Pruning by explaining: A novel criterion for deep neural network pruning" (2021), per unit; Voita et
    al., "Analyzing Multi-Head Self-Attention" (2019), for the relevance of heads.

    Examples:
        >>> from tdhook.attribution.rules import Epsilon
        >>> f, params = tdhook.functionalize(torch.nn.Linear(2, 1))
        >>> params["weight"], params["bias"] = torch.tensor([[3.0, 1.0]]), torch.tensor([4.0])
        >>> scores = parameter_relevance(f, params, torch.tensor([[1.0, 2.0]]), rules={"linear": Epsilon(0.0)}, targets=0)
        >>> scores["weight"], scores["bias"]
        (tensor([[3., 2.]]), tensor([4.]))
    """
    g = ruled(f, rules, "parameter_relevance")
    check_options(targets, start, chunk_size)
    if not isinstance(params, TensorDictBase):
        raise ParamsError(f"params is a TensorDict as tdhook.functionalize returns it, got {describe(params)}.")
    _require_no_constants(g, params, inputs)
    g = ready(g, params, inputs)
    moving = trained(f, params)
    several = []

    def scores(values: list[Tensor]) -> Tensor:
        chosen, plural = select(targets, g(with_values(params, list(moving), values), inputs))
        several.append(plural)
        return chosen

    values = list(moving.values())
    chosen, pull, *_ = vjp(scores, values)
    weights = torch.ones_like(chosen) if start == "value" else 1 / chosen
    (gradients,) = pull_each(pull, chosen, weights, chunk_size)
    relevance = [gradient * value for gradient, value in zip(gradients, values)]
    plural = several[0]
    nested = TensorDict({}, batch_size=chosen.shape[-1:] if plural else [])
    for key, each in zip(moving, relevance):
        nested.set(key, each if plural else each[0])
    return nested


def trained(f: FunctionalModel, params: TensorDictBase) -> dict[tuple[str, ...], Tensor]:
    """The floating-point parameters, without the buffers, under their paths."""
    owners = f.base.blueprint.tensor_names
    kept: dict[tuple[str, ...], Tensor] = {}
    for name, value in params.items(True, True):
        key = name if isinstance(name, tuple) else (name,)
        buffer = key in owners and owners[key][0][1] == "_buffers"
        if isinstance(value, Tensor) and value.is_floating_point() and not buffer:
            kept[key] = value
    if not kept:
        raise ParamsError("params has no floating-point parameter.")
    return kept


def with_values(params: TensorDictBase, keys: list[tuple[str, ...]], values: list[Tensor]) -> TensorDictBase:
    """`params` with some tensors replaced; the others are shared."""
    shared = params.clone(recurse=False)
    for key, value in zip(keys, values):
        shared.set(key, value)
    return shared


def _require_no_constants(g: Any, params: Any, inputs: Any) -> None:
    lines = tuple(i for i, entry in enumerate(g.rules.entries) if entry.rule.absolute)
    if not lines:
        return
    plan = g.plan(params, inputs)
    for number in live_numbers(plan, lines):
        raise RuleError(
            f"the rule at {addresses(plan)[number]!r} shares relevance without regard to the model's function of the weights, "
            "which then have none; take a table without a first-layer rule, such as epsilon_plus()."
        )
