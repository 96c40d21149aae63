"""Sensitivity and Lipschitz constants: closed forms, captum, and plain loops."""

from __future__ import annotations

import math
from functools import partial

import captum.attr
import captum.metrics
import pytest
import torch
from torch import nn
from torch.func import vjp, vmap

from tdhook import functionalize
from tdhook.core import errors
from tdhook.metrics import average_sensitivity, local_lipschitz, max_sensitivity

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
METRICS = {"max": max_sensitivity, "average": average_sensitivity, "lipschitz": local_lipschitz}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def gradient(f, params, x, target=1):
    output, pull = vjp(lambda x: f(params, x)[..., target], x)
    return pull(torch.ones_like(output))[0]


def gradients(f, params, x):
    return torch.stack([gradient(f, params, x, t) for t in (0, 2)])


def mlp():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    return model, *functionalize(model)


def value(result):
    return result.value if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", METRICS)
def test_the_gradient_of_a_linear_model_is_robust(name):
    f, params = functionalize(nn.Linear(5, 3).double())
    CLOSE(value(METRICS[name](f, params, draw(4, 5), gradient)), torch.zeros(4).double())


def noise(x, radius, samples, seed=0):
    """What is drawn from a generator, one copy after the other."""
    generator = seeded(seed)
    return torch.stack([radius * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1) for _ in range(samples)])


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 50])
def test_equal_a_loop(chunk_size):
    _, f, params = mlp()
    x = draw(3, 6)
    moves = noise(x, 0.3, 7)
    changes = torch.stack([(gradient(f, params, x + e) - gradient(f, params, x)).norm(dim=-1) for e in moves])
    scale = gradient(f, params, x).norm(dim=-1)
    options = {"radius": 0.3, "samples": 7, "chunk_size": chunk_size}

    def run(metric, **more):
        return metric(f, params, x, gradient, generator=seeded(), **options, **more)

    CLOSE(run(max_sensitivity), (changes / scale).amax(0))
    CLOSE(run(max_sensitivity, relative=False), changes.amax(0))
    average = run(average_sensitivity)
    CLOSE(average.value, (changes / scale).mean(0))
    CLOSE(average.standard_error, (changes / scale).std(0) / math.sqrt(7))
    CLOSE(run(average_sensitivity, relative=False).value, changes.mean(0))
    CLOSE(run(local_lipschitz), (changes / moves.norm(dim=-1)).amax(0))


def test_equals_captum():
    model, f, params = mlp()
    x = draw(3, 6)
    moves = noise(x, 0.3, 7)
    expected = captum.metrics.sensitivity_max(
        lambda inputs, target: captum.attr.Saliency(model).attribute(inputs, target=target, abs=False),
        x.clone().requires_grad_(),
        perturb_func=lambda inputs: (inputs + moves.movedim(1, 0).reshape(-1, 6)).detach().requires_grad_(),
        n_perturb_samples=7,
        target=1,
    )
    CLOSE(max_sensitivity(f, params, x, gradient, radius=0.3, samples=7, generator=seeded()), expected)


def test_the_lipschitz_constant_of_a_quadratic_form_is_an_eigenvalue():
    a = torch.diag(torch.tensor([1.0, 1.0, 4.0]).double())

    def f(params, x):
        return (x @ a * x).sum(-1, keepdim=True)

    got = local_lipschitz(f, {}, draw(2, 3), partial(gradient, target=0), samples=400, generator=seeded())
    assert (got <= 8 + 1e-9).all() and (got > 7.8).all()


def test_an_attribution_of_zeros():
    zero = max_sensitivity(lambda p, x: x, {}, draw(2, 3), lambda f, p, x: 0 * x)
    assert zero.isnan().all()
    step = max_sensitivity(lambda p, x: x, {}, torch.zeros(2, 3), lambda f, p, x: x)
    assert step.isinf().all()
    CLOSE(max_sensitivity(lambda p, x: x, {}, draw(2, 3), lambda f, p, x: 0 * x, relative=False), torch.zeros(2).double())


@pytest.mark.parametrize("name", METRICS)
def test_plural_targets(name):
    _, f, params = mlp()
    x = draw(3, 6)
    got = value(METRICS[name](f, params, x, gradients, batch_dims=2, generator=seeded()))
    assert got.shape == (2, 3)
    for row, target in zip(got, (0, 2)):
        CLOSE(row, value(METRICS[name](f, params, x, partial(gradient, target=target), generator=seeded())))


