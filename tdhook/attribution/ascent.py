"""Moving points along gradients: many targets, each with a point of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.func import vjp
from torch.utils import _pytree as pytree

from ..core.batching import vmap_or_loop
from ..core.errors import InputError
from ..core.explained import Explained, explained_inputs, moving_leaves, placed
from ..core.structure import describe
from ..core.transforms import Sites

UPDATES = ("gradient", "sign", "normalized")
Bounds = tuple[float | Tensor | None, float | Tensor | None]


def own_gradients(
    value: Callable[[list[Tensor], Tensor], Tensor], points: list[Tensor], units: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The gradient of each target at its own point, in one forward and one backward pass for each.

    Args:
        value: function of the moved tensors and a row of `units`, to Tensor [*B]; see `own`.
        points: each [K, *shape], for K of the T targets.
        units: boolean Tensor [K, T], True for the target that a point belongs to.

    Returns:
        The gradients, each [K, *shape], and the values [K, *B].
    """
    values, pull, *_ = vjp(lambda moved: vmap_or_loop(lambda both: value(*both), (moved, units)), points)
    (gradients,) = pull(torch.ones_like(values))
    return list(gradients), values


def own(scores: Tensor, unit: Tensor) -> Tensor:
    """The score [*B] of one target out of [*B, T]; what the others are there (infinite, say) does not reach its gradient."""
    return torch.where(unit, scores, torch.zeros_like(scores)).sum(-1)


def own_units(count: int, chunk: slice, like: Tensor) -> Tensor:
    """The rows of `own_gradients` for a chunk of the targets."""
    return torch.eye(count, dtype=torch.bool, device=like.device)[chunk]


def require_batched(values: Sequence[Tensor], batch: Sequence[int]) -> None:
    """Raises `InputError` unless each tensor begins with the batch dimensions that the target values have."""
    for value in values:
        if list(value.shape[: len(batch)]) != list(batch):
            raise InputError(
                f"inputs hold {describe(value)}, the target values have shape {list(batch)}; the first dimension of what moves "
                "counts the examples."
            )


def across(tensors: Sequence[Tensor], lead: int) -> Tensor:
    """The Euclidean norm over all tensors and all dimensions but the first `lead`: [*lead]."""
    return torch.stack([t.flatten(lead).norm(dim=-1) if t.ndim > lead else t.abs() for t in tensors]).norm(dim=0)


def scaled(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """The tensors times a factor [*lead]."""
    return [t * factor.reshape(*factor.shape, *[1] * (t.ndim - factor.ndim)) for t in tensors]


def direction(gradients: list[Tensor], update: str, lead: int) -> list[Tensor]:
    """The gradients themselves, their signs, or all of an example's scaled to the Euclidean norm 1 (zero stays zero)."""
    if update == "gradient":
        return gradients
    if update == "sign":
        return [g.sign() for g in gradients]
    norm = across(gradients, lead)
    return scaled(gradients, torch.where(norm > 0, 1 / norm, torch.zeros_like(norm)))


def require_update(name: str, update: Any) -> None:
    """Raises `InputError` for an unknown update."""
    if update not in UPDATES:
        raise InputError(f"{name}={update!r} is unknown; choose from {', '.join(UPDATES)}.")


def require_bounds(bounds: Any) -> None:
    """Raises `InputError` for what is no pair of bounds."""
    if bounds is None:
        return
    known = isinstance(bounds, (tuple, list)) and len(bounds) == 2
    if not known or not all(b is None or (isinstance(b, (int, float, Tensor)) and not isinstance(b, bool)) for b in bounds):
        raise InputError(f"bounds is a pair (lowest, highest) of numbers, tensors or None, got {describe(bounds)}.")
    low, high = bounds
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
        raise InputError(f"bounds={bounds!r} has its lowest above its highest value; swap them.")


def bounded(tensors: Sequence[Tensor], bounds: Bounds | None) -> list[Tensor]:
    """The tensors, clamped."""
    low, high = (None, None) if bounds is None else bounds
    lifted = [t if low is None else t.clamp(min=low) for t in tensors]
    return [t if high is None else t.clamp(max=high) for t in lifted]


@dataclass(frozen=True)
class Packing:
    """Between the tensors that move and what the caller knows: complete inputs, or a TensorDict keyed by site.

    Attributes:
        what: the tensors that move.
        pack: one such structure from moved tensors.
        inputs: the caller's inputs, or None at sites.
    """

    what: Explained
    pack: Callable[[Sequence[Tensor]], Any]
    inputs: Any

    @classmethod
    def of(cls, what: Explained, inputs: Any, at: Sites | None) -> Packing:
        if at is not None:
            return cls(what, what.restructure, None)
        return cls(what, explained_inputs(lambda _, moved: moved, None, inputs).evaluate, inputs)

    def unpack(self, name: str, given: Any) -> list[Tensor]:
        """The tensors of a structure that a function of the caller returned."""
        flat = self.what.flatten(name, given)
        for new, value in zip(flat, self.what.values):
            if not isinstance(new, Tensor) or new.shape != value.shape:
                raise InputError(f"{name} is {describe(new)} for {describe(value)}; return tensors of the same shape.")
        return flat

    def result(self, moved: list[Tensor], plural: bool) -> Any:
        """The structure with a leading dimension T where there are several targets; other leaves stay as they are."""
        if isinstance(self.inputs, TensorDictBase):
            whole = self.inputs.expand(len(moved[0]), *self.inputs.batch_size) if plural else self.inputs
            # A copy of the structure, not of the tensors: it can be written where the caller's is locked.
            return whole.copy().update(self.what.restructure(moved))
        if self.inputs is None or isinstance(self.inputs, Tensor):
            return self.what.restructure(moved)
        leaves, spec = pytree.tree_flatten(self.inputs)
        return pytree.tree_unflatten(placed(leaves, moving_leaves(leaves), moved), spec)
