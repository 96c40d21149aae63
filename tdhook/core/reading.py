"""Reading values: `capture`, and `stop_at`, which ends the run there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from .compat import current_level, is_compiling, level_of, snapshot
from .errors import SiteError
from .functional import Execution, FunctionalModel
from .scope import Handler, Stop
from .sites import Site, Want
from .transforms import Sites, Transform, exact_wants, require_sites, resolve


class Reader(Handler):
    """Keeps a copy of each value that passes: the model may overwrite it in place after it was read (`x = bn(x); x += y`)."""

    def __init__(self, wants: tuple[Want, ...]):
        super().__init__(wants)
        self.level = 0 if is_compiling() else current_level()
        self.values: dict[Want, list[tuple[Site, Tensor]]] = {want: [] for want in wants}

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        if not is_compiling() and level_of(value) > self.level:
            raise SiteError(
                f"site {str(site)!r} lies inside a vmap or grad of the model's own, where its value cannot be read; "
                "read what the model returns from there, or write there."
            )
        self.values[want].append((site, snapshot(value)))
        return value

    def result(self) -> dict[str, Tensor]:
        """The values in the order of the request, under canonical names."""
        named = {}
        for want, found in self.values.items():
            for site, value in found:
                if not want.exact and want.site.call is None and self.calls(site) == 1:
                    site = Site(site.path, site.op, None, site.port, site.keys)
                named[str(site)] = value
        return named


class Capture(Transform):
    def _handler(self, extra: tuple) -> tuple[Reader, tuple]:
        return Reader(self.wants), extra

    def _result(self, handler: Reader, output: Any) -> Any:
        return output, TensorDict(handler.result(), batch_size=[])


def capture(f: FunctionalModel, sites: Sites) -> FunctionalModel:
    """Reads the values at sites.

    Args:
        f: functional model.
        sites: one address or several; patterns give every call and every tensor that they match.

    Returns:
        `g(params, inputs) -> (output, values)`: `values` is a TensorDict keyed by canonical site string, in the order asked
        for. The values carry gradients like any output of `g`, and are not changed by what the model does later in place.

    Raises:
        SiteError: a site is unknown (at once), or it is not reached, not a tensor, or called more often than the address says
            (in the call).

    Cost: the forward pass and a copy of each value. Of a large value in memory of its own, on a CPU and outside of `torch.func`
    transforms, it is made only if somebody writes into the value or its original.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
        >>> output, values = capture(f, ["0", "1:in"])(params, torch.ones(1, 3))
        >>> list(values.keys()), torch.equal(values["0"], values["1:in"])
        (['0', '1:in'], True)
    """
    require_sites(f)
    return Capture(f, resolve(f, sites))


class _Stopper(Reader):
    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        value = super().visit(want, site, value)
        # A compiled graph drops what nobody uses, so there the run goes on.
        if len(self.reached) == len(self.wants) and not is_compiling():
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
        sites: one exact address, or a list of them. Without `@` the run stops at the first call of a module.

    Returns:
        `g(params, inputs) -> value`: the tensor at the site; for a list, a TensorDict keyed by canonical site string.

    Raises:
        SiteError: as `capture`; a pattern.

    Cost: the part of the forward pass before the (last) site.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
        >>> stop_at(f, "0")(params, torch.ones(1, 3)).shape
        torch.Size([1, 2])
    """
    require_sites(f)
    wants = exact_wants(f, sites, "stop_at")
    return StopAt(f, wants, isinstance(sites, (str, Site)))
