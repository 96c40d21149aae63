"""Correlations along the last axis: how similar two attributions are, whatever their scale."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import InputError
from .structure import describe

Similarity = Callable[[Tensor, Tensor], Tensor]


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """The linear correlation coefficient.

        r = sum_i (a_i - mean a) (b_i - mean b) / (|a - mean a| |b - mean b|)

    Args:
        a: Tensor [*lead, D].
        b: Tensor of a shape that broadcasts to it.

    Returns:
        Tensor [*lead]; NaN where either is constant to rounding, or holds a NaN.

    Raises:
        InputError: another last dimension.

    Examples:
        >>> pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 3.0, 1.0]))
        tensor(-1.)
    """
    _require_aligned(a, b)
    (first, first_norm), (second, second_norm) = _centred(a), _centred(b)
    # One norm after the other: their product could underflow.
    return ((first / first_norm[..., None]) * (second / second_norm[..., None])).sum(-1).clamp(-1, 1)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """The correlation coefficient of ranks, where equal numbers share the mean of their ranks.

        rho = pearson(average_ranks(a), average_ranks(b))

    Args:
        a: Tensor [*lead, D].
        b: Tensor of a shape that broadcasts to it.

    Returns:
        Tensor [*lead]; NaN where either is constant, or holds a NaN.

    Raises:
        InputError: another last dimension.

    Source: Spearman, "The Proof and Measurement of Association between Two Things" (1904); ties as Kendall (1945).

    Examples:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 10.0, 100.0]))
        tensor(1.)
    """
    _require_aligned(a, b)
    return pearson(average_ranks(a), average_ranks(b))


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1 .. D along the last axis, smallest first; equal numbers share the mean of their ranks.

    Args:
        values: Tensor [*lead, D].

    Returns:
        Tensor [*lead, D] in at least float32; all NaN along the axis where there is a NaN.

    Examples:
        >>> average_ranks(torch.tensor([10.0, 30.0, 10.0]))
        tensor([1.5000, 3.0000, 1.5000])
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    ordered, places = values.sort(dim=-1)
    index = torch.arange(values.shape[-1], device=values.device).expand(values.shape)
    # A run of equal numbers has the mean of its first and its last rank. (searchsorted warns of strides inside a vmap.)
    differs = ordered[..., 1:] != ordered[..., :-1]
    first = torch.cat([index[..., :1], torch.where(differs, index[..., 1:], 0)], -1).cummax(-1).values
    last = torch.cat([torch.where(differs, index[..., :-1], values.shape[-1] - 1), index[..., -1:]], -1)
    last = last.flip(-1).cummin(-1).values.flip(-1)
    ranks = torch.zeros_like(values).scatter(-1, places, (first + last).to(values.dtype) / 2 + 1)
    return torch.where(values.isnan().any(-1, keepdim=True), torch.nan, ranks)


SIMILARITIES: dict[str, Similarity] = {"spearman": spearman, "pearson": pearson}


def similarity_function(similarity: str | Similarity) -> Similarity:
    """The function with a name, or the one given.

    Raises:
        InputError: an unknown name.
    """
    if callable(similarity):
        return similarity
    if similarity not in SIMILARITIES:
        raise InputError(
            f"similarity is {describe(similarity)}; choose {' or '.join(map(repr, SIMILARITIES))}, or give a function of two "
            "tensors [..., D] to a tensor [...]."
        )
    return SIMILARITIES[similarity]


def _require_aligned(a: Tensor, b: Tensor) -> None:
    if a.ndim < 1 or b.ndim < 1 or a.shape[-1] != b.shape[-1]:
        raise InputError(f"a is {describe(a)} and b is {describe(b)}; they have the same last dimension.")


def _centred(values: Tensor) -> tuple[Tensor, Tensor]:
    """Deviations from the mean and their norm, which is NaN where they are but rounding."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    # The largest magnitude becomes 1, so that no square under- or overflows.
    largest = values.abs().amax(-1, keepdim=True)
    values = values / largest
    deviations = values - values.mean(-1, keepdim=True)
    norm = deviations.norm(dim=-1)
    rounding = 4 * torch.finfo(values.dtype).eps * values.shape[-1] ** 0.5
    return deviations, torch.where(norm > rounding, norm, torch.nan)
