"""Values at sites and positions as labelled heat maps: patching sweeps, attributions at sites, lenses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from ..core.errors import InputError
from .canvas import as_array, label_tokens, new_figure
from .colors import color_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def site_position_map(
    values: Any,
    sites: Sequence[Any],
    tokens: Sequence[str],
    *,
    title: str = "",
    label: str = "",
    limits: tuple[float, float] | None = None,
    percentile: float = 100.0,
    colors: str | None = None,
) -> Figure:
    """Draws one value for each site and position: sites from bottom (first) to top, tokens from left to right.

    Sites that differ in one component, such as `model.layers.0.mlp` to `model.layers.29.mlp`, are labelled with that
    component, and the axis with the pattern `model.layers.*.mlp`.

    Args:
        values: array or tensor [S, P].
        sites: S addresses or other labels.
        tokens: P labels; spaces and line breaks are made visible.
        title: text above the map.
        label: what the values are, beside the colour bar.
        limits: lowest and highest value of the colours; None for a range symmetric around zero.
        percentile: of the magnitudes, where the symmetric range ends; 100 for the largest.
        colors: name of a colour map of matplotlib; None for diverging colours where the limits have both signs, else a
            sequential one.

    Returns:
        A figure with two axes: the map and its colour bar.

    Raises:
        InputError: values of another shape than sites and tokens, NaN, limits that are not ascending, a bad percentile.
        ImportError: matplotlib is not installed.

    Examples:
        >>> import torch
        >>> figure = site_position_map(torch.randn(2, 3), ["h.0.mlp", "h.1.mlp"], ["I", " am", " here"], label="effect")
        >>> axes, bar = figure.axes
        >>> [text.get_text() for text in axes.get_xticklabels()], axes.get_ylabel(), bar.get_ylabel()
        (['I', '␣am', '␣here'], 'h.*.mlp', 'effect')
    """
    panels = {title: (values, sites)}
    return site_position_maps(panels, tokens, label=label, limits=limits, percentile=percentile, colors=colors)


def site_position_maps(
    panels: Mapping[str, tuple[Any, Sequence[Any]]],
    tokens: Sequence[str],
    *,
    title: str = "",
    label: str = "",
    limits: tuple[float, float] | None = None,
    percentile: float = 100.0,
    colors: str | None = None,
) -> Figure:
    """Draws several such maps side by side with one colour range, to compare kinds of sites on the same tokens.

    Args:
        panels: for each title the values, array or tensor [S, P], and their S sites; S may differ from panel to panel.
        tokens: P labels; spaces and line breaks are made visible.
        title: text above all panels.
        label: what the values are, beside the colour bar.
        limits: lowest and highest value of the colours; None for a range symmetric around zero.
        percentile: of all magnitudes, where the symmetric range ends; 100 for the largest.
        colors: name of a colour map of matplotlib; None for diverging colours where the limits have both signs, else a
            sequential one.

    Returns:
        A figure with one axes for each panel and one for the colour bar.

    Raises:
        InputError: no panel, values of another shape than sites and tokens, NaN, limits that are not ascending, a bad
            percentile.
        ImportError: matplotlib is not installed.

    Examples:
        >>> import torch
        >>> panels = {"attention": (torch.zeros(1, 2), ["h.0.attn"]), "MLP": (torch.ones(1, 2), ["h.0.mlp"])}
        >>> len(site_position_maps(panels, ["a", "b"]).axes)
        3
    """
    tokens = list(tokens)
    if not panels:
        raise InputError("panels is empty; give at least one.")
    arrays = {name: _checked(name, values, list(sites), tokens) for name, (values, sites) in panels.items()}
    everything = numpy.concatenate([array.ravel() for array in arrays.values()])
    diverging, sequential = colors or "RdBu_r", colors or "viridis"
    look = color_range(everything, percentile=percentile, limits=limits, diverging=diverging, sequential=sequential)

    most = max(len(array) for array in arrays.values())
    width = min(max(0.34 * len(tokens) + 1.0, 3.0), 16.0)
    figure = new_figure(width * len(arrays) + 1.0, min(max(0.19 * most + 1.8, 4.2), 14.0))
    places = figure.subplots(1, len(arrays), squeeze=False)[0]
    drawn = None
    for axes, (name, array) in zip(places, arrays.items()):
        how = dict(cmap=look.colors, aspect="auto", origin="lower", interpolation="nearest")
        drawn = axes.imshow(array, vmin=look.low, vmax=look.high, **how)
        axes.set_title(name, parse_math=False)
        label_tokens(axes, "x", tokens, "token")
        _label_sites(axes, list(panels[name][1]))
    figure.colorbar(drawn, ax=list(places), label=label, extend=look.extend)  # type: ignore[arg-type]
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def _checked(name: str, values: Any, sites: list, tokens: list) -> numpy.ndarray:
    array = as_array("values", values)
    if array.shape != (len(sites), len(tokens)) or not array.size:
        of = f" of {name!r}" if name else ""
        raise InputError(
            f"values{of} has shape {list(array.shape)}, there are {len(sites)} sites and {len(tokens)} tokens; "
            "give [S, P]" + (", for example one example of a batch: values[..., 0]." if array.ndim > 2 else ".")
        )
    return array


def _label_sites(axes: Axes, sites: list[Any]) -> None:
    pattern, labels = _abbreviated([str(site) for site in sites])
    step = -(-len(labels) // 32)
    axes.set_yticks(range(0, len(labels), step), labels[::step])
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylabel(pattern, parse_math=False)


def _abbreviated(sites: list[str]) -> tuple[str, list[str]]:
    """The pattern of sites that differ in one component, and that component of each; else "site" and the sites.

    Examples:
        >>> _abbreviated(["h.0.mlp:in", "h.1.mlp:in"])
        ('h.*.mlp:in', ['0', '1'])
    """
    split = [site.split(".") for site in sites]
    if len(split) > 1 and len({len(parts) for parts in split}) == 1:
        differ = [i for i, parts in enumerate(zip(*split)) if len(set(parts)) > 1]
        if len(differ) == 1 and len(split[0]) > 1:
            pattern = [*split[0][: differ[0]], "*", *split[0][differ[0] + 1 :]]
            return ".".join(pattern), [parts[differ[0]] for parts in split]
    return "site", sites
