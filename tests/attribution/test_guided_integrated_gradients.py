"""Guided integrated gradients against a plain loop over features, closed forms, and its limits."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

from tdhook import functionalize, targets
from tdhook.attribution.guided_integrated_gradients import guided_integrated_gradients
from tdhook.attribution.integrated_gradients import integrated_gradients
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def mlp(act=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 8), act(), nn.Linear(8, 5)).double()


def data(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape).double(), torch.randn(*shape).double()


def loop(score, x, baseline, steps, fraction, max_dist):
    """One example and one target, in the coordinates of the inputs, with as many rounds as each step needs."""
    count = len(x)
    total = float((x - baseline).abs().sum())
    at, result = baseline.clone(), torch.zeros_like(x)
    for step in range(steps):
        alpha = (step + 1) / steps
        nearest = baseline + max(alpha - max_dist, 0.0) * (x - baseline)
        farthest = baseline + min(alpha + max_dist, 1.0) * (x - baseline)
        point = at.clone().requires_grad_()
        (slope,) = torch.autograd.grad(score(point), point)
        before = at.clone()
        for i in range(count):  # who lags behind catches up
            if abs(x[i] - at[i]) > abs(x[i] - nearest[i]):
                at[i] = nearest[i]
        moved = [abs(float(x[i] - at[i])) <= abs(float(x[i] - farthest[i])) + 1e-14 for i in range(count)]
        while (excess := float((x - at).abs().sum()) - total * (1 - alpha)) > 1e-13:
            waiting = sorted(abs(float(slope[i])) for i in range(count) if not moved[i])
            if not waiting:
                break
            limit = waiting[min(math.floor(fraction * (count - 1)), len(waiting) - 1)]
            group = [i for i in range(count) if not moved[i] and abs(float(slope[i])) <= limit]
            possible = sum(abs(float(farthest[i] - at[i])) for i in group)
            part = min(1.0, excess / possible)
            for i in group:
                at[i] = at[i] + part * (farthest[i] - at[i])
                moved[i] = True
        result += slope * (at - before)
    return result


@pytest.mark.parametrize(("fraction", "max_dist"), [(0.25, 0.02), (0.25, 0.2), (0.1, 1.0), (0.5, 0.05), (1.0, 0.3), (0.9, 1.0)])
@pytest.mark.parametrize("steps", [1, 13])
def test_equals_a_loop_over_features(fraction, max_dist, steps):
    model = mlp()
    f, params = functionalize(model)
    x, baseline = data(3, 7)
    options = {"steps": steps, "fraction": fraction, "max_dist": max_dist}
    got = guided_integrated_gradients(f, params, x, targets=[0, 4], baselines=baseline, **options)
    for row, target in zip(got, (0, 4)):
        expected = [loop(lambda p, t=target: model(p)[t], *pair, **options) for pair in zip(x, baseline)]
        CLOSE(row, torch.stack(expected), rtol=1e-8, atol=1e-10)


def test_features_with_small_gradients_move_first():
    """F = 3 a + b^2 / 2 without a limit: b goes first, all the way; its left sums have its gradient before each step."""
    x = torch.ones(1, 2).double()

    def f(_, x):
        return 3 * x[:, 0] + x[:, 1].square() / 2

    got = guided_integrated_gradients(f, {}, x, steps=4, fraction=0.25, max_dist=1.0)
    # two steps of b, from 0 to 1/2 to 1, then two of a
    CLOSE(got, torch.tensor([[3.0, 0.25]]).double())


def test_the_path_matters_where_features_interact():
    """F = a b, with a moved first where its gradient b is smaller: then b carries all of F. Integrated gradients: half each."""
    x = torch.ones(1, 2).double()
    f = lambda _, x: x[:, 0] * x[:, 1] + 1e-3 * x[:, 1]  # noqa: E731
    got = guided_integrated_gradients(f, {}, x, steps=1000, max_dist=1.0)
    CLOSE(got, torch.tensor([[0.0, 1.001]]).double(), rtol=0, atol=5e-3)


@pytest.mark.parametrize("options", [{"fraction": 1.0}, {"max_dist": 0.0}, {"fraction": 1, "max_dist": 1}])
def test_the_straight_line_is_integrated_gradients(options):
    f, params = functionalize(mlp())
    x, baseline = data(3, 7)
    got = guided_integrated_gradients(f, params, x, targets=[1, 2], baselines=baseline, steps=20, **options)
    straight = {"targets": [1, 2], "baselines": baseline, "steps": 20, "quadrature": "riemann_left"}
    CLOSE(got, integrated_gradients(f, params, x, **straight))


def test_completeness_is_approached_with_more_steps():
    f, params = functionalize(mlp())
    x, baseline = data(3, 7)
    difference = (f(params, x) - f(params, baseline))[:, [0, 1]].T
    off = []
    for steps in (50, 100, 200):
        got = guided_integrated_gradients(f, params, x, targets=[0, 1], baselines=baseline, steps=steps)
        off.append((got.sum(-1) - difference).abs().max())
    assert off[2] < 0.02 and off[1] < 0.7 * off[0] and off[2] < 0.7 * off[1]


def test_equal_features_are_treated_equally():
    """Ties of the gradient, zeros above all, move together."""
    x = torch.ones(2, 6).double()
    got = guided_integrated_gradients(lambda _, x: x[:, :4].sum(-1).relu().square(), {}, x, steps=9)
    CLOSE(got[:, :4], got[:, :1].expand(2, 4))
    assert got[:, 4:].abs().max() == 0


def test_what_does_not_differ_from_the_baseline_gets_nothing():
    f, params = functionalize(mlp())
    x, _ = data(2, 7)
    baseline = torch.where(torch.arange(7) < 3, x, torch.zeros_like(x))
    got = guided_integrated_gradients(f, params, x, targets=0, baselines=baseline, steps=20)
    assert got[:, :3].abs().max() == 0 and got[:, 3:].abs().min() > 0
    assert guided_integrated_gradients(f, params, x, targets=0, baselines=x, steps=3).abs().max() == 0


def test_several_inputs_are_ranked_together():
    f, params = functionalize(mlp())
    x, baseline = data(2, 7)
    joined = guided_integrated_gradients(f, params, x, targets=[0, 3], baselines=baseline, steps=15)
    parts = lambda _, i: f(params, torch.cat([i["b"].flatten(1), i["a"]], -1)[:, [6, 0, 1, 2, 3, 4, 5]])  # noqa: E731
    split = lambda t: {"a": t[:, :1], "b": t[:, 1:].reshape(2, 2, 3), "n": torch.arange(2)}  # noqa: E731
    run = partial(guided_integrated_gradients, parts, {}, targets=[0, 3], steps=15)
    got = run(split(x), baselines={**split(baseline), "n": None})
    assert got["n"] is None
    CLOSE(torch.cat([got["a"], got["b"].flatten(2)], -1), joined)
    packed = run(TensorDict(split(x), [2]), baselines=TensorDict(split(baseline), [2]))
    assert packed.batch_size == (2, 2)
    CLOSE(packed["b"], got["b"])


def test_at_a_site_is_that_of_the_tail():
    model = mlp()
    f, params = functionalize(model)
    x, _ = data(2, 7)
    got = guided_integrated_gradients(f, params, x, targets=1, at="0", steps=10)["0"]
    tail = guided_integrated_gradients(
        lambda _, h: model[1:](h), {}, model[0](x).detach(), targets=1, baselines=model[0](0 * x).detach(), steps=10
    )
    CLOSE(got, tail)


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_chunks_change_nothing(chunk_size):
    f, params = functionalize(mlp())
    x, _ = data(3, 7)
    run = partial(guided_integrated_gradients, f, params, x, targets=targets.every(), steps=6)
    CLOSE(run(chunk_size=chunk_size), run())


def test_examples_do_not_depend_on_each_other_and_vmap_is_the_loop():
    f, params = functionalize(mlp())
    x, _ = data(3, 7)
    run = partial(guided_integrated_gradients, f, params, targets=[0, 3], steps=6)
    whole = run(x)
    CLOSE(torch.cat([run(row) for row in x.split(1)], 1), whole)
    CLOSE(vmap(run)(x), whole.transpose(0, 1))
    both = vmap(lambda p: guided_integrated_gradients(f, p, x, targets=0, steps=6))(torch.stack([params, params * 2]))
    CLOSE(both[0], whole[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float32, 2e-3)])
def test_the_dtype_of_the_data_is_kept(dtype, tolerance):
    f, params = functionalize(mlp())
    x, _ = data(1, 7)
    truth = integrated_gradients(f, params, x, targets=0)
    f, params = functionalize(mlp().to(dtype))
    got = guided_integrated_gradients(
        f, params, x.to(dtype), targets=0, max_dist=0.0, steps=1000 if dtype is torch.float32 else 100
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.compile
def test_compiled_equals_eager():
    torch._dynamo.reset()
    f, params = functionalize(mlp())
    run = partial(guided_integrated_gradients, targets=[0, 1], steps=3)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for x in data(3, 7):
        CLOSE(compiled(f, params, x), run(f, params, x))


def test_nothing_of_the_caller_is_changed():
    f, params = functionalize(mlp())
    x, baseline = data(3, 7)
    before = [t.clone() for t in (x, baseline)]
    state = torch.get_rng_state()
    guided_integrated_gradients(f, params, x, targets=0, baselines=baseline, steps=3)
    assert torch.equal(x, before[0]) and torch.equal(baseline, before[1]) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, errors.InputError, "steps is an integer of at least 1"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None"),
        ({"fraction": 0.0}, errors.InputError, "fraction is a number above 0 and up to 1, got 0.0"),
        ({"fraction": 1.5}, errors.InputError, "fraction is a number above 0 and up to 1, got 1.5"),
        ({"max_dist": -0.1}, errors.InputError, "max_dist is a number from 0 to 1, got -0.1"),
        ({"max_dist": "far"}, errors.InputError, "max_dist is a number from 0 to 1, got 'far'"),
        ({"baselines": torch.ones(4, 9).double()}, errors.InputError, "does not broadcast"),
        ({"targets": 7}, errors.TargetError, "index=7 is out of range"),
        ({"targets": lambda out: out.mean(0)[None]}, errors.InputError, r"the target values have shape \[1\]; the first dim"),
        ({"at": "9"}, errors.SiteError, "the model has no module '9'"),
    ],
)
def test_bad_input(options, error, message):
    f, params = functionalize(mlp())
    with pytest.raises(error, match=message):
        guided_integrated_gradients(f, params, data(3, 7)[0], **{"targets": 0, **options})


def test_gradients_cannot_be_asked_for_without_grad_mode():
    with torch.no_grad(), pytest.raises(errors.GradientError, match="guided_integrated_gradients needs gradients"):
        guided_integrated_gradients(lambda _, x: x.sum(-1), {}, torch.ones(1, 2))
