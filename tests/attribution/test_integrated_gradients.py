"""Integrated gradients against closed forms, captum and plain loops."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from typing import ClassVar

import captum.attr
import numpy
import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import grad, vmap

import tdhook
from tdhook import functionalize, targets
from tdhook.attribution import convergence_delta, integrated_gradients
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
CAPTUM = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-8)  # it casts its weights to float32


def mlp(*widths, act=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1]).double()


def cnn():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(-3), nn.Linear(36, 5))
    return model.double().eval()


def loop(model, x, baseline, target, steps=50):
    """Integrated gradients in float64, one path point at a time."""
    nodes, weights = numpy.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(x)
    for node, weight in zip((nodes + 1) / 2, weights / 2):
        point = (baseline + node * (x - baseline)).detach().requires_grad_()
        (g,) = torch.autograd.grad(model(point)[..., target].sum(), point)
        total += weight * g
    return total * (x - baseline)


class Calls(nn.Module):
    """Counts its calls in a list that no twin copies."""

    count: ClassVar = [0]

    def forward(self, x: Tensor) -> Tensor:
        Calls.count[0] += 1
        return x


@pytest.fixture
def calls():
    Calls.count[0] = 0
    return Calls.count


# Closed forms ----------------------------------------------------------------------------------------------------------


def test_quadratic_form():
    """F(x) = x'Ax: attributions are (x - x')_i [A(x + x')]_i for symmetric A."""

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            a = torch.randn(3, 4, 4).double()
            self.a = nn.Parameter(a + a.mT)

        def forward(self, x):
            return torch.einsum("bi,tij,bj->bt", x, self.a, x)

    model = Quadratic()
    f, params = functionalize(model)
    x, baseline = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    got = integrated_gradients(f, params, x, targets=targets.every(), baselines=baseline, steps=1)
    CLOSE(got, (x - baseline) * torch.einsum("tij,bj->tbi", model.a.detach(), x + baseline))


def test_product_of_inputs():
    """F = x y: each input gets half of F when the baseline is zero."""

    class Product(nn.Module):
        def forward(self, a, b):
            return (a * b).sum(-1)

    f, params = functionalize(Product())
    a, b = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    for got in integrated_gradients(f, params, (a, b), steps=2):
        CLOSE(got, a * b / 2)


def test_exponential_in_float64():
    class Exponential(nn.Module):
        def forward(self, x):
            return x.exp().sum(-1)

    f, params = functionalize(Exponential())
    x = torch.linspace(-2, 2, 6).double().reshape(2, 3)
    CLOSE(integrated_gradients(f, params, x, steps=30), x.exp() - 1)


class BM2(nn.Module):
    def forward(self, a, b):
        return F.relu(F.relu(a) - 1 - F.relu(b))


class BM3(nn.Module):
    def forward(self, a, b):
        return F.relu(F.relu(a - 1) - F.relu(b))


@pytest.mark.parametrize(("model", "tolerance"), [(BM2, 1e-3), (BM3, 1e-2)])
def test_implementation_invariance(model, tolerance):
    """captum's IG1 and IG2: equal functions, however they are written, have equal attributions 1.5 and -0.5."""
    f, params = functionalize(model())
    inputs = (torch.tensor([3.0]).double(), torch.tensor([1.0]).double())
    a, b = integrated_gradients(f, params, inputs, steps=1000, quadrature="midpoint")
    torch.testing.assert_close(torch.cat([a, b]), torch.tensor([1.5, -0.5]).double(), rtol=0, atol=tolerance)


def test_without_multiplication():
    """captum's IG3."""
    f, params = functionalize(BM2())
    inputs = (torch.tensor([3.0]).double(), torch.tensor([1.0]).double())
    got = torch.cat(integrated_gradients(f, params, inputs, steps=1000, quadrature="midpoint", multiply_by_inputs=False))
    torch.testing.assert_close(got, torch.tensor([0.5, -0.5]).double(), rtol=0, atol=1e-3)


class ML(nn.Module):
    """captum's BasicModel_MultiLayer; `multi_relu` takes and gives two tensors."""

    class Both(nn.Module):
        def forward(self, a, b):
            return F.relu(a), F.relu(b)

    def __init__(self, multi=False):
        super().__init__()
        self.linear0, self.linear1, self.linear2 = nn.Linear(3, 3, bias=False), nn.Linear(3, 4), nn.Linear(4, 2)
        self.multi, self.multi_relu = multi, self.Both()
        with torch.no_grad():
            self.linear0.weight.copy_(torch.eye(3))
            self.linear1.weight.fill_(1)
            self.linear1.bias.copy_(torch.tensor([-10.0, 1, 1, 1]))
            self.linear2.weight.fill_(1)
            self.linear2.bias.copy_(torch.tensor([-1.0, 1]))
        self.double()

    def forward(self, x):
        h = self.linear1(self.linear0(x))
        a, b = self.multi_relu(h, h.clone())
        return self.linear2(a + b if self.multi else a)


def test_multi_layer():
    """captum's IG4; the kink at 0.1 leaves an error of the rule."""
    f, params = functionalize(ML())
    x = torch.tensor([[0.0, 100.0, 0.0]]).double()
    got = integrated_gradients(f, params, x, targets=0, steps=10, quadrature="midpoint")
    # nodes 0.05, 0.15, ...: the kink at 0.1 lies between two cells
    CLOSE(got, torch.tensor([[0.0, 390.0, 0.0]]).double())


def test_a_layer_with_two_outputs():
    """captum's LI1."""
    f, params = functionalize(ML(multi=True))
    x = torch.tensor([[0.0, 100.0, 0.0]]).double()
    sites = ["multi_relu:out[0]", "multi_relu:out[1]"]
    got = integrated_gradients(f, params, x, targets=0, at=sites)
    assert list(got.keys()) == sites
    # the activations start from those of the zero input: relu([-10, 1, 1, 1])
    for site in sites:
        CLOSE(got[site], torch.tensor([[90.0, 100.0, 100.0, 100.0]]).double())


# captum ----------------------------------------------------------------------------------------------------------------

MODELS = {
    "mlp": (lambda: mlp(6, 8, 8, 5), (6,)),
    "relu": (lambda: mlp(6, 8, 8, 5, act=nn.ReLU), (6,)),
    "cnn": (cnn, (2, 8, 8)),
}
RULES = {
    "gauss_legendre": "gausslegendre",
    "riemann_left": "riemann_left",
    "riemann_right": "riemann_right",
    "midpoint": "riemann_middle",
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_equals_captum_and_the_loop(name, batch):
    make, shape = MODELS[name]
    model = make()
    f, params = functionalize(model)
    x, baseline = torch.randn(batch, *shape).double(), torch.randn(batch, *shape).double()
    got = integrated_gradients(f, params, x, targets=[0, 3], baselines=baseline)
    assert got.shape == (2, batch, *shape) and got.dtype == torch.float64
    for row, target in zip(got, (0, 3)):
        CAPTUM(row, captum.attr.IntegratedGradients(model).attribute(x, baseline, target=target))
        torch.testing.assert_close(row, loop(model, x, baseline, target), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_equals_captum(rule, multiply):
    model = mlp(6, 8, 5)
    f, params = functionalize(model)
    x = torch.randn(3, 6).double()
    got = integrated_gradients(f, params, x, targets=2, quadrature=rule, steps=9, multiply_by_inputs=multiply)
    reference = captum.attr.IntegratedGradients(model, multiply_by_inputs=multiply)
    CAPTUM(got, reference.attribute(x, target=2, method=RULES[rule], n_steps=9))


def test_several_inputs_equal_captum():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, a, b, scale):
            return self.out(torch.tanh(self.a(a) * self.b(b))) * scale[:, None]

    model = Two().double()
    f, params = functionalize(model)
    a, b, scale = torch.randn(3, 3).double(), torch.randn(3, 4).double(), torch.tensor([1, 2, 3])
    base = (torch.randn(3, 3).double(), torch.randn(3, 4).double())
    expected = captum.attr.IntegratedGradients(model).attribute((a, b), base, target=1, additional_forward_args=(scale,))
    got = integrated_gradients(f, params, (a, b, scale), targets=1, baselines=(*base, None))
    assert isinstance(got, tuple) and got[2] is None
    named = integrated_gradients(
        f, params, {"a": a, "b": b, "scale": scale}, targets=1, baselines={"scale": None, "b": base[1], "a": base[0]}
    )
    for g, n, e in zip(got, (named["a"], named["b"]), expected):
        CAPTUM(g, e)
        CLOSE(n, g)
    assert named["scale"] is None
    inputs = TensorDict({"a": a, "b": b, "scale": scale}, [3])
    packed = integrated_gradients(
        f, params, inputs, targets=[1, 0], baselines=TensorDict({"b": base[1], "a": base[0], "scale": scale}, [3])
    )
    assert packed.batch_size == (2, 3) and set(packed.keys()) == {"a", "b"}
    CLOSE(packed["a"][0], got[0])


@pytest.mark.parametrize("layer", ["0", "1", "2", "3"])
def test_layers_equal_captum(layer):
    model = mlp(6, 8, 7, 5)
    f, params = functionalize(model)
    x, baseline = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    got = integrated_gradients(f, params, x, targets=[4, 1], baselines=baseline, at=layer)[layer]
    reference = captum.attr.LayerIntegratedGradients(model, model[int(layer)])
    for row, target in zip(got, (4, 1)):
        CAPTUM(row, reference.attribute(x, baseline, target=target))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.out = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, ids, mask=None):
        h = torch.tanh(self.mix(self.embed(ids)))
        h = h if mask is None else h * mask[..., None]
        return self.out(h.cumsum(1).tanh())


IDS = torch.tensor([[1, 4, 7, 2], [3, 0, 9, 9]])


def test_token_ids_at_the_embedding_equal_captum():
    model = Tokens()
    f, params = functionalize(model)
    chosen = [targets.index(i, position=-1) for i in (0, 2)]
    got = integrated_gradients(f, params, IDS, targets=chosen, baselines=torch.zeros_like(IDS), at="embed")["embed"]
    reference = captum.attr.LayerIntegratedGradients(lambda ids: model(ids)[:, -1], model.embed)
    for row, target in zip(got, (0, 2)):
        CAPTUM(row, reference.attribute(IDS, torch.zeros_like(IDS), target=target))


def test_baselines_by_site_are_those_of_other_ids():
    f, params = functionalize(Tokens())
    other = torch.full_like(IDS, 5)
    chosen = targets.index(1, position=-1)
    by_ids = integrated_gradients(f, params, IDS, targets=chosen, baselines=other, at="embed")["embed"]
    value = params["embed", "weight"][5].expand(2, 4, 4)
    by_site = integrated_gradients(f, params, IDS, targets=chosen, baselines={"embed": value}, at="embed")["embed"]
    CLOSE(by_site, by_ids)
    row = {"embed": params["embed", "weight"][5]}  # broadcasts
    CLOSE(integrated_gradients(f, params, IDS, targets=chosen, baselines=row, at="embed")["embed"], by_ids)
    zero = integrated_gradients(f, params, IDS, targets=chosen, baselines={"embed": 0.0}, at="embed")["embed"]
    zeros = {"embed": torch.zeros(2, 4, 4).double()}
    CLOSE(integrated_gradients(f, params, IDS, targets=chosen, baselines=zeros, at="embed")["embed"], zero)


def test_named_inputs_with_an_integer_mask():
    f, params = functionalize(Tokens())
    inputs = {"ids": IDS, "mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    chosen = targets.index(1, position=-1)
    got = integrated_gradients(f, params, inputs, targets=chosen, baselines={"embed": 0.0}, at="embed")["embed"]
    assert got[0, 3].abs().max() == 0 and got[0, 2].abs().min() > 0


def test_several_sites_move_together():
    """Completeness over both branches, and for a linear head the attribution of each is that of it alone."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.a(x) * self.b(x))

    model = Branches().double()
    f, params = functionalize(model)
    x, baseline = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    got = integrated_gradients(f, params, x, targets=0, baselines=baseline, at=["b", "a"])
    assert list(got.keys()) == ["b", "a"]
    delta = convergence_delta(f, params, x, got, targets=0, baselines=baseline, at=["b", "a"])
    CLOSE(delta, torch.zeros(5).double(), atol=1e-12)
    a0, a1, b0, b1 = model.a(baseline), model.a(x), model.b(baseline), model.b(x)
    w = model.out.weight[0]
    CLOSE(got["a"], ((a1 - a0) * (b0 + b1) / 2 * w).detach())


# Axioms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quadrature", ["gauss_legendre", "midpoint", "trapezoid", "riemann_left", "riemann_right"])
def test_completeness(quadrature):
    model = mlp(6, 8, 5)
    f, params = functionalize(model)
    x, baseline = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    steps = 30 if quadrature == "gauss_legendre" else 2000
    got = integrated_gradients(f, params, x, targets=[1, 2, 3], baselines=baseline, steps=steps, quadrature=quadrature)
    delta = convergence_delta(f, params, x, got, targets=[1, 2, 3], baselines=baseline)
    expected = got.sum(-1) - (model(x) - model(baseline))[:, 1:4].T
    assert delta.shape == (3, 3)
    CLOSE(delta, expected.detach())
    tolerance = {"gauss_legendre": 1e-10, "midpoint": 1e-5, "trapezoid": 1e-5}.get(quadrature, 1e-2)
    assert delta.abs().max() < tolerance


def test_linearity_in_the_target():
    f, params = functionalize(mlp(6, 8, 5))
    x = torch.randn(3, 6).double()
    both = integrated_gradients(f, params, x, targets=lambda out: 2 * out[:, 0] - 3 * out[:, 4])
    first, second = integrated_gradients(f, params, x, targets=[0, 4])
    CLOSE(both, 2 * first - 3 * second)


def test_a_logit_difference_is_the_difference():
    f, params = functionalize(mlp(6, 8, 5))
    x = torch.randn(3, 6).double()
    first, second = integrated_gradients(f, params, x, targets=[0, 4])
    CLOSE(integrated_gradients(f, params, x, targets=targets.logit_difference(0, 4)), first - second)


def test_an_unused_input_gets_zero():
    class Half(nn.Module):
        def forward(self, a, b):
            return a.square().sum(-1)

    f, params = functionalize(Half())
    x = torch.randn(2, 3)
    a, b = integrated_gradients(f, params, (x, x.clone()))
    assert a.abs().min() > 0 and torch.equal(b, torch.zeros(2, 3))


# Targets ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plural", "singular"),
    [
        ([0, 3], [0, 3]),
        ([2], [2]),
        ((1, targets.index(-1)), [1, 4]),
        (targets.indices([4, 4, 0]), [4, 4, 0]),
        (targets.every(), range(5)),
        (lambda out: out[:, 1:3], [1, 2]),
        ([targets.logit_difference(0, 1), lambda out: out[:, 2]], [targets.logit_difference(0, 1), 2]),
        (targets.top_k(2), [lambda out: out.topk(2).values[:, 0], lambda out: out.topk(2).values[:, 1]]),
    ],
)
def test_plural_targets_are_the_stacked_singular_ones(plural, singular):
    f, params = functionalize(mlp(6, 8, 5))
    x = torch.randn(3, 6).double()
    each = torch.stack([integrated_gradients(f, params, x, targets=t) for t in singular])
    CLOSE(integrated_gradients(f, params, x, targets=plural), each)


def test_one_target_per_example():
    model = mlp(6, 8, 5)
    f, params = functionalize(model)
    x, classes = torch.randn(3, 6).double(), torch.tensor([4, 0, 2])
    got = integrated_gradients(f, params, x, targets=targets.per_example(classes))
    CLOSE(got, torch.stack([integrated_gradients(f, params, x, targets=int(c))[i] for i, c in enumerate(classes)]))
    CAPTUM(got, captum.attr.IntegratedGradients(model).attribute(x, target=classes))


# Cost ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [0, [0, 1, 2, 3, 4]])
def test_one_forward_per_chunk_whatever_the_number_of_targets(calls, chosen):
    f, params = functionalize(nn.Sequential(Calls(), *mlp(6, 8, 5)))
    x = torch.randn(3, 6).double()
    integrated_gradients(f, params, x, targets=chosen, steps=12)
    assert calls == [1]
    calls[0] = 0
    integrated_gradients(f, params, x, targets=chosen, steps=12, chunk_size=5)
    assert calls == [3]


def test_what_lies_before_the_site_runs_once_per_input(calls):
    f, params = functionalize(nn.Sequential(Calls(), *mlp(6, 8, 5)))
    x = torch.randn(3, 6).double()
    integrated_gradients(f, params, x, targets=[0, 1], steps=12, chunk_size=2, at="1")
    assert calls == [2]
    calls[0] = 0
    integrated_gradients(f, params, x, targets=[0, 1], steps=12, chunk_size=2, baselines={"1": 0.0}, at="1")
    assert calls == [1]


@pytest.mark.parametrize("at", [None, "1"])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7, 8, 100])
def test_chunks_change_nothing(chunk_size, at):
    f, params = functionalize(mlp(6, 8, 5))
    x = torch.randn(3, 6).double()
    whole = integrated_gradients(f, params, x, targets=[0, 1, 2], steps=7, at=at)
    parts = integrated_gradients(f, params, x, targets=[0, 1, 2], steps=7, at=at, chunk_size=chunk_size)
    CLOSE(parts if at is None else parts[at], whole if at is None else whole[at])


# Regressions of silent faults elsewhere --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_the_trapezoid_gives_the_identity_its_value(steps):
    """captum gives (steps - 1) / steps of it."""
    f, params = functionalize(nn.Flatten(-1))
    x = torch.tensor([1.0, -2.0]).double()
    CLOSE(integrated_gradients(f, params, x, steps=steps, quadrature="trapezoid"), x)


def test_float64_stays_float64():
    """captum's weights are float32: an error of 3e-9 for a linear model."""
    model = mlp(6, 5)
    f, params = functionalize(model)
    x = torch.randn(3, 6).double()
    torch.testing.assert_close(
        integrated_gradients(f, params, x, targets=1), x * model[0].weight[1].detach(), rtol=1e-14, atol=1e-15
    )


def test_one_tensor_passed_twice_is_two_inputs():
    """captum sums the gradients of both into each: 4 where 2 is right."""

    class Two(nn.Module):
        def forward(self, a, b):
            return (a + a * b).sum(-1)

    f, params = functionalize(Two())
    x = torch.tensor([[2.0]]).double()
    a, b = integrated_gradients(f, params, (x, x))
    CLOSE(torch.stack([a, b]).flatten(), torch.tensor([4.0, 2.0]).double())


def test_an_argument_that_is_no_batch_stays_as_it_is():
    """captum repeats an additional argument of length 7 to 28 for four steps."""

    class Weighted(nn.Module):
        def forward(self, x, lengths):
            assert lengths.shape == (7,)
            return x.sum(-1) * lengths.sum()

    f, params = functionalize(Weighted())
    got, none = integrated_gradients(f, params, (torch.ones(1, 2), torch.arange(7)), steps=4)
    assert none is None
    torch.testing.assert_close(got, torch.full((1, 2), 21.0))


# Composition -----------------------------------------------------------------------------------------------------------


def test_under_vmap_over_examples():
    f, params = functionalize(mlp(6, 8, 5))
    x = torch.randn(3, 6).double()
    each = vmap(lambda x: integrated_gradients(f, params, x, targets=[0, 1]))(x)
    CLOSE(each, integrated_gradients(f, params, x, targets=[0, 1]).transpose(0, 1))


@pytest.mark.parametrize("at", [None, "1"])
def test_under_vmap_over_models(at):
    models = [mlp(6, 8, 5, seed=i) for i in range(3)]
    f, _ = functionalize(models[0])
    every = [functionalize(m)[1] for m in models]
    x = torch.randn(2, 6).double()

    def run(params):
        got = integrated_gradients(f, params, x, targets=[0, 1], at=at)
        return got if at is None else got[at]

    CLOSE(vmap(run)(torch.stack(every)), torch.stack([run(p) for p in every]))


def test_the_gradient_of_an_attribution_is_a_second_derivative():
    f, params = functionalize(mlp(3, 4, 2))
    x = torch.randn(1, 3).double()
    norm = lambda x: integrated_gradients(f, params, x, targets=0).square().sum()  # noqa: E731
    assert torch.autograd.gradcheck(norm, x.requires_grad_())
    torch.testing.assert_close(grad(norm)(x), torch.autograd.grad(norm(x), x)[0])


def test_training_on_attributions_reaches_the_parameters():
    f, params = functionalize(mlp(3, 4, 2))
    x = torch.randn(2, 3).double()
    got = grad(lambda p: integrated_gradients(f, p, x, targets=0, at="1")["1"].square().sum())(params)
    step = 1e-6
    shifted = params.clone()
    shifted["2", "weight"][0, 0] += step
    ends = [integrated_gradients(f, p, x, targets=0, at="1")["1"].square().sum() for p in (params, shifted)]
    torch.testing.assert_close(got["2", "weight"][0, 0], (ends[1] - ends[0]) / step, rtol=1e-4, atol=1e-6)


def test_of_a_plain_function_and_of_a_transform():
    x = torch.randn(2, 3).double()
    CLOSE(integrated_gradients(lambda params, x: (x * params).sum(-1), 2.0, x), 2 * x)
    f, params = functionalize(mlp(3, 4, 4, 2))
    zeroed = tdhook.intervene(f, {"0": lambda value: value * 0})
    assert integrated_gradients(zeroed, params, x, targets=0).abs().max() == 0
    assert integrated_gradients(zeroed, params, x, targets=0, baselines={"2": 0.0}, at="2")["2"].abs().max() > 0


def test_nothing_of_the_caller_is_changed():
    model = mlp(3, 4, 2)
    f, params = functionalize(model)
    x, baseline = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    before = copy.deepcopy((x, baseline, params.clone(), torch.get_rng_state()))
    integrated_gradients(f, params, x, targets=[0, 1], baselines=baseline)
    assert torch.equal(x, before[0]) and torch.equal(baseline, before[1]) and (params == before[2]).all()
    assert torch.equal(torch.get_rng_state(), before[3])
    assert not x.requires_grad and x.grad is None and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float32, 1e-4)])
