"""Interpretability of PyTorch models as pure functions: no hooks, no state, and any model."""

from . import attribution, errors, latent, metrics, targets, weights
from .core.derivatives import edit_gradient, freeze, perturb
from .core.errors import TdhookError
from .core.estimate import Estimate
from .core.functional import FunctionalModel, functionalize
from .core.groups import Groups
from .core.progress import tqdm_progress
from .core.reading import capture, stop_at
from .core.ruling import with_rules
from .core.sites import Site
from .core.tail import start_from
from .core.tracing import Trace, trace
from .core.transforms import expand
from .core.writing import intervene

__version__ = "0.1.0"

__all__ = [
    "Estimate",
    "FunctionalModel",
    "Groups",
    "Site",
    "TdhookError",
    "Trace",
    "attribution",
    "capture",
    "edit_gradient",
    "errors",
    "expand",
    "freeze",
    "functionalize",
    "intervene",
    "latent",
    "metrics",
    "perturb",
    "start_from",
    "stop_at",
    "targets",
    "tqdm_progress",
    "trace",
    "weights",
    "with_rules",
]
