"""ROAD and its imputation, against the equations written out pixel by pixel."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import vmap

from tdhook import functionalize
from tdhook.core import errors
from tdhook.metrics import linear_imputation, pixel_flipping, road

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def written_out(image, removed):
    """One image [H, W]: an equation for each removed pixel."""
    height, width = image.shape
    pixels = [(i, j) for i in range(height) for j in range(width) if removed[i, j]]
    matrix, right = torch.zeros(len(pixels), len(pixels)).double(), torch.zeros(len(pixels)).double()
    for row, (i, j) in enumerate(pixels):
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                p, q = i + di, j + dj
                if (di, dj) == (0, 0) or not (0 <= p < height and 0 <= q < width):
                    continue
                k = 1 / 12 if di and dj else 1 / 6
                matrix[row, row] += k
                if removed[p, q]:
                    matrix[row, pixels.index((p, q))] -= k
                else:
                    right[row] += k * image[p, q]
    result = image.clone()
    result[removed] = torch.linalg.solve(matrix, right)
    return result


@pytest.mark.parametrize("solver", ["dense", "conjugate_gradient", "auto"])
def test_imputation_equals_the_equations(solver):
    images = draw(2, 3, 2, 6, 5)
    removed = torch.rand(2, 3, 6, 5, generator=seeded()) < torch.tensor([0.3, 0.6, 0.9]).reshape(3, 1, 1)
    got = linear_imputation(images, removed, solver=solver)
    for i in range(2):
        for j in range(3):
            for c in range(2):
                CLOSE(got[i, j, c], written_out(images[i, j, c], removed[i, j]))
    kept = ~removed[:, :, None].expand_as(images)
    assert torch.equal(got[kept], images[kept])


def test_conjugate_gradients_converge_from_one_pixel_that_stays():
    """The slowest case: everything is far from what is known; the solution is its value everywhere."""
    image = draw(1, 48, 80)
    removed = torch.ones(48, 80, dtype=torch.bool)
    removed[0, 0] = False
    got = linear_imputation(image, removed, solver="conjugate_gradient")
    torch.testing.assert_close(got, image[:, :1, :1].expand(1, 48, 80), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(
        linear_imputation(image.float(), removed), image[:, :1, :1].expand(1, 48, 80).float(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("solver", ["dense", "conjugate_gradient"])
def test_nothing_removed_and_nothing_left(solver):
    image = draw(2, 1, 4, 4)
    removed = torch.zeros(2, 4, 4, dtype=torch.bool)
    removed[1] = True
    got = linear_imputation(image, removed, solver=solver)
    assert torch.equal(got[0], image[0]) and got[1].isnan().all()


@pytest.mark.parametrize("order", ["morf", "lerf"])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_the_curve_is_the_model_of_the_imputed_images(order, chunk_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)).double()
    f, params = functionalize(model)
    x, phi = draw(3, 2, 5, 5), draw(2, 3, 2, 5, 5, seed=1)
    options = {"percentiles": (20, 50), "order": order, "chunk_size": chunk_size}
    got = road(f, params, x, phi, targets=[3, 1], noise=0, **options)
    assert got.values.shape == (2, 3, 3) and got.area.shape == (2, 3)
    CLOSE(got.fractions, torch.tensor([0, 5, 13]).double() / 25)  # 12.5 pixels are rounded up
    for t, target in enumerate((3, 1)):
        CLOSE(got.values[t, :, 0], model(x)[:, target].detach())
        for b in range(3):
            ranked = phi[t, b].sum(0).flatten().argsort(descending=order == "morf")
            removed = torch.zeros(25, dtype=torch.bool)
            removed[ranked[:13]] = True
            imputed = torch.stack([written_out(channel, removed.reshape(5, 5)) for channel in x[b]])
            CLOSE(got.values[t, b, 2], model(imputed[None])[0, target].detach())
    noisy = road(f, params, x, phi, targets=[3, 1], generator=seeded(), **options)
    again = road(f, params, x, phi[1], targets=1, generator=seeded(), **options)
    CLOSE(noisy.values[1], again.values)
    assert torch.equal(noisy.values[..., 0], got.values[..., 0]) and (noisy.values != got.values).any()


def test_the_noise_is_on_what_was_imputed():
    def f(params, x):
        return x.var((1, 2, 3))

    phi = draw(1, 1, 40, 40, seed=1)
    got = road(f, {}, torch.ones(1, 3, 40, 40).double(), phi, percentiles=(25, 75), noise=0.1, generator=seeded())
    torch.testing.assert_close(got.values[0], torch.tensor([0, 0.0025, 0.0075]).double(), rtol=0.1, atol=1e-6)


def test_a_smooth_image_is_restored_where_a_baseline_would_tear_it():
    ramp = torch.linspace(0, 1, 12, dtype=torch.float64).expand(1, 1, 12, 12)

    def f(params, x):
        return (x - ramp).square().mean((1, 2, 3))

    phi = torch.zeros(1, 1, 12, 12).double()
    phi[..., 3:9, 3:9] = 1
    kept = road(f, {}, ramp, phi, percentiles=(25,), noise=0)
    assert kept.values[0, 1] < 1e-20 < 1e-2 < pixel_flipping(f, {}, ramp, phi, steps=4).values[0, 1]


def test_an_order_of_nothing_is_not_a_number():
    phi = draw(2, 1, 4, 4)
    phi[1] = 0
    got = road(lambda params, x: x.sum((1, 2, 3)), {}, draw(2, 2, 4, 4), phi)
    assert got.values[1].isnan().all() and got.values[0].isfinite().all()


def small():
    torch.manual_seed(0)
    return functionalize(nn.Sequential(nn.Flatten(-3), nn.Linear(16, 2)).double())


@pytest.mark.parametrize("solver", ["dense", "conjugate_gradient"])
def test_under_vmap_over_examples(solver):
    f, params = small()
    x, phi = draw(3, 1, 4, 4), draw(3, 1, 4, 4, seed=1)
    run = partial(road, f, params, targets=1, noise=0, solver=solver)
    CLOSE(vmap(lambda x, phi: run(x, phi).values)(x, phi), run(x, phi).values)


@pytest.mark.compile
def test_compiled():
    torch.compiler.reset()
    f, params = small()
    x, phi = draw(3, 1, 4, 4), draw(3, 1, 4, 4, seed=1)

    def run(x, phi):
        return road(f, params, x, phi, targets=1, noise=0).values

    CLOSE(torch.compile(run, backend="aot_eager", fullgraph=True)(x, phi), run(x, phi))
    removed = torch.eye(3, dtype=torch.bool)
    iterate = partial(linear_imputation, solver="conjugate_gradient")
    CLOSE(
        torch.compile(iterate, backend="aot_eager", fullgraph=True)(x[0, :, :3, :3], removed), iterate(x[0, :, :3, :3], removed)
    )


def test_named_images_and_half_precision():
    def f(params, inputs):
        return inputs["image"].sum((1, 2, 3))

    x, phi = draw(2, 1, 4, 4), draw(2, 1, 4, 4, seed=1)
    got = road(f, {}, {"image": x, "index": torch.arange(2)}, {"image": phi, "index": None}, noise=0)
    CLOSE(got.values, road(lambda params, x: x.sum((1, 2, 3)), {}, x, phi, noise=0).values)
    half = road(f, {}, {"image": x.bfloat16()}, {"image": phi.bfloat16()}, noise=0)
    assert half.values.dtype == torch.float32
    torch.testing.assert_close(half.values.double(), got.values, rtol=0.05, atol=0.2)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (draw(2, 16), {}, r"inputs holds a float64 tensor of shape \[2, 16\]; road takes one"),
        (draw(2, 4, 4), {}, "road takes images"),
        ((draw(2, 1, 4, 4), draw(2, 1, 4, 4)), {}, "road takes one floating-point tensor"),
        (draw(2, 1, 4, 4), {"percentiles": ()}, r"percentiles is \(\)"),
        (draw(2, 1, 4, 4), {"percentiles": (10, 100)}, "above 0 and below 100"),
        (draw(2, 1, 4, 4), {"percentiles": (20, 10)}, "in increasing order"),
        (draw(2, 1, 4, 4), {"order": "MoRF"}, "order is 'MoRF'"),
        (draw(2, 1, 4, 4), {"noise": -1}, "noise is a number of at least 0"),
        (draw(2, 1, 4, 4), {"solver": "sparse"}, "solver is 'sparse'"),
        (draw(2, 1, 4, 4), {"chunk_size": 0}, "chunk_size is an integer"),
        (draw(2, 1, 4, 4), {"generator": 1}, "generator is 1"),
    ],
)
def test_bad_input(x, options, message):
    def f(params, x):
        return x.flatten(1).sum(-1)

    with pytest.raises(errors.InputError, match=message):
        road(f, {}, x, x, **options)


@pytest.mark.parametrize(
    ("images", "removed", "message"),
    [
        (torch.ones(1, 4, 4).long(), torch.ones(4, 4).bool(), "images is a int64"),
        (torch.ones(4, 4), torch.ones(4, 4).bool(), r"images is .* give a floating-point tensor \[\*lead, C, H, W\]"),
        (torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4).bool(), r"removed is .* shape \[2, 4, 4\]"),
        (torch.ones(2, 1, 4, 4), torch.ones(2, 4, 4), "removed is a float32"),
    ],
)
def test_bad_images(images, removed, message):
    with pytest.raises(errors.InputError, match=message):
        linear_imputation(images, removed)
