"""TIES, DARE and SLERP against their formulas in loops."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch.func import vmap

from tdhook.core.errors import InputError, ParamsError
from tdhook.weights.merging import dare, slerp, ties
from tdhook.weights.selection import flat


def vectors(count=3, dtype=torch.float64):
    torch.manual_seed(0)
    return [TensorDict({"a": {"w": torch.randn(4, 5, dtype=dtype)}, "b": torch.randn(7, dtype=dtype)}) for _ in range(count)]


def joined(vector):
    return [float(v) for tensor in flat(vector).values() for v in tensor.reshape(-1)]


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_ties_is_its_formula_number_by_number(density, count):
    given = vectors(count)
    trimmed = []
    for numbers in map(joined, given):
        drop = round((1 - density) * len(numbers))
        lowest = set(sorted(range(len(numbers)), key=lambda i: abs(numbers[i]))[:drop])
        trimmed.append([0.0 if i in lowest else v for i, v in enumerate(numbers)])
    expected = []
    for values in zip(*trimmed):
        total = sum(values)
        agreeing = [v for v in values if v * total > 0]
        expected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    assert joined(ties(given, density)) == pytest.approx(expected, rel=1e-12)


def test_ties_within_each_tensor():
    given = vectors(1)
    merged = ties(given, 0.5, scope="tensor")
    assert int((merged["a", "w"] != 0).sum()) == 10 and int((merged["b"] != 0).sum()) in (3, 4)


def test_changes_that_cancel_give_none():
    a = TensorDict(w=torch.tensor([1.0, 2.0]))
    assert ties([a, -a], 1.0)["w"].tolist() == [0, 0]


def test_dare_drops_at_its_rate_and_keeps_the_expectation():
    vector = TensorDict(w=torch.full((200_000,), 2.0))
    sparse = dare(vector, 0.9, generator=torch.Generator().manual_seed(0))["w"]
    kept = sparse != 0
    assert abs(kept.double().mean() - 0.1) < 4 * math.sqrt(0.09 / 200_000)
    torch.testing.assert_close(sparse[kept], torch.full((int(kept.sum()),), 20.0))


def test_dare_draws_from_its_generator_alone():
    vector, state = vectors(1)[0], torch.get_rng_state()
    a, b = (dare(vector, 0.5, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and (a == b).all()
    assert not torch.equal(a["a", "w"] == 0, dare(vector, 0.5, generator=torch.Generator().manual_seed(2))["a", "w"] == 0)


def test_dare_of_nothing_and_the_nesting_of_its_drops():
    vector = vectors(1)[0]
    assert (dare(vector, 0.0) == vector).all()
    more, less = (dare(vector, p, generator=torch.Generator().manual_seed(0))["a", "w"] == 0 for p in (0.7, 0.3))
    assert (more | ~less).all() and more.sum() > less.sum()


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_is_its_closed_form(t):
    a, b = vectors(2)
    got = slerp(a, b, t)
    for key, x in flat(a).items():
        y = flat(b)[key]
        omega = torch.arccos((x * y).sum() / (x.norm() * y.norm()))
        expected = (torch.sin((1 - t) * omega) * x + torch.sin(t * omega) * y) / torch.sin(omega)
        torch.testing.assert_close(flat(got)[key], expected)


def test_slerp_of_all_together_is_that_of_the_joined_vector():
    a, b = vectors(2)
    whole = slerp(TensorDict(w=torch.tensor(joined(a)).double()), TensorDict(w=torch.tensor(joined(b)).double()), 0.3)
    torch.testing.assert_close(
        torch.tensor(joined(slerp(a, b, 0.3, scope="global"))).double(), whole["w"], rtol=1e-6, atol=1e-7
    )


def test_slerp_keeps_the_norm_on_a_sphere():
    a, b = (TensorDict(w=v["b"] / v["b"].norm()) for v in vectors(2))
    norms = vmap(lambda t: slerp(a, b, t)["w"].norm())(torch.linspace(0, 1, 9).double())
    torch.testing.assert_close(norms, torch.ones(9).double())


@pytest.mark.parametrize("b", [[2.0, 4.0], [1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]])
def test_slerp_is_linear_where_there_is_no_circle(b):
    a, b = torch.tensor([1.0, 2.0]), torch.tensor(b)
    torch.testing.assert_close(slerp(TensorDict(w=a), TensorDict(w=b), 0.25)["w"], 0.75 * a + 0.25 * b)


def test_slerp_of_nearly_parallel_ends_is_precise():
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([math.cos(1e-7), math.sin(1e-7)], dtype=torch.float64)
    got = slerp(TensorDict(w=a), TensorDict(w=b), 0.25)["w"]
    torch.testing.assert_close(got[1], torch.tensor(math.sin(0.25e-7), dtype=torch.float64), rtol=1e-8, atol=0)


def test_integers_are_those_of_the_first():
    a, b = TensorDict(w=torch.ones(2), n=torch.tensor(3)), TensorDict(w=torch.zeros(2), n=torch.tensor(5))
    assert slerp(a, b, 0.5)["n"] is a["n"]


def test_dtypes_and_the_caller_are_left():
    given = vectors(2, torch.bfloat16)
    before = [v.clone() for v in given]
    for result in (ties(given, 0.5), dare(given[0], 0.5), slerp(*given, 0.5)):
        assert all(t.dtype is torch.bfloat16 for t in flat(result).values())
        assert list(flat(result)) == list(flat(given[0]))
    assert all((v == w).all() for v, w in zip(given, before))


def test_sweeps_are_loops():
    given = vectors(3)
    grid = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for method in (
        lambda s: ties(given, s)["a", "w"],
        lambda s: dare(given[0], s, generator=torch.Generator().manual_seed(0))["a", "w"],
        lambda s: slerp(given[0], given[1], s)["a", "w"],
    ):
        swept = vmap(method, randomness="same")(grid)
        torch.testing.assert_close(swept, torch.stack([method(float(s)) for s in grid]))


def test_stacked_models():
    a, b, c = vectors(3)
    got = vmap(lambda x, y: ties([x, y], 0.5))(torch.stack([a, b]), torch.stack([b, c]))
    torch.testing.assert_close(got["a", "w"][1], ties([b, c], 0.5)["a", "w"])


@pytest.mark.compile
def test_compiled_equals_eager():
    a, b, c = vectors(3)

    def run(s):
        return slerp(ties([a, b, c], s), b, s)["a", "w"], dare(a, s)["a", "w"] != 0

    got = torch.compile(run, backend="aot_eager", fullgraph=True)(torch.tensor(0.3).double())
    torch.testing.assert_close(got[0], run(torch.tensor(0.3).double())[0])
    assert got[1].shape == (4, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a, b: ties([a, b], 1.5), InputError, "density is a float from 0 to 1"),
        (lambda a, b: ties([a, b], torch.tensor(-0.5)), InputError, "density is a float from 0 to 1"),
        (lambda a, b: ties([a, b], True), InputError, "density is a float"),
        (lambda a, b: ties([a, b], 0.5, scope="output"), InputError, "scope='output' is unknown"),
        (lambda a, b: ties([], 0.5), InputError, "vectors is a sequence of task vectors, at least one"),
        (lambda a, b: ties(a, 0.5), InputError, "vectors is a sequence of task vectors"),
        (lambda a, b: ties([a, b.exclude("b")], 0.5), ParamsError, r"vectors\[1\] has no 'b', which vectors\[0\] has"),
        (lambda a, b: ties([torch.stack([a, b])], 0.5), ParamsError, "use torch.func.vmap"),
        (lambda a, b: dare(a, 1.0), InputError, "drop is a float from 0 to below 1"),
        (lambda a, b: dare(a, torch.ones(2)), InputError, "drop is a float from 0 to below 1"),
        (lambda a, b: dare({"w": 1}, 0.5), ParamsError, "vector is a TensorDict"),
        (lambda a, b: slerp(a, b, 0.5, scope="layer"), InputError, "scope='layer' is unknown"),
        (lambda a, b: slerp(a, b, torch.ones(2)), InputError, "for several use torch.func.vmap"),
        (lambda a, b: slerp(a, b.float(), 0.5), ParamsError, "'a.w' is a float64 tensor"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(*vectors(2))
