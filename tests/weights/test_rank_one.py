"""Rank-one edits against their closed form, and key statistics against a loop."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import vmap

from tdhook import functionalize
from tdhook.core import errors
from tdhook.weights.keys import KeyStatistics, key_at, key_covariance
from tdhook.weights.rank_one import rank_one_update

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def problem(out=3, size=5, keys=None, seed=0):
    torch.manual_seed(seed)
    samples = torch.randn(40, size).double()
    shape = (keys,) if keys else ()
    weight, key, value = torch.randn(out, size), torch.randn(*shape, size), torch.randn(*shape, out)
    return weight.double(), key.double(), value.double(), samples.mT @ samples / 40


def test_the_formula():
    weight, key, value, c = problem()
    u = torch.linalg.inv(c) @ key
    CLOSE(rank_one_update(weight, key, value, c), weight + torch.outer(value - weight @ key, u) / (key @ u))


@pytest.mark.parametrize("keys", [None, 1, 2, 5])
def test_keys_are_mapped_to_values(keys):
    weight, key, value, c = problem(keys=keys)
    new = rank_one_update(weight, key, value, c)
    CLOSE(key @ new.mT, value)
    assert torch.linalg.matrix_rank(new - weight) == min(keys or 1, 3)


@pytest.mark.parametrize("keys", [None, 2])
def test_no_other_such_weight_changes_the_outputs_less(keys):
    weight, key, value, c = problem(keys=keys)
    change = rank_one_update(weight, key, value, c) - weight
    least = torch.einsum("oi,ij,oj->", change, c, change)
    for seed in range(20):
        torch.manual_seed(seed)
        other = torch.randn_like(change) * 0.1
        rows = torch.atleast_2d(key)
        other = other - (other @ rows.mT) @ torch.linalg.pinv(rows.mT)  # keeps what the keys are mapped to
        assert torch.einsum("oi,ij,oj->", change + other, c, change + other) > least
    # and it is stationary: no first-order gain in any allowed direction
    assert torch.einsum("oi,ij,oj->", change, c, other).abs() < 1e-10


def test_layouts_and_biases():
    weight, key, value, c = problem()
    bias = torch.randn(3).double()
    new = rank_one_update(weight, key, value, c, bias=bias)
    CLOSE(new @ key + bias, value)
    CLOSE(rank_one_update(weight.mT.contiguous(), key, value, c, bias=bias, transposed=True), new.mT)


def test_the_value_it_has_already_changes_nothing():
    weight, key, _, c = problem()
    CLOSE(rank_one_update(weight, key, weight @ key, c), weight)


def test_dtypes():
    weight, key, value, c = problem()
    exact = rank_one_update(weight, key, value, c)
    single = rank_one_update(weight.float(), key.float(), value.float(), c)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, exact.float(), rtol=1e-5, atol=1e-5)
    assert rank_one_update(weight.bfloat16(), key.bfloat16(), value.bfloat16(), c).dtype == torch.bfloat16


def test_under_vmap_over_values_and_compiled():
    weight, key, value, c = problem()
    values = torch.stack([value, -value])
    both = vmap(lambda v: rank_one_update(weight, key, v, c))(values)
    CLOSE(both[1], rank_one_update(weight, key, -value, c))


@pytest.mark.compile
def test_compiled():
    arguments = problem()
    CLOSE(torch.compile(rank_one_update, backend="aot_eager", fullgraph=True)(*arguments), rank_one_update(*arguments))


def test_a_singular_covariance():
    weight, key, value, _ = problem(size=5)
    torch.manual_seed(0)
    few = torch.randn(3, 5).double()
    for c in (few.mT @ few, torch.zeros(5, 5).double(), -torch.eye(5).double()):
        with pytest.raises(errors.InputError, match="covariance is singular"):
            rank_one_update(weight, key, value, c)
    new = rank_one_update(weight, key, value, few.mT @ few, damping=1e-2)
    CLOSE(new @ key, value, rtol=1e-7)


def test_bad_input():
    weight, key, value, c = problem()
    with pytest.raises(errors.InputError, match="say transposed=True"):
        rank_one_update(weight.mT, key, value, c)
    with pytest.raises(errors.InputError, match="say transposed=True"):
        rank_one_update(weight, key, key, c)
    with pytest.raises(errors.InputError, match=r"covariance is .* for keys of 5 numbers"):
        rank_one_update(weight, key, value, c[:3, :3])
    with pytest.raises(errors.InputError, match="key is zero"):
        rank_one_update(weight, key * 0, value, c)
    with pytest.raises(errors.InputError, match="depend on each other"):
        rank_one_update(weight, torch.stack([key, 2 * key]), torch.stack([value, value]), c)
    with pytest.raises(errors.InputError, match="weight maps 5 numbers"):
        rank_one_update(weight, key, value, c, bias=torch.zeros(5))


# Statistics ------------------------------------------------------------------------------------------------------------


def block():
    torch.manual_seed(0)
    f, params = functionalize(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double())
    return f, params, [torch.randn(2, 7, 4).double(), torch.randn(1, 3, 4).double()]


def keys_of(params, x):
    return (x @ params["0", "weight"].mT + params["0", "bias"]).relu().flatten(0, -2)


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 1000])
def test_the_second_moment_of_all_tokens(chunk_size):
    f, params, batches = block()
    keys = torch.cat([keys_of(params, x) for x in batches])
    found = key_covariance(f, params, iter(batches), "2", chunk_size=chunk_size)
    CLOSE(found.second_moment, keys.mT @ keys / 17)
    assert found.count == 17


def test_statistics_of_parts_add_up():
    f, params, batches = block()
    first, second = (key_covariance(f, params, [x], "2") for x in batches)
    CLOSE((first + second).second_moment, key_covariance(f, params, batches, "2").second_moment)


def test_padding_is_left_out():
    f, params, (x, _) = block()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]])
    found = key_covariance(f, params, [x], "2", mask=lambda inputs: mask)
    keys = torch.cat([keys_of(params, x[0]), keys_of(params, x[1, :2])])
    CLOSE(found.second_moment, keys.mT @ keys / 9)
    with pytest.raises(errors.InputError, match="mask returned"):
        key_covariance(f, params, [x], "2", mask=lambda inputs: mask[0])


def test_the_sum_is_kept_in_double_precision():
    f, params, _ = block()
    f, params = functionalize(nn.Sequential(nn.Linear(1, 1, bias=False)))
    x = torch.full((100, 1), 1 / 3)
    found = key_covariance(f, params, [x] * 50, "0")
    assert found.total.dtype == torch.float64
    CLOSE(found.second_moment, x[:1].double().square())
    assert key_covariance(f, params, [x], "0", dtype=torch.float32).total.dtype == torch.float32


def test_the_mean_key_at_a_position():
    f, params, (long, short) = block()
    keys = keys_of(params, long).reshape(2, 7, 6)
    CLOSE(key_at(f, params, long, "2", 3), keys[:, 3].mean(0))
    CLOSE(key_at(f, params, long, "2", torch.tensor([1, -1])), (keys[0, 1] + keys[1, 6]) / 2)
    both = key_at(f, params, [long, short], "2", [3, -1])
    CLOSE(both, (keys[0, 3] + keys[1, 3] + keys_of(params, short)[-1]) / 3)
    CLOSE(key_at(f, params, long[:, 0], "2", None), keys[:, 0].mean(0))


@pytest.mark.compile
def test_statistics_compile():
    f, params, batches = block()

    def second_moment(params, batches):
        return key_covariance(f, params, batches, "2").second_moment

    compiled = torch.compile(second_moment, backend="aot_eager", fullgraph=True)(params, batches)
    CLOSE(compiled, second_moment(params, batches))


def test_bad_sites_and_positions():
    f, params, (x, _) = block()
    for site in ("2:in", "*", "2/linear"):
        with pytest.raises(errors.SiteError):
            key_covariance(f, params, [x], site)
    with pytest.raises(errors.SiteError, match="unknown site '7'"):
        key_covariance(f, params, [x], "7")
    with pytest.raises(errors.InputError, match="batches is a float64 tensor"):
        key_covariance(f, params, x, "2")
    with pytest.raises(errors.InputError, match="batches is empty"):
        key_covariance(f, params, [], "2")
    with pytest.raises(errors.InputError, match="position=7 is out of range"):
        key_at(f, params, x, "2", 7)
    with pytest.raises(errors.InputError, match="position is None for values of shape"):
        key_at(f, params, x, "2", None)
    with pytest.raises(errors.InputError, match="give None for"):
        key_at(f, params, x[:, 0], "2", 0)
    with pytest.raises(errors.InputError, match="one integer per prompt"):
        key_at(f, params, x, "2", torch.tensor([0, 1, 2]))
    with pytest.raises(errors.InputError, match="2 batches for 1 positions"):
        key_at(f, params, [x, x], "2", [0])


def test_an_edit_of_statistics_that_are_tensors():
    statistics = KeyStatistics(torch.eye(2) * 6, torch.tensor(3))
    CLOSE(statistics.second_moment, torch.eye(2) * 2)
