"""Canonical correlations against scikit-learn, scipy and their definition."""

from __future__ import annotations

from functools import partial

import pytest
import scipy.linalg
import torch

from tdhook.core import errors
from tdhook.latent.similarity.canonical import canonical_correlations, cca, pwcca, svcca

from .draws import draw, related

CLOSE = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-9)


def centred(x):
    return x - x.mean(0)


def test_correlations_are_those_of_scikit_learn():
    from sklearn.cross_decomposition import CCA

    x, y = related(60, (3, 4)).values()
    first, second = CCA(3, max_iter=5000, tol=1e-12).fit_transform(x.numpy(), y.numpy())
    expected = [torch.corrcoef(torch.tensor([a, b]))[0, 1].item() for a, b in zip(first.T.tolist(), second.T.tolist())]
    torch.testing.assert_close(canonical_correlations(x, y), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


def test_correlations_are_cosines_of_the_angles_between_spaces():
    x, y = related(30, (5, 3)).values()
    angles = scipy.linalg.subspace_angles(centred(x).numpy(), centred(y).numpy())
    expected = torch.tensor(angles.copy()).cos().sort(descending=True).values
    CLOSE(canonical_correlations(x, y), expected)
    CLOSE(cca(x, y), expected.mean())


def test_regularization_is_its_definition():
    x, y = (centred(z) for z in related(30, (5, 3)).values())

    def root(z):
        covariance = z.T @ z / 30
        covariance = covariance + 0.2 * covariance.trace() / len(covariance) * torch.eye(len(covariance)).double()
        values, vectors = torch.linalg.eigh(covariance)
        return vectors @ torch.diag(values**-0.5) @ vectors.T

    expected = torch.linalg.svdvals(root(x) @ (x.T @ y / 30) @ root(y))
    CLOSE(canonical_correlations(x, y, regularization=0.2), expected)


def test_a_direction_that_is_there_twice_counts_once():
    x, y = related(30, (3, 4)).values()
    CLOSE(cca(torch.cat([x, x], 1), y), cca(x, y))
    CLOSE(pwcca(torch.cat([x, x], 1), y), pwcca(x, y))
    correlations = canonical_correlations(torch.cat([x, x], 1), y)
    CLOSE(correlations, torch.cat([canonical_correlations(x, y), torch.zeros(1).double()]))


def test_svcca_keeps_as_many_directions_as_the_variance_needs():
    scales = torch.tensor([10.0, 5.0, 1.0, 0.1]).double()
    basis = torch.linalg.qr(centred(draw(50, 4)))[0]
    x, y = basis * scales, draw(50, 3, seed=1)
    shares = scales.square() / scales.square().sum()  # 0.79, 0.198, 0.0079, 0.00008
    for kept in (1, 2, 3, 4):
        variance = min(1.0, (shares[:kept].sum() - 1e-6).item())
        CLOSE(svcca(x, y, variance=variance), torch.linalg.svdvals(basis[:, :kept].T @ whole(y, variance)).mean())


def whole(y, variance):
    left, singular, _ = torch.linalg.svd(centred(y), full_matrices=False)
    shares = singular.square().cumsum(0) / singular.square().sum()
    return left[:, : int((shares < variance - 1e-12).sum()) + 1]


def test_pwcca_is_its_definition():
    x, y = (centred(z) for z in related(30, (5, 3)).values())
    qx, qy = torch.linalg.qr(x)[0], torch.linalg.qr(y)[0]
    left, rho, _ = torch.linalg.svd(qx.T @ qy, full_matrices=False)
    weights = ((qx @ left).T @ x).abs().sum(1)
    CLOSE(pwcca(x, y), (weights * rho).sum() / weights.sum())


def test_more_features_than_examples_raise_where_all_would_be_one():
    for measure in (cca, pwcca, canonical_correlations):
        with pytest.raises(errors.InputError, match=r"y has 10 examples of 9 features: every canonical correlation"):
            measure(draw(10, 3), draw(10, 9))
        assert (measure(draw(10, 3), draw(10, 9), regularization=0.1) < 1).all()
    assert svcca(draw(10, 3), draw(10, 9, seed=1), variance=0.5) < 1


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (cca, {"regularization": -0.1}, "regularization is a number of at least 0"),
        (pwcca, {"regularization": None}, "regularization is a number"),
        (svcca, {"variance": 0.0}, "variance is a number above 0"),
        (svcca, {"variance": 1.5}, "variance is the share"),
    ],
)
def test_wrong_options_raise(measure, options, message):
    with pytest.raises(errors.InputError, match=message):
        measure(draw(9, 3), draw(9, 3), **options)
