"""Layers with forwards of our own: the same numbers under every transform, and nothing copied or read that need not be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from tdhook import capture, functionalize

MODELS = {
    "2d": (lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()], (3, 5, 5)),
    "1d": (lambda: [nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()], (5,)),
    "1d with length": (lambda: [nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten()], (4, 5)),
    "3d, not affine": (lambda: [nn.Linear(2, 2), nn.BatchNorm3d(4, affine=False), nn.Flatten()], (4, 2, 2, 2)),
    "no statistics": (lambda: [nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()], (3, 2, 2)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def built(name):
    torch.manual_seed(0)
    layers, shape = MODELS[name]
    model = nn.Sequential(*layers()).double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for part in (module.running_mean, module.running_var, module.weight, module.bias):
                if part is not None:
                    part.data.uniform_(0.5, 2)
    plain = copy.deepcopy(model).requires_grad_(False)
    return (*functionalize(model), plain, torch.randn(3, 2, *shape).double())


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_model
def test_outside_of_transforms_bit_for_bit(name):
    f, params, plain, x = built(name)
    assert torch.equal(f(params, x[0]), plain(x[0]))


@every_model
def test_vmap_over_inputs_and_over_models(name):
    f, params, plain, x = built(name)
    close(vmap(lambda one: f(params, one))(x), torch.stack([plain(one) for one in x]))
    other = params.apply(lambda t: t * 1.1 if t.is_floating_point() else t)
    close(vmap(lambda p: f(p, x[0]))(torch.stack([params, other])), torch.stack([f(p, x[0]) for p in (params, other)]))


def test_vmap_over_one_tensor_of_the_layer():
    f, params, _, x = built("2d")
    for part in ("weight", "bias", "running_mean", "running_var"):
        key, values = ("1", part), torch.rand(3, 4).double() + 0.5
        run = lambda value: f(params.clone().set(key, value), x[0])  # noqa: E731, B023
        close(vmap(run)(values), torch.stack([run(value) for value in values]))


@every_model
def test_derivatives(name):
    f, params, plain, x = built(name)
    close(jacrev(lambda one: f(params, one))(x[0]), torch.autograd.functional.jacobian(plain, x[0]))
    close(jvp(lambda one: f(params, one), (x[0],), (x[1],))[1], jvp(plain, (x[0],), (x[1],))[1])


def test_derivatives_of_weight_and_bias():
    f, params, plain, x = built("2d")
    for part in ("weight", "bias"):
        got = jacrev(lambda value: f(params.clone().set(("1", part), value), x[0]))(params["1", part])  # noqa: B023
        own = lambda value: functional_call(plain, {f"1.{part}": value}, (x[0],))  # noqa: E731, B023
        close(got, torch.autograd.functional.jacobian(own, params["1", part]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    f, params, _, x = built("2d")
    params, x = params.apply(lambda t: t.to(dtype) if t.is_floating_point() else t), x.to(dtype)
    got = vmap(lambda one: f(params, one))(x)
    assert got.dtype == dtype
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, torch.stack([f(params, one) for one in x]), rtol=tolerance, atol=tolerance)


def test_the_operation_stays_a_site():
    f, params, _, x = built("2d")
    _, values = vmap(lambda one: capture(f, ["1", "1/batch_norm"])(params, one))(x)
    close(values["1"], values["1/batch_norm"])


class Copies(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_is_copied_under_vmap():
    f, params, _, x = built("2d")
    x = torch.randn(16, 4, 3, 5, 5).double()
    with Copies() as seen:
        vmap(lambda one: f(params, one))(x)
    assert not any("batch_norm" in name for name in seen.names)


def attending():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    f, params = functionalize(attention)
    x = torch.randn(3, 2, 5, 8).double()
    return (lambda one: f(params, (one, one, one))[0]), (lambda one: attention(one, one, one)[0].detach()), x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_attention_under_vmap(mode):
    run, plain, x = attending()
    with mode():
        close(vmap(run)(x), torch.stack([plain(one) for one in x]))


def test_gradients_of_vmapped_attention():
    run, _, x = attending()
    whole = torch.func.grad(lambda x: vmap(run)(x).square().sum())(x)
    close(whole, torch.stack([torch.func.grad(lambda one: run(one).square().sum())(one) for one in x]))


def test_forward_mode_of_attention():
    run, _, x = attending()
    tangent = jvp(run, (x[0],), (x[1],))[1]
    close(tangent, torch.einsum("...bld,bld->...", jacrev(run)(x[0]), x[1]))


def unembedding(bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(6, 7, bias=bias).double()
    f, params = functionalize(linear)
    return (lambda hidden: f(params, hidden[:, -1:])), linear, torch.randn(4, 1, 5, 6).double()


@pytest.mark.parametrize("bias", [True, False])
def test_the_last_rows_under_vmap_read_the_weight_once(bias):
    run, linear, hidden = unembedding(bias)
    with Copies() as seen, torch.no_grad():
        result = vmap(run)(hidden)
    assert not any("bmm" in name for name in seen.names)
    close(result, linear(hidden[:, :, -1:]).detach())


def test_gradients_of_the_last_rows_under_vmap():
    run, linear, hidden = unembedding()
    whole = torch.func.grad(lambda h: vmap(run)(h).square().sum())(hidden)
    close(whole, torch.func.grad(lambda h: linear(h[:, :, -1:]).square().sum())(hidden))


def test_a_vmapped_weight_takes_the_layer_of_torch():
    f, params = functionalize(nn.Linear(6, 7).double())
    several = torch.stack([params, params.apply(lambda p: 2 * p)])
    hidden = torch.randn(2, 3, 5, 6).double()
    result = vmap(lambda p, h: f(p, h[:, -1:]))(several, hidden)
    close(result, torch.stack([f(several[i], hidden[i][:, -1:]) for i in range(2)]))
