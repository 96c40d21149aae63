"""All pairs of layers: linear CKA, information imbalance and shared neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy
import torch
from torch import Tensor

from tdhook.latent.similarity import cka, compare, information_imbalance, mutual_knn

from .case import Case, Competitor, Goal, Options

TITLE = "Similarity of all pairs of layers"
INTRODUCTION = """\
Layers of 576 features, each a random map of the one before plus noise. CKA of every layer with every other: ours is one
call; the loops take one pair after the other, by the cross-covariances of centred features, in numpy or torch. Information
imbalance and shared nearest neighbours of two layers: against scikit-learn's brute-force neighbours, with the ranks from
`pairwise_distances`."""

FEATURES = 576
NUMPY, TORCH, SKLEARN = "numpy, a loop over pairs", "torch, a loop over pairs", "scikit-learn"


def cases(options: Options) -> Iterator[Case]:
    count, layers = (2_000, 6) if options.quick else (10_000, 12)
    seconds = 3 if options.quick else 30
    yield Case(
        f"CKA of {layers} layers, {count} examples",
        {"layers": layers, "examples": count},
        partial(_alignments, count, layers),
        goals=(Goal("ours", NUMPY, 2.0), Goal("ours", TORCH, 2.0)),
        memory=not options.quick,
        seconds=seconds,
    )
    yield Case(
        f"Information imbalance, {count} examples, both directions",
        {"layers": 2, "examples": count},
        partial(_imbalances, count),
        goals=(Goal("ours", SKLEARN, 1.0),),
        memory=not options.quick,
        seconds=seconds,
    )
    yield Case(
        f"Shared neighbours, {count} examples, k = 10",
        {"layers": 2, "examples": count, "k": 10},
        partial(_shared, count),
        goals=(Goal("ours", SKLEARN, 1.0),),
        memory=not options.quick,
        seconds=seconds,
    )


def _layers(count: int, layers: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(count, FEATURES, generator=generator)]
    for _ in range(layers - 1):
        weight = torch.randn(FEATURES, FEATURES, generator=generator) / FEATURES**0.5
        values.append((values[-1] @ weight).tanh() + 0.3 * torch.randn(count, FEATURES, generator=generator))
    return {f"layers.{i}": value for i, value in enumerate(values)}


def _alignments(count: int, layers: int) -> list[Competitor]:
    xs = _layers(count, layers)
    arrays = [x.numpy() for x in xs.values()]

    def by_numpy() -> Tensor:
        def of_pair(x: numpy.ndarray, y: numpy.ndarray) -> float:
            x, y = x - x.mean(0), y - y.mean(0)
            own = numpy.linalg.norm(x.T @ x) * numpy.linalg.norm(y.T @ y)
            return numpy.linalg.norm(x.T @ y) ** 2 / own

        return torch.tensor([[of_pair(x, y) for y in arrays] for x in arrays])

    def by_torch() -> Tensor:
        def of_pair(x: Tensor, y: Tensor) -> Tensor:
            x, y = x - x.mean(0), y - y.mean(0)
            return (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())

        return torch.stack([torch.stack([of_pair(x, y) for y in xs.values()]) for x in xs.values()])

    return [
        Competitor("ours", {"": lambda: compare(cka, xs).matrix}),
        Competitor(NUMPY, {"": by_numpy}),
        Competitor(TORCH, {"": by_torch}),
    ]


def _imbalances(count: int) -> list[Competitor]:
    xs = _layers(count, 2)
    arrays = [x.numpy() for x in xs.values()]

    def ours() -> list[Tensor]:
        found = compare(information_imbalance, xs).matrix
        return [found[0, 1], found[1, 0]]

    def by_sklearn() -> list[Tensor]:
        from sklearn.metrics import pairwise_distances
        from sklearn.neighbors import NearestNeighbors

        def one_way(x: numpy.ndarray, y: numpy.ndarray) -> Tensor:
            near = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(x).kneighbors(return_distance=False)
            distances = pairwise_distances(y)
            numpy.fill_diagonal(distances, numpy.inf)
            ranks = 1 + (distances < numpy.take_along_axis(distances, near, 1)).sum(1)
            return torch.tensor(2 / count * ranks.mean())

        return [one_way(*arrays), one_way(*arrays[::-1])]

    return [Competitor("ours", {"": ours}), Competitor(SKLEARN, {"": by_sklearn})]


def _shared(count: int) -> list[Competitor]:
    x, y = _layers(count, 2).values()

    def by_sklearn() -> Tensor:
        from sklearn.neighbors import NearestNeighbors

        found = [
            NearestNeighbors(n_neighbors=10, algorithm="brute", metric="euclidean")
            .fit(z.numpy())
            .kneighbors(return_distance=False)
            for z in (x, y)
        ]
        return torch.tensor(sum(len(set(a) & set(b)) for a, b in zip(*(f.tolist() for f in found))) / (10 * count))

    return [
        Competitor("ours", {"": lambda: mutual_knn(x, y, k=10, metric="euclidean")}),
        Competitor(SKLEARN, {"": by_sklearn}),
    ]
