"""Concept vectors against means, least squares and scikit-learn."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.func import vmap

from tdhook.core.errors import InputError
from tdhook.latent.concepts import cav, pattern_cav
from tdhook.latent.probes.logistic import logistic

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def mean_difference(x: Tensor, y: Tensor) -> Tensor:
    return x[:, y == 1].mean(1) - x[:, y == 0].mean(1)


def test_a_vector_is_the_unit_direction_of_the_fit_and_points_to_the_concept():
    concept, random = torch.randn(9, 4).double() + 2, torch.randn(12, 4).double()
    got = cav(concept, random, fit=mean_difference, held_out=None)
    difference = concept.mean(0) - random.mean(0)
    CLOSE(got.direction, difference / difference.norm())
    assert got.accuracy.isnan()


def test_every_third_example_is_held_out_for_the_accuracy():
    concept = torch.tensor([[-3.0], [1.0], [1.0], [5.0], [1.0], [1.0]])  # 0 and 3 are held out; one is on the wrong side
    random = torch.tensor([[-9.0], [-1.0], [-1.0], [-9.0], [-1.0], [-1.0], [-9.0]])
    got = cav(concept, random, fit=mean_difference)
    assert got.direction.item() == 1
    assert got.accuracy.item() == 0.75  # (1/2 + 3/3) / 2


def test_the_threshold_is_half_way_between_the_fitted_means():
    concept, random = torch.tensor([[6.0], [10.0], [10.0]]), torch.tensor([[4.0], [0.0], [0.0]])
    assert cav(concept, random, fit=mean_difference).accuracy.item() == 1
    assert cav(concept - 2, random + 2, fit=mean_difference).accuracy.item() == 0
    assert cav(concept - torch.tensor([[2.0], [0], [0]]), random, fit=mean_difference).accuracy.item() == 0.5


def test_the_accuracy_of_noise_is_chance_whatever_the_sizes():
    concepts, randoms = list(torch.randn(20, 30, 6)), list(torch.randn(20, 300, 6))
    assert abs(cav(concepts, randoms, fit=mean_difference).accuracy.mean() - 0.5) < 0.02


def test_concepts_and_random_sets_are_the_loop_over_pairs():
    concepts, randoms = list(torch.randn(3, 8, 2, 5)), list(torch.randn(4, 10, 2, 5))
    got = cav(concepts, randoms, fit=mean_difference)
    assert got.direction.shape == (3, 4, 2, 5) and got.accuracy.shape == (3, 4)
    for k in range(3):
        for r in range(4):
            one = cav(concepts[k], randoms[r], fit=mean_difference)
            torch.testing.assert_close(got.direction[k, r], one.direction)
            assert got.accuracy[k, r] == one.accuracy


def test_one_concept_or_one_random_set_has_no_dimension():
    a, b = torch.randn(6, 5), torch.randn(6, 5)
    assert cav([a, b], b, fit=mean_difference).direction.shape == (2, 5)
    assert cav(a, (a, b, b), fit=mean_difference).direction.shape == (3, 5)
    assert cav([a], [b], fit=mean_difference).direction.shape == (1, 1, 5)


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_chunks_change_nothing(chunk_size):
    concepts, randoms = list(torch.randn(3, 8, 5)), list(torch.randn(2, 8, 5))
    whole, got = (cav(concepts, randoms, fit=mean_difference, chunk_size=c) for c in (None, chunk_size))
    torch.testing.assert_close(got.direction, whole.direction)
    assert torch.equal(got.accuracy, whole.accuracy)


def test_sets_of_unequal_sizes():
    concepts = [torch.randn(5, 3), torch.randn(7, 3)]
    got = cav(concepts, torch.randn(4, 3), fit=mean_difference)
    assert got.direction.shape == (2, 3)


def test_the_default_fit_is_the_logistic_probe():
    concept, random = torch.randn(40, 3).double() + torch.tensor([1.0, 0.5, 0]), torch.randn(40, 3).double()
    got = cav(concept, [random, random + 0.1])
    for i, negative in enumerate([random, random + 0.1]):
        x = torch.stack([torch.cat([concept[torch.arange(40) % 3 > 0], negative[torch.arange(40) % 3 > 0]])])
        y = (torch.arange(x.shape[1]) < x.shape[1] // 2).long()
        torch.testing.assert_close(got.direction[i], logistic(x, y).direction[0])
    assert (got.direction[:, 0] > 0).all() and (got.accuracy > 0.55).all()


def test_any_library_can_fit():
    def fit(x, y):
        rows = [LogisticRegression().fit(each.numpy(), y.numpy()).coef_[0] for each in x]
        return torch.from_numpy(np.stack(rows))

    concept, random = torch.randn(30, 3).double() + torch.tensor([5.0, 0, 0]), torch.randn(30, 3).double()
    got = cav([concept, concept + 1], random, fit=fit)
    assert (got.direction[:, 0] > 0.8).all() and torch.equal(got.accuracy, torch.ones(2).double())


# Patterns --------------------------------------------------------------------------------------------------------------


def test_the_pattern_of_binary_labels_is_the_difference_of_means():
    x, t = torch.randn(20, 3, 2).double(), torch.arange(20) % 3 == 0
    CLOSE(pattern_cav(x, t), x[t].mean(0) - x[~t].mean(0))
    CLOSE(pattern_cav(x, 2 * t.long() - 1), (x[t].mean(0) - x[~t].mean(0)) / 2)


def test_the_pattern_is_the_slope_of_a_regression_on_the_concept():
    x, t = torch.randn(20, 3).double(), torch.randn(20).double()
    slope = np.polyfit(t.numpy(), x.numpy(), 1)[0]
    CLOSE(pattern_cav(x, t), torch.from_numpy(slope))


def test_patterns_of_classes_are_each_class_against_the_others():
    x, labels = torch.randn(30, 4).double(), torch.arange(30) % 3
    got = pattern_cav(x, torch.nn.functional.one_hot(labels).T)
    CLOSE(got, torch.stack([x[labels == c].mean(0) - x[labels != c].mean(0) for c in range(3)]))


def test_a_pattern_ignores_a_distractor_that_a_filter_turns_against():
    """Haufe et al., figure 1: x = signal (1, 0) t + distractor (1, 1) d; the best filter is (1, -1)."""
    t, d = torch.randn(5000).double(), torch.randn(5000).double()
    x = torch.stack([t + d, d], 1)
    weight = torch.linalg.lstsq(x, t[:, None]).solution[:, 0]
    CLOSE(weight, torch.tensor([1.0, -1.0]).double())
    torch.testing.assert_close(pattern_cav(x, t), torch.tensor([1.0, 0.0]).double(), atol=0.05, rtol=0)


def test_patterns_under_vmap_over_sites():
    x, t = torch.randn(4, 10, 3), torch.arange(10) % 2
    torch.testing.assert_close(vmap(pattern_cav, (0, None))(x, t), torch.stack([pattern_cav(each, t) for each in x]))


def test_patterns_in_low_precision():
    x, t = torch.randn(10, 3).bfloat16(), torch.arange(10) % 2 == 0
    got = pattern_cav(x, t)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), x[t].float().mean(0) - x[~t].float().mean(0), atol=0.01, rtol=0.01)


# Bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("concepts", "randoms", "options", "message"),
    [
        (torch.randn(4), torch.randn(4, 3), {}, r"concepts is .*; give floating-point activations \[N, \*features\]"),
        (torch.ones(4, 3).long(), torch.randn(4, 3), {}, "concepts is .*give floating-point activations"),
        (torch.randn(4, 3), torch.randn(1, 3), {}, "randoms has 1 examples; give at least 2"),
        ([], torch.randn(4, 3), {}, "concepts is empty; give at least one set"),
        (torch.randn(4, 3), [torch.randn(4, 3), torch.randn(4, 2)], {}, "randoms has .*their features are the same"),
        (torch.full((4, 3), torch.nan), torch.randn(4, 3), {}, "concepts holds NaN or infinity"),
        (torch.randn(4, 3), torch.randn(4, 3), {"held_out": 1}, "held_out is an integer of at least 2 or None"),
        (torch.randn(4, 3), torch.randn(4, 3), {"chunk_size": 0}, "chunk_size is an integer of at least 1 or None"),
        (torch.randn(4, 3), torch.randn(4, 3), {"fit": lambda x, y: x[0, 0]}, "fit returned directions of shape"),
        (torch.randn(4, 3), torch.randn(4, 3), {"fit": lambda x, y: None}, "what fit returned is .*has one as .direction"),
        (torch.randn(4, 3), torch.randn(4, 3), {"fit": lambda x, y: 0 * x[:, 0]}, "what fit returned is zero"),
    ],
)
def test_bad_input_of_cav(concepts, randoms, options, message):
    with pytest.raises(InputError, match=message):
        cav(concepts, randoms, **{"fit": mean_difference, **options})


@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        (torch.randn(4, 3), torch.ones(4), "t does not vary"),
        (torch.randn(4, 3), torch.stack([torch.arange(4), torch.ones(4).long()]), "t does not vary"),
        (torch.randn(4, 3), torch.arange(3), r"t is .* for 4 examples in x; give a tensor \[N\]"),
        (torch.randn(4), torch.arange(4), "x is .*give floating-point activations"),
    ],
)
def test_bad_input_of_patterns(x, t, message):
    with pytest.raises(InputError, match=message):
        pattern_cav(x, t)
