"""What all estimators have in common."""

from functools import partial

import pytest
import torch
from torch.func import vmap

from tdhook.core.errors import InputError
from tdhook.latent.dimension import ca_pca, levina_bickel, local_knn, local_pca, participation_ratio, two_nn, two_nn_ratios

from .manifolds import cube, rotation, sphere, swiss_roll

ESTIMATORS = {
    "two_nn": two_nn,
    "two_nn, likelihood": partial(two_nn, method="likelihood"),
    "levina_bickel": partial(levina_bickel, k=12),
    "levina_bickel, mean": partial(levina_bickel, k=12, average="mean"),
    "local_knn": local_knn,
    "local_knn, mean": partial(local_knn, average="mean"),
    "local_pca": local_pca,
    "local_pca, gap": partial(local_pca, criterion="gap"),
    "ca_pca": ca_pca,
    "participation_ratio": participation_ratio,
}
every = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
local_ones = [e for name, e in ESTIMATORS.items() if not name.startswith(("two_nn", "participation"))]
of_neighbours = pytest.mark.parametrize("estimator", [e for name, e in ESTIMATORS.items() if name != "participation_ratio"])


@every
@pytest.mark.parametrize("dimension", [1, 3])
def test_flat_cubes_in_many_dimensions(estimator, dimension):
    assert estimator(cube(1500, dimension, 60)).value == pytest.approx(dimension, rel=0.12)


@every
@pytest.mark.parametrize(("points", "dimension"), [(lambda: sphere(1500, 2, 3), 2), (lambda: swiss_roll(2000), 2)])
def test_curved_surfaces(estimator, points, dimension):
    expected = 3 if estimator is participation_ratio else dimension  # which is linear
    assert estimator(points()).value == pytest.approx(expected, rel=0.12)


@every
@pytest.mark.parametrize(
    "move", [lambda x: x @ rotation(6, x.dtype), lambda x: x * 1e-25, lambda x: x * 1e18, lambda x: x + 5, lambda x: -x]
)
def test_nothing_but_the_shape_of_the_cloud_counts(estimator, move):
    x = torch.randn(60, 6, dtype=torch.float64)
    one, other = estimator(x), estimator(move(x))
    torch.testing.assert_close(one.value, other.value)
    if one.local is not None:
        torch.testing.assert_close(one.local, other.local)


@every
def test_the_order_of_points_does_not_count(estimator):
    x, order = torch.randn(60, 5), torch.randperm(60)
    one, other = estimator(x), estimator(x[order])
    torch.testing.assert_close(one.value, other.value)
    if one.local is not None:
        torch.testing.assert_close(one.local[order], other.local)


@every
def test_leading_dimensions_and_vmap_are_loops(estimator):
    x = torch.randn(2, 3, 40, 5)
    x[1, 2, 30:35] = x[1, 2, :5]  # copies in one of the sets
    for found in (estimator(x), vmap(estimator)(x), vmap(vmap(estimator))(x)):
        assert found.value.shape == found.standard_error.shape == (2, 3)
        for i in range(2):
            for j in range(3):
                one = estimator(x[i, j])
                torch.testing.assert_close(found.value[i, j], one.value)
                if one.local is not None:
                    torch.testing.assert_close(found.local[i, j], one.local)


@of_neighbours
def test_chunks_change_nothing(estimator):
    x = torch.randn(2, 50, 5)
    for chunk_size in (1, 13, 10**6):
        assert torch.equal(estimator(x, chunk_size=chunk_size).value, estimator(x).value)


@of_neighbours
def test_copies_count_once(estimator):
    x = torch.randn(50, 4)
    once, often = estimator(x), estimator(torch.cat([x, x[10:30], x[10:15]]))
    torch.testing.assert_close(often.value, once.value)
    torch.testing.assert_close(often.standard_error, once.standard_error, equal_nan=True)
    if once.local is not None:
        torch.testing.assert_close(often.local, torch.cat([once.local, once.local[10:30], once.local[10:15]]))


@every
def test_points_that_are_all_the_same_have_no_dimension(estimator):
    """Such as a dead channel, which does not keep the others from theirs."""
    x = torch.stack([torch.randn(40, 3), torch.full((40, 3), 0.1), torch.zeros(40, 3)])
    assert estimator(x).value.isnan().tolist() == [False, True, True]
    assert vmap(estimator)(x).value.isnan().tolist() == [False, True, True]


@every
def test_sites(estimator):
    sites = {"h.0": torch.randn(40, 3), "h.1": torch.randn(2, 50, 4)}
    found = estimator(sites)
    assert set(found.keys()) == set(sites)
    for site, x in sites.items():
        assert torch.equal(found[site].value, estimator(x).value)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types(estimator, dtype):
    x = torch.randn(64, 4).to(dtype)
    found = estimator(x)
    assert found.value.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.value.float(), estimator(x.float()).value)


@pytest.mark.compile
def test_compiled():
    estimators = [two_nn, partial(ca_pca, k=5), participation_ratio]

    def every_dimension(x):
        return [estimator(x).value for estimator in estimators]

    x = torch.randn(2, 30, 4)
    torch.testing.assert_close(torch.compile(every_dimension, backend="aot_eager", fullgraph=True)(x), every_dimension(x))


@every
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[1.0], [torch.nan]]).repeat(30, 1), "NaN or infinite"),
        (torch.zeros(50, 3, dtype=torch.long), "floating-point"),
        (torch.randn(50), "N, D"),
        (torch.randn(1, 3), "at least"),
        (None, "floating-point"),
    ],
)
def test_bad_points(estimator, x, message):
    with pytest.raises(InputError, match=message):
        estimator(x)


@pytest.mark.parametrize(
    ("estimator", "needed"),
    [
        (two_nn, 3),
        (two_nn_ratios, 3),
        (partial(levina_bickel, k=5), 6),
        (partial(local_knn, k=5), 11),
        (partial(local_pca, k=5), 6),
        (partial(ca_pca, k=5), 7),
        (participation_ratio, 2),
    ],
)
def test_too_few_points(estimator, needed):
    estimator(torch.randn(needed, 3))
    with pytest.raises(InputError, match=f"{needed - 1} points, where .* needs at least {needed}"):
        estimator(torch.randn(needed - 1, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(two_nn, method="mle"), "method='mle' is unknown"),
        (partial(two_nn, discard=1.0), "discard is a share"),
        (partial(two_nn, discard=-0.1), "discard"),
        (partial(two_nn, chunk_size=0), "chunk_size"),
        (partial(levina_bickel, k=2), "k is an integer of at least 3"),
        (partial(levina_bickel, average="median"), "average='median' is unknown"),
        (partial(local_knn, k=0), "k is an integer"),
        (partial(local_knn, average="median"), "average='median' is unknown"),
        (partial(local_pca, k="auto"), "k is an integer"),
        (partial(local_pca, criterion="maxgap"), "criterion='maxgap' is unknown"),
        (partial(local_pca, alpha=1.0), "alpha is a share"),
        (partial(ca_pca, k=1), "k is an integer of at least 2"),
    ],
)
def test_bad_options(call, message):
    with pytest.raises(InputError, match=message):
        call(torch.randn(50, 3))


def test_distances_have_gradients_so_the_dimension_does():
    x = torch.randn(14, 2, dtype=torch.float64, requires_grad=True)
    for estimator in (two_nn, partial(two_nn, method="likelihood"), partial(levina_bickel, k=5), participation_ratio):
        assert torch.autograd.gradcheck(lambda points: estimator(points).value, x)  # noqa: B023
