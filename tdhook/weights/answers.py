"""The logits of an answer, and the probability that they give to a target: what a fact is measured by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core.errors import TargetError
from ..core.structure import describe

Logits = Callable[[Any], Tensor]


def reading(logits: Logits | None) -> Logits:
    """The function that reads logits from an output, or the output itself, with a check of what it returns."""

    def read(output: Any) -> Tensor:
        scores = output if logits is None else logits(output)
        if not isinstance(scores, Tensor) or scores.ndim < 2 or not scores.is_floating_point():
            raise TargetError(
                f"the logits are {describe(scores)}; give logits=<function of the output to [B, C]>, such as "
                "lambda out: out.logits[:, -1]."
            )
        return scores

    return read


def log_probability(logits: Tensor, target: int | Tensor) -> Tensor:
    """Of all tokens of the target together.

    Args:
        logits: Tensor [B, *L, C].
        target: class, or an integer Tensor that broadcasts to [B, *L].

    Returns:
        Tensor [B].

    Raises:
        TargetError: a class out of range, a target that is no integer.

    Examples:
        >>> log_probability(torch.zeros(1, 4), 2).exp()
        tensor([0.2500])
    """
    if isinstance(target, int) and not isinstance(target, bool):
        if not -logits.shape[-1] <= target < logits.shape[-1]:
            raise TargetError(f"target={target} is out of range for {logits.shape[-1]} classes.")
        chosen = logits.log_softmax(-1)[..., target]
    elif isinstance(target, Tensor) and not target.is_floating_point() and target.ndim < logits.ndim:
        classes = target.expand(logits.shape[:-1])[..., None]
        chosen = logits.log_softmax(-1).gather(-1, classes).squeeze(-1)
    else:
        raise TargetError(f"target is {describe(target)}; give a class, or an integer tensor of one class for each prompt.")
    return chosen.reshape(len(logits), -1).sum(1)
