"""Every error and warning that tdhook raises on purpose."""

from .core.errors import (
    GradientError,
    InputError,
    ModelError,
    ParamsError,
    RuleError,
    SiteError,
    TargetError,
    TdhookError,
    TdhookWarning,
)

__all__ = [
    "GradientError",
    "InputError",
    "ModelError",
    "ParamsError",
    "RuleError",
    "SiteError",
    "TargetError",
    "TdhookError",
    "TdhookWarning",
]
