"""Activation maps against captum, and against their formulas written with plain autograd in float64."""

from __future__ import annotations

import copy
from functools import partial
from typing import ClassVar

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import vmap

import tdhook
from tdhook import functionalize, targets
from tdhook.attribution.activation_maps import (
    grad_cam,
    grad_cam_plus_plus,
    hires_cam,
    layer_cam,
    x_grad_cam,
)
from tdhook.attribution.eigen_maps import eigen_cam, eigen_grad_cam
from tdhook.attribution.maps import token_grid
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def cnn(dimensions=2, seed=0):
    """Site "1" is a ReLU [B, 4, *7s], site "3" the convolution [B, 6, *5s] after it."""
    torch.manual_seed(seed)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    layers = [conv(2, 4, 3), nn.ReLU(), nn.Tanh(), conv(4, 6, 3), nn.Softplus(), nn.Flatten(-dimensions - 1)]
    return nn.Sequential(*layers, nn.Linear(6 * 5**dimensions, 5)).double()


def image(*batch, dimensions=2):
    torch.manual_seed(7)
    return torch.randn(*batch, 2, *[9] * dimensions).double()


def activations_and_gradients(model, x, layer, target):
    """A and dF/dA of a layer, by a hook: what torch's autograd calls the gradient of its output."""
    kept = []

    def hook(module, args, output):
        kept.append(output.clone())  # the model may write into it
        kept[0].retain_grad()
        return kept[0]

    handle = model[layer].register_forward_hook(hook)
    model(x.clone().requires_grad_())[:, target].sum().backward()
    handle.remove()
    model.zero_grad()
    return kept[0].detach(), kept[0].grad


def first_component(values):
    """[B, C, H, W] -> [B, H, W]: the leading left singular vector of [P, C] times its singular value, of either sign."""
    u, s, _ = torch.linalg.svd(values.flatten(2).mT, full_matrices=False)
    return (u[..., 0] * s[..., :1]).reshape(len(values), *values.shape[2:])


def spread(weights):
    return weights[:, :, None, None]


def plus_plus(a, g):
    """As it stands in the paper."""
    alpha = g**2 / (2 * g**2 + spread(a.sum((2, 3))) * g**3)
    alpha = torch.where(g == 0, 0, alpha)
    return (spread((alpha * g.relu()).sum((2, 3))) * a).sum(1)


def eigen_grad(a, g):
    component = first_component(g * a)
    return component * ((g * a).sum(1) * component).sum((1, 2), keepdim=True).sign()


FORMULAS = {
    grad_cam: lambda a, g: (spread(g.mean((2, 3))) * a).sum(1),
    grad_cam_plus_plus: plus_plus,
    hires_cam: lambda a, g: (g * a).sum(1),
    x_grad_cam: lambda a, g: (spread((g * a).sum((2, 3)) / a.sum((2, 3))) * a).sum(1),
    layer_cam: lambda a, g: (g.relu() * a).sum(1),
    eigen_grad_cam: eigen_grad,
}
METHODS = list(FORMULAS)


class Calls(nn.Module):
    """Counts its calls in a list that no twin copies."""

    count: ClassVar = [0]

    def forward(self, x: Tensor) -> Tensor:
        Calls.count[0] += 1
        return x


