"""Attributions over photographs."""

import numpy
import pytest
import torch
from matplotlib import pyplot

from tdhook import errors
from tdhook.plotting import heat_map_over_image, heat_maps_over_image
from tdhook.plotting.colors import color_range

IMAGE = torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 3, 6, 8), (3, 6, 8), (6, 8)])
def test_channels_are_summed_with_their_signs(shape):
    attribution = torch.arange(float(numpy.prod(shape))).reshape(shape) - 20
    axes, _ = heat_map_over_image(IMAGE, attribution).axes
    photograph, overlay = axes.images
    assert photograph.get_array().shape == (6, 8)
    expected = attribution.reshape(-1, 6, 8).sum(0)
    numpy.testing.assert_allclose(overlay.get_array(), expected)


@pytest.mark.parametrize(
    "image",
    [IMAGE, IMAGE.movedim(-1, 0), IMAGE.mean(-1), (IMAGE * 255).to(torch.uint8).numpy()],
    ids=["HWC", "CHW", "HW", "bytes"],
)
def test_images_of_every_layout_are_taken(image):
    assert heat_map_over_image(image, torch.randn(6, 8)).axes[0].images[0].get_array().shape == (6, 8)


def test_the_colour_range_is_symmetric_and_ends_at_the_percentile():
    attribution = torch.cat([torch.linspace(-1, 1, 47), torch.tensor([100.0])]).reshape(6, 8)
    figure = heat_map_over_image(IMAGE, attribution, percentile=95)
    low, high = figure.axes[0].images[1].get_clim()
    assert low == -high and 0.5 < high < 1.5
    assert figure.axes[1].get_ylim() == (low, high)
    assert heat_map_over_image(IMAGE, attribution, percentile=100).axes[0].images[1].get_clim() == (-100, 100)


def test_an_attribution_of_zeros_can_be_drawn():
    assert heat_map_over_image(IMAGE, torch.zeros(6, 8)).axes[0].images[1].get_clim() == (-1, 1)


def test_smoothing_keeps_the_sum_away_from_the_border():
    attribution = torch.zeros(41, 41)
    attribution[20, 20] = 3.0
    drawn = heat_map_over_image(torch.rand(41, 41), attribution, smoothing=2.0).axes[0].images[1].get_array()
    assert drawn.sum() == pytest.approx(3.0)
    assert drawn.argmax() == 20 * 41 + 20 and drawn.max() < 1


def test_the_grid_shows_the_photograph_the_titles_and_one_range():
    figure = heat_maps_over_image(IMAGE, torch.randn(3, 1, 3, 6, 8), titles=["tabby", "lynx", "$5"], columns=2)
    *pictures, bar = figure.axes
    assert [axes.get_title() for axes in pictures] == ["photograph", "tabby", "lynx", "$5"]
    assert len({axes.images[1].get_clim() for axes in pictures[1:]}) == 1
    assert bar.get_ylabel() == "attribution (sum over channels)"


def test_pyplot_and_its_settings_are_left_alone(tmp_path):
    before = dict(pyplot.rcParams)
    heat_maps_over_image(IMAGE, torch.randn(2, 6, 8)).savefig(tmp_path / "maps.png")
    assert pyplot.get_fignums() == []
    assert dict(pyplot.rcParams) == before
    assert (tmp_path / "maps.png").stat().st_size > 0


def test_arguments_are_not_changed_and_may_carry_gradients():
    attribution = torch.randn(6, 8, requires_grad=True)
    image, kept = IMAGE.clone(), attribution.detach().clone()
    heat_map_over_image(image, attribution, smoothing=1.0)
    assert torch.equal(image, IMAGE) and torch.equal(attribution, kept)


def test_a_map_without_negative_values_gets_sequential_colors_from_zero():
    attribution = torch.linspace(0, 2, 48).reshape(6, 8)
    figure = heat_map_over_image(IMAGE, attribution, percentile=100)
    overlay = figure.axes[0].images[1]
    assert overlay.get_clim() == figure.axes[1].get_ylim() == (0, 2)
    assert overlay.get_cmap().name == "YlOrRd"
    opacity = overlay.get_alpha()
    assert opacity.min() == 0 and opacity.max() == 1 and (numpy.diff(opacity.ravel()) > 0).all()
    diverging = heat_map_over_image(IMAGE, attribution, percentile=100, positive_colors=None).axes[0].images[1]
    assert diverging.get_clim() == (-2, 2) and diverging.get_cmap().name == "RdBu_r"
    signed = heat_map_over_image(IMAGE, attribution - 0.1, percentile=100).axes[0].images[1]
    assert signed.get_clim() == pytest.approx((-1.9, 1.9)) and signed.get_cmap().name == "RdBu_r"


