"""Where relevance goes that does not reach the inputs: biases, position embeddings, norms, softmax, the epsilon of rules.

Each operand and each result of an operation is multiplied by a scale of 1. The derivative of F with respect to the scale of a
result is the relevance that arrives there, and that of the scales of the operands is what goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.func import vjp

from ..core.batching import pull_each
from ..core.plan import addresses, live_numbers
from ..core.ruling import Probe, Ruled
from ..core.sites import Want
from ..core.targets import Targets, select
from .relevance import started


class Ledger(NamedTuple):
    """Relevance, and what was absorbed on the way: together they are F.

    Attributes:
        relevance: in the structure of what is explained.
        absorbed: TensorDict from each operation that depends on the input to Tensor [B] or [T, B]: the relevance that arrives
            at its result less that which goes on to its operands. `":out"` is what a target that is not linear in the output
            takes up.
    """

    relevance: Any
    absorbed: TensorDict


def absorbed_relevance(
    g: Ruled,
    params: Any,
    inputs: Any,
    targets: Targets,
    cut: Mapping[Want, Tensor],
    start: str,
    chunk_size: int | None,
    like: Tensor,
) -> TensorDict:
    """What each operation absorbs of each target and example.

    Args:
        g: the model with rules.
        params: its parameters.
        inputs: as it takes them.
        targets: the scalars F.
        cut: values at sites behind which nothing counts.
        start: as in `lrp`.
        chunk_size: how many pairs of an example and a target are pulled back at once.
        like: a tensor whose device and precision are those of the result.

    Returns:
        TensorDict from the address of an operation to Tensor [B] or [T, B].

    Cost: one forward and B T backward passes.
    """
    plan = g.plan(params, inputs)
    sites = addresses(plan)
    zeros = torch.zeros(2 * len(sites) + 1, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    several = []

    def scores(scales: Tensor) -> tuple[Tensor, Tensor]:
        operands, results, output = scales.split([len(sites), len(sites), 1])
        probe = Probe(operands, results, output[0])
        chosen, plural = select(targets, g.probed(params, inputs, probe, cut))
        several.append(plural)
        return chosen.reshape(-1), chosen

    each, pull, chosen = vjp(scores, zeros, has_aux=True)  # type: ignore[misc]
    (by_scale,) = pull_each(pull, each, torch.ones_like(each[:1]), chunk_size)  # [B * T, 2 N + 1]
    by_scale = by_scale.reshape(*chosen.shape, -1).movedim(chosen.ndim - 1, 0)  # [T, *B, 2 N + 1]
    by_scale = started(by_scale, chosen, start)
    whole = started(chosen.movedim(-1, 0).to(by_scale.dtype), chosen, start)
    operands, results, output = by_scale.split([len(sites), len(sites), 1], -1)
    stopping = tuple(i for i, entry in enumerate(g.rules.entries) if entry.rule.stops)
    constants = live_numbers(plan, stopping)
    taken: dict[str, Tensor] = {}
    for number in live_numbers(plan):
        if number not in constants:
            difference = results[..., number] - operands[..., number]
            taken[sites[number]] = taken[sites[number]] + difference if sites[number] in taken else difference
    taken[":out"] = whole - output[..., 0]
    return TensorDict({site: t if several[0] else t[0] for site, t in taken.items()}, batch_size=[])
