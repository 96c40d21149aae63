"""Relevance of parameters: what flows along the weights is what their units get."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tdhook import functionalize
from tdhook.attribution import rules
from tdhook.attribution.lrp import lrp
from tdhook.attribution.parameter_relevance import parameter_relevance
from tdhook.core import errors
from tdhook.weights.pruning import prune

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of Dynamo, about itself
CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
TABLES = {
    "plain": {"*": rules.Gradient()},
    "epsilon": {"linear": rules.Epsilon(0.1), "convolution": rules.Epsilon(0.1)},
    "z plus": rules.excitation_backprop(),
    "alpha beta": {("linear", "convolution"): rules.AlphaBeta(2.0, 1.0)},
    "gamma": {("linear", "convolution"): rules.Gamma(0.5)},
}


def cnn():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Tanh()]
    return functionalize(nn.Sequential(*layers, nn.Flatten(-3), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 3)).double().eval())


def image(batch=2):
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", TABLES)
def test_what_leaves_a_unit_is_its_relevance(name):
    f, params = cnn()
    got = parameter_relevance(f, params, image(), rules=TABLES[name], targets=[0, 2])
    units = lrp(f, params, image(), rules=TABLES[name], targets=[0, 2], at=["2", "6", "8"])
    CLOSE(got["9", "weight"].sum(1), units["8"].sum(1))
    CLOSE(got["7", "weight"].sum(1), units["6"].sum(1))
    CLOSE(got["3", "weight"].sum((1, 3, 4)), units["2"].sum((1, 3, 4)))


@pytest.mark.parametrize("name", ["plain", "z plus", "alpha beta"])
def test_what_enters_a_unit_is_its_relevance(name):
    """With one output there is only one sign of it to part, so beta has nothing where all is positive."""
    f, params = cnn()
    table = rules.Rules.of(TABLES[name])
    got = parameter_relevance(f, params, image(), rules=table, targets=[0, 2])
    units = lrp(f, params, image(), rules=table, targets=[0, 2], at=["7"])["7"].sum(1)
    entering = got["7", "weight"].sum(2) + got["7", "bias"]
    torch.testing.assert_close(entering, units, rtol=1e-4, atol=1e-5)


def test_by_hand():
    f, params = functionalize(nn.Linear(2, 2).double())
    params["weight"], params["bias"] = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).double(), torch.tensor([1.0, 5.0]).double()
    got = parameter_relevance(f, params, torch.tensor([[1.0, 2.0]]).double(), rules={"linear": rules.Epsilon(0.0)}, targets=0)
    assert got["weight"].tolist() == [[3, 2], [0, 0]] and got["bias"].tolist() == [1, 0]


def test_examples_are_summed_and_shares_are_shares():
    f, params = cnn()
    run = partial(parameter_relevance, f, params, rules=TABLES["z plus"], targets=1)
    each = [run(x[None]) for x in image(3)]
    CLOSE(run(image(3))["3", "weight"], sum(e["3", "weight"] for e in each))
    shares = sum(e["3", "weight"] / f(params, x[None])[:, 1] for e, x in zip(each, image(3)))
    CLOSE(run(image(3), start="one")["3", "weight"], shares)


def test_structure_targets_and_chunks():
    f, params = cnn()
    run = partial(parameter_relevance, f, params, image(), rules=TABLES["z plus"])
    got = run(targets=[0, 2])
    names = {".".join(key) for key in got.keys(True, True)}
    assert names == {f"{i}.{kind}" for i in (0, 3, 4, 7, 9) for kind in ("weight", "bias")}
    assert got.batch_size == (2,) and got["3", "weight"].shape == (2, *params["3", "weight"].shape)
    one = run(targets=[0, 2], chunk_size=1)
    for i, target in enumerate((0, 2)):
        CLOSE(run(targets=target)["3", "weight"], got["3", "weight"][i])
        CLOSE(one["3", "weight"][i], got["3", "weight"][i])


def test_it_prunes():
    f, params = cnn()
    scores = parameter_relevance(f, params, image(), rules=TABLES["z plus"], targets=1).apply(torch.abs)
    pruned = prune(params, scores, 0.5, select="7.weight")
    kept = pruned.params["7", "weight"] != 0
    assert kept.sum() == 70 and scores["7", "weight"][kept].min() >= scores["7", "weight"][~kept].max()


@pytest.mark.compile
def test_compiled_equals_eager():
    torch._dynamo.reset()
    f, params = cnn()
    table = rules.excitation_backprop()
    run = lambda params, x: parameter_relevance(f, params, x, rules=table, targets=[0, 1])  # noqa: E731
    eager, compiled = run(params, image()), torch.compile(run, fullgraph=True, backend="aot_eager")(params, image())
    CLOSE(compiled["3", "weight"], eager["3", "weight"])


def test_first_layer_rules_have_no_weights():
    f, params = cnn()
    with pytest.raises(errors.RuleError, match="the rule at '0/conv2d' shares relevance without regard"):
        parameter_relevance(f, params, image(), rules=rules.epsilon_plus_flat(), targets=0)


def test_bad_input():
    f, params = cnn()
    with pytest.raises(errors.ParamsError, match="params is a TensorDict"):
        parameter_relevance(f, {}, image(), rules=TABLES["z plus"], targets=0)
    with pytest.raises(errors.InputError, match="start is 'x'"):
        parameter_relevance(f, params, image(), rules=TABLES["z plus"], targets=0, start="x")
