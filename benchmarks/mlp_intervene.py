"""Reads and writes between the layers of an MLP: the task of tdhook's paper, against its peers and plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import tdhook

from .case import Case, Competitor, Goal, Options
from .mlp import mlp
from .remote import Remote

TITLE = "Chained interventions in an MLP"
INTRODUCTION = """\
MLP of ten times Linear(width, width) and one shared ReLU. The output of the first linear layer is read and put in place
of that of the last but one, to which 1 is then added several times, each time by an intervention of its own; the result
is read, and the last layer is applied to it (the task of tdhook's paper, arXiv 2509.25475). The three values are
compared. `ours` runs the whole model under nested `intervene`, as the peers do, and for the value of the first layer
that layer once more; its interventions are made in each call, because they hold that value. `ours, head and tail` runs
the layers before the read and those after the write only, which is all that the three values depend on; it takes the
value as an argument, so it is made once. All under `torch.no_grad()`."""

HOOKS = "forward hooks"
NNSIGHT, PYPI = "nnsight 0.8.1", "tdhook 0.3.0 (PyPI)"
WORKERS = {NNSIGHT: "on_nnsight.py", PYPI: "tdhook_pypi.py"}


def cases(options: Options) -> Iterator[Case]:
    small, large = (10, 100, 5), (1000, 1000, 5)
    sizes = [small, (100, 100, 5), (100, 100, 20), (1000, 100, 5), large, (1000, 1000, 20)]
    goals = tuple(Goal("ours", peer, 1.0) for peer in WORKERS)
    for width, batch, additions in [small] if options.quick else sizes:
        yield Case(
            f"{additions} additions, width {width}, batch {batch}",
            {"width": width, "batch": batch, "additions": additions},
            partial(_competitors, width, batch, additions, options),
            goals=goals,
            memory=not options.quick and (width, batch, additions) == large,
        )


def _competitors(width: int, batch: int, additions: int, options: Options) -> list[Competitor]:
    model, x = mlp(width, batch)
    f, params = tdhook.functionalize(model)
    last, _ = tdhook.functionalize(model.layers[-1])
    first, before_last = "layers.0", f"layers.{len(model.layers) - 2}"
    head, tail = tdhook.stop_at(f, first), tdhook.start_from(f, before_last)
    end = params["layers", str(len(model.layers) - 1)]

    def ours() -> list[Tensor]:
        read = head(params, x)
        g = tdhook.intervene(f, {before_last: read})
        for _ in range(additions):
            g = tdhook.intervene(g, {before_last: _plus_one})
        _, values = tdhook.capture(g, before_last)(params, x)
        return [read, values[before_last], last(end, values[before_last])]

    for _ in range(additions):
        tail = tdhook.intervene(tail, {before_last: _plus_one})
    read_tail = tdhook.capture(tail, before_last)

    def head_and_tail() -> list[Tensor]:
        read = head(params, x)
        _, values = read_tail(params, x, read)
        return [read, values[before_last], last(end, values[before_last])]

    found = [
        Competitor("ours", {"": torch.no_grad()(ours)}),
        Competitor("ours, head and tail", {"": torch.no_grad()(head_and_tail)}),
        Competitor(HOOKS, {"": partial(_hooked, model, x, additions)}),
    ]
    if options.peers.exists():
        sizes = {"width": width, "batch": batch, "additions": additions}
        parameters = {"method": "mlp_intervene", "threads": options.threads, **sizes}
        found += [Competitor(name, {"": Remote(options.peers, file, parameters)}) for name, file in WORKERS.items()]
    return found


def _plus_one(value: Tensor) -> Tensor:
    return value + 1


@torch.no_grad()
def _hooked(model: nn.Module, x: Tensor, additions: int) -> list[Tensor]:
    """The same by forward hooks, one for each read and write."""
    found: dict[str, Tensor] = {}

    def read(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            found[name] = output

        return hook

    layers = model.layers
    handles = [
        layers[0].register_forward_hook(read("first")),
        layers[-2].register_forward_hook(lambda module, args, output: found["first"]),
        *(layers[-2].register_forward_hook(lambda module, args, output: output + 1) for _ in range(additions)),
        layers[-2].register_forward_hook(read("written")),
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return [found["first"], found["written"], layers[-1](found["written"])]
