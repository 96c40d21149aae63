"""The target values as a function of which groups of features are present, which all perturbation methods ask for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.batching import chunks, vmap_or_loop
from ..core.errors import InputError
from ..core.explained import Explained
from ..core.groups import Groups, feature_groups
from ..core.progress import Progress
from ..core.structure import describe
from ..core.targets import Targets, select


@dataclass(frozen=True)
class Game:
    """The model as a function of changed tensors, with what is known of the unchanged ones.

    Attributes:
        what: the tensors and the model.
        starts: for each tensor its baseline, or nothing where a method has none.
        groups: the features.
        targets: which scalars of the output.
        whole: Tensor [*B, T], the target values with everything present.
        plural: whether T is a dimension of the result.
    """

    what: Explained
    starts: Sequence[Tensor]
    groups: Groups
    targets: Targets
    whole: Tensor
    plural: bool

    @property
    def device(self) -> torch.device:
        return self.what.values[0].device

    def values(self, moved: Sequence[Tensor]) -> Tensor:
        """The target values [*B, T] with other tensors."""
        return select(self.targets, self.what.evaluate(moved))[0]

    def each(self, move: Callable[..., list[Tensor]], *arguments: Tensor) -> Tensor:
        """The target values [n, *B, T] with the tensors `move(*row)`, for every row of the arguments, all at once."""
        return vmap_or_loop(lambda rows: self.values(move(*rows)), arguments)

    def keep(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """The tensors with their baselines where a mask is False."""
        return [torch.where(mask, end, start) for mask, end, start in zip(masks, self.what.values, self.starts)]

    def play(self, present: Tensor) -> Tensor:
        """The target values [n, *B, T] of coalitions, a bool Tensor [n, G]."""
        return self.each(lambda row: self.keep(self.groups.masked(row)), present)

    def empty(self) -> Tensor:
        """The target values [*B, T] with nothing present."""
        return self.values(list(self.starts))

    def result(self, scores: Tensor) -> Any:
        """The result of a method from scores [*B, T, G].

        In the structure of what is explained where every element is a group of its own; otherwise one Tensor, [*B, G] or
        [T, *B, G].
        """
        by_target = scores.movedim(-2, 0)
        if self.groups.single:
            return self.restructure(self.groups.spread(by_target))
        dtype = functools.reduce(torch.promote_types, (value.dtype for value in self.what.values))
        return (by_target if self.plural else by_target[0]).to(dtype)

    def restructure(self, results: Sequence[Tensor]) -> Any:
        """The result of a method from tensors [T, *shape]."""
        typed = [result.to(value.dtype) for result, value in zip(results, self.what.values)]
        return self.what.restructure(typed if self.plural else [t[0] for t in typed])


def game(what: Explained, starts: Sequence[Tensor], targets: Targets, groups: Any = None) -> Game:
    """The game of some tensors; costs one run of `what`.

    Raises:
        InputError: tensors whose first axis does not count the examples of the target values; as `feature_groups`.
    """
    whole, plural = select(targets, what.evaluate(what.values))
    batched = whole.ndim == 2
    for value in what.values:
        if batched and (value.ndim == 0 or value.shape[0] != whole.shape[0]):
            raise InputError(
                f"inputs (or a site of at) holds {describe(value)}, but there are target values for {whole.shape[0]} examples; "
                "give every tensor the same batch axis, bind others into f, or return a scalar for the whole batch."
            )
    return Game(what, starts, feature_groups(groups, what, batched), targets, whole, plural)


def tracked(length: int, chunk_size: int | None, progress: Progress | None) -> Iterator[slice]:
    """Chunks of `range(length)`; progress is told at the start and after each of them."""
    if progress is not None:
        progress(0, length)
    for part in chunks(length, chunk_size):
        yield part
        if progress is not None:
            progress(part.stop, length)
