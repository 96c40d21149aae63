"""SmoothGrad and its kin against closed forms, plain loops over the same noise, and captum."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import pairwise
from typing import ClassVar

import captum.attr
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import vmap

from tdhook import functionalize
from tdhook.attribution import integrated_gradients
from tdhook.attribution.jacobian import jacobian
from tdhook.attribution.saliency import input_x_gradient, saliency
from tdhook.attribution.smooth import smooth
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
KINDS = ["mean", "square", "variance"]
signed = partial(saliency, absolute=False)


def mlp(*widths, act=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1]).double()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(shape, samples, seed=0, dtype=torch.float64):
    generator = seeded(seed)
    return torch.stack([torch.randn(shape, generator=generator, dtype=dtype) for _ in range(samples)])


def reduced(each, kind):
    """The estimate and its standard error, from all samples at once."""
    if kind == "variance":
        value = each.var(0)
        return value, value * math.sqrt(2 / (len(each) - 1))
    each = each**2 if kind == "square" else each
    return each.mean(0), each.std(0) / math.sqrt(len(each))


# Closed forms ----------------------------------------------------------------------------------------------------------

A = torch.tensor([[2.0, -1, 0], [-1, 3, 0.5], [0, 0.5, -1]]).double()
POINTS = torch.tensor([[1.0, -2, 0.5], [0, 3, 1]]).double()


def quadratic(a, x):
    return torch.einsum("bi,ij,bj->b", x, a, x) / 2


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_expectations_of_a_quadratic_form(kind, relative):
    """The gradient of x'Ax/2 at x + sigma z is normal with mean Ax and variance sigma^2 sum_j A_ij^2, sigma by example."""
    n = 4000
    got = smooth(signed, samples=n, noise=0.2, relative=relative, kind=kind, generator=seeded())(quadratic, A, POINTS)
    sigma = 0.2 * torch.tensor([[3.0], [3.0]]).double() if relative else torch.full((2, 1), 0.2).double()
    mean, variance = POINTS @ A, sigma**2 * A.square().sum(1)
    expected = {"mean": mean, "square": mean**2 + variance, "variance": variance}[kind]
    spread = {"mean": variance, "square": 2 * variance**2 + 4 * mean**2 * variance, "variance": 2 * variance**2}[kind]
    torch.testing.assert_close(got.standard_error, (spread / n).sqrt(), rtol=0.1, atol=0)
    assert ((got.value - expected).abs() < 4.5 * got.standard_error).all()


def test_the_range_is_that_of_each_example_and_input():
    """One sample: the noise is seen through the gradient of x^2 / 2, which is x."""
    a, b = torch.tensor([[0.0, 4], [1, 2]]).double(), torch.tensor([[[0.0], [10]], [[5], [5]]]).double()
    inputs = (a, b)
    method = smooth(signed, samples=1, noise=0.5, generator=seeded())
    got = method(lambda _, x: (x[0].square().sum(-1) + x[1].square().sum((1, 2))) / 2, None, inputs)
    generator = seeded()
    za, zb = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in inputs)
    CLOSE(got.value[0], a + 0.5 * torch.tensor([[4.0], [1]]).double() * za)
    CLOSE(got.value[1], b + 0.5 * torch.tensor([10.0, 0]).double()[:, None, None] * zb)
    assert all(e.isnan().all() for e in got.standard_error)


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_it_is_the_method(kind):
    f, params = functionalize(mlp(6, 8, 5))
    x = torch.randn(3, 6).double()
    plain = signed(f, params, x, targets=[0, 1])
    got = smooth(signed, samples=3, noise=0, kind=kind)(f, params, x, targets=[0, 1])
    CLOSE(got.value, {"mean": plain, "square": plain**2, "variance": 0 * plain}[kind])
    CLOSE(got.standard_error, 0 * plain)


# Loops and captum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", [saliency, signed, input_x_gradient, partial(integrated_gradients, steps=5)])
def test_equals_a_loop_over_the_same_noise(method, batch, kind):
    f, params = functionalize(mlp(6, 8, 5))
    x = torch.randn(batch, 6).double()
    got = smooth(method, samples=7, noise=0.3, kind=kind, generator=seeded(3))(f, params, x, targets=[0, 3])
    sigma = 0.3 * (x.amax(1, True) - x.amin(1, True))
    each = torch.stack([method(f, params, x + sigma * z, targets=[0, 3]) for z in draws((batch, 6), 7, 3)])
    value, error = reduced(each, kind)
    assert got.value.shape == (2, batch, 6)
    CLOSE(got.value, value)
    CLOSE(got.standard_error, error)


