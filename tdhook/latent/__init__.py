"""Latent analysis: reading, patching, steering and probing what happens inside a model.

- patching: `activation_patching`
- transformers: `names` gives the sites of residual stream, attention, heads and MLPs; `lenses` reads them (logit lens, tuned
  lens, direct logit attribution, attention patterns)
- data: `collect` and `open_activations` keep activations of a data set, `top_activating` finds the examples that excite a unit
- `probes`: linear, logistic, bilinear and MLP probes for many sites and labels at once, cross-validation, controls
- `concepts`: concept vectors, TCAV, erasure, attribution through a unit or direction
- `dimension`: intrinsic dimension; `similarity`: CKA, CCA, Procrustes, RSA, information imbalance
"""

from . import concepts, dimension, lenses, probes, similarity
from .activation_patching import Patching, activation_patching
from .activation_store import open_activations
from .collection import collect
from .names import HeadLayout, Names, Norm, Projection, names
from .top_activating import TopActivating, top_activating

__all__ = [
    "HeadLayout",
    "Names",
    "Norm",
    "Patching",
    "Projection",
    "TopActivating",
    "activation_patching",
    "collect",
    "concepts",
    "dimension",
    "lenses",
    "names",
    "open_activations",
    "probes",
    "similarity",
    "top_activating",
]
