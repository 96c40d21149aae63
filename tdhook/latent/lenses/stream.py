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
from ...core.functional import Execution, FunctionalModel
from ...core.reading import capture
from ...core.scope import Observer
from ...core.sites import Site, join_path
from ...core.structure import describe
from ...core.tail import start_from
from ...core.transforms import require_sites
from ...core.writing import intervene
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
    require_positions(positions)
    if positions is None:
        return value
    length = value.shape[axis]
    for position in positions:
        if not -length <= position < length:
            raise InputError(f"positions has {position}, out of range for {length} positions.")
    index = torch.tensor([position % length for position in positions], device=value.device)
    return value.index_select(axis, index)


def require_positions(positions: Sequence[int] | None) -> None:
    """Raises `InputError` for what can be no positions of any value."""
    if positions is not None and (isinstance(positions, (int, str)) or not len(positions)):
        raise InputError(
            f"positions is {positions!r}; give a sequence of at least one position, such as [-1], or None for all."
        )


def tail(f: FunctionalModel, params: Any, inputs: Any, found: Names) -> Callable[[Tensor], Any]:
    """The output of the model for a given last residual: its own final norm and unembedding, and all that it has there."""
    rest = start_from(f, found.residual_post[-1])
    return lambda value: rest(params, inputs, value)


class Calls(Observer):
    """Keeps what `keep` makes of the arguments of some operations."""

    operations = True

    def __init__(self, sites: Sequence[str], keep: Callable[..., Any]):
        parsed = {text: Site.parse(text) for text in sites}
        self.wanted = {(join_path(site.path), site.op, site.call or 0): text for text, site in parsed.items()}
        self.keep = keep
        self.found: dict[str, Any] = {}

    def operation(self, path: str, op: str, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        text = self.wanted.get((path, op, call))
        if text is not None:
            self.found[text] = self.keep(*args, **kwargs)


def frozen_tail(f: FunctionalModel, params: Any, inputs: Any, found: Names) -> Callable[[Tensor], Any]:
    """As `tail`, and the same values, but with a gradient as if the scale of the final norm were a constant.

    Raises `SiteError` where no norm reads the last residual.
    """
    norm = found.require("final_scale")
    rest = start_from(f, found.residual_post[-1])
    if norm.written_out:
        return lambda value: freeze(rest, norm.operation)(params, inputs, value)

    def run(value: Tensor) -> Any:
        calls = Calls([norm.operation], _layer_norm if norm.kind == "layer_norm" else _rms_norm)
        held = intervene(rest, {norm.operation: lambda normed: normed.detach() + calls.found[norm.operation].to(normed.dtype)})
        return held._run(params, inputs, (value,), Execution(observer=calls))

    return run


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    return _moved(input, weight, eps, centred=True)


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _moved(input, weight, torch.finfo(input.dtype).eps if eps is None else eps, centred=False)


def _moved(value: Tensor, weight: Tensor | None, eps: float, centred: bool) -> Tensor:
    """How far a norm with a fixed scale moves with what it reads: 0, with that gradient."""
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    wide = wide - wide.mean(-1, keepdim=True) if centred else wide
    moved = (wide - wide.detach()) * (wide.detach().square().mean(-1, keepdim=True) + eps).rsqrt()
    return moved if weight is None else moved * weight


def require_sum(found: Names, method: str) -> None:
    """Raises `SiteError` for a stream that is normalised after each write, which no sum of writes gives."""
    if found.norm == "post":
        raise SiteError(
            f"{method} needs a residual stream that is a sum, but this model normalises the stream after each write "
            "(names(...).norm is 'post', as in BERT)."
        )
    if not any(each is not None for each in (*found.attention, *found.mlp)):
        found.require("attention")
