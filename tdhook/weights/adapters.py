"""Adapters: pure functions with parameters of their own, put between the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.compat import snapshot
from ..core.errors import InputError, SiteError
from ..core.functional import FunctionalModel
from ..core.scope import Handler
from ..core.sites import Site, SiteLike, Want
from ..core.structure import describe
from ..core.transforms import Transform, by_want, exact_wants, require_sites, take, values_at
from ..core.writing import written_value


@dataclass(frozen=True)
class CrossLayer:
    """An adapter that reads another site.

    Attributes:
        source: the address of what it reads; it has to run before the site that the adapter writes.
        function: (adapter_params, source, value) -> value.
    """

    source: SiteLike
    function: Callable[[Any, Tensor, Tensor], Tensor]


Adapter = Callable[[Any, Tensor], Tensor] | CrossLayer


class _Adapting(Handler):
    """Applies each adapter at its target; the source of another one is read after what this transform writes there."""

    def __init__(self, wants: tuple[Want, ...], adapters: Mapping[Want, Adapter], sources: Mapping[Want, Want], given: Mapping):
        super().__init__(wants)
        self.adapters = adapters
        self.sources = sources
        self.given = given
        self.read: dict[Want, Tensor] = {}

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        if want in self.adapters:
            adapter, given = self.adapters[want], self.given[want]
            if isinstance(adapter, CrossLayer):
                source = self.sources[want]
                if source not in self.read:
                    raise SiteError(f"the adapter at {str(site)!r} reads {str(source.site)!r}, which has not run before it.")
                new = adapter.function(given, snapshot(self.read[source]), snapshot(value))
            else:
                new = adapter(given, snapshot(value))
            value = written_value(site, value, new)
        if want in self.sources.values():
            self.read[want] = snapshot(value)
        return value


@dataclass(frozen=True, eq=False, repr=False)
class Adapted(Transform):
    adapters: Mapping[Want, Adapter]
    sources: Mapping[Want, Want]

    def key(self) -> tuple:
        return (*super().key(), *self.adapters.values())

    def _handler(self, extra: tuple) -> tuple[_Adapting, tuple]:
        adapter_params, extra = take(extra, "adapter_params")
        given = values_at(tuple(self.adapters), adapter_params, "adapter_params")
        return _Adapting(self.wants, self.adapters, self.sources, given), extra


def adapt(f: FunctionalModel, adapters: Mapping[Any, Adapter]) -> FunctionalModel:
    """Puts functions with parameters of their own at sites.

        value at site := adapter(adapter_params[site], value)
        value at site := adapter(adapter_params[site], value at source, value)        across layers

    A functional model is such a function, so any `nn.Module` is an adapter: `adapter, its_params = functionalize(module)`. So
    are a probe's projection, a dictionary's reconstruction and a low-rank update.

    Args:
        f: functional model.
        adapters: for each site a pure function (adapter_params, value) -> value, or `CrossLayer(source, function)`, which may
            use the value that it replaces (`value + ...`) or leave it.

    Returns:
        `g(params, inputs, adapter_params) -> output`; `adapter_params` is a mapping or TensorDict from each site to what its
        function gets: differentiate with respect to it to train adapters with the model as it is, stack it to run many.

    Raises:
        SiteError: an unknown site; in the call, a source that runs after its target, a value of another shape, dtype or device,
            no parameters for a site. InputError: an adapter that is no function.

    Cost: the forward pass and the adapters.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (2019); across layers Dunefsky et al., "Transcoders
    Find Interpretable LLM Feature Circuits" (2024).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU()))
        >>> g = adapt(f, {"0": lambda scale, value: scale * value})
        >>> g(params, torch.ones(1, 2), {"0": torch.tensor([3.0, -1.0])})
        tensor([[3., 0.]])
        >>> g = adapt(f, {"1": CrossLayer("0:in", lambda scale, source, value: value + scale * source)})
        >>> g(params, torch.tensor([[1.0, -1.0]]), {"1": torch.tensor(2.0)})
        tensor([[ 3., -2.]])
    """
    require_sites(f)
    table = by_want(f, adapters, "adapters")
    sources: dict[Want, Want] = {}
    for want, adapter in table.items():
        if isinstance(adapter, CrossLayer):
            found = exact_wants(f, adapter.source, "CrossLayer")
            if len(found) != 1:
                raise SiteError(f"CrossLayer reads one site, got {len(found)} from {adapter.source!r}.")
            sources[want] = found[0]
        elif not callable(adapter):
            raise InputError(
                f"adapters[{want.request!r}] is {describe(adapter)}; give a function (adapter_params, value) -> value or a "
                "CrossLayer."
            )
    return Adapted(f, tuple(dict.fromkeys((*table, *sources.values()))), table, sources)
