"""Curves with bands."""

import numpy
import pytest
import torch
from matplotlib import pyplot

from tdhook import errors
from tdhook.plotting import curves

X = torch.tensor([0.0, 0.5, 1.0])
VALUES = torch.tensor([[1.0, 0.5, 0.25], [1.0, 0.75, 0.5]])


def ends(band, x):
    """The lowest and highest value of a band at a place."""
    (path,) = band.get_paths()
    heights = path.vertices[path.vertices[:, 0] == x, 1]
    return heights.min(), heights.max()


def test_every_curve_is_a_line_with_its_label():
    figure = curves(X, VALUES, labels=["deletion", "$5"], title="faith", x_label="share", y_label="score")
    (axes,) = figure.axes
    assert [line.get_xdata().tolist() for line in axes.lines] == [X.tolist()] * 2
    assert [line.get_ydata().tolist() for line in axes.lines] == VALUES.tolist()
    assert len({line.get_color() for line in axes.lines}) == 2 and len(axes.collections) == 0
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("faith", "share", "score")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["deletion", "$5"]


def test_errors_are_a_band_around_the_curve_in_its_color():
    errors_ = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.5]])
    axes = curves(X, VALUES, errors=errors_).axes[0]
    assert len(axes.collections) == 2
    for band, line, values, spreads in zip(axes.collections, axes.lines, VALUES, errors_):
        assert pyplot.matplotlib.colors.same_color(band.get_facecolor()[0, :3], line.get_color())
        for x, value, spread in zip(X.tolist(), values.tolist(), spreads.tolist()):
            assert ends(band, x) == pytest.approx((value - spread, value + spread))


def test_one_number_is_the_error_of_all():
    axes = curves(X, VALUES, errors=0.25).axes[0]
    assert [ends(band, 0.0) for band in axes.collections] == [(0.75, 1.25)] * 2


def test_bands_are_drawn_as_given():
    axes = curves(X, VALUES[0], bands=(VALUES[0] - 0.25, VALUES[0] + 1)).axes[0]
    assert ends(axes.collections[0], 0.5) == (0.25, 1.5)


def test_one_curve_needs_no_legend():
    figure = curves(X, VALUES[0])
    assert len(figure.axes[0].lines) == 1 and figure.legends == []


def test_curves_may_have_places_of_their_own():
    own = torch.stack([X, X * 2])
    axes = curves(own, VALUES).axes[0]
    assert [line.get_xdata().tolist() for line in axes.lines] == own.tolist()


def test_logarithmic_axes_are_labelled_with_the_steps():
    steps = [1, 2, 4, 8]
    figure = curves(steps, [1.0, 0.1, 0.01, 0.001], log_x=True, log_y=True)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "4", "8"]
    assert list(axes.get_xticks(minor=True)) == []
    low, high = axes.get_ylim()
    assert 1e-4 < low < 1e-3 and 1 < high < 10


def test_many_steps_keep_powers_of_ten():
    figure = curves(range(1, 101), numpy.ones(100), log_x=True)
    figure.canvas.draw()
    assert {1.0, 10.0, 100.0} <= set(figure.axes[0].get_xticks())


def test_a_band_down_to_zero_does_not_stretch_a_logarithmic_axis():
    axes = curves([1, 2], [1.0, 0.1], errors=[0.5, 0.1], log_y=True).axes[0]
    low, _ = axes.get_ylim()
    assert 1e-3 < low < 0.1
    (line,) = axes.lines
    assert line.get_ydata().tolist() == [1.0, 0.1]


def test_layers_get_whole_numbers():
    figure = curves(range(3), [1.0, 2.0, 0.0])
    figure.canvas.draw()
    assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_zero_is_marked_where_curves_cross_it():
    axes = curves(X, [-1.0, 0.0, 1.0]).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[-1.0, 0.0, 1.0], [0, 0]]
    assert len(curves(X, VALUES).axes[0].lines) == 2


def test_twenty_curves_all_look_different():
    lines = curves(X, torch.rand(20, 3)).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20


def test_the_legend_covers_no_curve(tmp_path):
    figure = curves(X, VALUES, labels=["integrated gradients", "random"])
    figure.savefig(tmp_path / "curves.png")
    legend = figure.legends[0].get_window_extent()
    assert not legend.padded(-1).overlaps(figure.axes[0].get_tightbbox())


def test_pyplot_and_the_arguments_are_left_alone():
    before, values = dict(pyplot.rcParams), VALUES.clone().requires_grad_()
    curves(X, values, errors=values.detach() * 0.1)
    assert pyplot.get_fignums() == [] and dict(pyplot.rcParams) == before
    assert torch.equal(values, VALUES)


@pytest.mark.parametrize(
    ("x", "values", "options", "message"),
    [
        (X[:2], VALUES, {}, r"x has shape \[2\], values \[2, 3\]"),
        (X, VALUES[None], {}, r"values has shape \[1, 2, 3\]; give \[N\] or \[K, N\]"),
        (X, 1.0, {}, r"values has shape \[\]"),
        (X[:0], X[:0], {}, r"values has shape \[0\]"),
        (X, VALUES / 0, {}, "values holds NaN or infinity"),
        (X.flip(0), VALUES, {}, "x does not ascend"),
        (X * 0, VALUES, {}, "x does not ascend"),
        (X, VALUES, {"labels": ["one"]}, "are 2 curves, labels 1"),
        (X, VALUES, {"labels": "ab"}, "labels is or holds 'ab'"),
        (X, VALUES, {"errors": VALUES[0]}, r"errors has shape \[3\], values \[2, 3\]"),
        (X, VALUES, {"errors": -VALUES}, "errors are 0 or more, the smallest is -1"),
        (X, VALUES, {"errors": VALUES * float("nan")}, "errors holds NaN"),
        (X, VALUES, {"errors": VALUES, "bands": (VALUES, VALUES)}, "both given"),
        (X, VALUES, {"bands": VALUES}, r"bands is \(lowest, highest\)"),
        (X, VALUES, {"bands": (VALUES, VALUES[0])}, r"bands\[1\] has shape \[3\]"),
        (X, VALUES, {"bands": (VALUES + 0.1, VALUES + 1)}, "does not hold the values"),
        (X, VALUES, {"log_x": True}, "log_x shows numbers above 0 only, the smallest is 0"),
        (X, VALUES - 2, {"log_y": True}, "log_y shows numbers above 0 only, the smallest is -1.75"),
    ],
)
def test_wrong_arguments_raise(x, values, options, message):
    with pytest.raises(errors.InputError, match=message):
        curves(x, values, **options)
