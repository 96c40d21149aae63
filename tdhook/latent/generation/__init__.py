"""Generation under interventions: a transformed language model, run token by token, with or without a key-value cache."""

from .generate import Generation, generate

__all__ = ["Generation", "generate"]
