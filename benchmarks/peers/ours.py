"""Worker for this package, to measure how long a fresh process takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import tdhook

sys.path.append(str(Path(__file__).parent))

from worker import neighbour, serve


def gpt2_cache(size: str, batch: int) -> Callable[[], list[Tensor]]:
    """The outputs of all modules; returns the logits, the first MLP's and the last block's."""
    gpt2 = neighbour("gpt2")
    ids = gpt2.hello(batch)
    f, params = tdhook.functionalize(gpt2.gpt2(size), use_cache=False)
    last = gpt2.SHAPES[size]["n_layer"] - 1

    @torch.no_grad()
    def run() -> list[Tensor]:
        output, values = tdhook.capture(f, "**")(params, ids)
        return [output.logits, values["transformer.h.0.mlp"], values[f"transformer.h.{last}"]]

    return run


if __name__ == "__main__":
    serve({"gpt2_cache": gpt2_cache}, ("tdhook", "torch", "transformers"))
