"""Whether the probabilities of probes are frequencies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.checks import require_positive
from .scores import has_classes, of_each_class, require_aligned, require_labels, weights_of


class Calibration(NamedTuple):
    """Whether probabilities are the frequencies that they claim: the table of a reliability diagram, and its mean gap.

    Attributes:
        error: Tensor [*B], the expected calibration error: the mean over examples of |frequency - confidence| of their bin.
        confidence: Tensor [*B, bins], the mean probability in each bin; NaN in an empty one.
        frequency: Tensor [*B, bins], how often what was predicted with it is true; NaN in an empty one.
        share: Tensor [*B, bins], the share of the examples in each bin.
    """

    error: Tensor
    confidence: Tensor
    frequency: Tensor
    share: Tensor


def calibration(
    probability: Tensor,
    y: Tensor,
    *,
    bins: int = 10,
    per_class: bool | None = None,
    sample_weight: Tensor | None = None,
) -> Calibration:
    """How far probabilities are from frequencies, in bins of equal width.

        error = sum_b share_b |frequency_b - confidence_b|

    Args:
        probability: Tensor [*P, N] of label 1, which is then what is looked at; or [*P, N, C] of every label: then the largest
            one is, and how often its label is the true one.
        y: true labels, integer Tensor [*T, N].
        bins: how many bins of [0, 1].
        per_class: whether the last axis of `probability` are classes; None where the shapes tell.
        sample_weight: Tensor [N], or of a shape that broadcasts; None for ones.

    Returns:
        `Calibration`.

    Raises:
        InputError: shapes that do not fit or do not tell where the classes are, labels beyond the classes, no bin.

    Source: Naeini, Cooper, Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning" (2015); Guo et al., "On
        Calibration of Modern Neural Networks" (2017).

    Examples:
        >>> result = calibration(torch.tensor([0.1, 0.1, 0.9, 0.9]), torch.tensor([0, 0, 1, 0]), bins=2)
        >>> result.error, result.frequency
        (tensor(0.2500), tensor([0.0000, 0.5000]))
    """
    require_positive("bins", bins)
    if has_classes(probability, y, per_class):
        given = of_each_class("probability", probability, y, True, sample_weight)
        confidence, label = given.max(-1)
        true = label == y
    else:
        require_aligned("probability", probability, y, sample_weight)
        require_labels(y, 2)
        confidence, true = probability, y == 1
    confidence, true, weight = torch.broadcast_tensors(confidence, true, weights_of(confidence, sample_weight))
    bin_of = (confidence * bins).long().clamp(0, bins - 1)
    empty = torch.zeros((*confidence.shape[:-1], bins), dtype=weight.dtype, device=weight.device)

    def total(value: Tensor) -> Tensor:
        return empty.scatter_add(-1, bin_of, torch.where(weight > 0, weight * value, 0))

    mass = total(torch.ones_like(weight))
    claimed, frequency = total(confidence.to(weight.dtype)) / mass, total(true.to(weight.dtype)) / mass
    share = mass / mass.sum(-1, keepdim=True)
    error = torch.where(mass > 0, share * (frequency - claimed).abs(), 0).sum(-1)
    return Calibration(error, claimed, frequency, share)
