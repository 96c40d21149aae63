"""Activation maximisation against closed forms and plain loops."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

import tdhook
from tdhook import functionalize, targets
from tdhook.attribution.activation_maximization import activation_maximization, l2_norm, total_variation
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def data(*shape, seed=1):
    torch.manual_seed(seed)
    return torch.randn(*shape).double()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loop(score, x, steps, rate, update):
    """One target, one step at a time."""
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(score(x).sum(), x)
        way = {"gradient": g, "sign": g.sign(), "normalized": g / g.norm(dim=1, keepdim=True)}[update]
        x = x + rate * way
    return x.detach()


@pytest.mark.parametrize("update", ["gradient", "sign", "normalized"])
def test_equals_a_plain_loop(update):
    model = mlp()
    f, params = functionalize(model)
    x = data(3, 6)
    best, values = activation_maximization(f, params, x, targets=[0, 3], steps=5, learning_rate=0.2, update=update)
    assert best.shape == (2, 3, 6) and values.shape == (2, 3)
    for row, value, t in zip(best, values, (0, 3)):
        CLOSE(row, loop(lambda p, t=t: model(p)[:, t], x, 5, 0.2, update))
        CLOSE(value, model(row)[:, t].detach())


def test_finds_the_top_of_a_hill():
    top = torch.tensor([1.0, -2.0]).double()
    f = lambda _, x: -(x - top).square().sum(-1)  # noqa: E731
    best, values = activation_maximization(f, {}, data(2, 2), learning_rate=0.1, update="gradient", steps=200)
    CLOSE(best, top.expand(2, 2), atol=1e-9)
    assert values.shape == (2,) and values.abs().max() < 1e-12


def test_a_unit_inside_the_model():
    """In a box a linear unit is largest in the corner that its weights point to."""
    f, params = functionalize(mlp())
    head = tdhook.stop_at(f, "0")
    best, values = activation_maximization(
        head, params, torch.zeros(1, 6).double(), targets=[2, 5], bounds=(-1.0, 1.0), steps=80
    )
    weight, bias = params["0", "weight"][[2, 5]], params["0", "bias"][[2, 5]]
    CLOSE(best[:, 0], weight.sign())
    CLOSE(values[:, 0], weight.abs().sum(1) + bias)


def test_at_a_site_the_values_there_move():
    model = mlp()
    f, params = functionalize(model)
    x = data(2, 6)
    best, values = activation_maximization(f, params, x, targets=[0, 1], at="1", steps=4)
    start = model[:2](x).detach()
    assert list(best.keys()) == ["1"]
    weight = params["2", "weight"]
    CLOSE(best["1"][1] - start, (4 * weight[1] / weight[1].norm()).expand(2, 8))
    CLOSE(values, f(params, x)[:, :2].T + 4 * weight[:2].norm(dim=1)[:, None])


def test_regularizers_are_subtracted():
    """The top of w x - |x|^2 / 2 is w."""
    weight = torch.tensor([1.0, -2.0, 0.5]).double()
    half_square = lambda x: x.square().sum(-1) / 2  # noqa: E731
    options = {"regularizers": [half_square], "learning_rate": 0.5, "update": "gradient", "steps": 60}
    best, values = activation_maximization(lambda w, x: x @ w, weight, torch.zeros(2, 3).double(), **options)
    CLOSE(best, weight.expand(2, 3), atol=1e-10)
    CLOSE(values, weight.square().sum().expand(2), atol=1e-9)


def test_transform_comes_before_the_model_and_project_after_each_step():
    f, params = functionalize(mlp())
    x = data(2, 6)
    run = partial(activation_maximization, steps=3, targets=[0, 1])
    best, values = run(f, params, x, transform=lambda x: x.tanh())
    inside = run(lambda p, x: f(p, x.tanh()), params, x)
    CLOSE(best, inside.inputs)
    CLOSE(values, inside.values)
    sphere = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    CLOSE(run(f, params, x, project=sphere).inputs.norm(dim=-1), torch.ones(2, 2).double())
    boxed = run(f, params, x, project=sphere, bounds=(None, 0.1)).inputs
    assert boxed.max() == 0.1 and boxed.min() < -0.1


def test_the_regularizers_given():
    """Hand-counted, with their gradients at zero."""
    x = torch.tensor([[[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]], [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]])
    assert total_variation(x).tolist() == [3 + 4, 0]
    assert total_variation(x[:, None].expand(2, 4, 2, 3)).tolist() == [28, 0]
    assert l2_norm(x[:, 0, 1:]).tolist() == pytest.approx([10**0.5, 8**0.5])
    for function in (total_variation, l2_norm):
        zero = torch.zeros(2, 3, 3, requires_grad=True)
        (g,) = torch.autograd.grad(function(zero).sum(), zero)
        assert g.abs().max() == 0
        with pytest.raises(errors.InputError, match=f"{function.__name__} takes a tensor"):
            function({"a": x})


def test_total_variation_smooths():
    torch.manual_seed(0)
    f, params = functionalize(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(-3), nn.Linear(32, 2)).double())
    run = partial(activation_maximization, f, params, data(1, 1, 6, 6), targets=0, steps=30, learning_rate=0.3)
    plain, smooth = run(), run(regularizers=[lambda x: 0.2 * total_variation(x)])
    assert total_variation(smooth.inputs[0]).sum() < 0.5 * total_variation(plain.inputs[0]).sum()
    assert smooth.values < plain.values


def test_jitter_rolls_what_the_model_sees():
    """The gradient of one pixel of the model reaches every pixel that was rolled there, and the values are without jitter."""
    f = lambda _, x: x[:, 0, 2, 2]  # noqa: E731
    x = torch.zeros(1, 1, 5, 5).double()
    run = partial(activation_maximization, f, {}, x, update="gradient", steps=40, targets=[lambda out: out] * 2)
    best, values = run(jitter=1, generator=seeded())
    assert (best[0, 0, 0, 1:4, 1:4] > 0).all() and best[0].sum() == 40 == best[0, 0, 0, 1:4, 1:4].sum()
    CLOSE(values, best[:, :, 0, 2, 2])
    state = torch.get_rng_state()
    CLOSE(run(jitter=1, generator=seeded(), chunk_size=1).inputs, best)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(run(jitter=1, generator=seeded(1)).inputs, best)


def test_jitter_is_a_roll():
    x = data(1, 2, 4, 5)
    f, seen = lambda _, x: (x * weight).sum((1, 2, 3)), data(1, 2, 4, 5, seed=2)
    weight = seen
    best, _ = activation_maximization(f, {}, x, update="gradient", steps=1, jitter=2, generator=seeded())
    rows, columns = torch.randint(-2, 3, (1, 2), generator=seeded())[0].tolist()
    CLOSE(best - x, torch.roll(weight, (-rows, -columns), (-2, -1)))


def test_a_gradient_of_zero_stays_where_it_is():
    x = data(2, 3)
    for update in ("gradient", "sign", "normalized"):
        best, _ = activation_maximization(lambda _, x: 0 * x.sum(-1), {}, x, update=update, steps=2)
        assert torch.equal(best, x)


def test_several_inputs_share_a_norm_and_others_stay():
    a, b = data(2, 3), data(2, 2)
    inputs = {"a": a, "b": b, "n": torch.tensor([1, 2])}
    f = lambda _, i: (3 * i["a"][:, 0] + 4 * i["b"][:, 1]) * i["n"]  # noqa: E731
    best, values = activation_maximization(f, {}, inputs, steps=2)
    assert torch.equal(best["n"], inputs["n"])
    CLOSE(best["a"][:, 0] - a[:, 0], torch.full((2,), 1.2, dtype=torch.float64))
    CLOSE(best["b"][:, 1] - b[:, 1], torch.full((2,), 1.6, dtype=torch.float64))
    CLOSE(values, f({}, best))
    packed = TensorDict(inputs, [2])
    many = activation_maximization(f, {}, packed, steps=2, targets=[lambda out: out, lambda out: -out])
    assert many.inputs.batch_size == (2, 2) and many.inputs["n"].shape == (2, 2)
    CLOSE(many.inputs[0]["a"], best["a"])
    CLOSE(many.values[1], -f({}, many.inputs[1]))
    options = {"regularizers": [lambda i: l2_norm(i["a"])], "project": lambda i: i, "transform": lambda i: i}
    assert activation_maximization(f, {}, packed, steps=2, **options).inputs.batch_size == (2,)


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_change_nothing_and_vmap_is_the_loop(chunk_size):
    f, params = functionalize(mlp())
    x = data(3, 6)
    run = partial(activation_maximization, f, params, targets=targets.every(), steps=3)
    for a, b in zip(run(x, chunk_size=chunk_size), run(x)):
        CLOSE(a, b)
    for a, b in zip(vmap(run)(x), run(x)):
        CLOSE(a, b.transpose(0, 1))


@pytest.mark.compile
def test_compiled_equals_eager():
    torch._dynamo.reset()
    f, params = functionalize(nn.Sequential(nn.Flatten(-2), *mlp()))
    run = partial(
        activation_maximization, targets=[0, 1], steps=3, bounds=(-2.0, 2.0), jitter=1, regularizers=[total_variation, l2_norm]
    )
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        x = data(3, 2, 3, seed=seed)
        torch.manual_seed(0)
        got = compiled(f, params, x)
        torch.manual_seed(0)
        for a, b in zip(got, run(f, params, x)):
            CLOSE(a, b)


def test_the_dtype_is_kept_and_nothing_of_the_caller_is_changed():
    f, params = functionalize(mlp().to(torch.bfloat16))
    x = data(1, 6).to(torch.bfloat16)
    before, state = x.clone(), torch.get_rng_state()
    best, values = activation_maximization(f, params, x, targets=0, steps=3)
    assert best.dtype == values.dtype == x.dtype and torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, errors.InputError, "steps is an integer of at least 1"),
        ({"learning_rate": -1}, errors.InputError, "learning_rate is a number of at least 0, got -1"),
        ({"update": "adam"}, errors.InputError, "update='adam' is unknown"),
        ({"bounds": (0.0, 1.0, 2.0)}, errors.InputError, "bounds is a pair"),
        ({"bounds": (2, 1)}, errors.InputError, "lowest above its highest"),
        ({"jitter": -1}, errors.InputError, "jitter is an integer of at least 0"),
        ({"jitter": 1}, errors.InputError, r"jitter=1 rolls the last two axes .* shape \[3, 6\]"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None"),
        ({"generator": 3}, errors.InputError, "generator is 3"),
        ({"regularizers": l2_norm}, errors.InputError, "regularizers is a sequence of functions"),
        ({"regularizers": None}, errors.InputError, "regularizers is a sequence of functions"),
        ({"regularizers": [0.1]}, errors.InputError, "regularizers is a sequence of functions"),
        (
            {"regularizers": [lambda x: x.sum()]},
            errors.InputError,
            r"regularizers\[0\] returned .* return a tensor of shape \[3\]",
        ),
        ({"transform": lambda x: x[:, :2]}, errors.InputError, r"what transform returned is .*\[3, 2\] for .*\[3, 6\]"),
        ({"project": lambda x: x[:2]}, errors.InputError, "what project returned is"),
        ({"transform": "tanh"}, errors.InputError, "transform is 'tanh' of type str; give a function"),
        ({"project": 3}, errors.InputError, "project is 3 of type int; give a function"),
        ({"targets": 9}, errors.TargetError, "index=9 is out of range"),
        ({"at": "9"}, errors.SiteError, "the model has no module '9'"),
    ],
)
def test_bad_input(options, error, message):
    f, params = functionalize(mlp())
    with pytest.raises(error, match=message):
        activation_maximization(f, params, data(3, 6), **{"targets": 0, **options})


def test_gradients_cannot_be_asked_for_without_grad_mode():
    with torch.no_grad(), pytest.raises(errors.GradientError, match="activation_maximization needs gradients"):
        activation_maximization(lambda _, x: x.sum(-1), {}, torch.ones(1, 2))
