"""The transformations: each takes a functional model and returns one.

| transform | returns | meaning |
|---|---|---|
| `capture(f, sites)` | `g(params, inputs) -> (output, values)` | read |
| `intervene(f, writes)` | `g(params, inputs) -> output` | write |
| `perturb(f, sites)` | `g(params, inputs, deltas) -> output` | add deltas: gradients at sites |
| `edit_gradient(f, edits)` | `g(params, inputs) -> output` | same value, another cotangent |
| `freeze(f, sites)` | `g(params, inputs) -> output` | same value, no gradient |
| `stop_at(f, sites)` | `g(params, inputs) -> value` | the head: nothing after the site runs |
| `start_from(f, sites)` | `g(params, inputs, value) -> output` | the tail: see `tail.py` |

A value passes the innermost transform (the one closest to the model) first: a capture outside a write reads what was written,
one inside it reads what was there before, and of two writes of one site the outer one wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Union

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from .errors import InputError, ModelError, SiteError, did_you_mean
from .functional import Execution, Functional, FunctionalModel
from .scope import Handler, Stop
from .sites import Site, SiteLike, Tree, Want
from .structure import describe

Sites = Union[SiteLike, Sequence[SiteLike]]
Write = Union[Tensor, int, float, complex, bool, Callable[[Tensor], Tensor]]


def resolve(f: FunctionalModel, sites: Sites) -> tuple[Want, ...]:
    """What `sites` means in the model."""
    return _resolve(f.base.blueprint.tree, sites)


@torch.compiler.assume_constant_result
def _resolve(tree: Tree, sites: Sites) -> tuple[Want, ...]:
    # Dynamo need not trace the parsing of strings: the result depends on them and the module tree alone.
    return tree.resolve(sites)


def expand(f: FunctionalModel, sites: Sites) -> list[str]:
    """The canonical addresses that `sites` mean in a model, in registration order.

    >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
    >>> expand(f, "*:in")
    ['0:in', '1:in']
    """
    require_sites(f)
    return [str(want.site) for want in resolve(f, sites)]


def require_sites(f: Any) -> None:
    """Raises `ModelError` unless `f` is a functional model."""
    if not isinstance(f, FunctionalModel):
        raise ModelError(
            f"f is {describe(f)}, which has no sites; pass what tdhook.functionalize(model) or a transform of it returned."
        )


@dataclass(frozen=True, eq=False, repr=False)
class Transform(FunctionalModel):
    """A functional model around another one."""

    inner: FunctionalModel
    wants: tuple[Want, ...]

    @property
    def base(self) -> Functional:
        return self.inner.base

    def key(self) -> tuple:
        return (type(self), self.wants, self.inner.key())

    def __repr__(self) -> str:
        return f"{type(self).__name__.lower()}({self.inner!r}, {[str(w.site) for w in self.wants]})"


def _take(extra: tuple, what: str) -> tuple[Any, tuple]:
    """The first extra argument and the others."""
    if not extra:
        raise InputError(f"{what} is missing: call g(params, inputs, {what}).")
    return extra[0], extra[1:]


# Reading -------------------------------------------------------------------------------------------------------------


def _level() -> int:
    """How many vmaps, grads and the like are at work."""
    return 0 if torch.compiler.is_compiling() else torch._C._functorch.maybe_current_level() or 0


def counts_writes(value: Tensor) -> bool:
    """Whether a tensor counts the writes into it: one batched by vmap or made in inference mode does not."""
    return not (value.is_inference() or torch._C._functorch.is_batchedtensor(value))


class _Reader(Handler):
    """Keeps the values that pass, each under its site.

    By default it keeps copies, because a model may overwrite a value in place after it was read (`x = bn(x); x += y`). With
    `clone`, only those of the sites that it tells; `overwritten` then says which of the others have changed.
    """

    def __init__(self, wants: tuple[Want, ...], clone: Callable[[str], bool] = lambda site: True):
        super().__init__(wants)
        self.clone = clone
        self.level = _level()
        self.values: dict[tuple[Want, Site], tuple[Tensor, int | None]] = {}

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and torch._C._functorch.maybe_get_level(value) > self.level:
            raise SiteError(
                f"site {str(site)!r} lies inside a vmap or grad of the model's own, where its value cannot be read; "
                "read what the model returns from there, or write there."
            )
        if torch.compiler.is_compiling() or self.clone(str(site)) or not counts_writes(value):
            self.values[want, site] = (value.clone(), None)
        else:
            self.values[want, site] = (value, value._version)
        return value

    def overwritten(self) -> list[str]:
        """Sites whose value the model changed in place after it was read."""
        return [
            str(site) for (_, site), (v, version) in self.values.items() if version is not None and v._version != version
        ]

    def result(self) -> dict[str, Tensor]:
        """The values in the order of the request, under canonical names."""
        named = {}
        for wanted in self.wants:
            for (want, site), (value, _) in self.values.items():
                if want is wanted:
                    once = not want.exact and self.calls(site) == 1 and want.site.call is None
                    named[str(replace(site, call=None) if once else site)] = value
        return named


class Capture(Transform):
    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        reader = _Reader(self.wants)
        output = self.inner._run(params, inputs, extra, execution.within(reader))
        reader.finish()
        return output, TensorDict(reader.result(), batch_size=[])


def capture(f: FunctionalModel, sites: Sites) -> FunctionalModel:
    """Reads the values at sites.

    Args:
        f: functional model.
        sites: one address or several; patterns give every call and every tensor that they match.

    Returns:
        `g(params, inputs) -> (output, values)`: `values` is a TensorDict keyed by canonical site string, in the order asked
        for. The values carry gradients like any output of `g`, and are not changed by what the model does later in place.

    Raises:
        SiteError: a site is unknown (at once), or is not reached, not a tensor, or called more often than addressed (in the call).

    Cost: the forward pass and a copy of each value.

    >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
    >>> output, values = capture(f, ["0", "1:in"])(params, torch.ones(1, 3))
    >>> list(values.keys()), torch.equal(values["0"], values["1:in"])
    (['0', '1:in'], True)
    """
    require_sites(f)
    return Capture(f, resolve(f, sites))


# Writing -------------------------------------------------------------------------------------------------------------


class _Writer(Handler):
    def __init__(self, wants: tuple[Want, ...], writes: Mapping[Want, Write]):
        super().__init__(wants)
        self.writes = writes

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        write = self.writes[want]
        if not want.exact and site.keys and not want.site.keys:
            raise SiteError(f"site {want.request!r} matches a structured value at {str(site)!r}; address the element to write.")
        # A function gets a copy, so that one that writes into what it is given changes this site and nothing else.
        return written_value(site, value, write(value.clone()) if callable(write) else write)


def written_value(site: Site | str, value: Tensor, new: Any) -> Tensor:
    """`new` in place of `value`. A copy, so that a model that goes on in place does not write into the caller's tensor."""
    if isinstance(new, (bool, int, float, complex)):
        if not _can_hold(value, new):
            raise SiteError(f"the write at {str(site)!r} is {new!r}, the site holds {describe(value)}; give one that fits.")
        return torch.full_like(value, new)
    return _fitting(f"the write at {str(site)!r}", new, value).clone()


