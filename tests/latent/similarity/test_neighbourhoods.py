"""Information imbalance and shared neighbours against counting."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from tdhook.core import errors
from tdhook.latent.similarity.neighbourhoods import information_imbalance, mutual_knn

from .draws import draw, related

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def ordered(x):
    """Every other example, nearest first."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(-1)
    return distances.argsort(1)[:, 1:]


def by_counting(x, y, k):
    near, far = ordered(x)[:, :k].tolist(), ordered(y).tolist()
    ranks = [far[i].index(j) + 1 for i in range(len(x)) for j in near[i]]
    return torch.tensor(2 / len(x) * sum(ranks) / len(ranks), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_imbalance_by_counting(k):
    x, y = related(30, (4, 6)).values()
    CLOSE(information_imbalance(x, y, k=k), by_counting(x, y, k))
    CLOSE(information_imbalance(y, x, k=k), by_counting(y, x, k))


def test_imbalance_by_hand():
    x, y = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([[0.0], [5.0], [1.0], [7.0]])
    # nearest in x: 1, 0, 1, 2; their ranks in y: 2, 3, 2, 2
    CLOSE(information_imbalance(x, y), torch.tensor(2 / 4 * 9 / 4))


def test_bounds():
    x = draw(50, 3)
    CLOSE(information_imbalance(x, x), torch.tensor(2 / 50, dtype=torch.float64))
    CLOSE(information_imbalance(x, x, k=[1, 4]), torch.tensor([2 / 50, 5 / 50], dtype=torch.float64))
    CLOSE(information_imbalance(x, -x * 3 + 1), torch.tensor(2 / 50, dtype=torch.float64))
    independent = information_imbalance(draw(400, 3), draw(400, 3, seed=1))
    assert 0.9 < independent < 1.1


def test_more_information_predicts_less_and_not_the_reverse():
    x = draw(200, 3)
    assert information_imbalance(x, x[:, :2]) < information_imbalance(x[:, :2], x) - 0.1


def test_several_k_are_each_of_them():
    x, y = related(30, (4, 6)).values()
    expected = torch.stack([information_imbalance(x, y, k=k) for k in (5, 1, 12)])
    CLOSE(information_imbalance(x, y, k=(5, 1, 12)), expected)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_shared_neighbours_by_scikit_learn(metric):
    x, y = related(30, (4, 6)).values()
    found = [NearestNeighbors(n_neighbors=5, metric=metric).fit(z).kneighbors(return_distance=False) for z in (x, y)]
    shared = sum(len(set(a) & set(b)) for a, b in zip(*found))
    CLOSE(mutual_knn(x, y, k=5, metric=metric), torch.tensor(shared / 150, dtype=torch.float64))


def test_independent_data_share_as_many_as_chance_gives():
    x, y = draw(300, 4), draw(300, 4, seed=1)
    assert abs(mutual_knn(x, y, k=30) - 30 / 299) < 0.02
    CLOSE(mutual_knn(x[:31], y[:31], k=30), torch.ones(()).double())


@pytest.mark.parametrize("measure", [information_imbalance, partial(mutual_knn, k=4)])
def test_chunks_change_nothing(measure):
    x, y = related(31, (4, 6)).values()
    for chunk_size in (1, 7, 1000):
        CLOSE(measure(x, y, chunk_size=chunk_size), measure(x, y))


def test_cosine_is_of_rows_of_length_one():
    x, y = related(31, (4, 6)).values()
    lengths = draw(31, 1, seed=3).exp()
    CLOSE(information_imbalance(x * lengths, y, metric="cosine"), information_imbalance(x, y, metric="cosine"))
    assert information_imbalance(x * lengths, y) != information_imbalance(x, y)


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (information_imbalance, {"k": 0}, "k is an integer of at least 1"),
        (information_imbalance, {"k": 9}, "k=9 neighbours among the 9 examples of x; k is at most 8"),
        (information_imbalance, {"k": []}, "k is empty"),
        (information_imbalance, {"k": [1, 2.5]}, "k is an integer"),
        (information_imbalance, {"k": torch.tensor(2)}, "k is an integer"),
        (information_imbalance, {"metric": "l1"}, "metric is 'l1' .*; choose 'euclidean' or 'cosine'"),
        (information_imbalance, {"chunk_size": 0}, "chunk_size is an integer of at least 1"),
        (mutual_knn, {"k": 9}, "k=9 neighbours among the 9 examples of x"),
        (mutual_knn, {"k": 1.0}, "k is an integer"),
        (mutual_knn, {"metric": None}, "metric is None"),
        (mutual_knn, {"chunk_size": -1}, "chunk_size is an integer"),
    ],
)
def test_wrong_options_raise(measure, options, message):
    with pytest.raises(errors.InputError, match=message):
        measure(draw(9, 3), draw(9, 3), **options)


def test_rows_of_zeros_have_no_direction():
    y = draw(9, 3)
    y[2] = 0
    with pytest.raises(errors.InputError, match="y has rows of zeros, which have no direction"):
        mutual_knn(draw(9, 3), y, k=2)
