"""Worker for nnsight."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import nnsight
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))

from worker import neighbour, serve


def gpt2_cache(size: str, batch: int) -> Callable[[], list[Tensor]]:
    """The outputs of all modules; returns the logits, the first MLP's and the last block's."""
    gpt2 = neighbour("gpt2")
    model, ids = nnsight.NNsight(gpt2.gpt2(size)), gpt2.hello(batch)
    last = gpt2.SHAPES[size]["n_layer"] - 1

    @torch.no_grad()
    def run() -> list[Tensor]:
        with model.trace(ids, use_cache=False) as tracer:
            cache = tracer.cache(device=None)
            logits = model.output.logits.save()
        return [logits, cache["model.transformer.h.0.mlp"].output, cache[f"model.transformer.h.{last}"].output]

    return run


def mlp_intervene(additions: int, **sizes: int) -> Callable[[], list[Tensor]]:
    """See `benchmarks.mlp_intervene`."""
    network, x = neighbour("mlp").mlp(**sizes)
    model = nnsight.NNsight(network)

    @torch.no_grad()
    def run() -> list[Tensor]:
        with model.trace(x):
            read = model.layers[0].output.save()
            model.layers[-2].output = read
            for _ in range(additions):
                model.layers[-2].output = model.layers[-2].output + 1
            written = model.layers[-2].output.save()
            applied = model.layers[-1](written).save()
        return [read, written, applied]

    return run


def patching_sweep(size: str, length: int, differing: int, part: list[list[int]]) -> Callable[[], Tensor]:
    """The metric after each patch (kind, layer, position), one trace each."""
    gpt2 = neighbour("gpt2")
    model = nnsight.NNsight(gpt2.gpt2(size, 0.1))
    clean, corrupted = gpt2.prompts(1, length, differing)
    layers = gpt2.SHAPES[size]["n_layer"]

    with torch.no_grad(), model.trace(clean, use_cache=False) as tracer:
        cache = tracer.cache(device=None, include_inputs=True)
    blocks = [f"model.transformer.h.{i}" for i in range(layers)]
    values = [
        [cache[block].input.clone() for block in blocks],
        [cache[f"{block}.attn"].output[0] for block in blocks],
        [cache[f"{block}.mlp"].output for block in blocks],
    ]

    @torch.no_grad()
    def run() -> Tensor:
        found = []
        for kind, layer, position in part:
            value = values[kind][layer][:, position]
            with model.trace(corrupted, use_cache=False):
                block = model.transformer.h[layer]
                if kind == 0:
                    block.input[:, position] = value
                elif kind == 1:
                    block.attn.output[0][:, position] = value
                else:
                    block.mlp.output[:, position] = value
                metric = gpt2.logit_difference(model.output.logits).save()
            found.append(metric[0])
        return torch.stack(found)

    return run


if __name__ == "__main__":
    methods = {"gpt2_cache": gpt2_cache, "mlp_intervene": mlp_intervene, "patching_sweep": patching_sweep}
    serve(methods, ("nnsight", "torch", "transformers"))
