"""Interpretability of PyTorch models as pure functions: no hooks, no state, and any model."""

from . import attribution as attribution
from . import latent as latent
from .core import errors as errors
from .core import targets as targets
from .core.errors import TdhookError as TdhookError
from .core.functional import FunctionalModel as FunctionalModel
from .core.functional import functionalize as functionalize
from .core.progress import tqdm_progress as tqdm_progress
from .core.sites import Site as Site
from .core.tail import start_from as start_from
from .core.tracing import Trace as Trace
from .core.tracing import trace as trace
from .core.transforms import capture as capture
from .core.transforms import edit_gradient as edit_gradient
from .core.transforms import expand as expand
from .core.transforms import freeze as freeze
from .core.transforms import intervene as intervene
from .core.transforms import perturb as perturb
from .core.transforms import stop_at as stop_at

__version__ = "0.1.0"
