"""Representations to compare."""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook.latent.similarity.canonical import cca, pwcca, svcca
from tdhook.latent.similarity.cka import cka, rbf_cka
from tdhook.latent.similarity.neighbourhoods import information_imbalance, mutual_knn
from tdhook.latent.similarity.procrustes import procrustes, procrustes_distance
from tdhook.latent.similarity.rsa import rsa

MEASURES = (cka, rbf_cka, cca, svcca, pwcca, procrustes, procrustes_distance, rsa, information_imbalance, mutual_knn)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(count: int = 40, widths: tuple[int, ...] = (5, 8, 5, 3)) -> dict[str, Tensor]:
    """Representations of some widths that share a part of what they hold."""
    common = draw(count, 4)
    return {
        f"h.{i}": common @ draw(4, width, seed=10 + i) + draw(count, width, seed=20 + i) + i for i, width in enumerate(widths)
    }


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(draw(width, width, seed=99))[0]
