"""The Jacobian of each example against torch.func, autograd and weights."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from einops import rearrange
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import jacrev, vmap

import tdhook
from tdhook import functionalize
from tdhook.attribution.jacobian import jacobian
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
# CPU kernels of fused attention have no batching rule for their backward.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")

MODES = ["auto", "reverse", "forward"]


def mlp(*widths, act=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1]).double()


def cnn():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(-3), nn.Linear(4, 5))
    return model.double().eval()


class Attention(nn.Module):
    """Fused self-attention; the output is [B, L, D]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.double()

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b l (n h d) -> n b h l d", n=3, h=2)
        return self.out(rearrange(nn.functional.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))


class Calls(nn.Module):
    """Counts its calls in a list that no twin copies."""

    count: ClassVar = [0]

    def forward(self, x: Tensor) -> Tensor:
        Calls.count[0] += 1
        return x


class Timestwo(torch.autograd.Function):
    """Has no forward-mode derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * cotangent


MODELS = {
    "mlp": (lambda: mlp(6, 8, 5), (6,)),
    "wide": (lambda: mlp(3, 8, 5), (3,)),
    "cnn": (cnn, (2, 4, 4)),
    "attention": (Attention, (3, 4)),
}


# Values ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_equals_jacrev_of_one_example_at_a_time(name, batch, mode):
    make, shape = MODELS[name]
    model = make()
    f, params = functionalize(model)
    x = torch.randn(batch, *shape).double()
    got = jacobian(f, params, x, mode=mode)
    assert got.shape == (*model(x).shape, *shape) and got.dtype == torch.float64
    expected = torch.stack([jacrev(lambda one: model(one[None])[0])(one) for one in x])
    CLOSE(got, expected.detach())


@pytest.mark.parametrize("mode", MODES)
def test_of_a_linear_map_it_is_the_weight(mode):
    f, params = functionalize(nn.Linear(3, 4).double())
    CLOSE(jacobian(f, params, torch.randn(2, 3).double(), mode=mode), params["weight"].expand(2, 4, 3))


@pytest.mark.parametrize("mode", MODES)
def test_of_a_quadratic_form(mode):
    """out_o = x' A_o x: the Jacobian is (A_o + A_o') x."""
    a, x = torch.randn(5, 3, 3).double(), torch.randn(2, 3).double()
    got = jacobian(lambda a, x: torch.einsum("bi,oij,bj->bo", x, a, x), a, x, mode=mode)
    CLOSE(got, torch.einsum("oij,bj->boi", a + a.mT, x))


@pytest.mark.parametrize("mode", MODES)
def test_one_number_for_each_example(mode):
    x = torch.randn(4, 3).double()
    CLOSE(jacobian(lambda _, x: x.square().sum(-1), None, x, mode=mode), 2 * x)
    CLOSE(jacobian(lambda _, x: x.square(), None, x[:, 0], mode=mode), 2 * x[:, 0])


@pytest.mark.parametrize("mode", MODES)
def test_sites_have_their_total_derivative(mode):
    model = mlp(6, 4, 7, 5)
    f, params = functionalize(model)
    x = torch.randn(3, 6).double()
    got = jacobian(f, params, x, at=["1", "3"], mode=mode)
    assert list(got.keys()) == ["1", "3"]
    first = model[:2](x).detach()
    second = model[2:4](first).detach()
    weight = model[4].weight.detach()
    CLOSE(got["3"], weight.expand(3, 5, 7))
    CLOSE(got["1"], torch.einsum("oh,bh,hi->boi", weight, 1 - second**2, model[2].weight.detach()))


@pytest.mark.parametrize("mode", MODES)
def test_token_ids_at_their_embedding(mode):
    torch.manual_seed(0)
    f, params = functionalize(nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 2)).double())
    ids = torch.tensor([[1, 4, 7], [3, 0, 9]])
    got = jacobian(f, params, ids, at="0", mode=mode)["0"]
    CLOSE(got, params["2", "weight"].reshape(1, 2, 3, 4).expand(2, 2, 3, 4))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 10)
        self.double()

    def forward(self, a, b, scale):
        h = self.out(torch.tanh(self.a(a) * self.b(b.sum(1)))) * scale[:, None]
        return {"logits": h.reshape(-1, 2, 5), "norm": h.square().sum(-1)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", ["logits", "norm"])
def test_several_inputs_and_outputs(key, mode):
    model = Two()
    f, params = functionalize(model)
    a, b, scale = torch.randn(3, 3).double(), torch.randn(3, 2, 4).double(), torch.tensor([1, 2, 3])
    inputs = {"a": a, "scale": scale, "b": b}
    run = partial(jacobian, outputs=lambda out: out[key], mode=mode)
    got = run(f, params, (a, b, scale))
    named = run(f, params, inputs)
    packed = run(f, params, TensorDict(inputs, [3]))
    loose = run(f, params, TensorDict(inputs, []))
    assert isinstance(got, tuple) and got[2] is None and named["scale"] is None
    assert set(packed.keys()) == {"a", "b"}
    out = [3, 2, 5] if key == "logits" else [3]
    assert list(packed.batch_size) == out and list(loose.batch_size) == []
    for k, (name, x) in enumerate((("a", a), ("b", b))):
        each = [
            jacrev(lambda a, b, i=i: model(a[None], b[None], scale[i : i + 1])[key][0], argnums=k)(a[i], b[i]) for i in range(3)
        ]
        assert got[k].shape == (*out, *x.shape[1:])
        for result in (got[k], named[name], packed[name], loose[name]):
            CLOSE(result, torch.stack(each).detach())


def test_a_tensordict_with_two_batch_dimensions():
    x = torch.randn(3, 2, 4).double()
    inputs = TensorDict({"x": x}, [3, 2])
    got = jacobian(lambda _, td: td["x"].sum(1).square(), None, inputs)
    assert got.batch_size == (3, 4, 2)
    CLOSE(got["x"], torch.einsum("bo,oi->boi", 2 * x.sum(1), torch.eye(4).double())[:, :, None].expand(3, 4, 2, 4))


@pytest.mark.parametrize("mode", MODES)
def test_one_tensor_passed_twice_is_two_inputs(mode):
    """The symptom elsewhere: each gets the sum of both."""
    x = torch.tensor([[2.0, 3.0]]).double()
    a, b = jacobian(lambda _, inputs: (inputs[0] + inputs[0] * inputs[1]).sum(-1), None, (x, x), mode=mode)
    CLOSE(a, 1 + x)
    CLOSE(b, x)


# Modes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("features", "outputs", "passes"), [(3, 5, 2), (5, 3, 1), (4, 4, 1)])
def test_auto_takes_the_mode_with_fewer_coordinates(features, outputs, passes):
    """A second pass is that of the tangents."""
    f, params = functionalize(nn.Sequential(Calls(), nn.Linear(features, outputs)))
    Calls.count[0] = 0
    jacobian(f, params, torch.ones(2, features))
    assert Calls.count == [passes]


def test_cost_in_forward_passes():
    f, params = functionalize(nn.Sequential(Calls(), nn.Linear(3, 5)))
    x = torch.ones(2, 3)
    for mode, chunk_size, expected in (("reverse", None, 1), ("reverse", 2, 1), ("forward", None, 1), ("auto", None, 2)):
        Calls.count[0] = 0
        jacobian(f, params, x, mode=mode, chunk_size=chunk_size)
        assert Calls.count == [expected]


def test_auto_uses_reverse_where_there_is_no_forward_mode():
    got = jacobian(lambda weight, x: Timestwo.apply(x) @ weight.mT, torch.eye(5)[:, :3], torch.ones(2, 3))
    CLOSE(got, 2 * torch.eye(5)[:, :3].expand(2, 5, 3))


def test_forward_says_what_it_cannot_do():
    with pytest.raises(errors.GradientError, match=r"mode='forward' is not possible for this model \(.*use 'reverse'"):
        jacobian(lambda _, x: Timestwo.apply(x), None, torch.ones(2, 3), mode="forward")


def test_auto_sees_an_edited_gradient():
    """Forward mode passes by what `edit_gradient` does to cotangents."""
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Linear(2, 5)))
    edited = tdhook.intervene(tdhook.edit_gradient(f, {"0": lambda cotangent: 10 * cotangent}), {"1": lambda value: value})
    CLOSE(jacobian(edited, params, torch.ones(1, 2))[0], 10 * params["1", "weight"])


@pytest.mark.parametrize("mode", MODES)
def test_what_is_frozen_has_no_derivative(mode):
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Linear(2, 5)))
    assert jacobian(tdhook.freeze(f, "0"), params, torch.ones(1, 2), mode=mode).abs().max() == 0


@pytest.mark.parametrize("mode", ["auto", "reverse"])
def test_a_transformer_layer(mode):
    """More coordinates out than in, but its fused path has no forward-mode derivative."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()
    f, params = functionalize(nn.Sequential(layer, nn.Linear(4, 5).double()))
    x = torch.randn(2, 3, 4).double()
    expected = torch.autograd.functional.jacobian(lambda x: f(params, x), x)
    CLOSE(jacobian(f, params, x, mode=mode), torch.stack([expected[i, :, :, i] for i in range(2)]))


