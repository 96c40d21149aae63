"""`explain`: which operation gets which rule; and tables that are wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tdhook import errors, functionalize, with_rules
from tdhook.attribution import rules as r
from tdhook.attribution.lrp import lrp

IMAGES = torch.zeros(1, 3, 8, 8)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 5, bias=False),
        nn.Softmax(1),
    ).eval()


def test_a_report_prints_operations_rules_and_what_absorbs():
    report = r.explain(*functionalize(network()), IMAGES, r.epsilon_plus())
    assert repr(report) == "Report(7 operations, 1 non-linear ones without a rule)"
    assert str(report).splitlines() == [
        "operation     group        rule                                          absorbs",
        "0/conv2d      convolution  ZPlus(alpha=1.0, beta=0.0, stabilizer=1e-06)  bias, epsilon",
        "1/batch_norm  batch_norm   Pass(stabilizer=1e-09)                        bias, epsilon",
        "2/relu        activation   Pass(stabilizer=1e-09)",
        "3/max_pool2d  maximum      Gradient()",
        "5/linear      linear       Epsilon(epsilon=1e-06)                        epsilon",
        "6/softmax     softmax      gradient (no rule!)                           softmax",
    ]
    assert report.without_rule == ["6/softmax"] and len(report) == 7


def test_strict_wants_a_rule_for_each_non_linear_operation():
    f, params = functionalize(network())
    with pytest.raises(errors.RuleError, match=r"1 non-linear operations have no rule: 6/softmax; add lines"):
        r.explain(f, params, IMAGES, r.epsilon_plus(), strict=True)
    assert r.explain(f, params, IMAGES, {"softmax": r.Gradient()} + r.epsilon_plus(), strict=True)
    assert r.explain(with_rules(f, {"softmax": r.Stop()}), params, IMAGES, strict=True)


def test_a_report_needs_rules():
    f, params = functionalize(network())
    with pytest.raises(errors.RuleError, match="rules is None, and f has none"):
        r.explain(f, params, IMAGES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: r.AlphaBeta(1.0, 1.0), r"alpha - beta has to be 1, got 1.0 - 1.0"),
        (lambda: r.AlphaBeta(-1.0, -2.0), "alpha .*-1.0"),
        (lambda: r.ZBox(), r"ZBox needs low, .* as in ZBox\(low=-3.0, high=3.0\); got None"),
        (lambda: r.ZBox(low=0.0), "ZBox needs high"),
        (lambda: r.ZBox(low="a", high=1.0), "low of ZBox is .*; give a number"),
        (lambda: r.ZBox(low=3.0, high=-3.0), "low of ZBox is 3.0, which is above high, -3.0"),
        (lambda: r.Epsilon(-1.0), "epsilon .*-1.0"),
        (lambda: r.Epsilon(float("nan")), "epsilon .*nan"),
        (lambda: r.Gamma("a"), "gamma .*'a'"),
        (lambda: r.Gamma(stabilizer=-1.0), "stabilizer .*-1.0"),
        (lambda: r.BetaSmooth(0.0), "beta .*0.0"),
        (lambda: r.Attention(query=-0.5), "query .*-0.5"),
        (lambda: r.on("linaer", r.Epsilon()), "unknown operation 'linaer'.*linear"),
        (lambda: r.on("head", r.Epsilon()), r"a module is meant by on\('\*', rule, sites='head'\)"),
        (lambda: r.on("linear", "epsilon"), "'epsilon' of type str is no rule"),
        (lambda: r.on("linear", r.Epsilon), "is no rule"),
        (lambda: r.on("linear", r.Uniform()), r"Uniform\(\) is for matmul, product, not for linear"),
        (lambda: r.Rules.of(3), "rules is 3 of type int; give a preset"),
        (lambda: r.Rules.of("epsilon_plus"), "rules is 'epsilon_plus'"),
    ],
)
def test_rules_that_are_wrong_by_themselves(make, message):
    with pytest.raises((errors.RuleError, errors.InputError), match=message):
        make()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "no line of the rules fits an operation of the model, which has activation, batch_norm, convolution"),
        ({"matmul": r.Uniform()}, "no line of the rules fits"),
        (
            {"relu": r.ZPlus()},
            r"ZPlus.* cannot be given to 2/relu@0, which is of the group 'activation'; it is for convolution, linear",
        ),
        ({"conv2d": r.ZBox(low=(0.0, 0.0), high=1.0)}, "ZBox has 2 bounds, one for each channel, but its operand is .*3, 8, 8"),
        ({"conv2d": r.ZBox(low=torch.zeros(2, 1, 1), high=1.0)}, "which does not broadcast to its operand"),
        ({"2/gelu": r.Pass()}, "2/gelu.* fits nothing: nothing that depends on the input runs there"),
        ({"2": r.ZPlus()}, "at '2' fits nothing: there run 2/relu, which it is not for"),
        ({"2/relu@1": r.Pass()}, "fits nothing"),
        ({"activation": r.Pass(), "2": r.Pass()}, "at '2' fits nothing: there run 2/relu, .* which an earlier line has"),
        ({"9": r.Pass()}, "no module '9'"),
        ({"2:out": r.Pass(), "2:in": r.Pass()}, "rules are for operations, not for the value '2:in'"),
        ({"local_response_norm": r.FrozenScale(), "relu": r.Gradient()}, ""),
    ],
)
def test_tables_that_do_not_fit_the_model(rules, message):
    f, params = functionalize(network())
    if not message:
        assert with_rules(f, rules)(params, IMAGES).equal(f(params, IMAGES))
        return
    with pytest.raises((errors.RuleError, errors.SiteError), match=message):
        with_rules(f, rules)(params, IMAGES)


def test_a_site_that_never_runs():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    f, params = functionalize(Skips())
    with pytest.raises(errors.RuleError, match="at 'unused/linear' fits nothing: nothing that depends on the input runs there"):
        lrp(f, params, torch.ones(1, 3), rules={"unused/linear": r.Epsilon(), "linear": r.Epsilon()}, targets=0)


def test_an_operation_that_no_formula_is_for():
    f, params = functionalize(nn.LocalResponseNorm(2))
    with pytest.raises(errors.RuleError, match="FrozenScale does not know 'local_response_norm'"):
        with_rules(f, {"normalization": r.FrozenScale()})(params, torch.rand(1, 4, 3))

    class ThreeFactors(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return torch.einsum("bi,ij,jk->bk", x, self.a, self.b)

    f, params = functionalize(ThreeFactors())
    with pytest.raises(errors.RuleError, match="cannot be told apart; write it as two products"):
        with_rules(f, {"linear": r.ZPlus()})(params, torch.ones(1, 3))


class Mixed(nn.Module):
    """Reads its input twice: by a convolution, and by a skip."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 1)

    def forward(self, x):
        return (self.conv(x) + x).flatten(1)


