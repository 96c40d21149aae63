"""Parameters with more and more layers re-initialised, or one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ..core.errors import InputError, did_you_mean
from ..core.functional import FunctionalModel
from ..core.randomness import normal_like, uniform_like
from ..core.structure import describe

ORDERS = ("top_down", "bottom_up", "independent")
Initialise = Callable[[str, Tensor, torch.Generator | None], Tensor]

# Statistics that layers keep of their inputs: no weights, and a normal draw could be a negative variance.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def permuted(name: str, value: Tensor, generator: torch.Generator | None) -> Tensor:
    """The same numbers in random order. What is constant (biases of zero, scales of one) stays as it is."""
    order = uniform_like(value.reshape(-1).to(torch.float64), generator).argsort()
    return value.reshape(-1)[order].reshape(value.shape)


def normal(name: str, value: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normal numbers of the same mean and standard deviation. What is constant stays as it is."""
    exact = value.to(torch.promote_types(value.dtype, torch.float32))
    drawn = exact.mean() + exact.std(correction=0) * normal_like(exact, generator)
    return drawn.to(value.dtype)


INITIALISERS: dict[str, Initialise] = {"permutation": permuted, "normal": normal}


@dataclass(frozen=True)
class Variants:
    """Copies of parameters in which some layers have new values, made when they are asked for.

    Attributes:
        params: the original.
        layers: which layer each variant is named after, in order.
        fresh: for each parameter that is re-initialised, by its address, the new value.
        since: for each of them, in which variants it has the new value.
    """

    params: Any
    layers: tuple[str, ...]
    fresh: dict[tuple[str, ...], Tensor]
    since: dict[tuple[str, ...], tuple[bool, ...]]

    def stacked(self, chunk: slice) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
        """What differs among some variants, each [N, *shape], and the function from one of each to whole parameters.

        A parameter that is new in all of them or in none is not stacked.
        """
        moving, constant = [], {}
        for address, new in self.fresh.items():
            chosen = self.since[address][chunk]
            if all(chosen):
                constant[address] = new
            elif any(chosen):
                moving.append(address)

        def stack(address: tuple[str, ...]) -> Tensor:
            old, new = _get(self.params, address), self.fresh[address]
            return torch.stack([new if fresh else old for fresh in self.since[address][chunk]])

        def assemble(values: list[Tensor]) -> Any:
            return _with(self.params, {**constant, **dict(zip(moving, values))})

        return [stack(address) for address in moving], assemble


def variants(
    f: Any,
    params: Any,
    layers: Sequence[str] | None,
    order: str,
    initialise: str | Initialise,
    generator: torch.Generator | None,
) -> Variants:
    """The re-initialised parameters. They are drawn in the order of `params`, so that `order` does not change them.

    Raises:
        InputError: params that are no mapping, unknown layers, order or initialisation.
    """
    if order not in ORDERS:
        raise InputError(f"order is {describe(order)}; choose {', '.join(map(repr, ORDERS))}.")
    if not callable(initialise) and initialise not in INITIALISERS:
        raise InputError(
            f"initialise is {describe(initialise)}; choose {' or '.join(map(repr, INITIALISERS))}, or give a function of "
            "(name, tensor, generator)."
        )
    draw = initialise if callable(initialise) else INITIALISERS[initialise]
    by_layer: dict[str, list[tuple[str, ...]]] = {}
    for address in _weights(f, params):
        by_layer.setdefault(_layer(address), []).append(address)
    if not by_layer:
        raise InputError(f"params is {describe(params)}, which holds no floating-point parameter to re-initialise.")
    named = _named(list(by_layer), layers)
    if order == "top_down":
        named = named[::-1]
    # A name of a block stands for all layers inside of it.
    members = [[layer for layer in by_layer if layer == name or layer.startswith(f"{name}.")] for name in named]
    place = {layer: k for k, inside in enumerate(members) for layer in inside}
    fresh, since = {}, {}
    for layer, addresses in by_layer.items():
        if layer not in place:
            continue
        for address in addresses:
            old = _get(params, address)
            new = draw(".".join(address), old, generator)
            if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
                raise InputError(f"initialise returned {describe(new)} for {'.'.join(address)!r}, {describe(old)}.")
            fresh[address] = new
            k = place[layer]
            since[address] = tuple(n == k if order == "independent" else n >= k for n in range(len(named)))
    return Variants(params, tuple(named), fresh, since)


def _named(known: list[str], layers: Sequence[str] | None) -> list[str]:
    """The layers to re-initialise, lowest first."""
    if layers is None:
        return known
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise InputError(
            f"layers is {describe(layers)}; give a sequence of names, lowest first: {', '.join(map(repr, known))}."
        )
    for name in layers:
        if not any(layer == name or layer.startswith(f"{name}.") for layer in known):
            raise InputError(f"layers has {name!r}, which holds no parameter.{did_you_mean(str(name), known)}")
    for n, name in enumerate(layers):
        for other in layers[n + 1 :]:
            if name == other or name.startswith(f"{other}.") or other.startswith(f"{name}."):
                raise InputError(f"layers has {name!r} and {other!r}, which share parameters; give each parameter once.")
    return list(layers)


def _weights(f: Any, params: Any) -> list[tuple[str, ...]]:
    """The addresses of floating-point parameters, without buffers where the model tells which are."""
    if not isinstance(params, (TensorDictBase, Mapping)):
        raise InputError(f"params is {describe(params)}; give a TensorDict or a mapping of tensors.")
    places = f.base.blueprint.tensor_names if isinstance(f, FunctionalModel) else {}
    found = []
    for address, value in _leaves(params):
        known = places.get(address, ())
        buffer = bool(known) and all(table == "_buffers" for _, table, _ in known)
        if value.is_floating_point() and not buffer and address[-1].rpartition(".")[2] not in STATISTICS:
            found.append(address)
    return found


def _leaves(params: Any, at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Tensor]]:
    found: list[tuple[tuple[str, ...], Tensor]] = []
    for key, value in params.items():
        if isinstance(value, Tensor):
            found.append(((*at, key), value))
        elif isinstance(value, (TensorDictBase, Mapping)):
            found += _leaves(value, (*at, key))
    return found


def _layer(address: tuple[str, ...]) -> str:
    """The module that owns a parameter: all but the last component, also of flat names such as "0.weight"."""
    return ".".join(address).rpartition(".")[0] or "(root)"


def _get(params: Any, address: tuple[str, ...]) -> Tensor:
    for key in address:
        params = params[key]
    return params


def _with(params: Any, values: Mapping[tuple[str, ...], Tensor]) -> Any:
    """A shallow copy of the parameters with some replaced."""
    if isinstance(params, TensorDictBase):
        copied = params.copy()
        for address, value in values.items():
            copied.set(address, value)
        return copied
    inner: dict[str, dict[tuple[str, ...], Tensor]] = {}
    for (key, *rest), value in values.items():
        inner.setdefault(key, {})[tuple(rest)] = value
    changed = {key: each[()] if () in each else _with(params[key], each) for key, each in inner.items()}
    return {**params, **changed}
