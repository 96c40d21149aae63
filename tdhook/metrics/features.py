"""The features that an attribution scores, and the model as a function of what stands in their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.batching import vmap_or_loop
from ..core.checks import flatten_as
from ..core.errors import InputError
from ..core.explained import Explained, explained
from ..core.groups import Groups, feature_groups
from ..core.structure import describe
from ..core.targets import Targets, check, select
from ..core.transforms import Sites


@dataclass(frozen=True)
class Features:
    """Scores of D features for T targets, and the model.

    Attributes:
        what: the tensors that the features are parts of.
        targets: the scalars F of the output.
        outputs: Tensor [T, *B], F(x) in at least float32. B is empty inside a vmap over examples.
        scores: Tensor [T, *B, D], the attributions of the features in at least float32.
        groups: which feature each element belongs to.
        plural: whether T is a dimension of the result.
    """

    what: Explained
    targets: Targets
    outputs: Tensor
    scores: Tensor
    groups: Groups
    plural: bool

    def evaluate(self, values: Sequence[Tensor]) -> Tensor:
        """F of other tensors, [T, *B]."""
        return _chosen(self.targets, self.what.evaluate(values))[0]

    def evaluate_with(self, masks: Tensor, news: Sequence[Tensor], olds: Sequence[Tensor] | None = None) -> Tensor:
        """F with some features replaced, for N masks at once.

        Args:
            masks: boolean Tensor [N, *B, D], True for what is taken from `news`.
            news: for each tensor the values to put in.
            olds: for each tensor the values to keep; None for those of the input.

        Returns:
            Tensor [N, T, *B].
        """
        kept = self.what.values if olds is None else olds

        def evaluate(parts: list[Tensor]) -> Tensor:
            return self.evaluate([torch.where(part, new, old) for part, new, old in zip(parts, news, kept)])

        return vmap_or_loop(evaluate, self.groups.spread(masks))

    def result(self, values: Tensor) -> Tensor:
        """Without the leading dimension T where there is a single target."""
        return values if self.plural else values[0]


def features(
    f: Callable,
    params: Any,
    inputs: Any,
    attributions: Any,
    targets: Targets,
    at: Sites | None = None,
    groups: Any = None,
) -> Features:
    """The features of the inputs, or with `at` of the values at sites. Costs one forward pass.

    Args:
        f: the model.
        params: its parameters.
        inputs: what it takes.
        attributions: the structure of what is explained, with tensors of its shapes (and a leading dimension T for plural
            targets). A size of 1 in place of a larger one scores all elements along that axis as one feature.
        targets: the scalars that were explained.
        at: sites.
        groups: as `core.groups.feature_groups`; the score of a group is the sum over its members.

    Raises:
        InputError: attributions or groups that do not fit. TargetError, SiteError.
    """
    check(targets)
    what = explained(f, params, inputs, at)
    given = what.flatten("attributions", attributions)
    for attribution, value in zip(given, what.values):
        _require_trailing(attribution, value)
    outputs, plural = _chosen(targets, what.evaluate(what.values))
    batch = outputs.ndim - 1
    lead = outputs.shape if plural else outputs.shape[1:]
    for attribution, value in zip(given, what.values):
        if attribution.shape[: len(lead)] != lead or attribution.ndim - len(lead) != value.ndim - batch:
            expected = [*lead, *value.shape[batch:]]
            raise InputError(f"attributions holds {describe(attribution)} where shape {expected} is expected.")
    aligned = [(a if plural else a[None]).to(outputs.dtype) for a in given]
    if groups is None:
        members = _broadcast_groups([a.shape[1 + batch :] for a in aligned], what.values, batch)
        scores = flattened(aligned, 1 + batch)
    else:
        members = feature_groups(groups, what, bool(batch))
        scores = members.sums([a.expand(len(outputs), *v.shape) for a, v in zip(aligned, what.values)])
    return Features(what, targets, outputs, scores, members, plural)


def flat_scores(name: str, structure: Any, batch_dims: int) -> Tensor:
    """All tensors of a structure as one Tensor [*lead, D], in at least float32; None inside of it is left out.

    Args:
        name: of the argument, for errors.
        structure: tensors that share their first `batch_dims` dimensions.
        batch_dims: how many of the first dimensions count examples (and targets): 1 for [B, ...], 2 for [T, B, ...], 0 inside
            a vmap.

    Raises:
        InputError: something else than floating-point tensors, or other leading dimensions.
    """
    return flattened(leaves_of(name, structure, batch_dims), batch_dims)


def flattened(tensors: Sequence[Tensor], lead: int) -> Tensor:
    """All dimensions but the first `lead` of some tensors as one last dimension."""
    return torch.cat([t.flatten(lead) if t.ndim > lead else t[..., None] for t in tensors], -1)


def leaves_of(name: str, structure: Any, batch_dims: int) -> list[Tensor]:
    """The tensors of a structure in at least float32, checked as in `flat_scores`."""
    if not isinstance(batch_dims, int) or isinstance(batch_dims, bool) or batch_dims not in (0, 1, 2):
        raise InputError(f"batch_dims is 0, 1 or 2, got {describe(batch_dims)}.")
    leaves = [leaf for leaf in flatten_as(name, structure, structure) if leaf is not None]
    if not leaves:
        raise InputError(f"{name} is {describe(structure)}, which holds no tensor.")
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise InputError(f"{name} holds {describe(leaf)}; give floating-point tensors.")
        if leaf.ndim < batch_dims or leaf.shape[:batch_dims] != leaves[0].shape[:batch_dims]:
            raise InputError(
                f"{name} holds {describe(leaf)}; the first batch_dims={batch_dims} dimensions count examples and are the same "
                "in all tensors."
            )
        if not math.prod(leaf.shape[batch_dims:]):
            raise InputError(f"{name} holds {describe(leaf)}, which has no features.")
    dtype = torch.float32
    for leaf in leaves:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return [leaf.to(dtype) for leaf in leaves]


def _require_trailing(attribution: Any, value: Tensor) -> None:
    """What can be known before the model runs, which tells how many targets there are."""
    fits = isinstance(attribution, Tensor) and attribution.is_floating_point() and 0 <= attribution.ndim - value.ndim <= 1
    if not fits or any(a not in (1, v) for a, v in zip(attribution.shape[::-1], value.shape[::-1])):
        raise InputError(
            f"attributions holds {describe(attribution)} for {describe(value)}; give its shape, with a leading dimension for "
            "plural targets, and 1 in place of axes along which elements are one feature."
        )


def _chosen(targets: Targets, output: Any) -> tuple[Tensor, bool]:
    chosen, plural = select(targets, output)
    # Differences of bfloat16 outputs would be mostly rounding in the sums that follow.
    return chosen.movedim(-1, 0).to(torch.promote_types(chosen.dtype, torch.float32)), plural


def _broadcast_groups(shapes: list[torch.Size], values: Sequence[Tensor], batch: int) -> Groups:
    """Each element of the attributions as a group of the elements of the inputs that it broadcasts to."""
    start, ids = 0, []
    for shape, value in zip(shapes, values):
        stop = start + math.prod(shape)
        each = torch.arange(start, stop, device=value.device).reshape(*[1] * batch, *shape)
        ids.append(each.expand(*[1] * batch, *value.shape[batch:]))
        start = stop
    single = all(shape == value.shape[batch:] for shape, value in zip(shapes, values))
    return Groups(ids, start, bool(batch), single)
