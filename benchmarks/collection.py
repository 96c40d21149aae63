"""Collecting the residual stream of a language model, in memory and on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tdhook
from tdhook.latent.collection import collect

from .case import Case, Competitor, Goal, Options
from .language_model import smollm2

TITLE = "Collecting the residual stream of SmolLM2-135M"
INTRODUCTION = """\
Every token of a data set at the output of all 30 blocks, in float32. `bare forward` is the body of the model (without
the unembedding, which nothing here needs) under `torch.no_grad()`, and keeps nothing. The hook loop is what one writes by
hand: a forward hook for each block appends to a list, and the lists are joined at the end. `on disk` writes the rows to a
folder and returns them memory-mapped; its peak memory is to be flat, so it is measured for two lengths of the data set."""

BARE, HOOKS, DISK = "bare forward", "forward hooks and lists", "ours, on disk"
WITHIN = 1 / 1.1


def cases(options: Options) -> Iterator[Case]:
    sizes = [(2, 64, 3)] if options.quick else [(8, 128, 4), (8, 128, 12)]
    for batch, length, count in sizes:
        yield Case(
            f"{count} batches of {batch} × {length} tokens",
            {"batches": count, "batch": batch, "length": length, "layers": 30},
            partial(_competitors, batch, length, count),
            goals=(Goal("ours", BARE, WITHIN), Goal(DISK, BARE, WITHIN)),
            memory=not options.quick,
            seconds=10 if options.quick else 90,
        )


def _competitors(batch: int, length: int, count: int) -> list[Competitor]:
    model, _ = smollm2()
    body = model.model
    f, params = tdhook.functionalize(model, use_cache=False)
    ids = torch.randint(0, 1000, (count * batch, length), generator=torch.Generator().manual_seed(0))
    batches = ids.split(batch)
    sites = [f"model.layers.{i}" for i in range(len(body.layers))]

    def ours(**options: Any) -> list[Tensor]:
        rows = collect(f, params, batches, "model.layers.*", pool="rows", **options)
        return [rows[site] for site in sites]

    def on_disk() -> list[Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            return ours(path=folder)  # what is mapped stays readable when the folder is gone

    @torch.no_grad()
    def bare() -> list[Tensor]:
        for some in batches:
            body(some, use_cache=False)
        return []

    @torch.no_grad()
    def hooks() -> list[Tensor]:
        found: list[list[Tensor]] = [[] for _ in body.layers]
        handles = [
            layer.register_forward_hook(lambda module, args, output, part=part: part.append(output.flatten(0, 1)))
            for layer, part in zip(body.layers, found)
        ]
        try:
            for some in batches:
                body(some, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return [torch.cat(part) for part in found]

    return [
        Competitor("ours", {"": ours, "total": partial(ours, total=ids.numel())}),
        Competitor(DISK, {"": on_disk}),
        Competitor(BARE, {"": bare}, view=lambda result: [], note="keeps nothing"),
        Competitor(HOOKS, {"": hooks}),
    ]