def test_a_recurrent_layer():
    torch.manual_seed(0)
    lstm = nn.LSTM(2, 4, batch_first=True)
    f, params = functionalize(lstm)
    x = torch.randn(2, 3, 2)
    got = jacobian(f, params, x, outputs=lambda out: out[0])
    expected = torch.autograd.functional.jacobian(lambda x: lstm(x)[0], x)
    torch.testing.assert_close(got, torch.stack([expected[i, :, :, i] for i in range(2)]), rtol=1e-4, atol=1e-6)


def test_a_model_that_writes_into_its_own_tensors():
    """vmap cannot push tangents through it, so they go one by one, with a warning."""

    def fill(weight, x):
        out = torch.zeros(len(x), 5, dtype=x.dtype)
        out[:, :4] = (x @ weight.mT).tanh()
        return out

    weight, x = torch.randn(4, 3).double(), torch.randn(2, 3).double()
    expected = jacobian(fill, weight, x, mode="reverse")
    CLOSE(jacobian(fill, weight, x), expected)
    slope = 1 - (x @ weight.mT).tanh() ** 2
    CLOSE(expected[:, :4], torch.einsum("bo,oi->boi", slope, weight))


# Laws ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 100])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [None, "1"])
def test_chunks_change_nothing(at, mode, chunk_size):
    f, params = functionalize(mlp(3, 4, 5))
    x = torch.randn(2, 3).double()
    whole, parts = (jacobian(f, params, x, at=at, mode=mode, chunk_size=c) for c in (None, chunk_size))
    CLOSE(parts if at is None else parts[at], whole if at is None else whole[at])