@pytest.mark.parametrize(("kind", "name"), [("mean", "smoothgrad"), ("square", "smoothgrad_sq"), ("variance", "vargrad")])
@pytest.mark.parametrize("absolute", [True, False])
def test_equals_captum_on_the_same_noise(kind, name, absolute):
    """captum draws all copies of one example at once, from the global generator. For 16 features that is the same noise."""
    model = mlp(16, 8, 5).float()
    f, params = functionalize(model)
    x = torch.randn(1, 16)
    torch.manual_seed(4)
    got = smooth(saliency, samples=9, noise=0.5, relative=False, kind=kind)(f, params, x, targets=2, absolute=absolute)
    torch.manual_seed(4)
    reference = captum.attr.NoiseTunnel(captum.attr.Saliency(model))
    expected = reference.attribute(x, nt_type=name, nt_samples=9, stdevs=0.5, target=2, abs=absolute)
    value = got.value * (8 / 9 if kind == "variance" else 1)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


# Structures ------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.double()

    def forward(self, a, b, scale):
        return self.out(torch.tanh(self.a(a) * self.b(b))) * scale[:, None]


def test_several_inputs_in_every_structure():
    f, params = functionalize(Two())
    a, b, scale = torch.randn(3, 3).double(), torch.randn(3, 4).double(), torch.tensor([1, 2, 3])
    named = {"a": a, "b": b, "scale": scale}
    run = lambda inputs, targets: smooth(signed, samples=4, generator=seeded())(f, params, inputs, targets=targets)  # noqa: E731
    got, by_name, packed = (run(inputs, [0, 1]) for inputs in ((a, b, scale), named, TensorDict(named, [3])))
    for part in (0, 1):
        assert isinstance(got[part], tuple) and got[part][2] is None and by_name[part]["scale"] is None
        assert packed[part].batch_size == (2, 3) and set(packed[part].keys()) == {"a", "b"}
        for k, name in enumerate("ab"):
            assert got[part][k].shape == (2, *named[name].shape)
            CLOSE(by_name[part][name], got[part][k])
            CLOSE(packed[part][name], got[part][k])
    CLOSE(run((a, b, scale), 1).value[0], got.value[0][1])


@pytest.mark.parametrize("noise", [(0.5, 0.0, None), {"b": 0, "a": 0.5, "scale": None}, TensorDict({"a": 0.5, "b": 0.0})])
def test_each_input_can_have_noise_of_its_own(noise):
    inputs = {"a": torch.randn(2, 3).double(), "b": torch.randn(2).double(), "scale": torch.ones(2).long()}
    inputs = tuple(inputs.values()) if isinstance(noise, tuple) else inputs
    pick = (lambda x, k: x[k]) if isinstance(inputs, dict) else (lambda x, k: x["ab".index(k)])
    if isinstance(noise, TensorDict):
        inputs, noise = TensorDict(inputs, [2]), {"a": 0.5, "b": 0}
    got = smooth(signed, samples=2, noise=noise, kind="variance")(
        lambda _, x: pick(x, "a").square().sum(-1) + pick(x, "b").square(), None, inputs
    )
    assert pick(got.value, "a").min() > 0 and pick(got.value, "b").abs().max() == 0


def test_attributions_at_sites_and_of_other_shapes():
    f, params = functionalize(mlp(6, 8, 5))
    x = torch.randn(3, 6).double()
    sites = smooth(input_x_gradient, samples=3, generator=seeded())(f, params, x, targets=0, at=["0", "1"])
    assert list(sites.value.keys()) == ["0", "1"] and sites.standard_error["1"].shape == (3, 8)
    sigma = 0.15 * (x.amax(1, True) - x.amin(1, True))
    each = [input_x_gradient(f, params, x + sigma * z, targets=0, at="0")["0"] for z in draws((3, 6), 3)]
    CLOSE(sites.value["0"], torch.stack(each).mean(0))
    matrices = smooth(jacobian, samples=3, generator=seeded())(f, params, x)
    CLOSE(matrices.value[:, 2], smooth(signed, samples=3, generator=seeded())(f, params, x, targets=2).value)


def test_images_and_a_perturbation_method_of_ones_own():
    """What is smoothed need not use gradients, and needs no targets."""
    x = torch.randn(2, 3, 4, 4)
    got = smooth(lambda f, params, inputs: inputs.sum(1), samples=5, generator=seeded())(None, None, x)
    sigma = 0.15 * (x.flatten(1).amax(1) - x.flatten(1).amin(1))
    noisy = x + sigma[:, None, None, None] * draws(x.shape, 5, dtype=torch.float32)
    torch.testing.assert_close(got.value, noisy.sum(2).mean(0))


# Randomness, chunks ----------------------------------------------------------------------------------------------------


class Calls(nn.Module):
    """Counts its calls in a list that no twin copies."""

    count: ClassVar = [0]

    def forward(self, x: Tensor) -> Tensor:
        Calls.count[0] += 1
        return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6, 7, 100])
