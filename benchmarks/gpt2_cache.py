"""Caching the outputs of all modules of GPT-2: the task of tdhook's paper, against its peers and the bare forward."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import tdhook

from .case import Case, Competitor, Goal, Options
from .gpt2 import gpt2, hello
from .remote import Remote

TITLE = "Caching all activations of GPT-2"
INTRODUCTION = """\
The output of every module of GPT-2 (random weights) for "Hello, world!" times the batch, which is the task of tdhook's
paper (arXiv 2509.25475), under `torch.no_grad()`. What is compared is the logits, the first MLP's output and the last
block's. Ours, nnsight, tdhook 0.3.0 and the hooks keep the same modules; ours keeps copies whose memory is copied when
somebody writes into it, which GPT-2 does not, and nnsight and tdhook 0.3.0 keep references, as `forward hooks` do.
TransformerLens caches the hook points of its own forward, which are other ones and more. `ready` is the time from the
start of a fresh process to the end of its first caching, of a GPT-2 of two layers: interpreter, imports, model, call;
`forward hooks` need neither tdhook nor a peer."""

HOOKS, COPYING, BARE = "forward hooks", "forward hooks that copy", "model(x)"
NNSIGHT, LENS, PYPI = "nnsight 0.8.1", "TransformerLens 3.9.0", "tdhook 0.3.0 (PyPI)"
WORKERS = {NNSIGHT: "on_nnsight.py", LENS: "on_transformer_lens.py", PYPI: "tdhook_pypi.py"}


def cases(options: Options) -> Iterator[Case]:
    sizes = [("small", b) for b in (10, 50, 100, 500)] + [("medium", 10), ("medium", 50)]
    goals = (Goal("ours", BARE, 1 / 1.05), *(Goal("ours", peer, 1.0) for peer in (*WORKERS, HOOKS)))
    for size, batch in [("small", 10)] if options.quick else sizes:
        yield Case(
            f"{size}, batch {batch}",
            {"size": size, "batch": batch, "tokens": 4},
            partial(_competitors, size, batch, options),
            goals=goals,
            memory=not options.quick and (size, batch) in (("small", 50), ("medium", 50)),
        )
    if options.quick:
        return
    yield Case(
        "ready, 2 layers, width 64",
        {"size": "tiny", "batch": 1, "tokens": 4},
        partial(_ready, options),
        goals=[Goal("ours", peer, 1.0) for peer in WORKERS],
        seconds=60,
    )


def _competitors(size: str, batch: int, options: Options) -> list[Competitor]:
    model, ids = gpt2(size), hello(batch)
    f, params = tdhook.functionalize(model, use_cache=False)
    capture = tdhook.capture(f, "**")
    last = len(model.transformer.h) - 1

    def ours() -> list[Tensor]:
        output, values = capture(params, ids)
        return [output.logits, values["transformer.h.0.mlp"], values[f"transformer.h.{last}"]]

    def bare() -> list[Tensor]:
        return [model(ids, use_cache=False).logits]

    found = [
        Competitor("ours", {"": torch.no_grad()(ours)}),
        Competitor(BARE, {"": torch.no_grad()(bare)}, view=lambda result: result[:1], note="caches nothing"),
        Competitor(HOOKS, {"": partial(hooked, model, ids, last, lambda value: value)}),
        Competitor(COPYING, {"": partial(hooked, model, ids, last, torch.clone)}),
    ]
    if options.peers.exists():
        parameters = {"method": "gpt2_cache", "threads": options.threads, "size": size, "batch": batch}
        for name, worker in WORKERS.items():
            note = "caches the hook points of its own forward" if name == LENS else ""
            found.append(Competitor(name, {"": Remote(options.peers, worker, parameters)}, note=note))
    return found


@torch.no_grad()
def hooked(model: Any, ids: Tensor, last: int, keep: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The outputs of all modules by hooks that are set and removed in the call."""
    values = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: Any, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
            values[name] = keep(first) if isinstance(first, Tensor) else first

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        logits = model(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return [logits, values["transformer.h.0.mlp"], values[f"transformer.h.{last}"]]


class _Fresh:
    """A worker that is started anew for each call; the time includes its start."""

    def __init__(self, python: Path, script: str, parameters: dict[str, Any]):
        self.start = partial(Remote, python, script, parameters)

    def __call__(self) -> Any:
        return self.start()()

    def seconds(self, repeats: int) -> float:
        start = perf_counter()
        for _ in range(repeats):
            self.start().ask({"run": 1})
        return (perf_counter() - start) / repeats


def _ready(options: Options) -> list[Competitor]:
    parameters = {"method": "gpt2_cache", "threads": options.threads, "size": "tiny", "batch": 1}
    here = Path(os.path.abspath(sys.executable))
    found = [
        Competitor(name, {"": _Fresh(here, f"{file}.py", parameters)}) for name, file in (("ours", "ours"), (HOOKS, "hooks"))
    ]
    if options.peers.exists():
        found += [Competitor(name, {"": _Fresh(options.peers, file, parameters)}) for name, file in WORKERS.items()]
    return found
