"""Errors and warnings of tdhook. Every error derives from `TdhookError` and from the built-in exception that fits it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TdhookError(Exception):
    """Base class of every error that tdhook raises on purpose."""


class ModelError(TdhookError, TypeError):
    """The model cannot be made a pure function, or a plain function was given where sites are needed."""


class ParamsError(TdhookError, ValueError):
    """`params` does not hold what the functional model needs."""


class InputError(TdhookError, ValueError):
    """An argument has a wrong type, shape, dtype or range."""


class SiteError(TdhookError, ValueError):
    """A site is malformed, unknown, was not reached, was reached too often, or got a value that does not fit."""


class TargetError(TdhookError, ValueError):
    """A target does not fit the output of the model."""


class RuleError(TdhookError, ValueError):
    """A propagation rule, or a table of them, does not fit the model or the operation."""


class GradientError(TdhookError, RuntimeError):
    """A gradient was asked for where none can be computed."""


class TdhookWarning(UserWarning):
    """Something runs, but its result may not be what was meant."""


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence with the known names nearest to `name`, or an empty string."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    tail = name.rsplit(".", 1)[-1]
    near += [k for k in known if k.rsplit(".", 1)[-1] == tail and k not in near][: max(0, count - len(near))]
    return f" Did you mean {', '.join(repr(n) for n in near)}?" if near else ""