def test_chunks_change_nothing(chunk_size, kind):
    f, params = functionalize(Two())
    inputs = (torch.randn(3, 3).double(), torch.randn(3, 4).double(), torch.tensor([1, 2, 3]))
    whole, parts = (
        smooth(signed, samples=7, kind=kind, chunk_size=c, generator=seeded())(f, params, inputs, targets=[0, 1])
        for c in (None, chunk_size)
    )
    for k in (0, 1):
        CLOSE(parts.value[k], whole.value[k])
        CLOSE(parts.standard_error[k], whole.standard_error[k])


def test_chunks_change_nothing_in_half_precision():
    f, params = functionalize(mlp(6, 8, 5).bfloat16())
    x = torch.randn(3, 6).bfloat16()
    run = lambda c: smooth(signed, samples=60, chunk_size=c, generator=seeded())(f, params, x, targets=0)  # noqa: E731
    assert run(1).value.dtype == torch.bfloat16
    torch.testing.assert_close(run(1).value, run(None).value, rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(run(1).standard_error, run(None).standard_error, rtol=2**-5, atol=1e-5)


def test_one_vmapped_pass_per_chunk():
    f, params = functionalize(nn.Sequential(Calls(), nn.Linear(3, 2)))
    for chunk_size, expected in ((None, 1), (4, 3)):
        Calls.count[0] = 0
        smooth(saliency, samples=10, chunk_size=chunk_size)(f, params, torch.ones(1, 3), targets=[0, 1])
        assert Calls.count == [expected]


def test_the_seed_reproduces_the_result_and_the_generator_moves_on():
    """captum's GradientShap is not reproducible from torch's seed."""
    f, params = functionalize(mlp(6, 8, 5))
    x = torch.randn(3, 6).double()
    run = lambda generator: smooth(saliency, samples=3, generator=generator)(f, params, x, targets=0).value  # noqa: E731
    generator = seeded()
    first, second = run(generator), run(generator)
    assert torch.equal(first, run(seeded())) and not torch.equal(first, second)
    torch.manual_seed(5)
    by_seed = run(None)
    torch.manual_seed(5)
    assert torch.equal(by_seed, run(None))


def test_nothing_of_the_caller_is_changed():
    model = mlp(6, 8, 5, act=partial(nn.ReLU, inplace=True))
    f, params = functionalize(model)
    x = torch.randn(3, 6).double()
    before = copy.deepcopy((x, params.clone(), torch.get_rng_state()))
    smooth(saliency, samples=3, generator=seeded())(f, params, x, targets=[0, 1])
    with pytest.raises(errors.TargetError):
        smooth(saliency, samples=3, generator=seeded())(f, params, x, targets=9)
    assert torch.equal(x, before[0]) and (params == before[1]).all() and torch.equal(torch.get_rng_state(), before[2])
    assert not x.requires_grad and all(p.grad is None for p in model.parameters())


# Composition -----------------------------------------------------------------------------------------------------------


def test_under_vmap_over_models():
    models = [functionalize(mlp(6, 8, 5, seed=i)) for i in range(2)]
    every = torch.stack([params for _, params in models])
    f, x = models[0][0], torch.randn(3, 6).double()
    run = lambda p: smooth(signed, samples=3, generator=seeded())(f, p, x, targets=0)[:2]  # noqa: E731
    for got, *expected in zip(vmap(run, randomness="same")(every), *map(run, every)):
        CLOSE(got, torch.stack(expected))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_under_vmap_over_examples(randomness):
    x = POINTS.repeat(2, 1)
    method = smooth(signed, samples=2000, generator=seeded())
    got = vmap(lambda x: method(quadratic, A, x[None])[:2], randomness=randomness)(x)
    assert ((got[0][:, 0] - x @ A).abs() < 4.5 * got[1][:, 0]).all()
    assert torch.equal(got[0][:2], got[0][2:]) is (randomness == "same")


def test_it_can_be_differentiated():
    x = torch.randn(2, 3).double().requires_grad_()
    method = lambda x: smooth(signed, samples=3, generator=seeded())(lambda _, x: x.pow(4).sum(-1), None, x).value  # noqa: E731
    assert torch.autograd.gradcheck(method, x)


def test_a_model_that_writes_into_its_own_tensors():
    """vmap cannot run it, so the copies run one by one, with a warning."""

    def fill(weight, x):
        out = torch.zeros(len(x), 5, dtype=x.dtype)
        out[:, :4] = (x @ weight.mT).tanh()
        return out

    weight, x = torch.randn(4, 3).double(), torch.randn(2, 3).double()
    whole = lambda weight, x: (x @ weight.mT).tanh()  # noqa: E731
    with pytest.warns(errors.TdhookWarning, match="vmap cannot run this model"):
        got = smooth(saliency, samples=3, generator=seeded())(fill, weight, x, targets=[1, 3])
    expected = smooth(saliency, samples=3, generator=seeded())(whole, weight, x, targets=[1, 3])
    CLOSE(got.value, expected.value)


@pytest.mark.compile
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_compiled_equals_eager_and_does_not_recompile(chunk_size, kind):
    torch._dynamo.reset()
    f, params = functionalize(mlp(6, 8, 5))
    run = partial(smooth(signed, samples=3, kind=kind, chunk_size=chunk_size), targets=[0, 1])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = torch.randn(3, 6).double()
        torch.manual_seed(seed)
        expected = run(f, params, x)
        torch.manual_seed(seed)
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = compiled(f, params, x)
        CLOSE(got.value, expected.value)
        CLOSE(got.standard_error, expected.standard_error)


@pytest.mark.compile
def test_compiled_with_a_tensordict_and_made_inside():
    torch._dynamo.reset()
    f, params = functionalize(Two())
    inputs = TensorDict({"a": torch.randn(3, 3).double(), "b": torch.randn(3, 4).double(), "scale": torch.ones(3).long()}, [3])

    def run(params, inputs):
        got = smooth(partial(integrated_gradients, steps=3), samples=2)(f, params, inputs, targets=0)
        return got.value["a"], got.standard_error["b"]

    torch.manual_seed(0)
    expected = run(params, inputs)
    torch.manual_seed(0)
    for got, want in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(params, inputs), expected):
        CLOSE(got, want)


