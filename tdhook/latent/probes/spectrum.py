"""The principal axes of activations: one factorisation that all tasks and penalties of a site share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    """Eigenvectors and eigenvalues of X^T diag(w) X, in float64 where the device has it.

    Attributes:
        axes: Tensor [S, D, R] with R = min(N, D): orthonormal columns; zero where there is no variance (for D > N).
        squares: Tensor [S, R]: the eigenvalues, which are squared singular values.
    """

    axes: Tensor
    squares: Tensor


def exact(x: Tensor) -> Tensor:
    """`x` in the precision of the factorisations: squaring the condition number would leave float32 no digits."""
    return x if x.device.type == "mps" else x.double()


def spectrum(x: Tensor, weights: Tensor) -> Spectrum:
    """The spectrum of x [S, N, D] with example weights [N], from the Gram matrix of columns or rows, whichever is smaller."""
    rows = exact(x) * exact(weights).sqrt()[:, None]
    if x.shape[-1] <= x.shape[-2]:
        squares, axes = torch.linalg.eigh(rows.mT @ rows)
        return Spectrum(axes, squares.clamp(min=0))
    squares, u = torch.linalg.eigh(rows @ rows.mT)
    kept = squares > squares.amax(-1, keepdim=True) * squares.shape[-1] * torch.finfo(squares.dtype).eps
    inverse = torch.where(kept, torch.where(kept, squares, 1).rsqrt(), 0)
    return Spectrum(rows.mT @ (u * inverse[:, None]), torch.where(kept, squares, 0))
