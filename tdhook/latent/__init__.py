"""Latent analysis: reading, patching and steering what happens inside a model."""

from .activation_patching import Patching, activation_patching

__all__ = ["Patching", "activation_patching"]
