"""Integrated gradients of one to a thousand targets, on four kinds of networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tdhook
from tdhook.attribution.integrated_gradients import integrated_gradients

from .captum_loops import EACH, EXTRAPOLATED, looped, repeated
from .case import Case, Competitor, Goal, Options
from .language_model import PROMPT, smollm2, token_ids
from .networks import PENULTIMATE, images, network

TITLE = "Integrated gradients of one to a thousand targets"
INTRODUCTION = """\
Networks with random weights and 1000 classes, images of 3 × 32 × 32, Gauss–Legendre points, zero baseline, the same
number of points for all. MLP: four layers of 256 units and GELU; CNN: ResNet-20 with 64 penultimate features, GELU (or
ReLU, where the name says so) and BatchNorm in evaluation mode; ViT: transformers' ViT, 6 layers of width 64, 65 tokens.
SmolLM2-135M: from the embeddings of one sentence to those of another (token ids as baseline, with the names swapped),
targets are logits of the last token. `through the penultimate features` pulls back 64 features (256 for the MLP)
instead of the targets. Captum runs once per target, as documented; **with 100 targets and more that loop is timed on a
few of them and extrapolated linearly**, and its name says so. Both take the fastest of a few chunk sizes.

T targets cost captum T forward and T backward passes, ours one and T, or one and H through H features. Where passes
dominate, at most 2T / (1 + T) or 2T / (1 + H) is to be gained: 1.8 for ten targets, 31 for a thousand through 64."""

LATE = PROMPT.replace("John gave", "Mary gave")
OURS, THROUGH = "ours", "ours, through the penultimate features"
EMBEDDING = "model.embed_tokens"


def cases(options: Options) -> Iterator[Case]:
    for kind in ("MLP", "CNN", "ViT"):
        for count in (1, 10, 1000) if options.quick else (1, 2, 10, 100, 1000):
            if not (options.quick and kind == "CNN" and count == 10):
                yield _case(kind, count, options)
    if not options.quick:
        yield _case("CNN", 1000, options, nn.ReLU)
    for count in (2,) if options.quick else (1, 10):
        yield _smollm2_case(count, options)
    yield _vocabulary_case(options)


def sizes(kind: str, options: Options) -> tuple[int, int]:
    """Batch and steps."""
    if kind == "MLP":
        return (4, 10) if options.quick else (16, 50)
    return (1, 2) if options.quick else (1, 20)


def _case(kind: str, count: int, options: Options, activation: Callable = nn.GELU) -> Case:
    batch, steps = sizes(kind, options)
    timed = 3 if options.quick else 10 if kind == "MLP" else 5
    whole = count <= max(10, timed)
    goals = []
    if count == 1000 and kind != "MLP":
        goals.append(Goal(THROUGH, EXTRAPOLATED, 10.0))
    elif kind == "MLP" and count == 10:
        goals.append(Goal(OURS, EACH, 3.0))
    name = f"{kind}{' with ReLU' * (activation is nn.ReLU)}, {count} target{'s' * (count > 1)}"
    return Case(
        name,
        {"network": kind, "targets": count, "timed": count if whole else timed, "batch": batch, "steps": steps},
        partial(_competitors, kind, count, count if whole else timed, options, activation),
        # Rounding decides on which side of a ReLU's kink a value falls.
        tolerance=2e-2 if activation is nn.ReLU else 1e-3,
        goals=goals,
        memory=not options.quick and count in (10, 1000),
        seconds=3 if options.quick else 30,
    )


def _competitors(kind: str, count: int, timed: int, options: Options, activation: Callable) -> list[Competitor]:
    from captum.attr import IntegratedGradients

    batch, steps = sizes(kind, options)
    model, x = network(kind, 1000, activation=activation), images(batch)
    f, params = tdhook.functionalize(model)
    # spread over the classes, and in no order
    targets = torch.randperm(1000, generator=torch.Generator().manual_seed(2))[:count].tolist()

    def ours(chunk_size: int | None, through: str | None) -> Tensor:
        return integrated_gradients(f, params, x, targets=targets, steps=steps, chunk_size=chunk_size, through=through)

    method = IntegratedGradients(model)

    def captum(inputs: Tensor, target: Any, points: int | None) -> Tensor:
        size = None if points is None else points * len(inputs)
        return method.attribute(inputs, target=target, n_steps=steps, method="gausslegendre", internal_batch_size=size)

    points = (None,) if options.quick else (None, 5, 1)
    each = {f"internal_batch_size={n and n * batch}": partial(_captum_for, captum, x, n) for n in points}
    found = []
    if count <= 100:
        # all path points and targets of a large network at once need gigabytes
        chunks = (None,) if kind == "MLP" and count <= 10 else (steps * min(count, 10), 20, 4)
        found.append(Competitor(OURS, {f"chunk_size={c}": partial(ours, c, None) for c in chunks[: 1 if options.quick else 3]}))
    if count >= 100:
        chunks = (16,) if options.quick else (64, 16, 4)
        found.append(Competitor(THROUGH, {f"chunk_size={c}": partial(ours, c, PENULTIMATE) for c in chunks}))
    found.append(looped(each, targets, timed))
    if 1 < count <= 100 and not options.quick:
        several = {f"internal_batch_size={n and n * batch * count}": partial(captum, points=n) for n in (None, 1)[count > 10 :]}
        found.append(repeated(several, x, targets))
    return found


def _captum_for(captum: Callable, x: Tensor, points: int | None, target: int) -> Tensor:
    return captum(x, target, points)


def _smollm2_case(count: int, options: Options) -> Case:
    steps = 2 if options.quick else 8
    return Case(
        f"SmolLM2, {count} target{'s' * (count > 1)}",
        {"network": "SmolLM2-135M", "targets": count, "timed": count, "batch": 1, "steps": steps, "tokens": 15},
        partial(_smollm2, count, steps, options),
        tolerance=1e-3,
        memory=not options.quick and count == 10,
        seconds=0 if options.quick else 60,
    )


def _smollm2(count: int, steps: int, options: Options) -> list[Competitor]:
    model, ids, baseline, f, params, explain = _last_token()
    targets = _likely(model, ids, count)

    def ours(chunk_size: int) -> Tensor:
        found = integrated_gradients(
            f, params, ids, targets=targets, baselines=baseline, at=EMBEDDING, steps=steps, chunk_size=chunk_size
        )
        return found[EMBEDDING]

    chunks = (2,) if options.quick else (2, 4, 8)
    points = (1,) if options.quick else (1, 2, None)
    return [
        Competitor(OURS, {f"chunk_size={c}": partial(ours, c) for c in chunks}),
        looped({f"internal_batch_size={n}": partial(explain, steps, n) for n in points}, targets, count),
    ]


def _vocabulary_case(options: Options) -> Case:
    steps = 1 if options.quick else 8
    timed = 1 if options.quick else 3
    ours = "ours, forward mode"
    return Case(
        "SmolLM2, all 49,152 tokens of the vocabulary, per source token",
        {"network": "SmolLM2-135M", "targets": 49152, "timed": timed, "batch": 1, "steps": steps, "tokens": 15},
        partial(_vocabulary, steps, timed, ours, options),
        tolerance=1e-3,
        goals=(Goal(ours, EXTRAPOLATED, 10.0),),
        memory=not options.quick,
        seconds=0,
    )


def _vocabulary(steps: int, timed: int, name: str, options: Options) -> list[Competitor]:
    """Summed over the axis of the embedding: 15 groups of features, so 15 forward-mode passes instead of 49,152 backward."""
    _, ids, baseline, f, params, explain = _last_token()
    groups = {EMBEDDING: torch.arange(ids.shape[1])[:, None]}

    def ours(chunk_size: int) -> Tensor:
        return integrated_gradients(
            f,
            params,
            ids,
            targets=list(range(49152)),
            baselines=baseline,
            at=EMBEDDING,
            groups=groups,
            steps=steps,
            chunk_size=chunk_size,
        )

    def captum(target: int) -> Tensor:
        return explain(steps, 1, target).sum(-1)

    return [
        Competitor(name, {f"chunk_size={c}": partial(ours, c) for c in ((15,) if options.quick else (15, 5))}),
        looped({"internal_batch_size=1": captum}, range(49152), timed),
    ]


def _last_token() -> tuple[nn.Module, Tensor, Tensor, Any, Any, Callable[[int, int | None, int], Tensor]]:
    """SmolLM2 as a function from ids to the logits of the last token, for us and for captum."""
    from captum.attr import LayerIntegratedGradients

    model, _ = smollm2()
    ids, baseline = token_ids(PROMPT), token_ids(LATE)
    f, params = tdhook.functionalize(_LastLogits(model))
    method = LayerIntegratedGradients(_LastLogits(model), model.model.embed_tokens)

    def explain(steps: int, size: int | None, target: int) -> Tensor:
        return method.attribute(ids, baseline, target=target, n_steps=steps, method="gausslegendre", internal_batch_size=size)

    return model, ids, baseline, f, params, explain


class _LastLogits(nn.Module):
    """[1, L] -> [1, vocabulary]; only the last token is unembedded."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids, use_cache=False).last_hidden_state[:, -1])


def _likely(model: nn.Module, ids: Tensor, count: int) -> Sequence[int]:
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0, -1].topk(count).indices.tolist()
