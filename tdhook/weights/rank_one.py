"""Rank-one editing of a linear map: the closed-form update that maps a key to a value."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.compat import visible
from ..core.errors import InputError
from ..core.structure import describe


def rank_one_update(
    weight: Tensor,
    key: Tensor,
    value: Tensor,
    covariance: Tensor,
    *,
    bias: Tensor | None = None,
    transposed: bool = False,
    damping: float = 0.0,
) -> Tensor:
    """The weight that maps a key to a value and otherwise changes as little as it can, on keys of a covariance.

        W' = W + (v - W k) (C^-1 k)^T / (k^T C^-1 k)

    It minimises `tr((W' - W) C (W' - W)^T)`, the mean squared change of the outputs, under `W' k = v`. N keys at once give
    `W' = W + (V - W K) (K^T C^-1 K)^-1 (C^-1 K)^T`.

    Args:
        weight: Tensor [O, D] of an `nn.Linear`; [D, O] where `transposed` (`Conv1D` of transformers).
        key: Tensor [D], or [N, D].
        value: Tensor [O], or [N, O].
        covariance: C, Tensor [D, D], symmetric and positive definite.
        bias: Tensor [O] that the module adds; the value includes it.
        transposed: whether the weight is stored as [D, O].
        damping: fraction of the mean of C's diagonal that is added to the diagonal, for a C of too few keys.

    Returns:
        Tensor like `weight`. It is computed in the precision of `covariance`.

    Raises:
        InputError: shapes that do not fit, a singular covariance, a key of zeros, keys that depend on each other.

    Cost: a Cholesky decomposition of C.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022), equation 2; for N keys Bau et al.,
    "Rewriting a Deep Generative Model" (2020).

    Examples:
        >>> weight = rank_one_update(torch.zeros(2, 2), torch.tensor([1.0, 1.0]), torch.tensor([3.0, 5.0]), torch.eye(2))
        >>> weight @ torch.tensor([1.0, 1.0])
        tensor([3., 5.])
    """
    keys, values = (torch.atleast_2d(t) for t in (key, value))
    rows = weight.mT if transposed else weight
    _require_shapes(rows, keys, values, covariance, bias)
    dtype = torch.promote_types(torch.promote_types(weight.dtype, covariance.dtype), torch.float32)
    wide, keys, values, covariance = (t.to(dtype) for t in (rows, keys, values, covariance))
    size = covariance.diagonal().mean()
    damped = covariance + damping * size * torch.eye(len(covariance), dtype=dtype, device=covariance.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    _require_regular(factor, failed)
    solved = torch.cholesky_solve(keys.mT, factor)
    gram = keys @ solved
    _require_independent(gram)
    missing = values - keys @ wide.mT - (0 if bias is None else bias.to(dtype))
    update = torch.linalg.solve(gram, missing).mT @ solved.mT
    new = (wide + update).to(weight.dtype)
    return new.mT if transposed else new


def _require_shapes(rows: Tensor, keys: Tensor, values: Tensor, covariance: Tensor, bias: Tensor | None) -> None:
    out, size = rows.shape if rows.ndim == 2 else (-1, -1)
    fits = rows.ndim == 2 and keys.shape[1:] == (size,) and values.shape == (len(keys), out)
    if not fits or (bias is not None and bias.shape != (out,)):
        raise InputError(
            f"weight maps {size} numbers to {out}, key is {describe(keys)} and value {describe(values)}; say transposed=True "
            "for a weight that is stored as [D, O]."
        )
    if covariance.shape != (size, size):
        raise InputError(
            f"covariance is {describe(covariance)} for keys of {size} numbers; give the second moment of the keys."
        )


def _require_regular(factor: Tensor, failed: Tensor) -> None:
    if not visible(factor):
        return
    diagonal = factor.diagonal()
    # By rounding, a matrix that lacks a direction may still have a Cholesky factor, with a diagonal that is too small.
    small = diagonal.min().square() <= len(factor) * torch.finfo(factor.dtype).eps * diagonal.max().square()
    if failed.any() or small:
        raise InputError(
            "covariance is singular: some direction has no keys. Collect it from more tokens than it has rows, or give "
            "damping=1e-2."
        )


def _require_independent(gram: Tensor) -> None:
    if visible(gram) and torch.linalg.matrix_rank(gram, hermitian=True) < len(gram):
        raise InputError("key is zero, or the keys depend on each other linearly; give keys that a matrix can tell apart.")
