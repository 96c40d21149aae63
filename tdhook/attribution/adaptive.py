"""Quadrature nodes where the integrand needs them, found from values of F before any gradient is taken.

Completeness says what the integral over any piece of the path is: the difference of F at its ends. So F is sampled along the
path, which costs one forward pass a point for all targets, and the derivative of the polynomial through the samples stands for
the integrand: how well a Gauss-Legendre rule would do is then known without a gradient. (The derivative itself, in forward
mode, was measured to cost four to seven forward passes a point.)

Each example has pieces of its own. A piece is sampled at Chebyshev points, which are nested (5, 9, 17, 33) and include both
ends; where half of the samples do not predict the other half, it gets more of them, or is cut in two. Then every piece gets the
smallest rule that is good enough, since at its nodes the dear gradients are taken.
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
from ..core.quadrature import quadrature_rule

LEVELS = (5, 9, 17, 33)
FIRST = 9
MARGIN = 0.5  # of the tolerance: what the search aims at
SAMPLES = 4  # of F in the search, for each step that is allowed
ORDERS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 28)
Array = numpy.ndarray
Sample = Callable[[list[Array]], list[Array]]


@dataclass
class Piece:
    """Samples of F on [start, end], at Chebyshev points: [n, T]."""

    start: float
    end: float
    values: Array = field(default_factory=lambda: numpy.empty((0, 0)))

    def new_points(self, level: int) -> Array:
        """The points of the level that there are no samples at."""
        alphas = self.start + (self.end - self.start) * chebyshev_points(level)
        return alphas[_new(len(self.values), level)]

    def insert(self, level: int, values: Array) -> None:
        """Takes the samples at the new points."""
        new = _new(len(self.values), level)
        merged = numpy.empty((level, values.shape[1]))
        merged[new] = values
        if len(self.values):
            merged[~new] = self.values
        self.values = merged

    def surprise(self, coarser: int = 1) -> Array:
        """[T]: how far half of the samples are from what the others predict; with `coarser=2` of every second sample."""
        values = self.values[::coarser]
        return numpy.abs(prediction(len(values)) @ values[::2] - values[1::2]).max(0)

    def rule_errors(self) -> Array:
        """[len(ORDERS), T]: the errors of the Gauss-Legendre rules for the derivative of the polynomial through the samples."""
        return numpy.abs(predicted_integrals(len(self.values)) @ self.values - (self.values[-1] - self.values[0]))


def _new(have: int, level: int) -> Array:
    """Which points of a level have no samples yet, where there are none, the two ends, or those of the level before."""
    new = numpy.ones(level, bool)
    if have:
        new[:: level - 1 if have == 2 else 2] = False
    return new


@functools.cache
def chebyshev_points(n: int) -> Array:
    """n points in [0, 1], both ends included, ascending."""
    return (1 - numpy.cos(numpy.pi * numpy.arange(n) / (n - 1))) / 2


@functools.cache
def gauss_rule(order: int) -> tuple[Array, Array]:
    nodes, weights = quadrature_rule("gauss_legendre", order)
    return numpy.array(nodes), numpy.array(weights)


def _coefficients(n: int) -> Array:
    """From samples at Chebyshev points to the Chebyshev coefficients of their polynomial."""
    return numpy.linalg.inv(numpy.polynomial.chebyshev.chebvander(2 * chebyshev_points(n) - 1, n - 1))


@functools.cache
def prediction(n: int) -> Array:
    """The matrix from every second of n samples to the values of their polynomial at the others."""
    m = (n + 1) // 2
    return numpy.polynomial.chebyshev.chebvander(2 * chebyshev_points(n)[1::2] - 1, m - 1) @ _coefficients(m)


@functools.cache
def predicted_integrals(n: int) -> Array:
    """[len(ORDERS), n]: what the Gauss-Legendre rules make of the derivative of the polynomial through n samples."""
    slopes = numpy.polynomial.chebyshev.chebder(_coefficients(n), scl=2)  # of each column; 2: from [-1, 1] to [0, 1]
    rules = [gauss_rule(order) for order in ORDERS]
    return numpy.stack([w @ numpy.polynomial.chebyshev.chebvander(2 * nodes - 1, n - 2) @ slopes for nodes, w in rules])


class Search:
    """Pieces of the path of each example, sampled until F is known everywhere.

    Args:
        sample: from points for each example to the values [n, T] there.
        examples: how many.
        max_steps: the largest number of nodes of an example; in the search it has `SAMPLES` times as many samples.
        floor: the error that rounding leaves, relative to the largest |F|.
    """

    def __init__(self, sample: Sample, examples: int, max_steps: int, floor: float):
        self.sample, self.max_steps, self.floor = sample, max_steps, floor
        self.pieces = [[Piece(0.0, 1.0)] for _ in range(examples)]
        self.used = [0] * examples
        self._run([[(piece, FIRST) for piece in each] for each in self.pieces])

    def nodes(self, tolerance: float) -> list[tuple[Array, Array]]:
        """Nodes and weights for each example, at a tolerance relative to the true value of the integral."""
        self._refine_all(tolerance)
        # Samples are cheap, gradients at the wrong nodes are not: where F is smooth, the samples are confirmed by as many more.
        smooth = [self._unconfirmed(e, tolerance) for e in range(len(self.pieces))]
        if any(smooth):
            self._run(smooth)
            self._refine_all(tolerance)
        return [_gauss_nodes(each, _allowed(each, tolerance, self.floor), self.max_steps) for each in self.pieces]

    def _unconfirmed(self, example: int, tolerance: float) -> list[tuple[Piece, int]]:
        pieces = self.pieces[example]
        allowed = _allowed(pieces, tolerance, self.floor)
        smooth = [p for p in pieces if FIRST <= len(p.values) < LEVELS[-1] and _share(p.surprise(), allowed) > MARGIN / 25]
        cost = sum(len(piece.values) - 1 for piece in smooth)
        return [(p, 2 * len(p.values) - 1) for p in smooth] if self.used[example] + cost <= SAMPLES * self.max_steps else []

    def _refine_all(self, tolerance: float) -> None:
        while any(pending := [self._refine(e, tolerance) for e in range(len(self.pieces))]):
            self._run(pending)

    def look_closer(self, examples: Sequence[int]) -> None:
        """Samples every piece of some examples at more points, for an error that the present samples do not show."""
        pending: list[list[tuple[Piece, int]]] = [[] for _ in self.pieces]
        for e in examples:
            closer = [_closer(piece, len(piece.values) < LEVELS[-1]) for piece in self.pieces[e]]
            self.pieces[e] = [piece for parts in closer for piece, _ in parts]
            pending[e] = [part for parts in closer for part in parts]
        self._run(pending)

    def _run(self, pending: list[list[tuple[Piece, int]]]) -> None:
        """Samples pieces at their levels."""
        wanted = [[(piece, level, piece.new_points(level)) for piece, level in each] for each in pending]
        points = [numpy.concatenate([new for *_, new in each]) if each else numpy.empty(0) for each in wanted]
        for e, values in enumerate(self.sample(points)):
            self.used[e] += len(points[e])
            stop = 0
            for piece, level, new in wanted[e]:
                start, stop = stop, stop + len(new)
                piece.insert(level, values[start:stop])

    def _refine(self, example: int, tolerance: float) -> list[tuple[Piece, int]]:
        """Cuts the worst pieces of an example; returns which need how many samples."""
        pieces = self.pieces[example]
        allowed = _allowed(pieces, tolerance, self.floor)
        fine, coarse = (_share(numpy.stack([p.surprise(step) for p in pieces]), allowed) for step in (1, 2))
        # All samples together predict better than half of them did, by as much as half did than a quarter.
        errors = fine * numpy.minimum(1, fine / (coarse + 1e-30))
        budget = SAMPLES * self.max_steps - self.used[example]
        open_error = errors.sum()
        closer: dict[int, list[tuple[Piece, int]]] = {}
        # The largest errors first, until what the others leave is half of what is allowed.
        for i in numpy.argsort(-errors) if open_error > MARGIN else ():
            piece, n = pieces[i], len(pieces[i].values)
            raised = n < LEVELS[-1] and fine[i] < coarse[i] / 3
            cost = n - 1 if raised else 2 * (LEVELS[0] - 2)
            if cost > budget or open_error <= MARGIN / 2:
                break
            if piece.end - piece.start > 1e-12:
                closer[i] = _closer(piece, raised)
                budget -= cost
            open_error -= errors[i]
        self.pieces[example] = [p for i, piece in enumerate(pieces) for p, _ in closer.get(i, [(piece, 0)])]
        return [part for parts in closer.values() for part in parts]


def _share(errors: Array, allowed: Array) -> Array:
    """The largest of errors [..., T] as a share of what is allowed; where the model gave no finite number, a huge one."""
    largest = (errors / allowed).max(-1)
    return numpy.where(numpy.isfinite(largest), largest, 1e30)


def _allowed(pieces: list[Piece], tolerance: float, floor: float) -> Array:
    """[T]: the error that is allowed in total."""
    largest = numpy.max([numpy.abs(piece.values).max(0) for piece in pieces], 0)
    true = numpy.abs(pieces[-1].values[-1] - pieces[0].values[0])
    return numpy.maximum(tolerance * true, floor * largest) + numpy.finfo(float).tiny


def _closer(piece: Piece, raised: bool) -> list[tuple[Piece, int]]:
    """The piece at the next level, or its halves at the first one."""
    n = len(piece.values)
    if raised:
        return [(piece, 2 * n - 1)]
    middle = (piece.start + piece.end) / 2
    return [
        (Piece(start, end, piece.values[[i, j]]), LEVELS[0])
        for start, end, i, j in ((piece.start, middle, 0, n // 2), (middle, piece.end, n // 2, -1))
    ]


def _gauss_nodes(pieces: list[Piece], allowed: Array, most: int) -> tuple[Array, Array]:
    """The nodes of Gauss-Legendre rules on the pieces, with as few nodes as the errors allow."""
    # errors[i, k] of piece i with order k. A rule may be right by chance, so the next one has to be as good.
    errors = _share(numpy.stack([piece.rule_errors() for piece in pieces]), allowed)
    errors[:, :-1] = numpy.maximum(errors[:, :-1], errors[:, 1:])
    # More nodes than samples follow the polynomial between them, which is not known to be the function.
    last = numpy.array([sum(order < len(piece.values) for order in ORDERS) - 1 for piece in pieces])
    chosen = numpy.zeros(len(pieces), int)
    rows = numpy.arange(len(pieces))
    while (left := errors[rows, chosen]).sum() > MARGIN and sum(ORDERS[k] for k in chosen) < most:
        open_rows = numpy.where(chosen < last, left, -1.0)
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
    """Samples F for all examples at once; those that need fewer points than others repeat some.

    Args:
        scores: from alpha, Tensor [*batch], to the target values [*B, T].
        batch: [*B] where every example has points of its own, [] where they share them.
        dtype: of alpha.
        device: of alpha.
        chunk_size: how many points run at once.
    """

    def sample(points: list[Array]) -> list[Array]:
        longest = max(len(p) for p in points)
        padded = numpy.stack([numpy.append(p, numpy.full(longest - len(p), 0.5)) for p in points], 1)
        alphas = torch.tensor(padded, dtype=dtype, device=device).reshape(longest, *batch)
        with torch.no_grad():
            parts = [vmap(scores, randomness="different")(alphas[chunk]) for chunk in chunks(longest, chunk_size)]
        values = torch.cat(parts).double().cpu()  # [S, *B, T]
        if not batch:
            return [values.reshape(longest, -1).numpy()]
        return [v[: len(p)] for v, p in zip(values.reshape(longest, -1, values.shape[-1]).movedim(1, 0).numpy(), points)]

    return sample
