"""Worker for the package `tdhook` of PyPI, which has our import name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent))

from worker import neighbour, serve


def integrated_gradients(steps: int, targets: list[int], **sizes: int) -> Callable[[], list[Tensor]]:
    """Integrated gradients of the sum of several targets: what a run returns is [B, *features]."""
    from tdhook.attribution import IntegratedGradients

    model, inputs = neighbour("mlp").mlp(targets=targets, **sizes)
    method = IntegratedGradients(
        init_attr_targets=lambda out, _: TensorDict({"chosen": out["output"][..., targets]}, out.batch_size),
        multiply_by_inputs=True,
        compute_convergence_delta=True,
        n_steps=steps,
    )
    # entered once: setting the hooks is not what is timed
    hooked = method.prepare(model).__enter__()

    def run() -> list[Tensor]:
        given = {"input": inputs, ("baseline", "input"): torch.zeros_like(inputs)}
        result = hooked(TensorDict(given, batch_size=len(inputs)))
        return [result["attr", "input"].detach()]

    return run


def lrp(**sizes: int) -> Callable[[], list[Tensor]]:
    """The composite epsilon-plus, from the output itself: what a run returns is [B, *features]."""
    from tdhook.attribution.lrp_helpers.rules import EpsilonPlus

    from tdhook.attribution import LRP

    model, inputs = neighbour("mlp").mlp(**sizes)
    method = LRP(
        rule_mapper=EpsilonPlus(epsilon=1e-6),
        skip_modules=LRP.default_skip,
        init_attr_grads=lambda out, _: out.detach(),
    )
    hooked = method.prepare(model).__enter__()

    def run() -> list[Tensor]:
        return [hooked(TensorDict({"input": inputs}, batch_size=len(inputs)))["attr", "input"].detach()]

    return run


def gpt2_cache(size: str, batch: int) -> Callable[[], list[Tensor]]:
    """The outputs of all modules; returns the logits, the first MLP's and the last block's."""
    from tdhook.latent import ActivationCaching

    gpt2 = neighbour("gpt2")
    model, ids = Logits(gpt2.gpt2(size)), gpt2.hello(batch)
    # of what returns several values, as attention does, it caches what a callback chooses
    caching = ActivationCaching(r"^model\.(?!transformer$)", callback=lambda module, args, output, **_: _first(output))
    hooked = caching.prepare(model, in_keys=["ids"], out_keys=["logits"]).__enter__()
    last = len(model.model.transformer.h) - 1

    @torch.no_grad()
    def run() -> list[Tensor]:
        result = hooked(TensorDict({"ids": ids}, batch_size=[]))
        cache = result["cache"]
        return [result["logits"], cache["model.transformer.h.0.mlp"], cache[f"model.transformer.h.{last}"]]

    return run


class Logits(nn.Module):
    """A language model that returns the tensor only."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def mlp_intervene(additions: int, **sizes: int) -> Callable[[], list[Tensor]]:
    """See `benchmarks.mlp_intervene`."""
    from tdhook.session import HookSession

    from tdhook.targets import Target

    model, x = neighbour("mlp").mlp(**sizes)
    units = tuple(range(sizes["width"]))
    first, before_last = (Target(f"layers[{i}]", "activation", -1, units) for i in (0, len(model.layers) - 2))

    @torch.no_grad()
    def run() -> list[Tensor]:
        with HookSession(model) as session:
            read = session.capture(first)
            session.replace(before_last, read)
            for _ in range(additions):
                session.replace(before_last, session.capture(before_last), transform=lambda value: value + 1)
            written = session.capture(before_last)
            model(x)
        return [read.values[0], written.values[0], model.layers[-1](written.values[0])]

    return run


if __name__ == "__main__":
    methods = {f.__name__: f for f in (integrated_gradients, lrp, gpt2_cache, mlp_intervene)}
    serve(methods, ("tdhook", "torch", "tensordict"))
