"""Gradients and gradients times inputs against autograd, captum and numbers worked out by hand."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import grad, vmap

import tdhook
from tdhook import functionalize, targets
from tdhook.attribution.saliency import input_x_gradient, saliency
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
signed = partial(saliency, absolute=False)


def mlp(*widths, act=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1]).double()


def cnn():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(-3), nn.Linear(36, 5))
    return model.double().eval()


def row(*numbers):
    return torch.tensor([numbers]).double()


# Numbers worked out by hand: the models of captum's tests ---------------------------------------------------------------


class BM(nn.Module):
    def forward(self, x):
        return 1 - F.relu(1 - x)


class BM2(nn.Module):
    def forward(self, a, b):
        return F.relu(F.relu(a) - 1 - F.relu(b))


class BM4(nn.Module):
    def forward(self, a, b, divisor):
        return F.relu(F.relu(a - 1) - F.relu(b) / divisor)


class BM5(nn.Module):
    def forward(self, a, b, factors):
        return F.relu(F.relu(a - 1) * factors[0] - F.relu(b) * factors[1])


class ML(nn.Module):
    """captum's BasicModel_MultiLayer."""

    def __init__(self, inplace=False):
        super().__init__()
        self.linear0, self.linear1, self.linear2 = nn.Linear(3, 3, bias=False), nn.Linear(3, 4), nn.Linear(4, 2)
        self.relu = nn.ReLU(inplace=inplace)
        self.double()
        with torch.no_grad():
            self.linear0.weight.copy_(torch.eye(3))
            self.linear1.weight.fill_(1.0)
            self.linear1.bias.copy_(torch.tensor([-10.0, 1, 1, 1]))
            self.linear2.weight.fill_(1.0)
            self.linear2.bias.copy_(torch.tensor([-1.0, 1]))

    def forward(self, x):
        return self.linear2(self.relu(self.linear1(self.linear0(x))))


def test_one_number():
    """captum's G1."""
    f, params = functionalize(BM())
    CLOSE(signed(f, params, torch.tensor([-3.0]).double()), torch.tensor([1.0]).double())


def test_an_argument_that_is_no_tensor_of_floats():
    """captum's G2."""
    f, params = functionalize(BM4())
    a, b, none = signed(f, params, (row(10), row(8), torch.tensor(2)), targets=0)
    assert none is None
    CLOSE(torch.cat([a, b], 1), row(1, -0.5))


def test_an_argument_bound_beforehand():
    """captum's G3."""
    f, params = functionalize(BM5(), factors=[3.0, -4.0])
    CLOSE(torch.cat(signed(f, params, (row(-10), row(6)), targets=0), 1), row(0, 4))


def test_a_sign_is_dropped_unless_asked_for():
    """captum's G4."""
    f, params = functionalize(BM2())
    inputs = (row(4, -1), row(2, 5))
    CLOSE(torch.cat(signed(f, params, inputs, targets=0)), torch.tensor([[1.0, 0], [-1, 0]]).double())
    CLOSE(torch.cat(saliency(f, params, inputs, targets=0)), torch.tensor([[1.0, 0], [1, 0]]).double())


def test_one_place_of_the_output_for_each_example():
    """captum's G5: the places (1, 1) and (0, 1)."""
    f, params = functionalize(BM())
    x = torch.tensor([[[4.0, 2], [-1, -2]], [[3, -4], [10, 5]]]).double()
    place = targets.per_example(torch.tensor([3, 1]))
    got = signed(f, params, x, targets=lambda out: place(out.flatten(1)))
    CLOSE(got, torch.tensor([[[0.0, 0], [0, 1]], [[0, 1], [0, 0]]]).double())


@pytest.mark.parametrize("inplace", [False, True])
def test_inplace_activations(inplace):
    """captum's G6, and what comes into the activation before it writes there, LA1."""
    f, params = functionalize(ML(inplace))
    CLOSE(signed(f, params, row(1, 6, -3), targets=0), row(3, 3, 3))
    _, values = tdhook.capture(f, "relu:in")(params, row(2, -5, 4))
    CLOSE(values["relu:in"], row(-9, 2, 2, 2))
    CLOSE(input_x_gradient(f, params, row(2, -5, 4), targets=0, at="relu:in")["relu:in"], row(0, 2, 2, 2))