def _can_hold(value: Tensor, number: complex) -> bool:
    """Whether a number goes into the dtype of a tensor unchanged in kind."""
    if isinstance(number, complex):
        return value.is_complex()
    if isinstance(number, float):
        return value.is_complex() or value.is_floating_point()
    return isinstance(number, bool) or value.dtype != torch.bool


def _fitting(what: str, new: Any, value: Tensor) -> Tensor:
    """`new`; raises `SiteError` unless it is a tensor like `value`."""
    if not isinstance(new, Tensor):
        raise SiteError(f"{what} is {describe(new)}; give a tensor like {describe(value)}.")
    if new.shape != value.shape or new.dtype != value.dtype or new.device != value.device:
        fix = "expand it to that shape" if new.shape != value.shape else "convert it with .to(value)"
        raise SiteError(
            f"{what} is {describe(new)} on {new.device}, the site holds {describe(value)} on {value.device}; {fix}."
        )
    return new


@dataclass(frozen=True, eq=False, repr=False)
class Intervene(Transform):
    writes: Mapping[Want, Write]

    def key(self) -> tuple:
        return (*super().key(), *self.writes.values())  # a function may or may not use the value it replaces

    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        writer = _Writer(self.wants, self.writes)
        output = self.inner._run(params, inputs, extra, execution.within(writer))
        writer.finish()
        return output


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
            raise InputError(f"writes[{want.request!r}] is {describe(write)}; give a tensor, a number or a function of the value.")
    return Intervene(f, tuple(table), table)


