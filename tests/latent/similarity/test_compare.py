"""All pairs against a loop over pairs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch.func import vmap

from tdhook.core import errors
from tdhook.latent.similarity import kernels
from tdhook.latent.similarity.cka import cka, rbf_cka
from tdhook.latent.similarity.compare import MEASURES, compare
from tdhook.latent.similarity.neighbourhoods import information_imbalance, mutual_knn

from .draws import draw, related

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-7)
VARIANTS = (
    *MEASURES,
    partial(cka, debiased=True),
    partial(rbf_cka, debiased=True),
    partial(partial(information_imbalance, k=7), k=[1, 3]),
)


def loop(measure, xs, ys):
    return torch.stack([torch.stack([measure(x, y) for y in ys.values()]) for x in xs.values()])


@pytest.mark.parametrize("measure", VARIANTS)
def test_all_pairs_are_the_loop(measure):
    xs, ys = related(), {"a": draw(40, 5), "b": related()["h.3"].exp()}
    for chunk_size in (None, 1, 3):
        found = compare(measure, xs, chunk_size=chunk_size)
        assert found.rows == found.columns == tuple(xs)
        CLOSE(found.matrix, loop(measure, xs, xs))
        found = compare(measure, xs, ys, chunk_size=chunk_size)
        assert (found.rows, found.columns) == (tuple(xs), tuple(ys))
        CLOSE(found.matrix, loop(measure, xs, ys))


@pytest.mark.parametrize("widths", [(3, 4, 5), (90, 80, 70), (3, 200)])
@pytest.mark.parametrize("debiased", [False, True])
def test_cka_by_features_and_by_strips_of_grams(widths, debiased, monkeypatch):
    monkeypatch.setattr(kernels, "STRIP", 500)
    xs, measure = related(30, widths), partial(cka, debiased=debiased)
    ys = {"y": draw(30, 6), "z": draw(30, 40)}
    CLOSE(compare(measure, xs).matrix, loop(measure, xs, xs))
    CLOSE(compare(measure, xs, ys).matrix, loop(measure, xs, ys))


def test_each_representation_is_prepared_once_and_a_symmetric_pair_compared_once():
    calls = []

    def measure(x, y):
        calls.append(1)
        return (x.mean() - y.mean()).square()

    xs = related()  # three widths
    CLOSE(compare(measure, xs, symmetric=True).matrix, loop(measure, xs, xs))
    calls.clear()
    compare(measure, related(widths=(4, 4, 4)), symmetric=True)
    assert len(calls) == 3  # one call for each column, vmapped


def test_a_function_of_your_own_has_a_direction_unless_said():
    xs = related()

    def share(x, y):
        return x.square().sum() / y.square().sum()

    CLOSE(compare(share, xs).matrix, loop(share, xs, xs))
    CLOSE(compare(share, xs, chunk_size=3).matrix, loop(share, xs, xs))


def test_leading_dimensions_follow():
    xs = {name: torch.stack([x, x.exp(), x.sin()]) for name, x in related().items()}
    for measure in (cka, mutual_knn, partial(information_imbalance, k=[1, 2])):
        found = compare(measure, xs).matrix
        CLOSE(found[0, 1], measure(xs["h.0"], xs["h.1"]))
        assert found.shape[:2] == (4, 4) and found.shape[-1] == 3


def test_other_dtypes_are_compared_in_the_widest():
    xs = related()
    xs["h.1"] = xs["h.1"].bfloat16()
    assert compare(cka, xs).matrix.dtype == torch.float64


def test_a_nested_tensordict():
    x = draw(20, 3)
    found = compare(cka, TensorDict({"h": {"0": x, "1": x.exp()}, "out": x.sin()}, batch_size=[20]))
    assert found.rows == ("h.0", "h.1", "out")


@pytest.mark.parametrize("measure", [cka, information_imbalance])
def test_under_vmap(measure):
    x, y = draw(3, 20, 4), draw(3, 20, 5, seed=1)
    found = vmap(lambda a, b: compare(measure, {"a": a, "b": b}).matrix)(x, y)
    CLOSE(found, torch.stack([compare(measure, {"a": a, "b": b}).matrix for a, b in zip(x, y)]))


@pytest.mark.compile
@pytest.mark.parametrize("measure", [partial(cka, debiased=True), rbf_cka])
def test_compiled(measure):
    xs = related(20, (3, 3, 4))
    expected = compare(measure, xs)
    found = torch.compile(lambda given: compare(measure, given), backend="aot_eager", fullgraph=True)(xs)
    CLOSE(found.matrix, expected.matrix)
    assert found.rows == expected.rows


X = {"a": draw(10, 3)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare("cka", X), "measure is 'cka' .*; give a function"),
        (lambda: compare(cka, X["a"]), "xs is a float64 tensor .*; give a mapping"),
        (lambda: compare(cka, {}), "xs is empty"),
        (lambda: compare(cka, X, {}), "ys is empty"),
        (lambda: compare(cka, X, {"b": draw(9, 3)}), r"xs\['a'\] is .*\[10, 3\].* and ys\['b'\] .*\[9, 3\]"),
        (lambda: compare(cka, {"a": X["a"].long()}), r"xs\['a'\] is a int64 tensor"),
        (lambda: compare(cka, X, chunk_size=0), "chunk_size is an integer of at least 1"),
        (lambda: compare(partial(mutual_knn, k=10), X), r"k=10 neighbours among the 10 examples of xs\['a'\]"),
    ],
)
def test_wrong_arguments_raise(call, message):
    with pytest.raises(errors.InputError, match=message):
        call()
