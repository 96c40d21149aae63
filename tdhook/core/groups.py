"""Groups of features that are switched on and off together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import require_positive
from .compat import is_compiling, is_wrapped
from .errors import InputError
from .explained import Explained
from .structure import describe

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Groups:
    """Which group each element of the explained tensors belongs to.

    A method takes one in place of the tensors of ids where these cannot be looked at for their maximum: inside of
    `torch.compile` and `vmap`. `Groups([ids], count)` is then all that a caller needs to write.

    Attributes:
        ids: for each explained tensor, in the order of the inputs (or of `at`), an integer Tensor that broadcasts to its shape.
            Equal ids belong together, also in different tensors. An id that no element has stands for a feature without
            influence: it costs what a feature costs and scores 0.
        count: the number of groups G; ids run from 0 to G - 1.
        batched: whether the first axis of the tensors counts examples (set by `feature_groups`).
        single: whether every element of an example is a group of its own, in order (set by `feature_groups`).

    Examples:
        >>> groups = Groups([torch.tensor([[0, 0, 1]])], count=2)
        >>> groups.masked(torch.tensor([True, False]))
        [tensor([[ True,  True, False]])]
        >>> groups.sums([torch.ones(4, 3)]).shape
        torch.Size([4, 2])
    """

    ids: Sequence[Tensor]
    count: int
    batched: bool = True
    single: bool = False

    def masked(self, present: Tensor) -> list[Tensor]:
        """For each tensor a mask that broadcasts to it, the same groups for all examples.

        Args:
            present: Tensor [*P, G] of any dtype, for P coalitions; nothing of it is converted.

        Returns:
            Tensors [*P, 1, *features], or [*P, B, *features] where each example has ids of its own.
        """
        if self.single:
            parts = present.split([ids.numel() for ids in self.ids], -1)
            return [part.reshape(*present.shape[:-1], *ids.shape) for part, ids in zip(parts, self.ids)]
        return [present[..., ids] for ids in self.ids]

    def without(self, group: Tensor | int) -> list[Tensor]:
        """For each tensor a mask that is False in one group only."""
        return [ids != group for ids in self.ids]

    def spread(self, scores: Tensor) -> list[Tensor]:
        """For each tensor the score of the group of every element. The reverse of `sums` for groups of one element.

        Args:
            scores: Tensor [*P, B, G] (without B if not `batched`), of any dtype; also masks that differ among examples.

        Returns:
            Tensors [*P, B, *features].
        """
        if not self.batched:
            return self.masked(scores)
        lead = scores.shape[:-1]
        if self.single:
            parts = scores.split([ids.numel() for ids in self.ids], -1)
        else:
            flat = [ids.reshape(ids.shape[0], -1) for ids in self.ids]
            # An index is faster than a gather, which only ids that differ among examples need.
            parts = [scores[..., f[0]] if len(f) == 1 else scores.gather(-1, f.expand(*lead, f.shape[-1])) for f in flat]
        return [part.reshape(*lead, *ids.shape[1:]) for part, ids in zip(parts, self.ids)]

    def sums(self, attributions: Sequence[Tensor]) -> Tensor:
        """The sum of attributions over the members of each group, in all tensors.

        Args:
            attributions: for each tensor [*P, B, *features] (without B if not `batched`).

        Returns:
            Tensor [*P, B, G].
        """
        axes = int(self.batched)
        total: Any = 0
        for ids, attribution in zip(self.ids, attributions):
            lead = attribution.shape[: attribution.ndim - ids.ndim + axes]
            values = attribution.reshape(*lead, -1)
            index = ids.reshape(*ids.shape[:axes], -1).expand(values.shape)
            total = total + values.new_zeros(*lead, self.count).scatter_add(-1, index, values)
        return total


def feature_groups(groups: Any, what: Explained, batched: bool) -> Groups:
    """The groups of what is explained, from the argument `groups` of a method.

    Args:
        groups: None: every element of one example is a feature of its own, numbered through all tensors. Or integer tensors in
            the structure of `inputs` (keyed by site for `at`) that broadcast to the shapes of the values, with or without the
            batch axis. Or `Groups`.
        what: the tensors.
        batched: whether their first axis counts examples.

    Returns:
        Groups whose ids have the shape [1 or B, *features], or [*features] if not `batched`.

    Raises:
        InputError: ids that are no integers, negative, not below `count`, or do not broadcast; tensors of ids inside of
            `torch.compile` or `vmap`, where their maximum cannot be read.
    """
    if groups is None:
        return _single(what.values, batched)
    given = list(groups.ids) if isinstance(groups, Groups) else what.flatten("groups", groups)
    if len(given) != len(what.values):
        raise InputError(f"groups has ids for {len(given)} tensors, but {len(what.values)} are explained.")
    ids = [_aligned(each, value, batched) for each, value in zip(given, what.values)]
    count = groups.count if isinstance(groups, Groups) else _count(ids)
    require_positive("the count of groups", count)
    _require_range(ids, count)
    return Groups(ids, count, batched)


def _single(values: Sequence[Tensor], batched: bool) -> Groups:
    start, ids = 0, []
    for value in values:
        shape = value.shape[1:] if batched else value.shape
        stop = start + math.prod(shape)
        each = torch.arange(start, stop, device=value.device).reshape(shape)
        ids.append(each[None] if batched else each)
        start = stop
    return Groups(ids, start, batched, single=True)


def _aligned(ids: Any, value: Tensor, batched: bool) -> Tensor:
    """Ids [1 or B, *features] of a value."""
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
        raise InputError(f"groups holds {describe(ids)}; give an integer tensor of group ids for each tensor.")
    if ids.device != value.device:
        raise InputError(f"groups holds a tensor on {ids.device} for one on {value.device}; use .to({str(value.device)!r}).")
    try:
        ids.expand(value.shape)
    except RuntimeError:
        raise InputError(f"groups holds {describe(ids)}, which does not broadcast to {list(value.shape)}.") from None
    ids = ids.long().reshape(*[1] * (value.ndim - ids.ndim), *ids.shape)
    # Only the batch axis may stay of length 1: the elements of an example are counted one by one.
    return ids.expand(ids.shape[0], *value.shape[1:]) if batched else ids.expand(value.shape)


def _readable(ids: Sequence[Tensor]) -> bool:
    return not is_compiling() and not any(is_wrapped(each) or each.is_meta for each in ids)


def _count(ids: Sequence[Tensor]) -> int:
    if not _readable(ids):
        raise InputError("groups holds ids that cannot be read inside of torch.compile or vmap; pass Groups([ids], count).")
    return max(1, *(int(each.max()) + 1 for each in ids if each.numel()), 1)


def _require_range(ids: Sequence[Tensor], count: int) -> None:
    if _readable(ids):
        for each in ids:
            wrong = each[(each < 0) | (each >= count)]
            if len(wrong):
                raise InputError(f"groups holds the id {int(wrong[0])}; the ids of {count} groups run from 0 to {count - 1}.")
