"""Colour ranges: symmetric around zero for values of both signs, from zero up for values of one."""

from __future__ import annotations

from typing import NamedTuple

import numpy

from ..core.errors import InputError

# ColorBrewer's RdBu in five steps, for strings: what matplotlib's RdBu_r is close to
STOPS = numpy.array([[5, 113, 176], [146, 197, 222], [247, 247, 247], [244, 165, 130], [202, 0, 32]], dtype=float)


class ColorRange(NamedTuple):
    """The values of the lowest and highest colour, matplotlib's name of the colours, and which ends are clipped."""

    low: float
    high: float
    colors: str
    extend: str


def require_percentile(percentile: float) -> None:
    """Raises `InputError` unless 0 < percentile <= 100."""
    if not 0 < percentile <= 100:
        raise InputError(f"percentile is above 0 and at most 100, got {percentile!r}.")


def symmetric_limit(values: numpy.ndarray, percentile: float) -> float:
    """The percentile of the magnitudes; 1 where everything is zero, so that a colour range is never empty."""
    return float(numpy.percentile(numpy.abs(values), percentile)) or float(numpy.abs(values).max()) or 1.0


def color_range(
    values: numpy.ndarray,
    *,
    percentile: float = 100.0,
    limits: tuple[float, float] | None = None,
    diverging: str = "RdBu_r",
    sequential: str | None = "viridis",
    from_zero: bool = False,
) -> ColorRange:
    """The range of finite values: the given limits, else symmetric around zero, or up from zero where nothing is negative.

    Args:
        values: any shape.
        percentile: of the magnitudes, where the range ends.
        limits: lowest and highest value.
        diverging: name of the colours of a range with both signs.
        sequential: name of those of any other range; None for the diverging ones, and a symmetric range, always.
        from_zero: begin at zero where nothing is negative and something is positive.
    """
    require_percentile(percentile)
    low, high = float(values.min()), float(values.max())
    limit = symmetric_limit(values, percentile)
    if limits is not None:
        bottom, top = limits
        if not bottom < top:
            raise InputError(f"limits={limits!r} are (lowest, highest) in ascending order.")
    elif from_zero and sequential is not None and low >= 0 and high > 0:
        bottom, top = 0.0, limit
    else:
        bottom, top = -limit, limit
    colors = diverging if bottom < 0 < top or sequential is None else sequential
    below, above = low < bottom, high > top
    return ColorRange(bottom, top, colors, "both" if below and above else "min" if below else "max" if above else "neither")


def diverging_rgb(share: float) -> tuple[int, int, int]:
    """Blue at -1, near white at 0, red at 1; what lies outside is clipped.

    Examples:
        >>> diverging_rgb(0), diverging_rgb(1), diverging_rgb(-7)
        ((247, 247, 247), (202, 0, 32), (5, 113, 176))
    """
    at = numpy.linspace(-1, 1, len(STOPS))
    red, green, blue = (round(float(numpy.interp(share, at, channel))) for channel in STOPS.T)
    return red, green, blue


def text_rgb(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has more contrast on a background (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in background)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # (L + 0.05) / 0.05 against black equals 1.05 / (L + 0.05) against white at L = 0.179
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)
