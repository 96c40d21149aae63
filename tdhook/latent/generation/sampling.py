"""The choice of a next token: greedy, or drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.checks import require_number, require_positive
from ...core.errors import InputError
from ...core.randomness import require_generator
from ...core.structure import describe


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature first, then `top_k`, then `top_p`; a temperature of 0 takes the most probable token."""

    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature)
        require_positive("top_k", self.top_k, optional=True)
        require_generator(self.generator)
        p = self.top_p
        if p is not None and (not isinstance(p, (int, float)) or isinstance(p, bool) or not 0 < p <= 1):
            raise InputError(f"top_p is {describe(p)}; give a number above 0, up to 1, or None.")
        if self.temperature == 0:
            for name in ("top_k", "top_p", "generator"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name} is given, but temperature=0 draws nothing; give temperature=1.0 to sample.")

    def choose(self, logits: Tensor) -> Tensor:
        """The next tokens [B] for logits [B, V]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        scores = logits / self.temperature
        if self.top_k is not None:
            scores = keep_top_k(scores, self.top_k)
        if self.top_p is not None:
            scores = keep_top_p(scores, self.top_p)
        return draw(scores.softmax(-1), self.generator)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Scores [B, V] with all but the k largest, and what equals the last of these, set to minus infinity."""
    least = scores.topk(min(k, scores.shape[-1]), -1).values[..., -1:]
    return torch.where(scores < least, -torch.inf, scores)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Scores [B, V] with all but the most probable tokens, those that together just reach p, set to minus infinity."""
    ascending, order = scores.sort(-1)
    unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - p
    last = torch.arange(scores.shape[-1], device=scores.device) == scores.shape[-1] - 1  # one token is always left
    return torch.where((unlikely & ~last).gather(-1, order.argsort(-1)), -torch.inf, scores)


def draw(probabilities: Tensor, generator: Any) -> Tensor:
    """One index [B] from each row of probabilities [B, V].

    The index of the largest p / e with e exponential numbers, as `torch.multinomial` does it; the numbers are drawn on the
    device of the generator, so that they do not depend on where the model is.
    """
    device = probabilities.device if generator is None else generator.device
    empty = torch.empty_like(probabilities, device=device, memory_format=torch.contiguous_format)
    try:
        exponential = empty.exponential_(generator=generator)
    except RuntimeError:
        # vmap with randomness="different" writes into batched tensors alone, as a number that it has drawn is
        drawn = torch.rand((), generator=generator, device=device, dtype=empty.dtype)
        exponential = torch.empty_like(probabilities + 0 * drawn.to(probabilities.device), device=device).exponential_(
            generator=generator
        )
    return (probabilities / exponential.to(probabilities.device)).argmax(-1)
