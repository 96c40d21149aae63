"""What a method explains or changes: the tensors of the inputs, or the values at sites, and the model as a function of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.func import vjp
from torch.utils import _pytree as pytree

from .batching import pull_each
from .checks import flatten_as
from .errors import InputError
from .replay import Tape
from .structure import describe
from .targets import Targets, select
from .transforms import Sites, exact_wants, require_sites


@dataclass(frozen=True)
class Explained:
    """Tensors, and the model as a function of them.

    Attributes:
        values: the tensors, as they are in the run.
        evaluate: the output of the model with other tensors in their place.
        shifted: the output with shifts added to them. Of two sites, one after the other, the later one then still depends on
            the earlier, so that its gradient is the total derivative; with `evaluate` it is cut off.
        restructure: from one result for each tensor (with leading dimensions, if any) to the structure of what is explained.
        flatten: the reverse, for an argument with a name that has this structure.
    """

    values: list[Tensor]
    evaluate: Callable[[Sequence[Tensor]], Any]
    shifted: Callable[[Sequence[Tensor]], Any]
    restructure: Callable[[Sequence[Any]], Any]
    flatten: Callable[[str, Any], list[Any]]


def explained(f: Callable, params: Any, inputs: Any, at: Sites | None = None) -> Explained:
    """The floating-point tensors of the inputs, or with `at` the values at sites, which costs one forward pass.

    Raises:
        InputError: nothing floating-point to explain. SiteError: as `capture`, for `at`.
    """
    return explained_inputs(f, params, inputs) if at is None else explained_sites(f, params, inputs, at)


def explained_inputs(f: Callable, params: Any, inputs: Any) -> Explained:
    """The floating-point tensors of the inputs; others are passed through."""
    leaves, spec = pytree.tree_flatten(inputs)
    moving = moving_leaves(leaves)
    if not moving:
        raise InputError(
            f"inputs is {describe(inputs)}, which has no floating-point tensor to attribute to; for token ids pass "
            "at=<site of the embedding>."
        )
    values = [leaves[i] for i in moving]

    def evaluate(moved: Sequence[Tensor]) -> Any:
        return f(params, pytree.tree_unflatten(placed(leaves, moving, moved), spec))

    def shifted(shifts: Sequence[Tensor]) -> Any:
        return evaluate([value + shift for value, shift in zip(values, shifts)])

    def restructure(results: Sequence[Any]) -> Any:
        if isinstance(inputs, Tensor):
            return results[0]
        if isinstance(inputs, TensorDictBase):
            lead = results[0].shape[: results[0].ndim - values[0].ndim]
            return TensorDict(dict(zip(_names(inputs), results)), batch_size=[*lead, *inputs.batch_size])
        return pytree.tree_unflatten(placed([None] * len(leaves), moving, results), spec)

    def flatten(name: str, given: Any) -> list[Any]:
        if isinstance(inputs, TensorDictBase):
            if not isinstance(given, (TensorDictBase, Mapping)):
                raise InputError(f"{name} is {describe(given)}; give a TensorDict, as inputs is one.")
            return [given.get(key) for key in _names(inputs)]
        flat = flatten_as(name, given, inputs)
        return [flat[i] for i in moving]

    return Explained(values, evaluate, shifted, restructure, flatten)


def explained_sites(f: Any, params: Any, inputs: Any, at: Sites) -> Explained:
    """The values at sites of one run of the model. Running the model with other values costs what comes after the sites."""
    require_sites(f)
    wants = exact_wants(f, at, "at")
    names = [str(want.site) for want in wants]
    tape = Tape(f, params, inputs, wants)
    values = [tape.values[want] for want in wants]
    for value, name in zip(values, names):
        if not value.is_floating_point():
            raise InputError(f"at has {name!r}, which holds {describe(value)}; give a site of floating-point values.")

    def evaluate(moved: Sequence[Tensor]) -> Any:
        return tape.resume(dict(zip(wants, moved)))

    def shifted(shifts: Sequence[Tensor]) -> Any:
        return tape.resume({want: _adding(shift) for want, shift in zip(wants, shifts)})

    def restructure(results: Sequence[Any]) -> TensorDict:
        return TensorDict(dict(zip(names, results)), batch_size=[])

    def flatten(name: str, given: Any) -> list[Any]:
        if not isinstance(given, (Mapping, TensorDictBase)) or set(given.keys()) != set(names):
            raise InputError(f"{name} is {describe(given)}; it is keyed by the sites of at, {', '.join(names)}.")
        return [given[site] for site in names]

    return Explained(values, evaluate, shifted, restructure, flatten)


def target_gradients(what: Explained, targets: Targets, chunk_size: int | None = None) -> tuple[list[Tensor], Tensor, bool]:
    """The gradient of every target with respect to each tensor, in one forward pass and T vmapped backward passes.

    Args:
        what: the tensors and the model.
        targets: the scalars to differentiate, checked before (`core.targets.check`).
        chunk_size: how many targets are pulled back at once; None for all.

    Returns:
        The gradients, each [T, *shape]; the target values [*B, T]; whether there are several targets, so that the leading
        dimension T belongs to the result (`restructure(gradients if plural else [g[0] for g in gradients])`).
    """
    several = []

    def values(shifts: list[Tensor]) -> Tensor:
        chosen, plural = select(targets, what.shifted(shifts))
        several.append(plural)
        return chosen

    chosen, pull, *_ = vjp(values, [torch.zeros_like(value) for value in what.values])
    (gradients,) = pull_each(pull, chosen, torch.ones_like(chosen[..., :1]), chunk_size)
    return list(gradients), chosen, several[0]


def moving_leaves(leaves: Sequence[Any]) -> list[int]:
    """Which leaves of the inputs are explained: the floating-point tensors."""
    return [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def placed(leaves: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """The leaves with some of them replaced."""
    result = list(leaves)
    for place, value in zip(places, values):
        result[place] = value
    return result


def _names(inputs: TensorDictBase) -> list[Any]:
    return [key for key, value in inputs.items(True, True) if value.is_floating_point()]


def _adding(shift: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: value + shift