@pytest.mark.parametrize("mode", MODES)
def test_under_vmap_over_examples_and_over_models(mode):
    f, params = functionalize(mlp(3, 4, 5))
    x = torch.randn(2, 3).double()
    whole = jacobian(f, params, x, mode=mode)
    CLOSE(vmap(lambda x: jacobian(f, params, x[None], mode=mode)[0])(x), whole)
    every = torch.stack([functionalize(mlp(3, 4, 5, seed=i))[1] for i in range(2)])
    each = vmap(lambda p: jacobian(f, p, x, mode=mode, at="0")["0"])(every)
    CLOSE(each[1], jacobian(f, every[1], x, mode=mode, at="0")["0"])


@pytest.mark.parametrize("mode", MODES)
def test_it_can_be_differentiated(mode):
    f, params = functionalize(mlp(2, 3, 3))
    x = torch.randn(1, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: jacobian(f, params, x, mode=mode).square().sum(), x)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_the_caller_is_changed(mode):
    model = mlp(3, 4, 5, act=partial(nn.ReLU, inplace=True))
    f, params = functionalize(model)
    x = torch.randn(2, 3).double()
    before = copy.deepcopy((x, params.clone(), torch.get_rng_state()))
    jacobian(f, params, x, mode=mode)
    jacobian(f, params, x, mode=mode, at="0")
    assert torch.equal(x, before[0]) and (params == before[1]).all() and torch.equal(torch.get_rng_state(), before[2])
    assert not x.requires_grad and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float32, 1e-5)])
