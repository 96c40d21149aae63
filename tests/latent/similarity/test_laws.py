"""What all measures have in common."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.func import vmap

from tdhook.core import errors
from tdhook.latent.similarity.canonical import cca, pwcca, svcca
from tdhook.latent.similarity.cka import cka, rbf_cka
from tdhook.latent.similarity.neighbourhoods import information_imbalance, mutual_knn
from tdhook.latent.similarity.procrustes import procrustes, procrustes_distance
from tdhook.latent.similarity.rsa import rsa

from .draws import MEASURES, draw, related, rotation

CLOSE = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)
VARIANTS = (
    *MEASURES,
    partial(cka, debiased=True),
    partial(rbf_cka, debiased=True),
    partial(rsa, dissimilarity="euclidean", similarity="pearson"),
)
BEST = {procrustes_distance: 0.0, information_imbalance: 2 / 40}
each = pytest.mark.parametrize("measure", VARIANTS)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_same_is_as_alike_as_can_be(measure):
    x = related()["h.0"]
    torch.testing.assert_close(measure(x, x).item(), BEST.get(measure, 1.0), rtol=0, atol=1e-7)
    worse = measure(x, draw(40, 5, seed=5)).item()
    assert worse > 0.2 if measure in BEST else worse < 0.7


@pytest.mark.parametrize("measure", [*MEASURES, rsa])
def test_rotation_scale_and_shift_change_nothing(measure):
    x, y = list(related().values())[:2]
    if measure is rsa:
        measure = partial(rsa, dissimilarity="euclidean")
    if measure is mutual_knn:
        measure = partial(mutual_knn, metric="euclidean")
    moved = 3 * x @ rotation(5) - 7
    if measure is pwcca:  # whose weights look at the features
        moved = 3 * x - 7
    CLOSE(measure(moved, y), measure(x, y))
    CLOSE(measure(y, moved), measure(y, x))


@pytest.mark.parametrize("measure", [cca, partial(svcca, variance=1.0)])
def test_invertible_linear_maps_change_no_canonical_correlation(measure):
    x, y = list(related().values())[:2]
    CLOSE(measure(x @ draw(5, 5, seed=7), y @ draw(8, 8, seed=8)), measure(x, y))
    for other in (cka, procrustes, rsa):
        assert (other(x @ draw(5, 5, seed=7), y) - other(x, y)).abs() > 1e-3


@each
def test_symmetry(measure):
    x, y = list(related().values())[:2]
    if measure in (pwcca, information_imbalance):
        assert not torch.isclose(measure(x, y), measure(y, x))
    else:
        CLOSE(measure(x, y), measure(y, x))


@each
def test_leading_dimensions_and_vmap_are_the_loop(measure):
    x, y = draw(3, 2, 20, 5), draw(3, 2, 20, 4, seed=1)
    y = y + x[..., :4]
    loop = torch.stack([torch.stack([measure(a, b) for a, b in zip(*pair)]) for pair in zip(x, y)])
    CLOSE(measure(x, y), loop)
    CLOSE(vmap(measure)(x, y), loop)
    CLOSE(vmap(measure, in_dims=(0, None))(x, y[0]), measure(x, y[:1].expand_as(y)))


@each
def test_half_types_give_float32(measure):
    x, y = (z.bfloat16() for z in list(related().values())[:2])
    result = measure(x, y)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, measure(x.double(), y.double()).float(), rtol=1e-4, atol=1e-3)
    assert measure(x, y.double()).dtype == torch.float64


@each
def test_a_large_mean_costs_little_in_float32(measure):
    x, y = ((z + 3000).float() for z in list(related(60).values())[:2])
    if measure is rsa:  # of the deviations of each example
        x, y = x - 2990, y - 2990
    if measure is mutual_knn:
        measure = partial(mutual_knn, metric="euclidean")
    torch.testing.assert_close(measure(x, y).double(), measure(x.double(), y.double()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
@pytest.mark.parametrize("measure", MEASURES)
def test_tiny_and_huge_numbers(measure, factor):
    x, y = list(related().values())[:2]
    torch.testing.assert_close(measure((x * factor).float(), y.float()), measure(x, y).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("measure", [m for m in VARIANTS if m not in (information_imbalance, mutual_knn)])
@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_what_is_constant_has_no_similarity(measure, constant):
    x = draw(20, 5)
    for dtype in (torch.float32, torch.float64):
        same = torch.full((20, 3), constant, dtype=dtype)
        assert measure(x.to(dtype), same).isnan() and measure(same, x.to(dtype)).isnan()


@each
def test_gradients(measure):
    if measure in (information_imbalance, mutual_knn):
        pytest.skip("ranks have none")
    x, y = draw(12, 3).requires_grad_(), draw(12, 4, seed=1)
    if measure is rsa:
        measure = partial(rsa, similarity="pearson")  # ranks have none
    assert torch.autograd.gradcheck(lambda z: measure(z, y), (x,))


@pytest.mark.compile
@pytest.mark.parametrize("measure", [svcca, procrustes, rsa, information_imbalance, mutual_knn])  # both CKAs: see compare
def test_compiled(measure):
    torch._dynamo.reset()
    x, y = list(related().values())[:2]
    CLOSE(torch.compile(measure, backend="aot_eager", fullgraph=True)(x, y), measure(x, y))


@pytest.mark.parametrize("measure", MEASURES)
def test_nothing_of_the_caller_changes(measure):
    x, y = (z.clone() for z in list(related().values())[:2])
    before, state = (x.clone(), y.clone()), torch.get_rng_state()
    measure(x, y)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (draw(20, 3), draw(19, 3), r"x is .*\[20, 3\].* and y .*\[19, 3\].*; give the same examples"),
        (draw(20, 3), draw(2, 20, 3), "give the same examples"),
        (draw(20, 3).long(), draw(20, 3), r"x is a int64 tensor of shape \[20, 3\]; give a floating-point"),
        (draw(20, 3), draw(20), r"y is .*\[20\]; give"),
        (draw(20, 3), [[1.0]], "y is .*; give a floating-point tensor"),
        (draw(20, 0), draw(20, 3), "x is"),
        (draw(1, 3), draw(1, 3), "at least [23] examples"),
        (draw(20, 3), draw(20, 3).index_fill(0, torch.tensor([3]), math.nan), "y has values that are NaN or infinite"),
        (draw(20, 3) / 0, draw(20, 3), "x has values that are NaN or infinite"),
    ],
)
def test_wrong_data_raise(measure, x, y, message):
    with pytest.raises(errors.InputError, match=message):
        measure(x, y)


@each
def test_what_is_not_a_number_gives_none_under_vmap(measure):
    x, y = draw(3, 20, 5), draw(3, 20, 4, seed=1)
    expected = measure(x, y)
    bad = x.clone()
    bad[1, 2, 3] = math.nan
    CLOSE(vmap(measure)(bad, y)[[0, 2]], expected[[0, 2]])
    assert vmap(measure)(bad, y)[1].isnan() and vmap(measure)(y, bad)[1].isnan()