def test_the_dtype_of_the_data_is_kept(dtype, tolerance):
    model = mlp(6, 8, 5)
    x = torch.randn(1, 6).double()
    exact = loop(model, x, 0 * x, 1)
    f, params = functionalize(model.to(dtype))
    got = integrated_gradients(f, params, x.to(dtype), targets=1)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


# Compiled --------------------------------------------------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.parametrize(("backend", "chunk_size"), [("aot_eager", None), ("aot_eager", 4), ("inductor", None)])
def test_compiled_equals_eager_and_does_not_recompile(backend, chunk_size):
    torch._dynamo.reset()
    f, params = functionalize(mlp(6, 8, 5))
    run = partial(integrated_gradients, targets=[0, 1], steps=10, chunk_size=chunk_size)
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(3, 6).double()
        with torch._dynamo.config.patch(error_on_recompile=True):
            CLOSE(compiled(f, params, x), run(f, params, x), rtol=1e-9, atol=1e-10)


@pytest.mark.compile
def test_compiled_at_a_site_and_with_its_delta():
    torch._dynamo.reset()
    f, params = functionalize(Tokens())
    chosen = [targets.index(i, position=-1) for i in (0, 2)]

    def run(params, ids, baselines):
        got = integrated_gradients(f, params, ids, targets=chosen, baselines=baselines, at="embed", steps=5)
        return got["embed"], convergence_delta(f, params, ids, got, targets=chosen, baselines=baselines, at="embed")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(params, IDS, 0 * IDS), run(params, IDS, 0 * IDS)):
        CLOSE(a, b)


