"""The parts of a graph: how what a node writes is read off a value, and how a change of what a node reads is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...core.errors import SiteError
from ...core.functional import Functional
from ...core.structure import describe
from ..names import HeadLayout, Projection


@dataclass(frozen=True)
class WriterGroup:
    """Writers whose values are read at one site.

    Attributes:
        site: address.
        names: of the n writers.
        layout, projection: heads, and the map that they enter the stream by; None for a value that is added as it is.
        axis, index: where one writer is a slice of the value.
        restarts: whether the stream starts anew with them, so that what comes after reads no writer before them.
    """

    site: str
    names: tuple[str, ...]
    layout: HeadLayout | None = None
    projection: Projection | None = None
    axis: int | None = None
    index: int = 0
    restarts: bool = False

    kind = "writes"

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site,)

    def values(self, params: Any, value: Tensor, stream: torch.Size | None = None) -> Tensor:
        """What each writer adds: Tensor [n, *stream]; raises `SiteError` for what does not fit a stream that is known."""
        if self.layout is not None and self.projection is not None:
            weight = self.layout.split(self.projection.matrix(params).mT).movedim(0, -1)
            values = torch.einsum("...hd,hdo->h...o", self.layout.split(value), weight)
        elif self.axis is None:
            values = value[None]
        else:
            values = value.select(*_slice_of(self, value))[None]
        if stream is None or values.shape[1:] == stream:
            return values
        _require_fit(self, values[0], stream)
        return values.reshape(len(values), *stream)


@dataclass(frozen=True)
class Submodel:
    """A part of a model as a function of the parameters of all of it: a norm in front of a reader.

    Attributes:
        f: the part; it takes its parameters by number. Two finds of one part are equal.
        keys: what they are called in the whole.
    """

    f: Functional = field(compare=False)
    keys: tuple[tuple[str, ...], ...]

    def __call__(self, params: Any, value: Tensor) -> Tensor:
        own = {}
        for number, key in enumerate(self.keys):
            own[str(number)] = params
            for name in key:
                own[str(number)] = own[str(number)][name]
        return self.f(own, value)


@dataclass(frozen=True)
class Entrance:
    """Where the change of what some readers of a group read enters the model.

    Attributes:
        site: address.
        rows: first and last + 1 of the readers.
        layout, projection: heads of a projection, and its map; None for readers that are one for the whole value.
    """

    site: str
    rows: tuple[int, int] = (0, 1)
    layout: HeadLayout | None = None
    projection: Projection | None = None

    def change(self, params: Any, moved: Tensor) -> Tensor:
        """What a change [R, *stream] of what is read makes here: as the value, or [..., heads, size]."""
        moved = moved[self.rows[0] : self.rows[1]]
        if self.layout is None or self.projection is None:
            return moved[0]
        return torch.einsum("h...i,ihd->...hd", moved, self._weight(params))

    def change_by(self, params: Any, moved: Tensor, row: Tensor) -> Tensor:
        """As `change`, where one reader alone is moved, by [*stream]; the others are not there to be computed with."""
        if self.layout is None or self.projection is None:
            return moved
        here = torch.arange(*self.rows, device=row.device) == row
        return torch.where(here[:, None], torch.einsum("...i,ihd->...hd", moved, self._weight(params)), 0)

    def _weight(self, params: Any) -> Tensor:
        assert self.layout is not None and self.projection is not None
        return self.layout.split(self.projection.matrix(params))

    def write(self, value: Tensor, change: Tensor) -> Tensor:
        if self.layout is None:
            return value + change.reshape(value.shape)
        heads = self.layout.split(value)
        return self.layout.merge(value, heads + change.reshape(heads.shape))


@dataclass(frozen=True)
class ReaderGroup:
    """Readers that read the stream at one site, each a copy of its own.

    Attributes:
        site: where the stream is read.
        names: of the R readers.
        feeds: for each the names of the writers that depend on it.
        norm: what they read it through, where their change enters behind a norm; None else.
        entrances: where it enters; none for the site itself.
        axis, index: where one reader is a slice of the value.
    """

    site: str
    names: tuple[str, ...]
    feeds: tuple[tuple[str, ...], ...]
    norm: Submodel | None = None
    entrances: tuple[Entrance, ...] = ()
    axis: int | None = None
    index: int = 0

    kind = "reads"

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site, *(entrance.site for entrance in self.entrances))

    @property
    def doors(self) -> tuple[Entrance, ...]:
        """The entrances, or the site itself as one."""
        return self.entrances or (Entrance(self.site),)

    def changes(self, params: Any, value: Tensor, moves: Tensor) -> tuple[Tensor, ...]:
        """For each door what the moves [R, *stream] of what is read make there, given the value at the site."""
        if not self.entrances:
            return (self._placed(value, moves[0]),)
        moved = self._behind_norm(params, value, moves.reshape(len(self.names), *value.shape))
        return tuple(entrance.change(params, moved) for entrance in self.entrances)

    def changes_by(self, params: Any, value: Tensor, move: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        """As `changes`, where one reader, of the number `row` in the group, is moved, by [*stream]."""
        if not self.entrances:
            return (self._placed(value, move),)
        moved = self._behind_norm(params, value, move.reshape(1, *value.shape))[0]
        return tuple(entrance.change_by(params, moved, row) for entrance in self.entrances)

    def _behind_norm(self, params: Any, value: Tensor, moved: Tensor) -> Tensor:
        if self.norm is None:
            return moved
        # The unmoved value goes along as row 0: the same operations on the same numbers give a difference of exactly 0.
        rows = self.norm(params, torch.cat([value[None], value + moved]))
        return rows[1:] - rows[:1]

    def _placed(self, value: Tensor, move: Tensor) -> Tensor:
        """A move of one slice as one of the whole value."""
        if self.axis is None:
            _require_fit(self, value, move.shape)
            return move.reshape(value.shape)
        axis, index = _slice_of(self, value)
        _require_fit(self, value.select(axis, index), move.shape)
        here = torch.arange(value.shape[axis], device=value.device) == index
        return torch.where(here.reshape(-1, *[1] * (value.ndim - 1 - axis)), move.unsqueeze(axis), 0)


def _slice_of(part: WriterGroup | ReaderGroup, value: Tensor) -> tuple[int, int]:
    """Axis and index of a slice, counted from 0; raises `SiteError` for one that the value does not have."""
    axis, index = part.axis or 0, part.index
    if not (-value.ndim <= axis < value.ndim and -value.shape[axis] <= index < value.shape[axis]):
        raise SiteError(
            f"{part.names[0]!r} has axis={axis} and index={index}, but {part.site!r} holds {describe(value)}; "
            "give an axis and an index that it has."
        )
    return axis % value.ndim, index % value.shape[axis]


def _require_fit(part: WriterGroup | ReaderGroup, value: Tensor, stream: torch.Size) -> None:
    """Raises `SiteError` unless a value is the stream, perhaps with the axes of examples and positions joined."""
    if value.shape != stream and (value.numel() != math.prod(stream) or value.shape[-1:] != stream[-1:]):
        raise SiteError(
            f"{part.names[0]!r} {part.kind} {describe(value)} at {part.site!r}, but the first writer adds {list(stream)}; all "
            "writers and readers need the shape of the stream."
        )


def differences_into(mask: Tensor, differences: list[Tensor]) -> Tensor:
    """The moves of R readers: the sum over writers of mask times difference.

    Args:
        mask: Tensor [R, n], or [B, R, n] with a mask for each example.
        differences: what was written instead minus what is written, by groups of writers: [n_i, B, *features], n in all.

    Returns:
        Tensor [R, B, *features].
    """
    moves: Tensor | None = None
    start = 0
    for difference in differences:
        part = mask[..., start : start + len(difference)].to(difference.dtype)
        start += len(difference)
        if mask.ndim == 2:
            added = (part @ difference.flatten(1)).reshape(part.shape[0], *difference.shape[1:])
        else:
            added = torch.einsum("brn,nbf->rbf", part, difference.flatten(2)).reshape(part.shape[1], *difference.shape[1:])
        moves = added if moves is None else moves + added
    assert moves is not None
    return moves
