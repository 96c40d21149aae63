"""Adaptive quadrature: `integrated_gradients(steps="auto")`."""

from __future__ import annotations

from functools import partial

import numpy
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

from tdhook import functionalize, targets
from tdhook.attribution.adaptive import ORDERS, Search, chebyshev_points, gauss_rule, predicted_integrals, prediction
from tdhook.attribution.integrated_gradients import PathIntegral, convergence_delta, integrated_gradients
from tdhook.attribution.paths import gaussian_blur
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)


def mlp(act=nn.GELU, outputs=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, outputs)).double()


@pytest.mark.parametrize("n", [5, 9, 17, 33])
def test_half_of_the_samples_of_a_polynomial_predict_the_others(n):
    points = chebyshev_points(n)
    for degree in range((n + 1) // 2):
        values = points**degree
        numpy.testing.assert_allclose(prediction(n) @ values[::2], values[1::2], atol=1e-12)


@pytest.mark.parametrize("order", [1, 3, 7])
def test_a_rule_for_the_derivative_of_the_polynomial_through_samples(order):
    """Exact where the rule is: degree 2 order - 1 of the derivative; else what the rule makes of it."""
    points = chebyshev_points(9)
    nodes, weights = gauss_rule(order)
    for degree in range(1, 9):
        expected = weights @ (degree * nodes ** (degree - 1))
        assert abs(predicted_integrals(9)[ORDERS.index(order)] @ points**degree - expected) < 1e-12
        assert (abs(expected - 1) < 1e-12) == (degree - 1 <= 2 * order - 1)


def integral(values, rates, tolerance=1e-6, max_steps=500):
    """The integral that a search over a scalar function finds, its number of samples and of nodes."""
    samples = [0]

    def sample(points):
        samples[0] += len(points[0])
        return [values(points[0])[:, None]]

    ((nodes, weights),) = Search(sample, 1, max_steps, 1e-15).nodes(tolerance)
    return float(weights @ rates(nodes)), samples[0], len(nodes)


def test_a_smooth_function_needs_few_nodes():
    found, samples, nodes = integral(numpy.exp, numpy.exp)
    assert abs(found - (numpy.e - 1)) < 1e-6 * (numpy.e - 1)
    assert samples <= 17
    assert nodes <= 5


@pytest.mark.parametrize("width", [1e-2, 1e-4, 1e-6])
def test_a_steep_step_is_found(width):
    """The logistic step at 0.3: a rule with equal spacing would need some 1 / width points."""

    def values(a):
        return 1 / (1 + numpy.exp(numpy.clip(-(a - 0.3) / width, -700, 700)))

    def rates(a):
        return values(a) * (1 - values(a)) / width

    found, samples, nodes = integral(values, rates, 1e-4)
    assert abs(found - (values(1.0) - values(0.0))) < 2e-4  # it aims at half of the tolerance, and may miss
    assert samples < 500
    assert nodes < 200


def test_a_kink_is_found():
    found, samples, nodes = integral(lambda a: numpy.maximum(a - 1 / 3, 0), lambda a: (a > 1 / 3) * 1.0, 1e-5)
    assert abs(found - 2 / 3) < 1e-4  # as above: a kink between two samples shows late
    assert samples < 200
    assert nodes < 60


def test_the_budget_holds():
    def wild(a):
        return numpy.sin(1 / (a + 1e-5))

    _, samples, nodes = integral(wild, lambda a: -numpy.cos(1 / (a + 1e-5)) / (a + 1e-5) ** 2, 1e-8, max_steps=100)
    assert samples <= 400
    assert nodes <= 130


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU, nn.Tanh, nn.Softplus])
@pytest.mark.parametrize("chosen", [2, [0, 1, 4], targets.every()])
def test_the_tolerance_holds_with_few_steps(act, chosen):
    f, params = functionalize(mlp(act))
    x = 3 * torch.randn(7, 6).double()
    result = integrated_gradients(f, params, x, targets=chosen, steps="auto", tolerance=1e-3)
    reference = integrated_gradients(f, params, x, targets=chosen, steps=400, chunk_size=100)
    true = reference.sum(-1).abs()
    assert isinstance(result, PathIntegral)
    assert result.converged.all()
    assert result.steps.max() < 60
    assert ((result.attributions - reference).sum(-1).abs() <= 1e-3 * true + 1e-12).all()
    CLOSE(result.error, convergence_delta(f, params, x, result.attributions, targets=chosen).abs(), rtol=1e-6, atol=1e-13)


def test_every_example_has_nodes_of_its_own():
    """An example does not pay in accuracy or steps for its neighbours."""
    f, params = functionalize(mlp(nn.Tanh))
    x = torch.stack([torch.zeros(6), 0.01 * torch.ones(6), 20 * torch.randn(6)]).double()
    result = integrated_gradients(f, params, x, targets=0, steps="auto", tolerance=1e-6)
    assert result.steps[1] < result.steps[2]
    assert result.steps[0] < 20
    for i in range(3):
        alone = integrated_gradients(f, params, x[i : i + 1], targets=0, steps="auto", tolerance=1e-6)
        assert alone.steps == result.steps[i]
        CLOSE(alone.attributions[0], result.attributions[i])


def test_what_does_not_converge_says_so():
    class Jump(nn.Module):
        def forward(self, x):
            return (x.sum(-1) - 0.1 > 0) + x.sum(-1) ** 2

    f, params = functionalize(Jump())
    x = torch.tensor([[1.0, 1.0], [0.01, 0.01]]).double()
    result = integrated_gradients(f, params, x, steps="auto", tolerance=1e-3, max_steps=60)
    assert result.converged.tolist() == [False, True]
    torch.testing.assert_close(result.error[0].item(), 1.0, atol=0.1, rtol=0)
    assert result.steps.max() <= 90


