"""All pairs of representations in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ...core.batching import chunks
from ...core.checks import require_positive
from ...core.errors import InputError
from ...core.structure import describe
from .canonical import cca, cca_measure, pwcca, pwcca_measure, svcca, svcca_measure
from .cka import cka, linear_measure, rbf_cka, rbf_measure
from .neighbourhoods import imbalance_measure, information_imbalance, mutual_knn, mutual_knn_measure
from .procrustes import procrustes, procrustes_distance, procrustes_distance_measure, procrustes_measure
from .rsa import rsa, rsa_measure
from .samples import Measure, in_column, together, unstacked

MEASURES: dict[Callable, Callable[..., Measure]] = {
    cka: linear_measure,
    rbf_cka: rbf_measure,
    cca: cca_measure,
    svcca: svcca_measure,
    pwcca: pwcca_measure,
    procrustes: procrustes_measure,
    procrustes_distance: procrustes_distance_measure,
    rsa: rsa_measure,
    information_imbalance: imbalance_measure,
    mutual_knn: mutual_knn_measure,
}


class Comparison(NamedTuple):
    """A measure of all pairs of representations.

    Attributes:
        matrix: Tensor [S1, S2, *lead].
        rows: S1 names.
        columns: S2 names.
    """

    matrix: Tensor
    rows: tuple[str, ...]
    columns: tuple[str, ...]


def compare(
    measure: Callable[[Tensor, Tensor], Tensor],
    xs: Mapping[str, Tensor] | TensorDictBase,
    ys: Mapping[str, Tensor] | TensorDictBase | None = None,
    *,
    symmetric: bool = False,
    chunk_size: int | None = None,
) -> Comparison:
    """Compares every representation with every other, of one model or of two.

        matrix[i, j] = measure(xs[i], ys[j])

    What depends on one representation (its Gram matrix, its decomposition, its neighbours) is computed once for all of its
    pairs, under one vmap for representations of the same width, and a symmetric measure once for each pair.
    `tdhook.plotting.matrix_map(*comparison)` draws the result.

    Args:
        measure: a function of this package, or `partial` of it with options: `partial(cka, debiased=True)`; or any pure
            function of two tensors [*lead, N, D1] and [*lead, N, D2].
        xs: representations [*lead, N, D_s] by name, such as what `capture` returns, reduced to one row per example.
        ys: the others, of the same examples; None: `xs` themselves.
        symmetric: for a function of your own: whether the order of its arguments changes nothing. Known of those of this
            package.
        chunk_size: how many representations of each side are prepared at once; None for all. It bounds memory and does not
            change the result; with less than all, what is prepared for the columns is prepared again for each chunk of rows.
            Linear `cka` needs none: it prepares no more than centred copies, and strips.

    Returns:
        Comparison: the matrix, and the names of its rows and columns. Names of nested representations are joined by dots.

    Raises:
        InputError: nothing to compare, representations of other examples, and whatever the measure raises.

    Cost: S1 + S2 preparations and S1 * S2 comparisons; half of those for a symmetric measure of `xs` with themselves.

    Examples:
        >>> x = torch.randn(100, 8)
        >>> layers = {"h.0": x, "h.1": x @ torch.randn(8, 3), "h.2": torch.randn(100, 8)}
        >>> found = compare(cka, layers)
        >>> found.matrix.shape, found.rows, torch.allclose(found.matrix[0, 2], cka(x, layers["h.2"]))
        (torch.Size([3, 3]), ('h.0', 'h.1', 'h.2'), True)
        >>> compare(partial(information_imbalance, k=5), layers, {"x": x}).matrix.shape
        torch.Size([3, 1])
    """
    require_positive("chunk_size", chunk_size, optional=True)
    known = _known(measure, symmetric)
    first = named("xs", xs)
    second = None if ys is None else named("ys", ys)
    known.check({**_labelled("xs", first), **({} if second is None else _labelled("ys", second))})
    rows, columns = tuple(first), tuple(first if second is None else second)
    tensors = together([*first.values(), *(second or {}).values()])
    left, right = tensors[: len(rows)], None if second is None else tensors[len(rows) :]
    matrix = known.matrix(left, right) if known.matrix is not None else _blocks(known, left, right, chunk_size)
    return Comparison(matrix, rows, columns)


def _known(measure: Any, symmetric: bool) -> Measure:
    """The parts of a measure; of a function that is not known, the whole."""
    function: Any = measure
    options: dict[str, Any] = {}
    while isinstance(function, partial) and not function.args:
        function, options = function.func, {**function.keywords, **options}
    for known, parts in MEASURES.items():
        if known is function:
            return parts(**options)
    if not callable(measure):
        raise InputError(f"measure is {describe(measure)}; give a function of two representations, such as cka.")
    return Measure(lambda x: x, measure, symmetric=symmetric)


def named(name: str, given: Any) -> dict[str, Tensor]:
    """Representations by name; those of a nested TensorDict by the path to them. Raises `InputError` for none."""
    if isinstance(given, TensorDictBase):
        pairs = given.items(include_nested=True, leaves_only=True)
        found: dict[str, Any] = {".".join(key) if isinstance(key, tuple) else key: value for key, value in pairs}
    elif isinstance(given, Mapping):
        found = {str(key): value for key, value in given.items()}
    else:
        raise InputError(f"{name} is {describe(given)}; give a mapping or a TensorDict from names to representations.")
    if not found:
        raise InputError(f"{name} is empty; give at least one representation.")
    return found


def _labelled(name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}[{key!r}]": value for key, value in found.items()}


def _blocks(measure: Measure, xs: list[Tensor], ys: list[Tensor] | None, chunk_size: int | None) -> Tensor:
    """The matrix, by blocks of representations that are prepared at once."""
    once = ys is None and measure.symmetric
    others = xs if ys is None else ys
    found: dict[tuple[int, int], Tensor] = {}
    for down in chunks(len(xs), chunk_size):
        left = _prepared(measure, xs[down])
        for across in chunks(len(others), chunk_size):
            if once and across.start < down.start:
                continue
            same = ys is None and across == down
            right = left if same else _prepared(measure, others[across])
            for j, column in enumerate(right, start=across.start):
                some = left[: j + 1 - down.start] if once and same else left
                for i, value in enumerate(_in_groups(measure, some, column), start=down.start):
                    found[i, j] = value
                    if once:
                        found[j, i] = value
    return torch.stack([torch.stack([found[i, j] for j in range(len(others))]) for i in range(len(xs))])


def _prepared(measure: Measure, xs: list[Tensor]) -> list[Any]:
    """Every one prepared; those of the same width in one call."""
    result: list[Any] = [None] * len(xs)
    for group in _alike([x.shape for x in xs]):
        for i, value in zip(group, unstacked(measure.prepare(torch.stack([xs[i] for i in group])))):
            result[i] = value
    return result


def _in_groups(measure: Measure, left: list[Any], right: Any) -> list[Tensor]:
    """Several that are prepared, compared with another one; those of the same shapes in one call."""
    result: list[Any] = [None] * len(left)
    for group in _alike([p.shape if isinstance(p, Tensor) else tuple(part.shape for part in p) for p in left]):
        values = in_column(measure, [left[i] for i in group], right)
        for i, value in zip(group, values):
            result[i] = value
    return result


def _alike(shapes: list[Any]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for i, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(i)
    return list(groups.values())
