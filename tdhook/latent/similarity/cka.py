"""Centred kernel alignment, linear and RBF, biased and debiased."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.checks import require_number
from ...core.errors import InputError
from ...core.structure import describe
from .kernels import Products, centred_gram, linear_products
from .samples import Measure, normalised, squared_distances


def cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> Tensor:
    """Linear centred kernel alignment: how alike the similarities between examples are in two representations.

        CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   K = X X^T, L = Y Y^T
            = |X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F)         of centred X and Y, biased

    It does not change under rotations and one factor for all features. The biased one is near 1 for any two representations
    with more features than examples: take the debiased one there, whose expectation is 0 for independent representations.

    Args:
        x: Tensor [*lead, N, D1].
        y: Tensor [*lead, N, D2], of the same examples.
        debiased: with the unbiased HSIC_1 of Song et al., for at least four examples; it can be below 0.

    Returns:
        Tensor [*lead], at most 1; NaN where a representation is constant to rounding. Half types give float32.

    Raises:
        InputError: not floating-point, other numbers of rows, too few of them, NaN or infinity (which make the result NaN under
            vmap and compilation, where values cannot be checked).

    Cost: N (D1^2 + D1 D2 + D2^2) multiplications, or N^2 (D1 + D2 + 4) / 2 where that is less. The Gram matrices are made in
        strips.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited" (2019); Song et al., "Feature Selection
    via Dependence Maximization" (2012); debiased as Nguyen, Raghu, Kornblith, "Do Wide and Deep Networks Learn the Same
    Things?" (2021).

    Examples:
        >>> x = torch.randn(100, 8)
        >>> rotation = torch.linalg.qr(torch.randn(8, 8))[0]
        >>> torch.allclose(cka(x, 3 * x @ rotation + 5), torch.tensor(1.0))
        True
        >>> wide, other = torch.randn(2, 50, 2000).unbind()
        >>> cka(wide, other) > 0.9, cka(wide, other, debiased=True).abs() < 0.1
        (tensor(True), tensor(True))
    """
    return linear_measure(debiased)(x, y)


def rbf_cka(x: Tensor, y: Tensor, *, bandwidth: float | None = None, fraction: float = 1.0, debiased: bool = False) -> Tensor:
    """Centred kernel alignment with Gaussian kernels, which looks at near examples more than at far ones.

        CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   K_ij = exp(-|x_i - x_j|^2 / (2 s^2))

    Args:
        x: Tensor [*lead, N, D1].
        y: Tensor [*lead, N, D2], of the same examples.
        bandwidth: s, in the units of the data; None: `fraction` of the median distance between two examples, in each of the
            representations, which makes the result independent of their scales.
        fraction: of the median distance.
        debiased: as `cka`.

    Returns:
        Tensor [*lead]; NaN where a representation is constant to rounding, or its median distance is 0. Half types give
        float32.

    Raises:
        InputError: as `cka`; a bandwidth or fraction that is not above 0, or both of them.

    Cost: N^2 (D1 + D2) multiplications, and a few matrices of N x N numbers; for many examples see `minibatch_cka`.

    Source: Kornblith et al. (2019), whose median counts the N zeros between an example and itself.

    Examples:
        >>> x = torch.randn(100, 8)
        >>> torch.allclose(rbf_cka(x, 3 * x + 5), torch.tensor(1.0))
        True
    """
    return rbf_measure(bandwidth, fraction, debiased)(x, y)


def linear_measure(debiased: bool = False) -> Measure:
    """The parts of `cka`."""

    def matrix(xs: list[Tensor], ys: list[Tensor] | None) -> Tensor:
        first, second = [normalised(x) for x in xs], None if ys is None else [normalised(y) for y in ys]
        every = alignment(linear_products(first, second), debiased)
        return every if ys is None else every[: len(xs), len(xs) :]

    return Measure(normalised, _no_pair, least=_least(debiased), matrix=matrix)


def rbf_measure(bandwidth: float | None = None, fraction: float = 1.0, debiased: bool = False) -> Measure:
    """The parts of `rbf_cka`."""
    require_bandwidth(bandwidth, fraction)

    def prepare(x: Tensor) -> Tensor:
        gram = centred_gram(rbf_gram(x, bandwidth, fraction), debiased)
        squares = gram.square().sum((-2, -1), keepdim=True)
        return gram / root(squares, squares, gram.shape[-1])

    def between(first: Tensor, second: Tensor) -> Tensor:
        return (first * second).sum((-2, -1))

    return Measure(prepare, between, least=_least(debiased))


def rbf_gram(x: Tensor, bandwidth: float | None, fraction: float) -> Tensor:
    """The Gaussian kernel of all pairs of rows: [*lead, N, N]."""
    if bandwidth is not None:
        return torch.exp(squared_distances(x) / (-2 * bandwidth**2))
    squares = squared_distances(x, scale=True)
    # N zeros of the diagonal come first, then every distance twice
    count = x.shape[-2]
    middle = count + (count * (count - 1) + 1) // 2
    median = squares.flatten(-2).kthvalue(middle, -1).values[..., None, None]
    return torch.exp(squares / (-2 * fraction**2 * torch.where(median > 0, median, torch.nan)))


def alignment(found: Products, debiased: bool) -> Tensor:
    """CKA of all pairs, [A, A, *lead]."""
    matrix = found.hsic(debiased)
    scale = root(matrix.diagonal(dim1=0, dim2=1).movedim(-1, 0), found.own, found.examples)
    return matrix / scale[:, None] / scale[None]


def require_bandwidth(bandwidth: float | None, fraction: float) -> None:
    """Raises `InputError` unless both are above 0, and one of them is left as it is."""
    require_number("fraction", fraction, strict=True)
    if bandwidth is not None:
        require_number("bandwidth", bandwidth, strict=True)
        if fraction != 1.0:
            raise InputError(
                f"bandwidth={bandwidth!r} leaves nothing for fraction={fraction!r} of the median; give one of them."
            )


def root(own: Tensor, squares: Tensor, count: int) -> Tensor:
    """The root of an HSIC of something with itself; NaN where it, or the kernel with its sum of squares, is but rounding."""
    eps = torch.finfo(own.dtype).eps
    return torch.where((own > 8 * eps * squares) & (squares > (4 * eps * count) ** 2), own, torch.nan).sqrt()


def _least(debiased: Any) -> int:
    if not isinstance(debiased, bool):
        raise InputError(f"debiased is {describe(debiased)}; give True or False.")
    return 4 if debiased else 2


def _no_pair(first: Any, second: Any) -> Tensor:
    raise NotImplementedError  # CKA of one pair is a matrix of one
