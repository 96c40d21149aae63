"""Gradients of the loss of every single example, with respect to all parameters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tdhook.weights.per_example import per_example_gradients

from .case import Case, Competitor, Goal, Options
from .networks import functional, images, network, small_cnn

TITLE = "Per-example gradients"
INTRODUCTION = """\
Gradients of the cross-entropy of each example with respect to every parameter, as one tensor [batch, *shape] for each.
Ours is one vmapped call for any module. Captum has two private functions that its `TracInCP` uses: one backward pass
for each example through one common graph, and, for models of linear layers and convolutions only
(`sample_wise_grads_per_batch`), one backward pass for all with the products taken in hooks. The loop runs forward and
backward for each example. Networks have random weights: the MLP has 986,634 parameters, the CNN of three convolutions
and two linear layers 390,410, the ViT 308,042."""

LOOP, CAPTUM, TRICK = "loop of autograd.grad", "captum, a backward pass for each", "captum, in hooks"


def cases(options: Options) -> Iterator[Case]:
    for kind, batch in (("MLP", 64), ("small CNN", 64), ("ViT", 16)):
        for size in (batch // 4,) if options.quick else (1, batch // 4, batch):
            hooked = kind != "ViT"
            yield Case(
                f"{kind}, batch {size}",
                {"network": kind, "batch": size},
                partial(_competitors, kind, size, hooked),
                goals=[Goal("ours", rival, 1.0) for rival in (LOOP, CAPTUM, TRICK) if hooked or rival != TRICK],
                memory=not options.quick and size == batch,
                seconds=3 if options.quick else 20,
            )


def _competitors(kind: str, batch: int, hooked: bool) -> list[Competitor]:
    from captum._utils import gradient as of_captum

    model = small_cnn() if kind == "small CNN" else network(kind, 10)
    x = images(batch, 1, 28) if kind == "small CNN" else images(batch)
    y = torch.arange(batch) % 10
    f, params = functional(model)
    names = [tuple(name.split(".")) for name, _ in model.named_parameters()]
    tensors = list(model.parameters())

    def ours(chunk_size: int | None) -> list[Tensor]:
        gradients = per_example_gradients(f, params, x, cross_entropy, labels=y, chunk_size=chunk_size)
        return [gradients[name] for name in names]

    def loop() -> list[Tensor]:
        each = [torch.autograd.grad(cross_entropy(model(a), b), tensors) for a, b in zip(x.split(1), y.split(1))]
        return [torch.stack(parts) for parts in zip(*each)]

    def captum() -> list[Tensor]:
        return list(of_captum._compute_jacobian_wrt_params(model, (x,), y, nn.CrossEntropyLoss(reduction="none")))

    def in_hooks() -> list[Tensor]:
        method = of_captum._compute_jacobian_wrt_params_with_sample_wise_trick
        return list(method(model, (x,), y, nn.CrossEntropyLoss(reduction="sum"), "sum"))

    return [
        Competitor("ours", {f"chunk_size={c}": partial(ours, c) for c in (None, 8) if c is None or c < batch}),
        Competitor(LOOP, {"": loop}),
        Competitor(CAPTUM, {"": captum}),
        *([Competitor(TRICK, {"": in_hooks}, note="linear layers and convolutions only")] if hooked else []),
    ]
