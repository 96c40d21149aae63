"""CKA of minibatches against CKA of all."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict

from tdhook.core import errors
from tdhook.latent.similarity.cka import cka, rbf_cka
from tdhook.latent.similarity.compare import compare
from tdhook.latent.similarity.streaming import minibatch_cka, streamed_cka

from .draws import draw, related

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def batches(xs, *sizes):
    """Minibatches of the sizes, then one of what is left."""
    start = 0
    for size in (*sizes, None):
        stop = None if size is None else start + size
        yield {name: x[..., start:stop, :] for name, x in xs.items()}
        start = stop


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("sizes", [(), (1, 1, 2), (7, 7, 7, 7), (39,)])
def test_streamed_is_whole(sizes, debiased):
    xs = related()
    found = streamed_cka(batches(xs, *sizes), debiased=debiased)
    CLOSE(found.matrix, compare(partial(cka, debiased=debiased), xs).matrix)
    assert found.rows == found.columns == tuple(xs)


def test_two_models_and_leading_dimensions():
    xs, ys = related(), {"y": draw(40, 7)}
    xs, ys = ({name: torch.stack([x, x.flip(-1).exp()]) for name, x in each.items()} for each in (xs, ys))
    found = streamed_cka(zip(batches(xs, 9, 20), batches(ys, 9, 20)), debiased=True)
    CLOSE(found.matrix, compare(partial(cka, debiased=True), xs, ys).matrix)
    assert found.matrix.shape == (4, 1, 2) and found.columns == ("y",)


@pytest.mark.parametrize("debiased", [False, True])
def test_an_offset_and_other_units_cost_little_in_float32(debiased):
    xs = related(200)
    xs["h.1"] = xs["h.1"] * 1e-9 + 1e-6
    xs["h.2"] = xs["h.2"] * 1e9 - 1e12
    given = {name: (x + 1000 * (name == "h.0")).float() for name, x in xs.items()}
    expected = compare(partial(cka, debiased=debiased), {name: x.double() for name, x in given.items()}).matrix
    for sizes in ((50, 50), (1, 100)):
        found = streamed_cka(batches(given, *sizes), debiased=debiased).matrix
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_minibatches_that_drift_are_still_whole():
    xs = {name: x + torch.arange(40.0)[:, None] for name, x in related().items()}
    CLOSE(streamed_cka(batches(xs, 10, 10, 10), debiased=True).matrix, compare(partial(cka, debiased=True), xs).matrix)


def test_one_minibatch_is_the_debiased_one():
    xs = related()
    CLOSE(minibatch_cka([xs]).matrix, compare(partial(cka, debiased=True), xs).matrix)
    CLOSE(minibatch_cka([xs], kernel="rbf").matrix, compare(partial(rbf_cka, debiased=True), xs).matrix)
    CLOSE(
        minibatch_cka([xs], kernel="rbf", bandwidth=3.0).matrix,
        compare(partial(rbf_cka, bandwidth=3.0, debiased=True), xs).matrix,
    )


def test_minibatches_are_added_up_by_their_examples():
    xs = related()

    def hsic(x, y):
        """n (n - 3) HSIC_1, from the debiased CKA's own definition."""
        n, x, y = len(x), x - x.mean(0), y - y.mean(0)
        k, ell = x @ x.T, y @ y.T
        k, ell = k - k.diag().diag(), ell - ell.diag().diag()
        both = k.sum() * ell.sum() / ((n - 1) * (n - 2))
        return ((k * ell).sum() + both - 2 / (n - 2) * (k.sum(0) * ell.sum(0)).sum()) / (n * (n - 3))

    parts = list(batches(xs, 12, 20))
    a, b = "h.0", "h.3"
    sums = [sum(len(part[p]) * hsic(part[p], part[q]) for part in parts) for p, q in ((a, b), (a, a), (b, b))]
    CLOSE(minibatch_cka(parts).matrix[0, 3], sums[0] / (sums[1] * sums[2]).sqrt())


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_small_minibatches_lead_to_the_whole(kernel):
    xs = related(1200, (4, 6))
    whole = compare(partial({"linear": cka, "rbf": rbf_cka}[kernel], debiased=True), xs).matrix[0, 1]
    small = minibatch_cka(batches(xs, *[20] * 59), kernel=kernel).matrix[0, 1]
    assert abs(small - whole) < 0.02
    biased = torch.stack([cka(part["h.0"], part["h.1"]) for part in batches(xs, *[20] * 59)]).mean()
    assert abs(biased - whole) > 0.05


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_what_is_constant_has_no_similarity_unless_in_one_minibatch_only(kernel):
    xs = {"a": draw(30, 3).float(), "b": draw(30, 4, seed=1).float(), "c": torch.full((30, 2), 0.1)}
    xs["b"][:10] = 0.3
    for found in (minibatch_cka(batches(xs, 10, 10), kernel=kernel), streamed_cka(batches(xs, 10, 10))):
        assert found.matrix[2].isnan().all() and not found.matrix[:2, :2].isnan().any()


def test_a_tensordict_and_a_generator_are_fine():
    xs = related(40)
    nested = ({"h": {name[2:]: x for name, x in part.items()}} for part in batches(xs, 10))
    found = streamed_cka(TensorDict(part, batch_size=[]) for part in nested)
    assert found.rows == tuple(xs)
    CLOSE(found.matrix, compare(cka, xs).matrix)


X = draw(10, 3)


@pytest.mark.parametrize("measure", [streamed_cka, minibatch_cka])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "batches"),
        ([{}], "a minibatch is empty"),
        ([X], "a minibatch is a float64 tensor"),
        ([{"a": X}, {"b": X}], "give the same names"),
        ([{"a": X}, {"a": X[:, :2]}], "give the same names, in order, and widths"),
        ([{"a": X, "b": X[:5]}], "give the same examples"),
        ([{"a": X / 0}], "NaN or infinite"),
        ([{"a": X.long()}], "give a floating-point tensor"),
        ([({"a": X}, X)], "the columns of a minibatch is a float64 tensor"),
    ],
)
def test_wrong_minibatches_raise(measure, given, message):
    with pytest.raises(errors.InputError, match=message):
        measure(given)


def test_too_few_examples_raise():
    with pytest.raises(errors.InputError, match="1 examples in all; give at least 2"):
        streamed_cka([{"a": X[:1]}])
    with pytest.raises(errors.InputError, match="3 examples in all; give at least 4"):
        streamed_cka([{"a": X[:2]}, {"a": X[:1]}], debiased=True)
    with pytest.raises(errors.InputError, match="at least 4 examples"):
        minibatch_cka([{"a": X}, {"a": X[:3]}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "cosine"}, "kernel is 'cosine' .*; choose 'linear' or 'rbf'"),
        ({"bandwidth": 1.0}, "have no meaning for kernel='linear'"),
        ({"kernel": "rbf", "bandwidth": 0}, "bandwidth is a number above 0"),
    ],
)
def test_wrong_options_raise(options, message):
    with pytest.raises(errors.InputError, match=message):
        minibatch_cka([{"a": X}], **options)
