"""Correlations against scipy."""

from __future__ import annotations

import math
from functools import partial

import pytest
import scipy.stats
import torch
from torch.func import vmap

from tdhook.core import errors
from tdhook.metrics import average_ranks, pearson, spearman

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("ties", [False, True])
def test_equal_scipy(ties):
    a, b = draw(3, 4, 30), draw(3, 4, 30, seed=1)
    if ties:
        a, b = a.round(), b.round(decimals=0)
    for ours, theirs in ((pearson, scipy.stats.pearsonr), (spearman, scipy.stats.spearmanr)):
        expected = [[theirs(x.numpy(), y.numpy()).statistic for x, y in zip(p, q)] for p, q in zip(a, b)]
        CLOSE(ours(a, b), torch.tensor(expected, dtype=torch.float64))
    CLOSE(average_ranks(a), torch.tensor(scipy.stats.rankdata(a.numpy(), axis=-1), dtype=torch.float64))


def test_ranks_of_zeros_of_either_sign_are_equal():
    assert average_ranks(torch.tensor([0.0, -0.0, 1.0, -1.0])).tolist() == [2.5, 2.5, 4.0, 1.0]


def test_invariance():
    a, b = draw(5, 20), draw(5, 20, seed=1)
    CLOSE(pearson(3 * a - 2, b * 1e-200), pearson(a, b))
    CLOSE(pearson(a, -b), -pearson(a, b))
    CLOSE(spearman(a.exp(), b**3), spearman(a, b))


def test_broadcasting_and_types():
    a, b = draw(1, 3, 7), draw(4, 1, 7, seed=1)
    CLOSE(spearman(a, b)[2, 1], spearman(a[0, 1], b[2, 0]))
    assert spearman(a.bfloat16(), b.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("correlate", [pearson, spearman])
def test_what_is_constant_or_not_a_number_has_no_correlation(correlate):
    b = draw(12, seed=1)
    bad = torch.stack([torch.zeros(12), torch.full((12,), 0.1), torch.cat([torch.tensor([math.nan]), torch.ones(11)])]).double()
    assert correlate(bad, b).isnan().all() and correlate(b, bad).isnan().all()
    assert correlate(bad.float(), b.float()).isnan().all()
    rounding = 1 + torch.finfo(torch.float64).eps * torch.arange(12).double()
    assert pearson(rounding.clamp(max=1 + 3e-16), b).isnan()


def test_under_vmap():
    a, b = draw(3, 7).round(), draw(3, 7, seed=1)
    CLOSE(vmap(spearman)(a, b), spearman(a, b))
    CLOSE(vmap(spearman, in_dims=(1, 0))(a.T, b), spearman(a, b))


@pytest.mark.compile
def test_compiled():
    a, b = draw(3, 7).round(), draw(3, 7, seed=1)
    CLOSE(torch.compile(spearman, backend="aot_eager", fullgraph=True)(a, b), spearman(a, b))


def test_other_lengths_are_refused():
    for correlate in (pearson, spearman):
        with pytest.raises(errors.InputError, match="the same last dimension"):
            correlate(draw(3, 7), draw(3, 1))
