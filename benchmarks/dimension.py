"""Nearest neighbours and TwoNN of 10,000 points in 576 dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tdhook.core.neighbours import nearest
from tdhook.latent.dimension import two_nn

from .case import Case, Competitor, Goal, Options

TITLE = "Neighbours and intrinsic dimension of 10,000 points"
INTRODUCTION = """\
Points around a curved surface of 12 dimensions in 576, the width of the residual stream of SmolLM2-135M, in float32. The
two nearest neighbours of each, and the dimension TwoNN makes of them. Against scikit-learn's `NearestNeighbors`
(`algorithm="brute"`), exact as ours, followed by the fit of TwoNN in numpy."""

SCIKIT = "scikit-learn, brute force"
DISCARD = 0.1


def cases(options: Options) -> Iterator[Case]:
    count = 2000 if options.quick else 10_000
    for name, competitors in (("two neighbours", _neighbours), ("TwoNN", _two_nn)):
        yield Case(
            f"{name} of {count:,} points",
            {"points": count, "features": 576},
            partial(competitors, count),
            goals=(Goal("ours", SCIKIT, 1.0),),
            memory=not options.quick,
            seconds=3 if options.quick else 20,
        )


def _points(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(count, 12, generator=generator) @ torch.randn(12, 576, generator=generator) / 12**0.5
    return inner.tanh() + 0.01 * torch.randn(count, 576, generator=generator)


def _scikit_learn(x: Tensor) -> np.ndarray:
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=2, algorithm="brute").fit(x.numpy()).kneighbors()[0]


def _neighbours(count: int) -> list[Competitor]:
    x = _points(count)
    choices = {
        f"chunk_size={size}": partial(lambda size: nearest(x, 2, chunk_size=size).distances, size) for size in (None, 1024)
    }
    return [Competitor("ours", choices), Competitor(SCIKIT, {"": lambda: torch.from_numpy(_scikit_learn(x))})]


def _two_nn(count: int) -> list[Competitor]:
    x = _points(count)

    def scikit_learn() -> Tensor:
        distances = _scikit_learn(x).astype(np.float64)
        across = np.sort(np.log(distances[:, 1] / distances[:, 0]))[: int(count * (1 - DISCARD))]
        up = -np.log(1 - np.arange(1, len(across) + 1) / count)
        return torch.tensor((across * up).sum() / (across**2).sum(), dtype=torch.float32)

    return [Competitor("ours", {"": lambda: two_nn(x, discard=DISCARD).value}), Competitor(SCIKIT, {"": scikit_learn})]
