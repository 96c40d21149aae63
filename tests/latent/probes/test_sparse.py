"""k-sparse probes: which coordinates they find, and what they do with them."""

import pytest
import torch
from sklearn.feature_selection import f_classif

from tdhook.core import errors
from tdhook.latent.probes.logistic import logistic
from tdhook.latent.probes.probe import decision
from tdhook.latent.probes.sparse import SCORES, sparse

from .data import activations, generator, labels, weights


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("classes", [2, 3])
def test_it_is_the_logistic_regression_of_its_coordinates(score, classes):
    x = activations(100, 12)
    y = labels(x, classes, tasks=2)
    probe = sparse(x, y, k=3, score=score, sample_weight=weights(100), class_weight="balanced")
    assert probe.selected.shape == (2, 3) and (probe.weight.abs().sum(1) > 0).sum(-1).tolist() == [3, 3]
    for task in range(2):
        kept = x[:, probe.selected[task]]
        alone = logistic(kept, y[task], sample_weight=weights(100), class_weight="balanced")
        assert torch.allclose(decision(probe[task], x), decision(alone, kept), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("score", SCORES)
def test_planted_neurons_are_found(score):
    x = torch.randn(300, 40, generator=generator(), dtype=torch.float64)
    y = torch.stack([(x[:, 5] + x[:, 30] > 0), (x[:, 11] > x[:, 2])]).long()
    assert sparse(x, y, k=2, score=score).selected.sort(-1).values.tolist() == [[5, 30], [2, 11]]


def test_the_f_score_ranks_as_scikit_learn():
    x = activations(100, 12)
    y = labels(x, 3)
    order = torch.from_numpy(f_classif(x.numpy(), y.numpy())[0]).argsort(descending=True)
    assert torch.equal(sparse(x, y, k=12, score="f").selected, order)


def test_all_coordinates_are_the_dense_probe():
    x = activations()
    y = labels(x)
    assert torch.allclose(sparse(x, y, k=6).weight, logistic(x, y).weight, rtol=1e-6)


def test_bad_options():
    x = activations()
    for options, message in (
        (dict(k=0), "k is an integer of at least 1"),
        (dict(k=7), "k=7 is more than the 6 coordinates of x"),
        (dict(k=2, score="entropy"), "score='entropy' is unknown; choose from mean_difference, f, logistic"),
    ):
        with pytest.raises(errors.InputError, match=message):
            sparse(x, labels(x), **options)
