"""Exact nearest neighbours and neighbour ranks by Euclidean distance, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batching import chunks
from .checks import require_positive
from .compat import is_compiling, is_wrapped
from .errors import InputError
from .structure import describe

BLOCK = 2**23  # distances held at once, where chunk_size does not say
ROWS = 512
GATHERED = 2**20  # numbers of gathered rows held at once: a few MB stay in the cache
SPARE = 4  # candidates beyond those asked for: the more, the fewer rows need a second look


class Neighbours(NamedTuple):
    """The k nearest neighbours of each query, nearest first; of equal distances the smaller index first.

    Attributes:
        distances: Tensor [*lead, Q, k].
        indices: Tensor [*lead, Q, k], int64: rows of `x`.
    """

    distances: Tensor
    indices: Tensor


def nearest(
    x: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    leave_out: Tensor | None = None,
    chunk_size: int | None = None,
) -> Neighbours:
    """The k nearest neighbours of every row, by Euclidean distance.

        distances[i, j] = |queries_i - x[indices[i, j]]|        the j-th smallest over the rows of x, without i itself

    Distances are found by matrix products and then taken again from differences of the rows: duplicates are at exactly 0, and
    the distances of close points have full precision. Where rounding of a product could have hidden a neighbour, that row
    is searched again in float64, and then by differences.

    Args:
        x: Tensor [*lead, N, D], floating-point; each of `lead` is a set of points of its own.
        k: number of neighbours, at most N - 1, or N with `queries`.
        queries: Tensor [*lead, Q, D] whose neighbours in `x` are asked for; no row is left out. None: the rows of `x`, where
            a row is not its own neighbour, but a duplicate of it is.
        leave_out: Tensor [*lead, N] of booleans: rows of `x` that are nobody's neighbour. Where fewer than k rows remain, the
            distances of those that lack are infinite.
        chunk_size: number of queries compared at once, with up to 2**23 / chunk_size points; None: 512.

    Returns:
        Neighbours: distances and indices [*lead, Q, k], in at least float32. Distances are differentiable (0 at duplicates).

    Raises:
        InputError: not floating-point, fewer than two dimensions, values that are not finite, too large a `k`, queries or
            `leave_out` that do not fit. Under vmap and compilation values cannot be checked: what is not finite makes its
            set of points NaN.

    Cost: a matrix product [Q, D] x [D, N], in float32 for float32 (float64 under vmap or compilation, without a second
        look), and Q * (k + 5) differences. Rows with more than k + 4 neighbours at the same distance cost Q * N
        differences.

    Examples:
        >>> found = nearest(torch.tensor([[0.0], [1.0], [3.0], [1.0]]), 2)
        >>> found.distances
        tensor([[1., 1.],
                [0., 1.],
                [2., 2.],
                [0., 1.]])
        >>> found.indices
        tensor([[1, 3],
                [3, 0],
                [1, 3],
                [1, 0]])
    """
    require_points("x", x)
    require_positive("k", k)
    require_positive("chunk_size", chunk_size, optional=True)
    points, count = _scaled(x), x.shape[-2]
    asked, own = points, torch.arange(count, device=x.device)
    if queries is not None:
        require_points("queries", queries)
        if queries.shape[:-2] != x.shape[:-2] or queries.shape[-1] != x.shape[-1]:
            raise InputError(f"queries is {describe(queries)} and x is {describe(x)}; they differ in the number of rows only.")
        asked, own = _scaled(queries, x), torch.full((queries.shape[-2],), -1, device=x.device)
    fits = isinstance(leave_out, Tensor) and leave_out.dtype == torch.bool and leave_out.shape == x.shape[:-1]
    if leave_out is not None and not fits:
        raise InputError(f"leave_out is {describe(leave_out)}; booleans {list(x.shape[:-1])} are expected, one for each row.")
    most = count - 1 if queries is None else count
    if k > most:
        raise InputError(f"k={k} neighbours of {count} points; k is at most {most}.")
    lead, (rows, columns) = x.shape[:-2], _blocks(asked.shape[-2], count, chunk_size)
    asked, points = asked.flatten(0, -3) if lead else asked[None], points.flatten(0, -3) if lead else points[None]
    without = None if leave_out is None else leave_out.reshape(len(points), count)
    traced = is_compiling() or is_wrapped(points) or is_wrapped(asked)
    found = []
    for sets in chunks(len(points), max(1, BLOCK // (rows * columns))):
        dtype = torch.float64 if traced else points.dtype
        products = _Products.of(points[sets].detach(), None if without is None else without[sets], dtype, columns, traced)
        parts = [products.search(asked[sets, part].detach(), own[part], k) for part in chunks(asked.shape[1], rows)]
        found.append(torch.cat(parts, 1) if parts else own.new_zeros(points[sets].shape[0], 0, k))
    indices = torch.cat(found) if found else own.new_zeros(0, asked.shape[1], k)
    shape = (*lead, *indices.shape[1:])
    distances = _distances(asked, points, indices, without)
    if leave_out is not None:  # where nothing is left, a row itself stands in
        distances = torch.where(indices == own[:, None], torch.inf, distances)
    return Neighbours(distances.reshape(shape) * magnitude(x), indices.reshape(shape))


def ranks(x: Tensor, indices: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """The ranks of given points among the neighbours of each row: 1 for its nearest neighbour.

        rank[i, j] = 1 + #{l != i: |x_i - x_l| < |x_i - x[indices[i, j]]|}

    Points at the same distance, up to the rounding of a matrix product in float64, share the smallest of their ranks.

    Args:
        x: Tensor [*lead, N, D], floating-point.
        indices: Tensor [*lead, N, k] of integers: rows of `x`, such as the neighbours in another space.
        chunk_size: number of rows compared at once with all others; None: as many as have 2**23 distances.

    Returns:
        Tensor [*lead, N, k], int64, from 1 to N - 1. The rank of a row among its own neighbours has no meaning.

    Raises:
        InputError: as `nearest`; indices that are no integers, or of another number of rows.

    Cost: a matrix product [N, D] x [D, N] in float64 and k comparisons of N x N numbers.

    Examples:
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
        >>> ranks(x, torch.tensor([[3], [0], [0], [2]]))
        tensor([[3],
                [1],
                [2],
                [1]])
    """
    require_points("x", x)
    require_positive("chunk_size", chunk_size, optional=True)
    whole = isinstance(indices, Tensor) and not indices.is_floating_point() and not indices.is_complex()
    if not whole or indices.shape[:-1] != x.shape[:-1]:
        raise InputError(f"indices is {describe(indices)}; integers [*lead, N, k] are expected, with x {describe(x)}.")
    count, lead = x.shape[-2], x.shape[:-2]
    points = _scaled(x).detach().to(torch.float64)
    points = points - points.mean(-2, keepdim=True)
    points, given = (points.flatten(0, -3), indices.flatten(0, -3)) if lead else (points[None], indices[None])
    rows = min(count, chunk_size or max(1, BLOCK // count))
    place = torch.arange(count, device=x.device)
    found, slack = [], _rounding(points)
    for sets in chunks(len(points), max(1, BLOCK // (rows * count))):
        norms = points[sets].square().sum(-1)
        for part in chunks(count, rows):
            product = torch.baddbmm(norms[:, None], points[sets, part], points[sets].mT, alpha=-2.0)
            product = torch.where(place[part, None] == place, torch.inf, product)  # nobody's own neighbour
            chosen = given[sets, part]
            # what two such numbers may differ by at the same distance
            room = slack * (norms[:, part, None] + norms.gather(1, chosen.flatten(1)).view_as(chosen)) * 2
            limits = product.gather(-1, chosen) - room
            nearer = [(product < limits[..., j, None]).sum(-1) for j in range(chosen.shape[-1])]
            found.append((torch.stack(nearer, -1) if nearer else chosen) + 1)
    per_set = -(-count // rows)
    whole_sets = [torch.cat(found[i : i + per_set], 1) for i in range(0, len(found), per_set)]
    return torch.cat(whole_sets).reshape(indices.shape) if whole_sets else indices.clone()


def require_points(name: str, x: Any) -> None:
    """Raises `InputError` unless `x` is a floating-point tensor [*lead, N, D] of finite values."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or 0 in x.shape[-2:]:
        raise InputError(f"{name} is {describe(x)}; a floating-point tensor [*lead, N, D] of N points is expected.")
    if not is_compiling() and not is_wrapped(x) and not bool(x.detach().isfinite().all()):
        raise InputError(f"{name} has values that are NaN or infinite; leave those points out.")


