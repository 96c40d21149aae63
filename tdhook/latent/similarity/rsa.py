"""Representational similarity analysis: correlated dissimilarities."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.correlation import SIMILARITIES, Similarity, average_ranks, pearson, similarity_function
from ...core.errors import InputError
from ...core.structure import describe
from .samples import Measure, squared_distances

DISSIMILARITIES = ("correlation", "cosine", "euclidean")


def rsa(x: Tensor, y: Tensor, *, dissimilarity: str = "correlation", similarity: str | Similarity = "spearman") -> Tensor:
    """The correlation of the dissimilarities that two representations give to all pairs of examples.

        RSA = similarity(d_x, d_y),   d_x = (dissimilarity(x_i, x_j) for i < j)

    Args:
        x: Tensor [*lead, N, D1], of at least three examples.
        y: Tensor [*lead, N, D2], of the same examples.
        dissimilarity: `"correlation"`: 1 - r of the features of two examples; `"cosine"`: 1 - cosine of their angle;
            `"euclidean"`: their distance.
        similarity: of the dissimilarities: `"spearman"` (of ranks), `"pearson"`, or a function of two tensors [..., P] to
            [...], such as `lambda a, b: torch.cosine_similarity(a, b, -1)`.

    Returns:
        Tensor [*lead], from -1 to 1; NaN where all dissimilarities are equal, and where an example has no correlation (constant
        features) or no angle (zeros). Half types give float32.

    Raises:
        InputError: as `cka`; an unknown dissimilarity or similarity.

    Cost: N^2 (D1 + D2) multiplications, and sorting N (N - 1) / 2 numbers for ranks; memory for two matrices N x N.

    Source: Kriegeskorte, Mur, Bandettini, "Representational similarity analysis: connecting the branches of systems
    neuroscience" (2008).

    Examples:
        >>> x = torch.randn(50, 8)
        >>> rotation = torch.linalg.qr(torch.randn(8, 8))[0]
        >>> rsa(x, 2 * x @ rotation, dissimilarity="euclidean") > 0.9999, rsa(x, torch.randn(50, 8)).abs() < 0.3
        (tensor(True), tensor(True))
    """
    return rsa_measure(dissimilarity, similarity)(x, y)


def dissimilarities(x: Tensor, dissimilarity: str = "correlation") -> Tensor:
    """The dissimilarities of all pairs of rows, as a matrix.

    Args:
        x: Tensor [*lead, N, D].
        dissimilarity: as `rsa`.

    Returns:
        Tensor [*lead, N, N], symmetric, 0 on the diagonal; NaN as in `rsa`. Half types give float32.

    Raises:
        InputError: an unknown dissimilarity.

    Examples:
        >>> dissimilarities(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), "euclidean")
        tensor([[0., 5.],
                [5., 0.]])
    """
    if dissimilarity not in DISSIMILARITIES:
        raise InputError(f"dissimilarity is {describe(dissimilarity)}; choose from {', '.join(map(repr, DISSIMILARITIES))}.")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if dissimilarity == "euclidean":
        squares = squared_distances(x)
        return torch.where(squares > 0, squares, 1).sqrt() * (squares > 0) + squares * 0  # the root has no slope at 0
    largest = x.detach().abs().amax(-1, keepdim=True)
    rows = x / torch.where(largest > 0, largest, torch.nan)
    rounding = torch.zeros_like(largest)
    if dissimilarity == "correlation":
        rows = rows - rows.mean(-1, keepdim=True)
        rows = rows - rows.mean(-1, keepdim=True)
        rounding = rounding + 4 * torch.finfo(x.dtype).eps * x.shape[-1] ** 0.5
    norm = rows.square().sum(-1, keepdim=True).sqrt()
    rows = rows / torch.where(norm > rounding, norm, torch.nan)
    itself = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    apart = 1 - rows @ rows.mT
    return torch.where(itself & ~apart.isnan(), 0, apart)


def rsa_measure(dissimilarity: str = "correlation", similarity: str | Similarity = "spearman") -> Measure:
    """The parts of `rsa`. Ranks are taken once for each representation."""
    if dissimilarity not in DISSIMILARITIES:
        dissimilarities(torch.zeros(1, 1), dissimilarity)  # raises
    compare = similarity_function(similarity)
    ranked = compare is SIMILARITIES["spearman"]

    def prepare(x: Tensor) -> Tensor:
        first, second = torch.triu_indices(x.shape[-2], x.shape[-2], 1, device=x.device).unbind()
        apart = dissimilarities(x, dissimilarity)[..., first, second]
        return average_ranks(apart) if ranked else apart

    return Measure(prepare, pearson if ranked else compare, least=3)
