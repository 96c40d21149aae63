"""Writing values: `intervene`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from .compat import snapshot
from .errors import InputError, SiteError
from .functional import FunctionalModel
from .scope import Handler
from .sites import Site, Want
from .structure import describe
from .transforms import Transform, by_want, fitting, require_sites

Write = Tensor | int | float | complex | bool | Callable[[Tensor], Tensor]


class Writer(Handler):
    def __init__(self, wants: tuple[Want, ...], writes: Mapping[Want, Write]):
        super().__init__(wants)
        self.writes = writes

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        write = self.writes[want]
        if not want.exact and site.keys and not want.site.keys:
            raise SiteError(f"site {want.request!r} matches a structured value at {str(site)!r}; address the element to write.")
        # A function gets a copy, so that one that writes into what it is given changes this site and nothing else.
        return written_value(site, value, write(snapshot(value)) if callable(write) else write)


def written_value(site: Site | str, value: Tensor, new: Any) -> Tensor:
    """`new` in place of `value`. A copy, so that a model that goes on in place does not write into the caller's tensor."""
    if isinstance(new, (bool, int, float, complex)):
        if not _can_hold(value, new):
            raise SiteError(f"the write at {str(site)!r} is {new!r}, the site holds {describe(value)}; give one that fits.")
        return torch.full_like(value, new)
    return snapshot(fitting(f"the write at {str(site)!r}", new, value))


def _can_hold(value: Tensor, number: complex) -> bool:
    """Whether a number goes into the dtype of a tensor unchanged in kind."""
    if isinstance(number, complex):
        return value.is_complex()
    if isinstance(number, float):
        return value.is_complex() or value.is_floating_point()
    return isinstance(number, bool) or value.dtype != torch.bool


@dataclass(frozen=True, eq=False, repr=False)
class Intervene(Transform):
    writes: Mapping[Want, Write]

    def key(self) -> tuple:
        return (*super().key(), *self.writes.values())  # a function may or may not use the value it replaces

    def _handler(self, extra: tuple) -> tuple[Writer, tuple]:
        return Writer(self.wants, self.writes), extra


def intervene(f: FunctionalModel, writes: Mapping[Any, Write] | TensorDictBase) -> FunctionalModel:
    """Writes values at sites.

    Args:
        f: functional model.
        writes: for each site a tensor of the site's shape, dtype and device, a number, or a function from the value to either.

    Returns:
        `g(params, inputs) -> output`.

    Raises:
        SiteError: as `capture`, and for a value that does not fit.

    Cost: the forward pass.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
        >>> intervene(f, {"0": 7.0})(params, torch.ones(1, 3))
        tensor([[7., 7.]])
        >>> intervene(f, {"1": lambda value: value * 0})(params, torch.ones(1, 3))
        tensor([[0., 0.]])
    """
    require_sites(f)
    table = by_want(f, writes, "writes")
    for want, write in table.items():
        if not (isinstance(write, (Tensor, bool, int, float, complex)) or callable(write)):
            raise InputError(
                f"writes[{want.request!r}] is {describe(write)}; give a tensor, a number or a function of the value."
            )
    return Intervene(f, tuple(table), table)
