"""What has to hold of relevance whatever the model: conservation, limits, and equalities between rules and transforms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jacrev, vjp, vmap

import tdhook
from tdhook import functionalize, targets, with_rules
from tdhook.attribution import rules as r
from tdhook.attribution.lrp import lrp

from .layers import example, ours

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def network(bias: bool = True, act: type = nn.ReLU) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=bias),
        act(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2, bias=bias),
        act(),
        nn.Flatten(-3),
        nn.Linear(36, 8, bias=bias),
        act(),
        nn.Linear(8, 3, bias=bias),
    )
    return model.double()


IMAGES = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1)).double()
EXACT = {  # without stabilizers
    "epsilon": {"linear": r.Epsilon(0.0), "convolution": r.Epsilon(0.0)},
    "gamma": {("linear", "convolution"): r.Gamma(0.5, stabilizer=0.0)},
    "z+": {("linear", "convolution"): r.AlphaBeta(1.0, 0.0, stabilizer=0.0)},
    "alpha 2 beta 1": {("linear", "convolution"): r.AlphaBeta(2.0, 1.0, stabilizer=0.0)},
}


# Conservation


@pytest.mark.parametrize("rules", ["epsilon", "gamma", "z+"])  # the negative parts of a unit may be none
def test_a_network_without_biases_conserves(rules):
    model = network(bias=False)
    f, params = functionalize(model)
    got = lrp(f, params, IMAGES, rules=EXACT[rules], targets=[0, 2])
    CLOSE(got.flatten(2).sum(2), model(IMAGES)[:, [0, 2]].T.detach(), rtol=1e-8)


@pytest.mark.parametrize("rule", EXACT)
@pytest.mark.parametrize("name", ["linear", "conv2d"])  # enough operands for every unit to have some of either sign
def test_layers_without_biases_conserve(rule, name):
    layer, x, cotangent = example(name, False, "both signs")
    total = (layer(x) * cotangent).flatten(1).sum(1).detach()
    own = next(iter(EXACT[rule].values()))
    CLOSE(ours(layer, own, x, cotangent).flatten(1).sum(1), total, rtol=1e-8)


@pytest.mark.parametrize("rule", [r.WSquare(0.0), r.Flat(0.0), r.ZBox(0.0, low=-3.0, high=3.0)])
@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed conv2d"])
def test_rules_of_the_input_conserve_without_biases(rule, name):
    layer, x, cotangent = example(name, False, "both signs")
    total = (layer(x) * cotangent).flatten(1).sum(1).detach()
    CLOSE(ours(layer, rule, x, cotangent).flatten(1).sum(1), total, rtol=1e-8)


def test_relevance_is_conserved_at_every_cut():
    model = network(bias=False)
    f, params = functionalize(model)
    for preset in (r.epsilon_plus(0.0), r.epsilon_alpha2_beta1(0.0)):
        cuts = [lrp(f, params, IMAGES, rules=preset, targets=1, at=site)[site] for site in ("0", "1", "2", "3", "4", "6", "7")]
        for cut in cuts:
            CLOSE(cut.flatten(1).sum(1), model(IMAGES)[:, 1].detach(), rtol=1e-4)


def test_what_epsilon_absorbs():
    """sum R_in = sum R |z| / (|z| + epsilon) without a bias, and R (z - b) / (z + epsilon sign(z)) with one."""
    for bias in (False, True):
        layer, x, cotangent = example("linear", bias, "both signs")
        z = layer(x).detach()
        own = z - layer.bias.detach() if bias else z
        expected = (z * cotangent * own / (z + 0.3 * z.sign())).sum(1)
        CLOSE(ours(layer, r.Epsilon(0.3), x, cotangent).sum(1), expected)


def test_inputs_and_biases_are_complete():
    """sum x dF/dx + sum b dF/db = F for a ReLU network: what biases absorb is their own relevance."""
    model = network()
    f, params = functionalize(model)
    g = with_rules(f, {"activation": r.Identity()} | EXACT["epsilon"])
    inputs = lrp(g, params, IMAGES[:1], targets=1).sum()
    biases = grad(lambda p: g(p, IMAGES[:1])[0, 1])(params)
    absorbed = sum((biases[str(i), "bias"] * params[str(i), "bias"]).sum() for i in (0, 3, 6, 8))
    CLOSE(inputs + absorbed, model(IMAGES[:1])[0, 1].detach())


# Limits and equalities of rules


@pytest.mark.parametrize("preset", [r.Rules.of(EXACT["epsilon"]), r.epsilon_plus(0.0).where(lambda o: o.group == "linear")])
def test_the_0_rule_is_gradient_times_input(preset):
    model = network()
    f, params = functionalize(model)
    expected = IMAGES * grad(lambda x: model(x)[:, 1].sum())(IMAGES)
    CLOSE(lrp(f, params, IMAGES, rules=preset, targets=1), expected)


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed conv2d, grouped"])
def test_limits(name):
    layer, x, cotangent = example(name, True, "both signs")
    by = partial(ours, layer, x=x, cotangent=cotangent)
    CLOSE(by(r.Gamma(0.0, stabilizer=1e-6)), by(r.Epsilon(1e-6)))
    CLOSE(by(r.ZPlus()), by(r.AlphaBeta(1.0, 0.0)))
    above = torch.where(layer(x) > 0, cotangent, 0)
    large = ours(layer, r.Gamma(1e9, stabilizer=0.0), x, above)
    CLOSE(large, ours(layer, r.ZPlus(stabilizer=0.0), x, above), rtol=0, atol=1e-8)
    CLOSE(by(r.Epsilon(0.0)), by(r.Gradient()))


def test_flat_spreads_evenly_and_box_does_not_see_the_bias():
    layer, x, cotangent = example("linear", True, "both signs")
    start = (layer(x) * cotangent).sum(1, keepdim=True).detach()
    CLOSE(ours(layer, r.Flat(0.0), x, cotangent), (start / 6).expand(4, 6))
    z, box = layer(x).detach(), r.ZBox(low=-3.0, high=3.0)
    before = ours(layer, box, x, cotangent / z)
    with torch.no_grad():
        layer.bias += 5.0
    CLOSE(ours(layer, box, x, cotangent / (z + 5.0)), before)


def test_rules_are_linear_in_the_relevance_that_comes_in():
    f, params = functionalize(network())
    for preset in (r.epsilon_plus_flat(), r.epsilon_gamma_box(-4.0, 4.0), r.epsilon_alpha2_beta1()):
        _, pull = vjp(partial(with_rules(f, preset), params), IMAGES)
        a, b = torch.randn(2, 4, 3).double()
        CLOSE(pull(2 * a - 3 * b)[0], 2 * pull(a)[0] - 3 * pull(b)[0])


@pytest.mark.parametrize("preset", [r.guided_backprop(), r.deconvnet()])
def test_guided_backpropagation_is_positively_homogeneous_but_not_linear(preset):
    f, params = functionalize(network())
    _, pull = vjp(partial(with_rules(f, preset), params), IMAGES)
    a, b = torch.randn(2, 4, 3).double()
    CLOSE(pull(3 * a)[0], 3 * pull(a)[0])
    assert (pull(a + b)[0] - pull(a)[0] - pull(b)[0]).abs().max() > 1e-3


# Elementwise rules


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x.pow(3))))


class NewGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return new_gelu(x)


ACTIVATIONS = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x.clone(), inplace=True),
    "relu_": lambda x: x.clone().relu_(),
    "gelu": F.gelu,
    "tanh gelu": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "mish": F.mish,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.1),
    "softsign": F.softsign,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}


class Act(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_identity_rule_passes_the_relevance_of_each_element(name):
    x, cotangent = 3 * torch.randn(2, 4, 6).double()
    model = Act(ACTIVATIONS[name])
    f, params = functionalize(model)
    g = with_rules(f, {"activation": r.Identity()})
    value, pull = vjp(partial(g, params), x)
    assert torch.equal(value, model(x))
    CLOSE(x * pull(cotangent)[0], model(x) * cotangent, rtol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_identity_rule_at_zero(name):
    """f(x) / x tends to the derivative at 0 where f(0) = 0; where it does not, what is 0 gets nothing."""
    f, params = functionalize(Act(ACTIVATIONS[name]))
    g = with_rules(f, {"activation": r.Identity()})
    got = grad(lambda x: g(params, x).sum())(torch.zeros(3).double())
    slope = grad(lambda x: f(params, x).sum())(torch.zeros(3).double())
    CLOSE(got, slope if f(params, torch.zeros(1).double()) == 0 else torch.zeros(3).double(), rtol=1e-3)


def test_an_activation_that_is_written_out_is_one_operation():
    x, cotangent = 3 * torch.randn(2, 4, 6).double()
    f, params = functionalize(nn.Sequential(NewGELU()))
    g = with_rules(f, {"activation": r.Identity()})
    value, pull = vjp(partial(g, params), x)
    assert torch.equal(value, new_gelu(x))
    CLOSE(x * pull(cotangent)[0], new_gelu(x) * cotangent)
    assert [line.site for line in r.explain(g, params, x)] == ["0/module"]
    near = torch.tensor([1e-12, 0.0, -1e-12]).double()
    CLOSE(grad(lambda x: g(params, x).sum())(near), torch.full((3,), 0.5).double(), rtol=1e-3)


def test_values_inside_an_activation_that_is_written_out_can_be_read():
    x = torch.randn(2, 3).double()
    f, params = functionalize(nn.Sequential(NewGELU()))
    plain = tdhook.capture(f, "0/tanh")(params, x)[1]["0/tanh"]
    for g in (
        tdhook.capture(with_rules(f, {"activation": r.Identity()}), "0/tanh"),
        with_rules(tdhook.capture(f, "0/tanh"), {"activation": r.Identity()}),
    ):
        assert torch.equal(g(params, x)[1]["0/tanh"], plain)


@pytest.mark.parametrize(
    ("how", "count"),
    [
        (torch.square, 2),
        (lambda x: x**2, 2),
        (lambda x: x.pow(3), 3),
        (lambda x: x.prod(-1, keepdim=True), 4),
        (lambda x: x * x, 2),
        (lambda x: torch.stack([torch.einsum("i,i,i->", row, row, row) for row in x])[:, None], 3),
    ],
)
def test_the_uniform_rule_for_powers(how, count):
    """n equal factors get 1 / n each, and so the operand all of it."""
    x = torch.randn(3, 4).double()
    f, params = functionalize(Act(how))
    got = lrp(f, params, x, rules={("product", "matmul"): r.Uniform()}, targets=lambda y: y.sum(1))
    CLOSE(got.sum(1), how(x).sum(1))
    plain = lrp(f, params, x, rules={("product", "matmul"): r.Gradient()}, targets=lambda y: y.sum(1))
    CLOSE(plain, count * got)


class Product(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.fixed = nn.Parameter(torch.randn(3, 4, 4).double())

    def forward(self, a, b):
        return self.how(a, b, self.fixed)


BILINEAR = {
    "@": lambda a, b, w: a @ b,
    "matmul": lambda a, b, w: torch.matmul(a, b),
    "bmm": lambda a, b, w: torch.bmm(a, b),
    "einsum": lambda a, b, w: torch.einsum("bij,bjk->bik", a, b),
    "einsum of a list": lambda a, b, w: torch.einsum("bij,bjk->bik", [a, b]),
    "baddbmm": lambda a, b, w: torch.baddbmm(torch.zeros(3, 4, 4).double(), a, b),
    "*": lambda a, b, w: a * b,
    "linalg": lambda a, b, w: torch.linalg.matmul(a, b),
    "conv1d": lambda a, b, w: F.conv1d(a, b),
}
WITH_A_CONSTANT = {
    "@": lambda a, b, w: (a @ w) + 0 * b,
    "weight first": lambda a, b, w: w @ a,
    "table": lambda a, b, w: a * w[0],
    "einsum": lambda a, b, w: torch.einsum("bij,bjk->bik", w, a),
    "einsum of a list": lambda a, b, w: torch.einsum("bij,bjk->bik", [w, a]),
    "baddbmm": lambda a, b, w: torch.baddbmm(w, w, a),
    "addmm": lambda a, b, w: torch.addmm(w[0], a[0], w[1]),
    "rotary": lambda a, b, w: a * w.cos() + torch.cat([-a[..., 2:], a[..., :2]], -1) * w.sin(),
    "conv1d": lambda a, b, w: F.conv1d(w, a),
}


@pytest.mark.parametrize("name", BILINEAR)
def test_products_of_two_active_operands_are_shared(name):
    """sum R_a = sum R_b = sum R / 2"""
    model = Product(BILINEAR[name])
    a, b = torch.randn(2, 3, 4, 4).double()
    f, params = functionalize(model)
    got = lrp(f, params, (a, b), rules={("matmul", "product"): r.Uniform()}, targets=lambda y: y.flatten(1).sum(1))
    for half in got:
        CLOSE(half.sum(), model(a, b).sum().detach() / 2)


@pytest.mark.parametrize("name", WITH_A_CONSTANT)
def test_products_with_a_constant_are_never_halved(name):
    model = Product(WITH_A_CONSTANT[name])
    a, b = torch.randn(2, 3, 4, 4).double()
    f, params = functionalize(model)
    score = lambda y: y.sum().reshape(1)  # noqa: E731
    rules = {("matmul", "product"): r.Uniform(), "*": r.Gradient()}
    got = lrp(f, params, (a, b), rules=rules, targets=score)[0]
    CLOSE(got, a * grad(lambda a: model(a, b).sum())(a))


# Norms


NORMS = {
    "layer": (lambda: nn.LayerNorm(6), (6,)),
    "layer of two axes": (lambda: nn.LayerNorm((3, 4)), (3, 4)),
    "rms": (lambda: nn.RMSNorm(6), (6,)),
    "rms with epsilon": (lambda: nn.RMSNorm(6, eps=0.3), (6,)),
    "group": (lambda: nn.GroupNorm(2, 6), (6, 3)),
    "group of images": (lambda: nn.GroupNorm(3, 6), (6, 2, 2)),
    "instance": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "instance of images": (lambda: nn.InstanceNorm2d(4), (4, 3, 3)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_with_a_frozen_scale_conserve(name):
    make, shape = NORMS[name]
    model = make().double()
    if getattr(model, "weight", None) is not None:
        nn.init.normal_(model.weight)
    x = torch.randn(4, *shape).double()
    cotangent = torch.randn(4, *shape).double()
    f, params = functionalize(model)
    g = with_rules(f, {"normalization": r.FrozenScale()})
    value, pull = vjp(partial(g, params), x)
    assert torch.equal(value, model(x))
    got = x * pull(cotangent)[0]
    CLOSE(got.flatten(1).sum(1), (value * cotangent).flatten(1).sum(1).detach())
    if "rms" in name:
        CLOSE(got, (value * cotangent).detach())


def test_the_plain_gradient_of_a_layer_norm_conserves_nothing():
    x, cotangent = torch.randn(2, 4, 6).double()
    layer = nn.LayerNorm(6, eps=0.0).double()
    _, pull = vjp(layer, x)
    CLOSE((x * pull(cotangent)[0]).sum(1), torch.zeros(4).double())


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_normalize_and_norms_that_are_written_out(p):
    x, cotangent = torch.randn(2, 4, 6).double()
    for how in (
        lambda x: F.normalize(x, p=p, dim=-1),
        lambda x: x / x.norm(p, -1, keepdim=True),
        lambda x: x / torch.linalg.vector_norm(x, p, -1, keepdim=True),
        lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6),
        lambda x: x * torch.pow(x.pow(2).mean(-1, keepdim=True), -0.5),
        lambda x: x / x.std(-1, keepdim=True),
    ):
        f, params = functionalize(Act(how))
        value, pull = vjp(partial(with_rules(f, r.relp()), params), x)
        CLOSE(x * pull(cotangent)[0], value * cotangent)
        assert r.explain(f, params, x, r.relp(), strict=True)


def test_an_instance_norm_with_running_statistics_is_linear():
    model = nn.InstanceNorm1d(3, track_running_stats=True, affine=True).double()
    model(torch.randn(4, 3, 5).double())
    model.eval()
    x = torch.randn(4, 3, 5).double()
    f, params = functionalize(model)
    g = with_rules(f, {"normalization": r.FrozenScale()})
    CLOSE(grad(lambda x: g(params, x).square().sum())(x), grad(lambda x: f(params, x).square().sum())(x))


def test_batch_norm_passes_what_comes_in():
    model = nn.BatchNorm1d(3).double().eval()
    for tensor in (model.running_mean, model.weight, model.bias):
        nn.init.normal_(tensor)
    x, cotangent = torch.randn(2, 4, 3).double()
    f, params = functionalize(model)
    _, pull = vjp(partial(with_rules(f, {"batch_norm": r.Pass()}), params), x)
    CLOSE(x * pull(cotangent)[0], (model(x) * cotangent).detach(), rtol=1e-6)


# Softmax


def test_the_softmax_of_attn_lrp_is_its_gradient_and_does_not_conserve():
    """x * gradient = x * (R - s sum R), the Taylor expansion of AttnLRP; its sum is not that of R."""
    x, cotangent = torch.randn(2, 4, 6).double()
    f, params = functionalize(nn.Softmax(-1))
    s, pull = vjp(partial(with_rules(f, {"softmax": r.Gradient()}), params), x)
    got, start = x * pull(cotangent)[0], s * cotangent
    CLOSE(got, x * (start - s * start.sum(1, keepdim=True)))
    assert (got.sum(1) - start.sum(1)).abs().min() > 1e-3


# Transforms


PRESETS = {
    "epsilon_plus": r.epsilon_plus(),
    "epsilon_alpha2_beta1_flat": r.epsilon_alpha2_beta1_flat(),
    "epsilon_gamma_box": r.epsilon_gamma_box(-4.0, 4.0),
    "attn_lrp": r.attn_lrp(),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_vmap_is_the_stacked_loop(preset):
    f, params = functionalize(network(act=nn.GELU))
    run = lambda x: lrp(f, params, x[None], rules=PRESETS[preset], targets=[0, 2])[:, 0]  # noqa: E731
    whole = lrp(f, params, IMAGES, rules=PRESETS[preset], targets=[0, 2])
    CLOSE(vmap(run, out_dims=1)(IMAGES), whole)
    CLOSE(torch.stack([run(x) for x in IMAGES], 1), whole)
    no_batch = with_rules(f, PRESETS[preset])
    rows = vmap(jacrev(lambda x: no_batch(params, x)))(IMAGES)[:, [0, 2]].transpose(0, 1)
    CLOSE(rows if "flat" in preset or "box" in preset else rows * IMAGES, whole)


def test_several_models_at_once():
    models = [network() for _ in range(3)]
    f, _ = functionalize(models[0])
    stacked = torch.stack([functionalize(m)[1] for m in models])
    got = vmap(lambda p: lrp(f, p, IMAGES, rules=r.epsilon_plus(), targets=1))(stacked)
    for row, p in zip(got, stacked):
        CLOSE(row, lrp(f, p, IMAGES, rules=r.epsilon_plus(), targets=1))


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_chunks_change_nothing(chunk_size):
    f, params = functionalize(network())
    whole = lrp(f, params, IMAGES, rules=r.epsilon_plus(), targets=targets.every())
    CLOSE(lrp(f, params, IMAGES, rules=r.epsilon_plus(), targets=targets.every(), chunk_size=chunk_size), whole)
    for row, target in zip(whole, range(3)):
        CLOSE(lrp(f, params, IMAGES, rules=r.epsilon_plus(), targets=target), row)


def test_a_mask_probe_reads_the_relevance():
    """dF/dm at m = 1, where m scales a value, is its relevance: at inputs and at sites."""
    f, params = functionalize(network())
    rules = r.epsilon_plus()
    mask = torch.ones_like(IMAGES)
    probe = grad(lambda m: with_rules(f, rules)(params, m * IMAGES)[:, 1].sum())(mask)
    CLOSE(probe, lrp(f, params, IMAGES, rules=rules, targets=1))
    site = "3"
    scaled = lambda m: tdhook.intervene(with_rules(f, rules), {site: lambda v: v * m})(params, IMAGES)[:, 1].sum()  # noqa: E731
    CLOSE(grad(scaled)(torch.ones(4, 4, 3, 3).double()), lrp(f, params, IMAGES, rules=rules, targets=1, at=site)[site])


def test_at_the_input_is_the_input():
    f, params = functionalize(network())
    for preset in (r.epsilon_plus(), r.epsilon_alpha2_beta1(), r.epsilon_gamma_box(-4.0, 4.0), r.epsilon_plus_flat()):
        direct = lrp(f, params, IMAGES, rules=preset, targets=1)
        at = lrp(f, params, IMAGES, rules=preset, targets=1, at="0:in")["0:in"]
        assert (at - direct).norm() < 1e-3 * direct.norm()  # the stabilizer, where the rule divides by an operand


def test_a_reused_module_is_two_copies_of_it():
    class Twice(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.first, self.second, self.act = first, second, nn.ReLU()

        def forward(self, x):
            return self.second(self.act(self.first(x)))

    one, other = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 4).double()
    for rule in (r.Epsilon(), r.Gamma(0.3), r.AlphaBeta()):
        rows = []
        for model in (Twice(one, one), Twice(one, other)):
            f, params = functionalize(model)
            rows.append(lrp(f, params, x, rules={"linear": rule, "activation": r.Pass()}, targets=1))
        assert torch.equal(*rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["epsilon_plus", "epsilon_alpha2_beta1_flat", "attn_lrp"])
def test_half_precision(preset, dtype):
    """Coefficients are computed in float32, so that the result is as exact as the type."""
    model = network(act=nn.GELU)
    f, params = functionalize(model)
    exact = lrp(f, params, IMAGES, rules=PRESETS[preset], targets=1)
    f, params = functionalize(model.to(dtype))
    x = IMAGES.to(dtype)
    assert torch.equal(with_rules(f, PRESETS[preset])(params, x), f(params, x))
    got = lrp(f, params, x, rules=PRESETS[preset], targets=1)
    assert got.dtype == dtype
    error = (got.double() - exact).norm() / exact.norm()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_parameters_have_relevance_too():
    """sum W dF/dW over the last layer is the output without its bias."""
    model = network()
    f, params = functionalize(model)
    gradients = grad(lambda p: with_rules(f, r.epsilon_plus(0.0))(p, IMAGES)[:, 1].sum())(params)
    relevance = (gradients["8", "weight"] * params["8", "weight"])[1]
    CLOSE(relevance.sum(), (model(IMAGES)[:, 1] - model[8].bias[1]).sum().detach())
