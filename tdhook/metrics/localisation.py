"""Localisation: whether an attribution lies where it is known to belong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ..core.checks import flatten_as, require_positive
from ..core.errors import InputError
from ..core.structure import describe
from .features import flattened, leaves_of


def relevance_mass_accuracy(attributions: Any, masks: Any, *, absolute: bool = False, batch_dims: int = 1) -> Tensor:
    """The share of the relevance that lies in the mask.

        sum_{i in mask} R_i / sum_i R_i, R = max(phi, 0), or |phi| if `absolute`

    Args:
        attributions: Tensor [B, *features], or a structure of such, whose features are taken together (None is left out).
            Sum over the channels of an image first, as the paper does.
        masks: in the same structure, boolean tensors with as many dimensions (the one for targets may be left out), where each
            size is that of the attributions or 1: [B, 1, H, W] for [B, C, H, W]. True is where the relevance belongs.
        absolute: count the magnitudes of negative attributions too.
        batch_dims: how many of the first dimensions count examples: 1 for [B, ...], 2 for plural targets [T, B, ...], 0 inside
            a vmap.

    Returns:
        Tensor [B], or [T, B]; NaN for an attribution without relevance. Half types give float32.

    Raises:
        InputError: attributions or masks that do not fit, or a bad `batch_dims`.

    Source: Arras, Osman, Samek, "CLEVR-XAI: A benchmark dataset for the ground truth evaluation of neural network
    explanations" (2022).

    Examples:
        >>> relevance_mass_accuracy(torch.tensor([[3.0, 1.0, -2.0]]), torch.tensor([[True, False, False]]))
        tensor([0.7500])
    """
    scores, inside = _scores_and_mask(attributions, masks, batch_dims)
    relevance = scores.abs() if absolute else scores.clamp(min=0)
    return torch.where(inside, relevance, 0).sum(-1) / relevance.sum(-1)


def relevance_rank_accuracy(attributions: Any, masks: Any, *, absolute: bool = False, batch_dims: int = 1) -> Tensor:
    """The share of the K largest attributions that lie in the mask, for a mask of K features.

        |{the K largest phi} and mask| / K

    Args:
        attributions: as `relevance_mass_accuracy`.
        masks: as `relevance_mass_accuracy`.
        batch_dims: as `relevance_mass_accuracy`.
        absolute: rank by |phi| instead of phi.

    Returns:
        Tensor [B], or [T, B]. Among equal attributions of which only some are in the top K each counts for the share that is,
        so the result is the mean over all orders of ties: that of an attribution of zeros is the share of the image that the
        mask covers. NaN for an empty mask, or an attribution with a NaN.

    Raises:
        InputError: as `relevance_mass_accuracy`.

    Source: Arras, Osman, Samek, "CLEVR-XAI: A benchmark dataset for the ground truth evaluation of neural network
    explanations" (2022).

    Examples:
        >>> relevance_rank_accuracy(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[True, True, False]]))
        tensor([0.5000])
    """
    scores, inside = _scores_and_mask(attributions, masks, batch_dims)
    size = inside.sum(-1, keepdim=True)
    hits = _hits_among_largest(scores.abs() if absolute else scores, inside, size)
    return hits / size[..., 0]


def top_k_intersection(attributions: Any, masks: Any, *, k: int, absolute: bool = False, batch_dims: int = 1) -> Tensor:
    """The share of the k largest attributions that lie in the mask.

        |{the k largest phi} and mask| / k

    Args:
        attributions: as `relevance_mass_accuracy`.
        masks: as `relevance_mass_accuracy`.
        batch_dims: as `relevance_mass_accuracy`.
        k: how many, at most all features.
        absolute: rank by |phi| instead of phi.

    Returns:
        Tensor [B], or [T, B]. Ties as in `relevance_rank_accuracy`. NaN for an attribution with a NaN.

    Raises:
        InputError: as `relevance_mass_accuracy`, or a bad `k`.

    Quantus' default is k = 1000; a mask smaller than k cannot reach 1 there and here.

    Source: Theiner, Müller-Budack, Ewerth, "Interpretable Semantic Photo Geolocation" (2022).

    Examples:
        >>> top_k_intersection(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[True, True, False]]), k=1)
        tensor([1.])
    """
    require_positive("k", k)
    scores, inside = _scores_and_mask(attributions, masks, batch_dims)
    if k > scores.shape[-1]:
        raise InputError(f"k={k} is more than the {scores.shape[-1]} features of attributions.")
    size = torch.full_like(inside[..., :1], k, dtype=torch.long)
    return _hits_among_largest(scores.abs() if absolute else scores, inside, size) / k


def pointing_game(attributions: Any, masks: Any, *, tolerance: int = 0, absolute: bool = False, batch_dims: int = 1) -> Tensor:
    """Whether the largest attribution lies in the mask.

        1 if argmax_i phi_i is in the mask, else 0

    Args:
        attributions: as `relevance_mass_accuracy`.
        masks: as `relevance_mass_accuracy`.
        batch_dims: as `relevance_mass_accuracy`.
        tolerance: a maximum within this distance in pixels (Euclidean, along the last two axes) of the mask is a hit too; the
            paper has 15.
        absolute: the largest |phi| instead of phi.

    Returns:
        Tensor [B], or [T, B], of 0 and 1. Of several equal maxima the share that hits, so that of an attribution of zeros is
        the share of the image that the mask covers. NaN for an attribution with a NaN. The mean over examples is the accuracy.

    Raises:
        InputError: as `relevance_mass_accuracy`, or a bad `tolerance`.

    Quantus takes the first of several maxima and has no tolerance.

    Source: Zhang et al., "Top-Down Neural Attention by Excitation Backprop" (2018).

    Examples:
        >>> pointing_game(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[False, True, True]]))
        tensor([0.])
    """
    require_positive("tolerance", tolerance, least=0)
    scores, inside = _scores_and_mask(attributions, masks, batch_dims, tolerance)
    return _hits_among_largest(scores.abs() if absolute else scores, inside, torch.ones_like(inside[..., :1], dtype=torch.long))


def _hits_among_largest(scores: Tensor, inside: Tensor, size: Tensor) -> Tensor:
    """How many of the largest scores are inside, where ties at the edge count by the share of them that is among the largest.

    Args:
        scores: Tensor [*lead, D].
        inside: boolean Tensor [*lead, D].
        size: integer Tensor [*lead, 1], how many are the largest.
    """
    least = scores.sort(dim=-1, descending=True).values.gather(-1, (size - 1).clamp(min=0))
    above, equal = scores > least, scores == least
    share = (size[..., 0] - above.sum(-1)) / equal.sum(-1).to(scores.dtype)
    hits = (above & inside).sum(-1) + share * (equal & inside).sum(-1)
    return torch.where(scores.isnan().any(-1), torch.nan, hits)


def _scores_and_mask(attributions: Any, masks: Any, batch_dims: int, tolerance: int = 0) -> tuple[Tensor, Tensor]:
    """Both as [*lead, D]."""
    scores = leaves_of("attributions", attributions, batch_dims)
    whole = flatten_as("attributions", attributions, attributions)
    given = [mask for mask, a in zip(flatten_as("masks", masks, attributions), whole) if a is not None]
    aligned = [_aligned(mask, score, batch_dims, tolerance) for mask, score in zip(given, scores)]
    return flattened(scores, batch_dims), flattened(aligned, batch_dims)


def _aligned(mask: Any, score: Tensor, batch_dims: int, tolerance: int) -> Tensor:
    """A mask in the shape of what it is the mask of."""
    dims = [score.ndim, score.ndim - 1] if batch_dims == 2 else [score.ndim]
    fits = isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.ndim in dims
    if not fits or any(m not in (1, s) for m, s in zip(mask.shape[::-1], score.shape[::-1])):
        raise InputError(
            f"masks holds {describe(mask)} for attributions of shape {list(score.shape)}; give a boolean tensor with as many "
            "dimensions, each of the same size or 1."
        )
    mask = mask.expand(score.shape)
    return _dilated(mask, tolerance, score.ndim - batch_dims) if tolerance else mask


def _dilated(mask: Tensor, radius: int, axes: int) -> Tensor:
    """A mask that is also True within a distance of what was."""
    if axes < 2:
        raise InputError(f"tolerance={radius} counts pixels along the last two axes, but masks holds {describe(mask)}.")
    offsets = torch.arange(-radius, radius + 1, device=mask.device)
    disc = (offsets[:, None].square() + offsets.square() <= radius**2).to(torch.float32)
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).to(torch.float32)
    return (conv2d(flat, disc[None, None], padding=radius) > 0.5).reshape(mask.shape)