def test_a_coarse_grid_is_enlarged_bilinearly():
    grid = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    drawn = heat_map_over_image(torch.rand(8, 8), grid[None, None]).axes[0].images[1].get_array()
    assert drawn.shape == (8, 8)
    steps = numpy.clip((numpy.arange(8) + 0.5) / 4 - 0.5, 0, 1)  # from the centre of the first cell to that of the second
    numpy.testing.assert_allclose(drawn, steps[None, :] + 2 * steps[:, None], atol=1e-12)


def test_a_grid_may_miss_the_proportions_by_less_than_a_cell():
    image = torch.rand(300, 451)  # a network with a stride of 32 sees 10 x 15 cells
    assert heat_map_over_image(image, torch.rand(10, 15)).axes[0].images[1].get_array().shape == (300, 451)


def test_an_enlarged_map_is_not_smoothed_again():
    plain, smooth = (heat_maps_over_image(torch.rand(8, 8), torch.ones(2, 2, 2), smoothing=s).axes[1] for s in (0.0, 2.0))
    assert plain.images[1].get_array().tolist() == smooth.images[1].get_array().tolist() == [[1.0] * 8] * 8


def test_only_ends_that_are_clipped_are_pointed():
    spike = numpy.zeros(48)
    spike[:2] = 5.0, -1e-3
    assert color_range(spike, percentile=98).extend == "max"
    assert color_range(-spike, percentile=98).extend == "min"
    assert color_range(spike, percentile=100).extend == "neither"
    assert color_range(spike, limits=(-1e-4, 1)).extend == "both"


def test_long_titles_are_broken_into_lines():
    title = "a title that is a good deal longer than the picture below it is wide"
    assert "\n" in heat_map_over_image(IMAGE, torch.randn(6, 8), title=title).axes[0].get_title()


@pytest.mark.parametrize(
    ("image", "attribution", "options", "message"),
    [
        (IMAGE, torch.randn(8, 6), {}, r"attribution has shape \[8, 6\], the image 6 x 8 pixels; give \[1, C, 6, 8\]"),
        (IMAGE, torch.randn(2, 3, 6, 8), {}, r"attribution has shape \[2, 3, 6, 8\]"),
        (IMAGE, torch.randn(4, 3), {}, r"attribution has shape \[4, 3\], .* a coarser grid of the same proportions"),
        (IMAGE, torch.randn(12, 16), {}, r"attribution has shape \[12, 16\]"),
        (IMAGE, torch.randn(0, 6, 8), {}, r"attribution has shape \[0, 6, 8\]"),
        (torch.rand(6, 8, 4), torch.randn(6, 8), {}, r"image has shape \[6, 8, 4\]; give \[H, W, 3\]"),
        (IMAGE * 2 - 1, torch.randn(6, 8), {}, "floats between 0 and 1"),
        (IMAGE, torch.full((6, 8), float("nan")), {}, "attribution holds NaN"),
        (IMAGE, torch.randn(6, 8), {"percentile": 0}, "percentile is above 0"),
        (IMAGE, torch.randn(6, 8), {"smoothing": -1.0}, "smoothing is 0 or more"),
        (IMAGE, "cat", {}, "attribution is 'cat'"),
    ],
)
def test_wrong_arguments_raise(image, attribution, options, message):
    with pytest.raises(errors.InputError, match=message):
        heat_map_over_image(image, attribution, **options)


def test_a_grid_needs_one_title_for_each_target():
    with pytest.raises(errors.InputError, match=r"hold 2 targets, titles 1"):
        heat_maps_over_image(IMAGE, torch.randn(2, 6, 8), titles=["one"])
    with pytest.raises(errors.InputError, match="columns is at least 1"):
        heat_maps_over_image(IMAGE, torch.randn(2, 6, 8), columns=0)