def test_gradient_times_activation():
    """captum's GA1 and GA2."""
    f, params = functionalize(ML())
    got = input_x_gradient(f, params, row(0, 100, 0), targets=0, at=["linear0", "linear1", "linear2"])
    CLOSE(got["linear0"], row(0, 400, 0))
    CLOSE(got["linear1"], row(90, 101, 101, 101))
    CLOSE(got["linear2"], row(392, 0))


# Autograd and captum ---------------------------------------------------------------------------------------------------

MODELS = {
    "mlp": (lambda: mlp(6, 8, 8, 5), (6,)),
    "relu": (lambda: mlp(6, 8, 8, 5, act=partial(nn.ReLU, inplace=True)), (6,)),
    "cnn": (cnn, (2, 8, 8)),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_equals_autograd_and_captum(name, batch):
    make, shape = MODELS[name]
    model = make()
    f, params = functionalize(model)
    x = torch.randn(batch, *shape).double()
    got, absolute, product = (m(f, params, x, targets=[0, 3]) for m in (signed, saliency, input_x_gradient))
    assert got.shape == (2, batch, *shape)
    for i, target in enumerate((0, 3)):
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(model(leaf)[:, target].sum(), leaf)
        CLOSE(got[i], expected)
        CLOSE(absolute[i], captum.attr.Saliency(model).attribute(leaf, target))
        CLOSE(product[i], captum.attr.InputXGradient(model).attribute(leaf, target).detach())


def test_sites_equal_captum():
    model = mlp(6, 8, 7, 5)
    f, params = functionalize(model)
    x = torch.randn(3, 6).double()
    names = ["3", "0", "2"]
    got = input_x_gradient(f, params, x, targets=[4, 1], at=names)
    assert list(got.keys()) == names
    for name in names:
        reference = captum.attr.LayerGradientXActivation(model, model[int(name)])
        for each, target in zip(got[name], (4, 1)):
            CLOSE(each, reference.attribute(x, target).detach())


def test_a_site_that_acts_through_another_has_its_total_derivative():
    f, params = functionalize(mlp(6, 8, 7, 5))
    x = torch.randn(3, 6).double()
    together = signed(f, params, x, targets=0, at=["0", "1", "2"])
    for name, value in together.items():
        CLOSE(value, signed(f, params, x, targets=0, at=name)[name])


def test_a_residual_stream():
    """x + 2 relu(x): the branch alone has gradient 1, what enters both has 3."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.branch = nn.Identity(), nn.ReLU()

        def forward(self, x):
            x = self.start(x)
            return (x + 2 * self.branch(x)).sum(-1)

    f, params = functionalize(Residual())
    got = saliency(f, params, row(1, 4), at=["start", "branch"])
    CLOSE(got["start"], row(3, 3))
    CLOSE(got["branch"], row(2, 2))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.double()

    def forward(self, a, b, scale):
        h = self.out(torch.tanh(self.a(a) * self.b(b))) * scale[:, None]
        return {"logits": h, "norm": h.square().sum(-1)}


TWO = (
    torch.linspace(-1, 1, 9).reshape(3, 3).double(),
    torch.linspace(0, 1, 12).reshape(3, 4).double(),
    torch.tensor([1, 2, 3]),
)


@pytest.mark.parametrize("method", [saliency, signed, input_x_gradient])
def test_several_inputs_and_outputs(method):
    model = Two()
    f, params = functionalize(model)
    chosen = [targets.index(1, key="logits"), lambda out: out["norm"]]
    got = method(f, params, TWO, targets=chosen)
    named = method(f, params, dict(zip(("a", "b", "scale"), TWO)), targets=chosen)
    packed = method(f, params, TensorDict(dict(zip(("a", "b", "scale"), TWO)), [3]), targets=chosen)
    assert isinstance(got, tuple) and got[2] is None and named["scale"] is None
    assert packed.batch_size == (2, 3) and set(packed.keys()) == {"a", "b"}
    a, b = (t.clone().requires_grad_() for t in TWO[:2])
    out = model(a, b, TWO[2])
    for i, value in enumerate((out["logits"][:, 1], out["norm"])):
        expected = torch.autograd.grad(value.sum(), (a, b), retain_graph=True)
        for k, (x, g) in enumerate(zip((a, b), expected)):
            want = {saliency: g.abs(), signed: g, input_x_gradient: x.detach() * g}[method]
            for each in (got[k], named["ab"[k]], packed["ab"[k]]):
                CLOSE(each[i], want)


def test_token_ids_at_their_embedding():
    torch.manual_seed(0)
    f, params = functionalize(nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 2)).double())
    ids = torch.tensor([[1, 4, 7], [3, 0, 9]])
    got = input_x_gradient(f, params, ids, targets=[0, 1], at="0")["0"]
    rows = params["2", "weight"].reshape(2, 1, 3, 4)
    CLOSE(got, params["0", "weight"][ids] * rows)


# Regressions of silent faults elsewhere --------------------------------------------------------------------------------


def test_one_tensor_passed_twice_is_two_inputs():
    """captum sums the gradients of both into each: 4 where 3 and 2 are right."""
    x = row(2)
    a, b = signed(lambda params, inputs: (inputs[0] + inputs[0] * inputs[1]).sum(-1), None, (x, x))
    CLOSE(torch.cat([a, b]).flatten(), torch.tensor([3.0, 2.0]).double())


def test_a_view_of_an_input_is_another_input():
    x = row(2, 5)
    a, b = signed(lambda params, inputs: (inputs[0] * inputs[1]).sum(-1), None, (x, x.flip(1).flip(1)[:, :]))
    CLOSE(a, x)
    CLOSE(b, x)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_nothing_of_the_caller_is_changed(requires_grad):
    model = mlp(6, 8, 5, act=partial(nn.ReLU, inplace=True))
    f, params = functionalize(model)
    x = torch.randn(3, 6).double().requires_grad_(requires_grad)
    before = copy.deepcopy((x, params.clone(), torch.get_rng_state()))
    for method in (saliency, input_x_gradient):
        method(f, params, x, targets=[0, 1])
        method(f, params, x, targets=0, at="0")
    assert torch.equal(x, before[0]) and (params == before[1]).all() and torch.equal(torch.get_rng_state(), before[2])
    assert x.requires_grad is requires_grad and x.grad is None
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())


def test_functional_relu_is_the_module():
    model = mlp(6, 8, 5, act=nn.ReLU)
    f, params = functionalize(model)
    x = torch.randn(3, 6).double()

    def functional(params, x):
        hidden = F.relu(F.linear(x, params["0", "weight"], params["0", "bias"]))
        return F.linear(hidden, params["2", "weight"], params["2", "bias"])

    CLOSE(saliency(functional, params, x, targets=[0, 1]), saliency(f, params, x, targets=[0, 1]))


# Laws ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("at", [None, "1"])
def test_chunks_change_nothing(chunk_size, at):
    f, params = functionalize(mlp(6, 8, 5))
    x = torch.randn(3, 6).double()
    for method in (saliency, input_x_gradient):
        whole, parts = (method(f, params, x, targets=targets.every(), at=at, chunk_size=c) for c in (None, chunk_size))
        CLOSE(parts if at is None else parts[at], whole if at is None else whole[at])


@pytest.mark.parametrize("method", [saliency, input_x_gradient])
def test_under_vmap_over_examples_and_over_models(method):
    f, params = functionalize(mlp(6, 8, 5))
    x = torch.randn(3, 6).double()
    whole = method(f, params, x, targets=[0, 1])
    CLOSE(vmap(lambda x: method(f, params, x, targets=[0, 1]))(x), whole.transpose(0, 1))
    CLOSE(vmap(lambda x: method(f, params, x, targets=1, at="1")["1"])(x), method(f, params, x, targets=1, at="1")["1"])
    every = torch.stack([functionalize(mlp(6, 8, 5, seed=i))[1] for i in range(2)])
    CLOSE(vmap(lambda p: method(f, p, x, targets=[0, 1]))(every)[0], whole)


def test_the_gradient_of_an_attribution_is_a_second_derivative():
    f, params = functionalize(mlp(3, 4, 2))
    norm = lambda x: input_x_gradient(f, params, x, targets=0).square().sum()  # noqa: E731
    x = torch.randn(1, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(norm, x)
    torch.testing.assert_close(grad(norm)(x.detach()), torch.autograd.grad(norm(x), x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_of_the_data_is_kept(dtype):
    model = mlp(6, 8, 5)
    x = torch.randn(1, 6).double()
    exact = input_x_gradient(*functionalize(model), x, targets=[1])
    f, params = functionalize(model.to(dtype))
    got = input_x_gradient(f, params, x.to(dtype), targets=[1])
    assert got.dtype == dtype
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


def test_a_batch_of_none():
    f, params = functionalize(mlp(6, 8, 5))
    assert saliency(f, params, torch.ones(0, 6).double(), targets=[0, 1]).shape == (2, 0, 6)


@pytest.mark.compile
@pytest.mark.parametrize("method", [saliency, input_x_gradient])
@pytest.mark.parametrize("at", [None, ("0", "1")])
def test_compiled_equals_eager_and_does_not_recompile(method, at):
    torch._dynamo.reset()
    f, params = functionalize(mlp(6, 8, 5))
    run = partial(method, targets=[0, 1], at=at)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(3, 6).double()
        with torch._dynamo.config.patch(error_on_recompile=True):
            got, expected = compiled(f, params, x), run(f, params, x)
        for name in at or (None,):
            CLOSE(got if name is None else got[name], expected if name is None else expected[name])


# Warnings and errors ---------------------------------------------------------------------------------------------------

X = torch.ones(3, 6)


@pytest.mark.parametrize("method", [saliency, input_x_gradient])
def test_a_model_in_train_mode_is_warned_about(method):
    f, params = functionalize(nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 5)).train())
    with pytest.warns(errors.TdhookWarning, match=f"{method.__name__}: the model is in train mode, where '0'") as record:
        method(f, params, X, targets=0)
    assert record[0].filename == __file__


@pytest.mark.parametrize("method", [saliency, input_x_gradient])
@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (X.long(), {}, errors.InputError, "no floating-point tensor .* at=<site of the embedding>"),
        (X, {"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None, got 0"),
        (X, {"targets": None}, errors.TargetError, "needs an output of one scalar per example"),
        (X, {"targets": "0"}, errors.TargetError, "targets is None, an int, a sequence or a function"),
        (X, {"targets": 5}, errors.TargetError, "index=5 is out of range for an output with 5 classes"),
        (X, {"at": "7"}, errors.SiteError, "the model has no module '7'"),
        (X, {"at": "*"}, errors.SiteError, r"at takes exact sites, got the pattern '\*'"),
    ],
)
def test_bad_input(method, inputs, options, error, message):
    f, params = functionalize(mlp(6, 8, 5).float())
    with pytest.raises(error, match=message):
        method(f, params, inputs, **{"targets": 0, **options})


@pytest.mark.parametrize("method", [saliency, input_x_gradient])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_cannot_be_asked_for_without_grad_mode(mode, method):
    f, params = functionalize(mlp(6, 8, 5).float())
    with mode(), pytest.raises(errors.GradientError, match=f"{method.__name__} needs gradients, but grad mode is off"):
        method(f, params, X, targets=0)


def test_sites_need_a_functional_model():
    with pytest.raises(errors.ModelError, match="has no sites"):
        saliency(lambda params, x: x.sum(-1), {}, X, at="0")


def test_a_site_of_integers_has_no_gradient():
    f, params = functionalize(nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(4, 1)))
    with pytest.raises(errors.InputError, match="at has '0:in', which holds a int64 tensor"):
        saliency(f, params, torch.ones(1, 2).long(), targets=0, at="0:in")


def test_of_a_plain_function():
    x = torch.randn(2, 3).double()
    CLOSE(input_x_gradient(lambda params, x: (x * params).sum(-1), 2.0, x), 2 * x)


def test_an_unused_input_gets_zero():
    def first(params: None, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return inputs[0].square().sum(-1)

    a, b = saliency(first, None, (X, X))
    assert torch.equal(a, 2 * X) and torch.equal(b, 0 * X)
