"""Sampled results: running means with their standard errors, in constant memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A sampled result.

    Attributes:
        value: the estimate, in the structure of what is explained.
        standard_error: of each number in `value`, in the same structure.
    """

    value: Any
    standard_error: Any


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of samples that come in chunks (Chan, Golub, LeVeque, 1979)."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, samples: Tensor) -> Moments:
        """The moments of a chunk, over its first dimension."""
        mean = samples.mean(0)
        return cls(len(samples), mean, (samples - mean).square().sum(0))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        squares = self.squares + other.squares + difference.square() * (self.count * other.count / count)
        return Moments(count, mean, squares)

    @property
    def variance(self) -> Tensor:
        """The unbiased variance; NaN for a single sample."""
        return self.squares / (self.count - 1) if self.count > 1 else torch.full_like(self.squares, torch.nan)

    @property
    def standard_error(self) -> Tensor:
        """Of the mean; NaN for a single sample."""
        return (self.variance / self.count).sqrt()
