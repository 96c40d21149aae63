"""Probes: simple models fitted to activations, for all sites and labels in one call."""

from .lda import lda
from .logistic import logistic
from .mean_difference import mean_difference
from .probe import LinearProbe, decision, predict, predict_probability
from .ridge import least_squares, ridge
from .sparse import sparse

__all__ = [
    "LinearProbe",
    "decision",
    "lda",
    "least_squares",
    "logistic",
    "mean_difference",
    "predict",
    "predict_probability",
    "ridge",
    "sparse",
]
