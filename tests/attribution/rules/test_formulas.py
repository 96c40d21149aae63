"""Rules of affine layers against their formulas, written with every contribution x_i W_ji in one tensor."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import tdhook
from tdhook.attribution import rules as r
from tdhook.attribution.lrp import lrp

from .layers import LAYERS, example, matrix, ours

CLOSE = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)


def stabilized(z, epsilon=1e-6):
    return z + torch.where(z < 0, -epsilon, epsilon)


def plus(t):
    return t.clamp(min=0)


def minus(t):
    return t.clamp(max=0)


def spread(shares, total, start, epsilon=1e-6):
    """sum_j shares_ij / total_j R_j"""
    return torch.einsum("boi,bo->bi", shares, start / stabilized(total, epsilon))


# Each maps contributions c [B, O, I], operands x [B, I], weights [O, I], biases [O] and the relevance [B, O] to that of x.


def epsilon(size):
    return lambda c, x, w, b, start: spread(c, c.sum(2) + b, start, size)


def gamma(g):
    def formula(c, x, w, b, start):
        z = c.sum(2) + b
        up, down = c + g * plus(c), c + g * minus(c)
        above = spread(up, up.sum(2) + b + g * plus(b), torch.where(z > 0, start, 0))
        return above + spread(down, down.sum(2) + b + g * minus(b), torch.where(z < 0, start, 0))

    return formula


def alpha_beta(alpha, beta):
    def formula(c, x, w, b, start):
        first = spread(plus(c), plus(c).sum(2) + plus(b), start)
        return alpha * first - beta * spread(minus(c), minus(c).sum(2) + minus(b), start)

    return formula


def box(low, high):
    def formula(c, x, w, b, start):
        parts = c - low * plus(w) - high * minus(w)
        return spread(parts, parts.sum(2), start)

    return formula


def w_square(c, x, w, b, start):
    return spread(w.square().expand_as(c), w.square().sum(1) + b.square(), start)


def flat(c, x, w, b, start):
    read = (w != 0).to(w).expand_as(c)
    return spread(read, read.sum(2), start)


FORMULAS = {
    "epsilon": (r.Epsilon(0.25), epsilon(0.25)),
    "gamma": (r.Gamma(0.7), gamma(0.7)),
    "alpha 3 beta 2": (r.AlphaBeta(3.0, 2.0), alpha_beta(3.0, 2.0)),
    "z+": (r.ZPlus(), alpha_beta(1.0, 0.0)),
    "box": (r.ZBox(low=-2.0, high=5.0), box(-2.0, 5.0)),
    "w squared": (r.WSquare(), w_square),
    "flat": (r.Flat(), flat),
}


@pytest.mark.parametrize("rule", FORMULAS)
@pytest.mark.parametrize("name", ["linear", "linear of tokens", "conv2d", "conv3d", "transposed conv2d, grouped"])
def test_rules_equal_their_formulas(name, rule):
    own, formula = FORMULAS[rule]
    layer, x, cotangent = example(name, True, "both signs")
    w, b = matrix(layer, LAYERS[name][1])
    flat_x, flat_start = x.flatten(1), (layer(x) * cotangent).flatten(1).detach()
    expected = formula(flat_x[:, None] * w, flat_x, w, b, flat_start)
    CLOSE(ours(layer, own, x, cotangent).flatten(1), expected)


# Other spellings of an affine map


class Spelling(nn.Module):
    def __init__(self, how, weight, bias):
        super().__init__()
        self.how, self.weight, self.bias = how, nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x):
        return self.how(x, self.weight, self.bias)


SPELLINGS = {
    "@": lambda x, w, b: x @ w.T + b,
    "weight first": lambda x, w, b: (w @ x.T).T + b,
    "matmul": lambda x, w, b: torch.matmul(x, w.T) + b,
    "mm": lambda x, w, b: torch.mm(w, x.T).T + b,
    "bmm": lambda x, w, b: torch.bmm(x[None], w.T[None])[0] + b,
    "einsum": lambda x, w, b: torch.einsum("bi,oi->bo", x, w) + b,
    "tensordot": lambda x, w, b: torch.tensordot(x, w, dims=([1], [1])) + b,
    "inner": lambda x, w, b: torch.inner(x, w) + b,
}
FUSED = {
    "addmm": lambda x, w, b: torch.addmm(b, x, w.T),
    "addmm, weight first": lambda x, w, b: torch.addmm(b[:, None], w, x.T).T,
    "addmm, named": lambda x, w, b: torch.addmm(input=b, mat1=x, mat2=w.T),
    "addmm, scaled": lambda x, w, b: torch.addmm(b / 2, x, 4 * w.T, beta=2, alpha=0.25),
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x[None], w.T[None])[0],
    "addbmm": lambda x, w, b: torch.addbmm(b, x[:, :3, None].permute(1, 0, 2), w.T[:3, None]) + x[:, 3:] @ w[:, 3:].T * 0,
    "addmv": lambda x, w, b: torch.stack([torch.addmv(b, w, row) for row in x]),
    "linear, named": lambda x, w, b: nn.functional.linear(weight=w, input=x, bias=b),
    "conv1d": lambda x, w, b: nn.functional.conv1d(x[:, :, None], w[:, :, None], b)[:, :, 0],
}


@pytest.mark.parametrize("how", [*SPELLINGS, *FUSED])
@pytest.mark.parametrize("rule", ["epsilon", "gamma", "alpha 3 beta 2"])
def test_all_spellings_of_an_affine_map(how, rule):
    own, formula = FORMULAS[rule]
    x, w, b = torch.randn(3, 5).double(), torch.randn(4, 5).double(), torch.randn(4).double()
    model = Spelling({**SPELLINGS, **FUSED}[how], w, b)
    cotangent = torch.randn(3, 4).double()
    got = ours(model, own, x, cotangent)
    if how == "addbmm":
        x = x * torch.tensor([1.0, 1, 1, 0, 0]).double()
    z = x @ w.T + b
    if how in FUSED:
        expected = formula(x[:, None] * w, x, w, b, z * cotangent)
    else:  # the sum is an operation of its own
        expected = formula(x[:, None] * w, x, w, 0 * b, x @ w.T * cotangent)
    CLOSE(got, expected)


def test_weights_made_by_a_network():
    """The factor that depends on the input is the one that gets the relevance, wherever it stands."""
    fixed, x, bias = torch.randn(3, 5).double(), torch.randn(4, 5).double(), torch.randn(4).double()
    model = Spelling(lambda x, w, b: nn.functional.linear(w, x, b), fixed, bias)
    f, params = tdhook.functionalize(model)
    cotangent = torch.randn(3, 4).double()
    got = lrp(f, params, x, rules={"linear": r.ZPlus()}, targets=lambda y: (y * cotangent).sum(0))
    contributions = fixed[:, None] * x  # [3, 4, 5]
    shares = plus(contributions) / stabilized(plus(contributions).sum(2) + plus(bias))[..., None]
    CLOSE(got, (shares * (model(x) * cotangent)[..., None]).sum(0).detach())


def test_black_pixels_get_relevance_by_rules_of_the_input():
    layer, x = nn.Conv2d(1, 2, 2).double(), torch.zeros(1, 1, 3, 3).double()
    for rule in (r.Flat(), r.WSquare(), r.ZBox(low=-1.0, high=1.0)):
        got = ours(layer, rule, x, torch.ones(1, 2, 2, 2).double())
        assert (got != 0).all()


def test_rules_of_the_input_inside_a_model_divide_by_the_operand():
    """There what would go to an operand of 0 is lost, and nothing else."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x - 1)

    model = Shifted().double()
    x = torch.tensor([[3.0, 1.0, -2.0, 2.0]]).double()
    f, params = tdhook.functionalize(model)
    inner = ours(model.layer, r.WSquare(1e-12), x - 1, torch.ones(1, 3).double())
    got = lrp(f, params, x, rules={"linear": r.WSquare(1e-12)}, targets=lambda y: y.sum(1))
    ratio = torch.where(x == 1, 0.0, x / (x - 1))
    CLOSE(got, inner * ratio)