# Warnings and errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(6, track_running_stats=False)])
def test_a_model_in_train_mode_is_warned_about(layer):
    f, params = functionalize(nn.Sequential(layer, nn.Linear(6, 5)).train())
    with pytest.warns(errors.TdhookWarning, match=r"model is in train mode, where '0' .*call model.eval\(\)"):
        integrated_gradients(f, params, torch.randn(3, 6), targets=0, steps=2)


X = torch.ones(3, 6)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (X.long(), {}, errors.InputError, "int64 tensor of shape .* no floating-point tensor .* at=<site of the embedding>"),
        (X, {"steps": 0}, errors.InputError, "steps is an integer of at least 1, got 0"),
        (X, {"steps": 2.5}, errors.InputError, "steps is an integer of at least 1, got 2.5"),
        (X, {"steps": 1, "quadrature": "trapezoid"}, errors.InputError, "at least 2, got 1"),
        (X, {"quadrature": "simpson"}, errors.InputError, "quadrature='simpson' is unknown"),
        (X, {"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None, got 0"),
        (X, {"baselines": "zero"}, errors.InputError, "baselines holds 'zero'"),
        (X, {"baselines": torch.ones(4, 6)}, errors.InputError, r"shape \[4, 6\], which does not broadcast to \[3, 6\]"),
        (X, {"baselines": X.double()}, errors.InputError, "float64 .* for a float32"),
        (X, {"baselines": (X, X)}, errors.InputError, "baselines holds a tuple"),
        (X, {"targets": []}, errors.TargetError, "targets is empty"),
        (X, {"targets": 5}, errors.TargetError, "index=5 is out of range for an output with 5 classes"),
        (X, {"targets": [0, -6]}, errors.TargetError, "indices=-6 is out of range"),
        (X, {"targets": None}, errors.TargetError, "needs an output of one scalar per example"),
        (X, {"targets": torch.tensor([0, 1])}, errors.TargetError, "targets is a tensor"),
        (X, {"at": "7"}, errors.SiteError, "the model has no module '7'"),
        (X, {"at": "*"}, errors.SiteError, r"at takes exact sites, got the pattern '\*'"),
        (X, {"at": "0", "baselines": {"0": torch.ones(9)}}, errors.InputError, "baselines for '0' holds .* does not broadcast"),
        (X, {"at": ["0", "2"], "baselines": {"0": 0.0}}, errors.SiteError, "baselines has no '2'; it has '0'"),
        (X, {"at": "0", "baselines": torch.ones(1, 6)}, errors.InputError, "give the shape of inputs"),
        (
            X,
            {"at": "0", "baselines": {"7": 0.0}},
            errors.InputError,
            r"a dict with '7' for a float32 .* or \{site: value\} for at",
        ),
    ],
)
def test_bad_input(inputs, options, error, message):
    f, params = functionalize(mlp(6, 8, 5).float())
    with pytest.raises(error, match=message):
        integrated_gradients(f, params, inputs, **{"targets": 0, **options})


