"""Selection of the units whose activation or relevance goes with a concept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from tensordict import tensorclass
from torch import Tensor

from ...core.checks import require_positive
from ...core.compat import visible
from ...core.errors import InputError
from ...core.structure import describe
from .concept_vectors import require_examples

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(-1),
    "max": lambda x: x.amax(-1),
    "sum": lambda x: x.sum(-1),
    "absolute_sum": lambda x: x.sum(-1).abs(),
}
SCORES = ("difference", "effect_size")
DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "positive": lambda scores: scores,
    "negative": lambda scores: -scores,
    "both": lambda scores: scores.abs(),
}


@tensorclass
class UnitSelection:
    """Units ranked for a concept, or for each of T concepts.

    Attributes:
        units: integer Tensor [*T, n], the chosen units, the best first.
        scores: Tensor [*T, C], of all units; positive where the examples of the concept have more.
        positive_mean, negative_mean: Tensor [*T, C], of the pooled values over examples with and without the concept.
    """

    units: Tensor
    scores: Tensor
    positive_mean: Tensor
    negative_mean: Tensor


def select_units(
    values: Tensor,
    labels: Tensor,
    *,
    count: int = 1,
    direction: str = "positive",
    pool: str = "mean",
    score: str = "difference",
    axis: int = 1,
) -> UnitSelection:
    """The units that differ most between examples with a concept and without.

        difference:   s_c = mean over positives of pool(v_c) - mean over negatives of pool(v_c)
        effect_size:  s_c = difference / sqrt((var over positives + var over negatives) / 2)

    Args:
        values: activations or relevances [N, C, *spatial], or with C on another axis.
        labels: binary Tensor [N], or [*T, N] for several concepts: True or 1 for examples with it.
        count: how many units to choose.
        direction: `"positive"`: units with more of it; `"negative"`: with less; `"both"`: by the absolute score.
        pool: over all other axes: `"mean"`, `"max"`, `"sum"` or `"absolute_sum"`, |sum|.
        score: `"difference"` or `"effect_size"`, which does not depend on a unit's scale.
        axis: the axis of the units: 1 for maps, -1 for tokens [N, L, D].

    Returns:
        `UnitSelection`: `units` [*T, count], `scores` [*T, C], and the two means.

    Raises:
        InputError: labels that are not binary, or of one class only; NaN; a `count` above C; an unknown option.

    Cost: one product of labels and values.

    Source: after the concept selection of tdhook 0.2 (relevances, `pool="absolute_sum"`, `count=1`); its pipelines choose by
    activation with `pool="max"`.

    Examples:
        >>> values = torch.tensor([[0.0, 3.0], [0.0, 5.0], [1.0, 0.0], [1.0, 0.0]])
        >>> chosen = select_units(values, torch.tensor([1, 1, 0, 0]))
        >>> chosen.units, chosen.scores
        (tensor([1]), tensor([-1., 4.]))
    """
    require_examples("values", values)
    for name, given, allowed in [("pool", pool, POOLS), ("score", score, SCORES), ("direction", direction, DIRECTIONS)]:
        if given not in allowed:
            raise InputError(f"{name}={given!r} is unknown; choose from {', '.join(allowed)}.")
    if not isinstance(axis, int) or not -values.ndim <= axis < values.ndim or axis % values.ndim == 0:
        raise InputError(f"axis={axis!r} is no axis of units of values, which is {describe(values)}.")
    require_positive("count", count)
    if count > values.shape[axis]:
        raise InputError(f"count={count} is more than the {values.shape[axis]} units.")
    positive, negative = _masks(values, labels)

    moved = values.movedim(axis, 1)
    pooled = POOLS[pool](moved.flatten(2)) if moved.ndim > 2 else moved.abs() if pool == "absolute_sum" else moved
    pooled = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
    means, variances = zip(*(_moments(pooled, mask) for mask in (positive, negative)))
    scores = means[0] - means[1]
    if score == "effect_size":
        spread = ((variances[0] + variances[1]) / 2).sqrt()
        constant = spread == 0
        scores = scores / torch.where(constant, torch.ones_like(spread), spread)
        scores = torch.where(constant & (scores != 0), scores.sign() * torch.inf, scores)
    units = DIRECTIONS[direction](scores).topk(count, dim=-1).indices
    return UnitSelection(  # type: ignore[call-arg]
        units=units, scores=scores, positive_mean=means[0], negative_mean=means[1], batch_size=[]
    )


def _moments(pooled: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [*T, C] over the examples of a mask [*T, N]."""
    weights = mask.to(pooled.dtype)
    weights = weights / weights.sum(-1, keepdim=True)
    mean = weights @ pooled
    deviations = pooled - rearrange(mean, "... c -> ... 1 c")
    return mean, (rearrange(weights, "... n -> ... n 1") * deviations.square()).sum(-2)


def _masks(values: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
    """Examples with and without the concept."""
    if not isinstance(labels, Tensor) or labels.ndim == 0 or labels.is_complex() or labels.shape[-1] != len(values):
        raise InputError(f"labels is {describe(labels)} for {len(values)} examples; give a binary tensor [N] or [*T, N].")
    if visible(labels):
        if not ((labels == 0) | (labels == 1)).all():
            raise InputError("labels is not binary; give 1 for examples with the concept and 0 for those without.")
        if (labels == labels[..., :1]).all(-1).any():
            raise InputError("labels has one class only; selection compares examples with and without the concept.")
    return labels == 1, labels == 0
