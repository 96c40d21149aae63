"""Intrinsic dimension: how many directions the points of a representation vary in, here and there or as a whole."""

from .conditioning import per_channel, per_position
from .estimates import Dimension
from .neighbour_ratios import levina_bickel, local_knn
from .resampling import Interval, ScaleCurve, confidence_interval, scale_curve
from .spectra import ca_pca, local_pca, participation_ratio
from .two_nn import Ratios, two_nn, two_nn_ratios

__all__ = [
    "Dimension",
    "Interval",
    "Ratios",
    "ScaleCurve",
    "ca_pca",
    "confidence_interval",
    "levina_bickel",
    "local_knn",
    "local_pca",
    "participation_ratio",
    "per_channel",
    "per_position",
    "scale_curve",
    "two_nn",
    "two_nn_ratios",
]
