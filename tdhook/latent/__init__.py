"""Latent analysis: reading, patching and steering what happens inside a model."""

from .activation_patching import Patching as Patching
from .activation_patching import activation_patching as activation_patching
