"""Matrices of one set of names against another: the similarity of all pairs of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

from ..core.errors import InputError
from .canvas import as_array, new_figure
from .colors import color_range
from .sites import _abbreviated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NUMBERS = 12  # rows or columns whose cells have their number written in


def matrix_map(
    matrix: Any,
    rows: Sequence[Any],
    columns: Sequence[Any],
    *,
    title: str = "",
    label: str = "",
    row_label: str = "",
    column_label: str = "",
    limits: tuple[float, float] | None = None,
    percentile: float = 100.0,
    colors: str | None = None,
) -> Figure:
    """Draws a matrix, such as a `tdhook.latent.Comparison`: rows from bottom (first) to top, columns from left to right.

    Names that differ in one component, such as `model.layers.0` to `model.layers.29`, are labelled with that component, and the
    axis with the pattern `model.layers.*`. Small matrices have their numbers written in.

    Args:
        matrix: array or tensor [S1, S2]. NaN, where a measure has no value, is left grey.
        rows: S1 names.
        columns: S2 names.
        title: text above the map.
        label: what the values are, beside the colour bar.
        row_label: what the rows are, before their pattern.
        column_label: what the columns are.
        limits: lowest and highest value of the colours; None: from zero where nothing is negative, else symmetric around it.
        percentile: of the magnitudes, where that range ends; 100 for the largest.
        colors: name of a colour map of matplotlib; None for diverging colours where the limits have both signs, else a
            sequential one.

    Returns:
        A figure with two axes: the map and its colour bar.

    Raises:
        InputError: a matrix of another shape than its names, infinity or nothing but NaN, limits that are not ascending, a bad
            percentile.
        ImportError: matplotlib is not installed.

    Examples:
        >>> import torch
        >>> figure = matrix_map(torch.eye(2), ["h.0.mlp", "h.1.mlp"], ["h.0.mlp", "h.1.mlp"], label="CKA")
        >>> figure.axes[0].get_ylabel(), figure.axes[1].get_ylabel()
        ('h.*.mlp', 'CKA')
    """
    array = as_array("matrix", matrix, missing=True).astype(float)
    rows, columns = list(rows), list(columns)
    if array.shape != (len(rows), len(columns)) or not array.size:
        raise InputError(
            f"matrix has shape {list(array.shape)}, there are {len(rows)} rows and {len(columns)} columns; give [S1, S2]."
        )
    finite = array[numpy.isfinite(array)]
    look = color_range(
        finite,
        percentile=percentile,
        limits=limits,
        diverging=colors or "RdBu_r",
        sequential=colors or "viridis",
        from_zero=True,
    )
    cell = 0.42 if max(array.shape) <= MOST_NUMBERS else 0.19
    side = [min(max(cell * length, 2.2), 12.0) for length in array.shape]
    figure = new_figure(side[1] + 1.9, side[0] + 1.1)
    axes = figure.add_subplot()
    axes.set_facecolor("0.8")
    drawn = axes.imshow(
        numpy.ma.masked_invalid(array),
        vmin=look.low,
        vmax=look.high,
        cmap=look.colors,
        origin="lower",
        interpolation="nearest",
    )
    _label(axes, "y", rows, row_label)
    _label(axes, "x", columns, column_label)
    if max(array.shape) <= MOST_NUMBERS:
        _write(axes, array, drawn)
    axes.set_title(title, parse_math=False)
    figure.colorbar(drawn, ax=axes, label=label, extend=look.extend)
    return figure


def _label(axes: Axes, side: str, names: list[Any], name: str) -> None:
    pattern, labels = _abbreviated([str(each) for each in names])
    step = -(-len(labels) // 32)
    places = range(0, len(labels), step)
    short = max(map(len, labels)) <= 3
    if side == "x":
        axes.set_xticks(places, labels[::step], rotation=0 if short else 60, ha="center" if short else "right")
    else:
        axes.set_yticks(places, labels[::step])
    for text in axes.get_xticklabels() if side == "x" else axes.get_yticklabels():
        text.set_rotation_mode("anchor" if not short and side == "x" else "default")
        text.set_parse_math(False)
    words = f"{name}: {pattern}" if name and pattern != "site" else name or pattern
    (axes.set_xlabel if side == "x" else axes.set_ylabel)(words, parse_math=False)


def _write(axes: Axes, array: numpy.ndarray, drawn: Any) -> None:
    """The numbers in the cells, black on light colours and white on dark ones."""
    for (i, j), value in numpy.ndenumerate(array):
        if numpy.isfinite(value):
            red, green, blue, _ = drawn.to_rgba(value)
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
