"""Random projections that keep inner products in expectation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import require_positive
from ..core.randomness import integers, require_generator


def wide(value: Tensor) -> torch.dtype:
    """The dtype to add up in: at least float32."""
    return torch.promote_types(value.dtype, torch.float32)


@dataclass(frozen=True)
class CountSketch:
    """A random linear map of lists of tensors to k numbers that keeps inner products in expectation.

    Attributes:
        buckets: for each tensor the bucket of every element, an integer Tensor [n].
        signs: for each tensor 1 or -1 for every element, Tensor [n].
        size: k.
    """

    buckets: list[Tensor]
    signs: list[Tensor]
    size: int

    def __call__(self, values: Sequence[Tensor]) -> Tensor:
        total = values[0].new_zeros(self.size, dtype=wide(values[0]))
        for value, bucket, sign in zip(values, self.buckets, self.signs):
            total = total.index_add(0, bucket, value.flatten().to(total.dtype) * sign.to(total.dtype))
        return total


def count_sketch(tensors: Sequence[Tensor], size: int | None, generator: torch.Generator | None) -> CountSketch | None:
    """A random sketch of lists of tensors like these; None for no size."""
    require_positive("projection", size, optional=True)
    require_generator(generator)
    if size is None:
        return None
    buckets, signs = [], []
    for tensor in tensors:
        buckets.append(integers(0, size, (tensor.numel(),), generator, tensor.device))
        signs.append(2 * integers(0, 2, (tensor.numel(),), generator, tensor.device).to(torch.int8) - 1)
    return CountSketch(buckets, signs, size)
