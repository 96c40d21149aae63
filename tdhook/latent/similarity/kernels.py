"""Inner products of kernels (HSIC) for all pairs of representations, the cheap way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.batching import chunks

STRIP = 2**23  # numbers of Gram matrices held at once


class Products(NamedTuple):
    """Inner products of the centred kernels of A representations, and of their diagonals k_i.

    Attributes:
        inner: Tensor [A, A, *lead]: <K_i, K_j>; of those that are not asked for, 0.
        dots: Tensor [A, A, *lead]: k_i.k_j.
        sums: Tensor [A, *lead]: the traces, sum(k_i).
        examples: their number N.
    """

    inner: Tensor
    dots: Tensor
    sums: Tensor
    examples: int

    @property
    def own(self) -> Tensor:
        """|K_i|^2, [A, *lead]."""
        return self.inner.diagonal(dim1=0, dim2=1).movedim(-1, 0)

    def hsic(self, debiased: bool) -> Tensor:
        """The Hilbert-Schmidt independence criterion of all pairs, up to a factor that only depends on N: [A, A, *lead]."""
        return hsic(self.inner, self.dots, self.sums[:, None] * self.sums[None], self.examples, debiased)


def hsic(inner: Tensor, dots: Tensor, traces: Tensor, count: int, debiased: bool) -> Tensor:
    """The Hilbert-Schmidt independence criterion of centred K and L with diagonals k and l.

        biased     <K, L>                                                        (N - 1)^2 HSIC_0
        debiased   <K, L> - N / (N - 2) k.l + sum(k) sum(l) / ((N - 1) (N - 2))     N (N - 3) HSIC_1 of Song et al. (2012)

    HSIC_1 leaves the diagonals out, and does not change where a_i + a_j is added to K_ij. So K may be centred, and then its
    rows sum to 0, and without the diagonal to -k.

    Args:
        inner: <K, L>, of any shape.
        dots: k.l
        traces: sum(k) sum(l)
        count: N.
        debiased: which one.
    """
    if not debiased:
        return inner
    return inner - count / (count - 2) * dots + traces / ((count - 1) * (count - 2))


def linear_products(xs: list[Tensor], ys: list[Tensor] | None = None) -> Products:
    """Of linear kernels of centred representations [*lead, N, D_s], by features or by Gram matrices, whichever is cheaper.

    With `ys`, A counts both, and only pairs of an x and a y, and of each with itself, are asked for.
    """
    every = xs + (ys or [])
    count, widths = xs[0].shape[-2], [x.shape[-1] for x in every]
    by_grams = (count / 2) * (sum(widths) + len(every) ** 2)
    if ys is None:
        by_features = sum(widths) ** 2 / 2
    else:
        by_features = sum(widths[: len(xs)]) * sum(widths[len(xs) :]) + sum(width**2 for width in widths)
    diagonals = torch.stack([x.square().sum(-1) for x in every])
    inner = _by_grams(every) if by_grams < by_features else _by_features(xs, ys)
    return Products(inner, inner_products(diagonals[..., None]), diagonals.sum(-1), count)


def centred_gram(gram: Tensor, debiased: bool) -> Tensor:
    """A Gram matrix [*lead, N, N] so that HSIC is an inner product of two of them, up to a factor that only depends on N.

    Its rows and columns sum to 0; if debiased, without the diagonal, which is 0 (Szekely and Rizzo, 2014). For a kernel that is
    known entry by entry this is more exact than `hsic`, which takes the diagonal off a sum.
    """
    count = gram.shape[-1]
    if not debiased:
        rows = gram.mean(-1, keepdim=True)
        return gram - rows - rows.mT + rows.mean(-2, keepdim=True)
    itself = torch.eye(count, dtype=torch.bool, device=gram.device)
    gram = torch.where(itself, 0, gram)
    rows = gram.sum(-1, keepdim=True) / (count - 2)
    return torch.where(itself, 0, gram - rows - rows.mT + rows.sum(-2, keepdim=True) / (count - 1))


def inner_products(matrices: Tensor) -> Tensor:
    """Inner products [S, S, *lead] of matrices [S, *lead, N, M]."""
    flat = matrices.flatten(-2).movedim(0, -2)
    return (flat @ flat.mT).movedim((-2, -1), (0, 1))


def _by_grams(xs: list[Tensor]) -> Tensor:
    """[S, S, *lead] from strips of rows of the Gram matrices; what is left of the diagonal block is never computed."""
    count, lead = xs[0].shape[-2], xs[0].shape[:-2].numel()
    total: Tensor | None = None
    for rows in chunks(count, max(1, STRIP // (len(xs) * lead * count))):
        strips = torch.stack([x[..., rows, :] @ x[..., rows.start :, :].mT for x in xs])
        height = strips.shape[-2]
        # the rest of the strip stands below the diagonal, too
        below = (torch.arange(strips.shape[-1], device=strips.device) >= height).to(strips.dtype)
        inner = inner_products(strips * (1 + below).sqrt())
        total = inner if total is None else total + inner
    assert total is not None  # there are rows
    return total


def _by_features(xs: list[Tensor], ys: list[Tensor] | None) -> Tensor:
    """[A, A, *lead] from cross-covariances; each pair once."""
    every = xs + (ys or [])
    table = [[torch.zeros_like(xs[0][..., 0, 0])] * len(every) for _ in every]
    for i, x in enumerate(every):
        # each with itself and those that come later; or, of two kinds, an x with itself and all ys
        partners = list(range(i, len(every))) if ys is None else [i, *(range(len(xs), len(every)) if i < len(xs) else ())]
        joined = torch.cat([every[j] for j in partners], -1)
        squares = (x.mT @ joined).square().sum(-2)
        for j, part in zip(partners, squares.split([every[j].shape[-1] for j in partners], -1)):
            table[i][j] = table[j][i] = part.sum(-1)
    return torch.stack([torch.stack(row) for row in table])
