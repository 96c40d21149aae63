"""Numbers against published formulas, written again with numpy and scikit-learn, and against hand calculations."""

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from tdhook.latent.dimension import ca_pca, levina_bickel, local_knn, local_pca, participation_ratio, two_nn, two_nn_ratios

from .manifolds import cube, sphere, torus


def neighbours(x, k):
    return NearestNeighbors(n_neighbors=k).fit(x).kneighbors()


@pytest.fixture(params=[2, 7])
def points(request):
    return torch.randn(80, request.param, dtype=torch.float64)


# Three gaps 1, 2, 4 on a line: the ratios of the points are 3, 2, 1.5 and 1.5.
LINE = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)


def test_two_nn_by_hand():
    small, middle, large = math.log(1.5), math.log(2), math.log(3)
    up = [-math.log(1 - i / 4) for i in (1, 2, 3)]
    across = [small, small, middle]
    expected = sum(a * u for a, u in zip(across, up)) / sum(a * a for a in across)
    assert two_nn(LINE, discard=0.0).value.item() == pytest.approx(expected)
    assert two_nn(LINE, discard=0.25).value.item() == pytest.approx(expected)
    halved = (small * up[0] + small * up[1]) / (2 * small**2)
    assert two_nn(LINE, discard=0.5).value.item() == pytest.approx(halved)
    line = two_nn_ratios(LINE)
    assert line.log_ratios.tolist() == pytest.approx([small, small, middle, large])
    assert line.log_survival.tolist() == pytest.approx([*up, math.nan], nan_ok=True)


def test_two_nn_likelihood_by_hand():
    logs = [math.log(1.5), math.log(1.5), math.log(2), math.log(3)]
    every = two_nn(LINE, method="likelihood", discard=0.0, unbiased=False)
    assert every.value.item() == pytest.approx(4 / sum(logs))
    unbiased = two_nn(LINE, method="likelihood", discard=0.0)
    assert unbiased.value.item() == pytest.approx(3 / sum(logs))
    assert unbiased.standard_error.item() == pytest.approx(3 / sum(logs) / math.sqrt(2))
    censored = two_nn(LINE, method="likelihood", discard=0.25)
    assert censored.value.item() == pytest.approx(2 / (sum(logs[:3]) + logs[2]))


def test_two_nn(points):
    distances, _ = neighbours(points, 2)
    ratios = np.sort(distances[:, 1] / distances[:, 0])
    used = int(len(ratios) * 0.9)
    across, up = np.log(ratios), -np.log(1 - np.arange(1, len(ratios)) / len(ratios))
    slope = np.linalg.lstsq(across[:used, None], up[:used], rcond=None)[0][0]
    assert two_nn(points).value.item() == pytest.approx(slope)
    slope = np.linalg.lstsq(across[:-1, None], up, rcond=None)[0][0]
    assert two_nn(points, discard=0.0).value.item() == pytest.approx(slope)


def test_ratios_follow_the_law_of_the_dimension_without_bias():
    """On tori, which have no border. The unbiased likelihood is at d for small samples, too, discarded ratios or not."""
    for discard in (0.0, 0.3):
        values = two_nn(torch.stack([torus(60, 2) for _ in range(300)]), method="likelihood", discard=discard)
        assert values.value.mean() == pytest.approx(2, abs=0.1)
        assert 0.7 < values.standard_error.mean() / values.value.std() < 1.05


@pytest.mark.parametrize("unbiased", [True, False])
def test_levina_bickel(points, unbiased):
    distances, _ = neighbours(points, 10)
    logs = np.log(distances[:, -1:] / distances[:, :-1]).sum(1)
    local = (8 if unbiased else 9) / logs
    found = levina_bickel(points, k=10, unbiased=unbiased, average="mean")
    np.testing.assert_allclose(found.local, local)
    assert found.value.item() == pytest.approx(local.mean())
    pooled = levina_bickel(points, k=10, unbiased=unbiased)
    assert pooled.value.item() == pytest.approx(1 / np.mean(logs / 9))


def test_local_knn(points):
    distances, _ = neighbours(points, 10)
    doublings = np.log2(distances[:, 9] / distances[:, 4])
    found = local_knn(points, k=5, average="mean")
    np.testing.assert_allclose(found.local, 1 / doublings)
    assert found.value.item() == pytest.approx(np.minimum(1 / doublings, points.shape[1]).mean())
    assert local_knn(points, k=5).value.item() == pytest.approx(1 / doublings.mean())


