"""Scores by name, and what each of them takes from a probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...core.errors import InputError
from ...core.structure import describe
from .scores import accuracy, auroc, balanced_accuracy, log_loss, r2


@dataclass(frozen=True)
class Score:
    """A score by name.

    Attributes:
        function: (what the probe says, y, sample_weight=) -> Tensor [*B]; of decisions and probabilities it takes `per_class=`
            too: whether their last axis are classes.
        of: what it takes from the probe: `"predict"`, `"decision"` or `"probability"`.
        larger_is_better: whether it is so.
        labels: whether y are labels.
        every_class: whether there is no score where a class has no example.
    """

    function: Callable[..., Tensor]
    of: str = "predict"
    larger_is_better: bool = True
    labels: bool = True
    every_class: bool = False


SCORES: dict[str, Score] = {
    "accuracy": Score(accuracy),
    "balanced_accuracy": Score(balanced_accuracy),
    "auroc": Score(auroc, "decision", every_class=True),
    "log_loss": Score(log_loss, "probability", larger_is_better=False),
    "r2": Score(r2, labels=False),
}


def score_function(score: str | Score | Callable[..., Tensor] | None, y: Tensor) -> Score:
    """The score with a name, or the one given; None is the accuracy of labels, and r2 of other numbers.

    Raises:
        InputError: an unknown name, or one that does not fit what y holds.
    """
    floating = y.is_floating_point()
    if score is None:
        return SCORES["r2" if floating else "accuracy"]
    if isinstance(score, Score):
        return score
    if callable(score):
        return Score(score)
    if not isinstance(score, str) or score not in SCORES:
        raise InputError(
            f"score is {describe(score)}; choose {', '.join(map(repr, SCORES))}, or give a function of (predicted, y, "
            "sample_weight=)."
        )
    if SCORES[score].labels == floating:
        fitting = ", ".join(repr(name) for name, known in SCORES.items() if known.labels != floating)
        raise InputError(f"score={score!r} does not fit y, which is {describe(y)}; choose {fitting}.")
    return SCORES[score]
