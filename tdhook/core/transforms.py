"""What all transformations share. Each takes a functional model and returns one.

| transform | returns | meaning | module |
|---|---|---|---|
| `capture(f, sites)` | `g(params, inputs) -> (output, values)` | read | `reading` |
| `stop_at(f, sites)` | `g(params, inputs) -> value` | the head: nothing after the site runs | `reading` |
| `intervene(f, writes)` | `g(params, inputs) -> output` | write | `writing` |
| `perturb(f, sites)` | `g(params, inputs, deltas) -> output` | add deltas: gradients at sites | `derivatives` |
| `edit_gradient(f, edits)` | `g(params, inputs) -> output` | same value, another cotangent | `derivatives` |
| `freeze(f, sites)` | `g(params, inputs) -> output` | same value, no gradient | `derivatives` |
| `start_from(f, sites)` | `g(params, inputs, value) -> output` | the tail: what is not needed does not run | `tail` |
| `with_rules(f, rules)` | `g(params, inputs) -> output` | same value, other backward passes of operations | `ruling` |

A value passes the innermost transform (the one closest to the model) first: a capture outside a write reads what was written,
one inside it reads what was there before, and of two writes of one site the outer one wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

from .errors import InputError, ModelError, SiteError, did_you_mean
from .functional import Execution, Functional, FunctionalModel
from .scope import Handler
from .sites import Site, SiteLike, Tree, Want
from .structure import describe

Sites = SiteLike | Sequence[SiteLike]


@dataclass(frozen=True, eq=False, repr=False)
class Transform(FunctionalModel):
    """A functional model around another one: a handler that works at sites while the inner one runs."""

    inner: FunctionalModel
    wants: tuple[Want, ...]

    edits_backward: ClassVar[bool] = False  # whether reverse mode gives something else than the derivative

    @property
    def base(self) -> Functional:
        return self.inner.base

    def key(self) -> tuple:
        return (type(self), self.wants, self.inner.key())

    def _handler(self, extra: tuple) -> tuple[Handler, tuple]:
        """The handler for one call, and the extra arguments that are left for the inner model."""
        raise NotImplementedError

    def _result(self, handler: Any, output: Any) -> Any:
        """What the call returns."""
        return output

    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        handler, extra = self._handler(extra)
        output = self.inner._run(params, inputs, extra, execution.within(handler))
        handler.finish()
        return self._result(handler, output)

    def __repr__(self) -> str:
        return f"{type(self).__name__.lower()}({self.inner!r}, {[str(w.site) for w in self.wants]})"


def edits_backward(f: Any) -> bool:
    """Whether a transform has given the model another backward, which forward mode does not see."""
    while isinstance(f, Transform):
        if f.edits_backward:
            return True
        f = f.inner
    return False


def resolve(f: FunctionalModel, sites: Sites) -> tuple[Want, ...]:
    """What `sites` means in the model."""
    return _resolve(f.base.blueprint.tree, sites)


@torch.compiler.assume_constant_result
def _resolve(tree: Tree, sites: Sites) -> tuple[Want, ...]:
    # Dynamo need not trace the parsing of strings: the result depends on them and the module tree alone.
    return tree.resolve(sites)


def expand(f: FunctionalModel, sites: Sites) -> list[str]:
    """The canonical addresses that `sites` mean in a model, in registration order.

    Examples:
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


def exact_wants(f: FunctionalModel, sites: Sites, name: str) -> tuple[Want, ...]:
    """The sites resolved; raises `SiteError` for a pattern."""
    wants = resolve(f, sites)
    for want in wants:
        if not want.exact:
            raise SiteError(f"{name} takes exact sites, got the pattern {want.request!r}; tdhook.trace lists the sites.")
    return wants


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


def values_at(wants: tuple[Want, ...], mapping: Any, name: str) -> dict[Want, Any]:
    """The values that a mapping gives for sites that are already known, under their canonical or their own spelling."""
    if not isinstance(mapping, (Mapping, TensorDictBase)):
        raise InputError(f"{name} is a mapping from sites to tensors, got {describe(mapping)}.")
    given = dict(mapping.items())
    values = {}
    for want in wants:
        key = str(want.site) if str(want.site) in given else want.request
        if key not in given:
            raise SiteError(f"{name} has no {str(want.site)!r}; it has {', '.join(map(repr, mapping.keys())) or 'nothing'}.")
        values[want] = given.pop(key)
    if given:
        key = next(iter(given))
        known = [str(want.site) for want in wants]
        raise SiteError(f"{name} has {key!r}, which is not asked for." + did_you_mean(str(key), known))
    return values


def take(extra: tuple, name: str) -> tuple[Any, tuple]:
    """The first extra argument and the others."""
    if not extra:
        raise InputError(f"{name} is missing: call g(params, inputs, {name}).")
    return extra[0], extra[1:]


def fitting(what: str, new: Any, value: Tensor) -> Tensor:
    """`new`; raises `SiteError` unless it is a tensor like `value`."""
    if not isinstance(new, Tensor):
        raise SiteError(f"{what} is {describe(new)}; give a tensor like {describe(value)}.")
    if new.shape != value.shape or new.dtype != value.dtype or new.device != value.device:
        fix = "expand it to that shape" if new.shape != value.shape else "convert it with .to(value)"
        raise SiteError(
            f"{what} is {describe(new)} on {new.device}, the site holds {describe(value)} on {value.device}; {fix}."
        )
    return new