def test_local_knn_is_low_by_what_its_docstring_says():
    values = local_knn(torch.stack([torus(1000, 2) for _ in range(4)]), k=5).value
    assert values.mean() == pytest.approx(2 * math.log(2) / (digamma(10) - digamma(5)), rel=0.03)
    assert math.log(2) / (digamma(10) - digamma(5)) == pytest.approx(1 / (1 + 1 / (4 * 5 * math.log(2))), rel=0.005)


@pytest.mark.parametrize("k", [4, 12])
def test_local_pca(points, k):
    _, indices = neighbours(points, k)
    spectra = [PCA().fit(points[[i, *row]]).explained_variance_ for i, row in enumerate(indices)]
    expected = [max(1, int((s > 0.2 * s[0]).sum())) for s in spectra]
    assert local_pca(points, k=k, alpha=0.2).local.tolist() == expected
    bounded = [s[: min(k, points.shape[1])] for s in spectra]
    expected = [int(np.argmax(s[:-1] / s[1:])) + 1 for s in bounded]
    found = local_pca(points, k=k, criterion="gap")
    assert found.local.tolist() == expected
    assert found.value.item() == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("k", [4, 12])
def test_ca_pca(points, k):
    distances, indices = neighbours(points, k + 1)
    expected = []
    for row, far in zip(indices, distances):
        values = PCA().fit(points[row[:k]]).explained_variance_ / far[-2:].mean() ** 2
        scores = []
        for d in range(1, min(k - 1, points.shape[1]) + 1):
            tail = values[d:].sum()
            curved = values[:d] + (3 * d + 4) / (d * (d + 4)) * tail
            scores.append(np.linalg.norm(1 / (d + 2) - curved) + 2 * tail)
        expected.append(int(np.argmin(scores)) + 1)
    assert ca_pca(points, k=k).local.tolist() == expected


def test_participation_ratio(points):
    points = points * torch.arange(1, points.shape[1] + 1)
    values = np.linalg.eigvalsh(np.cov(points.T.numpy()))
    assert participation_ratio(points).value.item() == pytest.approx(values.sum() ** 2 / (values**2).sum())
    few = points[:5]
    values = np.linalg.eigvalsh(np.cov(few.T.numpy()))
    assert participation_ratio(few).value.item() == pytest.approx(values.sum() ** 2 / (values**2).sum())


def test_the_gap_is_not_where_the_neighbours_end():
    """k + 1 points have k eigenvalues, and then none: that gap made local PCA return k whenever k was below D."""
    noisy = cube(500, 3, 50) + 0.001 * torch.randn(500, 50)
    for k in (10, 22):
        found = local_pca(noisy, k=k, criterion="gap")
        assert found.local.max() < k and found.value == pytest.approx(3, abs=0.1)
    flat = local_pca(cube(500, 3, 50), k=10, criterion="gap")
    assert (flat.local == 3).all()


def test_dimensions_are_bounded_by_neighbours_and_features():
    """Noise in many features, where the eigenvalues of few neighbours once made the dimension that of the space."""
    noise = torch.randn(200, 300)
    for k in (5, 15):
        assert ca_pca(noise, k=k).local.max() <= k - 1
        assert local_pca(noise, k=k, alpha=0.0).local.max() <= k
    assert ca_pca(torch.randn(200, 3), k=15).local.max() <= 3
    assert local_pca(torch.randn(200, 3), k=15, alpha=0.0).local.max() <= 3
    assert participation_ratio(noise[:20]).value <= 19


def test_ca_pca_sees_a_surface_where_it_bends():
    """So strongly that a third eigenvalue passes for a direction."""
    few = sphere(150, 2, 10)
    assert local_pca(few, k=20).value > 2.3
    assert ca_pca(few, k=20).value == pytest.approx(2, abs=0.1)


def test_points_on_a_lattice_have_neighbours_at_the_same_distance():
    lattice = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0))
    assert two_nn(lattice, method="likelihood").value.isinf()
    found = local_knn(lattice, k=1, average="mean")
    assert found.local.isinf().any() and found.value == 2
