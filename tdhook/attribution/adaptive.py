"""Quadrature nodes where the integrand needs them, found with forward-mode derivatives before any gradient is taken.

Along a path the scalar d/dalpha F(gamma(alpha)) costs one forward-mode pass for all targets, and its integral over every piece
of the path is known exactly: the difference of F at its ends. So the error of a rule on a piece is not estimated but measured.

Each example has pieces of its own. A piece is sampled at Clenshaw-Curtis points, which are nested (5, 9, 17) and include both
ends; where the error stays too large it gets more points, or is halved. At the end every piece gets the smallest Gauss-Legendre
rule that integrates the polynomial through its samples well enough, since at these nodes the dear gradients are taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor
from torch.func import vmap

from ..core.batching import chunks
from ..core.forward_mode import push_forward

LEVELS = (5, 9, 17)
MARGIN = 0.5  # of the tolerance: what the search aims at
ORDERS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17)
Array = numpy.ndarray


@dataclass
class Piece:
    """Samples of the integrand on [start, end], at Clenshaw-Curtis points.

    Attributes:
        rates: [n, T], d/dalpha F.
        values: [n, T], F.
    """

    start: float
    end: float
    rates: Array = field(default_factory=lambda: numpy.empty((0, 0)))
    values: Array = field(default_factory=lambda: numpy.empty((0, 0)))

    def alphas(self, level: int) -> Array:
        return self.start + (self.end - self.start) * chebyshev_points(level)

    def errors(self, level: int) -> Array:
        """[T]: how far the Clenshaw-Curtis rule on `level` of the samples is from the true integral."""
        rates = self.rates[:: (len(self.rates) - 1) // (level - 1)]
        weights = clenshaw_curtis_weights(level)
        return numpy.abs((self.end - self.start) * (weights @ rates) - (self.values[-1] - self.values[0]))

    def doubt(self, allowed: Array) -> tuple[float, float]:
        """The error as a share of what is allowed, and that of the rule on every second sample.

        A rule may be right by chance, so the first is never far below the second.
        """
        n = len(self.rates)
        coarse = _share(self.errors((n + 1) // 2), allowed)
        return max(_share(self.errors(n), allowed), coarse / 32), coarse

    def gauss_errors(self, order: int) -> Array:
        """[T]: the same for a Gauss-Legendre rule, on the polynomial through the samples."""
        weights = gauss_rule(order)[1]
        rates = interpolation(len(self.rates), order) @ self.rates
        return numpy.abs((self.end - self.start) * (weights @ rates) - (self.values[-1] - self.values[0]))


@functools.cache
def chebyshev_points(n: int) -> Array:
    """n points in [0, 1], both ends included, ascending."""
    return (1 - numpy.cos(numpy.pi * numpy.arange(n) / (n - 1))) / 2


@functools.cache
def clenshaw_curtis_weights(n: int) -> Array:
    """The weights on `chebyshev_points(n)`: those that integrate the polynomials up to degree n - 1 exactly."""
    degrees = numpy.arange(n)
    moments = numpy.where(degrees % 2 == 0, 1 / (1 - degrees.astype(float) ** 2 + (degrees == 1)), 0.0)
    return numpy.linalg.solve(numpy.polynomial.chebyshev.chebvander(2 * chebyshev_points(n) - 1, n - 1).T, moments)


@functools.cache
def gauss_rule(order: int) -> tuple[Array, Array]:
    nodes, weights = numpy.polynomial.legendre.leggauss(order)
    return (nodes + 1) / 2, weights / 2


@functools.cache
def interpolation(n: int, order: int) -> Array:
    """The matrix [order, n] from samples at Chebyshev points to the values of their polynomial at Gauss-Legendre nodes."""
    at_samples = numpy.polynomial.chebyshev.chebvander(2 * chebyshev_points(n) - 1, n - 1)
    at_nodes = numpy.polynomial.chebyshev.chebvander(2 * gauss_rule(order)[0] - 1, n - 1)
    return at_nodes @ numpy.linalg.inv(at_samples)


Sample = Callable[[list[Array]], list[tuple[Array, Array]]]


class Search:
    """Pieces of the path of each example, sampled until the integral over every piece is known to be right.

    Args:
        sample: from points for each example to the values [n, T] and rates [n, T] there.
        examples: how many.
        max_steps: the largest number of points of an example, in the search and in the result.
        floor: the error that rounding leaves, relative to the largest |F|.
    """

    def __init__(self, sample: Sample, examples: int, max_steps: int, floor: float):
        self.sample, self.max_steps, self.floor = sample, max_steps, floor
        self.pieces = [[Piece(0.0, 1.0)] for _ in range(examples)]
        self.used = [0] * examples
        self._run([[(piece, LEVELS[1]) for piece in each] for each in self.pieces])

    def nodes(self, tolerance: float) -> list[tuple[Array, Array]]:
        """Nodes and weights for each example, at a tolerance relative to the true value of the integral."""
        while any(pending := [self._refine(e, tolerance) for e in range(len(self.pieces))]):
            self._run(pending)
        return [_gauss_nodes(each, _scale(each, tolerance, self.floor), self.max_steps) for each in self.pieces]

    def look_closer(self, examples: Sequence[int]) -> None:
        """Samples every piece of some examples at more points, for an error that the present samples do not show."""
        pending: list[list[tuple[Piece, int]]] = [[] for _ in self.pieces]
        for e in examples:
            closer = [_closer(piece, len(piece.rates) < LEVELS[-1]) for piece in self.pieces[e]]
            self.pieces[e] = [piece for parts in closer for piece, _ in parts]
            pending[e] = [part for parts in closer for part in parts]
        self._run(pending)

    def _run(self, pending: list[list[tuple[Piece, int]]]) -> None:
        """Samples pieces at their levels."""
        wanted = [[(piece, level, _new_points(piece, level)) for piece, level in each] for each in pending]
        points = [numpy.concatenate([new for *_, new in each]) if each else numpy.empty(0) for each in wanted]
        for e, (values, rates) in enumerate(self.sample(points)):
            self.used[e] += len(points[e])
            stop = 0
            for piece, level, new in wanted[e]:
                start, stop = stop, stop + len(new)
                _insert(piece, level, values[start:stop], rates[start:stop])

    def _refine(self, example: int, tolerance: float) -> list[tuple[Piece, int]]:
        """Halves the worst pieces of an example; returns which need how many samples."""
        pieces = self.pieces[example]
        allowed = _scale(pieces, tolerance, self.floor)
        errors, coarse = numpy.array([piece.doubt(allowed) for piece in pieces]).T
        budget = self.max_steps - self.used[example]
        open_error = errors.sum()
        closer: dict[int, list[tuple[Piece, int]]] = {}
        # The largest errors first, until what the others leave is half of what is allowed.
        for i in numpy.argsort(-errors) if open_error > MARGIN else ():
            piece, n = pieces[i], len(pieces[i].rates)
            raised = n < LEVELS[-1] and errors[i] < coarse[i] / 8
            cost = n - 1 if raised else 2 * (LEVELS[0] - 2)
            if cost > budget or open_error <= MARGIN / 2:
                break
            if piece.end - piece.start > 1e-12:
                closer[i] = _closer(piece, raised)
                budget -= cost
            open_error -= errors[i]
        self.pieces[example] = [p for i, piece in enumerate(pieces) for p, _ in closer.get(i, [(piece, 0)])]
        return [part for parts in closer.values() for part in parts]


def _share(errors: Array, allowed: Array) -> float:
    """The largest error of a target, as a share of what is allowed; where the model gave no finite number, a huge one."""
    return float(numpy.nan_to_num(errors / allowed, nan=1e30, posinf=1e30).max())


def _scale(pieces: list[Piece], tolerance: float, floor: float) -> Array:
    """[T]: the error that is allowed in total."""
    values = numpy.concatenate([piece.values for piece in pieces])
    true = numpy.abs(pieces[-1].values[-1] - pieces[0].values[0])
    return numpy.maximum(tolerance * true, floor * numpy.abs(values).max(0)) + numpy.finfo(float).tiny


def _new_points(piece: Piece, level: int) -> Array:
    """The points of the level that the piece has no samples at."""
    alphas = piece.alphas(level)
    have = len(piece.rates)
    if have == 0:
        return alphas
    if have == 2:  # the ends, from the piece that was halved
        return alphas[1:-1]
    return alphas[1::2]


def _insert(piece: Piece, level: int, values: Array, rates: Array) -> None:
    have = len(piece.rates)
    rates = numpy.where(numpy.isfinite(rates), rates, numpy.nan)  # arithmetic with infinities warns
    if have == 0:
        piece.values, piece.rates = values, rates
        return
    known = numpy.zeros(level, bool)
    known[[0, -1] if have == 2 else slice(None, None, 2)] = True
    for name, new in (("values", values), ("rates", rates)):
        merged = numpy.empty((level, new.shape[1]))
        merged[known], merged[~known] = getattr(piece, name), new
        setattr(piece, name, merged)


def _closer(piece: Piece, raised: bool) -> list[tuple[Piece, int]]:
    """The piece at the next level, or its halves at the first one."""
    n = len(piece.rates)
    if raised:
        return [(piece, 2 * n - 1)]
    middle = (piece.start + piece.end) / 2
    return [
        (Piece(start, end, piece.rates[[i, j]], piece.values[[i, j]]), LEVELS[0])
        for start, end, i, j in ((piece.start, middle, 0, n // 2), (middle, piece.end, n // 2, -1))
    ]


def _gauss_nodes(pieces: list[Piece], allowed: Array, most: int) -> tuple[Array, Array]:
    """The nodes of Gauss-Legendre rules on the pieces, with as few nodes as the errors allow."""
    # errors[i, k] of piece i with order k. A rule may be right by chance, so the next one has to be as good.
    errors = numpy.array([[_share(piece.gauss_errors(order), allowed) for order in ORDERS] for piece in pieces])
    errors[:, :-1] = numpy.maximum(errors[:, :-1], errors[:, 1:])
    chosen = numpy.zeros(len(pieces), int)
    rows = numpy.arange(len(pieces))
    while (left := errors[rows, chosen]).sum() > MARGIN and sum(ORDERS[k] for k in chosen) < most:
        open_rows = numpy.where(chosen < len(ORDERS) - 1, left, -1.0)
        worst = int(open_rows.argmax())
        if open_rows[worst] <= MARGIN / (2 * len(pieces)):
            break
        chosen[worst] += 1
    widths = [piece.end - piece.start for piece in pieces]
    rules = [gauss_rule(ORDERS[k]) for k in chosen]
    nodes = [piece.start + width * rule[0] for piece, width, rule in zip(pieces, widths, rules)]
    return numpy.concatenate(nodes), numpy.concatenate([width * rule[1] for width, rule in zip(widths, rules)])


def sampler(
    scores: Callable[[Tensor], Tensor], batch: tuple[int, ...], dtype: torch.dtype, device: torch.device, chunk_size: int | None
) -> Sample:
    """Samples F and d/dalpha F for all examples at once; those that need fewer points than others repeat some.

    Args:
        scores: from alpha, Tensor [*batch], to the target values [*B, T].
        batch: [*B] where every example has points of its own, [] where they share them.
        dtype, device: of alpha.
        chunk_size: how many points run at once.
    """

    def sample(points: list[Array]) -> list[tuple[Array, Array]]:
        longest = max(len(p) for p in points)
        padded = numpy.stack([numpy.append(p, numpy.full(longest - len(p), 0.5)) for p in points], 1)
        alphas = torch.tensor(padded, dtype=dtype, device=device).reshape(longest, *batch)
        derivative = functools.partial(push_forward, scores)
        parts = [
            vmap(lambda a: derivative((a,), (torch.ones_like(a),)), randomness="different")(alphas[chunk])
            for chunk in chunks(longest, chunk_size)
        ]
        values, rates = (torch.cat(each).double().cpu() for each in zip(*parts))  # [S, *B, T]
        count = values.shape[-1]
        if batch:
            return [
                (v[: len(p)], r[: len(p)])
                for v, r, p in zip(*(x.reshape(longest, -1, count).movedim(1, 0).numpy() for x in (values, rates)), points)
            ]
        return [(values.reshape(longest, -1).numpy(), rates.reshape(longest, -1).numpy())]

    return sample