def test_an_input_that_is_read_by_a_box_and_by_something_else():
    f, params = functionalize(Mixed())
    x = torch.rand(1, 2, 3)
    rules = {"convolution": r.ZBox(low=0.0, high=1.0)}
    with pytest.raises(
        errors.RuleError, match="input 0 is read by 'conv/conv1d', whose rule gives the relevance itself, and by '/add'"
    ):
        lrp(f, params, x, rules=rules, targets=0)
    assert with_rules(f, rules)(params, x).equal(f(params, x))


def test_two_inputs_one_of_them_by_a_box():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, image, other):
            return F.relu(self.a(image[:, :3].clone()) + self.b(other))

    f, params = functionalize(Two())
    inputs = {"other": torch.rand(5, 2), "image": torch.zeros(5, 3)}
    rules = {"a/linear": r.ZBox(low=-1.0, high=1.0), "linear": r.Epsilon(), "activation": r.Pass()}
    got = lrp(f, params, inputs, rules=rules, targets=lambda y: y.sum(1))
    alone = lrp(*functionalize(Two()), inputs, rules={"linear": r.Epsilon()}, targets=lambda y: y.sum(1))
    assert got["image"].any() and not alone["image"].any() and set(got) == {"image", "other"}


def test_a_report_names_the_input_that_a_whole_module_reads():
    class Swish(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    f, params = functionalize(nn.Sequential(nn.Linear(2, 2), Swish()))
    assert [line.site for line in r.explain(f, params, torch.ones(1, 2), r.attn_lrp())] == ["0/linear", "1/module"]
    inner = r.explain(f, params, torch.ones(1, 2), {"product": r.FrozenGate()})
    assert [line.site for line in inner] == ["0/linear", "1/sigmoid", "1/mul"]


def test_tables_print():
    table = {"0/linear": r.ZPlus()} + r.relp_ah()
    assert repr(table).splitlines()[1] == "    * at 0/linear: ZPlus(alpha=1.0, beta=0.0, stabilizer=1e-06)"
    assert "first convolution: ZBox" in repr(r.epsilon_gamma_box(0.0, 1.0))
