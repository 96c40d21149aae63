"""Rules and presets against zennit, on deep copies of the models."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad

import tdhook
from tdhook.attribution import rules as r
from tdhook.attribution.lrp import lrp

from . import oracle
from .layers import LAYERS, example, ours

pytestmark = pytest.mark.skipif(not oracle.INSTALLED, reason="zennit is not installed; see requirements/models.txt")

CLOSE = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)


def zbox(z, low, high):
    return z.ZBox(low=torch.tensor(low).double(), high=torch.tensor(high).double())


RULES = {
    "epsilon": (r.Epsilon(1e-6), lambda z: z.Epsilon(1e-6)),
    "epsilon 1": (r.Epsilon(1.0), lambda z: z.Epsilon(1.0)),
    "norm": (r.Epsilon(1e-6), lambda z: z.Norm()),
    "z+": (r.ZPlus(), lambda z: z.ZPlus()),
    "gamma .25": (r.Gamma(0.25), lambda z: z.Gamma(0.25)),
    "gamma .5": (r.Gamma(0.5, stabilizer=1e-3), lambda z: z.Gamma(0.5, stabilizer=1e-3)),
    "alpha 2 beta 1": (r.AlphaBeta(2.0, 1.0), lambda z: z.AlphaBeta(2.0, 1.0)),
    "alpha 1 beta 0": (r.AlphaBeta(1.0, 0.0), lambda z: z.AlphaBeta(1.0, 0.0)),
    "box": (r.ZBox(low=-3.0, high=3.0), lambda z: zbox(z, -3.0, 3.0)),
    "w squared": (r.WSquare(), lambda z: z.WSquare()),
    "flat": (r.Flat(), lambda z: z.Flat()),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_rules_of_affine_layers(name, bias, rule):
    own, theirs = RULES[rule]
    for sign in ("both signs", "nonnegative"):
        layer, x, cotangent = example(name, bias, sign)
        expected = oracle.layer_relevance(layer, theirs(oracle.zennit().rules), x, (layer(x) * cotangent).detach())
        CLOSE(ours(layer, own, x, cotangent), expected)


@pytest.mark.parametrize("rule", ["z+", "gamma .25", "alpha 2 beta 1"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_comes_out_of_a_relu_takes_half_the_products(name, rule):
    """The same result, though the parts of negative operands are left out."""
    own, theirs = RULES[rule]
    layer, x, cotangent = example(name, True, "nonnegative")
    model = nn.Sequential(nn.ReLU(), layer)
    expected = oracle.layer_relevance(layer, theirs(oracle.zennit().rules), x, (layer(x) * cotangent).detach())
    f, params = tdhook.functionalize(model)
    plan = tdhook.with_rules(f, {"linear": own, "convolution": own}).plan(params, x)
    assert [o.nonnegative for o in plan.table.values()] == [False, True]
    CLOSE(ours(model, own, x, cotangent), expected)


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1, 1), (3, 5, 5)])
def test_box_with_bounds_for_each_channel(shape):
    layer, x = nn.Conv2d(3, 4, 3, padding=1).double(), torch.rand(2, 3, 5, 5).double()
    low, high = -torch.rand(shape).double(), 1 + torch.rand(shape).double()
    cotangent = torch.randn(2, 4, 5, 5).double()
    four = partial(torch.Tensor.reshape, shape=(1, *([1] * (4 - len(shape))), *shape)[-4:])
    theirs = oracle.zennit().rules.ZBox(low=four(low), high=four(high))
    expected = oracle.layer_relevance(layer, theirs, x, (layer(x) * cotangent).detach())
    CLOSE(ours(layer, r.ZBox(low=low, high=high), x, cotangent), expected)
    if shape == (3, 1, 1):
        CLOSE(ours(layer, r.ZBox(low=low.flatten().tolist(), high=tuple(high.flatten().tolist())), x, cotangent), expected)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Tanh, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.ReLU6])
def test_pass_gives_an_activation_the_relevance_of_its_output(kind):
    x = 3 * torch.randn(4, 6).double()
    f, params = tdhook.functionalize(kind())
    got = lrp(f, params, x, rules={"activation": r.Pass()}, targets=lambda y: y.sum(1))
    CLOSE(got, oracle.layer_relevance(kind(), oracle.zennit().rules.Pass(), x, kind()(x)))


@pytest.mark.parametrize(
    ("own", "name", "options"),
    [
        (r.Guided(), "ReLUGuidedBackprop", {}),
        (r.Deconv(), "ReLUDeconvNet", {}),
        (r.BetaSmooth(10.0), "ReLUBetaSmooth", {}),
        (r.BetaSmooth(1.0), "ReLUBetaSmooth", {"beta_smooth": 1.0}),
    ],
)
def test_rules_of_relu(own, name, options):
    x, cotangent = torch.randn(2, 4, 6).double()
    f, params = tdhook.functionalize(nn.ReLU())
    g = tdhook.with_rules(f, {"relu": own})
    theirs = getattr(oracle.zennit().rules, name)(**options)
    CLOSE(grad(lambda x: (g(params, x) * cotangent).sum())(x), oracle.layer_relevance(nn.ReLU(), theirs, x, cotangent))


# Presets on a whole network


def cnn(norm: bool = True) -> nn.Sequential:
    norms = [nn.BatchNorm2d(6), nn.BatchNorm2d(8), nn.BatchNorm1d(10)] if norm else [nn.Identity()] * 3
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        norms[0],
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        norms[1],
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
        norms[2],
        nn.ReLU(),
        nn.Linear(10, 4),
    )
    for module in norms if norm else ():
        for tensor in (module.weight, module.bias, module.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.double().eval()


def merged(model: nn.Sequential) -> nn.Sequential:
    """The same with batch norms merged into what comes before, by the function of torch."""
    fuse = torch.nn.utils.fusion
    layers = list(model)
    for i, layer in enumerate(layers):
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            fused = fuse.fuse_conv_bn_eval if isinstance(layers[i - 1], nn.Conv2d) else fuse.fuse_linear_bn_eval
            layers[i - 1], layers[i] = fused(layers[i - 1], layer), nn.Identity()
    return nn.Sequential(*layers)


BOX = {"low": torch.full((1, 3, 8, 8), -4.0).double(), "high": torch.full((1, 3, 8, 8), 4.0).double()}
PRESETS = {
    "epsilon_plus": (r.epsilon_plus(), "EpsilonPlus", {}),
    "epsilon_plus, large epsilon": (r.epsilon_plus(0.1), "EpsilonPlus", {"epsilon": 0.1}),
    "epsilon_plus_flat": (r.epsilon_plus_flat(), "EpsilonPlusFlat", {}),
    "epsilon_alpha2_beta1": (r.epsilon_alpha2_beta1(), "EpsilonAlpha2Beta1", {}),
    "epsilon_alpha2_beta1_flat": (r.epsilon_alpha2_beta1_flat(), "EpsilonAlpha2Beta1Flat", {}),
    "epsilon_gamma_box": (r.epsilon_gamma_box(-4.0, 4.0), "EpsilonGammaBox", BOX),
    "excitation_backprop": (r.excitation_backprop(), "ExcitationBackprop", {}),
}


def theirs(name, options):
    """Zennit's rule for average pooling divides by the average plus a stabilizer; ours is the plain gradient, which is that
    with no stabilizer. It has to be tiny there for the two to agree to more than its size."""
    z = oracle.zennit()
    exact = [(z.types.AvgPool, z.rules.Norm(stabilizer=1e-30))]
    return getattr(z.composites, name)(layer_map=exact, **options)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["without norms", "merged", "unmerged"])
def test_presets_on_a_convolutional_network(preset, kind):
    own, name, options = PRESETS[preset]
    model = cnn(norm=kind != "without norms")
    model = merged(model) if kind == "merged" else model
    x = torch.randn(5, 3, 8, 8).double()
    f, params = tdhook.functionalize(model)
    if kind == "unmerged":
        if preset == "excitation_backprop":
            pytest.skip("zennit multiplies the relevance by the slope of a batch norm; ours is its gradient times its operand")
        own = r.Rules.of({"batch_norm": r.Pass(0.0)}) + own
    got = lrp(f, params, x, rules=own, targets=2, start="one")
    expected = oracle.relevance(model, x, theirs(name, options), 2)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8 * expected.abs().max().item())
    assert torch.equal(tdhook.with_rules(f, own)(params, x), model(x))


@pytest.mark.parametrize(
    ("own", "name"),
    [(r.guided_backprop(), "GuidedBackprop"), (r.deconvnet(), "DeconvNet"), (r.beta_smooth(), "BetaSmooth")],
)
def test_presets_that_are_gradients(own, name):
    model, x = cnn(), torch.randn(5, 3, 8, 8).double()
    f, params = tdhook.functionalize(model)
    g = tdhook.with_rules(f, own)
    got = grad(lambda x: g(params, x)[:, 2].sum())(x)
    model[6].inplace = False  # zennit would read what a ReLU in place has overwritten
    CLOSE(got, oracle.relevance(model, x, getattr(oracle.zennit().composites, name)(), 2))


# Where hooks on modules go wrong, and say nothing


def stabilized(z, epsilon=1e-6):
    return z + torch.where(z < 0, -epsilon, epsilon)


def epsilon_step(x, layer, z, relevance):
    return x * ((relevance / stabilized(z)) @ layer.weight)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.layer(self.act(self.layer(x)))

    def by_hand(self, x, start):
        z = self.layer(x)
        a = z.relu()
        return epsilon_step(x, self.layer, z, epsilon_step(a, self.layer, self.layer(a), start))


class FunctionalGelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))

    def by_hand(self, x, start):
        z = self.first(x)
        a = F.gelu(z)
        return epsilon_step(x, self.first, z, epsilon_step(a, self.second, self.second(a), start))


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.layer(x)

    def by_hand(self, x, start):
        branch = self.layer(x)
        share = start / (x + branch)
        return x * share + epsilon_step(x, self.layer, branch, branch * share)


@pytest.mark.parametrize("kind", [Reused, FunctionalGelu, Skip])
def test_where_zennit_is_silently_wrong(kind):
    model = kind().double()
    x = torch.randn(3, 4).double()
    f, params = tdhook.functionalize(model)
    start = torch.zeros(3, 4).double()
    start[:, 1] = 1.0
    expected = model.by_hand(x, start).detach()
    CLOSE(lrp(f, params, x, rules=r.epsilon_plus(), targets=1, start="one"), expected, rtol=1e-7)
    zennit = oracle.relevance(model, x, oracle.zennit().composites.EpsilonPlus(), 1)
    assert (zennit - expected).abs().max() > 0.1 * expected.abs().max()


def test_skips_double_the_relevance_in_zennit_and_not_here():
    """L blocks without a rule for the sum give 2^L times the output."""

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    model = Blocks().double()
    x = torch.randn(2, 6).double()
    f, params = tdhook.functionalize(model)
    own = lrp(f, params, x, rules=r.epsilon_plus(0.0), targets=0).sum(1)
    CLOSE(own, model(x)[:, 0].detach())
    zennit = oracle.relevance(model, x, oracle.zennit().composites.EpsilonPlus(epsilon=1e-12), 0).sum(1)
    CLOSE(zennit, torch.full((2,), 8.0).double(), rtol=1e-6)


def test_the_oracle_leaves_no_torchvision_behind():
    oracle.zennit()
    import sys
    from importlib.util import find_spec

    assert find_spec("torchvision") or "torchvision" not in sys.modules
    from transformers import ViTConfig, ViTForImageClassification

    tiny = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=4, patch_size=2)
    assert ViTForImageClassification(tiny)(torch.zeros(1, 3, 4, 4)).logits.shape == (1, 2)
