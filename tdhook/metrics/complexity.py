"""Complexity: on how few features an attribution rests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.checks import require_number
from .features import flat_scores


def sparseness(attributions: Any, *, batch_dims: int = 1) -> Tensor:
    """The Gini index of the magnitudes: 0 if all are equal, 1 - 1/D for a single one that is not 0.

        G = sum_k (2 k - D - 1) a_(k) / (D sum_k a_(k)), a_(1) <= ... <= a_(D) the sorted |phi|

    Args:
        attributions: Tensor [B, *features], or a structure of such, whose features are taken together (None is left out).
        batch_dims: how many of the first dimensions count examples: 1 for [B, ...], 2 for plural targets [T, B, ...], 0 inside
            a vmap.

    Returns:
        Tensor [B], or [T, B]; NaN for an attribution of zeros. Half types give float32.

    Raises:
        InputError: something else than floating-point tensors, or a bad `batch_dims`.

    Quantus adds 1e-7 to every magnitude, which makes 0 of the index of zeros.

    Source: Hurley and Rickard, "Comparing Measures of Sparsity" (2009); for attributions Chalasani et al., "Concise
    Explanations of Neural Networks using Adversarial Training" (2020).

    Examples:
        >>> sparseness(torch.tensor([[0.0, 0.0, 0.0, 5.0], [1.0, -1.0, 1.0, -1.0]]))
        tensor([0.7500, 0.0000])
    """
    ordered = flat_scores("attributions", attributions, batch_dims).abs().sort(dim=-1).values
    count = ordered.shape[-1]
    weights = torch.arange(1 - count, count, 2, dtype=ordered.dtype, device=ordered.device) / count
    return (weights * ordered).sum(-1) / ordered.sum(-1)


def complexity(attributions: Any, *, batch_dims: int = 1) -> Tensor:
    """The entropy of the shares of the magnitudes: 0 for a single one that is not 0, log D if all are equal.

        H = -sum_i p_i log p_i, p_i = |phi_i| / sum_j |phi_j|

    Args:
        attributions: as `sparseness`.
        batch_dims: as `sparseness`.

    Returns:
        Tensor [B], or [T, B], in nats; NaN for an attribution of zeros. Half types give float32.

    Raises:
        InputError: as `sparseness`.

    Source: Bhatt, Weller, Moura, "Evaluating and Aggregating Feature-based Model Explanations" (2020).

    Examples:
        >>> complexity(torch.tensor([[0.0, 0.0, 0.0, 5.0], [1.0, -1.0, 1.0, -1.0]]))
        tensor([0.0000, 1.3863])
    """
    magnitudes = flat_scores("attributions", attributions, batch_dims).abs()
    shares = magnitudes / magnitudes.sum(-1, keepdim=True)
    return -torch.xlogy(shares, shares).sum(-1) + 0.0  # no -0


def effective_complexity(attributions: Any, *, threshold: float = 1e-5, batch_dims: int = 1) -> Tensor:
    """How many magnitudes are above a threshold.

        #{i: |phi_i| > threshold}

    Args:
        attributions: as `sparseness`.
        batch_dims: as `sparseness`.
        threshold: in units of the attributions, at least 0; normalise them first for one that is relative.

    Returns:
        Tensor [B], or [T, B], of whole numbers in floating point; 0 for an attribution of zeros, NaN for one with a NaN.

    Raises:
        InputError: as `sparseness`, or a bad `threshold`.

    This is the count that Quantus takes. The paper's effective complexity is the least number of features, in the order of
    their attribution, that keeps the expected loss below a tolerance: read it off `insertion` with the loss as the target.

    Source: Nguyen and Rodríguez Martínez, "On quantitative aspects of model interpretability" (2020).

    Examples:
        >>> effective_complexity(torch.tensor([[0.0, 1e-9, -0.5, 5.0]]))
        tensor([2.])
    """
    require_number("threshold", threshold)
    magnitudes = flat_scores("attributions", attributions, batch_dims).abs()
    count = (magnitudes > threshold).sum(-1).to(magnitudes.dtype)
    return torch.where(magnitudes.isnan().any(-1), torch.nan, count)
