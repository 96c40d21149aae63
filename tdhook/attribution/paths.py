"""Straight paths from baselines to inputs, or between the activations of the two at sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.checks import flatten_as
from ..core.errors import InputError
from ..core.explained import Explained, explained, moving_leaves, placed
from ..core.reading import stop_at
from ..core.structure import describe
from ..core.transforms import Sites, exact_wants, require_sites, values_at


@dataclass(frozen=True)
class Path:
    """A straight line of several tensors that move together.

    Attributes:
        starts: the tensors at the beginning.
        explained: the tensors at the end, and the model as a function of them.
    """

    starts: list[Tensor]
    explained: Explained

    @property
    def ends(self) -> list[Tensor]:
        return self.explained.values


def straight_path(f: Any, params: Any, inputs: Any, baselines: Any, at: Sites | None) -> Path:
    """The path of the inputs, or with `at` of the values at sites."""
    if at is None:
        end = explained(f, params, inputs)
        return Path(_input_starts(baselines, inputs, end), end)
    require_sites(f)
    names = [str(want.site) for want in exact_wants(f, at, "at")]
    base_inputs = None if _by_site(f, baselines, at) else _baseline_inputs(inputs, baselines)
    end = explained(f, params, inputs, at)
    if base_inputs is None:
        given = list(values_at(exact_wants(f, at, "at"), baselines, "baselines").values())
    else:
        head = stop_at(f, names)(params, base_inputs)
        given = [head[name] for name in names]
    return Path([_start(value, e, f"baselines for {name!r}") for value, e, name in zip(given, end.values, names)], end)


def _by_site(f: Any, baselines: Any, at: Sites) -> bool:
    """Whether baselines are values at the sites rather than inputs."""
    if not isinstance(baselines, (Mapping, TensorDictBase)):
        return False
    wants = exact_wants(f, at, "at")
    return bool({str(k) for k in baselines.keys()} & ({w.request for w in wants} | {str(w.site) for w in wants}))


def _input_starts(baselines: Any, inputs: Any, end: Explained) -> list[Tensor]:
    """One start for each tensor of the inputs that moves."""
    if isinstance(baselines, (int, float)) and not isinstance(baselines, bool):
        return [torch.full_like(value, baselines) for value in end.values]
    given = end.flatten("baselines", baselines)
    return [_start(start, value, "baselines") for start, value in zip(given, end.values)]


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


def _baseline_inputs(inputs: Any, baselines: Any) -> Any:
    """The inputs of the baseline run: a number fills what is floating-point, a structure is taken as it is."""
    leaves, spec = pytree.tree_flatten(inputs)
    if isinstance(baselines, (int, float)) and not isinstance(baselines, bool):
        moving = moving_leaves(leaves)
        if not moving:
            raise InputError(
                f"baselines={baselines!r} cannot stand for {describe(inputs)}; pass inputs of the same kind (other token ids), "
                "or {site: value} for the sites of at."
            )
        return pytree.tree_unflatten(placed(leaves, moving, [torch.full_like(leaves[i], baselines) for i in moving]), spec)
    given = flatten_as("baselines", baselines, inputs)
    for value, leaf in zip(given, leaves):
        if isinstance(leaf, Tensor) and (not isinstance(value, Tensor) or value.shape != leaf.shape):
            raise InputError(
                f"baselines holds {describe(value)} for {describe(leaf)}; give the shape of inputs, or {{site: value}} for at."
            )
    return baselines