def by_want(f: FunctionalModel, mapping: Any, name: str) -> dict[Want, Any]:
    """A mapping from sites turned into one from what they mean in the model."""
    if not isinstance(mapping, (Mapping, TensorDictBase)):
        raise InputError(f"{name} is a mapping from sites, got {describe(mapping)}.")
    table: dict[Want, Any] = {}
    requests: dict[Site, Any] = {}
    for site, value in mapping.items():
        for want in resolve(f, site):
            if (other := requests.setdefault(want.site, site)) is not site:
                raise SiteError(
                    f"{name} means {str(want.site)!r} twice, by {str(other)!r} and by {str(site)!r}; "
                    "for two at one site nest two transforms, the outer one comes last."
                )
            table[want] = value
    if not table:
        raise SiteError(f"{name} is empty; give at least one site.")
    return table


# Derivatives ---------------------------------------------------------------------------------------------------------


class _Adder(Handler):
    def __init__(self, wants: tuple[Want, ...], deltas: Mapping[Want, Tensor]):
        super().__init__(wants)
        self.deltas = deltas

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        return value + _fitting(f"the delta at {str(site)!r}", self.deltas[want], value)


class Perturb(Transform):
    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        deltas, extra = _take(extra, "deltas")
        if not isinstance(deltas, (Mapping, TensorDictBase)):
            raise InputError(f"deltas is a mapping from sites to tensors, got {describe(deltas)}.")
        given = dict(deltas.items())
        table = {}
        for want in self.wants:
            name = str(want.site) if str(want.site) in given else want.request
            if name not in given:
                raise SiteError(f"deltas has no {str(want.site)!r}; it has {', '.join(map(repr, given)) or 'nothing'}.")
            table[want] = given.pop(name)
        if given:
            name = next(iter(given))
            raise SiteError(f"deltas has {name!r}, which is not perturbed." + did_you_mean(name, [str(w.site) for w in self.wants]))
        adder = _Adder(self.wants, table)
        output = self.inner._run(params, inputs, extra, execution.within(adder))
        adder.finish()
        return output


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

    >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
    >>> g = perturb(f, "1")
    >>> torch.func.grad(lambda d: g(params, torch.ones(1, 3), {"1": d}).sum())(torch.zeros(1, 2))
    tensor([[1., 1.]])
    """
    require_sites(f)
    wants = resolve(f, sites)
    for want in wants:
        if not want.exact:
            raise SiteError(f"perturb takes exact sites, got the pattern {want.request!r}; list the sites, as trace does.")
    return Perturb(f, wants)


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
    def backward(ctx: Any, cotangent: Tensor) -> tuple:  # type: ignore[override]
        return ctx.edit(cotangent), None


class _EditCotangentEager(_EditCotangent):
    """Dynamo cannot trace a Function with a jvp, so forward-mode derivatives (tangents pass unchanged) are eager only."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:  # type: ignore[override]
        return tangent.view_as(tangent)


