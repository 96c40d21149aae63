"""Attributions as heat maps over the photograph that they explain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from ..core.errors import InputError
from .canvas import as_array, new_figure, require_percentile, symmetric_limit

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
) -> Figure:
    """Draws an attribution over a grey version of the photograph: red where it is positive, blue where it is negative.

    Channels are summed with their signs. The colour range is symmetric around zero and reaches to a percentile of the
    magnitudes, so that a few extreme pixels do not bleach all others. What is near zero is transparent.

    Args:
        image: array or tensor [H, W, 3], [3, H, W] or [H, W]: bytes, or floats between 0 and 1.
        attribution: array or tensor [1, C, H, W], [C, H, W] or [H, W].
        title: text above the picture.
        percentile: of the magnitudes, where the colour range ends; 100 for the largest.
        smoothing: standard deviation, in pixels, of a Gaussian that the map is smoothed with; 0 for none.
        colors: name of a diverging colour map of matplotlib.

    Returns:
        A figure with two axes: the picture and its colour bar.

    Raises:
        InputError: shapes that do not fit each other, NaN, an image out of range, a bad percentile or smoothing.
        ImportError: matplotlib is not installed.

    Examples:
        >>> figure = heat_map_over_image(torch.rand(8, 8, 3), torch.randn(1, 3, 8, 8), title="cat")
        >>> figure.axes[0].get_title(), len(figure.axes)
        ('cat', 2)
    """
    attributions = as_array("attribution", attribution)[None]
    return _pictures(image, attributions, "attribution", [title], 1, percentile, smoothing, colors, photograph=False)


def heat_maps_over_image(
    image: Any,
    attributions: Any,
    *,
    titles: Sequence[str] | None = None,
    columns: int = 3,
    percentile: float = 99.0,
    smoothing: float = 0.0,
    colors: str = "RdBu_r",
) -> Figure:
    """Draws the attributions of several targets side by side, after the photograph, with one colour range for all.

    Args:
        image: array or tensor [H, W, 3], [3, H, W] or [H, W]: bytes, or floats between 0 and 1.
        attributions: array or tensor [T, 1, C, H, W], [T, C, H, W] or [T, H, W].
        titles: T texts, one above each map.
        columns: pictures in a row.
        percentile: of all magnitudes, where the colour range ends; 100 for the largest.
        smoothing: standard deviation, in pixels, of a Gaussian that the maps are smoothed with; 0 for none.
        colors: name of a diverging colour map of matplotlib.

    Returns:
        A figure with T + 2 axes: the photograph, T maps, and the colour bar.

    Raises:
        InputError: shapes that do not fit each other, another number of titles, NaN, an image out of range, a bad
            percentile, smoothing or number of columns.
        ImportError: matplotlib is not installed.

    Examples:
        >>> figure = heat_maps_over_image(torch.rand(8, 8, 3), torch.randn(2, 3, 8, 8), titles=["cat", "dog"])
        >>> list(axes.get_title() for axes in figure.axes[:3])
        ['photograph', 'cat', 'dog']
    """
    array = as_array("attributions", attributions)
    count = len(array) if array.ndim else 0
    titles = [""] * count if titles is None else list(titles)
    if len(titles) != count or not count:
        raise InputError(
            f"attributions of shape {list(array.shape)} hold {count} targets, titles {len(titles)}; give one each."
        )
    if columns < 1:
        raise InputError(f"columns is at least 1, got {columns!r}.")
    return _pictures(image, array, "attributions", titles, columns, percentile, smoothing, colors, photograph=True)


def _pictures(
    image: Any,
    attributions: numpy.ndarray,
    name: str,
    titles: Sequence[str],
    columns: int,
    percentile: float,
    smoothing: float,
    colors: str,
    photograph: bool,
) -> Figure:
    require_percentile(percentile)
    if smoothing < 0:
        raise InputError(f"smoothing is 0 or more pixels, got {smoothing!r}.")
    pixels = _pixels(image)
    maps = _maps(name, attributions, pixels.shape[:2])
    maps = _smoothed(maps, smoothing) if smoothing else maps
    limit = symmetric_limit(maps, percentile)
    grey = pixels.mean(-1) if pixels.ndim == 3 else pixels

    count = len(maps) + photograph
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    height, width = grey.shape
    figure = new_figure(PANEL * columns + 0.9, PANEL * rows * height / width + 0.3 * rows)
    places = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    if photograph:
        places[0].imshow(pixels, cmap="gray", vmin=0, vmax=1)
        places[0].set_title("photograph")
    drawn = None
    for axes, values, title in zip(places[photograph:], maps, titles):
        # washed out, so that dark fur is not taken for blue
        axes.imshow(0.35 + 0.65 * grey, cmap="gray", vmin=0, vmax=1)
        opacity = numpy.clip(numpy.abs(values) / limit, 0, 1) ** 0.5
        drawn = axes.imshow(values, cmap=colors, vmin=-limit, vmax=limit, alpha=opacity)
        axes.set_title(title, parse_math=False)
    for axes in places:
        axes.set_xticks([])
        axes.set_yticks([])
    from matplotlib.cm import ScalarMappable

    # of its own mappable: the bar of a picture with opacities would be transparent too
    bar = ScalarMappable(norm=drawn.norm, cmap=colors)  # type: ignore[union-attr]
    figure.colorbar(bar, ax=places, label="attribution (sum over channels)", extend="both" if percentile < 100 else "neither")
    return figure


def _pixels(image: Any) -> numpy.ndarray:
    """An image as floats in 0..1, [H, W, 3] or [H, W]."""
    pixels = as_array("image", image)
    if pixels.ndim == 3 and pixels.shape[-1] != 3 and pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)) or not pixels.size:
        raise InputError(f"image has shape {list(pixels.shape)}; give [H, W, 3], [3, H, W] or [H, W].")
    if pixels.dtype == numpy.uint8:
        return pixels / 255.0
    if pixels.min() < 0 or pixels.max() > 1:
        raise InputError(
            f"image holds values from {pixels.min():.3g} to {pixels.max():.3g}; give bytes, or floats between 0 and 1 "
            "(the photograph, not the normalised input of the model)."
        )
    return pixels.astype(float)


def _maps(name: str, attributions: numpy.ndarray, size: tuple[int, ...]) -> numpy.ndarray:
    """One signed map [T, H, W] for each target."""
    shape = attributions.shape[1:]
    if len(shape) == 4 and shape[0] == 1:
        attributions = attributions[:, 0]
    if attributions.ndim not in (3, 4) or attributions.shape[-2:] != size:
        each = list(shape) if name == "attribution" else list(attributions.shape)
        lead = "" if name == "attribution" else "T, "
        height, width = size
        raise InputError(
            f"{name} has shape {each}, the image {height} x {width} pixels; give [{lead}1, C, {height}, {width}], "
            f"[{lead}C, {height}, {width}] or [{lead}{height}, {width}]."
        )
    return (attributions.sum(1) if attributions.ndim == 4 else attributions).astype(float)


def _smoothed(maps: numpy.ndarray, deviation: float) -> numpy.ndarray:
    """Maps [T, H, W] convolved with a Gaussian; zero outside of the image."""
    reach = math.ceil(3 * deviation)
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / deviation) ** 2)
    bell = bell / bell.sum()
    smooth: Tensor = torch.from_numpy(maps)[:, None]
    smooth = torch.nn.functional.conv2d(smooth, bell[None, None, :, None], padding=(reach, 0))
    smooth = torch.nn.functional.conv2d(smooth, bell[None, None, None, :], padding=(0, reach))
    return smooth[:, 0].numpy()
