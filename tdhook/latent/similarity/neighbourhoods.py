"""Which examples are near each other: information imbalance and the overlap of neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.batching import chunks
from ...core.checks import require_positive
from ...core.compat import is_compiling, is_wrapped
from ...core.errors import InputError
from ...core.neighbours import nearest, ranks
from ...core.structure import describe
from .samples import Measure, poisoned

METRICS = ("euclidean", "cosine")
BLOCK = 2**23  # comparisons held at once


def information_imbalance(
    x: Tensor,
    y: Tensor,
    *,
    k: int | Sequence[int] = 1,
    metric: str = "euclidean",
    chunk_size: int | None = None,
) -> Tensor:
    """How badly neighbours in the first representation predict neighbours in the second.

        Delta_k(x -> y) = 2 / (N k) sum_i sum over the k nearest j of i in x of rank_y(i, j)

    0 (at k = 1: 2 / N) where the nearest examples in x are the nearest in y; about 1 where x says nothing about distances in
    y. It has a direction: Delta(x -> y) small and Delta(y -> x) large says that x holds what y knows, and more. The other
    direction is `information_imbalance(y, x)`; `compare` gives both.

    Args:
        x: Tensor [*lead, N, D1].
        y: Tensor [*lead, N, D2], of the same examples.
        k: number of neighbours, at most N - 1; or several such numbers, at the cost of the largest.
        metric: `"euclidean"`, or `"cosine"`: the distance of rows of length 1.
        chunk_size: number of examples compared with all others at once; None: as many as have 2**23 distances. It bounds
            memory and does not change the result.

    Returns:
        Tensor [*lead], or [K, *lead] for several k; from (k + 1) / N up; it can be a little above 1. A float64 for float64,
        else float32. Of constant data it depends on the order of the rows.

    Raises:
        InputError: as `cka`; a bad k, metric or chunk_size; rows of zeros with `"cosine"`.

    Cost: two matrix products [N, D] x [D, N] (those of y in float64), and k comparisons of N x N numbers.

    Source: Glielmo et al., "Ranking the information content of distance measures" (2022).

    Examples:
        >>> x = torch.randn(100, 2)
        >>> information_imbalance(x, x)
        tensor(0.0200)
        >>> information_imbalance(x, x[:, :1]) < 0.2, information_imbalance(x[:, :1], x) > 0.3
        (tensor(True), tensor(True))
    """
    return imbalance_measure(k, metric, chunk_size)(x, y)


def mutual_knn(x: Tensor, y: Tensor, *, k: int = 10, metric: str = "cosine", chunk_size: int | None = None) -> Tensor:
    """The share of nearest neighbours that two representations have in common.

        m = 1 / (N k) sum_i |neighbours_x(i) & neighbours_y(i)|

    Args:
        x: Tensor [*lead, N, D1].
        y: Tensor [*lead, N, D2], of the same examples.
        k: number of neighbours, at most N - 1.
        metric: `"cosine"`: of rows of length 1, as in the source; or `"euclidean"`.
        chunk_size: as `information_imbalance`.

    Returns:
        Tensor [*lead], from 0 to 1; k / (N - 1) is expected of independent data. A float64 for float64, else float32. Of equal
        distances, neighbours of smaller index count.

    Raises:
        InputError: as `information_imbalance`.

    Cost: two matrix products [N, D] x [D, N], and N k^2 comparisons.

    Source: Huh et al., "The Platonic Representation Hypothesis" (2024).

    Examples:
        >>> x = torch.randn(100, 4)
        >>> mutual_knn(x, 2 * x), mutual_knn(x, torch.randn(100, 4)) < 0.3
        (tensor(1.), tensor(True))
    """
    return mutual_knn_measure(k, metric, chunk_size)(x, y)


def imbalance_measure(k: int | Sequence[int] = 1, metric: str = "euclidean", chunk_size: int | None = None) -> Measure:
    """The parts of `information_imbalance`. The ranks of all neighbours in one representation come from one pass."""
    several = not isinstance(k, int)
    sizes = list(k) if isinstance(k, (list, tuple, range)) else [k]
    if not sizes:
        raise InputError("k is empty; give at least one number of neighbours.")
    most = max(_required(size, metric, chunk_size) for size in sizes)

    def prepare(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = _rows(x, metric)
        return rows, nearest(rows, most, chunk_size=chunk_size).indices

    def column(left: list[tuple[Tensor, Tensor]], right: tuple[Tensor, Tensor]) -> Tensor:
        found = ranks(right[0], torch.cat([indices for _, indices in left], -1), chunk_size=chunk_size)
        results = []
        for (rows, _), part in zip(left, found.split(most, -1)):
            means = part.to(rows.dtype).mean(-2)  # [*lead, most]
            each = torch.stack([2 / part.shape[-2] * means[..., :size].mean(-1) for size in sizes])
            results.append(poisoned(each, rows, right[0]) if several else poisoned(each[0], rows, right[0]))
        return torch.stack(results)

    def between(first: Any, second: Any) -> Tensor:
        return column([first], second)[0]

    return Measure(prepare, between, symmetric=False, column=column, require=_require(most, metric))


def mutual_knn_measure(k: int = 10, metric: str = "cosine", chunk_size: int | None = None) -> Measure:
    """The parts of `mutual_knn`."""
    _required(k, metric, chunk_size)

    def prepare(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = _rows(x, metric)
        indices = nearest(rows, k, chunk_size=chunk_size).indices
        return indices, poisoned(torch.zeros_like(rows[..., 0, 0]), rows)

    def between(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
        (a, bad), (b, worse) = first, second
        count = a.shape[-2]
        step = max(1, BLOCK // (k * k * a.shape[:-2].numel()))
        shared = sum((a[..., part, :, None] == b[..., part, None, :]).sum((-3, -2, -1)) for part in chunks(count, step))
        return shared / torch.full_like(bad, count * k) + bad + worse

    return Measure(prepare, between, require=_require(k, metric))


def _required(k: Any, metric: Any, chunk_size: Any) -> int:
    require_positive("k", k)
    require_positive("chunk_size", chunk_size, optional=True)
    if metric not in METRICS:
        raise InputError(f"metric is {describe(metric)}; choose {' or '.join(map(repr, METRICS))}.")
    return k


def _require(k: int, metric: str) -> Callable[[str, Tensor], None]:
    def require(name: str, x: Tensor) -> None:
        if k > x.shape[-2] - 1:
            raise InputError(f"k={k} neighbours among the {x.shape[-2]} examples of {name}; k is at most {x.shape[-2] - 1}.")
        if metric == "cosine" and not is_compiling() and not is_wrapped(x) and bool((x.detach() == 0).all(-1).any()):
            raise InputError(f"{name} has rows of zeros, which have no direction; leave them out, or use metric='euclidean'.")

    return require


def _rows(x: Tensor, metric: str) -> Tensor:
    if metric == "euclidean":
        return x
    largest = x.abs().amax(-1, keepdim=True)
    rows = x / largest  # so that no square overflows
    return rows / rows.square().sum(-1, keepdim=True).sqrt()