def test_a_derivative_that_is_not_finite_at_the_baseline():
    """F = sqrt(sum x): F' is infinite at zero, its integral is not."""

    class Root(nn.Module):
        def forward(self, x):
            return x.sum(-1).sqrt()

    f, params = functionalize(Root())
    x = torch.tensor([[1.0, 3.0]]).double()
    result = integrated_gradients(f, params, x, steps="auto", tolerance=1e-3)
    assert result.converged.all()
    CLOSE(result.attributions, torch.tensor([[0.5, 1.5]]).double(), rtol=1e-3, atol=1e-4)


def test_without_a_batch_axis():
    f, params = functionalize(mlp())
    x = torch.randn(6).double()
    result = integrated_gradients(f, params, x, targets=[1, 2], steps="auto")
    assert result.steps.shape == ()
    batched = integrated_gradients(f, params, x[None], targets=[1, 2], steps="auto")
    CLOSE(result.attributions, batched.attributions[:, 0])
    CLOSE(result.error, batched.error[:, 0])


def test_several_inputs_of_which_one_is_shared():
    """A tensor that all examples share gives them the same nodes."""

    class Shared(nn.Module):
        def forward(self, x, scale):
            return (x.tanh() * scale.exp()).sum(-1)

    f, params = functionalize(Shared())
    inputs = (torch.randn(3, 4).double(), torch.randn(4).double())
    result = integrated_gradients(f, params, inputs, steps="auto", tolerance=1e-6)
    assert result.steps.shape == ()
    reference = integrated_gradients(f, params, inputs, steps=60)
    for got, want in zip(result.attributions, reference):
        CLOSE(got, want, rtol=1e-4, atol=1e-6)


def test_tensordicts_and_sites():
    model = mlp()
    f, params = functionalize(model)
    x = torch.randn(3, 6).double()
    result = integrated_gradients(f, params, x, targets=[0, 1], at="1", steps="auto", tolerance=1e-6)
    assert isinstance(result.attributions, TensorDict)
    CLOSE(result.attributions["1"], integrated_gradients(f, params, x, targets=[0, 1], at="1")["1"], rtol=1e-4, atol=1e-8)


def test_along_the_blur_through_a_site_and_forward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.Flatten(-3), nn.Linear(48, 2), nn.Tanh(), nn.Linear(2, 5)).double()
    f, params = functionalize(model)
    x = torch.randn(2, 1, 6, 6).double()
    options = {"targets": [0, 1, 2], "path": gaussian_blur(2.0), "steps": "auto", "tolerance": 1e-5}
    plain = integrated_gradients(f, params, x, **options)
    assert plain.converged.all()
    for other in ({"through": "4"}, {"mode": "forward"}, {"chunk_size": 3}):
        result = integrated_gradients(f, params, x, **options, **other)
        CLOSE(result.attributions, plain.attributions, rtol=1e-9, atol=1e-12)
        assert (result.steps == plain.steps).all()


def test_float32_knows_its_rounding():
    f, params = functionalize(mlp().float())
    x = torch.randn(4, 6)
    result = integrated_gradients(f, params, x, targets=0, steps="auto", tolerance=1e-5)
    assert result.converged.all()
    assert result.steps.max() < 60


def test_attention_without_a_forward_mode_kernel():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 3)

        def forward(self, x):
            return self.out(nn.functional.scaled_dot_product_attention(x, x, x)).mean(-2)

    torch.manual_seed(0)
    f, params = functionalize(Attention().double())
    x = torch.randn(2, 1, 5, 4).double()
    result = integrated_gradients(f, params, x.squeeze(1), targets=[0, 2], steps="auto", tolerance=1e-4, mode="forward")
    assert result.converged.all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": "adaptive"}, "steps='adaptive' is unknown"),
        ({"steps": "auto", "tolerance": 0.0}, "tolerance=0.0 is relative"),
        ({"steps": "auto", "tolerance": 2}, "tolerance=2 is relative"),
        ({"steps": "auto", "max_steps": 3}, "max_steps is an integer of at least 9, got 3"),
        ({"steps": "auto", "multiply_by_inputs": False}, "measures completeness"),
    ],
)
def test_bad_options(options, match):
    f, params = functionalize(mlp())
    with pytest.raises(errors.InputError, match=match):
        integrated_gradients(f, params, torch.randn(2, 6).double(), targets=0, **options)


def test_under_vmap_it_cannot_choose():
    f, params = functionalize(mlp())
    with pytest.raises(errors.InputError, match="vmap and grad cannot"):
        vmap(lambda x: integrated_gradients(f, params, x, targets=0, steps="auto").attributions)(torch.randn(2, 6).double())


@pytest.mark.compile
def test_compiled_it_cannot_choose():
    f, params = functionalize(mlp())
    method = partial(integrated_gradients, f, targets=0, steps="auto")
    compiled = torch.compile(lambda x: method(params, x), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="compiled code cannot"):
        compiled(torch.randn(2, 6).double())


def test_nothing_of_the_caller_is_changed():
    f, params = functionalize(mlp())
    x, state = torch.randn(2, 6).double(), torch.get_rng_state()
    before = x.clone(), params.clone()
    integrated_gradients(f, params, x, targets=0, steps="auto")
    assert (x == before[0]).all()
    assert (params == before[1]).all()
    assert (torch.get_rng_state() == state).all()
