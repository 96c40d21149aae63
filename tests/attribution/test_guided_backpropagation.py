"""Guided backpropagation against captum, and where captum goes wrong against ReLUs written by hand."""

from __future__ import annotations

import copy
from functools import partial

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

import tdhook
from tdhook import functionalize
from tdhook.attribution.guided_backpropagation import guided_backpropagation
from tdhook.core import errors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # of Dynamo, about itself
    pytest.mark.filterwarnings("ignore:(Input Tensor 0|Setting backward hooks):UserWarning"),  # of captum
]
CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def cnn(act=nn.ReLU):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), act(), nn.Conv2d(4, 6, 3), act(), nn.Flatten(-3), nn.Linear(150, 8), act()]
    return nn.Sequential(*layers, nn.Linear(8, 5)).double()


def image(*batch):
    torch.manual_seed(7)
    return torch.randn(*batch, 2, 9, 9).double()


class Guided(torch.autograd.Function):
    """A ReLU with the guided rule, written out."""

    @staticmethod
    def forward(ctx, x, top=float("inf")):
        ctx.save_for_backward((x > 0) & (x < top))
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx, cotangent):
        return torch.where(ctx.saved_tensors[0] & (cotangent > 0), cotangent, 0), None


def written_out(run, x, target):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(run(x)[:, target].sum(), x)[0]


