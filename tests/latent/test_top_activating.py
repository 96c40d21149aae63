"""The most activating examples against a full sort."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from torch import nn

from tdhook import functionalize, stop_at
from tdhook.core import errors
from tdhook.latent.top_activating import top_activating

from ..core import zoo

EXACT = partial(torch.testing.assert_close, rtol=0, atol=0)
IDENTITY, NOTHING = functionalize(nn.Identity())
top = partial(top_activating, IDENTITY, NOTHING)


def full_sort(scores, k, largest=True):
    """Python's own sort, by value and then by order: values and indices [U, k] of scores [N, U]."""
    values, examples = [], []
    for unit in scores.T.tolist():
        order = sorted(range(len(unit)), key=lambda n: (-unit[n] if largest else unit[n], n))[:k]
        values.append([unit[n] for n in order])
        examples.append(order)
    return torch.tensor(values, dtype=scores.dtype), torch.tensor(examples)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("size", "chunk_size"), [(1, None), (4, None), (4, 3), (100, 7), (100, None)])
def test_it_is_a_full_sort(size, chunk_size, largest):
    torch.manual_seed(0)
    x = torch.randn(23, 5)
    found = top(x.split(size), ":out", k=4, largest=largest, chunk_size=chunk_size)
    values, examples = full_sort(x, 4, largest)
    EXACT(found.values, values)
    EXACT(found.examples, examples)
    assert found.positions.shape == (5, 4, 0) and found.units.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("reduce", ["max", "min", "mean"])
def test_over_positions(reduce, largest):
    torch.manual_seed(0)
    x = torch.randn(11, 6, 3)
    scores = {"max": x.amax(1), "min": x.amin(1), "mean": x.mean(1)}[reduce]
    found = top(x.split(4), ":out", k=5, reduce=reduce, largest=largest)
    values, examples = full_sort(scores, 5, largest)
    EXACT(found.values, values)
    EXACT(found.examples, examples)
    if reduce == "mean":
        assert found.positions.shape == (3, 5, 0)
    else:
        EXACT(x[found.examples, found.positions[..., 0], torch.arange(3)[:, None]], found.values)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_of_equal_values_the_first_wins(size):
    x = torch.tensor([[1.0, 2], [2, 2], [2, 1], [1, 2], [2, 2]])[:, None].expand(5, 3, 2)
    found = top(x.split(size), ":out", k=3)
    assert found.examples.tolist() == [[1, 2, 4], [0, 1, 3]] and not found.positions.any()
    assert top(x.split(size), ":out", k=3, largest=False).examples.tolist() == [[0, 3, 1], [2, 0, 1]]
    alone = top(x.split(size), ":out", k=4, reduce=None)
    assert alone.examples.tolist() == [[1, 1, 1, 2], [0, 0, 0, 1]]
    assert alone.positions[..., 0].tolist() == [[0, 1, 2, 0]] * 2


def test_each_position_for_itself():
    torch.manual_seed(0)
    x = torch.randn(5, 4, 3)
    found = top(x.split(2), ":out", k=6, reduce=None)
    values, rows = full_sort(x.flatten(0, 1), 6)
    EXACT(found.values, values)
    EXACT(found.examples * 4 + found.positions[..., 0], rows)


def test_channels_have_a_location():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()), torch.randn(9, 2, 6, 7)
    f, params = functionalize(model)
    value = torch.cat([model(some).detach() for some in x.split(4)])
    found = top_activating(f, params, x.split(4), "1", k=3, unit_axis=1, units=[3, 0])
    values, examples = full_sort(value.amax((2, 3))[:, [3, 0]], 3)
    EXACT(found.values, values)
    EXACT(found.examples, examples)
    assert found.units.tolist() == [3, 0] and found.positions.shape == (2, 3, 2)
    row, column = found.positions.unbind(-1)
    EXACT(value[found.examples, found.units[:, None], row, column], found.values)


def test_heads():
    torch.manual_seed(0)
    x = torch.randn(7, 3, 5, 2)  # [B, heads, L, D]
    found = top(x.split(2), ":out", k=2, unit_axis=1)
    EXACT(found.values, full_sort(x.amax((2, 3)), 2)[0])
    token, feature = found.positions.unbind(-1)
    EXACT(x[found.examples, torch.arange(3)[:, None], token, feature], found.values)


@pytest.mark.parametrize("reduce", ["max", "min", "mean", None])
def test_padding_does_not_count(reduce):
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3)
    lengths = torch.tensor([4, 1, 2, 3, 1, 4])
    mask = torch.arange(4) < lengths[:, None]
    extreme = -100.0 if reduce == "min" else torch.nan
    padded = x.masked_fill(~mask[..., None], extreme)
    rows = [value[kept] for value, kept in zip(x, mask)]
    # the mask comes with the batch, next to the inputs of the model
    data = list(zip(padded.split(4), mask.split(4)))
    found = top(data, ":out", k=3, reduce=reduce, inputs_of=lambda b: b[0], positions=lambda b: b[1])
    if reduce is None:
        EXACT(found.values, full_sort(torch.cat(rows), 3)[0])
        EXACT(x[found.examples, found.positions[..., 0], torch.arange(3)[:, None]], found.values)
        return
    how = {"max": torch.amax, "min": torch.amin, "mean": torch.mean}[reduce]
    values, examples = full_sort(torch.stack([how(row, 0) for row in rows]), 3)
    torch.testing.assert_close(found.values, values)
    EXACT(found.examples, examples)


