"""Scores of tokens: coloured text as HTML or for a terminal, and matrices of generated against source tokens."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

from ..core.errors import InputError
from .canvas import as_array, as_texts, columns_of, label_tokens, new_figure, visible, wrapped
from .colors import color_range, diverging_rgb, require_percentile, symmetric_limit, text_rgb

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tokens_html(
    tokens: Sequence[str],
    scores: Any,
    *,
    titles: Sequence[str] | None = None,
    title: str = "",
    label: str = "",
    percentile: float = 100.0,
) -> str:
    """Writes a text whose tokens are coloured by their scores, as HTML: red above zero, blue below, white at zero.

    The text is repeated for each target, with one symmetric colour range for all. Every style is inline and there is no
    script, so the string can be put into any page; `IPython.display.HTML(string)` shows it in a notebook. A pointer
    over a token shows its score. Spaces and line breaks are visible. Needs no matplotlib.

    Args:
        tokens: P texts.
        scores: array or tensor [P], or [T, P] for several targets.
        titles: T texts, one before each row.
        title: text above all.
        label: what the scores are, beside the legend.
        percentile: of all magnitudes, where the colour range ends; 100 for the largest.

    Returns:
        One `<div>` element, in ASCII.

    Raises:
        InputError: scores of another shape than tokens and titles, NaN, tokens that are no texts, a bad percentile.

    Examples:
        >>> page = tokens_html(["a", " <b>"], [1.0, -1.0])
        >>> "</span>&lt;b&gt;</span>" in page, "background:rgb(202,0,32)" in page
        (True, True)
    """
    texts, rows, names, limit = _checked(tokens, scores, titles, percentile)
    lines = ['<div style="background:#fff;color:#000;padding:0.6em 0.8em;font:14px/1.9 ui-monospace,Menlo,Consolas,monospace">']
    if title:
        lines.append(f'<div style="font-weight:bold">{html.escape(title)}</div>')
    widest = max(columns_of(name) for name in names)
    for name, row in zip(names, rows):
        before = f'<div style="flex:0 0 {min(widest, 24)}ch;text-align:right;color:#555">{html.escape(name)}</div>'
        spans = "".join(_span(text, value, limit) for text, value in zip(texts, row))
        words = f'<div style="flex:1;min-width:0;overflow-wrap:anywhere">{spans}</div>'
        lines.append(f'<div style="display:flex;gap:1.5ch;margin:0.2em 0">{before if widest else ""}{words}</div>')
    stops = ",".join(_css(diverging_rgb(share)) for share in (-1, -0.5, 0, 0.5, 1))
    ramp = f'<span style="width:12em;height:0.8em;background:linear-gradient(to right,{stops})"></span>'
    low, high = _ends(limit)
    legend = f"<span>{low}</span>{ramp}<span>{high}</span><span>{html.escape(label)}</span>"
    lines.append(
        f'<div style="display:flex;align-items:center;gap:0.6em;font-size:12px;margin-top:0.4em;color:#333">{legend}</div>'
    )
    # as references, so that it reads whatever encoding the page declares
    return "\n".join([*lines, "</div>"]).encode("ascii", "xmlcharrefreplace").decode()


def tokens_terminal(
    tokens: Sequence[str],
    scores: Any,
    *,
    titles: Sequence[str] | None = None,
    title: str = "",
    label: str = "",
    percentile: float = 100.0,
    width: int = 100,
) -> str:
    """Writes a text whose tokens are coloured by their scores, for a terminal: red above zero, blue below, white at zero.

    The text is repeated for each target, with one symmetric colour range for all. Colours are ANSI codes of 24 bits; each
    token brings the colour of its letters too, so it reads on dark and on light ground. Spaces and line breaks are
    visible, and characters that would steer the terminal are written out. Needs no matplotlib.

    Args:
        tokens: P texts.
        scores: array or tensor [P], or [T, P] for several targets.
        titles: T texts, one before each row.
        title: text above all.
        label: what the scores are, beside the legend.
        percentile: of all magnitudes, where the colour range ends; 100 for the largest.
        width: columns of a line; a longer text is broken between tokens.

    Returns:
        Lines for `print`.

    Raises:
        InputError: scores of another shape than tokens and titles, NaN, tokens that are no texts, a bad percentile or width.

    Examples:
        >>> tokens_terminal(["a"], [1.0]).splitlines()[0]
        '\\x1b[48;2;202;0;32m\\x1b[38;2;255;255;255ma\\x1b[0m'
    """
    texts, rows, names, limit = _checked(tokens, scores, titles, percentile)
    if width < 1:
        raise InputError(f"width is at least 1 column, got {width!r}.")
    names = [_line(name) for name in names]
    widest = max(columns_of(name) for name in names)
    indent = widest + 2 if widest else 0
    lines = [_line(title)] if title else []
    for name, row in zip(names, rows):
        line, used = " " * (widest - columns_of(name)) + name + "  " if widest else "", indent
        for text, value in zip(texts, row):
            shown = visible(text)
            if used > indent and used + columns_of(shown) > width:
                lines.append(line)
                line, used = " " * indent, indent
            line, used = line + _painted(shown, diverging_rgb(value / limit)), used + columns_of(shown)
            if text.endswith("\n"):
                lines.append(line)
                line, used = " " * indent, indent
        lines += [line] if used > indent else []
    low, high = _ends(limit)
    ramp = "".join(_painted(" ", diverging_rgb(share)) for share in numpy.linspace(-1, 1, 21))
    lines.append(" " * indent + " ".join([low, ramp, high, _line(label)]).rstrip())
    return "\n".join(lines)


def token_matrix(
    matrix: Any,
    source_tokens: Sequence[str],
    target_tokens: Sequence[str],
    *,
    title: str = "",
    label: str = "",
    limits: tuple[float, float] | None = None,
    percentile: float = 100.0,
    colors: str | None = None,
) -> Figure:
    """Draws one value for each generated token (downwards) and source token (to the right): attributions, attention.

    Args:
        matrix: array or tensor [G, S]; a pair that cannot attend is NaN and stays blank.
        source_tokens: S texts; spaces and line breaks are made visible.
        target_tokens: G texts.
        title: text above the matrix.
        label: what the values are, beside the colour bar.
        limits: lowest and highest value of the colours; None for a range from zero up where no value is negative, else one
            symmetric around zero.
        percentile: of the magnitudes, where such a range ends; 100 for the largest.
        colors: name of a colour map of matplotlib; None for diverging colours where the limits have both signs, else
            sequential ones.

    Returns:
        A figure with two axes: the matrix and its colour bar.

    Raises:
        InputError: a matrix of another shape than the tokens, without a number or with infinity, tokens that are no texts,
            limits that are not ascending, a bad percentile.
        ImportError: matplotlib is not installed.

    Examples:
        >>> figure = token_matrix([[0.2, float("nan")], [0.1, -0.4]], ["I", " am"], [" am", " here"], label="relevance")
        >>> axes, bar = figure.axes
        >>> [text.get_text() for text in axes.get_yticklabels()], bar.get_ylabel()
        (['␣am', '␣here'], 'relevance')
    """
    array = as_array("matrix", matrix, missing=True)
    sources, targets = as_texts("source_tokens", source_tokens), as_texts("target_tokens", target_tokens)
    if array.shape != (len(targets), len(sources)):
        raise InputError(
            f"matrix has shape {list(array.shape)}, there are {len(targets)} target_tokens and {len(sources)} source_tokens; "
            "give [target, source]."
        )
    diverging, sequential = colors or "RdBu_r", colors or "viridis"
    known = numpy.isfinite(array)
    look = color_range(
        array[known], percentile=percentile, limits=limits, diverging=diverging, sequential=sequential, from_zero=True
    )

    width, height = (min(max(0.3 * len(side), 2.4), 13.0) for side in (sources, targets))
    figure = new_figure(width + 2.6, height + 1.6)
    axes = figure.add_subplot()
    values = numpy.ma.masked_invalid(array)
    drawn = axes.imshow(values, cmap=look.colors, vmin=look.low, vmax=look.high, interpolation="nearest", aspect="auto")
    if array.size <= 4096:
        _outline(axes, known)
    label_tokens(axes, "x", sources, "source token")
    label_tokens(axes, "y", targets, "generated token")
    axes.set_title(wrapped(title, width + 1), parse_math=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2)
    figure.colorbar(drawn, ax=axes, label=label, extend=look.extend)
    return figure


def _line(text: str) -> str:
    """A text whose characters all print, on one line."""
    return visible(text).replace("␣", " ")


def _checked(tokens: Any, scores: Any, titles: Any, percentile: float) -> tuple[list[str], numpy.ndarray, list[str], float]:
    """The tokens, scores [T, P], a name for each row, and where the colour range ends."""
    require_percentile(percentile)
    texts = as_texts("tokens", tokens)
    array = as_array("scores", scores).astype(float)
    rows = array[None] if array.ndim == 1 else array
    if rows.ndim != 2 or rows.shape[1] != len(texts) or not rows.size:
        raise InputError(f"scores has shape {list(array.shape)}, there are {len(texts)} tokens; give [P] or [T, P].")
    names = [""] * len(rows) if titles is None else as_texts("titles", titles)
    if len(names) != len(rows):
        raise InputError(f"scores of shape {list(array.shape)} hold {len(rows)} targets, titles {len(names)}; give one each.")
    return texts, rows, names, symmetric_limit(rows, percentile)


def _ends(limit: float) -> tuple[str, str]:
    return f"−{limit:.3g}", f"+{limit:.3g}"


def _css(color: tuple[int, int, int]) -> str:
    return "rgb({},{},{})".format(*color)


def _span(text: str, value: float, limit: float) -> str:
    background = diverging_rgb(value / limit)
    # what stands for a space is faint, so that words are read first
    faint = {mark: f'<span style="opacity:0.35">{mark}</span>' for mark in "␣⏎⇥"}
    shown = "".join(faint.get(c) or html.escape(c) for c in visible(text))
    style = f"background:{_css(background)};color:{_css(text_rgb(background))};padding:0.2em 0;margin-right:1px"
    return f'<span title="{value:+.4g}" style="{style}">{shown}</span>' + ("<br>" if text.endswith("\n") else "<wbr>")


def _painted(text: str, background: tuple[int, int, int]) -> str:
    back, front = (";".join(map(str, color)) for color in (background, text_rgb(background)))
    return f"\x1b[48;2;{back}m\x1b[38;2;{front}m{text}\x1b[0m"


def _outline(axes: Any, known: numpy.ndarray) -> None:
    """Thin lines around each known cell, so that a zero differs from a blank."""
    from matplotlib.collections import LineCollection

    rows, columns = numpy.nonzero(known)
    x = columns[:, None] + numpy.array([-0.5, 0.5, 0.5, -0.5, -0.5])
    y = rows[:, None] + numpy.array([-0.5, -0.5, 0.5, 0.5, -0.5])
    axes.add_collection(LineCollection(list(numpy.stack([x, y], -1)), colors="0.85", linewidths=0.5), autolim=False)
