"""What the lenses share: the residual stream of every layer, and what the model makes of a last residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import structure
from ...core.compat import is_compiling
from ...core.derivatives import freeze
from ...core.errors import InputError, SiteError
from ...core.functional import FunctionalModel
from ...core.reading import capture
from ...core.sites import Site
from ...core.structure import describe
from ...core.tail import start_from
from ...core.transforms import require_sites
from ..names import Names, names


def named(f: FunctionalModel, params: Any, inputs: Any, given: Names | None) -> Names:
    """The names to work with: those given, or those found with these inputs."""
    require_sites(f)
    if isinstance(given, Names):
        return given
    if given is not None:
        raise InputError(f"names is {describe(given)}; give what tdhook.latent.names(f, params) returned, or None.")
    if is_compiling():
        raise InputError("names is None inside of torch.compile, where the model cannot be looked at; give names=.")
    return names(f, params, inputs)


def read(f: FunctionalModel, params: Any, inputs: Any, sites: Sequence[str]) -> tuple[Any, list[Tensor]]:
    """The output, and the values at sites in their order."""
    output, values = capture(f, list(dict.fromkeys(sites)))(params, inputs)
    return output, [values[site] for site in sites]


def logits_of(found: Names, output: Any) -> Tensor:
    """The logits in the output of the model."""
    for key in Site.parse(found.logits).keys:
        output = structure.get(output, key)
    return output


def at_positions(value: Tensor, positions: Sequence[int] | None, axis: int = -2) -> Tensor:
    """Some positions of a value, along `axis`; all for None."""
    if positions is None:
        return value
    if isinstance(positions, (int, str)) or not len(positions):
        raise InputError(
            f"positions is {positions!r}; give a sequence of at least one position, such as [-1], or None for all."
        )
    length = value.shape[axis]
    for position in positions:
        if not -length <= position < length:
            raise InputError(f"positions has {position}, out of range for {length} positions.")
    index = torch.tensor([position % length for position in positions], device=value.device)
    return value.index_select(axis, index)


def tail(f: FunctionalModel, params: Any, inputs: Any, found: Names) -> Callable[[Tensor], Any]:
    """The output of the model for a given last residual: its own final norm and unembedding, and all that it has there."""
    rest = start_from(f, found.residual_post[-1])
    return lambda value: rest(params, inputs, value)


def frozen_tail(f: FunctionalModel, params: Any, inputs: Any, found: Names, residual: Tensor) -> Callable[[Tensor], Any]:
    """As `tail`, with the scale of the final norm that it has at `residual`: an affine map up to the logits.

    Raises `SiteError` where no norm reads the last residual.
    """
    norm = found.require("final_scale")
    if norm.written_out:
        rest = freeze(start_from(f, found.residual_post[-1]), norm.operation)
        return lambda value: rest(params, inputs, value)
    after = start_from(f, norm.operation)
    exact = torch.promote_types(residual.dtype, torch.float32)
    eps = torch.finfo(residual.dtype).eps if norm.eps is None else norm.eps
    wide = residual.detach().to(exact)
    centred = wide - wide.mean(-1, keepdim=True) if norm.centred else wide
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    weight, bias = (None if name is None else params[tuple(name.split("."))] for name in (norm.weight, norm.bias))

    def affine(value: Tensor) -> Tensor:
        moved = value.to(exact)
        moved = moved - moved.mean(-1, keepdim=True) if norm.centred else moved
        normed = (moved * scale).to(value.dtype)
        normed = normed if weight is None else normed * weight
        return normed if bias is None else normed + bias

    return lambda value: after(params, inputs, affine(value))


def require_sum(found: Names, method: str) -> None:
    """Raises `SiteError` for a stream that is normalised after each write, which no sum of writes gives."""
    if found.norm == "post":
        raise SiteError(
            f"{method} needs a residual stream that is a sum, but this model normalises the stream after each write "
            "(names(...).norm is 'post', as in BERT)."
        )
