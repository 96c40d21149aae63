"""How good an attribution is: complete, faithful, robust, simple, in the right place, and dependent on the model."""

from ..core.correlation import average_ranks, pearson, spearman
from .completeness import completeness
from .complexity import complexity, effective_complexity, sparseness
from .curves import Curve, deletion, insertion, pixel_flipping
from .imputation import linear_imputation
from .infidelity import gaussian_noise, infidelity, square_removal
from .localisation import pointing_game, relevance_mass_accuracy, relevance_rank_accuracy, top_k_intersection
from .randomisation import Randomisation, model_parameter_randomisation, random_logit
from .road import road
from .robustness import average_sensitivity, local_lipschitz, max_sensitivity
from .subsets import faithfulness_correlation, sensitivity_n

__all__ = [
    "Curve",
    "Randomisation",
    "average_ranks",
    "average_sensitivity",
    "completeness",
    "complexity",
    "deletion",
    "effective_complexity",
    "faithfulness_correlation",
    "gaussian_noise",
    "infidelity",
    "insertion",
    "linear_imputation",
    "local_lipschitz",
    "max_sensitivity",
    "model_parameter_randomisation",
    "pearson",
    "pixel_flipping",
    "pointing_game",
    "random_logit",
    "relevance_mass_accuracy",
    "relevance_rank_accuracy",
    "road",
    "sensitivity_n",
    "sparseness",
    "spearman",
    "square_removal",
    "top_k_intersection",
]
