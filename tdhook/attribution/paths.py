"""Straight paths from baselines to inputs, or between the activations of the two at sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.checks import flatten_as
from ..core.errors import InputError
from ..core.reading import stop_at
from ..core.replay import Tape
from ..core.structure import describe
from ..core.transforms import Sites, exact_wants, require_sites, values_at


@dataclass(frozen=True)
class Path:
    """A straight line of several tensors that move together, and the model as a function of them.

    Attributes:
        starts: the tensors at the beginning.
        ends: the tensors at the end.
        evaluate: the output of the model for tensors on the way.
        restructure: from one result for each tensor to the structure of what was asked about.
        flatten: the reverse.
    """

    starts: list[Tensor]
    ends: list[Tensor]
    evaluate: Callable[[list[Tensor]], Any]
    restructure: Callable[[list[Tensor]], Any]
    flatten: Callable[[Any], list[Any]]


def straight_path(f: Callable, params: Any, inputs: Any, baselines: Any, at: Sites | None) -> Path:
    """The path of the inputs, or with `at` of the values at sites."""
    return _input_path(f, params, inputs, baselines) if at is None else _site_path(f, params, inputs, baselines, at)


def _input_path(f: Callable, params: Any, inputs: Any, baselines: Any) -> Path:
    leaves, spec = pytree.tree_flatten(inputs)
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not moving:
        raise InputError(
            f"inputs is {describe(inputs)}, which has no floating-point tensor to attribute to; for token ids pass "
            "at=<site of the embedding>."
        )
    ends = [leaves[i] for i in moving]
    starts = _baselines(baselines, inputs, leaves, moving)

    def evaluate(moved: list[Tensor]) -> Any:
        return f(params, pytree.tree_unflatten(_placed(leaves, moving, moved), spec))

    def restructure(results: list[Tensor]) -> Any:
        if isinstance(inputs, Tensor):
            return results[0]
        if isinstance(inputs, TensorDictBase):
            lead = results[0].shape[: results[0].ndim - ends[0].ndim]
            names = [k for k, v in inputs.items(True, True) if v.is_floating_point()]
            return TensorDict(dict(zip(names, results)), batch_size=[*lead, *inputs.batch_size])
        return pytree.tree_unflatten(_placed([None] * len(leaves), moving, results), spec)

    def flatten(attributions: Any) -> list[Any]:
        if isinstance(inputs, TensorDictBase):
            if not isinstance(attributions, TensorDictBase):
                raise InputError(f"attributions is {describe(attributions)}; give a TensorDict, as inputs is one.")
            return [attributions.get(k) for k, v in inputs.items(True, True) if v.is_floating_point()]
        given = flatten_as("attributions", attributions, inputs)
        return [given[i] for i in moving]

    return Path(starts, ends, evaluate, restructure, flatten)


def _placed(leaves: list[Any], places: list[int], values: list[Any]) -> list[Any]:
    placed = list(leaves)
    for place, value in zip(places, values):
        placed[place] = value
    return placed


def _baselines(baselines: Any, inputs: Any, leaves: list[Any], moving: list[int]) -> list[Tensor]:
    """One start for each moving leaf of the inputs."""
    if isinstance(baselines, (int, float)) and not isinstance(baselines, bool):
        return [torch.full_like(leaves[i], baselines) for i in moving]
    given = flatten_as("baselines", baselines, inputs)
    return [_start(given[i], leaves[i], "baselines") for i in moving]


def _start(value: Any, end: Tensor, name: str) -> Tensor:
    """A baseline in the shape of what it is the baseline of."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full_like(end, value)
    if not isinstance(value, Tensor):
        raise InputError(f"{name} holds {describe(value)}; give a number or a tensor.")
    if value.dtype != end.dtype or value.device != end.device:
        raise InputError(
            f"{name} holds {describe(value)} on {value.device} for {describe(end)} on {end.device}; use .to(inputs)."
        )
    try:
        return value.expand(end.shape)
    except RuntimeError:
        raise InputError(f"{name} holds {describe(value)}, which does not broadcast to {list(end.shape)}.") from None


def _site_path(f: Any, params: Any, inputs: Any, baselines: Any, at: Sites) -> Path:
    require_sites(f)
    wants = exact_wants(f, at, "at")
    names = [str(want.site) for want in wants]
    by_site = isinstance(baselines, (Mapping, TensorDictBase)) and bool(
        {str(k) for k in baselines.keys()} & ({w.request for w in wants} | set(names))
    )
    base_inputs = None if by_site else _baseline_inputs(inputs, baselines)
    tape = Tape(f, params, inputs, wants)
    ends = [tape.values[want] for want in wants]
    if by_site:
        values = list(values_at(wants, baselines, "baselines").values())
    else:
        head = stop_at(f, names)(params, base_inputs)
        values = [head[name] for name in names]
    starts = [_start(value, end, f"baselines for {name!r}") for value, end, name in zip(values, ends, names)]
    for end, name in zip(ends, names):
        if not end.is_floating_point():
            raise InputError(f"at has {name!r}, which holds {describe(end)}; integrate at a floating-point site.")

    def evaluate(moved: list[Tensor]) -> Any:
        return tape.resume(dict(zip(wants, moved)))

    def restructure(results: list[Tensor]) -> TensorDict:
        return TensorDict(dict(zip(names, results)), batch_size=[])

    def flatten(attributions: Any) -> list[Any]:
        if not isinstance(attributions, (Mapping, TensorDictBase)) or set(attributions.keys()) != set(names):
            raise InputError(f"attributions is {describe(attributions)}; it is keyed by the sites of at, {', '.join(names)}.")
        return [attributions[name] for name in names]

    return Path(starts, ends, evaluate, restructure, flatten)


def _baseline_inputs(inputs: Any, baselines: Any) -> Any:
    """The inputs of the baseline run: a number fills what is floating-point, a structure is taken as it is."""
    leaves, spec = pytree.tree_flatten(inputs)
    if isinstance(baselines, (int, float)) and not isinstance(baselines, bool):
        moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not moving:
            raise InputError(
                f"baselines={baselines!r} cannot stand for {describe(inputs)}; pass inputs of the same kind (other token ids), "
                "or {site: value} for the sites of at."
            )
        return pytree.tree_unflatten(_placed(leaves, moving, [torch.full_like(leaves[i], baselines) for i in moving]), spec)
    given = flatten_as("baselines", baselines, inputs)
    for value, leaf in zip(given, leaves):
        if isinstance(leaf, Tensor) and (not isinstance(value, Tensor) or value.shape != leaf.shape):
            raise InputError(
                f"baselines holds {describe(value)} for {describe(leaf)}; give the shape of inputs, or {{site: value}} for at."
            )
    return baselines
