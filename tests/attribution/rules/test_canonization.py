"""Canonization: the same function, batch norms that are the identity, and zennit's canonized model."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from tdhook import functionalize
from tdhook.attribution import rules
from tdhook.attribution.lrp import lrp
from tdhook.attribution.rules.canonization import batch_norm_pairs, merge_batch_norm, zero_bias
from tdhook.core import errors

from . import oracle

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def stirred(model):
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.double().eval()


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.two, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.norm3, self.three = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)
        self.norm4 = nn.BatchNorm2d(2)

    def forward(self, x):
        h = self.norm1(self.one(x)).relu()
        h = self.three(self.norm3(h + self.norm2(self.two(h))))
        return self.norm4(h) + h  # not alone: what is before it goes elsewhere, too


@pytest.mark.parametrize(
    ("model", "x", "pairs"),
    [
        (nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)), (2, 2, 5), [("0", "1")]),
        (nn.Sequential(nn.Conv3d(1, 2, 2, padding=1), nn.BatchNorm3d(2)), (2, 1, 3, 3, 3), [("0", "1")]),
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6)), (2, 4, 5, 5), [("0", "1")]),
        (nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6, affine=False)), (2, 4, 5), [("0", "1")]),
        (
            nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 3)),
            (3, 4),
            [("0", "1"), ("3", "4")],
        ),
        (
            nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular")),
            (2, 4, 6, 6),
            [("0", "1")],
        ),
        (Residual(), (2, 2, 6, 6), [("one", "norm1"), ("two", "norm2"), ("norm3", "three")]),
    ],
)
def test_the_function_stays_the_same(model, x, pairs):
    f, params = functionalize(stirred(model))
    x = normal(*x)
    before = params.clone()
    assert batch_norm_pairs(f, params, x) == pairs
    merged = merge_batch_norm(f, params, x)
    CLOSE(f(merged, x), f(params, x))
    assert all(torch.equal(value, params[key]) for key, value in before.items(True, True))
    for key, value in merge_batch_norm(f, params, pairs=pairs).items(True, True):
        assert torch.equal(value, merged[key])
    for pair in pairs:
        (norm,) = (name for name in pair if isinstance(model.get_submodule(name), nn.modules.batchnorm._BatchNorm))
        assert torch.equal(merged[norm, "running_mean"], torch.zeros_like(merged[norm, "running_mean"]))
        CLOSE(merged[norm, "running_var"] + model.get_submodule(norm).eps, torch.ones_like(merged[norm, "running_var"]))
    if isinstance(model, Residual):
        assert merged["norm1", "bias"].abs().min() > 0 and merged["norm2", "bias"].abs().max() == 0


def cnn(bias=True):
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(6, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return stirred(nn.Sequential(*first, *second, nn.Linear(32, 4)))


@pytest.mark.skipif(not oracle.INSTALLED, reason="zennit is not installed")
@pytest.mark.parametrize("name", ["EpsilonPlus", "EpsilonAlpha2Beta1", "EpsilonPlusFlat"])
def test_zennits_canonized_model(name):
    ours = {
        "EpsilonPlus": rules.epsilon_plus,
        "EpsilonAlpha2Beta1": rules.epsilon_alpha2_beta1,
        "EpsilonPlusFlat": rules.epsilon_plus_flat,
    }[name]
    model, x = cnn(), normal(2, 3, 8, 8)
    f, params = functionalize(model)
    zennit = oracle.zennit()
    composite = getattr(zennit.composites, name)(canonizers=[zennit.canonizers.SequentialMergeBatchNorm()])
    expected = oracle.relevance(model, x, composite, 2)
    got = lrp(f, merge_batch_norm(f, params, x), x, rules=ours(), targets=2, start="one")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # of the stabilizers


@pytest.mark.skipif(not oracle.INSTALLED, reason="zennit is not installed")
def test_zennits_canonized_weights():
    model = cnn(bias=False)
    f, params = functionalize(model)
    merged = merge_batch_norm(f, params, normal(2, 3, 8, 8))
    theirs = copy.deepcopy(model)
    oracle.zennit().canonizers.SequentialMergeBatchNorm().apply(theirs)
    CLOSE(merged["0", "weight"], theirs[0].weight.detach())
    CLOSE(merged["1", "bias"], theirs[0].bias.detach())  # the layer has no place for it


def test_zero_bias():
    model = nn.Sequential(nn.LSTM(3, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 2), nn.BatchNorm1d(2))
    f, params = functionalize(stirred(model))
    zeroed = zero_bias(params, f)
    for key, value in zeroed.items(True, True):
        if "bias" in key[-1]:
            assert value.abs().max() == 0
        else:
            assert value is params[key] or torch.equal(value, params[key])
    assert params["2", "bias"].abs().max() > 0


def test_without_biases_the_zero_rule_conserves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    f, params = functionalize(model)
    x, zeroed = normal(4, 5), zero_bias(params)
    relevance = lrp(f, zeroed, x, rules={"linear": rules.Epsilon(0.0)}, targets=1)
    CLOSE(relevance.sum(1), f(zeroed, x)[:, 1])


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3)
        self.other.weight = self.conv.weight

    def forward(self, x):
        return self.norm(self.conv(x)) + self.other(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1)), "'1' pads with zeros"),
        (nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, bias=False)), "'1' has no bias to take the shift"),
        (nn.Sequential(nn.BatchNorm2d(2), nn.ConvTranspose2d(2, 3, 3)), "'1' is transposed"),
        (nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3, affine=False)), "neither has a bias"),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)), "with the statistics of the batch"),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(2)), "'1' has 2 features for 3"),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()), "one has to be a batch norm"),
    ],
)
def test_pairs_that_cannot_be_merged(model, message):
    f, params = functionalize(stirred(model))
    with pytest.raises(errors.RuleError, match=f"'0' and '1' cannot be merged: .*{message}"):
        merge_batch_norm(f, params, pairs=[("0", "1")])


def test_what_is_used_elsewhere_stays():
    f, params = functionalize(stirred(Shared()))
    with pytest.raises(errors.RuleError, match="the parameters of 'conv' are used elsewhere, too"):
        merge_batch_norm(f, params, pairs=[("conv", "norm")])
    with pytest.raises(errors.InputError, match="no batch norm can be merged"):
        merge_batch_norm(f, params, normal(1, 2, 5, 5))


def test_a_model_in_train_mode():
    f, params = functionalize(cnn().train())
    with pytest.raises(errors.RuleError, match=r"call model.eval\(\) first"):
        merge_batch_norm(f, params, pairs=[("0", "1")])


def test_bad_input():
    f, params = functionalize(cnn())
    with pytest.raises(errors.InputError, match="give either inputs"):
        merge_batch_norm(f, params)
    with pytest.raises(errors.InputError, match="pairs holds 'a'"):
        merge_batch_norm(f, params, pairs=["a"])
    with pytest.raises(errors.SiteError, match="no module '77'"):
        merge_batch_norm(f, params, pairs=[("0", "77")])
    with pytest.raises(errors.ParamsError, match="params is a TensorDict"):
        zero_bias({})
    with pytest.raises(errors.ParamsError, match="params has no bias"):
        zero_bias(functionalize(nn.Linear(2, 2, bias=False))[1])
