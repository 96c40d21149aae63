"""Examples that the tests of linear probes share: correlated activations in float64, and labels that overlap."""

import torch
from torch import Tensor

N, D = 80, 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(n: int = N, d: int = D, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Tensor [N, D] with correlated coordinates of several sizes, away from zero."""
    g = generator(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    return (x * torch.logspace(-1, 1, d, dtype=torch.float64) + 3).to(dtype)


def labels(x: Tensor, classes: int = 2, tasks: int | None = None, seed: int = 1) -> Tensor:
    """Labels [N] or [T, N] that x tells in part."""
    g = generator(seed)
    z = (x.double() - x.double().mean(0)) / x.double().std(0)
    scores = torch.randn(tasks or 1, classes, x.shape[1], generator=g, dtype=torch.float64) @ z.mT
    drawn = (scores + 3 * torch.randn(scores.shape, generator=g, dtype=torch.float64)).argmax(1)
    return drawn if tasks else drawn[0]


def values(x: Tensor, tasks: int | None = None, seed: int = 2) -> Tensor:
    g = generator(seed)
    y = torch.randn(tasks or 1, x.shape[1], generator=g, dtype=x.dtype) @ x.mT
    y = y + 2 * torch.randn(y.shape, generator=g, dtype=x.dtype) - 1
    return y if tasks else y[0]


def weights(n: int = N, seed: int = 3) -> Tensor:
    return torch.rand(n, generator=generator(seed), dtype=torch.float64) + 0.2