class Transformer(nn.Module):
    """Patches of an image, a class token, attention; `block` returns [B, 1 + 9, 8]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Conv2d(2, 8, 3, stride=3)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x).flatten(2).mT], 1)
        tokens = self.block(tokens)
        return self.head((F.softmax(tokens @ tokens.mT, -1) @ tokens)[:, 0])


# Formulas --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("relu", [True, False])
def test_the_formula_of_each(method, relu):
    model, x = cnn(), image(3)
    f, params = functionalize(model)
    got = method(f, params, x, at="1", targets=2, relu=relu)["1"]
    expected = FORMULAS[method](*activations_and_gradients(model, x, 1, 2))
    assert expected.min() < 0 or method in (layer_cam, grad_cam_plus_plus)  # of activations after a ReLU
    CLOSE(got, expected.relu() if relu else expected)


@pytest.mark.parametrize("method", [grad_cam, grad_cam_plus_plus, hires_cam, layer_cam])
def test_activations_of_both_signs(method):
    model, x = cnn(), image(1)
    f, params = functionalize(model)
    got = method(f, params, x, at="3", targets=4, relu=False)["3"]
    CLOSE(got, FORMULAS[method](*activations_and_gradients(model, x, 3, 4)))


@pytest.mark.parametrize("relu", [True, False])
def test_captum(relu):
    model, x = cnn(), image(3)
    f, params = functionalize(model)
    classes = torch.tensor([4, 0, 2])
    got = grad_cam(f, params, x, at="3", targets=targets.per_example(classes), relu=relu, size=(20, 13))["3"]
    theirs = captum.attr.LayerGradCam(model, model[3]).attribute(x, target=classes, relu_attributions=relu)
    theirs = F.interpolate(theirs, (20, 13), mode="bilinear", align_corners=False)
    CLOSE(got, theirs[:, 0].detach())


def test_by_hand():
    """Two channels over three positions and a head that reads them all, so that every weight can be read off."""
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(6, 1, bias=False)))
    a = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 0.0, 4.0]]])
    params["2", "weight"] = torch.tensor([[3.0, 0.0, 0.0, -1.0, 5.0, -1.0]])
    run = partial(lambda method: method(f, params, a, at="0", targets=0, relu=False)["0"].squeeze())
    torch.testing.assert_close(run(grad_cam), torch.tensor([1.0 + 4, 2, 3 + 4]))  # means 1 and 1
    torch.testing.assert_close(run(hires_cam), torch.tensor([3.0 - 4, 0, -4]))
    torch.testing.assert_close(run(layer_cam), torch.tensor([3.0, 0, 0]))
    torch.testing.assert_close(run(x_grad_cam), torch.tensor([0.5 - 4, 1.0, 1.5 - 4]))  # 3/6 and -8/8
    first, second = 3 / (2 + 3 * 6), 5 / (2 + 5 * 8)
    torch.testing.assert_close(run(grad_cam_plus_plus), first * a[0, 0] + second * a[0, 1])


def test_small_gradients_keep_their_weight():
    """The symptom elsewhere: a constant of 1e-6 in a denominator of squared gradients makes GradCAM++ maps vanish."""
    model, x = cnn(), image(2)
    f, params = functionalize(model)
    scaled = grad_cam_plus_plus(f, params, x, at="1", targets=lambda out: 1e-9 * out[:, 2])["1"]
    a, g = activations_and_gradients(model, x, 1, 2)
    CLOSE(scaled / 1e-9, (spread(g.relu().sum((2, 3)) / 2) * a).sum(1), rtol=1e-6)


def test_a_dead_channel_has_no_weight():
    f, params = functionalize(cnn())
    dead = params.clone()
    dead["0", "bias"][:] = -1e3
    for method in METHODS:
        assert torch.equal(method(f, dead, image(2), at="1", targets=0)["1"], torch.zeros(2, 7, 7).double())


def test_sums():
    """XGradCAM keeps the sum of gradient times activation; for a linear head without bias that is the score."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(196, 5, bias=False)).double()
    f, params = functionalize(model)
    x = image(3)
    for method in (hires_cam, x_grad_cam):
        maps = method(f, params, x, at="1", targets=[1, 3], relu=False)["1"]
        CLOSE(maps.sum((-2, -1)), f(params, x)[:, [1, 3]].T)


