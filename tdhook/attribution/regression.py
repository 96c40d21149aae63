"""Weighted least squares of many outcomes on one design, with standard errors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.batching import chunks

ROWS = 1024  # of the design in float64 at once


def least_squares(
    present: Tensor, center: Tensor | None, weights: Tensor | None, outcomes: Tensor, penalty: Tensor
) -> tuple[Tensor, Tensor]:
    """Coefficients and their standard errors over samples drawn anew.

        beta = H^-1 sum_s w_s z_s y_s,  H = sum_s w_s z_s z_s' + penalty,  z_s = present_s - center_s
        SE^2 = sum_s (H^-1 w_s z_s)^2 (y_s - z_s beta)^2 / (1 - h_s),   h_s = w_s z_s' H^-1 z_s

    The standard error makes no assumption on how the residuals vary (White, 1980, with the correction HC2 of MacKinnon and
    White, 1985): the model that is explained need not be linear. It is NaN where the samples do not determine the coefficients.

    Args:
        present: the design, bool Tensor [n, G].
        center: Tensor [G], what is taken from each row; None for the mean of the row itself.
        weights: Tensor [n]; None for ones.
        outcomes: float64 Tensor [n, K].
        penalty: float64 Tensor [G, G].

    Returns:
        Tensors [K, G] in float64.
    """

    def rows(part: slice) -> tuple[Tensor, Tensor]:
        z = present[part].double()
        z = z - (z.mean(-1, keepdim=True) if center is None else center)
        return z, z if weights is None else z * weights[part, None]

    parts = list(chunks(len(present), ROWS))
    normal, moment = penalty, outcomes.new_zeros(penalty.shape[0], outcomes.shape[1])
    for part in parts:
        z, weighted = rows(part)
        normal = normal + z.mT @ weighted
        moment = moment + weighted.mT @ outcomes[part]
    scales, axes = torch.linalg.eigh(normal)
    known = scales > scales[-1] * len(normal) * torch.finfo(scales.dtype).eps
    inverse = axes * torch.where(known, 1 / scales, 0) @ axes.mT
    coefficients = inverse @ moment
    variance = torch.zeros_like(coefficients)
    for part in parts:
        z, weighted = rows(part)
        influence = weighted @ inverse
        kept = (1 - (influence * z).sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float64).eps)
        variance = variance + influence.square().mT @ ((outcomes[part] - z @ coefficients).square() / kept)
    return coefficients.mT, torch.where(known.all(), variance.sqrt(), torch.nan).mT
