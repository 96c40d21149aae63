"""ScoreCAM and AblationCAM against their formulas, one channel at a time."""

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

from tdhook import functionalize, targets
from tdhook.attribution.maps import token_grid
from tdhook.attribution.masking_maps import ablation_cam, score_cam
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
METHODS = [score_cam, ablation_cam]


def cnn(dimensions=2, seed=0):
    """Site "1" is a ReLU [B, 4, *7s], site "3" the convolution [B, 6, *5s] after it."""
    torch.manual_seed(seed)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    layers = [conv(2, 4, 3), nn.ReLU(), nn.Tanh(), conv(4, 6, 3), nn.Softplus(), nn.Flatten(-dimensions - 1)]
    return nn.Sequential(*layers, nn.Linear(6 * 5**dimensions, 5)).double()


def image(*batch, dimensions=2):
    torch.manual_seed(7)
    return torch.randn(*batch, 2, *[9] * dimensions).double()


@torch.no_grad()
def score_weights(model, x, layer, target, baseline=0.0):
    """[B, C]: softmax over channels of the scores of masked images, one image and one channel at a time."""
    a = model[: layer + 1](x)
    rows = []
    for i in range(len(x)):
        scores = []
        for channel in a[i]:
            mask = F.interpolate(channel[None, None], x.shape[2:], mode="bilinear", align_corners=False)
            span = mask.max() - mask.min()
            mask = (mask - mask.min()) / span if span else 0 * mask
            scores.append(model(baseline + mask * (x[i : i + 1] - baseline))[0, target])
        rows.append(torch.stack(scores).exp() / torch.stack(scores).exp().sum())
    return torch.stack(rows)


@torch.no_grad()
def ablation_weights(model, x, layer, target):
    """[B, C]: the part of the score that is lost, one channel at a time."""
    a, tail = model[: layer + 1](x), model[layer + 1 :]
    whole = tail(a)[:, target]
    columns = []
    for c in range(a.shape[1]):
        without = a.clone()
        without[:, c] = 0
        columns.append((whole - tail(without)[:, target]) / whole.abs())
    return torch.stack(columns, 1)


def weighted(weights, a):
    return torch.einsum("bc,bchw->bhw", weights, a.detach())


class Calls(nn.Module):
    """Counts its calls in a list that no twin copies."""

    count: ClassVar = [0]

    def forward(self, x: Tensor) -> Tensor:
        Calls.count[0] += 1
        return x


# Formulas --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["1", "3"])
@pytest.mark.parametrize("relu", [True, False])
def test_score_cam(site, relu):
    model, x = cnn(), image(3)
    f, params = functionalize(model)
    expected = weighted(score_weights(model, x, int(site), 2), model[: int(site) + 1](x))
    got = score_cam(f, params, x, at=site, targets=2, relu=relu)[site]
    CLOSE(got, expected.relu() if relu else expected)


def test_score_cam_with_baselines():
    model, x = cnn(), image(2)
    f, params = functionalize(model)
    baseline = torch.randn(2, 1, 1).double()
    expected = weighted(score_weights(model, x, 1, 2, baseline), model[:2](x))
    CLOSE(score_cam(f, params, x, at="1", targets=2, baselines=baseline)["1"], expected)
    black, grey = (score_cam(f, params, x, at="1", targets=2, baselines=b)["1"] for b in (0.0, 0.5))
    assert (black - grey).abs().max() > 1e-3


def test_the_score_of_the_baseline_does_not_matter():
    """The paper's difference from F(x') cancels in the softmax over channels."""
    f, params = functionalize(cnn())
    plain, shifted = score_cam(f, params, image(2), at="1", targets=[lambda out: out[:, 1], lambda out: out[:, 1] - 3])["1"]
    CLOSE(plain, shifted)


