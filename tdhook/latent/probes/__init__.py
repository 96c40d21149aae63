"""Probes: simple models fitted to activations, for all sites and labels in one call.

- Linear: `ridge`, `least_squares`, `logistic`, `sparse`, `lda`, `mean_difference`.
- Others: `bilinear` for pairs of sites, `mlp`, and `scikit` for any estimator of scikit-learn.
- What they say: `predict`, `decision`, `predict_probability`.
- How well: `accuracy`, `balanced_accuracy`, `auroc`, `r2`, `log_loss`, `calibration`; `cross_validate`.
- Whether that means anything: `selectivity`, `permutation_test`.

A fit takes `x`, a tensor [N, D] or one for each site, and `y` [*T, N] with as many tasks as there are, and returns a probe
for each. Examples of weight 0 are absent, so that folds are weights.
"""

from .bilinear import BilinearProbe, bilinear
from .calibration import Calibration, calibration
from .controls import PermutationTest, Selectivity, permutation_test, selectivity
from .estimators import EstimatorFit, EstimatorProbe, scikit
from .lda import lda
from .logistic import logistic
from .mean_difference import mean_difference
from .mlp import MLPProbe, mlp
from .probe import LinearProbe, decision, predict, predict_probability
from .ridge import least_squares, ridge
from .scores import accuracy, auroc, balanced_accuracy, log_loss, r2
from .scoring import Score
from .sparse import sparse
from .validation import CrossValidation, cross_validate

__all__ = [
    "BilinearProbe",
    "Calibration",
    "CrossValidation",
    "EstimatorFit",
    "EstimatorProbe",
    "LinearProbe",
    "MLPProbe",
    "PermutationTest",
    "Score",
    "Selectivity",
    "accuracy",
    "auroc",
    "balanced_accuracy",
    "bilinear",
    "calibration",
    "cross_validate",
    "decision",
    "lda",
    "least_squares",
    "log_loss",
    "logistic",
    "mean_difference",
    "mlp",
    "permutation_test",
    "predict",
    "predict_probability",
    "r2",
    "ridge",
    "scikit",
    "selectivity",
    "sparse",
]
