"""A full activation-patching sweep of GPT-2: residual stream, attention and MLP, by layer and position."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tdhook
from tdhook.latent import activation_patching

from .case import Case, Competitor, Goal, Options
from .gpt2 import SHAPES, gpt2, logit_difference, prompts
from .remote import Remote

TITLE = "Patching sweep of GPT-2"
INTRODUCTION = """\
Every patch of {residual stream before the block, attention, MLP} × layers × positions (clean into corrupted, 15 tokens,
random weights, metric: a logit difference at the last position). The peers are the sweeps of TransformerLens' `patching`
module, on the same weights without folding; an nnsight trace for each patch; and a forward with a hook for each patch.
Of their patches only an evenly spaced part is timed, and scaled, and their time does not include the clean run. Ours is
the whole sweep with both unpatched runs; it does not run patches at positions before the first difference of the
prompts, which in a causal model change nothing. So the prompts differ at the second token, where nearly everything is to
be run, and in another case at the tenth. `last token unembedded` is for a model that was told to give the logits of the
last position only."""

LENGTH = 15
NNSIGHT, LENS, HOOKS = "nnsight 0.8.1, one trace per patch", "TransformerLens 3.9.0, patching", "one hooked forward per patch"
LAST = "ours, last token unembedded"
WORKERS = {LENS: "on_transformer_lens.py", NNSIGHT: "on_nnsight.py"}


def cases(options: Options) -> Iterator[Case]:
    size = "shallow" if options.quick else "small"
    goals = [Goal(name, peer, ratio) for name in ("ours", LAST) for peer, ratio in ((LENS, 15.0), (NNSIGHT, 8.0))]
    for differing in (1,) if options.quick else (1, 9):
        yield Case(
            f"{size}, prompts differ at token {differing + 1}",
            {"size": size, "tokens": LENGTH, "differing": differing},
            partial(_competitors, size, differing, options),
            goals=() if options.quick else goals,  # the fewer layers, the less two patches share
            seconds=5 if options.quick else 60,
        )


def _competitors(size: str, differing: int, options: Options) -> list[Competitor]:
    model = gpt2(size, 0.1)
    clean, corrupted = prompts(1, LENGTH, differing)
    layers = SHAPES[size]["n_layer"]
    blocks = [f"transformer.h.{i}" for i in range(layers)]
    sites = [f"{block}{end}" for end in (":in", ".attn:out[0]", ".mlp") for block in blocks]

    def sweep(f: Any, params: Any, chunk_size: int | None) -> Tensor:
        with torch.no_grad():
            metric = lambda output: logit_difference(output.logits)[0]  # noqa: E731
            result = activation_patching(f, params, clean, corrupted, metric, sites=sites, chunk_size=chunk_size)
        return result.patched.unflatten(0, (3, layers))

    chunk_sizes = (None,) if options.quick else (None, 8)
    found = []
    for name, constants in (("ours", {}), (LAST, {"logits_to_keep": 1})):
        f, params = tdhook.functionalize(model, use_cache=False, **constants)
        found.append(Competitor(name, {f"chunk_size={c}": partial(sweep, f, params, c) for c in chunk_sizes}))

    every = [[kind, layer, position] for kind in range(3) for layer in range(layers) for position in range(LENGTH)]
    # an odd step, so that the part does not keep to one layer or one position
    part = every[:: max(1, len(every) // (12 if options.quick else 36)) | 1]
    at = torch.tensor(part).unbind(1)
    timed = {
        "view": lambda patched: patched[at],
        "scale": len(every) / len(part),
        "note": f"{len(part)} of {len(every)} patches timed, and scaled",
    }
    values = _values(model, clean)
    found.append(Competitor(HOOKS, {"": partial(_hooked, model, corrupted, values, part)}, **timed))
    if options.peers.exists():
        task = {"size": size, "length": LENGTH, "differing": differing, "part": part}
        parameters = {"method": "patching_sweep", "threads": options.threads, **task}
        for name, file in WORKERS.items():
            found.append(Competitor(name, {"": Remote(options.peers, file, parameters)}, **timed))
    return found


@torch.no_grad()
def _values(model: Any, clean: Tensor) -> list[list[Tensor]]:
    """What is patched in: for each kind and layer [1, L, D]."""
    found: list[list[Tensor]] = [[], [], []]
    handles = []
    for block in model.transformer.h:
        handles += [
            block.register_forward_pre_hook(lambda module, args: found[0].append(args[0])),
            block.attn.register_forward_hook(lambda module, args, output: found[1].append(output[0])),
            block.mlp.register_forward_hook(lambda module, args, output: found[2].append(output)),
        ]
    model(clean, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def _hooked(model: Any, corrupted: Tensor, values: list[list[Tensor]], part: list[list[int]]) -> Tensor:
    """The metric after each patch (kind, layer, position)."""
    found = []
    for kind, layer, position in part:
        value = values[kind][layer][:, position]

        def patched(old: Tensor, value: Tensor = value, position: int = position) -> Tensor:
            new = old.clone()
            new[:, position] = value
            return new

        block = model.transformer.h[layer]
        if kind == 0:
            handle = block.register_forward_pre_hook(lambda module, args, new=patched: (new(args[0]), *args[1:]))
        elif kind == 1:
            handle = block.attn.register_forward_hook(lambda module, args, output, new=patched: (new(output[0]), *output[1:]))
        else:
            handle = block.mlp.register_forward_hook(lambda module, args, output, new=patched: new(output))
        try:
            found.append(logit_difference(model(corrupted, use_cache=False).logits)[0])
        finally:
            handle.remove()
    return torch.stack(found)
