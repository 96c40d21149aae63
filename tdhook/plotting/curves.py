"""Curves with bands: deletion and insertion, convergence against steps, scores of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

from ..core.errors import InputError
from .canvas import as_array, as_texts, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), told apart by colour-blind readers; yellow left out, which is faint on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
BAND = 0.2  # opacity


def curves(
    x: Any,
    values: Any,
    *,
    errors: Any = None,
    bands: tuple[Any, Any] | None = None,
    labels: Sequence[str] | None = None,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Draws curves, each with a band around it.

        band = values - errors .. values + errors,   or as given

    Args:
        x: array or tensor [N], or [K, N] where curves have places of their own; ascending.
        values: array or tensor [N], or [K, N] for K curves.
        errors: standard errors in the shape of `values`, or a number for all.
        bands: (lowest, highest), each in the shape of `values`; instead of errors.
        labels: K texts of the legend.
        title: text above the picture.
        x_label: what `x` is.
        y_label: what the values are.
        log_x: logarithmic axis of `x`, which is above zero then.
        log_y: logarithmic axis of the values, which are above zero then; a band that reaches down to zero is cut where the
            axis ends.

    Returns:
        A figure with one axes: K lines, and K bands if there are any. The legend stands beside them.

    Raises:
        InputError: shapes that do not fit each other, NaN, `x` that does not ascend, negative errors, bands that do not hold
            the values, errors as well as bands, numbers that a logarithmic axis cannot show, another number of labels.
        ImportError: matplotlib is not installed.

    Examples:
        >>> figure = curves([0, 1, 2], [[1.0, 0.5, 0.2], [1.0, 0.9, 0.7]], errors=0.1, labels=["gradients", "random"])
        >>> [line.get_label() for line in figure.axes[0].lines], len(figure.axes[0].collections)
        (['gradients', 'random'], 2)
    """
    heights = _rows("values", values, None)
    places = _rows("x", x, heights.shape)
    names = [""] * len(heights) if labels is None else as_texts("labels", labels)
    if len(names) != len(heights):
        raise InputError(
            f"values of shape {list(heights.shape)} are {len(heights)} curves, labels {len(names)}; give one each."
        )
    if (numpy.diff(places) <= 0).any():
        raise InputError("x does not ascend; sort it, and the values with it.")
    band = _band(heights, errors, bands)
    for name, logarithmic, array in (("x", log_x, places), ("y", log_y, heights)):
        if logarithmic and array.min() <= 0:
            raise InputError(f"log_{name} shows numbers above 0 only, the smallest is {array.min():.3g}.")

    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    for i, (across, up, name) in enumerate(zip(places, heights, names)):
        color, dash = PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)]
        marker = "o" if heights.shape[1] <= 32 else ""
        axes.plot(across, up, color=color, linestyle=dash, marker=marker, markersize=3.5, linewidth=1.6, label=name)
        if band is not None:
            axes.fill_between(across, band[0][i], band[1][i], color=color, alpha=BAND, linewidth=0)
    _scale(axes, places, heights, band, log_x, log_y)
    axes.set_title(title, parse_math=False)
    axes.set_xlabel(x_label, parse_math=False)
    axes.set_ylabel(y_label, parse_math=False)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if labels is not None:
        legend = figure.legend(loc="outside right upper", frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _rows(name: str, values: Any, shape: tuple[int, ...] | None) -> numpy.ndarray:
    """An array [K, N], broadcast to a shape."""
    array = as_array(name, values).astype(float)
    rows = array[None] if array.ndim == 1 else array
    if shape is None and (rows.ndim != 2 or not rows.size):
        raise InputError(f"{name} has shape {list(array.shape)}; give [N] or [K, N].")
    if shape is None or rows.shape == shape:
        return rows
    if (array.ndim == 0 and name == "errors") or (rows.shape == (1, shape[1]) and name == "x"):
        return numpy.broadcast_to(rows, shape)
    raise InputError(f"{name} has shape {list(array.shape)}, values {list(shape)}; they fit point by point.")


def _band(heights: numpy.ndarray, errors: Any, bands: Any) -> tuple[numpy.ndarray, numpy.ndarray] | None:
    """The lowest and highest values [K, N] of each curve's band."""
    if errors is not None and bands is not None:
        raise InputError("errors and bands are both given; give one of them.")
    if errors is not None:
        spread = _rows("errors", errors, heights.shape)
        if spread.min() < 0:
            raise InputError(f"errors are 0 or more, the smallest is {spread.min():.3g}; for given ends use bands=(low, high).")
        return heights - spread, heights + spread
    if bands is None:
        return None
    if not isinstance(bands, (tuple, list)) or len(bands) != 2:
        raise InputError("bands is (lowest, highest), each in the shape of values.")
    low, high = (_rows(f"bands[{i}]", ends, heights.shape) for i, ends in enumerate(bands))
    if (low > heights).any() or (high < heights).any():
        raise InputError("bands does not hold the values everywhere: lowest <= values <= highest.")
    return low, high


def _scale(
    axes: Axes,
    places: numpy.ndarray,
    heights: numpy.ndarray,
    band: tuple[numpy.ndarray, numpy.ndarray] | None,
    log_x: bool,
    log_y: bool,
) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

    if log_y:
        axes.set_yscale("log")
        low, high = heights.min(), heights.max()
        if band is not None:
            low = min(band[0][band[0] > 0].min(initial=low), low)
            high = band[1].max()
            # a standard error as large as its value would stretch the axis over many empty decades
            low = max(low, heights.min() / 10)
        axes.set_ylim(low / 1.3, high * 1.3)
    elif heights.min() < 0 < heights.max():
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    if log_x:
        axes.set_xscale("log")
        once = numpy.unique(places)
        if len(once) <= 16 and (once[1:] / once[:-1]).min(initial=2) >= 1.4:
            # the steps that were run, in place of powers of ten
            axes.set_xticks(once)
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
    elif (places == places.round()).all():
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
