"""Latent analysis: reading, patching, steering and probing what happens inside a model.

- patching: `activation_patching`, over data sets `patch_pairs`; `interchange` of subspaces; `path_patching`; `causal_trace`
- by gradients: `attribution_patching`, `integrated_gradient_patching`, `atp_star`, with `subset_patching` to check them
- ablation: `ablate`, `ablation_effects`, `mean_activations`
- `circuits`: edges between the parts of a transformer
- transformers: `names` gives the sites of residual stream, attention, heads and MLPs; `lenses` reads them (logit lens, tuned
  lens, direct logit attribution, attention patterns)
- `steering`: directions and edits that write along them; `generate` continues prompts, also under interventions
- data: `collect` and `open_activations` keep activations of a data set, `top_activating` finds the examples that excite a unit
- `probes`: linear, logistic, bilinear and MLP probes for many sites and labels at once, cross-validation, controls
- `concepts`: concept vectors, TCAV, erasure, attribution through a unit or direction
- `dimension`: intrinsic dimension; `similarity`: CKA, CCA, Procrustes, RSA, information imbalance
"""

from . import circuits, concepts, dimension, generation, lenses, probes, similarity, steering
from .ablation import Ablation, ablate, ablation_effects
from .activation_patching import Patching, activation_patching
from .activation_store import open_activations
from .atp_star import atp_star
from .attribution_patching import AttributionPatching, attribution_patching
from .causal_tracing import CausalTrace, causal_trace
from .collection import collect
from .generation import Generation, generate
from .integrated_gradient_patching import integrated_gradient_patching
from .mean_activations import mean_activations
from .names import HeadLayout, Names, Norm, Projection, names
from .pair_patching import PairPatching, patch_pairs
from .path_patching import path_patching
from .prompt_pairs import differing_positions, token_span
from .steering import steering_vectors
from .subset_patching import SubsetPatching, subset_patching
from .subspaces import Subspace, interchange, projection, span
from .top_activating import TopActivating, top_activating

__all__ = [
    "Ablation",
    "AttributionPatching",
    "CausalTrace",
    "Generation",
    "HeadLayout",
    "Names",
    "Norm",
    "PairPatching",
    "Patching",
    "Projection",
    "SubsetPatching",
    "Subspace",
    "TopActivating",
    "ablate",
    "ablation_effects",
    "activation_patching",
    "atp_star",
    "attribution_patching",
    "causal_trace",
    "circuits",
    "collect",
    "concepts",
    "differing_positions",
    "dimension",
    "generate",
    "generation",
    "integrated_gradient_patching",
    "interchange",
    "lenses",
    "mean_activations",
    "names",
    "open_activations",
    "patch_pairs",
    "path_patching",
    "probes",
    "projection",
    "similarity",
    "span",
    "steering",
    "steering_vectors",
    "subset_patching",
    "token_span",
    "top_activating",
]