def test_a_mask_of_tokens_holds_for_all_features_of_a_head():
    x = torch.zeros(2, 3, 5, 2)  # [B, heads, L, D]
    x[:, :, 4] = 9.0
    mask = (torch.arange(5) < 4).expand(2, 5)
    assert not top([x], ":out", unit_axis=1, positions=lambda batch: mask).values.any()


def test_language_model_several_sites_in_one_pass():
    torch.manual_seed(0)
    model = zoo._gpt2()[0]
    f, params = functionalize(model, use_cache=False)
    ids = torch.randint(0, 30, (9, 6))
    found = top_activating(f, params, ids.split(4), "transformer.h.*.mlp.act", k=3)
    assert list(found) == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    for site, one in found.items():
        value = stop_at(f, site)(params, ids)
        torch.testing.assert_close(one.values, full_sort(value.amax(1), 3)[0])
        alone = top_activating(f, params, ids.split(4), site, k=3)
        assert all(torch.equal(a, b) for a, b in zip(alone, one))


def test_own_measure():
    torch.manual_seed(0)
    x = torch.randn(8, 5, 3)
    found = top(x.split(3), ":out", k=2, reduce=lambda value, mask: value.norm(dim=1))
    torch.testing.assert_close(found.values, full_sort(x.norm(dim=1), 2)[0])


def test_fewer_candidates_than_k():
    found = top(torch.randn(3, 2).split(2), ":out", k=10)
    assert found.values.shape == found.examples.shape == (2, 3) and found.positions.shape == (2, 3, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_dtypes(dtype):
    x = torch.tensor([[1, 4], [3, 2], [2, 3]]).to(dtype)
    found = top([x], ":out", k=2)
    assert found.values.tolist() == [[3, 2], [4, 3]] and found.examples.tolist() == [[1, 2], [0, 2]]
    assert found.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_batches_of_several_lengths():
    torch.manual_seed(0)
    batches = [torch.randn(3, length, 4, 2, 2) for length in (5, 2, 7)]
    found = top(batches, ":out", k=3)
    for unit in range(2):
        for value, example, place in zip(found.values[unit], found.examples[unit], found.positions[unit]):
            EXACT(batches[example // 3][(example % 3, *place, unit)], value)


class Raises(nn.Module):
    def forward(self, x):
        raise AssertionError("ran")


def test_stops_after_the_site_and_holds_no_batch():
    f, params = functionalize(nn.Sequential(nn.Tanh(), Raises()))
    alive, modes = [], []

    def batches():
        for _ in range(5):
            assert sum(reference() is not None for reference in alive) == 0
            modes.append(torch.is_grad_enabled())
            batch = torch.randn(4, 3)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    state = torch.get_rng_state()
    generator = batches()
    top_activating(f, params, generator, "0", k=2)
    assert modes == [True] * 5 and torch.is_grad_enabled()
    torch.set_rng_state(state)


X = torch.ones(4, 5, 3)


@pytest.mark.parametrize(
    ("batches", "options", "match"),
    [
        (X, {}, "batches is a float32 tensor .*; give an iterable of batches"),
        ([], {}, "batches is empty"),
        ([X], {"k": 0}, "k is an integer of at least 1, got 0"),
        ([X], {"k": None}, "k is an integer of at least 1, got None"),
        ([X], {"chunk_size": 0}, "chunk_size is an integer"),
        ([X], {"reduce": "sum"}, "reduce='sum' is unknown; choose from max, min, mean"),
        ([X], {"reduce": lambda value, mask: value}, r"reduce returned .*; return a tensor \[B, U\], here \[4, 3\]"),
        ([X], {"unit_axis": 0}, "unit_axis=0 is no axis of units"),
        ([X], {"units": []}, r"units=\[\] names no unit"),
        ([X], {"units": [3]}, "units has 3, out of range for the 3 units at ':out'"),
        ([X * torch.nan], {}, "site ':out' holds NaN in or near example 0"),
        ([X, X[..., :2]], {}, "site ':out' gives 2 units where earlier batches gave 3"),
        ([X], {"positions": "mask"}, "positions='mask' names no entry"),
    ],
)
def test_bad_input(batches, options, match):
    with pytest.raises(errors.InputError, match=match):
        top(batches, ":out", **options)


@pytest.mark.parametrize(
    ("site", "x", "options", "match"),
    [
        ("nothing", X, {}, "unknown site 'nothing'"),
        (":out@*", X, {}, "malformed"),
        (":out", X, {"unit_axis": 3}, "where axis 3 does not count real units; give unit_axis"),
        (":out", X[:, 0, 0], {}, "where axis -1 does not count real units"),
        (":out", X[:, :0], {}, "which has no position or no unit"),
        (":out", X, {"positions": lambda x: torch.ones(4, 6).bool()}, r"has positions \[5\] .* mask is a bool tensor"),
    ],
)
def test_bad_sites(site, x, options, match):
    with pytest.raises(errors.SiteError, match=match):
        top([x], site, **options)