def _blocks(queries: int, count: int, chunk_size: int | None) -> tuple[int, int]:
    rows = max(1, min(queries, chunk_size or ROWS))
    return rows, min(count, max(1, BLOCK // rows))


def magnitude(x: Tensor) -> Tensor:
    """A power of 2 near the largest magnitude of each set [*lead, 1, 1]: no square under- or overflows, and none is rounded."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, largest, 1).log2().floor().exp2() + largest * 0  # NaN stays NaN


def _scaled(x: Tensor, like: Tensor | None = None) -> Tensor:
    return x / magnitude(x if like is None else like)


def _rounding(points: Tensor) -> float:
    """Bounds the error of |p|^2 - 2 q p relative to |q|^2 + |p|^2, as rounding errors add up at random (Higham, Mary, 2019)."""
    return (2 * points.shape[-1] ** 0.5 + 4) * torch.finfo(points.dtype).eps


def _distances(queries: Tensor, points: Tensor, indices: Tensor, without: Tensor | None) -> Tensor:
    """|queries_i - points[indices_ij]| by differences: queries [L, Q, D], points [L, N, D], indices [L, Q, k].

    Infinite to the points `without` [L, N].
    """
    width = max(1, GATHERED // max(1, indices.shape[0] * indices.shape[2] * queries.shape[-1]))
    sets = torch.arange(indices.shape[0], device=indices.device)[:, None, None]
    parts = [
        torch.linalg.vector_norm(queries[:, part, None] - points[sets, indices[:, part]], dim=-1)
        for part in chunks(indices.shape[1], width)
    ]
    distances = torch.cat(parts, 1) if parts else queries.new_zeros(indices.shape)
    return distances if without is None else torch.where(without[sets, indices], torch.inf, distances)


@dataclass(frozen=True)
class _Products:
    """Search by matrix products.

    Attributes:
        points: Tensor [L, N, D].
        without: Tensor [L, N] of booleans: points that are nobody's neighbour; or None.
        centre: Tensor [L, 1, D], in the dtype of the products.
        centred: Tensor [L, N, D], the points around it.
        norms: Tensor [L, N], their squares, made smaller by what rounding may add to a squared distance.
        columns: number of points compared at once.
        sure: take what is found, where no value can be looked at.
    """

    points: Tensor
    without: Tensor | None
    centre: Tensor
    centred: Tensor
    norms: Tensor
    columns: int
    sure: bool

    @classmethod
    def of(cls, points: Tensor, without: Tensor | None, dtype: torch.dtype, columns: int, sure: bool = False) -> _Products:
        cast = points.to(dtype)
        centre = cast.mean(1, keepdim=True)
        centred = cast - centre
        norms = centred.square().sum(-1) * (1 - _rounding(centred))
        norms = norms if without is None else torch.where(without, torch.inf, norms)
        return cls(points, without, centre, centred, norms, columns, sure)

    def search(self, queries: Tensor, own: Tensor, k: int) -> Tensor:
        """Indices [L, Q, k] for queries [L, Q, D]; own [Q] is the row that a query is, or -1."""
        count = min(k + 1 + SPARE, self.points.shape[1])
        candidates, bound = self.candidates(queries, count)
        indices, furthest = _refine(queries, self.points, self.without, candidates, own, k)
        if self.sure or count == self.points.shape[1]:
            return indices
        unsure = ~(furthest.square() * (1 + _rounding(queries)) < bound)
        for i in range(len(indices)):
            rows = unsure[i].nonzero()[:, 0]
            if len(rows):
                without = None if self.without is None else self.without[i : i + 1]
                one = (queries[i : i + 1, rows], self.points[i : i + 1], without)
                if self.centred.dtype == torch.float64:
                    again, _ = _refine(*one, _by_differences(*one, k + 1, self.columns), own[rows], k)
                else:
                    again = _Products.of(*one[1:], torch.float64, self.columns).search(one[0], own[rows], k)
                indices[i, rows] = again[0]
        return indices

    def candidates(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Indices [L, Q, count], and what the squared distance of all others is not below [L, Q]."""
        queries = queries.to(self.centre.dtype) - self.centre
        values: list[Tensor] = []
        indices: list[Tensor] = []
        for part in chunks(self.points.shape[1], self.columns):
            lower = torch.baddbmm(self.norms[:, None, part], queries, self.centred[:, part].mT, alpha=-2.0)
            best = lower.topk(min(count, lower.shape[-1]), largest=False, sorted=False)
            values, indices = [*values, best.values], [*indices, best.indices + part.start]
            if len(values) > 1:
                several = torch.cat(values, -1)
                best = several.topk(min(count, several.shape[-1]), largest=False, sorted=False)
                values, indices = [best.values], [torch.cat(indices, -1).gather(-1, best.indices)]
        return indices[0], values[0].amax(-1) + queries.square().sum(-1) * (1 - _rounding(queries))


def _refine(
    queries: Tensor, points: Tensor, without: Tensor | None, candidates: Tensor, own: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k nearest of the candidates [L, Q, m], and the distance of the last [L, Q]."""
    candidates = candidates.sort(-1).values
    distances = _distances(queries, points, candidates, without)
    distances = torch.where(candidates == own[:, None], torch.inf, distances)
    distances, order = distances.sort(dim=-1, stable=True)
    return candidates.gather(-1, order[..., :k]), distances[..., k - 1]


def _by_differences(queries: Tensor, points: Tensor, without: Tensor | None, count: int, columns: int) -> Tensor:
    """Candidates [L, Q, count]: the nearest, of equal ones those of smallest index."""
    values: list[Tensor] = []
    indices: list[Tensor] = []
    for part in chunks(points.shape[1], columns):
        block = torch.cdist(queries, points[:, part], compute_mode="donot_use_mm_for_euclid_dist")
        block = block if without is None else torch.where(without[:, None, part], torch.inf, block)
        width = min(count, block.shape[-1])
        limit = block.topk(width, largest=False).values[..., -1:]
        below, level = block < limit, block == limit
        taken = below | (level & (level.cumsum(-1) <= width - below.sum(-1, keepdim=True)))
        places = taken.nonzero()[:, -1].reshape(*block.shape[:-1], width)  # `width` in each row, in order
        values, indices = [*values, block.gather(-1, places)], [*indices, places + part.start]
        ordered, order = torch.cat(values, -1).sort(dim=-1, stable=True)
        values, indices = [ordered[..., :count]], [torch.cat(indices, -1).gather(-1, order[..., :count])]
    return indices[0]
