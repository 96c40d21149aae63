"""Attribution: which inputs, activations or weights made an output.

- gradients: `saliency`, `input_x_gradient`, `jacobian`; `smooth` averages any method over noise
- paths: `integrated_gradients`, `convergence_delta`, `expected_gradients`, `guided_integrated_gradients`
- inside the model: `internal_influence`, `layer_conductance`, `neuron_conductance`, and `at=` of most methods
- activation maps: `grad_cam`, `grad_cam_plus_plus`, `hires_cam`, `x_grad_cam`, `layer_cam`, `eigen_cam`, `eigen_grad_cam`,
  `score_cam`, `ablation_cam`; `guided_backpropagation`, `guided_grad_cam`
- perturbation: `feature_ablation`, `feature_permutation`, `occlusion`, `shapley_values`, `shapley_value_sampling`,
  `kernel_shap`, `lime`
- optimisation: `activation_maximization`, `fgsm`, `pgd`
- propagation rules: `lrp` with a table of `rules`, `concept_relevance`, `parameter_relevance`; `deep_lift`, `deep_lift_shap`,
  `deconvnet`
- sequences: `sequence_attribution`, with targets `next_tokens`, `entropy`, `kl_divergence`; `aggregate_tokens`, `word_groups`
"""

from . import rules
from .ablation import feature_ablation, feature_permutation
from .absorbed import Ledger
from .activation_maps import grad_cam, grad_cam_plus_plus, hires_cam, layer_cam, x_grad_cam
from .activation_maximization import Maximization, activation_maximization, l2_norm, total_variation
from .adversarial import cross_entropy, fgsm, pgd
from .concept_relevance import concept_relevance
from .conductance import internal_influence, layer_conductance
from .deconvnet import deconvnet
from .deep_lift import deep_lift, deep_lift_shap
from .eigen_maps import eigen_cam, eigen_grad_cam
from .expected_gradients import expected_gradients
from .guided_backpropagation import guided_backpropagation
from .guided_grad_cam import guided_grad_cam
from .guided_integrated_gradients import guided_integrated_gradients
from .integrated_gradients import PathIntegral, convergence_delta, integrated_gradients
from .jacobian import jacobian
from .kernel_shap import kernel_shap
from .lime import lime
from .lrp import lrp
from .maps import token_grid
from .masking_maps import ablation_cam, score_cam
from .neuron_conductance import neuron_conductance
from .occlusion import occlusion
from .parameter_relevance import parameter_relevance
from .paths import gaussian_blur, straight
from .saliency import input_x_gradient, saliency
from .sequences import sequence_attribution
from .shapley import shapley_value_sampling, shapley_values
from .smooth import smooth
from .token_targets import entropy, kl_divergence, next_tokens
from .words import aggregate_tokens, word_groups

__all__ = [
    "Ledger",
    "Maximization",
    "PathIntegral",
    "ablation_cam",
    "activation_maximization",
    "aggregate_tokens",
    "concept_relevance",
    "convergence_delta",
    "cross_entropy",
    "deconvnet",
    "deep_lift",
    "deep_lift_shap",
    "eigen_cam",
    "eigen_grad_cam",
    "entropy",
    "expected_gradients",
    "feature_ablation",
    "feature_permutation",
    "fgsm",
    "gaussian_blur",
    "grad_cam",
    "grad_cam_plus_plus",
    "guided_backpropagation",
    "guided_grad_cam",
    "guided_integrated_gradients",
    "hires_cam",
    "input_x_gradient",
    "integrated_gradients",
    "internal_influence",
    "jacobian",
    "kernel_shap",
    "kl_divergence",
    "l2_norm",
    "layer_cam",
    "layer_conductance",
    "lime",
    "lrp",
    "neuron_conductance",
    "next_tokens",
    "occlusion",
    "parameter_relevance",
    "pgd",
    "rules",
    "saliency",
    "score_cam",
    "sequence_attribution",
    "shapley_value_sampling",
    "shapley_values",
    "smooth",
    "straight",
    "token_grid",
    "total_variation",
    "word_groups",
    "x_grad_cam",
]
