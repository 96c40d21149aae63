"""Balls around inputs, in which they may be changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.randomness import normal, uniform
from .ascent import across, scaled

NORMS = ("linf", "l2")


@dataclass(frozen=True)
class Ball:
    """What the changes are kept in: a ball, or all of space where `norm` is None."""

    norm: str | None
    radius: float
    random_start: bool = False
    generator: torch.Generator | None = None

    def inside(self, changes: list[Tensor], lead: int) -> list[Tensor]:
        """The nearest changes in the ball; that of an example is over all tensors and their dimensions after `lead`."""
        if self.norm is None:
            return changes
        if self.norm == "linf":
            return [c.clamp(-self.radius, self.radius) for c in changes]
        norm = across(changes, lead)
        return scaled(changes, torch.where(norm > self.radius, self.radius / norm, torch.ones_like(norm)))

    def drawn(self, values: list[Tensor], lead: int) -> list[Tensor]:
        """Changes drawn uniformly from the ball."""

        def draw(random: Callable, like: Tensor) -> Tensor:
            return random(like.shape, self.generator, like.device, torch.promote_types(like.dtype, torch.float32))

        if self.norm == "linf":
            return [(self.radius * (2 * draw(uniform, value) - 1)).to(value) for value in values]
        # A normal direction, and the distance U^(1/n) that makes equal volumes equally likely.
        parts = [draw(normal, value) for value in values]
        norm = across(parts, lead)
        distance = self.radius * draw(uniform, norm) ** (1 / sum(value.shape[lead:].numel() for value in values))
        return [part.to(value) for part, value in zip(scaled(parts, distance / norm), values)]
