"""Guided GradCAM against captum, and against the product of its two parts."""

from __future__ import annotations

import copy
from functools import partial

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

from tdhook import functionalize
from tdhook.attribution.activation_maps import grad_cam
from tdhook.attribution.guided_backpropagation import guided_backpropagation
from tdhook.attribution.guided_grad_cam import guided_grad_cam
from tdhook.core import errors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # of Dynamo, about itself
    pytest.mark.filterwarnings("ignore:(Input Tensor 0|Setting backward hooks):UserWarning"),  # of captum
]
CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def cnn(dimensions=2, act=nn.ReLU):
    torch.manual_seed(0)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    layers = [conv(2, 4, 3), act(), conv(4, 6, 3), act(), nn.Flatten(-dimensions - 1), nn.Linear(6 * 5**dimensions, 5)]
    return nn.Sequential(*layers).double()


def image(*batch, dimensions=2):
    torch.manual_seed(7)
    return torch.randn(*batch, 2, *[9] * dimensions).double()


@pytest.mark.parametrize("site", ["0", "2", "3"])
def test_captum(site):
    """Its factors: captum's own product is of a map by nearest neighbour."""
    model, x = cnn(), image(3)
    f, params = functionalize(model)
    theirs = captum.attr.LayerGradCam(model, model[int(site)]).attribute(x, target=2, relu_attributions=True)
    fine = captum.attr.GuidedBackprop(model).attribute(x, target=2)
    expected = fine * F.interpolate(theirs, (9, 9), mode="bilinear", align_corners=False)
    CLOSE(guided_grad_cam(f, params, x, at=site, targets=2), expected.detach())


def test_captum_where_no_interpolation_is_needed():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(324, 5)).double()
    f, params = functionalize(model)
    theirs = captum.attr.GuidedGradCam(model, model[0]).attribute(image(3), target=1)
    CLOSE(guided_grad_cam(f, params, image(3), at="0", targets=1), theirs.detach())


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_the_product(dimensions, batch):
    f, params = functionalize(cnn(dimensions))
    x = image(batch, dimensions=dimensions)
    fine = guided_backpropagation(f, params, x, targets=[0, 3])
    coarse = grad_cam(f, params, x, at="3", targets=[0, 3], size="inputs")["3"]
    got = guided_grad_cam(f, params, x, at="3", targets=[0, 3])
    CLOSE(got, fine * coarse[:, :, None])
    CLOSE(guided_grad_cam(f, params, x, at="3", targets=[0, 3], chunk_size=1), got)
    CLOSE(guided_grad_cam(f, params, x, at="3", targets=3), got[1])


def test_two_images_of_two_sizes():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)

        def forward(self, large, small, shift):
            pooled = F.relu(self.conv(F.max_pool2d(large, 2) + small))
            return pooled.mean((2, 3)) + shift

    f, params = functionalize(Two().double())
    large, small = torch.randn(3, 2, 18, 18).double(), image(3)
    inputs = {"large": large, "small": small, "shift": torch.arange(4)}
    got = guided_grad_cam(f, params, inputs, at="conv", targets=1)
    fine = guided_backpropagation(f, params, inputs, targets=1)
    coarse = grad_cam(f, params, inputs, at="conv", targets=1, size=(18, 18))["conv"]
    CLOSE(got["large"], fine["large"] * coarse[:, None])
    assert got["small"].shape == small.shape and got["shift"] is None
    with pytest.raises(errors.InputError, match=r"map of 'conv', with 2 spatial axes.* but inputs has .*bind it, as in"):
        guided_grad_cam(f, params, {**inputs, "shift": torch.ones(3, 4).double()}, at="conv", targets=1)


def test_a_tensordict():
    f, params = functionalize(cnn())
    got = guided_grad_cam(f, params, TensorDict({"input": image(3)}, batch_size=[3]), at="3", targets=[1])
    CLOSE(got["input"], guided_grad_cam(f, params, image(3), at="3", targets=[1]))


def test_under_vmap():
    f, params = functionalize(cnn())
    x = image(4, 3)
    run = lambda x: guided_grad_cam(f, params, x, at="3", targets=[0, 1])  # noqa: E731
    CLOSE(vmap(run)(x), torch.stack([run(each) for each in x]))
    CLOSE(vmap(run, out_dims=1)(x[0]), run(x[0]))


def test_nothing_of_the_caller_is_changed():
    f, params = functionalize(cnn(act=partial(nn.ReLU, inplace=True)))
    x = image(2)
    before = copy.deepcopy((x, params.clone(), torch.get_rng_state()))
    guided_grad_cam(f, params, x, at="0", targets=0)
    assert torch.equal(x, before[0]) and (params == before[1]).all() and torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.compile
def test_compiled_equals_eager():
    torch._dynamo.reset()
    f, params = functionalize(cnn())
    run = partial(guided_grad_cam, at="3", targets=[0, 3])
    CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(f, params, image(2)), run(f, params, image(2)))


def test_one_warning_in_train_mode():
    f, params = functionalize(nn.Sequential(nn.Dropout(0.5), *cnn()).train())
    with pytest.warns(errors.TdhookWarning, match="guided_grad_cam: the model is in train mode") as caught:
        guided_grad_cam(f, params, image(2), at="4", targets=0)
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"at": ["1", "3"]}, errors.SiteError, "guided_grad_cam takes one site, at has 2; call it once for each"),
        ({"at": "4"}, errors.InputError, r"a map needs \[2, C, \*spatial\]"),
        ({"sites": "4/gelu"}, errors.SiteError, "'4/gelu' was not reached"),
        ({"reshape": 3}, errors.InputError, "reshape is 3"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None, got 0"),
        ({"targets": []}, errors.TargetError, "targets is empty"),
    ],
)
def test_bad_input(options, error, message):
    f, params = functionalize(cnn())
    with pytest.raises(error, match=message):
        guided_grad_cam(f, params, image(2), **{"at": "3", "targets": 0, **options})


def test_what_it_needs():
    f, params = functionalize(cnn(act=nn.GELU))
    with pytest.raises(errors.SiteError, match="found no relu"):
        guided_grad_cam(f, params, image(2), at="3", targets=0)
    with torch.no_grad(), pytest.raises(errors.GradientError, match="guided_grad_cam needs gradients"):
        guided_grad_cam(f, params, image(2), at="3", targets=0)
    with pytest.raises(errors.ModelError, match="has no sites"):
        guided_grad_cam(lambda params, x: x.sum((1, 2, 3)), {}, image(2), at="3")
