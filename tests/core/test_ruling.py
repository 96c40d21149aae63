"""`with_rules`: what depends on the input, how it composes with the other transforms, and what is planned when."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vjp

import tdhook
from tdhook import capture, errors, freeze, functionalize, intervene, perturb, start_from, stop_at, with_rules
from tdhook.attribution import rules as r
from tdhook.attribution.lrp import lrp
from tdhook.core import planning

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
HALF, PLAIN = {"product": r.Uniform()}, r.Gradient()


class Function(nn.Module):
    def __init__(self, function, *parameters):
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.randn(4, 4).double())

    def forward(self, x):
        return self.function(self, x)


def rules_of(model, x, rules):
    f, params = functionalize(model)
    return {line.site: line.rule for line in r.explain(f, params, x, rules)}


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)).double()


# What depends on the input


@pytest.mark.parametrize(
    ("function", "halved"),
    [
        (lambda m, x: x * x.sigmoid(), True),
        (lambda m, x: x * m.table[:3], False),
        (lambda m, x: x * x.detach(), False),
        (lambda m, x: x * (x > 0), False),
        (lambda m, x: x * x.shape[0], False),
        (lambda m, x: x * torch.ones_like(x), False),
        (lambda m, x: x * x.argmax(1, keepdim=True).to(x), False),
        (lambda m, x: x * (m.table @ m.table)[:3], False),
        (lambda m, x: x * torch.stack([x[:, 0]] * 4, 1), True),
        (lambda m, x: torch.mul(x, other=x.exp()), True),
        (lambda m, x: x.clone().mul_(x.exp()), True),
        (lambda m, x: x.exp() / m.table.sum(), False),
    ],
)
def test_what_depends_on_the_input(function, halved):
    """Only a product of two factors that do is shared between them."""
    rules = rules_of(Function(function), X, {"product": r.Uniform(), "*": PLAIN})
    assert any(rule == "Uniform()" for rule in rules.values()) == halved


def test_parameters_do_not_depend_on_the_input_even_if_they_are_differentiated():
    model = Function(lambda m, x: x * m.table[:3])
    f, params = functionalize(model)
    g = with_rules(f, {"product": r.Uniform(), "*": PLAIN})
    CLOSE(grad(lambda p: g(p, X).sum())(params)["table"][:3], X)
    tracked = params.clone().apply(lambda t: t.requires_grad_())
    g(tracked, X).sum().backward()
    CLOSE(tracked["table"].grad[:3], X)


def test_a_stopped_value_no_longer_depends_on_the_input():
    model = Function(lambda m, x: x * x.sigmoid())
    assert rules_of(model, X, {"sigmoid": r.Stop(), "product": r.Uniform()})["/mul"] == "gradient"
    f, params = functionalize(model)
    for g in (freeze(with_rules(f, HALF | {"*": PLAIN}), "/sigmoid"), with_rules(freeze(f, "/sigmoid"), HALF | {"*": PLAIN})):
        CLOSE(grad(lambda x, g=g: g(params, x).sum())(X), X.sigmoid())


def test_what_is_cut_off_is_not_asked_for_a_rule():
    model = Function(lambda m, x: x / x.exp().sum(1, keepdim=True).sqrt().tanh())
    report = r.explain(*functionalize(model), X, {"tanh": r.Stop()}, strict=True)
    assert [line.site for line in report if not line.live] == ["/exp", "/sum", "/sqrt"]


def test_first_is_by_execution_not_by_registration():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.first(x))

    table = r.Rules((r.on("linear", r.Flat(), first=True), r.on("linear", r.Epsilon())))
    rules = rules_of(Reversed().double(), X, table)
    assert rules == {"first/linear": "Flat(stabilizer=1e-06)", "last/linear": "Epsilon(epsilon=1e-06)"}


def test_of_each_operation_the_first_line_that_fits_counts():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Linear(4, 2)).double()
    table = r.Rules(
        (
            r.on("2", r.Pass(), where=lambda o: o.name == "gelu"),
            r.on("**/linear", r.Epsilon(0.1), where=lambda o: o.x.shape[-1] == 4 and o.args[1].shape[0] == 2),
            r.on(("conv2d", "linear"), r.Epsilon(0.2), sites="0"),
            r.on("linear", r.ZPlus()),
        )
    )
    assert rules_of(model, X, table) == {
        "0/linear": "Epsilon(epsilon=0.2)",
        "1/relu": "gradient",
        "2.0/linear": "ZPlus(alpha=1.0, beta=0.0, stabilizer=1e-06)",
        "2.1/gelu": "Pass(stabilizer=1e-09)",
        "3/linear": "Epsilon(epsilon=0.1)",
    }


@pytest.mark.parametrize(
    ("key", "sites"),
    [
        ("1/linear", ["1/linear"]),
        ("0", ["0/linear@0", "0/linear@1"]),
        ("0/linear@1", ["0/linear@1"]),
        ("0/linear@*", ["0/linear@0", "0/linear@1"]),
        ("*/linear", ["0/linear@0", "0/linear@1", "1/linear"]),
        (lambda site: site == "1", ["1/linear"]),
        (re.compile("[12]"), ["1/linear"]),
    ],
)
def test_patterns_of_sites(key, sites):
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Linear(4, 4), shared).double()
    rules = rules_of(model, X, {key: r.ZPlus()})
    assert sorted(site for site, rule in rules.items() if rule.startswith("ZPlus")) == sites


# Composition


MODEL = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)).double()
TABLE = {"linear": r.ZPlus()}


def pulled(g, *extra):
    _, pull = vjp(lambda x: g(functionalize(MODEL)[1], x, *extra), X)
    return pull(torch.ones(3, 2).double())[0]


def test_of_nested_rules_the_outer_ones_come_first():
    f, params = functionalize(MODEL)
    inner, outer = {"linear": r.Epsilon(1.0)}, {"2/linear": r.ZPlus()}
    expected = pulled(with_rules(f, {**outer, **inner}))
    CLOSE(pulled(with_rules(with_rules(f, inner), outer)), expected)
    between = with_rules(intervene(with_rules(f, inner), {"1": lambda v: v + 0}), outer)
    assert torch.equal(between(params, X), f(params, X))
    assert with_rules(f, inner)(params, X).equal(f(params, X)) and "2 rules" in repr(with_rules(with_rules(f, inner), outer))


def test_reading_inside_and_outside():
    f, params = functionalize(MODEL)
    sites = ["0", "1/relu", "2:in", "4/linear"]
    plain = capture(f, sites)(params, X)[1]
    for g in (capture(with_rules(f, TABLE), sites), with_rules(capture(f, sites), TABLE)):
        output, values = g(params, X)
        assert output.equal(f(params, X)) and (values == plain).all()


def test_writing_inside_and_outside():
    f, params = functionalize(MODEL)
    write = {"2": lambda v: 2 * v, "1/relu": lambda v: v + 1}
    expected = intervene(f, write)(params, X)
    inside, outside = with_rules(intervene(f, write), TABLE), intervene(with_rules(f, TABLE), write)
    assert inside(params, X).equal(expected) and outside(params, X).equal(expected)
    CLOSE(pulled(inside), pulled(outside))


def test_a_written_value_may_be_negative_where_a_relu_was():
    """The symptom: the parts of negative operands were left out after a ReLU, also where something else was written."""
    f, params = functionalize(MODEL)
    write = {"1": lambda v: v - 2}
    for rule in (r.ZPlus(), r.Gamma(0.5)):
        CLOSE(
            pulled(intervene(with_rules(f, {"linear": rule}), write)), pulled(with_rules(intervene(f, write), {"linear": rule}))
        )
    assert with_rules(f, TABLE).plan(params, X).table["2", 1, "linear", 0].nonnegative


def test_deltas_and_heads_and_tails():
    f, params = functionalize(MODEL)
    delta = {"1": torch.zeros(3, 5).double()}
    for g in (perturb(with_rules(f, TABLE), "1"), with_rules(perturb(f, "1"), TABLE)):
        assert g(params, X, delta).equal(f(params, X))
        direct = lrp(f, params, X, rules=TABLE, targets=1, at="1")["1"]
        got = grad(lambda d, g=g: g(params, X, d)[:, 1].sum())(delta)["1"] * stop_at(f, "1")(params, X)
        CLOSE(got, direct)
    head = stop_at(with_rules(f, TABLE), "2")
    assert head(params, X).equal(stop_at(f, "2")(params, X))
    value = stop_at(f, "1")(params, X)
    for tail in (start_from(with_rules(f, TABLE), "1"), with_rules(start_from(f, "1"), TABLE)):
        assert tail(params, X, value).equal(f(params, X))


def test_two_models_and_threads_do_not_disturb_each_other():
    from concurrent.futures import ThreadPoolExecutor

    f, params = functionalize(MODEL)
    tables = [{"linear": r.Epsilon(0.1 * i + 0.1)} for i in range(4)]
    run = lambda table: lrp(f, params, X, rules=table, targets=1)  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(run, tables), map(run, tables)):
            assert got.equal(expected)


def test_nothing_of_the_caller_is_changed():
    x, before = X.clone(), [p.clone() for p in MODEL.parameters()]
    f, params = functionalize(MODEL)
    lrp(f, params, x, rules=r.epsilon_alpha2_beta1_flat(), targets=[0, 1])
    assert x.equal(X) and not x.requires_grad and all(map(torch.equal, MODEL.parameters(), before))
    assert all(p.grad is None for p in MODEL.parameters()) and not MODEL[0]._forward_hooks


def test_values_are_there_without_gradients_too():
    f, params = functionalize(MODEL)
    g = with_rules(f, r.epsilon_plus())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert g(params, X).equal(f(params, X))


# Plans


@pytest.fixture
def traced(monkeypatch):
    """How often a plan was made."""
    count = []
    make = planning._trace
    monkeypatch.setattr(planning, "_trace", lambda *args: count.append(1) or make(*args))
    return count


def test_a_plan_is_made_once_for_inputs_of_one_shape(traced):
    f, params = functionalize(MODEL)
    for x in (X, 2 * X, X.flip(0)):
        lrp(f, params, x, rules=TABLE, targets=1)
    assert len(traced) == 1
    with_rules(f, TABLE)(params, X[:2])
    assert len(traced) == 2
    with_rules(f, {"linear": r.Epsilon()})(params, X)
    assert len(traced) == 3
    with_rules(f, r.epsilon_plus())(params, X)
    with_rules(f, r.epsilon_plus())(params, X)
    assert len(traced) == 4


def test_control_flow_that_depends_on_values(traced):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x).relu() if x.sum() > 0 else self.layer(self.layer(x))

    model = Branch().double()
    f, params = functionalize(model)
    for x in (X.abs(), -X.abs(), X.abs()):
        got = lrp(f, params, x, rules={"linear": r.Epsilon(0.0)}, targets=1)
        CLOSE(got, x * grad(lambda x: model(x)[:, 1].sum())(x))
    assert len(traced) >= 3


# Derivatives of the relevance


SMOOTH = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Softplus(), nn.Linear(5, 2)).double()


@pytest.mark.parametrize(
    "rules",
    [
        {"linear": r.Epsilon(0.1)},
        {"linear": r.Gamma(0.3, 0.1)},
        {"linear": r.AlphaBeta(2.0, 1.0, 0.1), "activation": r.Identity()},
        {"0/linear": r.WSquare(0.1), "linear": r.ZPlus(stabilizer=0.1)},
        {"activation": r.BetaSmooth(1.0), "linear": r.Epsilon(0.1)},
        {"tanh": r.Identity(), "linear": r.Epsilon(0.1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("at", [None, "1"])
def test_relevance_is_differentiated_right(rules, at):
    f, params = functionalize(SMOOTH)

    def run(x):
        got = lrp(f, params, x, rules=rules, targets=[0, 1], at=at)
        return got if at is None else got[at]

    x = X[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(run, x)
    weights = torch.randn_like(run(X[:1]))
    nested = grad(lambda x: (run(x) * weights).sum())(X[:1])
    CLOSE(nested, torch.autograd.grad((run(x) * weights).sum(), x)[0])


def test_a_derivative_of_the_relevance_that_would_be_wrong_is_refused():
    g, params = with_rules(functionalize(SMOOTH)[0], {"linear": r.Gamma(0.3)}), functionalize(SMOOTH)[1]
    inner = lambda x: grad(lambda x: g(params, x).sum())(x).sum()  # noqa: E731
    with pytest.raises(errors.GradientError, match=r"rule at '0/linear' takes coefficients .* use tdhook.attribution.lrp"):
        grad(inner)(X)


def test_beta_smooth_has_the_second_derivative_of_a_softplus():
    f, params = functionalize(nn.ReLU())
    g = with_rules(f, {"relu": r.BetaSmooth(2.0)})
    second = grad(lambda x: grad(lambda x: g(params, x).sum())(x).sum())(X)
    CLOSE(second, grad(lambda x: grad(lambda x: F.softplus(x, beta=2.0).sum())(x).sum())(X))


def test_a_model_that_writes_in_place_and_into_slices():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            out = torch.zeros_like(x)
            out[:, :2] = self.layer(x)[:, :2]
            out[:, 2:] += x[:, 2:] * 3
            F.relu_(out)
            return out * 2

    model = Writes().double()
    f, params = functionalize(model)
    table = {"linear": r.Epsilon(0.0), "activation": r.Identity(), "*": r.Epsilon(0.0)}
    assert with_rules(f, table)(params, X).equal(model(X))
    got = lrp(f, params, X, rules=table, targets=1)
    CLOSE(got, X * grad(lambda x: model(x)[:, 1].sum())(X))
    assert with_rules(tdhook.capture(f, "/relu"), table)(params, X)[1]["/relu"].ge(0).all()


def test_a_graph_of_the_backward_pass_is_refused():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).double())
    g = with_rules(f, {"linear": r.Epsilon(0.1)})
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(g(params, x).sum(), x)
    with pytest.raises(errors.GradientError, match=r"create_graph=True .* use tdhook\.attribution\.lrp"):
        torch.autograd.grad(g(params, x).sum(), x, create_graph=True)
