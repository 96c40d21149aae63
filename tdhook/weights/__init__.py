"""Weights as data: pure maps from params to params, or to scores.

- pruning: `magnitude`, `gradient_x_weight`, `taylor`, `fisher`, `optimal_brain_damage`, `wanda`; `prune`, `pruner`,
  `prune_circuit`
- adapters: `adapt`, `CrossLayer`; `lora_init`, `lora_merge`, `lora_unmerge`, `lora_from_difference`, `energy_ranks`
- task vectors: `task_vector`, `add_task_vectors`, `analogy`, `choose_strength`, `ties`, `dare`, `slerp`
- editing: `key_covariance`, `key_at`, `optimize_value`, `rank_one_update`, `rome`, `evaluate_edit`; `orthogonalize`
- examples: `per_example_gradients`, `tracin`, `self_influence`, `influence_functions`
- curvature: `hessian_vector_product`, `gauss_newton_vector_product`, `fisher_vector_product`, `conjugate_gradient`
- checkpoints: `parameter_integrated_gradients`, `sum_by`, `sum_heads`; `ensemble`
- lens: `top_tokens`, `ov_circuit`, `qk_circuit`, `z_scores`, `outliers`
"""

from .adapters import CrossLayer, adapt
from .circuit_pruning import Circuit, prune_circuit
from .circuits import Entries, Factored, ov_circuit, qk_circuit
from .conjugate_gradient import Solution, conjugate_gradient
from .curvature import fisher_vector_product, gauss_newton_vector_product, hessian_vector_product
from .directions import orthogonalize
from .edit_evaluation import EditEvaluation, Preference, Specificity, efficacy, evaluate_edit, specificity
from .ensembles import Ensemble, ensemble
from .influence import self_influence, tracin
from .influence_functions import Influence, influence_functions
from .keys import KeyStatistics, key_at, key_covariance
from .lens import Outliers, Tokens, outliers, top_tokens, z_scores
from .lora import energy_ranks, lora_from_difference, lora_init, lora_merge, lora_unmerge
from .merging import dare, slerp, ties
from .parameter_paths import ParameterPath, parameter_integrated_gradients, sum_by, sum_heads
from .per_example import per_example_gradients
from .pruning import Pruned, prune, pruner
from .rank_one import rank_one_update
from .rome import ValueSearch, optimize_value, rome
from .scores import fisher, gradient_x_weight, magnitude, optimal_brain_damage, taylor
from .task_vectors import Strength, add_task_vectors, analogy, choose_strength, task_vector
from .units import Units
from .wanda import wanda

__all__ = [
    "Circuit",
    "CrossLayer",
    "EditEvaluation",
    "Ensemble",
    "Entries",
    "Factored",
    "Influence",
    "KeyStatistics",
    "Outliers",
    "ParameterPath",
    "Preference",
    "Pruned",
    "Solution",
    "Specificity",
    "Strength",
    "Tokens",
    "Units",
    "ValueSearch",
    "adapt",
    "add_task_vectors",
    "analogy",
    "choose_strength",
    "conjugate_gradient",
    "dare",
    "efficacy",
    "energy_ranks",
    "ensemble",
    "evaluate_edit",
    "fisher",
    "fisher_vector_product",
    "gauss_newton_vector_product",
    "gradient_x_weight",
    "hessian_vector_product",
    "influence_functions",
    "key_at",
    "key_covariance",
    "lora_from_difference",
    "lora_init",
    "lora_merge",
    "lora_unmerge",
    "magnitude",
    "optimal_brain_damage",
    "optimize_value",
    "orthogonalize",
    "outliers",
    "ov_circuit",
    "parameter_integrated_gradients",
    "per_example_gradients",
    "prune",
    "prune_circuit",
    "pruner",
    "qk_circuit",
    "rank_one_update",
    "rome",
    "self_influence",
    "slerp",
    "specificity",
    "sum_by",
    "sum_heads",
    "task_vector",
    "taylor",
    "ties",
    "top_tokens",
    "tracin",
    "wanda",
    "z_scores",
]
