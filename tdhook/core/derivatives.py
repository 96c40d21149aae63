"""Derivatives at sites: `perturb`, `edit_gradient` and `freeze`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .compat import is_compiling
from .errors import InputError
from .functional import FunctionalModel
from .scope import Handler
from .sites import Site, Want
from .structure import describe
from .transforms import Sites, Transform, by_want, exact_wants, fitting, require_sites, resolve, take, values_at


class _Adder(Handler):
    def __init__(self, wants: tuple[Want, ...], deltas: Mapping[Want, Tensor]):
        super().__init__(wants)
        self.deltas = deltas

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        return value + fitting(f"the delta at {str(site)!r}", self.deltas[want], value)


class Perturb(Transform):
    def _handler(self, extra: tuple) -> tuple[_Adder, tuple]:
        deltas, extra = take(extra, "deltas")
        return _Adder(self.wants, values_at(self.wants, deltas, "deltas")), extra


def perturb(f: FunctionalModel, sites: Sites) -> FunctionalModel:
    """Adds deltas at sites: the gradient at a site is the gradient with respect to a zero delta, all sites in one backward.

    Args:
        f: functional model.
        sites: exact addresses; a pattern would not say which shapes the deltas have.

    Returns:
        `g(params, inputs, deltas) -> output`; `deltas` maps each site to a tensor of its shape.

    Raises:
        SiteError: as `capture`; a pattern; a delta that is missing, that no site takes, or that does not fit.

    Cost: the forward pass.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
        >>> g = perturb(f, "1")
        >>> torch.func.grad(lambda d: g(params, torch.ones(1, 3), {"1": d}).sum())(torch.zeros(1, 2))
        tensor([[1., 1.]])
    """
    require_sites(f)
    return Perturb(f, exact_wants(f, sites, "perturb"))


class _EditCotangent(torch.autograd.Function):
    """The identity, with the cotangent passed through a function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.edit = inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple:
        return ctx.edit(cotangent), None


class _EditCotangentEager(_EditCotangent):
    """Dynamo cannot trace a Function with a jvp, so forward-mode derivatives (tangents pass unchanged) are eager only."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return tangent.view_as(tangent)


class _CotangentEditor(Handler):
    def __init__(self, wants: tuple[Want, ...], edits: Mapping[Want, Callable[[Tensor], Tensor]]):
        super().__init__(wants)
        self.edits = edits

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        edit = self.edits[want]

        def checked(cotangent: Tensor) -> Tensor:
            return fitting(f"the edit at {str(site)!r}", edit(cotangent), cotangent)

        return edited_cotangent(value, checked)


def edited_cotangent(value: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """`value`, whose cotangent passes through `edit` on its way back."""
    # The copy keeps the Function off the input of a surrounding torch.func.grad, where a compiled Function loses its backward
    # (seen in torch 2.13 and 2.14).
    function = _EditCotangent if is_compiling() else _EditCotangentEager
    return function.apply(value.clone(), edit)


@dataclass(frozen=True, eq=False, repr=False)
class EditGradient(Transform):
    edits: Mapping[Want, Callable[[Tensor], Tensor]]

    edits_backward: ClassVar[bool] = True

    def _handler(self, extra: tuple) -> tuple[_CotangentEditor, tuple]:
        return _CotangentEditor(self.wants, self.edits), extra


def edit_gradient(f: FunctionalModel, edits: Mapping[Any, Callable[[Tensor], Tensor]]) -> FunctionalModel:
    """Keeps the values and passes the cotangents at sites through functions.

    Args:
        f: functional model.
        edits: for each site a function from cotangent to cotangent of the same shape. Forward-mode tangents pass unchanged.

    Returns:
        `g(params, inputs) -> output`.

    Raises:
        SiteError: as `capture`. InputError: an edit that is not a function.

    Cost: the forward pass. It compiles under `grad` and under a vmapped pullback; torch 2.13 cannot compile `vmap(grad(g))`.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity()))
        >>> g = edit_gradient(f, {"0": lambda cotangent: cotangent * 10})
        >>> torch.func.grad(lambda x: g(params, x).sum())(torch.ones(2))
        tensor([10., 10.])
    """
    require_sites(f)
    table = by_want(f, edits, "edits")
    for want, edit in table.items():
        if not callable(edit):
            raise InputError(f"edits[{want.request!r}] is {describe(edit)}; give a function of the cotangent.")
    return EditGradient(f, tuple(table), table)


class Freezer(Handler):
    changes_dependence = True

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        return value.detach()


class Freeze(Transform):
    def _handler(self, extra: tuple) -> tuple[Freezer, tuple]:
        return Freezer(self.wants), extra


def freeze(f: FunctionalModel, sites: Sites) -> FunctionalModel:
    """Keeps the values and stops the gradient at sites (frozen attention patterns, LayerNorm scales, gates).

    Args:
        f: functional model.
        sites: one address or several; patterns are welcome.

    Returns:
        `g(params, inputs) -> output`.

    Raises:
        SiteError: as `capture`.

    Cost: the forward pass.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity()))
        >>> torch.func.grad(lambda x: freeze(f, "0")(params, x).sum())(torch.ones(2))
        tensor([0., 0.])
    """
    require_sites(f)
    return Freeze(f, resolve(f, sites))
