"""How alike two representations of the same examples are: alignment of kernels, canonical correlations, rotations, neighbours.

    compare(cka, activations)                     # all pairs of the layers of a model
    compare(mutual_knn, of_one, of_another)       # of two models, on the same examples
    streamed_cka(activations_of(batch) for batch in data)

| measure | does not change under | says |
| --- | --- | --- |
| `cka` | rotations, one scale | the same examples are similar, counted by large directions |
| `rbf_cka` | rotations, one scale | the same, for near examples more than for far ones |
| `cca`, `svcca`, `pwcca` | invertible linear maps | the same directions are there, however large |
| `procrustes` | rotations, one scale | a rotation takes one to the other |
| `rsa` | depends on the dissimilarity | dissimilarities are in the same order |
| `information_imbalance` | what keeps the order of distances | near in one is near in the other; one way |
| `mutual_knn` | what keeps the order of distances | the same nearest examples |
"""

from .canonical import canonical_correlations, cca, pwcca, svcca
from .cka import cka, rbf_cka
from .compare import Comparison, compare
from .neighbourhoods import information_imbalance, mutual_knn
from .procrustes import procrustes, procrustes_distance
from .rsa import dissimilarities, rsa
from .streaming import minibatch_cka, streamed_cka

__all__ = [
    "Comparison",
    "canonical_correlations",
    "cca",
    "cka",
    "compare",
    "dissimilarities",
    "information_imbalance",
    "minibatch_cka",
    "mutual_knn",
    "procrustes",
    "procrustes_distance",
    "pwcca",
    "rbf_cka",
    "rsa",
    "streamed_cka",
    "svcca",
]
