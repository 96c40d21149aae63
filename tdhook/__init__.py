"""Interpretability of PyTorch models as pure functions: no hooks, no state, and any model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import errors, targets
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

if TYPE_CHECKING:
    from . import attribution, latent, metrics, plotting, weights

__version__ = "0.1.0"

_WINGS = ("attribution", "latent", "metrics", "plotting", "weights")

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
    "plotting",
    "start_from",
    "stop_at",
    "targets",
    "tqdm_progress",
    "trace",
    "weights",
    "with_rules",
]


def __getattr__(name: str) -> Any:
    """The wings are imported on first use: they take longer than the core."""
    if name in _WINGS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WINGS})
