"""Deconvnets against captum, and on every spelling of a ReLU."""

from __future__ import annotations

from functools import partial

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tdhook import functionalize
from tdhook.attribution.deconvnet import deconvnet
from tdhook.core import errors

pytestmark = pytest.mark.filterwarnings("ignore:(Input Tensor 0|Setting backward hooks):UserWarning")  # of captum
CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def cnn(act=nn.ReLU):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), act(), nn.Conv2d(4, 6, 3), act(), nn.Flatten(-3), nn.Linear(150, 8), act()]
    return nn.Sequential(*layers, nn.Linear(8, 5)).double()


def image(batch):
    return torch.randn(batch, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("batch", [1, 3])
def test_captum(batch):
    model, x = cnn(), image(batch)
    f, params = functionalize(model)
    expected = torch.stack([captum.attr.Deconvolution(model).attribute(x, target=t) for t in (0, 3)])
    CLOSE(deconvnet(f, params, x, targets=[0, 3]), expected)
    CLOSE(deconvnet(f, params, x, targets=[0, 3], chunk_size=1), expected)


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice, self.six = nn.ReLU(), nn.ReLU6()

    def forward(self, x):
        for relu in (F.relu, self.twice, self.six, self.twice, F.relu6, torch.relu, lambda x: x.relu_()):
            x = -relu(x.clone())
        return x.sum(-1)


def test_every_spelling_of_a_relu():
    """Each lets only positive cotangents pass, and the sign changes between them, so that nothing comes through."""
    f, params = functionalize(Kinds())
    assert deconvnet(f, params, torch.randn(2, 3)).abs().max() == 0


def test_sites():
    model, x = cnn(nn.GELU), image(2)
    f, params = functionalize(model)
    x = x.requires_grad_()
    for target in (0, 1):
        got = deconvnet(f, params, x.detach(), targets=target, sites="**/gelu@*")
        h = [x]
        for i, layer in enumerate(model):
            value = layer(h[-1])
            h.append(value.detach() + (passing(h[-1]) - passing(h[-1]).detach()) if i in (1, 3, 6) else value)
        CLOSE(got, torch.autograd.grad(h[-1][:, target].sum(), x)[0])


def passing(x):
    x = x * 1
    x.register_hook(torch.relu)
    return x


def test_a_model_without_a_relu():
    f, params = functionalize(cnn(nn.GELU))
    with pytest.raises(errors.RuleError, match="no line of the rules fits"):
        deconvnet(f, params, image(1), targets=0)
    with pytest.raises(errors.InputError, match="chunk_size"):
        deconvnet(f, params, image(1), targets=0, chunk_size=0)