def test_the_dtype_of_the_data_is_kept(dtype, tolerance, mode):
    model, x = mlp(3, 4, 5), torch.randn(1, 3).double()
    exact = jacobian(*functionalize(model), x)
    f, params = functionalize(model.to(dtype))
    got = jacobian(f, params, x.to(dtype), mode=mode)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_none(mode):
    f, params = functionalize(mlp(3, 4, 5))
    assert jacobian(f, params, torch.ones(0, 3).double(), mode=mode).shape == (0, 5, 3)


@pytest.mark.compile
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_compiled_equals_eager_and_does_not_recompile(name, mode):
    torch._dynamo.reset()
    make, shape = MODELS[name]
    f, params = functionalize(make())
    run = partial(jacobian, mode=mode)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(3, *shape).double()
        with torch._dynamo.config.patch(error_on_recompile=True):
            CLOSE(compiled(f, params, x), run(f, params, x))


@pytest.mark.compile
@pytest.mark.parametrize("mode", MODES)
def test_compiled_with_a_tensordict_and_at_a_site(mode):
    torch._dynamo.reset()
    f, params = functionalize(Two())
    inputs = TensorDict(
        {"a": torch.randn(3, 3).double(), "b": torch.randn(3, 2, 4).double(), "scale": torch.ones(3).long()}, [3]
    )

    def run(params, inputs):
        options = {"outputs": lambda out: out["logits"], "mode": mode}
        return jacobian(f, params, inputs, **options)["b"], jacobian(f, params, inputs, at="a", **options)["a"]

    for got, expected in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(params, inputs), run(params, inputs)):
        CLOSE(got, expected)


# Warnings and errors ---------------------------------------------------------------------------------------------------

X = torch.ones(2, 3)


def test_a_model_in_train_mode_is_warned_about():
    f, params = functionalize(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).train())
    with pytest.warns(errors.TdhookWarning, match="jacobian: the model is in train mode, where '0'"):
        jacobian(f, params, X)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (X.long(), {}, errors.InputError, "no floating-point tensor to attribute to"),
        (torch.tensor(1.0), {}, errors.InputError, r"float32 tensor of shape \[\]; a jacobian needs shape \[B, \*features\]"),
        (X, {"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None, got 0"),
        (X, {"outputs": "0"}, errors.InputError, "outputs is a function of the output or None, got '0'"),
        (X, {"outputs": lambda out: out[0]}, errors.InputError, r"output is .*\[4\] but what is .*\[2, 3\].*x\[None\]"),
        (X, {"outputs": lambda out: (out,)}, errors.TargetError, "what outputs returned is a tuple of 1; a jacobian needs"),
        (X, {"outputs": lambda out: out.argmax(-1)}, errors.TargetError, "what outputs returned is a int64 tensor"),
        (X, {"outputs": lambda out: out.sum()}, errors.TargetError, r"what outputs returned is .* of shape \[\]"),
        (X, {"at": "7"}, errors.SiteError, "the model has no module '7'"),
        (X, {"at": "*"}, errors.SiteError, r"at takes exact sites, got the pattern '\*'"),
    ],
)
def test_bad_input(inputs, options, error, message, mode):
    f, params = functionalize(mlp(3, 5, 4).float())
    with pytest.raises(error, match=message):
        jacobian(f, params, inputs, mode=mode, **options)


def test_an_unknown_mode():
    with pytest.raises(errors.InputError, match="mode='backward' is unknown; choose one of 'auto', 'reverse', 'forward'"):
        jacobian(lambda _, x: x, None, X, mode="backward")


@pytest.mark.parametrize("mode", MODES)
def test_an_output_that_is_no_tensor(mode):
    with pytest.raises(errors.TargetError, match=r"the output is a dict with 'a', .* pass outputs=lambda out: out\['a'\], say"):
        jacobian(lambda _, x: {"a": x}, None, X, mode=mode)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_cannot_be_asked_for_without_grad_mode(mode):
    with mode(), pytest.raises(errors.GradientError, match="jacobian needs gradients, but grad mode is off"):
        jacobian(lambda _, x: x, None, X)


def test_sites_need_a_functional_model():
    with pytest.raises(errors.ModelError, match="has no sites"):
        jacobian(lambda params, x: x, {}, X, at="0")