# Principal components --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["1", "3"])  # more positions than channels
@pytest.mark.parametrize("center", [False, True])
def test_eigen_cam(site, center):
    model, x = cnn(), image(3)
    f, params = functionalize(model)
    a, _ = activations_and_gradients(model, x, int(site), 0)
    a = a - a.mean((2, 3), keepdim=True) if center else a
    got = eigen_cam(f, params, x, at=site, relu=False, center=center)[site]
    expected = first_component(a)
    CLOSE(got.abs(), expected.abs(), rtol=1e-7, atol=1e-9)
    assert ((got * a.mean(1)).sum((1, 2)) > 0).all()
    signs = (got * expected).sum((1, 2), keepdim=True).sign()
    CLOSE(got, signs * expected, rtol=1e-7, atol=1e-9)


def test_eigen_cam_with_more_channels_than_positions():
    model = nn.Sequential(nn.Conv2d(2, 40, 5), nn.ReLU()).double()
    f, params = functionalize(model)
    x = image(2)[..., :7, :7]
    a = model(x).detach()
    got = eigen_cam(f, params, x, at="1")["1"]
    CLOSE(got, first_component(a).abs(), rtol=1e-7, atol=1e-9)  # of one sign, as the activations are


def test_eigen_cam_of_one_pattern_is_that_pattern():
    pattern = torch.arange(12.0).reshape(3, 4)
    f, params = functionalize(nn.Identity())
    x = torch.stack([pattern, 2 * pattern, -pattern, 2 * pattern])[None]  # channels 1, 2, -1, 2: length sqrt(10)
    torch.testing.assert_close(eigen_cam(f, params, x, at=":out")[":out"], 10**0.5 * pattern[None])
    torch.testing.assert_close(eigen_cam(f, params, -x, at=":out", relu=False)[":out"], -(10**0.5) * pattern[None])


def test_eigen_cam_needs_no_gradients():
    f, params = functionalize(cnn())
    with torch.inference_mode():
        inside = eigen_cam(f, params, image(2), at="1", size="inputs")["1"]
    CLOSE(inside.clone(), eigen_cam(f, params, image(2), at="1", size="inputs")["1"])


# Targets and sites -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 3])
def test_many_targets_at_many_sites_are_the_single_ones(method, batch):
    f, params = functionalize(cnn())
    x = image(batch)
    got = method(f, params, x, at=["3", "1"], targets=[4, 0], size=(8, 8))
    assert isinstance(got, TensorDict) and list(got.keys()) == ["3", "1"]
    for site in ("1", "3"):
        assert got[site].shape == (2, batch, 8, 8)
        for row, target in zip(got[site], (4, 0)):
            CLOSE(row, method(f, params, x, at=site, targets=target, size=(8, 8))[site])


def test_one_target_in_a_list_is_plural():
    f, params = functionalize(cnn())
    assert grad_cam(f, params, image(1), at="1", targets=[2])["1"].shape == (1, 1, 7, 7)


