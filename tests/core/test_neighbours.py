import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch.func import vmap

from tdhook.core import neighbours
from tdhook.core.errors import InputError
from tdhook.core.neighbours import nearest, ranks


def by_differences(x, own=None):
    """All distances in float64, a point infinitely far from itself."""
    x = x.double()
    distances = (x[:, None] - x).norm(dim=-1) if own is None else (own.double()[:, None] - x).norm(dim=-1)
    return distances.fill_diagonal_(torch.inf) if own is None else distances


def lattice(side, dimensions):
    return torch.stack(torch.meshgrid(*[torch.arange(float(side))] * dimensions, indexing="ij"), -1).reshape(-1, dimensions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300, 3), (200, 600), (60, 1)])
def test_neighbours_are_those_of_scikit_learn(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    distances, indices = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(x.double().numpy()).kneighbors()
    found = nearest(x, 5)
    np.testing.assert_array_equal(found.indices.numpy(), indices)
    # scikit-learn takes distances from products: near ones have lost half of the digits
    torch.testing.assert_close(found.distances.double(), torch.from_numpy(distances), rtol=1e-5, atol=1e-6)


def test_queries_have_themselves_as_neighbours():
    x = torch.randn(50, 4)
    found = nearest(x, 2, queries=x[10:13])
    assert found.indices[:, 0].tolist() == [10, 11, 12]
    assert found.distances[:, 0].tolist() == [0, 0, 0]
    everybody = nearest(x, 50, queries=torch.randn(3, 4))
    assert all(sorted(row) == list(range(50)) for row in everybody.indices.tolist())


def test_duplicates_are_at_exactly_zero():
    x = torch.randn(40, 300) * 7 + 100
    found = nearest(torch.cat([x, x]), 1)
    assert found.indices[:, 0].tolist() == [*range(40, 80), *range(40)]
    assert (found.distances == 0).all()


@pytest.mark.parametrize("k", [1, 4, 30])
def test_of_equal_distances_the_smallest_index_comes_first(k):
    x = torch.cat([lattice(5, 3), lattice(5, 3), torch.zeros(40, 3)])
    values, order = by_differences(x).sort(dim=-1, stable=True)
    for chunk_size in (None, 17):
        found = nearest(x, k, chunk_size=chunk_size)
        assert torch.equal(found.indices, order[:, :k])
        torch.testing.assert_close(found.distances.double(), values[:, :k], rtol=1e-6, atol=0)


def test_close_points_far_from_the_others_have_full_precision():
    """Two clusters: products in float32 cannot tell the distances within them from 0."""
    x = torch.cat([torch.randn(100, 20) * 1e-4 + 3, torch.randn(100, 20) * 1e-4 - 3]).double()
    exact = by_differences(x.float())
    products = (x.float() @ x.float().mT * -2 + x.float().square().sum(1)).fill_diagonal_(torch.inf)
    assert (products.argmin(1) != exact.argmin(1)).float().mean() > 0.5
    for points in (x.float(), x.float().double()):
        found = nearest(points, 3)
        assert torch.equal(found.indices, exact.topk(3, largest=False).indices)
        torch.testing.assert_close(found.distances.double(), exact.topk(3, largest=False).values, rtol=1e-5, atol=0)


def test_an_outlier_spoils_nothing():
    x = torch.randn(200, 10)
    x[7] = 1e4
    found = nearest(x, 3)
    assert torch.equal(found.indices, by_differences(x).topk(3, largest=False).indices)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_changes_distances_only(scale):
    x = torch.randn(60, 5)
    first, second = nearest(x, 4), nearest(x * scale, 4)
    assert torch.equal(first.indices, second.indices)
    torch.testing.assert_close(second.distances / scale, first.distances)


@pytest.mark.parametrize("chunk_size", [1, 7, 100, 10**6])
def test_chunks_change_nothing(chunk_size, monkeypatch):
    x, y = torch.randn(2, 45, 6), torch.randn(2, 45, 3)
    whole, indices = nearest(x, 5), nearest(y, 3).indices
    expected = ranks(x, indices)
    monkeypatch.setattr(neighbours, "BLOCK", 300)  # blocks of points, too, and the sets one by one
    found = nearest(x, 5, chunk_size=chunk_size)
    assert torch.equal(found.indices, whole.indices) and torch.equal(found.distances, whole.distances)
    assert torch.equal(ranks(x, indices, chunk_size=chunk_size), expected)


def test_no_more_than_a_block_of_distances_is_held():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else (out,):
                self.numel = max(self.numel, each.numel() if isinstance(each, torch.Tensor) else 0)
            return out

    x = torch.randn(6000, 2)
    with Largest() as seen:
        nearest(x, 2)
    assert seen.numel <= neighbours.BLOCK < 6000**2


def test_leading_dimensions_and_vmap_are_loops():
    x = torch.randn(3, 2, 30, 4)
    for found in (nearest(x, 3), vmap(vmap(lambda each: nearest(each, 3)))(x), vmap(lambda each: nearest(each, 3))(x)):
        for i in range(3):
            for j in range(2):
                one = nearest(x[i, j], 3)
                assert torch.equal(found.indices[i, j], one.indices) and torch.equal(found.distances[i, j], one.distances)


def test_rows_left_out_are_nobodys_neighbours():
    x = torch.randn(50, 4)
    leave_out = torch.arange(50) % 3 == 0
    exact = by_differences(x)
    exact[:, leave_out] = torch.inf
    found = nearest(x, 4, leave_out=leave_out)
    assert torch.equal(found.indices, exact.topk(4, largest=False).indices)
    few = nearest(x, 4, leave_out=torch.arange(50) > 1)
    assert few.distances.isinf().sum(1).tolist() == [3, 3] + [2] * 48


def test_distances_have_gradients():
    x = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda points: nearest(points, 3).distances, x)
    twice = torch.ones(4, 2, requires_grad=True)
    nearest(twice, 2).distances.sum().backward()
    assert torch.equal(twice.grad, torch.zeros(4, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_give_float32(dtype):
    x = torch.randn(40, 8).to(dtype)
    assert torch.equal(nearest(x, 2).distances, nearest(x.float(), 2).distances)


@pytest.mark.compile
def test_compiled():
    x, y = torch.randn(2, 30, 4), torch.randn(2, 30, 6)
    compiled = torch.compile(lambda a, b: (nearest(a, 3), ranks(b, nearest(a, 3).indices)), backend="aot_eager", fullgraph=True)
    found, places = compiled(x, y)
    assert torch.equal(found.indices, nearest(x, 3).indices) and torch.equal(found.distances, nearest(x, 3).distances)
    assert torch.equal(places, ranks(y, found.indices))


def test_ranks_are_places_in_the_order_of_distances():
    x = torch.randn(40, 5)
    indices = nearest(torch.randn(40, 3), 6).indices
    order = by_differences(x).argsort(-1).argsort(-1) + 1
    assert torch.equal(ranks(x, indices), order.gather(1, indices))
    assert torch.equal(vmap(ranks)(x[None], indices[None])[0], ranks(x, indices))


def test_ranks_of_a_space_in_itself_count_up():
    x = torch.randn(40, 300) + 50
    assert torch.equal(ranks(x, nearest(x, 39).indices), torch.arange(1, 40).expand(40, 39))


def test_points_at_the_same_distance_share_the_smallest_rank():
    x = torch.tensor([[0.0], [1.0], [-1.0], [2.0], [0.0], [0.0]])
    assert ranks(x, torch.tensor([[4, 5, 1, 2, 3]] * 1 + [[0, 2, 3, 4, 5]] * 5))[0].tolist() == [1, 1, 3, 3, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(4, 2, dtype=torch.long)}, "floating-point"),
        ({"x": torch.zeros(4)}, "N, D"),
        ({"x": [[1.0]]}, "N, D"),
        ({"x": torch.zeros(0, 3)}, "N, D"),
        ({"x": torch.tensor([[1.0], [torch.nan]])}, "NaN or infinite"),
        ({"x": torch.tensor([[1.0], [torch.inf]])}, "NaN or infinite"),
        ({"k": 0}, "k is an integer of at least 1"),
        ({"k": 9}, "k=9 neighbours of 9 points; k is at most 8"),
        ({"k": 10, "queries": torch.zeros(2, 3)}, "k is at most 9"),
        ({"queries": torch.zeros(2, 4)}, "differ in the number of rows only"),
        ({"queries": torch.full((2, 3), torch.nan)}, "queries has values"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"leave_out": torch.zeros(8, dtype=torch.bool)}, r"leave_out is .*booleans \[9\]"),
        ({"leave_out": torch.zeros(9)}, "leave_out"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        nearest(**{"x": torch.randn(9, 3), "k": 1, **arguments})


@pytest.mark.parametrize("indices", [torch.zeros(8, 1, dtype=torch.long), torch.zeros(9, 1), None])
def test_bad_indices(indices):
    with pytest.raises(InputError, match=r"indices is .*integers"):
        ranks(torch.randn(9, 3), indices)


def test_what_is_not_finite_is_nan_under_vmap():
    x = torch.randn(2, 9, 3)
    x[1, 4, 0] = torch.nan
    found = vmap(lambda each: nearest(each, 2))(x)
    assert found.distances[0].isfinite().all() and found.distances[1].isnan().all()
