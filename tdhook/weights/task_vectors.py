"""Task vectors: what fine-tuning changed, as data to add, negate, scale and combine.

A task vector is a TensorDict of differences, so `a + b`, `-a` and `0.5 * a` are what they look like. It holds floating-point
tensors only: a counter (`num_batches_tracked`) and any other integer stays what it is in the params that a vector is added to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ..core.batching import vmap_or_loop
from ..core.checks import require_positive
from ..core.compat import is_compiling, is_wrapped
from ..core.errors import InputError, ParamsError, TargetError
from ..core.structure import describe
from .selection import (
    Key,
    Select,
    by_parameter,
    flat,
    nest,
    parameter_name,
    replaced,
    require_params,
    require_same_structure,
    select_parameters,
)

Coefficient = float | Tensor | Mapping[str, Any]


class Strength(NamedTuple):
    """The choice of a strength.

    Attributes:
        strength: Tensor []: the one of the best metric among the adequate ones, the first of equal ones; NaN where none is.
        metric: see `control`.
        control: Tensor [K]: both curves over the strengths.
        adequate: bool Tensor [K]: where the control metric is high enough.
        base_control: Tensor []: the control metric of the params without the vector.
    """

    strength: Tensor
    metric: Tensor
    control: Tensor
    adequate: Tensor
    base_control: Tensor


def task_vector(finetuned: TensorDictBase, base: TensorDictBase, *, select: Select = None) -> TensorDict:
    """What fine-tuning changed.

        tau = finetuned - base

    Args:
        finetuned: see `base`.
        base: params of the same structure.
        select: names or patterns of parameters or modules; None: all floating-point tensors, buffers among them.

    Returns:
        TensorDict of the differences of the selected tensors.

    Raises:
        ParamsError: params of different structure, no such parameter.

    Cost: one subtraction.

    Source: Ilharco et al., "Editing Models with Task Arithmetic" (2023).

    Examples:
        >>> _, base = tdhook.functionalize(torch.nn.Linear(2, 1))
        >>> _, finetuned = tdhook.functionalize(torch.nn.Linear(2, 1))
        >>> vector = task_vector(finetuned, base)
        >>> torch.allclose(add_task_vectors(base, vector)["weight"], finetuned["weight"])
        True
    """
    require_params("finetuned", finetuned)
    require_params("base", base)
    require_same_structure("finetuned", finetuned, "base", base)
    start = flat(base)
    chosen = select_parameters(finetuned, select)
    return nest({key: tensor - start[key] for key, tensor in chosen.items()}, finetuned.batch_size)


def add_task_vectors(
    params: TensorDictBase,
    vectors: TensorDictBase | Sequence[TensorDictBase],
    coefficients: Coefficient | Sequence[Coefficient] = 1.0,
) -> TensorDict:
    """Adds task vectors, each with its coefficient.

        theta' = theta + sum_t lambda_t tau_t

    Args:
        params: what they are added to, often the base of the vectors; a coefficient of -1 unlearns a task.
        vectors: one task vector or several.
        coefficients: for one vector a number, a tensor [] (vmap over it to try many), or a mapping from names or patterns of
            parameters to coefficients, layer by layer: of two patterns that match the later one counts, and what none matches
            is not added. For several vectors also a sequence, one for each.

    Returns:
        Params of the same dtypes. What no vector holds is shared with `params`.

    Raises:
        ParamsError: a vector that does not fit `params`, an unknown name. InputError: another number of coefficients than of
            vectors, or something that is no coefficient.

    Cost: one addition for each vector.

    Source: Ilharco et al. (2023); layer by layer Yang et al., "AdaMerging" (2024).

    Examples:
        >>> _, params = tdhook.functionalize(torch.nn.Linear(2, 1))
        >>> forgotten = add_task_vectors(params, task_vector(params, 0 * params), -1.0)
        >>> forgotten["weight"]
        tensor([[0., 0.]])
        >>> halved = add_task_vectors(params, 0 * params - params, {"bias": 0.5})
        >>> torch.equal(halved["bias"], params["bias"] / 2), halved["weight"] is params["weight"]
        (True, True)
    """
    require_params("params", params)
    given: list[Any] = [vectors] if isinstance(vectors, TensorDictBase) else list(vectors)
    if not given:
        raise InputError("vectors is empty; give at least one task vector.")
    each = list(coefficients) if isinstance(coefficients, (list, tuple)) else [coefficients] * len(given)
    if len(each) != len(given):
        raise InputError(f"coefficients has {len(each)} entries for {len(given)} task vectors; give one for each.")
    tensors = flat(params)
    changed: dict[Key, Tensor] = {}
    for number, (vector, coefficient) in enumerate(zip(given, each)):
        name = f"vectors[{number}]" if len(given) > 1 else "vectors"
        require_params(name, vector)
        parts = flat(vector)
        _require_fit(name, parts, tensors)
        for key, factor in _factors(vector, parts, coefficient).items():
            start = changed.get(key, tensors[key])
            changed[key] = start + (factor * parts[key]).to(start.dtype)
    return replaced(params, changed)


def analogy(a: TensorDictBase, b: TensorDictBase, c: TensorDictBase) -> TensorDict:
    """The task vector of a fourth task, which is to the third what the second is to the first.

        tau_d = tau_c + (tau_b - tau_a)        "a is to b as c is to d"

    Args:
        a: see `c`.
        b: see `c`.
        c: task vectors of the same structure.

    Returns:
        A task vector.

    Raises:
        ParamsError: vectors of different structure.

    Cost: two additions.

    Source: Ilharco et al. (2023).

    Examples:
        >>> from tensordict import TensorDict
        >>> a, b, c = (TensorDict(w=torch.tensor([x])) for x in (1.0, 3.0, 10.0))
        >>> analogy(a, b, c)["w"]
        tensor([12.])
    """
    for name, vector in (("a", a), ("b", b), ("c", c)):
        require_params(name, vector)
    require_same_structure("a", a, "b", b)
    require_same_structure("a", a, "c", c)
    first, second = flat(a), flat(b)
    return nest({key: tensor + (second[key] - first[key]) for key, tensor in flat(c).items()}, c.batch_size)


def choose_strength(
    params: TensorDictBase,
    vector: TensorDictBase,
    metric: Callable[[TensorDict], Tensor],
    control: Callable[[TensorDict], Tensor],
    *,
    strengths: Tensor,
    adequacy: float = 0.95,
    chunk_size: int | None = None,
) -> Strength:
    """The strength of a task vector that is best for a task and does not spoil another one.

        alpha* = argmax { metric(theta + alpha tau) : control(theta + alpha tau) >= adequacy * control(theta) }

    Args:
        params: theta.
        vector: tau; negate it to forget a task (with a metric that is high where the task is forgotten).
        metric: function of params to a tensor []: high is good.
        control: function of params to a tensor [], such as an accuracy on other data: high is good, not negative.
        strengths: Tensor [K] of the strengths to try.
        adequacy: the share of the control metric that has to be left, from 0 to 1.
        chunk_size: how many strengths at once; None for all.

    Returns:
        `Strength`: the choice and both curves.

    Raises:
        InputError: strengths that are no vector, an adequacy out of range, a negative control metric of the params.
        TargetError: a metric that is no scalar. ParamsError: as `add_task_vectors`.

    Cost: K evaluations of both metrics, vmapped, and one more of the control metric.

    Source: Ilharco et al. (2023), who keep 95 % of the control accuracy.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(1, 1, bias=False))
        >>> params["weight"] = torch.tensor([[1.0]])
        >>> score = lambda p: -(p["weight"] - 2).square().sum()
        >>> control = lambda p: (2 - p["weight"]).clamp(0, 1).sum()
        >>> chosen = choose_strength(params, params, score, control, strengths=torch.tensor([0.0, 0.25, 1.0]), adequacy=0.7)
        >>> chosen.strength, chosen.adequate
        (tensor(0.2500), tensor([ True,  True, False]))
    """
    require_params("params", params, single=True)
    require_positive("chunk_size", chunk_size, optional=True)
    if not isinstance(strengths, Tensor) or strengths.ndim != 1 or not len(strengths) or not strengths.is_floating_point():
        raise InputError(f"strengths is a floating-point tensor [K] of at least one, got {describe(strengths)}.")
    if not isinstance(adequacy, (int, float)) or isinstance(adequacy, bool) or not 0 <= adequacy <= 1:
        raise InputError(f"adequacy={adequacy!r} is the share of the control metric to keep, from 0 to 1.")
    base_control = _scalar("control", control(params))
    if not (is_compiling() or is_wrapped(base_control)) and bool(base_control < 0):
        raise InputError(
            "control is negative for params, where a share of it means nothing; give one that is not, as an accuracy."
        )

    def measured(strength: Tensor) -> tuple[Tensor, Tensor]:
        edited = add_task_vectors(params, vector, strength)
        return _scalar("metric", metric(edited)), _scalar("control", control(edited))

    metrics, controls = vmap_or_loop(measured, strengths, chunk_size)
    adequate = controls >= adequacy * base_control
    best = torch.where(adequate & ~metrics.isnan(), metrics, -torch.inf).argmax()
    # argmax takes any of equal ones; the first is wanted, and a metric of -inf is still one
    candidates = adequate & (metrics == metrics.gather(0, best[None]))
    chosen = strengths.gather(0, candidates.to(torch.uint8).argmax()[None])[0]
    return Strength(torch.where(candidates.any(), chosen, torch.nan), metrics, controls, adequate, base_control)


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        raise TargetError(f"{name} returned {describe(value)}; return a floating-point tensor of shape [].")
    return value


def _require_fit(name: str, parts: dict[Key, Tensor], tensors: dict[Key, Tensor]) -> None:
    for key, part in parts.items():
        if key not in tensors:
            raise ParamsError(f"{name} has {parameter_name(key)!r}, which params has not.")
        start = tensors[key]
        if part.shape != start.shape or part.device != start.device:
            raise ParamsError(
                f"{name} holds {describe(part)} on {part.device} at {parameter_name(key)!r}, where params has "
                f"{describe(start)} on {start.device}."
            )


def _factors(vector: TensorDictBase, parts: dict[Key, Tensor], coefficient: Any) -> dict[Key, Any]:
    """The coefficient of each floating-point tensor of a vector that is added."""
    if isinstance(coefficient, Mapping):
        table = by_parameter(vector, coefficient, "coefficients")
    else:
        table = {key: coefficient for key, part in parts.items() if part.is_floating_point()}
    for value in table.values():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number and not (isinstance(value, Tensor) and value.ndim == 0):
            raise InputError(f"coefficients holds {describe(value)}; give numbers or tensors [], and use vmap for several.")
    return table
