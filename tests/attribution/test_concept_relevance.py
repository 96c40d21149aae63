"""Relevance through units: sums over units, agreement with masks written by hand, several sites."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tdhook import functionalize, with_rules
from tdhook.attribution import rules
from tdhook.attribution.concept_relevance import concept_relevance
from tdhook.attribution.lrp import lrp
from tdhook.core import errors

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of Dynamo, about itself
CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
PLUS = rules.epsilon_plus()


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(-3)]
    return nn.Sequential(*layers, nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 3)).double()


def cnn():
    return functionalize(network())


def image(batch=2):
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("table", [PLUS, rules.epsilon_plus_flat(), rules.epsilon_gamma_box(-3.0, 3.0)])
@pytest.mark.parametrize(("site", "axis", "count"), [("3", 1, 5), ("6", None, 7)])
def test_the_sum_over_units_is_the_relevance_without_a_condition(table, site, axis, count):
    f, params = cnn()
    by_unit = concept_relevance(f, params, image(), conditions={site: range(count)}, axis=axis, rules=table, targets=[0, 2])
    assert by_unit.shape == (count, 2, 2, 3, 8, 8)
    CLOSE(by_unit.sum(0), lrp(f, params, image(), rules=table, targets=[0, 2]))


def test_a_concept_is_what_a_gradient_through_its_units_gives():
    f, params = cnn()
    x = image().requires_grad_()
    head, tail = (functionalize(part) for part in (network()[:4], network()[4:]))
    hidden = with_rules(head[0], PLUS)(head[1], x)
    (above,) = torch.autograd.grad(with_rules(tail[0], PLUS)(tail[1], h := hidden.detach().requires_grad_())[:, 1].sum(), h)
    mask = torch.zeros(5).double()
    mask[[1, 4]] = 1
    (below,) = torch.autograd.grad(hidden, x, above * mask[:, None, None])
    got = concept_relevance(f, params, x.detach(), conditions={"3": [[1, 4]]}, axis=1, rules=PLUS, targets=1)
    CLOSE(got[0], below * x.detach())


def test_several_sites_are_passed_one_after_the_other():
    f, params = cnn()
    run = partial(concept_relevance, f, params, image(), rules=PLUS, targets=1, axis={"3": 1})
    pairs = [(i, j) for i in range(5) for j in range(7)]
    both = run(conditions={"3": [i for i, _ in pairs], "6": [j for _, j in pairs]}).unflatten(0, (5, 7))
    CLOSE(both.sum(1), concept_relevance(f, params, image(), rules=PLUS, targets=1, axis=1, conditions={"3": range(5)}))
    CLOSE(both.sum(0), concept_relevance(f, params, image(), rules=PLUS, targets=1, conditions={"6": range(7)}))


def test_every_way_to_say_units():
    f, params = cnn()
    run = partial(concept_relevance, f, params, image(), rules=PLUS, targets=1, axis=1)
    expected = run(conditions={"3": [[1, 2], [3]]})
    CLOSE(run(conditions={"3": torch.tensor([[1, 2], [3, 3]])}), expected)
    CLOSE(
        run(conditions={"3": torch.tensor([[False, True, True, False, False], [False, False, False, True, False]])}), expected
    )
    CLOSE(run(conditions={"3": [[1, 2], [-2]]}), expected)
    places = torch.zeros(1, 5, 2, 2, dtype=torch.bool)
    places[0, 1] = places[0, 2] = True
    CLOSE(run(conditions={"3": places}, axis=None), expected[:1])


def test_at_a_site_before():
    f, params = cnn()
    got = concept_relevance(f, params, image(), conditions={"3": range(5)}, axis=1, rules=PLUS, targets=1, at="1")
    assert got["1"].shape == (5, 2, 6, 8, 8)
    CLOSE(got["1"].sum(0), lrp(f, params, image(), rules=PLUS, targets=1, at="1")["1"])


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_chunks_change_nothing(chunk_size, batch):
    f, params = cnn()
    run = partial(concept_relevance, f, params, image(batch), conditions={"3": range(5)}, axis=1, rules=PLUS, targets=[0, 1])
    CLOSE(run(chunk_size=chunk_size), run())


@pytest.mark.compile
def test_compiled_equals_eager():
    torch._dynamo.reset()
    f, params = cnn()
    run = lambda params, x: concept_relevance(f, params, x, conditions={"3": [1, 4]}, axis=1, rules=PLUS, targets=[0, 1])  # noqa: E731
    CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(params, image()), run(params, image()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"conditions": {"3": [5]}}, errors.InputError, r"the units \[5\] are out of range for 5 units at '3'"),
        ({"conditions": {"3": [1.5]}}, errors.InputError, r"conditions\['3'\] is"),
        ({"conditions": {"3": 4}}, errors.InputError, "give K units or K sequences of units"),
        ({"conditions": {}}, errors.InputError, "give a mapping from sites"),
        ({"conditions": {"3": [1], "6": [1, 2]}}, errors.InputError, "conditions has 1, 2 concepts at its sites"),
        ({"conditions": {"3": torch.ones(1, 4, dtype=torch.bool)}}, errors.InputError, "are a mask of shape"),
        ({"conditions": {"3": [1]}, "axis": None}, errors.InputError, "give axis=1 for channels"),
        ({"conditions": {"3": [1]}, "axis": 4}, errors.InputError, "axis=4 is out of range at '3'"),
        ({"conditions": {"3": [1]}, "axis": {"2": 1}}, errors.InputError, "axis has '2', which is no site of conditions"),
        ({"conditions": {"*": [1]}}, errors.SiteError, "conditions takes exact sites"),
        ({"conditions": {"3": [1]}, "chunk_size": 0}, errors.InputError, "chunk_size"),
        ({"conditions": {"3": [1]}, "rules": None}, errors.RuleError, "rules is None"),
    ],
)
def test_bad_input(options, error, message):
    f, params = cnn()
    with pytest.raises(error, match=message):
        concept_relevance(f, params, image(), **{"targets": 0, "axis": 1, "rules": PLUS, **options})
