"""Standard names: the residual stream, attention, MLPs and heads of any transformer, found by following what it computes."""

from .layout import HeadLayout, Norm, Projection
from .naming import names
from .table import Names

__all__ = ["HeadLayout", "Names", "Norm", "Projection", "names"]
