"""Scores against closed forms and loops of autograd.grad."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn
from torch.func import grad, vmap

from tdhook import functionalize, with_rules
from tdhook.attribution.rules import Epsilon
from tdhook.core.errors import GradientError, InputError, ParamsError, TargetError
from tdhook.weights.pruning import prune
from tdhook.weights.scores import fisher, gradient_x_weight, magnitude, optimal_brain_damage, taylor
from tdhook.weights.selection import flat

KEYS = [("0", "weight"), ("2", "weight")]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(7, 4).double(), torch.randint(3, (7,))


def loop(net, x, y):
    """The gradients of the mean loss."""
    return torch.autograd.grad(F.cross_entropy(net(x), y), [net[0].weight, net[2].weight])


def test_magnitude_scores_matrices_unless_named(net):
    _, params = functionalize(net)
    assert list(flat(magnitude(params))) == KEYS
    assert torch.equal(magnitude(params, select="0.bias")["0", "bias"], net[0].bias.detach().abs())


def test_gradient_x_weight_is_signed_and_taylor_is_not(net, batch):
    f, params = functionalize(net)
    x, y = batch
    signed = gradient_x_weight(f, params, x, F.cross_entropy, labels=y)
    first = taylor(f, params, x, F.cross_entropy, labels=y)
    second = taylor(f, params, x, F.cross_entropy, labels=y, squared=True)
    for key, weight, gradient in zip(KEYS, (net[0].weight, net[2].weight), loop(net, x, y)):
        product = (weight * gradient).detach()
        torch.testing.assert_close(signed[key], product)
        torch.testing.assert_close(first[key], product.abs())
        torch.testing.assert_close(second[key], product.square())


def test_gradient_x_weight_is_minus_the_change_of_a_linear_loss():
    f, params = functionalize(nn.Linear(3, 1, bias=False).double())
    x = torch.randn(5, 3).double()
    scores = gradient_x_weight(f, params, x, torch.mean)["weight"]
    for i in range(3):
        removed = prune(params, TensorDict(weight=torch.eye(3)[i : i + 1].double() * -1), 1).params
        torch.testing.assert_close(-scores[0, i], f(removed, x).mean() - f(params, x).mean())


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_fisher_is_the_mean_square_of_single_gradients(net, batch, chunk_size):
    f, params = functionalize(net)
    x, y = batch
    got = fisher(f, params, x, F.cross_entropy, labels=y, chunk_size=chunk_size)
    each = [loop(net, x[i : i + 1], y[i : i + 1]) for i in range(7)]
    for number, key in enumerate(KEYS):
        torch.testing.assert_close(got[key], torch.stack([g[number] for g in each]).square().mean(0))


def test_fisher_of_named_inputs(net, batch):
    f, params = functionalize(net)
    x, y = batch
    expected = fisher(f, params, x, F.cross_entropy, labels=y)
    for inputs in ({"input": x}, TensorDict(input=x), TensorDict(input=x, batch_size=[7])):
        got = fisher(f, params, inputs, F.cross_entropy, labels=y)
        torch.testing.assert_close(got["2", "weight"], expected["2", "weight"])


def test_optimal_brain_damage_is_exact_for_a_quadratic_loss():
    """L = sum h (w - w*)^2 / 2 at its minimum: removing w_i costs h_i w_i^2 / 2."""
    w, h = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[4.0, 5.0, 6.0]])
    scores = optimal_brain_damage(TensorDict(w=w, b=torch.ones(1)), TensorDict(w=h))
    for i in range(3):
        removed = w.clone()
        removed[0, i] = 0
        assert scores["w"][0, i] == (h * (removed - w).square()).sum() / 2


def test_scores_of_stacked_checkpoints(net, batch):
    f, params = functionalize(net)
    other = params.apply(lambda t: t + 0.1)
    x, y = batch
    both = vmap(lambda p: taylor(f, p, x, F.cross_entropy, labels=y))(torch.stack([params, other]))
    torch.testing.assert_close(both["2", "weight"][1], taylor(f, other, x, F.cross_entropy, labels=y)["2", "weight"])


def test_scores_are_differentiable():
    """L = w^3 x: the score is 3 w^3 x, and its derivative 9 w^2 x."""
    w = TensorDict(w=torch.tensor([[2.0]]))
    score = lambda p: gradient_x_weight(lambda q, x: q["w"] ** 3 * x, p, torch.ones(1, 1), torch.sum)["w"].sum()  # noqa: E731
    assert score(w) == 24 and grad(score)(w)["w"] == 36


@pytest.mark.compile
def test_compiled_equals_eager(net, batch):
    f, params = functionalize(net)
    x, y = batch
    for score in (taylor, fisher):
        run = torch.compile(
            lambda p, s=score: prune(p, s(f, p, x, F.cross_entropy, labels=y), 0.3).params, backend="aot_eager", fullgraph=True
        )
        expected = prune(params, score(f, params, x, F.cross_entropy, labels=y), 0.3).params
        torch.testing.assert_close(run(params)["0", "weight"], expected["0", "weight"])


def test_nothing_of_the_caller_is_changed(net, batch):
    f, params = functionalize(net)
    before = params.clone()
    gradient_x_weight(f, params, batch[0], torch.sum)
    fisher(f, params, batch[0], torch.sum)
    assert (params == before).all()
    assert not any(t.requires_grad for t in flat(params).values())
    assert all(p.grad is None for p in net.parameters())


def test_bad_input(net, batch):
    f, params = functionalize(net)
    x, y = batch
    with pytest.raises(ParamsError, match=r"Did you mean '0.weight'"):
        taylor(f, params, x, torch.sum, select="0.wieght")
    with pytest.raises(TargetError, match="loss returned"):
        taylor(f, params, x, lambda out: out)
    with pytest.raises(InputError, match="loss is 3"):
        fisher(f, params, x, 3)
    with pytest.raises(InputError, match="one first dimension"):
        fisher(f, params, x, F.cross_entropy, labels=y[:3])
    with pytest.raises(InputError, match="chunk_size is an integer of at least 1"):
        fisher(f, params, x, torch.sum, chunk_size=0)
    with torch.no_grad(), pytest.raises(GradientError, match="grad mode is off"):
        fisher(f, params, x, torch.sum)
    with torch.no_grad(), pytest.raises(GradientError, match="grad mode is off"):
        taylor(f, params, x, torch.sum)
    with pytest.raises(ParamsError, match="params has no '1', which curvature has"):
        optimal_brain_damage(params, TensorDict({"1": torch.ones(2)}))
    with pytest.raises(ParamsError, match=r"is a .*\[2\] on cpu in curvature"):
        optimal_brain_damage(params, TensorDict({"0": {"weight": torch.ones(2).double()}}))


def test_under_the_epsilon_rule_gradient_x_weight_is_the_relevance_of_weights():
    """What a weight passes on: w_ij h_j R_i / z_i."""
    torch.manual_seed(0)
    f, params = functionalize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double())
    x = torch.randn(5, 4, dtype=torch.float64)
    ruled = with_rules(f, {"linear": Epsilon(1e-12)})
    found = gradient_x_weight(ruled, params, x, lambda output: output[:, 1].sum())
    hidden = x @ params["0", "weight"].mT + params["0", "bias"]
    above = params["2", "weight"][1] * hidden.relu()
    torch.testing.assert_close(found["2", "weight"][1], above.sum(0))
    below = (above / hidden).mT @ x * params["0", "weight"]
    torch.testing.assert_close(found["0", "weight"], below)