class _CotangentEditor(Handler):
    def __init__(self, wants: tuple[Want, ...], edits: Mapping[Want, Callable[[Tensor], Tensor]]):
        super().__init__(wants)
        self.edits = edits

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        # The copy keeps the Function off the input of a surrounding torch.func.grad, where a compiled Function loses its
        # backward (seen in torch 2.13 and 2.14).
        function = _EditCotangent if torch.compiler.is_compiling() else _EditCotangentEager
        edit = self.edits[want]

        def checked(cotangent: Tensor) -> Tensor:
            return _fitting(f"the edit at {str(site)!r}", edit(cotangent), cotangent)

        return function.apply(value.clone(), checked)


@dataclass(frozen=True, eq=False, repr=False)
class EditGradient(Transform):
    edits: Mapping[Want, Callable[[Tensor], Tensor]]

    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        editor = _CotangentEditor(self.wants, self.edits)
        output = self.inner._run(params, inputs, extra, execution.within(editor))
        editor.finish()
        return output


def edit_gradient(f: FunctionalModel, edits: Mapping[Any, Callable[[Tensor], Tensor]]) -> FunctionalModel:
    """Keeps the values and passes the cotangents at sites through functions.

    Args:
        f: functional model.
        edits: for each site a function from cotangent to cotangent of the same shape. Forward-mode tangents pass unchanged.

    Returns:
        `g(params, inputs) -> output`.

    Raises:
        SiteError: as `capture`. InputError: an edit that is not a function.

    Cost: the forward pass.

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


class _Freezer(Handler):
    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        return value.detach()


class Freeze(Transform):
    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        freezer = _Freezer(self.wants)
        output = self.inner._run(params, inputs, extra, execution.within(freezer))
        freezer.finish()
        return output


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

    >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity()))
    >>> torch.func.grad(lambda x: freeze(f, "0")(params, x).sum())(torch.ones(2))
    tensor([0., 0.])
    """
    require_sites(f)
    return Freeze(f, resolve(f, sites))


# Stopping ------------------------------------------------------------------------------------------------------------


class _Stopper(_Reader):
    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        value = super().visit(want, site, value)
        # A compiled graph drops what nobody uses, so there the run goes on.
        if len(self.reached) == len(self.wants) and not torch.compiler.is_compiling():
            raise Stop
        return value


@dataclass(frozen=True, eq=False, repr=False)
class StopAt(Transform):
    single: bool

    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        stopper = _Stopper(self.wants)
        try:
            self.inner._run(params, inputs, extra, execution.within(stopper))
        except Stop:
            # The stop of another transform, closer to the model, is not ours to swallow.
            if len(stopper.reached) < len(self.wants):
                raise
        stopper.finish()
        values = stopper.result()
        return next(iter(values.values())) if self.single else TensorDict(values, batch_size=[])


def stop_at(f: FunctionalModel, sites: Sites) -> FunctionalModel:
    """The head of a model: runs up to the last of the sites and returns the values there.

    Args:
        f: functional model.
        sites: one exact address, or a list of them.

    Returns:
        `g(params, inputs) -> value`: the tensor at the site; for a list, a TensorDict keyed by canonical site string.

    Raises:
        SiteError: as `capture`; a pattern.

    Cost: the part of the forward pass before the (last) site.

    >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
    >>> stop_at(f, "0")(params, torch.ones(1, 3)).shape
    torch.Size([1, 2])
    """
    require_sites(f)
    wants = exact_wants(f, sites, "stop_at")
    return StopAt(f, wants, isinstance(sites, (str, Site)))


def exact_wants(f: FunctionalModel, sites: Sites, name: str) -> tuple[Want, ...]:
    """The sites resolved; raises `SiteError` for a pattern."""
    wants = resolve(f, sites)
    for want in wants:
        if not want.exact:
            raise SiteError(f"{name} takes exact sites, got the pattern {want.request!r}; tdhook.trace lists the sites.")
    return wants
