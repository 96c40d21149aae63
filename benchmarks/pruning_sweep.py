"""The outputs of a network at twenty degrees of pruning."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.utils.prune import L1Unstructured, global_unstructured

from tdhook.weights.pruning import prune, pruner
from tdhook.weights.scores import magnitude

from .case import Case, Competitor, Goal, Options
from .networks import efficientnet, functional, images, network

TITLE = "A sweep of twenty degrees of magnitude pruning"
INTRODUCTION = """\
All weights of two dimensions and more ranked together by magnitude, the lowest 0, 5, ..., 95 % of them set to zero, and
the outputs for a batch computed each time. torch: for each amount a deep copy of the module,
`torch.nn.utils.prune.global_unstructured`, a forward pass. Ours: `pruner` ranks once, and the amounts are vmapped in
the fastest of a few chunks. `ours, ranked each time` calls `prune` for each amount, as the loop of torch does.
On a CPU, torch has no fast kernel for convolutions with as many weights as there are models, so that there chunks of
one are the fastest, which is a loop."""

AMOUNTS = [i / 20 for i in range(20)]
TORCH, EACH = "torch, deep copies", "ours, ranked each time"


def cases(options: Options) -> Iterator[Case]:
    for kind in ("MLP", "ViT") if options.quick else ("MLP", "CNN", "ViT", "EfficientNet-Lite0"):
        batch = 8 if options.quick else 64 if kind == "MLP" else 16
        yield Case(
            f"{kind}, batch {batch}",
            {"network": kind, "batch": batch, "amounts": len(AMOUNTS)},
            partial(_competitors, kind, batch),
            tolerance=1e-3,  # of equal weights at the threshold torch's topk may take another one
            goals=(Goal("ours", TORCH, 1.0),),
            memory=not options.quick,
            seconds=3 if options.quick else 30,
        )


def _competitors(kind: str, batch: int) -> list[Competitor]:
    if kind == "EfficientNet-Lite0":
        model, x = efficientnet(), images(batch, pixels=128)
    else:
        model, x = network(kind, 10), images(batch)
    model.requires_grad_(False)
    f, params = functional(model)
    select = [name for name, tensor in model.named_parameters() if tensor.ndim > 1]
    scores = partial(magnitude, select=select)
    amounts = torch.tensor(AMOUNTS, dtype=torch.float64)

    @torch.no_grad()
    def ours(chunk_size: int | None) -> Tensor:
        pruned_by = pruner(params, scores)
        return vmap(lambda amount: f(pruned_by(amount).params, x), chunk_size=chunk_size)(amounts)

    @torch.no_grad()
    def ranked_each_time() -> Tensor:
        return torch.stack([f(prune(params, scores, amount).params, x) for amount in AMOUNTS])

    def pruned(amount: float) -> nn.Module:
        other = copy.deepcopy(model)
        places = (name.rpartition(".") for name in select)
        global_unstructured([(other.get_submodule(path), name) for path, _, name in places], L1Unstructured, amount=amount)
        return other

    @torch.no_grad()
    def of_torch() -> Tensor:
        return torch.stack([pruned(amount)(x) for amount in AMOUNTS])

    return [
        Competitor("ours", {f"chunk_size={c}": partial(ours, c) for c in (None, 5, 1)}),
        Competitor(EACH, {"": ranked_each_time}),
        Competitor(TORCH, {"": of_torch}),
    ]
