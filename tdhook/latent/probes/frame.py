"""The coordinates of a fit: centred and standardised activations, and the way back to the caller's units."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Frame(NamedTuple):
    """Activations in the coordinates of a fit, (x - mean) / scale.

    Attributes:
        x: Tensor [S, N, D]; rows of weight 0 are zero.
        mean, scale: Tensor [S, D].
    """

    x: Tensor
    mean: Tensor
    scale: Tensor

    def unit(self, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """Weight [S, T, C, D] and bias [S, T, C] of a probe of these coordinates, in the units of the caller."""
        weight = weight / self.scale[:, None, None]
        return {"weight": weight, "bias": bias - (weight * self.mean[:, None, None]).sum(-1)}


def frame(x: Tensor, weights: Tensor, *, standardize: bool, center: bool) -> Frame:
    """The frame of x [S, N, D] with example weights [N].

    Args:
        x: activations.
        weights: of the examples.
        standardize: divide by the standard deviation (that of the population; constant coordinates by 1).
        center: subtract the mean.
    """
    shares = weights.to(x.dtype) / weights.sum()
    mean = torch.einsum("n,snd->sd", shares, x)
    centred = torch.where(weights[:, None] > 0, x - mean[:, None], 0)
    deviation = torch.einsum("n,snd->sd", shares, centred.square()).sqrt()
    # what a constant coordinate has left after centring is rounding
    varies = deviation > 8 * torch.finfo(x.dtype).eps * mean.abs()
    centred = torch.where(varies[:, None], centred, 0)
    scale = torch.where(varies, deviation, 1) if standardize else torch.ones_like(mean)
    framed = centred if center else x
    return Frame(framed / scale[:, None] if standardize else framed, mean if center else torch.zeros_like(mean), scale)