def test_one_forward_and_one_backward_for_all_targets_and_sites():
    f, params = functionalize(nn.Sequential(Calls(), *cnn()))
    Calls.count[0] = 0
    grad_cam(f, params, image(2), at=["2", "4"], targets=[0, 1, 2, 3, 4], chunk_size=2)
    assert Calls.count == [1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_chunks_change_nothing(method, chunk_size):
    f, params = functionalize(cnn())
    run = partial(method, f, params, image(3), at=["1", "3"], targets=[0, 1, 2], size="inputs")
    for site, value in run().items():
        CLOSE(run(chunk_size=chunk_size)[site], value)


def test_inside_an_edited_model():
    f, params = functionalize(cnn())
    doubled = tdhook.intervene(f, {"6": lambda value: 2 * value})
    CLOSE(
        hires_cam(doubled, params, image(2), at="1", targets=0)["1"], 2 * hires_cam(f, params, image(2), at="1", targets=0)["1"]
    )
    zeroed = tdhook.intervene(f, {"3": lambda value: 0 * value})
    assert hires_cam(zeroed, params, image(2), at="1", targets=0)["1"].abs().max() == 0


# Space -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_one_to_three_dimensions(method, dimensions):
    f, params = functionalize(cnn(dimensions))
    x = image(2, dimensions=dimensions)
    got = method(f, params, x, at="1", targets=[0, 1], size="inputs")["1"]
    small = method(f, params, x, at="1", targets=[0, 1])["1"]
    assert small.shape == (2, 2, *[7] * dimensions)
    mode = ("linear", "bilinear", "trilinear")[dimensions - 1]
    CLOSE(got, F.interpolate(small, (9,) * dimensions, mode=mode, align_corners=False))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_eigen_cam_in_one_to_three_dimensions(dimensions):
    f, params = functionalize(cnn(dimensions))
    assert eigen_cam(f, params, image(3, dimensions=dimensions), at="3")["3"].shape == (3, *[5] * dimensions)


def test_the_size_of_named_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)

        def forward(self, picture, weight):
            return self.conv(picture).mean((2, 3)) * weight

    f, params = functionalize(Two().double())
    inputs = TensorDict({"picture": image(3), "weight": torch.ones(3, 1).double()}, batch_size=[3])
    assert grad_cam(f, params, inputs, at="conv", targets=0, size="inputs")["conv"].shape == (3, 9, 9)


def test_the_tokens_of_a_transformer():
    model, x = Transformer().double(), image(3)
    f, params = functionalize(model)
    got = grad_cam(f, params, x, at="block", targets=[1, 2], relu=False, reshape=token_grid(), size="inputs")["block"]
    assert got.shape == (2, 3, 9, 9)
    kept = []
    model.block.register_forward_hook(lambda module, args, output: (output.retain_grad(), kept.append(output))[0])
    model(x)[:, 2].sum().backward()
    a, g = (t[:, 1:].mT.reshape(3, 8, 3, 3) for t in (kept[0].detach(), kept[0].grad))
    small = grad_cam(f, params, x, at="block", targets=2, relu=False, reshape=token_grid())["block"]
    CLOSE(small, FORMULAS[grad_cam](a, g))
    component = eigen_cam(f, params, x, at="block", relu=False, reshape=token_grid(3, 3))["block"]
    CLOSE(component.abs(), first_component(a).abs(), rtol=1e-7, atol=1e-9)


