"""Attributions as heat maps over the photograph that they explain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

from ..core.errors import InputError
from .canvas import as_array, as_texts, new_figure, wrapped
from .colors import color_range
from .overlays import draw_bar, draw_overlay, draw_photograph, maps_of, pixels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = 3.2  # inches


def heat_map_over_image(
    image: Any,
    attribution: Any,
    *,
    title: str = "",
    percentile: float = 99.0,
    smoothing: float = 0.0,
    colors: str = "RdBu_r",
    positive_colors: str | None = "YlOrRd",
) -> Figure:
    """Draws an attribution over a grey version of the photograph: red where it is positive, blue where it is negative.

    Channels are summed with their signs. The colour range is symmetric around zero and reaches to a percentile of the
    magnitudes, so that a few extreme pixels do not bleach all others. A map without negative values (GradCAM, magnitudes
    of gradients) gets sequential colours that begin at zero. What is near zero is transparent.

    Args:
        image: array or tensor [H, W, 3], [3, H, W] or [H, W]: bytes, or floats between 0 and 1.
        attribution: array or tensor [1, C, H, W], [C, H, W] or [H, W]; a coarser grid [..., h, w] of the same proportions is
            enlarged bilinearly.
        title: text above the picture.
        percentile: of the magnitudes, where the colour range ends; 100 for the largest.
        smoothing: standard deviation, in pixels, of a Gaussian that the map is smoothed with; 0 for none. A map that was
            enlarged is smooth already.
        colors: name of a diverging colour map of matplotlib.
        positive_colors: name of a sequential one, for a map without negative values; None for the diverging one there too.

    Returns:
        A figure with two axes: the picture and its colour bar.

    Raises:
        InputError: shapes that do not fit each other, NaN, an image out of range, a bad percentile or smoothing.
        ImportError: matplotlib is not installed.

    Examples:
        >>> import torch
        >>> figure = heat_map_over_image(torch.rand(8, 8, 3), torch.randn(1, 3, 8, 8), title="cat")
        >>> figure.axes[0].get_title(), len(figure.axes)
        ('cat', 2)
    """
    attributions = as_array("attribution", attribution)[None]
    look = dict(percentile=percentile, diverging=colors, sequential=positive_colors)
    return _pictures(image, attributions, "attribution", [title], 1, smoothing, look, photograph=False)


def heat_maps_over_image(
    image: Any,
    attributions: Any,
    *,
    titles: Sequence[str] | None = None,
    columns: int = 3,
    percentile: float = 99.0,
    smoothing: float = 0.0,
    colors: str = "RdBu_r",
    positive_colors: str | None = "YlOrRd",
) -> Figure:
    """Draws the attributions of several targets side by side, after the photograph, with one colour range for all.

    Args:
        image: array or tensor [H, W, 3], [3, H, W] or [H, W]: bytes, or floats between 0 and 1.
        attributions: array or tensor [T, 1, C, H, W], [T, C, H, W] or [T, H, W]; a coarser grid [..., h, w] of the same
            proportions is enlarged bilinearly.
        titles: T texts, one above each map.
        columns: pictures in a row.
        percentile: of all magnitudes, where the colour range ends; 100 for the largest.
        smoothing: standard deviation, in pixels, of a Gaussian that the maps are smoothed with; 0 for none. Maps that were
            enlarged are smooth already.
        colors: name of a diverging colour map of matplotlib.
        positive_colors: name of a sequential one, for maps without negative values; None for the diverging one there too.

    Returns:
        A figure with T + 2 axes: the photograph, T maps, and the colour bar.

    Raises:
        InputError: shapes that do not fit each other, another number of titles, NaN, an image out of range, a bad
            percentile, smoothing or number of columns.
        ImportError: matplotlib is not installed.

    Examples:
        >>> import torch
        >>> figure = heat_maps_over_image(torch.rand(8, 8, 3), torch.randn(2, 3, 8, 8), titles=["cat", "dog"])
        >>> list(axes.get_title() for axes in figure.axes[:3])
        ['photograph', 'cat', 'dog']
    """
    array = as_array("attributions", attributions)
    count = len(array) if array.ndim else 0
    titles = [""] * count if titles is None else as_texts("titles", titles)
    if len(titles) != count or not count:
        raise InputError(
            f"attributions of shape {list(array.shape)} hold {count} targets, titles {len(titles)}; give one each."
        )
    if columns < 1:
        raise InputError(f"columns is at least 1, got {columns!r}.")
    look = dict(percentile=percentile, diverging=colors, sequential=positive_colors)
    return _pictures(image, array, "attributions", titles, columns, smoothing, look, photograph=True)


def _pictures(
    image: Any,
    attributions: numpy.ndarray,
    name: str,
    titles: Sequence[str],
    columns: int,
    smoothing: float,
    look: dict[str, Any],
    photograph: bool,
) -> Figure:
    pixels = pixels_of(image)
    maps = maps_of(name, attributions, pixels, smoothing)
    colors = color_range(maps, **look, from_zero=True)

    count = len(maps) + photograph
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    height, width = pixels.shape[:2]
    titles = [wrapped(title, PANEL) for title in titles]
    lines = max(title.count("\n") for title in titles) + 1
    figure = new_figure(PANEL * columns + 0.9, PANEL * rows * height / width + (0.1 + 0.2 * lines) * rows)
    places = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    if photograph:
        draw_photograph(places[0], pixels)
    for axes, values, title in zip(places[photograph:], maps, titles):
        draw_overlay(axes, pixels, values, colors)
        axes.set_title(title, parse_math=False)
    draw_bar(figure, colors, "attribution (sum over channels)", ax=places)
    return figure
