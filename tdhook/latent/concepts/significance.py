"""Whether scores over random runs differ from chance."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import tensorclass
from torch import Tensor

from ...core.checks import require_positive
from ...core.compat import visible
from ...core.errors import InputError
from ...core.structure import describe
from . import student_t


@tensorclass
class Significance:
    """A two-sided test for each of the hypotheses [*M]. All in float64.

    Attributes:
        statistic: Tensor [*M], the t of the test.
        degrees: Tensor [*M], its degrees of freedom.
        p_value: Tensor [*M].
        corrected: Tensor [*M], the p-value times the number of comparisons, at most 1 (Bonferroni).
    """

    statistic: Tensor
    degrees: Tensor
    p_value: Tensor
    corrected: Tensor


def tcav_significance(
    scores: Tensor,
    random_scores: Tensor | None = None,
    *,
    null: float = 0.5,
    equal_variances: bool = False,
    comparisons: int | None = None,
) -> Significance:
    """Two-sided t-test of scores over random runs: against those of random concepts, or against a number.

        Welch:       t = (mean a - mean b) / sqrt(var a / n_a + var b / n_b)
        one sample:  t = (mean a - null) / sqrt(var a / n_a)

    Args:
        scores: Tensor [*M, R], the scores of M concepts (targets, sites, ...) with R random sets, such as the `sign_count` of
            `tcav` for `cav(concepts, randoms)`.
        random_scores: Tensor [*M, R2] of the scores of random concepts, `cav(randoms[1:], randoms[0])`; its leading dimensions
            broadcast to those of `scores`. None: the test is against `null`.
        null: the expected score without `random_scores`.
        equal_variances: True for the test of Student, with a pooled variance, instead of that of Welch.
        comparisons: by how much p-values are multiplied; None: the number of hypotheses in `scores`.

    Returns:
        `Significance`. Where no score varies, p is 1 if the means are equal, else 0: a few runs that all give 1.0 say little.

    Raises:
        InputError: fewer than two runs, NaN, shapes that do not broadcast.

    Cost: none that counts.

    Source: Kim et al. (2018), section 3.5, where a concept is reported if it passes at alpha / comparisons; its code compares
    with random concepts. Welch, "The generalization of Student's problem when several different population variances are
    involved" (1947).

    Examples:
        >>> result = tcav_significance(torch.tensor([0.9, 0.8, 0.95]), torch.tensor([0.4, 0.6, 0.5]))
        >>> result.p_value < 0.02
        tensor(True)
    """
    _require_runs("scores", scores)
    require_positive("comparisons", comparisons, optional=True)
    mean, spread, n = _moments(scores)
    if random_scores is None:
        error, degrees = spread / n, torch.full_like(mean, n - 1)
        difference = mean - null
    else:
        _require_runs("random_scores", random_scores)
        other, other_spread, m = _moments(random_scores)
        try:
            other, other_spread = other.broadcast_to(mean.shape), other_spread.broadcast_to(mean.shape)
        except RuntimeError:
            raise InputError(
                f"random_scores is {describe(random_scores)}, which does not broadcast to scores, {describe(scores)}, before "
                "the last dimension."
            ) from None
        difference = mean - other
        if equal_variances:
            degrees = torch.full_like(mean, n + m - 2)
            error = (spread * (n - 1) + other_spread * (m - 1)) / degrees * (1 / n + 1 / m)
        else:
            first, second = spread / n, other_spread / m
            error = first + second
            degrees = error.square() / (first.square() / (n - 1) + second.square() / (m - 1))
            degrees = torch.where(error > 0, degrees, torch.full_like(degrees, n + m - 2))
    statistic = torch.where(difference == 0, torch.zeros_like(difference), difference / error.sqrt())
    p_value = student_t.two_sided(statistic, degrees)
    corrected = (p_value * (comparisons or max(1, mean.numel()))).clamp(max=1)
    return Significance(  # type: ignore[call-arg]
        statistic=statistic, degrees=degrees, p_value=p_value, corrected=corrected, batch_size=[]
    )


def _moments(scores: Tensor) -> tuple[Tensor, Tensor, int]:
    wide = scores.double()
    # The mean of equal numbers may be off by a rounding, which would pass for a variance.
    constant = (wide == wide[..., :1]).all(-1)
    mean = torch.where(constant, wide[..., 0], wide.mean(-1))
    return mean, torch.where(constant, torch.zeros_like(mean), wide.var(-1)), wide.shape[-1]


def _require_runs(name: str, scores: Any) -> None:
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.ndim == 0:
        raise InputError(f"{name} is {describe(scores)}; give a floating-point tensor [*M, R] of scores over R runs.")
    if scores.shape[-1] < 2:
        raise InputError(f"{name} has {scores.shape[-1]} runs in its last dimension; a test needs at least two.")
    if visible(scores) and not scores.isfinite().all():
        raise InputError(f"{name} holds NaN or infinity.")