class Kinds(nn.Module):
    """Every spelling of a ReLU, one module twice, and two activations that are none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))
        self.twice, self.six, self.gelu = nn.ReLU(), nn.ReLU6(), nn.GELU()

    def forward(self, x):
        relus = [F.relu, torch.relu, lambda x: x.relu(), F.relu6, self.six, self.twice, partial(F.relu, inplace=True), in_place]
        return self.run(x, relus, self.twice)

    def run(self, x, relus, last):
        for layer, relu in zip(self.layers, relus):
            x = relu(layer(x)) + self.gelu(x)
        return last(F.leaky_relu(x))


def in_place(x):
    x.relu_()
    return x


# Values ----------------------------------------------------------------------------------------------------------------


def test_captum():
    model, x = cnn(), image(3)
    f, params = functionalize(model)
    for target in range(5):
        theirs = captum.attr.GuidedBackprop(model).attribute(x, target=target)
        CLOSE(guided_backpropagation(f, params, x, targets=target), theirs)


def test_by_hand():
    """Two ReLUs: cut above the first by the sign of the cotangent, below it by that of the value."""
    f, params = functionalize(nn.Sequential(nn.ReLU(), nn.Linear(4, 1, bias=False)))
    params["1", "weight"] = torch.tensor([[3.0, -3.0, 2.0, -2.0]])
    got = guided_backpropagation(f, params, torch.tensor([[1.0, 1.0, -1.0, -1.0]]), targets=0)
    assert got.tolist() == [[3, 0, 0, 0]]


def test_every_spelling_of_a_relu():
    """The symptom elsewhere: functional ReLUs are overlooked, and the result is the gradient."""
    model = Kinds().double()
    f, params = functionalize(model)
    x = torch.randn(4, 6).double() * 3
    six = lambda x: Guided.apply(x, 6.0)  # noqa: E731
    relu = lambda x: Guided.apply(x)  # noqa: E731
    expected = written_out(lambda x: model.run(x, [relu, relu, relu, six, six, relu, relu, relu], relu), x, 2)
    got = guided_backpropagation(f, params, x, targets=2)
    CLOSE(got, expected)
    gradient = written_out(model, x, 2)
    assert (got - gradient).abs().max() > 1e-3


def test_at_sites():
    model, x = cnn(), image(3)
    f, params = functionalize(model)
    got = guided_backpropagation(f, params, x, targets=1, at=["1", "0"])
    a = model[:2](x).detach()
    tail = nn.Sequential(*[_Rule() if isinstance(m, nn.ReLU) else m for m in model[2:]])
    above = written_out(tail, a, 1)
    CLOSE(got["1"], above)  # not cut yet
    CLOSE(got["0"], above.relu() * (a > 0))


class _Rule(nn.Module):
    def forward(self, x):
        return Guided.apply(x)


def test_sites_that_are_named():
    model = cnn(nn.GELU)
    f, params = functionalize(model)
    x = image(2)
    got = guided_backpropagation(f, params, x, targets=1, sites="**/gelu@*")
    edited = tdhook.edit_gradient(f, dict.fromkeys(["1", "3", "6"], torch.relu))
    expected = written_out(lambda x: edited(params, x), x, 1)
    CLOSE(got, expected)
    CLOSE(guided_backpropagation(f, params, x, targets=1, sites=["1", "3", "6"]), expected)
    only = guided_backpropagation(f, params, x, targets=1, sites="6")
    assert (only - expected).abs().max() > 1e-6


# Targets, structure, composition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_plural_targets_are_the_stacked_singular_ones(chunk_size, batch):
    f, params = functionalize(cnn())
    x = image(batch)
    each = torch.stack([guided_backpropagation(f, params, x, targets=t) for t in (4, 0, 2)])
    CLOSE(guided_backpropagation(f, params, x, targets=[4, 0, 2], chunk_size=chunk_size), each)


def test_several_inputs():
    class Two(nn.Module):
        def forward(self, a, b, mask):
            return (F.relu(a - b) * F.relu(b) * mask).sum(-1)

    f, params = functionalize(Two())
    a, b = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    got = guided_backpropagation(f, params, {"a": a, "b": b, "mask": torch.ones(1, 2, dtype=torch.int64)})
    assert got["mask"] is None
    assert got["a"].tolist() == [[1, 0]] and got["b"].tolist() == [[2 - 1, 0]]


def test_under_vmap():
    f, params = functionalize(cnn())
    x = image(4, 3)
    run = lambda x: guided_backpropagation(f, params, x, targets=[0, 1])  # noqa: E731
    CLOSE(vmap(run)(x), torch.stack([run(each) for each in x]))
    CLOSE(vmap(run, out_dims=1)(x[0]), run(x[0]))


def test_nothing_of_the_caller_is_changed():
    model = cnn(partial(nn.ReLU, inplace=True))
    f, params = functionalize(model)
    x = image(2)
    expected = captum.attr.GuidedBackprop(cnn()).attribute(x.clone(), target=0)
    before = copy.deepcopy((x, params.clone(), torch.get_rng_state()))
    CLOSE(guided_backpropagation(f, params, x, targets=0), expected)
    assert torch.equal(x, before[0]) and (params == before[1]).all() and torch.equal(torch.get_rng_state(), before[2])
    assert all(not m._backward_hooks and not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_of_the_data_is_kept(dtype):
    f, params = functionalize(cnn().to(dtype))
    assert guided_backpropagation(f, params, image(1).to(dtype), targets=0).dtype == dtype


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend):
    torch._dynamo.reset()
    f, params = functionalize(cnn())
    run = partial(guided_backpropagation, targets=[0, 3])
    CLOSE(torch.compile(run, fullgraph=True, backend=backend)(f, params, image(2)), run(f, params, image(2)))


@pytest.mark.compile
def test_compiled_with_every_spelling():
    torch._dynamo.reset()
    f, params = functionalize(Kinds().double())
    x = torch.randn(4, 6).double() * 3
    run = partial(guided_backpropagation, targets=[0, 3])
    CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(f, params, x), run(f, params, x))


# Warnings and errors ---------------------------------------------------------------------------------------------------


def test_a_model_without_a_relu():
    """captum gives the gradient."""
    f, params = functionalize(cnn(nn.GELU))
    with pytest.raises(errors.SiteError, match="found no relu or relu6 in the model, so it would return the gradient"):
        guided_backpropagation(f, params, image(1), targets=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sites": "9"}, errors.SiteError, "the model has no module '9'"),
        ({"sites": "1/gelu"}, errors.SiteError, "'1/gelu' was not reached: the module ran the operations relu"),
        ({"at": "*"}, errors.SiteError, "at takes exact sites"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None, got 0"),
        ({"targets": []}, errors.TargetError, "targets is empty"),
        ({"targets": 5}, errors.TargetError, "index=5 is out of range"),
    ],
)
def test_bad_input(options, error, message):
    f, params = functionalize(cnn())
    with pytest.raises(error, match=message):
        guided_backpropagation(f, params, image(2), **{"targets": 0, **options})


def test_a_model_in_train_mode_is_warned_about():
    f, params = functionalize(nn.Sequential(nn.Dropout(0.5), *cnn()).train())
    with pytest.warns(errors.TdhookWarning, match="guided_backpropagation: the model is in train mode"):
        guided_backpropagation(f, params, image(2), targets=0)


def test_what_it_needs():
    f, params = functionalize(cnn())
    with torch.no_grad(), pytest.raises(errors.GradientError, match="guided_backpropagation needs gradients"):
        guided_backpropagation(f, params, image(2), targets=0)
    with pytest.raises(errors.ModelError, match="has no sites"):
        guided_backpropagation(lambda params, x: x.sum((1, 2, 3)), {}, image(2))
