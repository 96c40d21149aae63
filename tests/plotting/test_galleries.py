"""Grids of methods and targets over one photograph."""

import numpy
import pytest
import torch
from matplotlib import pyplot

from tdhook import errors
from tdhook.plotting import heat_map_gallery

IMAGE = torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(0))
SIGNED = torch.linspace(-4, 3, 2 * 48).reshape(2, 1, 1, 6, 8)
POSITIVE = torch.linspace(0, 0.5, 2 * 3 * 4).reshape(2, 3, 4)
METHODS = {"integrated gradients": SIGNED, "GradCAM": POSITIVE}


def panels(figure, methods, targets, photograph=True):
    """The axes of the maps as rows, and the colour bars."""
    maps = figure.axes[photograph : photograph + methods * targets]
    return [maps[i * targets : (i + 1) * targets] for i in range(methods)], figure.axes[photograph + methods * targets :]


def test_methods_are_rows_and_targets_columns():
    figure = heat_map_gallery(IMAGE, METHODS, titles=["cat", "$5"], title="methods", percentile=100)
    (first, second), bars = panels(figure, 2, 2)
    for axes, values in zip(first, SIGNED[:, 0, 0]):
        grey, overlay = axes.images
        numpy.testing.assert_allclose(grey.get_array(), 0.35 + 0.65 * IMAGE.mean(-1), rtol=1e-6)
        numpy.testing.assert_allclose(overlay.get_array(), values)
    assert [axes.get_title() for axes in first] == ["cat", "$5"]
    assert [axes.get_title() for axes in second] == ["", ""]
    assert [row[0].get_ylabel() for row in (first, second)] == ["integrated\ngradients", "GradCAM"]
    assert [row[1].get_ylabel() for row in (first, second)] == ["", ""]
    assert figure.axes[0].get_title() == "photograph" and figure.get_suptitle() == "methods"
    numpy.testing.assert_allclose(figure.axes[0].images[0].get_array(), IMAGE)
    assert len(bars) == 2


def test_every_row_has_a_range_of_its_own_and_its_targets_share_it():
    (signed, positive), bars = panels(heat_map_gallery(IMAGE, METHODS, percentile=100), 2, 2)
    assert [axes.images[1].get_clim() for axes in signed] == [(-4, 4)] * 2
    assert [axes.images[1].get_cmap().name for axes in signed] == ["RdBu_r"] * 2
    high = max(axes.images[1].get_array().max() for axes in positive)
    assert high == pytest.approx(0.5)
    assert [axes.images[1].get_clim() for axes in positive] == [(0, high)] * 2
    assert [axes.images[1].get_cmap().name for axes in positive] == ["YlOrRd"] * 2
    assert [bar.get_ylim() for bar in bars] == [(-4, 4), (0, high)]


def test_a_coarse_grid_is_enlarged_to_the_image():
    grid = torch.arange(4.0).reshape(1, 1, 2, 2).expand(2, 1, 2, 2)
    ((left, _),), _ = panels(heat_map_gallery(torch.rand(8, 8), {"GradCAM": grid}), 1, 2)
    drawn = left.images[1].get_array()
    assert drawn.shape == (8, 8)
    assert [drawn[0, 0], drawn[0, -1], drawn[-1, 0], drawn[-1, -1]] == [0, 1, 2, 3]


def test_what_is_near_zero_is_transparent():
    ((left, _), _), _ = panels(heat_map_gallery(IMAGE, METHODS, percentile=100), 2, 2)
    numpy.testing.assert_allclose(left.images[1].get_alpha(), (SIGNED[0, 0, 0].abs() / 4) ** 0.5, rtol=1e-5)


def test_the_photograph_can_be_left_out():
    figure = heat_map_gallery(IMAGE, {"GradCAM": POSITIVE}, photograph=False, positive_colors=None)
    ((left, right),), (bar,) = panels(figure, 1, 2, photograph=False)
    assert left.get_ylabel() == "GradCAM" and right.images[1].get_cmap().name == "RdBu_r"
    low, high = bar.get_ylim()
    assert low == -high


def test_nothing_overlaps_or_is_cut_off(tmp_path):
    titles = ["a class with a long name (38.4%)", "tabby, tabby cat (16.1%)"]
    methods = {"a method with quite a long name": torch.randn(2, 36, 48), "GradCAM": POSITIVE * 1e-6}
    figure = heat_map_gallery(torch.rand(36, 48), methods, titles=titles, title="a headline")
    figure.savefig(tmp_path / "gallery.png")
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.padded(-1).overlaps(b.padded(-1))]
    assert overlaps == []
    width, height = figure.bbox.size
    assert all(box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1 for box in boxes)
    assert len({round(axes.get_position().x0, 3) for axes in figure.axes[-2:]}) == 1  # the bars stand in line


def test_pyplot_and_the_arguments_are_left_alone():
    before, kept = dict(pyplot.rcParams), {name: values.clone() for name, values in METHODS.items()}
    heat_map_gallery(IMAGE, METHODS, smoothing=1.0)
    assert pyplot.get_fignums() == [] and dict(pyplot.rcParams) == before
    assert all(torch.equal(METHODS[name], values) for name, values in kept.items())


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ({}, {}, "methods is empty"),
        (METHODS | {"LIME": SIGNED[:1]}, {}, "different numbers of targets .*'LIME' 1"),
        (METHODS, {"titles": ["cat"]}, r"'GradCAM' 2\), titles 1"),
        (METHODS, {"titles": "cat"}, "titles is or holds 'cat'"),
        (
            {"IG": torch.rand(2, 8, 6)},
            {},
            r"methods\['IG'\] has shape \[2, 8, 6\], the image 6 x 8 pixels; give \[T, 1",
        ),
        ({"IG": torch.rand(6, 8)}, {}, r"methods\['IG'\] has shape \[6, 8\]"),
        ({"IG": SIGNED.log()}, {}, r"methods\['IG'\] holds NaN"),
        (METHODS, {"percentile": 0}, "percentile"),
        (METHODS, {"smoothing": -1}, "smoothing is 0 or more"),
    ],
)
def test_wrong_arguments_raise(methods, options, message):
    with pytest.raises(errors.InputError, match=message):
        heat_map_gallery(IMAGE, methods, **options)
