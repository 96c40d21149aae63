"""Worker for plain hooks, to measure how long a fresh process takes without any library of interpretability."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))

from worker import neighbour, serve


def gpt2_cache(size: str, batch: int) -> Callable[[], list[Tensor]]:
    """The outputs of all modules; returns the logits, the first MLP's and the last block's."""
    gpt2 = neighbour("gpt2")
    model, ids = gpt2.gpt2(size), gpt2.hello(batch)
    values: dict[str, Any] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: values.update({name: output}))
    last = gpt2.SHAPES[size]["n_layer"] - 1

    @torch.no_grad()
    def run() -> list[Tensor]:
        logits = model(ids, use_cache=False).logits
        return [logits, values["transformer.h.0.mlp"], values[f"transformer.h.{last}"]]

    return run


if __name__ == "__main__":
    serve({"gpt2_cache": gpt2_cache}, ("torch", "transformers"))
