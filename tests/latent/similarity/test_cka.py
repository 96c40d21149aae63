"""CKA against its definition with explicit kernels."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tdhook.core import errors
from tdhook.latent.similarity import kernels
from tdhook.latent.similarity.cka import cka, rbf_cka

from .draws import draw, related

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def hsic_biased(k, ell):
    centre = torch.eye(len(k), dtype=k.dtype) - 1 / len(k)
    return torch.trace(centre @ k @ centre @ ell) / (len(k) - 1) ** 2


def hsic_unbiased(k, ell):
    """Equation 5 of Song et al. (2012)."""
    n = len(k)
    k, ell = k - torch.diag(k.diag()), ell - torch.diag(ell.diag())
    one = torch.ones(n, dtype=k.dtype)
    traces = torch.trace(k @ ell) + (one @ k @ one) * (one @ ell @ one) / ((n - 1) * (n - 2))
    return (traces - 2 / (n - 2) * one @ k @ ell @ one) / (n * (n - 3))


def by_definition(k, ell, debiased):
    hsic = hsic_unbiased if debiased else hsic_biased
    return hsic(k, ell) / (hsic(k, k) * hsic(ell, ell)).sqrt()


def gaussian(x, bandwidth):
    return torch.exp(-torch.cdist(x, x).square() / (2 * bandwidth**2))


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("widths", [(3, 5), (3, 50), (60, 50)])
def test_linear_is_its_definition_by_features_and_by_grams(widths, debiased):
    x, y = related(20, widths).values()
    CLOSE(cka(x, y, debiased=debiased), by_definition(x @ x.T, y @ y.T, debiased))


@pytest.mark.parametrize("debiased", [False, True])
def test_rbf_is_its_definition(debiased):
    x, y = related(21, (3, 30)).values()
    expected = by_definition(gaussian(x, 1.5), gaussian(y, 1.5), debiased)
    CLOSE(rbf_cka(x, y, bandwidth=1.5, debiased=debiased), expected)
    # 210 distances: the smaller of the two in the middle
    medians = [0.5 * torch.pdist(z).median() for z in (x, y)]
    expected = by_definition(gaussian(x, medians[0]), gaussian(y, medians[1]), debiased)
    CLOSE(rbf_cka(x, y, fraction=0.5, debiased=debiased), expected)


def test_by_hand():
    x, y = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.0, -2.0]])
    # X^T Y = (2, 0), X^T X = 2, Y^T Y = diag(2, 6)
    CLOSE(cka(x, y), torch.tensor(4 / (2 * 40**0.5)), rtol=1e-6, atol=0)


def test_a_wide_gaussian_kernel_is_linear():
    x, y = related(30, (4, 6)).values()
    torch.testing.assert_close(rbf_cka(x, y, bandwidth=1e3), cka(x, y), rtol=1e-4, atol=0)


def test_independent_wide_data_are_alike_until_debiased():
    x, y = draw(30, 2000), draw(30, 2000, seed=1)
    assert cka(x, y) > 0.95
    assert cka(x, y, debiased=True).abs() < 0.1 and rbf_cka(x, y, debiased=True).abs() < 0.1
    many = torch.stack([cka(draw(8, 40, seed=i), draw(8, 40, seed=1000 + i), debiased=True) for i in range(300)])
    assert many.mean().abs() < 4 * many.std() / 300**0.5


def test_debiased_in_float32_with_many_more_features_than_examples():
    x, y = draw(20, 20_000), draw(20, 20_000, seed=1)
    y = y + 0.3 * x
    expected = cka(x, y, debiased=True)
    torch.testing.assert_close(cka(x.float(), y.float(), debiased=True).double(), expected, rtol=0, atol=1e-3)


def test_points_that_are_all_as_far_from_each_other_have_no_debiased_similarity():
    assert cka(torch.eye(8), draw(8, 3).float(), debiased=True).isnan()


def test_strips_of_a_gram_matrix_change_nothing(monkeypatch):
    x, y = related(23, (60, 50)).values()
    expected = cka(x, y, debiased=True)
    monkeypatch.setattr(kernels, "STRIP", 200)  # four rows at a time
    CLOSE(cka(x, y, debiased=True), expected)


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (cka, {"debiased": 1}, "debiased is 1 .*; give True or False"),
        (rbf_cka, {"bandwidth": 0.0}, "bandwidth is a number above 0"),
        (rbf_cka, {"bandwidth": "median"}, "bandwidth is a number above 0"),
        (rbf_cka, {"fraction": -1.0}, "fraction is a number above 0"),
        (rbf_cka, {"bandwidth": 1.0, "fraction": 0.5}, "give one of them"),
    ],
)
def test_wrong_options_raise(measure, options, message):
    with pytest.raises(errors.InputError, match=message):
        measure(draw(9, 3), draw(9, 3), **options)


@pytest.mark.parametrize("measure", [cka, rbf_cka])
def test_debiased_needs_four_examples(measure):
    with pytest.raises(errors.InputError, match="at least 4 examples"):
        measure(draw(3, 3), draw(3, 3), debiased=True)
