"""Edits: what `tdhook.intervene(f, {site: edit})` writes at chosen positions of a value.

An edit is a function of the value [*B, S, D] at a site, with positions along axis -2 and features along -1. It is immutable and
hashable, keeps the dtype of the value, and its numbers may be those of a vmap around it, so that a sweep is one call:

    vmap(lambda strength: intervene(f, {site: add(direction, strength)})(params, inputs))(strengths)

`generate` tells the edits in a model where in the sequence each of its steps is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.structure import describe
from ...core.writing import Write, written_value
from .arguments import as_direction, as_strength, per_example, widened
from .positions import Positions, Where, columns, require_columns, require_positions, require_within, selected

Self = TypeVar("Self", bound="Edit")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Edit:
    """A function of the value at a site that changes chosen positions of it.

    Attributes:
        positions: which ones; see `tdhook.latent.steering.positions`.
        where: where in the sequence the value lies; None: it is all there is.
    """

    positions: Positions = None
    where: Where | None = None

    def __call__(self, value: Tensor) -> Tensor:
        where = self.where or _everything(value)
        chosen = selected(self.positions, value, where)
        if chosen is False:
            return value
        changed = self.changed(value, where)
        return changed if chosen is True else torch.where(chosen, changed, value)

    def changed(self, value: Tensor, where: Where) -> Tensor:
        """The value with all positions changed."""
        raise NotImplementedError

    def placed(self: Self, where: Where) -> Self:
        """The same edit for a value that lies elsewhere in a sequence, which has to have its positions."""
        require_within(self.positions, where)
        return replace(self, where=where)

    def __repr__(self) -> str:
        told = "" if self.positions is None else f"positions={self.positions!r}"
        return f"{type(self).__name__}({told})"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class At(Edit):
    """Any function of a value, for some positions."""

    function: Callable[[Tensor], Tensor]

    def changed(self, value: Tensor, where: Where) -> Tensor:
        # A copy, so that a function that writes in place changes the chosen positions and nothing else.
        return written_value("an edit", value, placed(self.function, where)(value.clone()))


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class InOrder(Edit):
    """Several edits, one after the other."""

    edits: tuple[Callable[[Tensor], Tensor], ...]

    def changed(self, value: Tensor, where: Where) -> Tensor:
        for edit in self.edits:
            value = written_value("an edit", value, placed(edit, where)(value.clone()))
        return value


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ByStep(Edit):
    """Another write for what each step of a generation runs."""

    schedule: Callable[[int], Write | None]

    def changed(self, value: Tensor, where: Where) -> Tensor:
        require_columns(value, where)
        parts, done = [], 0
        while done < value.shape[-2]:
            column = where.start + done
            step = max(0, column - where.prompt + 1)
            size = min(value.shape[-2] - done, where.prompt - column if step == 0 else 1)
            part = value[..., done : done + size, :]
            write = placed(self.schedule(step), where._replace(start=column, stop=column + size))
            if write is not None:
                part = written_value("an edit", part, write(part.clone()) if callable(write) else write)
            parts.append(part)
            done += size
        return torch.cat(parts, -2)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Add(Edit):
    """A multiple of a direction, or of one for each position."""

    direction: Tensor
    strength: float | Tensor

    def changed(self, value: Tensor, where: Where) -> Tensor:
        wide, direction = widened("direction", value, self.direction)
        if direction.ndim == 2:
            require_columns(value, where)
            order = {column: i for i, column in enumerate(columns(self.positions, where))}
            if len(order) != len(direction):
                raise InputError(f"direction has {len(direction)} rows for {len(order)} positions; give one for each.")
            rows = [order.get(where.start + i, 0) for i in range(value.shape[-2])]
            direction = direction[torch.tensor(rows, device=value.device)]
        return (wide + per_example("strength", self.strength, wide) * direction).to(value.dtype)


def add(direction: Any, strength: float | Tensor = 1.0, *, positions: Positions = None) -> Edit:
    """Activation addition: x' = x + strength * direction.

    Args:
        direction: Tensor [D], or what has one as `.direction`, such as a probe; or [P, D], one for each of P positions, as
            `activation_addition` gives.
        strength: a number, or Tensor [] or [B], one for each example.
        positions: which ones; None for all. See `tdhook.latent.steering.positions`.

    Returns:
        `Edit`: a write of `tdhook.intervene`.

    Raises:
        InputError: no floating-point direction, NaN, several directions without integer positions or a slice; when called, a
            value of another width.

    Source: Turner et al., "Activation Addition: Steering Language Models Without Optimization" (2023); Rimsky et al.,
    "Steering Llama 2 via Contrastive Activation Addition" (2023).

    Examples:
        >>> add(torch.tensor([1.0, 2.0]), 10.0, positions=[-1])(torch.zeros(1, 3, 2))
        tensor([[[ 0.,  0.],
                 [ 0.,  0.],
                 [10., 20.]]])
    """
    require_positions(positions)
    rows = as_direction("direction", direction, 2, nonzero=False)
    if rows.ndim == 2 and (positions is None or isinstance(positions, (str, Tensor))):
        raise InputError(
            f"direction has shape {list(rows.shape)}, one for each position; say which: positions=slice(0, {len(rows)})."
        )
    return Add(direction=rows, strength=as_strength("strength", strength), positions=positions)


def at(positions: Positions, function: Callable[[Tensor], Tensor]) -> Edit:
    """Any function of a value, for some positions alone.

    Args:
        positions: which ones; see `tdhook.latent.steering.positions`.
        function: value -> value of the same shape, such as an `Eraser` of `leace`, or another edit.

    Returns:
        `Edit`.

    Raises:
        InputError: no positions, no function. SiteError: when called, a result that does not fit.

    Examples:
        >>> at([0], torch.neg)(torch.ones(1, 2, 1))
        tensor([[[-1.],
                 [ 1.]]])
    """
    require_positions(positions)
    _require_function("function", function)
    return At(positions=positions, function=function)


def in_order(*edits: Callable[[Tensor], Tensor]) -> Edit:
    """Several edits of one site, the first one first. (Of nested `intervene`, the inner comes first.)

    Args:
        edits: edits, or other functions of a value.

    Returns:
        `Edit`.

    Raises:
        InputError: none, or something that is no function.

    Examples:
        >>> in_order(add(torch.ones(2), 1.0), torch.square)(torch.ones(1, 2))
        tensor([[4., 4.]])
    """
    if not edits:
        raise InputError("in_order got no edits; give at least one.")
    for edit in edits:
        _require_function("in_order", edit)
    return InOrder(edits=edits)


def by_step(schedule: Callable[[int], Write | None]) -> Edit:
    """Another write at each step of a generation.

    Step 0 runs the prompt, step t > 0 the t-th generated token. Its write applies to the positions that the step runs, and to
    no others: not to earlier ones either where these are run again, without a cache.

    Args:
        schedule: step -> edit, function, tensor or number, as `intervene` takes them; or None to write nothing.

    Returns:
        `Edit`. In a call of a model outside of `generate`, everything is step 0.

    Raises:
        InputError: `schedule` is no function.

    Examples:
        >>> direction = torch.ones(2)
        >>> edit = by_step(lambda step: add(direction, 2.0**-step) if step else None)    # fades away
        >>> edit(torch.zeros(1, 1, 2))
        tensor([[[0., 0.]]])
    """
    _require_function("schedule", schedule)
    return ByStep(schedule=schedule)


def placed(write: Any, where: Where) -> Any:
    """A write for a value that lies elsewhere in a sequence: an edit is told so, others do not depend on it."""
    return write.placed(where) if isinstance(write, Edit) else write


def _everything(value: Tensor) -> Where:
    length = value.shape[-2] if value.ndim > 1 else 1
    return Where(0, length, length, length)


def _require_function(name: str, given: Any) -> None:
    if not callable(given):
        raise InputError(f"{name} got {describe(given)}; give a function.")