def test_token_ids_need_baselines_of_their_kind():
    f, params = functionalize(Tokens())
    with pytest.raises(errors.InputError, match=r"baselines=0.0 cannot stand for a int64 tensor.*other token ids"):
        integrated_gradients(f, params, IDS, targets=0, at="embed")
    with pytest.raises(errors.InputError, match="at has 'embed:in', which holds a int64 tensor"):
        integrated_gradients(f, params, IDS, targets=targets.index(0, position=-1), baselines=IDS, at="embed:in")


def test_a_mapping_with_other_names_is_refused():
    class Two(nn.Module):
        def forward(self, a, b):
            return (a * b).sum(-1)

    f, params = functionalize(Two())
    with pytest.raises(errors.InputError, match="baselines is a dict with 'a', 'c', which is not the structure of inputs"):
        integrated_gradients(f, params, {"a": X, "b": X}, baselines={"a": X, "c": X})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_cannot_be_asked_for_without_grad_mode(mode):
    f, params = functionalize(mlp(6, 8, 5))
    with mode(), pytest.raises(errors.GradientError, match="integrated_gradients needs gradients, but grad mode is off"):
        integrated_gradients(f, params, X.double(), targets=0)


def test_sites_need_a_functional_model():
    with pytest.raises(errors.ModelError, match="has no sites"):
        integrated_gradients(lambda params, x: x.sum(-1), {}, X, at="0")


