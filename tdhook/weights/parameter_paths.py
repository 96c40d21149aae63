"""What a change of the weights did: integrated gradients between two checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import reduce
from tensordict import TensorDict
from torch import Tensor
from torch.func import vjp

from ..core.batching import pull_each
from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.quadrature import quadrature_rule
from ..core.structure import describe
from ..core.targets import Targets, check
from ..core.targets import select as select_targets
from .moving import moving
from .selection import Select, flat, parameter_name, replaced, require_params, require_same_structure


class ParameterPath(NamedTuple):
    """The change between two checkpoints, attributed to weights.

    Attributes:
        attributions: TensorDict like the selected parameters: tensors [*shape], or [T, *shape].
        change: Tensor [] or [T]: F(after) - F(before).
        error: Tensor [] or [T]: |sum of the attributions - change|.
    """

    attributions: TensorDict
    change: Tensor
    error: Tensor


def parameter_integrated_gradients(
    f: Any,
    before: Any,
    after: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    select: Select = None,
    steps: int = 32,
    chunk_size: int | None = None,
) -> ParameterPath:
    """How much each weight contributed to the change of a target between two checkpoints.

        a_i = (after_i - before_i) int_0^1 dF/dp_i(before + t (after - before)) dt,  F(p) = mean_b target(f(p, x_b))

    The attributions sum up to `F(after) - F(before)`, up to the error of Gauss-Legendre quadrature.

    Args:
        f: function of `(params, inputs)`.
        before: see `after`.
        after: parameters of the same structure.
        inputs: of `f`. The target is averaged over the examples; `vmap` over batches of one gives each its own.
        targets: as in every method of attribution; plural targets give a leading dimension T.
        select: names or patterns of the ones that move; the others stay as they are in `before`, and the change is that
            of the selected ones alone. None moves all floating-point tensors, buffers included; tensors of integers are
            those of `after`.
        steps: points of the path.
        chunk_size: how many targets are pulled back at once; None for all. The points of the path run one after the other.

    Returns:
        `ParameterPath` with `attributions`, `change` and `error`.

    Raises:
        ParamsError: parameters of different structure, unknown names. TargetError: targets that do not fit. GradientError: grad
            mode is off. Warns for a model in train mode.

    Cost: `steps` forward passes and T backward passes for each, and two forward passes. Memory: T gradients.

    Source: Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks" (2017), along a path of parameters.

    Examples:
        >>> f, before = tdhook.functionalize(torch.nn.Linear(2, 1))
        >>> after = before.apply(lambda p: p + 1)
        >>> path = parameter_integrated_gradients(f, before, after, torch.tensor([[3.0, 4.0]]), targets=0)
        >>> path.attributions["weight"]
        tensor([[3.0000, 4.0000]])
    """
    require_gradients("parameter_integrated_gradients")
    require_positive("steps", steps)
    require_positive("chunk_size", chunk_size, optional=True)
    check(targets)
    require_params("before", before, single=True)
    require_params("after", after, single=True)
    require_same_structure("before", before, "after", after)
    start = moving(f, before, select, buffers=True)
    end = flat(after)
    fixed = before if select is not None else after
    starts, ends = start.values, [end[key] for key in start.chosen]
    warn_if_stochastic(f, "parameter_integrated_gradients")
    several = []

    def scores(values: list[Tensor]) -> Tensor:
        chosen, plural = select_targets(targets, f(replaced(fixed, dict(zip(start.chosen, values))), inputs))
        several.append(plural)
        return chosen.flatten(0, -2).mean(0) if chosen.ndim > 1 else chosen

    total: list[Any] = [0] * len(starts)
    for node, weight in zip(*quadrature_rule("gauss_legendre", steps)):
        point = [a + node * (b - a) for a, b in zip(starts, ends)]
        values, pull, *_ = vjp(scores, point)
        (gradients,) = pull_each(pull, values, torch.ones_like(values[..., :1]), chunk_size)
        total = [t + weight * g for t, g in zip(total, gradients)]
    with torch.no_grad():
        change = scores(ends) - scores(starts)
    results = [(b - a) * t for a, b, t in zip(starts, ends, total)]
    summed = torch.stack([r.reshape(len(r), -1).sum(1) for r in results]).sum(0)
    error = (summed - change).abs()
    if several[0]:
        return ParameterPath(start.restructure(results, change.shape), change, error)
    return ParameterPath(start.restructure([r[0] for r in results]), change[0], error[0])


def sum_by(attributions: Any, group: int | Callable[[str], str | None]) -> dict[str, Tensor]:
    """Attributions of weights summed over groups of parameters: modules, layers, kinds.

    Args:
        attributions: TensorDict like parameters, with batch size [] or [T].
        group: how many components of the name are kept (2 for `"layers.0"`), or a function from the name of a parameter to
            that of its group, None to leave it out.

    Returns:
        From group to Tensor [] or [T], in the order of the parameters.

    Raises:
        InputError: a group that is neither.

    Examples:
        >>> _, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Linear(1, 2)))
        >>> sum_by(params.apply(torch.ones_like), 1)
        {'0': tensor(3.), '1': tensor(4.)}
    """
    require_params("attributions", attributions)
    if not callable(group):
        require_positive("group", group)
    lead = attributions.batch_dims
    sums: dict[str, Tensor] = {}
    for key, value in flat(attributions).items():
        name = group(parameter_name(key)) if callable(group) else parameter_name(key[:group])
        if name is not None:
            added = value.flatten(lead).sum(-1) if value.ndim > lead else value
            sums[name] = sums[name] + added if name in sums else added
    return sums


def sum_heads(attribution: Tensor, heads: int, axis: int) -> Tensor:
    """Attributions of one weight of an attention layer, summed for each head.

    Args:
        attribution: Tensor [*lead, A, B].
        heads: how many heads the axis holds, one after the other; key-value heads for the weights of keys and values.
        axis: -2 for the rows of query, key and value weights of `nn.Linear`, -1 for the columns of the output weight.

    Returns:
        Tensor [*lead, heads].

    Raises:
        InputError: heads that do not divide the axis, another axis.

    Examples:
        >>> sum_heads(torch.ones(6, 2), 3, axis=-2)
        tensor([4., 4., 4.])
    """
    require_positive("heads", heads)
    if axis not in (-1, -2) or attribution.ndim < 2:
        raise InputError(f"axis={axis!r} is unknown for {describe(attribution)}; give -2 for rows, -1 for columns.")
    if attribution.shape[axis] % heads:
        raise InputError(f"heads={heads} do not divide the {attribution.shape[axis]} numbers of axis {axis}.")
    pattern = "... (head a) b -> ... head" if axis == -2 else "... a (head b) -> ... head"
    return reduce(attribution, pattern, "sum", head=heads)
