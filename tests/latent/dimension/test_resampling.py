from functools import partial

import pytest
import torch

from tdhook.core.errors import InputError
from tdhook.latent.dimension import (
    confidence_interval,
    participation_ratio,
    per_channel,
    per_position,
    scale_curve,
    two_nn,
)

from .manifolds import cube, torus


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_whole_set_is_the_first_of_the_curve_and_samples_are_disjoint():
    x = torch.randn(2, 90, 4)
    curve = scale_curve(two_nn, x, halvings=2, generator=seeded())
    assert curve.sizes.tolist() == [90, 45, 22] and curve.value.shape == (3, 2)
    torch.testing.assert_close(curve.value[0], two_nn(x).value)
    assert curve.standard_error[0].isnan().all()
    # The mean of the means of disjoint halves is the mean: every point is in one of them.
    means = scale_curve(lambda points: points.mean((-2, -1)), x[:, :88], halvings=3, generator=seeded())
    torch.testing.assert_close(means.value, x[:, :88].mean((1, 2)).expand(4, 2))
    halves = scale_curve(lambda points: points[..., 0, 0], x, halvings=1, generator=seeded())
    assert halves.standard_error[1].shape == (2,) and (halves.standard_error[1] > 0).all()


def test_noise_is_seen_at_small_scales():
    x = cube(3000, 2, 20) + 0.01 * torch.randn(3000, 20)
    curve = scale_curve(two_nn, x, halvings=6, generator=seeded())
    assert curve.value[0] > 10 and curve.value[-1] < 3
    assert (curve.value.diff() < 0).all()


@pytest.mark.parametrize("estimator", [two_nn, partial(two_nn, method="likelihood")])
def test_intervals_cover_the_dimension_as_often_as_they_say(estimator):
    x = torch.stack([torus(240, 2) for _ in range(150)])
    found = confidence_interval(estimator, x, samples=80, confidence=0.8, generator=seeded())
    covered = ((found.low < found.value.mean()) & (found.value.mean() < found.high)).float().mean()
    assert 0.7 < covered < 0.92
    assert found.standard_error.mean() == pytest.approx(found.value.std(), rel=0.25)


def test_a_bootstrap_with_replacement_would_have_been_wrong():
    """Points drawn twice are at distance 0 of each other: without them a sample is smaller, with them it has no ratios."""
    x = torus(400, 2)
    drawn = x[torch.randint(400, (400,))]
    assert (torch.cdist(drawn, drawn).fill_diagonal_(1).amin(1) < 1e-3).float().mean() > 0.5
    found = confidence_interval(two_nn, x, generator=seeded())
    assert found.low < 2 < found.high


def test_draws_come_from_the_generator_and_not_from_chunks():
    x = torch.randn(80, 3)
    state = torch.random.get_rng_state()
    for method in (confidence_interval, scale_curve):
        options = {"samples": 10, "share": 0.3} if method is confidence_interval else {"halvings": 3}
        one = method(two_nn, x, generator=seeded(), **options)
        for chunk_size in (1, 3):
            other = method(two_nn, x, generator=seeded(), chunk_size=chunk_size, **options)
            assert torch.equal(one.value, other.value)
            torch.testing.assert_close(one.standard_error, other.standard_error, equal_nan=True)
        assert not torch.equal(method(two_nn, x, generator=seeded(1), **options).standard_error, one.standard_error)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sites_and_functions_to_tensors():
    sites = {"a.0": torch.randn(60, 3), "a.1": torch.randn(2, 60, 5)}
    curves = scale_curve(participation_ratio, sites, halvings=1)
    assert curves["a.1"].value.shape == (2, 2)
    found = confidence_interval(lambda x: participation_ratio(x).value, sites, samples=5)
    assert found["a.1"].low.shape == (2,) and (found["a.1"].low <= found["a.1"].high).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(scale_curve, halvings=5), "halvings=5 leaves 1 of 60 points"),
        (partial(scale_curve, halvings=-1), "halvings"),
        (partial(scale_curve, generator=0), "generator"),
        (partial(confidence_interval, samples=1), "samples"),
        (partial(confidence_interval, share=0.6), "share is at most 0.5"),
        (partial(confidence_interval, share=0.0), "share is a number above 0"),
        (partial(confidence_interval, share=0.03), "points are 1; let it be at least 3"),
        (partial(confidence_interval, confidence=1.0), "confidence below 1"),
        (partial(confidence_interval, chunk_size=0), "chunk_size"),
    ],
)
def test_bad_options(call, message):
    with pytest.raises(InputError, match=message):
        call(two_nn, torch.randn(60, 3))


def test_sets_of_points():
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float()
    assert torch.equal(per_channel(x)[2, 1], x[1, 2].flatten()) and per_channel(x).shape == (3, 2, 20)
    assert torch.equal(per_position(x)[7, 1], x[1, :, 1, 2]) and per_position(x).shape == (20, 2, 3)
    tokens = torch.randn(2, 7, 3)
    assert torch.equal(per_position(tokens, channel=-1), tokens.transpose(0, 1))
    assert torch.equal(per_channel(tokens, channel=2), tokens.permute(2, 0, 1))
    assert per_channel({"a": x, "b": x[..., 0]})["b"].shape == (3, 2, 4)


@pytest.mark.parametrize("split", [per_channel, per_position])
def test_no_sets_of_points(split):
    with pytest.raises(InputError, match="three or more dimensions"):
        split(torch.randn(3, 4))
    for channel in (0, 3, -3, None):
        with pytest.raises(InputError, match="is no axis of x after the first"):
            split(torch.randn(3, 4, 5), channel=channel)