def test_a_token_grid_keeps_the_order_of_rows():
    tokens = torch.arange(7.0)[None, :, None]
    assert token_grid(2, 3)(tokens)[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert token_grid(height=3)(tokens)[0, 0].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert token_grid(prefix=3)(tokens)[0, 0].tolist() == [[3, 4], [5, 6]]


# Composition -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_under_vmap(method):
    f, params = functionalize(cnn())
    x = image(4, 3)
    run = lambda x: method(f, params, x, at="1", targets=[0, 1], size="inputs")["1"]  # noqa: E731
    CLOSE(vmap(run)(x), torch.stack([run(each) for each in x]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_one_example_without_a_batch_axis(method):
    f, params = functionalize(cnn())
    x = image(3)
    run = lambda x: method(f, params, x, at="1", targets=[0, 1], size="inputs")["1"]  # noqa: E731
    whole = run(x)
    CLOSE(vmap(run, out_dims=1)(x), whole, rtol=1e-7, atol=1e-9)
    CLOSE(run(x[2]), whole[:, 2], rtol=1e-7, atol=1e-9)


def test_eigen_cam_under_vmap():
    f, params = functionalize(cnn())
    run = lambda x: eigen_cam(f, params, x, at="1")["1"]  # noqa: E731
    CLOSE(vmap(run)(image(4, 3)), torch.stack([run(each) for each in image(4, 3)]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", [*METHODS, eigen_cam])
def test_maps_can_be_differentiated(method):
    f, params = functionalize(cnn())
    options = {} if method is eigen_cam else {"targets": 1}
    x = image(1)[..., :9]
    total = lambda x: method(f, params, x, at="3", relu=False, **options)["3"].square().sum()  # noqa: E731
    gradient = torch.func.grad(total)(x)
    direction = torch.randn_like(x)
    step = 1e-6
    difference = (total(x + step * direction) - total(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=1e-6)


def test_nothing_of_the_caller_is_changed():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(196, 5)).double()
    f, params = functionalize(model)
    x = image(2)
    before = copy.deepcopy((x, params.clone(), torch.get_rng_state()))
    for method in METHODS:
        method(f, params, x, at=["0", "1"], targets=[0, 1])
    with pytest.raises(errors.InputError):
        grad_cam(f, params, x, at="3", targets=0)
    assert torch.equal(x, before[0]) and (params == before[1]).all() and torch.equal(torch.get_rng_state(), before[2])
    assert not x.requires_grad and all(p.grad is None for p in model.parameters())


def test_before_an_in_place_relu():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(196, 5)).double()
    f, params = functionalize(model)
    a, g = activations_and_gradients(nn.Sequential(model[0], nn.ReLU(), *model[2:]), image(2), 0, 3)
    CLOSE(hires_cam(f, params, image(2), at="0", targets=3, relu=False)["0"], (a * g).sum(1))


@pytest.mark.parametrize("method", [*METHODS, eigen_cam])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float32, 1e-4)])
def test_the_dtype_of_the_data_is_kept(method, dtype, tolerance):
    options = {"at": "1", "size": "inputs"} if method is eigen_cam else {"at": "1", "size": "inputs", "targets": 1}
    f, params = functionalize(cnn())
    exact = method(f, params, image(1), **options)["1"]
    f, params = functionalize(cnn().to(dtype))
    got = method(f, params, image(1).to(dtype), **options)["1"]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance * float(exact.max()))


@pytest.mark.compile
@pytest.mark.parametrize("method", [grad_cam_plus_plus, x_grad_cam, eigen_grad_cam, eigen_cam])
def test_compiled_equals_eager(method):
    torch._dynamo.reset()
    f, params = functionalize(cnn())
    options = {} if method is eigen_cam else {"targets": [0, 3], "chunk_size": 1}
    run = partial(method, at=["1", "3"], size="inputs", **options)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for site, value in run(f, params, image(2)).items():
        CLOSE(compiled(f, params, image(2))[site], value, rtol=1e-7, atol=1e-9)


@pytest.mark.compile
def test_compiled_with_tokens():
    torch._dynamo.reset()
    f, params = functionalize(Transformer().double())
    run = lambda x: grad_cam(f, params, x, at="block", targets=1, reshape=token_grid(), size=(9, 9))["block"]  # noqa: E731
    CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(image(2)), run(image(2)))


# Warnings and errors ---------------------------------------------------------------------------------------------------


