"""Lenses and decompositions: what the residual stream says at each layer, and who wrote it."""

from .attribution import LogitAttribution, direct_logit_attribution
from .decomposition import component_labels, head_outputs, residual_decomposition
from .logit_lens import logit_lens
from .patterns import (
    attention_patterns,
    duplicate_token_scores,
    induction_scores,
    previous_token_scores,
    repeated_tokens,
)
from .translators import Translators, fit_translators, identity_translators, train_translators

__all__ = [
    "LogitAttribution",
    "Translators",
    "attention_patterns",
    "component_labels",
    "direct_logit_attribution",
    "duplicate_token_scores",
    "fit_translators",
    "head_outputs",
    "identity_translators",
    "induction_scores",
    "logit_lens",
    "previous_token_scores",
    "repeated_tokens",
    "residual_decomposition",
    "train_translators",
]
