"""GPT-2 of several sizes with random weights. Also loaded by the workers of other environments, which have no `tdhook`."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

HELLO = (15496, 11, 995, 0)  # "Hello, world!"
SHAPES = {
    "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2},
    # with so few layers, GPT-2's own vocabulary would be most of the work
    "shallow": {"n_layer": 3, "n_embd": 768, "n_head": 12, "vocab_size": 8000},
    "small": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
}


def gpt2(size: str, spread: float = 0.02) -> GPT2LMHeadModel:
    """In evaluation mode, the same weights in every process.

    Args:
        size: a key of `SHAPES`.
        spread: the standard deviation of the weights. With that of GPT-2 itself a random network hardly moves information
            between tokens; with 0.1 patches have effects of the order of the logits.
    """
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SHAPES[size], initializer_range=spread, bos_token_id=0, eos_token_id=0)).eval()


def hello(batch: int) -> Tensor:
    """The ids of "Hello, world!", [batch, 4]."""
    return torch.tensor([HELLO] * batch)


def prompts(batch: int, length: int, differing: int) -> tuple[Tensor, Tensor]:
    """Random clean and corrupted ids, [batch, length] each, which differ at one token."""
    clean = torch.randint(1000, 8000, (batch, length), generator=torch.Generator().manual_seed(1))
    corrupted = clean.clone()
    corrupted[:, differing] -= 1
    return clean, corrupted


def logit_difference(logits: Tensor) -> Tensor:
    """Between two tokens, at the last position: [batch, length, vocabulary] -> [batch]."""
    return logits[:, -1, 5335] - logits[:, -1, 1757]