# Warnings and errors ---------------------------------------------------------------------------------------------------

X = torch.ones(2, 3)


def test_a_model_in_train_mode_is_warned_about():
    f, params = functionalize(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).train())
    with pytest.warns(errors.TdhookWarning, match="saliency: the model is in train mode, where '0'"):
        smooth(saliency, samples=2)(f, params, X, targets=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "saliency"}, "method is 'saliency' of type str; give an attribution function"),
        ({"samples": 0}, "samples is an integer of at least 1, got 0"),
        ({"samples": 1, "kind": "variance"}, "samples=1 has no variance; give at least 2"),
        ({"kind": "vargrad"}, "kind='vargrad' is unknown; choose one of 'mean', 'square', 'variance'"),
        ({"chunk_size": 0}, "chunk_size is an integer of at least 1 or None, got 0"),
        ({"noise": -0.1}, "noise holds -0.1 .*; give a number of at least 0"),
        ({"noise": float("nan")}, "noise holds nan"),
        ({"noise": True}, "noise holds True"),
        ({"generator": 0}, r"generator is 0 of type int; give a torch.Generator, torch.Generator\(\).manual_seed\(0\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(errors.InputError, match=message):
        smooth(**{"method": saliency, **options})


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (X.long(), {}, r"no floating-point tensor to add noise to; for token ids .*tdhook.start_from"),
        (X[0], {}, r"float32 tensor of shape \[3\], which has no range within an example .* relative=False"),
        (X, {"noise": (0.1, 0.2)}, "noise holds a tuple of 2"),
        (X, {"noise": None}, "noise holds None"),
        ((X, X), {"noise": (0.1,)}, "noise is a tuple of 1, which is not the structure of inputs, a tuple of 2"),
        ((X, X), {"noise": (0.1, "b")}, "noise holds 'b'"),
        ({"a": X}, {"noise": {"b": 0.1}}, "noise is a dict with 'b', which is not the structure of inputs, a dict with 'a'"),
    ],
)
def test_bad_input(inputs, options, message):
    def never(*args):
        raise AssertionError

    with pytest.raises(errors.InputError, match=message):
        smooth(never, **options)(None, None, inputs)


def test_a_generator_draws_on_its_own_device():
    generator = seeded()
    got = smooth(saliency, samples=3, generator=generator)(lambda _, x: x.sum(-1), None, X.to("meta"))
    assert got.value.device.type == "meta"
    left = seeded()
    for _ in range(3):
        torch.randn(X.shape, generator=left, dtype=X.dtype)
    assert torch.equal(generator.get_state(), left.get_state())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: smooth(saliency, samples=2)(lambda _, x: x.sum(-1), None, x), r"an Estimate.*\(\*args.*\).value\)"),
        (lambda x: x.argmax(-1), "something that holds a int64 tensor"),
    ],
)
def test_a_method_whose_result_has_no_mean(result, message):
    with pytest.raises(errors.InputError, match=f"method returned {message}"):
        smooth(lambda f, params, inputs: result(inputs), samples=2)(None, None, X)


def test_an_error_of_the_method_comes_through():
    f, params = functionalize(nn.Linear(3, 2))
    with pytest.raises(errors.TargetError, match="index=2 is out of range"):
        smooth(saliency)(f, params, X, targets=2)
    with torch.no_grad(), pytest.raises(errors.GradientError, match="saliency needs gradients"):
        smooth(saliency)(f, params, X, targets=0)
