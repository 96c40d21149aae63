"""Adapters against models in which they are written out."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import grad, vmap

from tdhook import capture, functionalize, intervene
from tdhook.core.errors import InputError, ModelError, SiteError
from tdhook.weights.adapters import CrossLayer, adapt


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.fixture
def x():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()


def bottleneck(p, value):
    return value + torch.relu(value @ p["down"]) @ p["up"]


@pytest.fixture
def weights():
    torch.manual_seed(2)
    return TensorDict(down=torch.randn(4, 2), up=torch.randn(2, 4)).double()


def test_an_adapter_between_two_layers(net, x, weights):
    f, params = functionalize(net)
    h = net[:2](x)
    expected = net[2:](h + torch.relu(h @ weights["down"]) @ weights["up"])
    torch.testing.assert_close(adapt(f, {"1": bottleneck})(params, x, {"1": weights}), expected.detach())


def test_any_module_is_an_adapter(net, x):
    f, params = functionalize(net)
    module = nn.Linear(4, 4).double()
    adapter, its_params = functionalize(module)
    torch.testing.assert_close(adapt(f, {"1": adapter})(params, x, {"1": its_params}), net[2:](module(net[:2](x))).detach())


def test_across_layers(net, x, weights):
    f, params = functionalize(net)
    g = adapt(f, {"3": CrossLayer("0", lambda p, source, value: value + source @ p["down"] @ p["up"])})
    early = net[0](x)
    expected = net[4](net[:4](x) + early @ weights["down"] @ weights["up"])
    torch.testing.assert_close(g(params, x, {"3": weights}), expected.detach())


def test_a_transcoder_replaces_what_lies_between(net, x, weights):
    f, params = functionalize(net)
    g = adapt(f, {"3": CrossLayer("2:in", lambda p, source, value: source @ p["down"] @ p["up"])})
    torch.testing.assert_close(g(params, x, {"3": weights}), net[4](net[:2](x) @ weights["down"] @ weights["up"]).detach())


def test_a_dictionary_reconstructs(net, x):
    f, params = functionalize(net)
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(4, 4).double()).Q

    def dictionary(p, value):
        return torch.relu(value @ p) @ p.T - torch.relu(-value @ p) @ p.T

    torch.testing.assert_close(adapt(f, {"1": dictionary})(params, x, {"1": basis}), f(params, x))


def test_sources_see_what_other_adapters_wrote(net, x):
    f, params = functionalize(net)
    seen = []
    g = adapt(f, {"1": lambda p, v: v * p, "3": CrossLayer("1", lambda p, source, value: seen.append(source) or value)})
    g(params, x, {"1": torch.tensor(2.0).double(), "3": None})
    torch.testing.assert_close(seen[0], 2 * net[:2](x).detach())


def test_a_pattern_gives_each_site_parameters_of_its_own(net, x):
    f, params = functionalize(net)
    g = adapt(f, {"[1:4:2]": lambda p, value: p * value})
    scales = {"1": torch.tensor(2.0).double(), "3": torch.tensor(-1.0).double()}
    torch.testing.assert_close(g(params, x, scales), net[4](-net[3](net[2](2 * net[:2](x)))).detach())


def test_transforms_compose(net, x, weights):
    f, params = functionalize(net)
    g = adapt(intervene(f, {"1": 1.0}), {"1": bottleneck})
    out, values = capture(g, "2:in")(params, x, {"1": weights})
    torch.testing.assert_close(values["2:in"], bottleneck(weights, torch.ones(5, 4).double()))
    assert out.shape == (5, 2)
    two = adapt(adapt(f, {"1": lambda p, v: v + p}), {"1": lambda p, v: v * p})
    outer, inner = torch.tensor(3.0).double(), torch.tensor(1.0).double()
    torch.testing.assert_close(two(params, x, {"1": outer}, {"1": inner}), net[2:]((net[:2](x) + 1) * 3).detach())


def test_training_an_adapter_reduces_the_loss_and_leaves_the_model(net, x):
    f, params = functionalize(net)
    before = params.clone()
    g = adapt(f, {"1": lambda p, value: value + value @ p})
    torch.manual_seed(3)
    y = g(params, x, {"1": torch.randn(4, 4).double()})

    def loss(p):
        return (g(params, x, {"1": p}) - y).square().mean()

    p, losses = torch.zeros(4, 4).double(), []
    for _ in range(50):
        losses.append(loss(p))
        p = p - grad(loss)(p)
    assert losses[-1] < losses[0] * 0.2
    assert (params == before).all()


def test_the_gradient_of_an_adapter_is_that_of_the_model_written_out(net, x, weights):
    f, params = functionalize(net)
    g = adapt(f, {"1": bottleneck})
    got = grad(lambda p: g(params, x, {"1": p}).square().sum())(weights)
    down, up = (weights[name].clone().requires_grad_() for name in ("down", "up"))
    h = net[:2](x)
    expected = torch.autograd.grad(net[2:](h + torch.relu(h @ down) @ up).square().sum(), (down, up))
    torch.testing.assert_close((got["down"], got["up"]), expected)


def test_many_adapters_at_once(net, x, weights):
    f, params = functionalize(net)
    g = adapt(f, {"1": bottleneck})
    many = torch.stack([weights, 2 * weights, -weights])
    got = vmap(lambda p: g(params, x, {"1": p}))(many)
    torch.testing.assert_close(got, torch.stack([g(params, x, {"1": many[i]}) for i in range(3)]))


@pytest.mark.compile
def test_compiled_equals_eager(net, x, weights):
    f, params = functionalize(net)
    g = adapt(f, {"1": bottleneck, "3": CrossLayer("0", lambda p, source, value: value + p * source)})
    given = {"1": weights, "3": torch.tensor(0.5).double()}
    run = torch.compile(lambda p, a: g(params, x, {"1": p, "3": a}), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(weights, given["3"]), g(params, x, given))


def test_bad_input(net, x, weights):
    f, params = functionalize(net)
    with pytest.raises(ModelError, match="has no sites"):
        adapt(net, {"1": bottleneck})
    with pytest.raises(SiteError, match="unknown site '9'"):
        adapt(f, {"9": bottleneck})
    with pytest.raises(SiteError, match="unknown site '9'"):
        adapt(f, {"1": CrossLayer("9", bottleneck)})
    with pytest.raises(SiteError, match="CrossLayer takes exact sites"):
        adapt(f, {"1": CrossLayer("*", bottleneck)})
    with pytest.raises(InputError, match=r"adapters\['1'\] is 3 .*; give a function"):
        adapt(f, {"1": 3})
    with pytest.raises(InputError, match="adapter_params is missing"):
        adapt(f, {"1": bottleneck})(params, x)
    with pytest.raises(SiteError, match="adapter_params has no '1'"):
        adapt(f, {"1": bottleneck})(params, x, {"3": weights})
    with pytest.raises(SiteError, match=r"the adapter at '1' reads '3', which has not run before it"):
        adapt(f, {"1": CrossLayer("3", lambda p, source, value: value)})(params, x, {"1": None})
    with pytest.raises(SiteError, match=r"the write at '1' is .*\[5, 2\]"):
        adapt(f, {"1": lambda p, value: value[:, :2]})(params, x, {"1": None})