def test_a_constant_channel_masks_everything():
    model, x = cnn(), image(2)
    f, params = functionalize(model)
    params = params.clone()
    params["0", "weight"][0] = 0
    params["0", "bias"][0] = 2.0
    constant = copy.deepcopy(model)
    constant[0].weight.data[0] = 0
    constant[0].bias.data[0] = 2.0
    expected = weighted(score_weights(constant, x, 1, 0), constant[:2](x))
    CLOSE(score_cam(f, params, x, at="1", targets=0)["1"], expected)


@pytest.mark.parametrize("site", ["1", "3"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("target", range(5))  # of either sign
def test_ablation_cam(site, relu, target):
    model, x = cnn(), image(3)
    f, params = functionalize(model)
    expected = weighted(ablation_weights(model, x, int(site), target), model[: int(site) + 1](x))
    got = ablation_cam(f, params, x, at=site, targets=target, relu=relu)[site]
    CLOSE(got, expected.relu() if relu else expected)


def test_captum_ablates_channels_alike():
    model, x = cnn(), image(2)
    f, params = functionalize(model)
    layer = captum.attr.LayerFeatureAblation(model, model[3])
    masks = torch.arange(6)[None, :, None, None].expand(1, 6, 5, 5)
    lost = layer.attribute(x, target=3, layer_baselines=0.0, layer_mask=masks)[:, :, 0, 0]
    weights = (lost / model(x)[:, 3, None].abs()).detach()
    got = ablation_cam(f, params, x, at="3", targets=3, relu=False)["3"]
    CLOSE(got, weighted(weights, model[:4](x)), rtol=1e-6, atol=1e-7)


def test_ablation_cam_of_a_linear_head():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(196, 5, bias=False)).double()
    f, params = functionalize(model)
    a = model[0](image(2))
    part = (a * model[2].weight[1].reshape(4, 7, 7)).sum((2, 3))
    expected = weighted((part / part.sum(1, keepdim=True).abs()).detach(), a)
    CLOSE(ablation_cam(f, params, image(2), at="0", targets=1, relu=False)["0"], expected)


def test_a_negative_score_does_not_turn_the_map_over():
    """F and F - 100 lose the same to each channel."""
    f, params = functionalize(cnn())
    chosen = [lambda out: out[:, 1] + 100, lambda out: out[:, 1] - 100]
    above, below = ablation_cam(f, params, image(3), at="1", targets=chosen, relu=False)["1"]
    assert ((above * below) >= 0).all() and above.abs().max() > 0


def test_a_score_of_zero():
    f, params = functionalize(cnn())
    zero = lambda out: out[:, 1] - out[:, 1].detach()  # noqa: E731
    got = ablation_cam(f, params, image(2), at="1", targets=zero)["1"]
    assert torch.equal(got, torch.zeros(2, 7, 7).double())  # nothing is lost
    offset = f(params, image(1))[0, 1]
    got = ablation_cam(f, params, image(1), at="1", targets=lambda out: out[:, 1] - offset)["1"]
    assert got.isfinite().all() and got.max() > 0


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


@pytest.mark.parametrize("method", METHODS)
def test_one_target_per_example(method):
    f, params = functionalize(cnn())
    classes = torch.tensor([4, 0, 2])
    got = method(f, params, image(3), at="3", targets=targets.per_example(classes))["3"]
    each = method(f, params, image(3), at="3", targets=[4, 0, 2])["3"]
    CLOSE(got, torch.stack([each[i, i] for i in range(3)]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_change_nothing(method, chunk_size):
    f, params = functionalize(cnn())
    run = partial(method, f, params, image(3), at=["1", "3"], targets=[0, 1, 2], size="inputs")
    for site, value in run().items():
        CLOSE(run(chunk_size=chunk_size)[site], value)


def test_ablation_runs_only_what_comes_after_the_site():
    f, params = functionalize(nn.Sequential(Calls(), *cnn()))
    Calls.count[0] = 0
    ablation_cam(f, params, image(2), at="2", targets=[0, 1], chunk_size=1)
    assert Calls.count == [1]


# Space and inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_one_to_three_dimensions(method, dimensions):
    f, params = functionalize(cnn(dimensions))
    x = image(2, dimensions=dimensions)
    got = method(f, params, x, at="1", targets=[0, 1], size="inputs")["1"]
    assert got.shape == (2, 2, *[9] * dimensions)
    mode = ("linear", "bilinear", "trilinear")[dimensions - 1]
    CLOSE(got, F.interpolate(method(f, params, x, at="1", targets=[0, 1])["1"], (9,) * dimensions, mode=mode))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, picture, weight):
        return self.conv(picture).square().mean((2, 3)) * weight


def test_what_is_no_image_is_not_masked():
    model = Two().double()
    f, params = functionalize(model)
    weight = torch.rand(3, 1).double()
    inputs = TensorDict({"picture": image(3), "weight": weight}, batch_size=[3])
    got = score_cam(f, params, inputs, at="conv", targets=1)["conv"]
    bound, params = functionalize(model, weight=weight)
    CLOSE(got, score_cam(bound, params, image(3), at="conv", targets=1)["conv"])


class Tokens(nn.Module):
    """A class token and nine patches; the head reads both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Conv2d(2, 8, 3, stride=3)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.block, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.block(torch.cat([self.token.expand(len(x), -1, -1), self.embed(x).flatten(2).mT], 1))
        return self.head(tokens.tanh().mean(1))


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_ablation_of_tokens_leaves_the_class_token(grad_mode):
    model, x = Tokens().double(), image(3)
    f, params = functionalize(model)
    with grad_mode():
        got = ablation_cam(f, params, x, at="block", targets=2, reshape=token_grid(), relu=False)["block"]
    kept = []
    model.block.register_forward_hook(lambda module, args, output: kept.append(output.detach()))
    whole = model(x)[:, 2]
    weights = []
    for c in range(8):
        without = kept[0].clone()
        without[:, 1:, c] = 0
        weights.append((whole - model.head(without.tanh().mean(1))[:, 2]) / whole.abs())
    CLOSE(got, weighted(torch.stack(weights, 1), kept[0][:, 1:].mT.reshape(3, 8, 3, 3)).detach())


def test_score_cam_of_tokens():
    f, params = functionalize(Tokens().double())
    got = score_cam(f, params, image(3), at="block", targets=[2, 0], reshape=token_grid(), size="inputs")["block"]
    assert got.shape == (2, 3, 9, 9) and got.min() >= 0 and got.max() > 0


# Composition -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_under_vmap(method):
    f, params = functionalize(cnn())
    x = image(4, 3)
    run = lambda x: method(f, params, x, at="1", targets=[0, 1], size="inputs", chunk_size=2)["1"]  # noqa: E731
    CLOSE(vmap(run)(x), torch.stack([run(each) for each in x]))


@pytest.mark.parametrize("method", METHODS)
def test_one_example_without_a_batch_axis(method):
    f, params = functionalize(cnn())
    x = image(3)
    run = lambda x: method(f, params, x, at="1", targets=[0, 1], size="inputs")["1"]  # noqa: E731
    whole = run(x)
    CLOSE(vmap(run, out_dims=1)(x), whole)
    CLOSE(run(x[2]), whole[:, 2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradients_are_needed(method, mode):
    f, params = functionalize(cnn())
    with mode():
        got = method(f, params, image(2), at="1", targets=0)["1"]
    CLOSE(got.clone(), method(f, params, image(2), at="1", targets=0)["1"])


def test_nothing_of_the_caller_is_changed():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(196, 5)).double()
    f, params = functionalize(model)
    x = image(2)
    before = copy.deepcopy((x, params.clone(), torch.get_rng_state()))
    for method in METHODS:
        method(f, params, x, at=["0", "1"], targets=[0, 1])
        with pytest.raises(errors.InputError):
            method(f, params, x, at="3", targets=0)
    assert torch.equal(x, before[0]) and (params == before[1]).all() and torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float32, 1e-4)])
def test_the_dtype_of_the_data_is_kept(method, dtype, tolerance):
    options = {"at": "1", "size": "inputs", "targets": 1, "relu": False}
    f, params = functionalize(cnn())
    exact = method(f, params, image(1), **options)["1"]
    f, params = functionalize(cnn().to(dtype))
    got = method(f, params, image(1).to(dtype), **options)["1"]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


def test_a_model_that_vmap_cannot_take():
    class Fill(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = cnn()

        def forward(self, x):
            out = torch.zeros(len(x), 5, dtype=x.dtype)
            out[:] = self.body(x)
            return out

    f, params = functionalize(Fill())
    g, plain = functionalize(cnn())
    for method in METHODS:
        with pytest.warns(errors.TdhookWarning, match="vmap cannot run this model"):
            got = method(f, params, image(2), at="body.1", targets=[0, 1])["body.1"]
        CLOSE(got, method(g, plain, image(2), at="1", targets=[0, 1])["1"])


@pytest.mark.compile
@pytest.mark.parametrize("method", METHODS)
def test_compiled_equals_eager(method):
    torch._dynamo.reset()
    f, params = functionalize(cnn())
    run = partial(method, at=["1", "3"], size="inputs", targets=[0, 3], chunk_size=3)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for site, value in run(f, params, image(2)).items():
        CLOSE(compiled(f, params, image(2))[site], value)


# Warnings and errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_model_in_train_mode_is_warned_about(method):
    f, params = functionalize(nn.Sequential(nn.Dropout(0.5), *cnn()).train())
    with pytest.warns(errors.TdhookWarning, match=rf"{method.__name__}: the model is in train mode"):
        method(f, params, image(2), at="1", targets=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"at": "6"}, errors.InputError, r"at has '6', which holds .*; a map needs \[3, C, \*spatial\]"),
        ({"at": "7"}, errors.SiteError, "the model has no module '7'"),
        ({"size": "input"}, errors.InputError, "size='input' is unknown"),
        ({"size": (7,)}, errors.InputError, r"size=\(7,\) has 1 numbers for the map of '1', which has 2 spatial axes"),
        ({"reshape": 3}, errors.InputError, "reshape is 3 .*; give a function"),
        ({"reshape": lambda a: a.sum((2, 3))}, errors.InputError, "after reshape .* correct reshape"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None, got 0"),
        ({"targets": []}, errors.TargetError, "targets is empty"),
        ({"targets": None}, errors.TargetError, "needs an output of one scalar per example"),
        ({"targets": 5}, errors.TargetError, "index=5 is out of range"),
    ],
)
def test_bad_input(method, options, error, message):
    f, params = functionalize(cnn())
    with pytest.raises(error, match=message):
        method(f, params, image(3), **{"at": "1", "targets": 0, **options})


def test_baselines_that_do_not_fit():
    f, params = functionalize(cnn())
    with pytest.raises(errors.InputError, match=r"baselines holds .* does not broadcast"):
        score_cam(f, params, image(3), at="1", targets=0, baselines=torch.ones(5, 5).double())


def test_inputs_that_cannot_be_masked():
    f, params = functionalize(nn.Sequential(nn.Embedding(7, 9), cnn(1)[0], nn.Flatten(), nn.Linear(28, 3)).float())
    ids = torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(errors.InputError, match="no floating-point tensor"):
        score_cam(f, params, ids, at="1", targets=0)
    assert ablation_cam(f, params, ids, at="1", targets=0)["1"].shape == (3, 7)
    f, params = functionalize(cnn(1))
    with pytest.raises(errors.InputError, match=r"by the activations of '1', with 2 spatial axes, .* or ablation_cam"):
        score_cam(f, params, image(2, dimensions=1), at="1", targets=0, reshape=lambda a: a.unflatten(-1, (7, 1)))


@pytest.mark.parametrize("method", METHODS)
def test_sites_need_a_functional_model(method):
    with pytest.raises(errors.ModelError, match="has no sites"):
        method(lambda params, x: x.sum((-1, -2, -3)), {}, image(2), at="1")
