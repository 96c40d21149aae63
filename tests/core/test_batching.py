"""Chunks bound memory and change nothing; one pullback serves many cotangents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vjp

from tdhook.core.batching import chunks, pull_each, vmap_or_loop
from tdhook.core.checks import flatten_as, require_positive
from tdhook.core.errors import InputError, TdhookWarning


@given(st.integers(0, 50), st.one_of(st.none(), st.integers(1, 60)))
def test_chunks_cover_everything_once_in_order(length, size):
    parts = list(chunks(length, size))
    assert [i for part in parts for i in range(length)[part]] == list(range(length))
    assert all(0 < part.stop - part.start <= (size or length) for part in parts)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 100])
def test_pull_each_gives_the_jacobian_row_by_row(chunk_size):
    weight, x = torch.randn(3, 5).double(), torch.randn(4, 5).double()
    values, pull = vjp(lambda x: (x @ weight.T).tanh(), x)
    (rows,) = pull_each(pull, values, torch.ones(4, 1).double(), chunk_size)
    expected = (1 - values**2).T[..., None] * weight[:, None]
    assert rows.shape == (3, 4, 5)
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)


def test_pull_each_weighs_the_leading_axes():
    values, pull = vjp(lambda x: x, torch.ones(2, 3, 4))
    (rows,) = pull_each(pull, values, torch.tensor([1.0, 10.0])[:, None, None], None)
    assert rows.sum((2, 3)).tolist() == [[3.0, 30.0]] * 4


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None])
def test_a_count_is_a_positive_integer(value):
    with pytest.raises(InputError, match="steps is an integer of at least 1, got"):
        require_positive("steps", value)


def test_a_count_may_be_optional():
    require_positive("chunk_size", None, optional=True)
    require_positive("chunk_size", 3, optional=True)


def test_flatten_as_goes_by_name_not_by_order():
    inputs = {"a": 1, "b": (2, [3, 4])}
    assert flatten_as("x", {"b": (20, [30, None]), "a": 10}, inputs) == [10, 20, 30, None]


@pytest.mark.parametrize("value", [{"a": 1}, {"a": 1, "c": (2, 3)}, {"a": 1, "b": (2,)}, {"a": 1, "b": 3}, (1, (2, 3)), None])
def test_flatten_as_refuses_another_structure(value):
    with pytest.raises(InputError, match=r"x is .* not the structure of inputs"):
        flatten_as("x", value, {"a": 1, "b": (2, 3)})


def test_vmap_or_loop_loops_where_vmap_cannot_go():
    def by_value(pair):
        return {"y": pair[0] * 2 if pair[0].item() > 0 else -pair[1]}

    a, b = torch.tensor([1.0, -1.0]), torch.tensor([5.0, 7.0])
    with pytest.warns(TdhookWarning, match="once for each, in a loop"):
        assert vmap_or_loop(by_value, (a, b))["y"].tolist() == [2.0, -7.0]
    assert vmap_or_loop(lambda x: x + 1, a).tolist() == [2.0, 0.0]
