"""What the call itself costs: functionalize, a bare call, a capture, the import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import tdhook

from .case import Case, Competitor, Goal, Options
from .language_model import PROMPT, smollm2, token_ids
from .mlp import mlp

TITLE = "The call itself"
INTRODUCTION = """\
`f(params, x)` against `model(x)` and `torch.func.functional_call`; reading the outputs of all 30 blocks of SmolLM2
against forward hooks and against the bare forward; `functionalize`; `import tdhook` after `import torch, tensordict`,
in fresh processes. All under `torch.no_grad()`."""

IMPORT = """
import torch, tensordict
from time import perf_counter
start = perf_counter()
import {name}
print(perf_counter() - start)
"""


def cases(options: Options) -> Iterator[Case]:
    seconds = 10 if options.quick else 60
    within = {"seconds": seconds, "tolerance": 0.0}
    goals = (Goal("ours", "model(x)", 1 / 1.05),)
    yield Case("call of SmolLM2", {"tokens": 15}, _call_smollm2, goals=goals, **within)
    yield Case("call of an MLP, 10 layers, width 10", {"batch": 10}, _call_mlp, goals=(Goal("ours", "model(x)", 1 / 2.5),))
    yield Case("capture of 30 blocks", {"tokens": 15}, _capture, goals=(Goal("ours", "model(x)", 1 / 1.05),), **within)
    yield Case(
        "functionalize SmolLM2",
        {},
        _functionalize,
        goals=(Goal("ours", seconds=0.05),),
        claims={"no parameter is copied": _shares_storage},
    )
    yield Case("import", {}, _import, goals=(Goal("ours", seconds=0.1),), seconds=20 if options.quick else 60)


def _without_gradients(run: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(run)


def _competitors(**runs: Callable[[], Any]) -> list[Competitor]:
    names = {"model": "model(x)", "functional": "torch.func.functional_call", "hooks": "forward hooks"}
    return [Competitor(names.get(key, key), {"": _without_gradients(run)}) for key, run in runs.items()]


def _call_smollm2() -> list[Competitor]:
    model, _ = smollm2()
    ids = token_ids(PROMPT)
    f, params = tdhook.functionalize(model, use_cache=False)
    tensors = _tensors(model)
    return _competitors(
        ours=lambda: f(params, ids).logits,
        model=lambda: model(ids, use_cache=False).logits,
        functional=lambda: functional_call(model, tensors, (ids,), {"use_cache": False}).logits,
    )


def _call_mlp() -> list[Competitor]:
    model, x = mlp(10, 10)
    f, params = tdhook.functionalize(model)
    tensors = _tensors(model)
    return _competitors(
        ours=lambda: f(params, x), model=lambda: model(x), functional=lambda: functional_call(model, tensors, (x,))
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _capture() -> list[Competitor]:
    model, _ = smollm2()
    ids = token_ids(PROMPT)
    f, params = tdhook.functionalize(model, use_cache=False)
    read = tdhook.capture(f, "model.layers.*")

    def ours() -> list[Tensor]:
        output, values = read(params, ids)
        return [output.logits, *(values[f"model.layers.{i}"] for i in range(30))]

    def hooks() -> list[Tensor]:
        found: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda module, args, output: found.append(output)) for layer in model.model.layers
        ]
        try:
            return [model(ids, use_cache=False).logits, *found]
        finally:
            for handle in handles:
                handle.remove()

    bare, *others = _competitors(model=lambda: [model(ids, use_cache=False).logits], hooks=hooks)
    bare = Competitor(bare.name, bare.choices, view=lambda result: result[:1])
    return [*_competitors(ours=ours), bare, *others]


def _functionalize() -> list[Competitor]:
    model, _ = smollm2()
    return [Competitor("ours", {"": lambda: tdhook.functionalize(model) and None})]


def _shares_storage() -> bool:
    model, _ = smollm2()
    _, params = tdhook.functionalize(model)
    return all(params[tuple(name.split("."))].data_ptr() == t.data_ptr() for name, t in model.named_parameters())


class _Import:
    """Imports in a fresh process; the time is the one taken inside it."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self) -> None:
        self.seconds(1)

    def seconds(self, repeats: int) -> float:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-c", IMPORT.format(name=self.name)]
        start = partial(subprocess.run, command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        return sum(float(start().stdout) for _ in range(repeats)) / repeats


def _import() -> list[Competitor]:
    return [Competitor("ours", {"": _Import("tdhook")}), Competitor("captum", {"": _Import("captum.attr")})]
