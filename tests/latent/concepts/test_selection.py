"""Selection of units for a concept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import vmap

from tdhook import functionalize
from tdhook.attribution.saliency import saliency
from tdhook.core.errors import InputError
from tdhook.latent.concepts import select_units, through_units

LABELS = torch.tensor([1, 1, 0, 0])


def test_scores_are_differences_of_means_and_units_are_ranked():
    values = torch.tensor([[0.0, 3, 1, -5], [0, 5, 1, -7], [1, 0, -1, 0], [1, 0, -1, 0]])
    got = select_units(values, LABELS, count=3)
    assert got.scores.tolist() == [-1, 4, 2, -6]
    assert got.units.tolist() == [1, 2, 0]
    assert got.positive_mean.tolist() == [0, 4, 1, -6] and got.negative_mean.tolist() == [1, 0, -1, 0]
    assert select_units(values, LABELS, count=2, direction="negative").units.tolist() == [3, 0]
    assert select_units(values, LABELS, count=2, direction="both").units.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("pool", "function"),
    [
        ("mean", lambda x: x.mean((2, 3))),
        ("max", lambda x: x.amax((2, 3))),
        ("sum", lambda x: x.sum((2, 3))),
        ("absolute_sum", lambda x: x.sum((2, 3)).abs()),
    ],
)
def test_pools(pool, function):
    values = torch.randn(4, 5, 3, 2)
    pooled = function(values)
    torch.testing.assert_close(select_units(values, LABELS, pool=pool).scores, pooled[:2].mean(0) - pooled[2:].mean(0))


def test_the_absolute_sum_of_vectors_is_their_absolute_value():
    values = torch.tensor([[-3.0, 1], [-3, 1], [1, 1], [1, 1]])
    assert select_units(values, LABELS, pool="absolute_sum").scores.tolist() == [2, 0]


def test_the_effect_size_does_not_depend_on_the_scale_of_a_unit():
    values = torch.randn(20, 3).double() + torch.arange(20).double()[:, None] % 2
    labels = torch.arange(20) % 2 == 1
    got = select_units(values * torch.tensor([1, 10, 0.01]), labels, score="effect_size").scores
    a, b = values[labels], values[~labels]
    spread = ((a.var(0, correction=0) + b.var(0, correction=0)) / 2).sqrt()
    torch.testing.assert_close(got, (a.mean(0) - b.mean(0)) / spread)


def test_the_effect_size_of_units_that_do_not_vary():
    values = torch.tensor([[1.0, 2, 0.5], [1, 2, 0.7], [1, 0, 0.1], [1, 0, 0.2]])
    scores = select_units(values, LABELS, score="effect_size").scores
    assert scores[:2].tolist() == [0, torch.inf] and scores[2].isfinite()


def test_units_of_tokens():
    values = torch.randn(4, 7, 3)
    torch.testing.assert_close(select_units(values, LABELS, axis=-1).scores, select_units(values.mT, LABELS).scores)


def test_several_concepts_and_vmap_are_the_loop():
    values, labels = torch.randn(6, 4, 3), torch.tensor([[1, 0, 0, 1, 0, 1], [0, 0, 1, 1, 1, 1]])
    together = select_units(values, labels, count=2)
    mapped = vmap(lambda each: select_units(values, each, count=2))(labels)
    for i, each in enumerate(labels):
        alone = select_units(values, each, count=2)
        torch.testing.assert_close(together.scores[i], alone.scores)
        assert torch.equal(together.units[i], alone.units)
        assert torch.equal(mapped.units[i], alone.units)


def test_the_example_of_tdhook_0_2():
    """Its frozen numbers: relevance of `linear1` without rules selects channel 8; the conditioned gradient of row 0."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear1, self.linear2, self.linear3 = nn.Linear(10, 20), nn.Linear(20, 20), nn.Linear(20, 5)

        def forward(self, x):
            return self.linear3(torch.relu(self.linear2(torch.relu(self.linear1(x)))))

    torch.manual_seed(42)
    f, params = functionalize(Model())
    torch.manual_seed(0)
    x = torch.randn(4, 10)

    def total(output):
        return output.sum(-1)

    relevance = saliency(f, params, x, targets=total, at="linear1", absolute=False)["linear1"]
    chosen = select_units(relevance, LABELS, pool="absolute_sum")
    assert chosen.units.tolist() == [8]
    got = saliency(through_units(f, "linear1", chosen.units), params, x, targets=total, absolute=False)
    row = [-0.026217487, -0.034608621, 0.026935985, -0.020520344, 0.030811844]
    row += [-0.012047096, 0.029041190, -0.039444517, -0.025619673, 0.015477733]
    torch.testing.assert_close(got[0], torch.tensor(row), rtol=1e-5, atol=1e-7)
    assert not got[2:].any()


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.ones(4), {}, "labels has one class only"),
        (torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]]), {}, "labels has one class only"),
        (torch.tensor([0, 1, 2, 1]), {}, "labels is not binary"),
        (torch.tensor([0, 1]), {}, "labels is .* for 4 examples"),
        ([0, 1, 0, 1], {}, r"labels is .*; give a binary tensor \[N\]"),
        (LABELS, {"count": 6}, "count=6 is more than the 5 units"),
        (LABELS, {"count": 0}, "count is an integer of at least 1"),
        (LABELS, {"pool": "min"}, "pool='min' is unknown; choose from mean, max, sum, absolute_sum"),
        (LABELS, {"score": "t"}, "score='t' is unknown"),
        (LABELS, {"direction": "up"}, "direction='up' is unknown"),
        (LABELS, {"axis": 0}, "axis=0 is no axis of units"),
        (LABELS, {"axis": 3}, "axis=3 is no axis of units"),
    ],
)
def test_bad_input(labels, options, message):
    with pytest.raises(InputError, match=message):
        select_units(torch.randn(4, 5), labels, **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.randn(4), "values is .*give floating-point activations"),
        (torch.ones(4, 5).long(), "values is .*give floating-point activations"),
        (torch.full((4, 5), torch.inf), "values holds NaN or infinity"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(InputError, match=message):
        select_units(values, LABELS)
