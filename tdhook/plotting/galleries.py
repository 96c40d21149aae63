"""Attributions of several methods for several targets, as a grid of heat maps over one photograph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from .canvas import as_array, as_texts, new_figure, wrapped
from .colors import color_range
from .overlays import draw_bar, draw_overlay, draw_photograph, maps_of, pixels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = 2.4  # inches


def heat_map_gallery(
    image: Any,
    methods: Mapping[str, Any],
    *,
    titles: Sequence[str] | None = None,
    title: str = "",
    photograph: bool = True,
    percentile: float = 99.0,
    smoothing: float = 0.0,
    colors: str = "RdBu_r",
    positive_colors: str | None = "YlOrRd",
) -> Figure:
    """Draws a row of heat maps for each method and a column for each target, over a grey version of the photograph.

    Methods have different units, so each row has a colour range and a colour bar of its own, which its targets share. A row
    without negative values (GradCAM, magnitudes of gradients) gets sequential colours that begin at zero, any other row
    diverging ones that are symmetric around zero. What is near zero is transparent.

    Args:
        image: array or tensor [H, W, 3], [3, H, W] or [H, W]: bytes, or floats between 0 and 1.
        methods: for each name of a method its attributions, array or tensor [T, 1, C, H, W], [T, C, H, W] or [T, H, W], with
            the same T for all; a coarser grid [..., h, w] of the same proportions is enlarged bilinearly.
        titles: T texts, one above each column.
        title: text above all.
        photograph: whether the photograph itself is shown, in a column of its own.
        percentile: of the magnitudes of a row, where its colour range ends; 100 for the largest.
        smoothing: standard deviation, in pixels, of a Gaussian that maps are smoothed with; 0 for none. Maps that were
            enlarged are smooth already.
        colors: name of a diverging colour map of matplotlib.
        positive_colors: name of a sequential one, for rows without negative values; None for the diverging one there too.

    Returns:
        A figure. Its axes: the photograph (if shown), then the maps row by row, then one colour bar for each row.

    Raises:
        InputError: no method, shapes that do not fit the image, each other or the titles, NaN, an image out of range, a bad
            percentile or smoothing.
        ImportError: matplotlib is not installed.

    Examples:
        >>> import torch
        >>> methods = {"saliency": torch.rand(2, 3, 8, 8), "GradCAM": torch.rand(2, 1, 2, 2)}
        >>> figure = heat_map_gallery(torch.rand(8, 8, 3), methods, titles=["cat", "dog"])
        >>> [axes.get_ylabel() for axes in figure.axes[1:5:2]], len(figure.axes)
        (['saliency', 'GradCAM'], 7)
    """
    if not methods:
        raise InputError("methods is empty; give at least one.")
    pixels = pixels_of(image)
    arrays = {name: as_array(f"methods[{name!r}]", values) for name, values in methods.items()}
    rows = {name: maps_of(f"methods[{name!r}]", array, pixels, smoothing) for name, array in arrays.items()}
    counts = {name: len(maps) for name, maps in rows.items()}
    targets = next(iter(counts.values()))
    above = [""] * targets if titles is None else as_texts("titles", titles)
    if set(counts.values()) != {len(above)}:
        found = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise InputError(f"methods hold different numbers of targets ({found}), titles {len(above)}; give one each.")
    looks = {
        name: color_range(maps, percentile=percentile, diverging=colors, sequential=positive_colors, from_zero=True)
        for name, maps in rows.items()
    }

    above = [wrapped(text, PANEL) for text in above]
    lines = max(text.count("\n") for text in above) + 1
    height, width = pixels.shape[:2]
    panel = PANEL * height / width
    figure = new_figure(PANEL * (targets + photograph) + 1.4, (panel + 0.04) * len(rows) + 0.25 * lines + 0.4 * bool(title))
    # the bars in a column of their own: beside their rows they would stand at different distances
    grid = figure.add_gridspec(len(rows), targets + photograph + 1, width_ratios=[1] * (targets + photograph) + [0.05])
    if photograph:
        draw_photograph(figure.add_subplot(grid[:, 0]), pixels)
    places = [[figure.add_subplot(grid[i, j + photograph]) for j in range(targets)] for i in range(len(rows))]
    for axes, text in zip(places[0], above):
        axes.set_title(text, parse_math=False)
    for row, (name, maps) in zip(places, rows.items()):
        for axes, values in zip(row, maps):
            draw_overlay(axes, pixels, values, looks[name])
        row[0].set_ylabel(wrapped(name, panel), parse_math=False, fontsize="large")
    for i, look in enumerate(looks.values()):
        bar = figure.add_subplot(grid[i, -1])
        draw_bar(figure, look, cax=bar)
        bar.ticklabel_format(scilimits=(-3, 4))
    if title:
        figure.suptitle(title, parse_math=False, fontsize="x-large")
    return figure