# Convergence delta -----------------------------------------------------------------------------------------------------


def test_the_delta_of_half_an_attribution_is_minus_the_other_half():
    f, params = functionalize(mlp(6, 8, 5))
    x = torch.randn(3, 6).double()
    got = integrated_gradients(f, params, x, targets=[0, 4])
    difference = f(params, x) - f(params, 0 * x)
    with torch.no_grad():
        delta = convergence_delta(f, params, x, got / 2, targets=[0, 4])
    CLOSE(delta, -difference[:, [0, 4]].T / 2, atol=1e-10)
    assert convergence_delta(f, params, x, got[0], targets=0).shape == (3,)


def test_the_delta_sums_over_several_inputs():
    f, params = functionalize(BM2())
    inputs = (torch.tensor([3.0, 2.0]).double(), torch.tensor([1.0, 0.5]).double())
    got = integrated_gradients(f, params, inputs, steps=999, quadrature="midpoint")
    delta = convergence_delta(f, params, inputs, got)
    assert delta.shape == (2,) and delta.abs().max() < 2e-3


@pytest.mark.parametrize(
    ("attributions", "message"),
    [
        (torch.ones(3, 6), r"shape \[3, 6\] where shape \[2, 3, 6\] is expected"),
        ({"x": torch.ones(3, 6)}, "attributions has a dict"),
        (None, "attributions has None"),
    ],
)
def test_the_delta_refuses_attributions_that_do_not_fit(attributions, message):
    f, params = functionalize(mlp(6, 8, 5))
    with pytest.raises(errors.InputError, match=message):
        convergence_delta(f, params, X.double(), attributions, targets=[0, 1])


