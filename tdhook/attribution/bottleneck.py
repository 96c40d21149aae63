"""A narrow site that everything which moves has to pass on its way to the targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.compat import is_compiling, is_wrapped
from ..core.errors import InputError
from ..core.explained import Explained, explained, explained_sites
from ..core.transforms import Sites
from ..core.writing import intervene


def narrow_site(f: Any, params: Any, inputs: Any, at: Sites | None, through: str, scores: Callable[[Any], Tensor]) -> Explained:
    """The output as a function of the value at the site `through`.

    Args:
        f, params, inputs, at: what moves.
        through: address of the site.
        scores: from the output to the target values.

    Raises:
        InputError: the targets depend on what moves also beside the site. This is seen by filling what moves with NaN while the
            site keeps its value; it cannot be seen under vmap or compilation.
    """
    tail = explained_sites(f, params, inputs, [through])
    (narrow,) = tail.values
    if is_compiling() or is_wrapped(narrow):
        return tail
    held = explained(intervene(f, {through: narrow}), params, inputs, at)
    with torch.no_grad():
        beside = scores(held.evaluate([torch.full_like(value, torch.nan) for value in held.values]))
    if beside.isnan().any():
        raise InputError(
            f"through={through!r} is passed by: the targets depend on what moves also beside it; choose a later site."
        )
    return tail
