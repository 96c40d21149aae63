"""Paths from baselines to inputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import jvp, vmap

from tdhook import functionalize
from tdhook.attribution.integrated_gradients import convergence_delta, integrated_gradients
from tdhook.attribution.paths import gaussian_blur, straight
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)


def cnn(act=nn.GELU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), act(), nn.Flatten(-3), nn.Linear(3 * 36, 4)).double()


def test_the_blur_of_a_point_is_a_gaussian():
    image = torch.zeros(1, 41, 41).double()
    image[0, 20, 20] = 1
    blurred = gaussian_blur(3.0)(image, image, torch.tensor(0.0))[0]
    places = torch.arange(41).double() - 20
    profile = (-places.square() / 18).exp()
    CLOSE(blurred, torch.outer(profile, profile) / profile.sum() ** 2, rtol=1e-4, atol=1e-7)


def test_the_blur_ends_at_the_image_and_keeps_constants():
    image = torch.randn(2, 3, 8, 9).double()
    curve = gaussian_blur(5.0)
    CLOSE(curve(image, image, torch.tensor(1.0)), image)
    constant = torch.full((1, 8, 9), 0.7).double()
    CLOSE(curve(constant, constant, torch.tensor(0.3)), constant)


def test_the_blur_along_one_axis():
    signal = torch.randn(2, 3, 16).double()
    blurred = gaussian_blur(2.0, dims=(-1,))(signal, signal, torch.tensor(0.5))
    each = torch.stack([gaussian_blur(2.0, dims=(-1,))(s, s, torch.tensor(0.5)) for s in signal.reshape(6, 16)[:, None]])
    CLOSE(blurred.reshape(6, 16), each[:, 0])


def test_the_blur_moves_smoothly_to_its_end():
    image = torch.randn(1, 8, 8).double()
    curve = partial(gaussian_blur(4.0), image, image)
    for alpha in (0.0, 0.4, 0.9, 1.0):
        at = torch.tensor(alpha).double()
        _, velocity = jvp(curve, (at,), (torch.ones_like(at),))
        assert velocity.isfinite().all()
        h = 1e-5 if alpha < 1 else -1e-5
        torch.testing.assert_close(velocity, (curve(at + h) - curve(at)) / h, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chosen", [1, [0, 3]])
def test_completeness_along_the_blur(chosen):
    f, params = functionalize(cnn())
    x = torch.randn(3, 2, 8, 8).double()
    got = integrated_gradients(f, params, x, targets=chosen, path=gaussian_blur(3.0), steps=200, chunk_size=50)
    delta = convergence_delta(f, params, x, got, targets=chosen, path=gaussian_blur(3.0))
    assert delta.abs().max() < 1e-4
    assert convergence_delta(f, params, x, got, targets=chosen).abs().max() > 1e-2  # zero is not where this path begins


def test_a_caller_s_path_by_the_chain_rule():
    """Along alpha^2 the straight line is walked at another speed: the integral is the same."""
    f, params = functionalize(cnn())
    x = torch.randn(1, 2, 8, 8).double()
    got = integrated_gradients(f, params, x, targets=2, path=lambda a, b, alpha: a + alpha**2 * (b - a), steps=60)
    CLOSE(got, integrated_gradients(f, params, x, targets=2, steps=60), rtol=1e-6, atol=1e-8)


def test_a_path_around_a_corner():
    """First one input, then the other: attributions are the differences of F along the two legs."""

    class Product(nn.Module):
        def forward(self, x):
            return x[..., 0] * x[..., 1] + x[..., 0]

    f, params = functionalize(Product())
    x = torch.tensor([[2.0, 3.0]]).double()

    def corner(start, end, alpha):
        legs = torch.stack([(2 * alpha).clamp(max=1), (2 * alpha - 1).clamp(min=0)], -1)
        return start + legs.reshape(-1, 2).squeeze(0) * (end - start)

    got = integrated_gradients(f, params, x, path=corner, steps=1000, quadrature="midpoint")
    CLOSE(got, torch.tensor([[2.0, 6.0]]).double())


def test_chunks_vmap_and_stacked_targets_change_nothing_along_the_blur():
    f, params = functionalize(cnn())
    x = torch.randn(3, 2, 8, 8).double()
    method = partial(integrated_gradients, f, params, targets=[0, 3], path=gaussian_blur(3.0), steps=10)
    whole = method(x)
    CLOSE(method(x, chunk_size=3), whole)
    CLOSE(vmap(method)(x[:, None])[:, :, 0].movedim(1, 0), whole)
    single = integrated_gradients(f, params, x, targets=3, path=gaussian_blur(3.0), steps=10)
    CLOSE(whole[1], single)


@pytest.mark.compile
def test_compiled_along_the_blur():
    f, params = functionalize(cnn())
    x = torch.randn(2, 2, 8, 8).double()
    method = partial(integrated_gradients, f, targets=[0, 3], path=gaussian_blur(3.0), steps=6)
    compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
    CLOSE(compiled(params, x), method(params, x))


def test_without_multiplication_the_velocity_is_left_out():
    f, params = functionalize(nn.Linear(3, 1).double())
    x = torch.randn(2, 3).double()
    curved = partial(integrated_gradients, f, params, x, targets=0, path=lambda a, b, t: a + t**3 * (b - a))
    CLOSE(curved(steps=30, multiply_by_inputs=False), params["weight"].expand(2, 3))
    CLOSE(curved(steps=30), params["weight"] * x)


def test_straight_takes_one_alpha_for_each_example():
    start, end = torch.zeros(2, 3), torch.ones(2, 3)
    CLOSE(straight(start, end, torch.tensor([[0.25], [0.5]])), torch.tensor([[0.25] * 3, [0.5] * 3]))


@pytest.mark.parametrize("sigma", [0.0, -1.0, True, "2"])
def test_a_bad_sigma(sigma):
    with pytest.raises(errors.InputError, match="max_sigma="):
        gaussian_blur(sigma)


def test_a_path_that_is_no_function():
    f, params = functionalize(nn.Linear(3, 1))
    with pytest.raises(errors.InputError, match=r"path is 'straight'.*give a function \(start, end, alpha\)"):
        integrated_gradients(f, params, torch.randn(1, 3), targets=0, path="straight")