def test_the_delta_refuses_attributions_of_other_sites():
    f, params = functionalize(mlp(6, 8, 5))
    got = integrated_gradients(f, params, X.double(), targets=0, at="0")
    with pytest.raises(errors.InputError, match="keyed by the sites of at, 2"):
        convergence_delta(f, params, X.double(), got, targets=0, at="2")


def test_a_model_that_writes_into_its_own_tensors():
    """The symptom: vmap refuses to write a moving value into a tensor that does not move."""

    class Fill(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5)

        def forward(self, x):
            out = torch.zeros(len(x), 5, dtype=x.dtype)
            out[:, :4] = self.linear(x).tanh()[:, :4]
            return out

    model = Fill().double()
    f, params = functionalize(model)
    x = torch.randn(3, 6).double()
    with pytest.warns(errors.TdhookWarning, match="vmap cannot run this model"):
        got = integrated_gradients(f, params, x, targets=[1, 4])
    torch.testing.assert_close(got[0], loop(model, x, 0 * x, 1), rtol=1e-10, atol=1e-13)
    assert got[1].abs().max() == 0


def test_progress_counts_path_points():
    f, params = functionalize(nn.Linear(3, 1))
    seen = []
    options = {"targets": 0, "steps": 5, "chunk_size": 2, "progress": lambda done, total: seen.append((done, total))}
    integrated_gradients(f, params, torch.ones(1, 3), **options)
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]
