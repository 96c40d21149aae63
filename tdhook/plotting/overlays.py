"""The parts of a heat map over a photograph: pixels, maps of their size, and the two drawn over each other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from ..core.errors import InputError
from .canvas import as_array
from .colors import ColorRange

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pixels_of(image: Any) -> numpy.ndarray:
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


def maps_of(name: str, attributions: numpy.ndarray, pixels: numpy.ndarray, smoothing: float) -> numpy.ndarray:
    """One map [T, H, W] for each target: summed over channels with its signs, then smoothed, or enlarged to the image."""
    if smoothing < 0:
        raise InputError(f"smoothing is 0 or more pixels, got {smoothing!r}.")
    shape = attributions.shape[1:]
    height, width = size = pixels.shape[:2]
    if len(shape) == 4 and shape[0] == 1:
        attributions = attributions[:, 0]
    if attributions.ndim not in (3, 4) or not attributions.size or not _covers(attributions.shape[-2:], size):
        each = list(shape) if name == "attribution" else list(attributions.shape)
        lead = "" if name == "attribution" else "T, "
        raise InputError(
            f"{name} has shape {each}, the image {height} x {width} pixels; give [{lead}1, C, {height}, {width}], "
            f"[{lead}C, {height}, {width}] or [{lead}{height}, {width}], or a coarser grid of the same proportions."
        )
    maps = (attributions.sum(1) if attributions.ndim == 4 else attributions).astype(float)
    if maps.shape[1:] != size:
        coarse = torch.from_numpy(maps)[:, None]
        return functional.interpolate(coarse, size, mode="bilinear", align_corners=False)[:, 0].numpy()
    return _smoothed(maps, smoothing) if smoothing else maps


def draw_overlay(axes: Axes, pixels: numpy.ndarray, values: numpy.ndarray, look: ColorRange) -> None:
    """Draws a map [H, W] over a grey version of the photograph; what is near zero is transparent."""
    grey = pixels.mean(-1) if pixels.ndim == 3 else pixels
    # washed out, so that dark fur is not taken for blue
    axes.imshow(0.35 + 0.65 * grey, cmap="gray", vmin=0, vmax=1)
    opacity = numpy.clip(numpy.abs(values) / look.high, 0, 1) ** 0.5
    axes.imshow(values, cmap=look.colors, vmin=look.low, vmax=look.high, alpha=opacity)
    without_ticks(axes)


def draw_photograph(axes: Axes, pixels: numpy.ndarray) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    axes.set_title("photograph")
    without_ticks(axes)


def draw_bar(figure: Figure, look: ColorRange, label: str = "", **where: Any) -> None:
    """Draws a colour bar, beside the axes `ax` or in the axes `cax`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    # of its own mappable: the bar of a picture with opacities would be transparent too
    mappable = ScalarMappable(norm=Normalize(look.low, look.high), cmap=look.colors)
    figure.colorbar(mappable, label=label, extend=look.extend, **where)


def without_ticks(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _covers(grid: tuple[int, ...], size: tuple[int, ...]) -> bool:
    """Whether a grid is the image's own, or a coarser one of its proportions, give or take a cell."""
    (h, w), (height, width) = grid, size
    return h <= height and w <= width and abs(h * width - w * height) <= max(size)


def _smoothed(maps: numpy.ndarray, deviation: float) -> numpy.ndarray:
    """Maps [T, H, W] convolved with a Gaussian; zero outside of the image."""
    reach = math.ceil(3 * deviation)
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / deviation) ** 2)
    bell = bell / bell.sum()
    smooth: Tensor = torch.from_numpy(maps)[:, None]
    smooth = functional.conv2d(smooth, bell[None, None, :, None], padding=(reach, 0))
    smooth = functional.conv2d(smooth, bell[None, None, None, :], padding=(0, reach))
    return smooth[:, 0].numpy()
