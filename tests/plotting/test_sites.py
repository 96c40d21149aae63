"""Maps of sites and positions."""

import subprocess
import sys

import pytest
import torch
from matplotlib import pyplot

from tdhook import errors
from tdhook.plotting import site_position_map, site_position_maps

SITES = [f"h.{i}.attn:out[0]" for i in range(3)]
TOKENS = ["I", " owe", " $", "\n"]


def labels(ticks):
    return [tick.get_text() for tick in ticks]


def test_sites_go_up_and_tokens_to_the_right():
    values = torch.arange(12.0).reshape(3, 4)
    figure = site_position_map(values, SITES, TOKENS, title="effect", label="logits")
    axes, bar = figure.axes
    (image,) = axes.images
    assert image.get_array().tolist() == values.tolist() and image.origin == "lower"
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("effect", "token", "h.*.attn:out[0]")
    assert labels(axes.get_yticklabels()) == ["0", "1", "2"]
    assert bar.get_ylabel() == "logits"


def test_spaces_and_line_breaks_of_tokens_are_visible(tmp_path):
    figure = site_position_map(torch.randn(3, 4), SITES, TOKENS)
    figure.savefig(tmp_path / "map.png")  # a lone "$" would end the drawing if it were read as mathematics
    assert labels(figure.axes[0].get_xticklabels()) == ["I", "␣owe", "␣$", "⏎"]


def test_sites_of_several_kinds_are_labelled_in_full():
    axes = site_position_map(torch.randn(2, 4), ["embed", "h.0"], TOKENS).axes[0]
    assert (axes.get_ylabel(), labels(axes.get_yticklabels())) == ("site", ["embed", "h.0"])


def test_the_range_is_symmetric_around_zero_unless_limits_say_otherwise():
    values = torch.tensor([[0.0, 1.0, -4.0, 2.0]])
    diverging = site_position_map(values, ["h"], TOKENS).axes[0].images[0]
    assert diverging.get_clim() == (-4, 4) and diverging.get_cmap().name == "RdBu_r"
    sequential = site_position_map(values, ["h"], TOKENS, limits=(0, 1)).axes[0].images[0]
    assert sequential.get_clim() == (0, 1) and sequential.get_cmap().name == "viridis"


def test_panels_share_one_range():
    panels = {"attention": (torch.ones(2, 4), ["a", "b"]), "MLP": (-torch.ones(1, 4) * 3, ["c"])}
    figure = site_position_maps(panels, TOKENS)
    first, second, bar = figure.axes
    assert (first.get_title(), second.get_title()) == ("attention", "MLP")
    assert first.images[0].get_clim() == second.images[0].get_clim() == bar.get_ylim() == (-3, 3)


def test_long_axes_get_fewer_labels():
    axes = site_position_map(torch.randn(100, 200), range(100), ["a"] * 200).axes[0]
    assert len(axes.get_yticklabels()) <= 32 and len(axes.get_xticklabels()) <= 48


def test_pyplot_and_its_settings_are_left_alone():
    before = dict(pyplot.rcParams)
    site_position_map(torch.randn(3, 4), SITES, TOKENS)
    assert pyplot.get_fignums() == [] and dict(pyplot.rcParams) == before


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.randn(4, 3), {}, r"values has shape \[4, 3\], there are 3 sites and 4 tokens"),
        (torch.randn(3, 4, 1), {}, r"values\[\.\.\., 0\]"),
        (torch.full((3, 4), float("inf")), {}, "NaN or infinity"),
        (torch.randn(3, 4), {"limits": (1, 0)}, "ascending"),
        (torch.randn(3, 4), {"percentile": 101}, "percentile"),
        (torch.randn(3, 4, dtype=torch.complex64), {}, "real numbers"),
    ],
)
def test_wrong_arguments_raise(values, options, message):
    with pytest.raises(errors.InputError, match=message):
        site_position_map(values, SITES, TOKENS, **options)


def test_no_panel_raises():
    with pytest.raises(errors.InputError, match="panels is empty"):
        site_position_maps({}, TOKENS)


def test_the_library_imports_without_matplotlib_and_plotting_names_its_extra():
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
import tdhook
assert "tdhook.plotting" not in sys.modules
from tdhook import plotting
plotting.tokens_html(["a"], [1.0]), plotting.tokens_terminal(["a"], [1.0])
for draw in (
    lambda: plotting.site_position_map([[1.0]], ["h"], ["a"]),
    lambda: plotting.heat_map_over_image([[1.0]], [[1.0]]),
    lambda: plotting.heat_map_gallery([[1.0]], {"method": [[[1.0]]]}),
    lambda: plotting.token_matrix([[1.0]], ["a"], ["b"]),
    lambda: plotting.curves([1], [1.0]),
):
    try:
        draw()
    except ImportError as error:
        assert "pip install 'tdhook[plot]'" in str(error), error
    else:
        raise AssertionError("no ImportError")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