def test_a_model_in_train_mode_is_warned_about():
    f, params = functionalize(nn.Sequential(nn.Dropout(0.5), *cnn()).train())
    with pytest.warns(errors.TdhookWarning, match=r"layer_cam: the model is in train mode.*call model.eval\(\)"):
        layer_cam(f, params, image(2), at="1", targets=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"at": "6"}, errors.InputError, r"at has '6', which holds .*; a map needs \[3, C, \*spatial\]: .* before pooling"),
        ({"at": "7"}, errors.SiteError, "the model has no module '7'"),
        ({"at": "*"}, errors.SiteError, r"at takes exact sites, got the pattern '\*'"),
        ({"size": "input"}, errors.InputError, "size='input' is unknown; give None, one number per spatial axis"),
        ({"size": 7}, errors.InputError, "size=7 is unknown"),
        ({"size": ()}, errors.InputError, r"size=\(\) is unknown"),
        ({"size": (7, 0)}, errors.InputError, "a side of size is an integer of at least 1, got 0"),
        ({"size": (7,)}, errors.InputError, r"size=\(7,\) has 1 numbers for the map of '1', which has 2 spatial axes"),
        ({"reshape": "grid"}, errors.InputError, r"reshape is 'grid' .*; give a function such as token_grid\(\)"),
        ({"reshape": lambda a: a.sum((2, 3))}, errors.InputError, r"after reshape .*\[3, 4\]; a map needs .* correct reshape"),
        ({"reshape": lambda a: a.movedim(0, 1)}, errors.InputError, r"after reshape .*\[4, 3, 7, 7\]; a map needs \[3, C"),
        ({"reshape": lambda a: None}, errors.InputError, "after reshape None .*; a map needs"),
        ({"reshape": token_grid()}, errors.InputError, "7 tokens less prefix=1 do not fill a square; set height"),
        ({"reshape": token_grid(2, 2)}, errors.InputError, "do not fill height=2, width=2"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None, got 0"),
        ({"targets": []}, errors.TargetError, "targets is empty"),
        ({"targets": None}, errors.TargetError, "needs an output of one scalar per example"),
        ({"targets": 5}, errors.TargetError, "index=5 is out of range"),
    ],
)
def test_bad_input(options, error, message):
    f, params = functionalize(cnn())
    with pytest.raises(error, match=message):
        grad_cam(f, params, image(3), **{"at": "1", "targets": 0, **options})


def test_more_than_three_axes_cannot_be_up_sampled():
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(16 * 3, 2)))
    x = torch.randn(2, 3, 2, 2, 2, 2)
    assert grad_cam(f, params, x, at="0", targets=0)["0"].shape == (2, 2, 2, 2, 2)
    with pytest.raises(errors.InputError, match="maps have up to 3 axes to be up-sampled, that of '0' has 4"):
        grad_cam(f, params, x, at="0", targets=0, size=(4, 4, 4, 4))


def test_inputs_without_a_size():
    f, params = functionalize(cnn(1))
    with pytest.raises(errors.InputError, match="size='inputs' needs one image size with 2 axes, as the map of '1' has"):
        grad_cam(f, params, image(2, dimensions=1), at="1", targets=0, size="inputs", reshape=lambda a: a.unflatten(-1, (7, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 0}, "height is an integer of at least 1 or None, got 0"),
        ({"width": 2.5}, "width is an integer"),
        ({"prefix": -1}, "prefix is an integer of at least 0, got -1"),
    ],
)
def test_a_bad_token_grid(options, message):
    with pytest.raises(errors.InputError, match=message):
        token_grid(**options)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (None, r"token_grid takes tokens \[B, N, D\], got None"),
        (torch.ones(3), r"token_grid takes tokens \[B, N, D\]"),
        (torch.ones(2, 1, 4), "1 tokens less prefix=1 do not fill a square"),
        (torch.ones(2, 0, 4), "0 tokens less prefix=1 do not fill a square"),
    ],
)
def test_what_is_no_token_sequence(tokens, message):
    with pytest.raises(errors.InputError, match=message):
        token_grid()(tokens)


def test_eigen_cam_needs_a_batch_axis():
    f, params = functionalize(cnn())
    with pytest.raises(errors.InputError, match=r"its first axis is not the batch axis of inputs, .* as in inputs"):
        eigen_cam(f, params, image(), at="1")
    with pytest.raises(errors.InputError, match=r"a map needs \[3, C, \*spatial\]"):
        eigen_cam(f, params, image(3), at="5")


@pytest.mark.parametrize("method", METHODS)
def test_gradients_cannot_be_asked_for_without_grad_mode(method):
    f, params = functionalize(cnn())
    with torch.no_grad(), pytest.raises(errors.GradientError, match=f"{method.__name__} needs gradients"):
        method(f, params, image(2), at="1", targets=0)


def test_sites_need_a_functional_model():
    for method in (grad_cam, eigen_cam):
        with pytest.raises(errors.ModelError, match="has no sites"):
            method(lambda params, x: x.sum(-1), {}, image(2), at="1")
