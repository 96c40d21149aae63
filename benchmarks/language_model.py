"""SmolLM2-135M with its tokenizer, as `docs/tutorials/real_models.py` loads it, once per process."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
PROMPT = "When Mary and John went to the store, John gave a drink to"


@functools.cache
def smollm2() -> tuple[Any, Any]:
    """The model, in float32 and evaluation mode, and its tokenizer."""
    if str(TUTORIALS) not in sys.path:
        sys.path.append(str(TUTORIALS))
    import real_models

    return real_models.smollm2()


def token_ids(text: str) -> Tensor:
    """[1, L]"""
    return torch.tensor([smollm2()[1].encode(text)])
