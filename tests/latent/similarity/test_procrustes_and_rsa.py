"""Procrustes and RSA against scipy."""

from __future__ import annotations

from functools import partial

import pytest
import scipy.spatial
import scipy.stats
import torch

from tdhook.core import errors
from tdhook.latent.similarity.procrustes import procrustes, procrustes_distance
from tdhook.latent.similarity.rsa import dissimilarities, rsa

from .draws import draw, related, rotation

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


def test_the_disparity_of_scipy():
    x, y = related(30, (4, 4)).values()
    _, _, disparity = scipy.spatial.procrustes(x.numpy(), y.numpy())
    CLOSE(1 - procrustes(x, y).square(), torch.tensor(disparity))
    CLOSE(procrustes_distance(x, y), (2 - 2 * (1 - disparity) ** 0.5) ** 0.5 * torch.ones(()).double())


def test_the_distance_is_that_after_the_best_rotation():
    x, y = related(30, (4, 4)).values()
    x, y = (z - z.mean(0) for z in (x, y))
    x, y = x / x.norm(), y / y.norm()
    best, _ = scipy.linalg.orthogonal_procrustes(y.numpy(), x.numpy())
    CLOSE(procrustes_distance(x, y), (x - y @ torch.tensor(best)).norm())
    assert all(procrustes_distance(x, y) <= (x - y @ rotation(4) * sign).norm() for sign in (1, -1))


@pytest.mark.parametrize("widths", [(4, 9), (50, 4), (60, 50)])
def test_other_widths_are_filled_up_with_zeros(widths):
    x, y = related(20, widths).values()
    padded = [torch.nn.functional.pad(z, (0, max(widths) - z.shape[1])).numpy() for z in (x, y)]
    _, _, disparity = scipy.spatial.procrustes(*padded)
    CLOSE(1 - procrustes(x, y).square(), torch.tensor(disparity))


def test_the_distance_obeys_the_triangle():
    a, b, c = related(20, (4, 6, 5)).values()
    assert procrustes_distance(a, c) <= procrustes_distance(a, b) + procrustes_distance(b, c)


@pytest.mark.parametrize("dissimilarity", ["correlation", "cosine", "euclidean"])
def test_dissimilarities_are_those_of_scipy(dissimilarity):
    x = draw(3, 12, 5) + 1
    expected = [scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(z.numpy(), dissimilarity)) for z in x]
    CLOSE(dissimilarities(x, dissimilarity), torch.stack([torch.from_numpy(each) for each in expected]))


@pytest.mark.parametrize("dissimilarity", ["correlation", "cosine", "euclidean"])
@pytest.mark.parametrize("similarity", ["spearman", "pearson"])
def test_rsa_is_that_of_scipy(dissimilarity, similarity):
    x, y = related(15, (5, 7)).values()
    a, b = (scipy.spatial.distance.pdist(z.numpy(), dissimilarity) for z in (x, y))
    correlate = {"spearman": scipy.stats.spearmanr, "pearson": scipy.stats.pearsonr}[similarity]
    expected = torch.tensor(correlate(a, b).statistic)
    CLOSE(rsa(x, y, dissimilarity=dissimilarity, similarity=similarity), expected.double())


def test_a_similarity_of_your_own():
    x, y = related(15, (5, 7)).values()

    def kendall(a, b):
        return torch.tensor(scipy.stats.kendalltau(a.numpy(), b.numpy()).statistic)

    a, b = (scipy.spatial.distance.pdist(z.numpy(), "correlation") for z in (x, y))
    CLOSE(rsa(x, y, similarity=kendall), torch.tensor(scipy.stats.kendalltau(a, b).statistic))


def test_an_example_of_constant_features_has_no_correlation():
    x, y = draw(10, 4), draw(10, 4, seed=1)
    x[3] = 0.1
    assert rsa(x, y).isnan() and not rsa(x, y, dissimilarity="cosine").isnan()
    x[3] = 0
    assert rsa(x, y, dissimilarity="cosine").isnan() and not rsa(x, y, dissimilarity="euclidean").isnan()
    assert rsa(x[:, :1], y).isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dissimilarity": "manhattan"}, "dissimilarity is 'manhattan' .*; choose from 'correlation'"),
        ({"similarity": "kendall"}, "similarity is 'kendall' .*; choose 'spearman' or 'pearson', or give a function"),
    ],
)
def test_wrong_options_raise(options, message):
    with pytest.raises(errors.InputError, match=message):
        rsa(draw(9, 3), draw(9, 3), **options)


def test_rsa_needs_three_examples():
    with pytest.raises(errors.InputError, match="at least 3 examples"):
        rsa(draw(2, 3), draw(2, 3))