@pytest.mark.parametrize("name", METRICS)
def test_structures_count_as_one_and_integers_do_not_move(name):
    def method(f, params, inputs):
        assert inputs["index"].dtype == torch.int64
        return {"a": inputs["a"] ** 2, "b": None, "c": inputs["b"] ** 2}

    inputs = {"a": draw(3, 4), "index": torch.arange(3), "b": draw(3, 2, 2, seed=1)}
    got = METRICS[name](None, {}, inputs, method, generator=seeded())
    # the same draws, in the order of the inputs
    generator = seeded()
    moved = [[v + 0.02 * (2 * torch.rand(v.shape, generator=generator, dtype=v.dtype) - 1) for v in (inputs["a"], inputs["b"])]
             for _ in range(10)]  # fmt: skip

    def flat(a, b):
        return torch.cat([a, b.flatten(1)], 1)

    x = flat(inputs["a"], inputs["b"])
    changes = torch.stack([(flat(*m) ** 2 - x**2).norm(dim=-1) for m in moved])
    steps = torch.stack([(flat(*m) - x).norm(dim=-1) for m in moved])
    expected = {"max": (changes / (x**2).norm(dim=-1)).amax(0), "average": (changes / (x**2).norm(dim=-1)).mean(0),
                "lipschitz": (changes / steps).amax(0)}  # fmt: skip
    CLOSE(value(got), expected[name])


@pytest.mark.parametrize("name", METRICS)
def test_under_vmap_over_examples(name):
    _, f, params = mlp()
    x = draw(3, 6)

    def each(x):
        return value(METRICS[name](f, params, x, gradient, batch_dims=0, samples=3))

    got = vmap(each, randomness="different")(x)
    assert got.shape == (3,) and (got > 0).all()


@pytest.mark.compile
@pytest.mark.parametrize("name", METRICS)
def test_compiled(name):
    torch.compiler.reset()
    _, f, params = mlp()
    x = draw(3, 6)

    def run(x):
        return value(METRICS[name](f, params, x, gradient, samples=3))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
        torch.manual_seed(0)
        CLOSE(compiled, run(x))


@pytest.mark.parametrize("name", METRICS)
def test_the_generator_decides_and_nothing_else_moves(name):
    _, f, params = mlp()
    x, state = draw(3, 6), torch.get_rng_state()
    copy = x.clone()
    first, again, other = (value(METRICS[name](f, params, x, gradient, generator=seeded(s))) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, copy)


def test_half_precision_gives_float32():
    """Steps are those after rounding: drawn ones of 0.001 would vanish next to 3 in bfloat16."""
    x = torch.full((2, 4), 3.0).bfloat16()
    got = local_lipschitz(None, {}, x, lambda f, p, x: 2 * x, radius=0.1)
    assert got.dtype == torch.float32
    CLOSE(got, torch.full((2,), 2.0))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("x", "method", "options", "message"),
    [
        (draw(2, 3), "saliency", {}, "method is 'saliency'"),
        (draw(2, 3).long(), gradient, {}, "no floating-point tensor"),
        (draw(2, 3), gradient, {"radius": -0.1}, "radius is a number"),
        (draw(2, 3), gradient, {"samples": 0}, "samples is an integer of at least 1, got 0"),
        (draw(2, 3), gradient, {"chunk_size": 0}, "chunk_size is an integer"),
        (draw(2, 3), gradient, {"generator": 0}, "generator is 0"),
        (draw(2, 3), lambda f, p, x: x, {"batch_dims": -1}, "batch_dims is 0, 1 or 2, got -1"),
        (draw(2), lambda f, p, x: x, {"batch_dims": 2}, r"what method returned holds .* \[2\]"),
        (draw(2, 3), lambda f, p, x: "map", {}, "what method returned holds 'map'"),
    ],
)
def test_bad_input(name, x, method, options, message):
    with pytest.raises(errors.InputError, match=message):
        METRICS[name](lambda params, x: x, {}, x, method, **options)


def test_a_ball_without_a_radius_has_no_ratio():
    with pytest.raises(errors.InputError, match="radius is a number above 0, got 0"):
        local_lipschitz(None, {}, draw(2, 3), lambda f, p, x: x, radius=0)
