"""Task arithmetic against numbers, and the choice of a strength."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

from tdhook import functionalize
from tdhook.core.errors import InputError, ParamsError, TargetError
from tdhook.weights.selection import flat
from tdhook.weights.task_vectors import add_task_vectors, analogy, choose_strength, task_vector


def checkpoint(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    net[1](torch.randn(6, 4).double())
    for _ in range(seed):
        net[1](torch.randn(6, 4).double())
    return functionalize(net.eval())


@pytest.fixture
def f():
    return checkpoint(0)[0]


@pytest.fixture
def base():
    return checkpoint(0)[1]


@pytest.fixture
def tuned():
    return checkpoint(3)[1]


def close(a, b):
    assert list(flat(a)) == list(flat(b))
    for key, tensor in flat(a).items():
        torch.testing.assert_close(tensor, flat(b)[key])


def test_adding_what_fine_tuning_changed_is_fine_tuning(base, tuned):
    vector = task_vector(tuned, base)
    new = add_task_vectors(base, vector)
    close(new.exclude(("1", "num_batches_tracked")), tuned.exclude(("1", "num_batches_tracked")))


def test_counters_are_those_of_the_base_and_statistics_move(base, tuned):
    vector = task_vector(tuned, base)
    assert ("1", "num_batches_tracked") not in flat(vector) and ("1", "running_mean") in flat(vector)
    new = add_task_vectors(base, vector)
    assert new["1", "num_batches_tracked"] is base["1", "num_batches_tracked"]
    assert tuned["1", "num_batches_tracked"] != base["1", "num_batches_tracked"]


def test_negation_scaling_and_sums(base, tuned):
    vector = task_vector(tuned, base)
    close(add_task_vectors(base, -vector), add_task_vectors(base, vector, -1))
    weight, change = base["0", "weight"], vector["0", "weight"]
    torch.testing.assert_close(add_task_vectors(base, vector, 0.3)["0", "weight"], weight + 0.3 * change)
    two = add_task_vectors(base, [vector, 2 * vector], [0.5, -1.0])
    torch.testing.assert_close(two["0", "weight"], weight - 1.5 * change)
    torch.testing.assert_close(add_task_vectors(base, [vector, vector], 0.5)["0", "weight"], weight + change)


def test_coefficients_by_layer(base, tuned):
    vector = task_vector(tuned, base)
    new = add_task_vectors(base, vector, {"0": 2.0, "0.bias": torch.tensor(0.5), "[-1]": -1.0})
    torch.testing.assert_close(new["0", "weight"], base["0", "weight"] + 2 * vector["0", "weight"])
    torch.testing.assert_close(new["0", "bias"], base["0", "bias"] + vector["0", "bias"] / 2)
    torch.testing.assert_close(new["2", "bias"], base["2", "bias"] - vector["2", "bias"])
    assert new["1", "weight"] is base["1", "weight"]


def test_select(base, tuned):
    assert list(flat(task_vector(tuned, base, select="0"))) == [("0", "weight"), ("0", "bias")]


def test_analogies(base):
    a, b, c = (task_vector(checkpoint(seed)[1], base) for seed in (1, 2, 3))
    d = analogy(a, b, c)
    torch.testing.assert_close(d["0", "weight"], c["0", "weight"] + b["0", "weight"] - a["0", "weight"])


def test_strengths_and_checkpoints_are_vmapped(f, base, tuned):
    vector, x = task_vector(tuned, base), torch.randn(5, 3).double()
    strengths = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    swept = vmap(lambda s: f(add_task_vectors(base, vector, s), x))(strengths)
    torch.testing.assert_close(swept, torch.stack([f(add_task_vectors(base, vector, float(s)), x) for s in strengths]))
    both = vmap(lambda p: f(add_task_vectors(base, task_vector(p, base), 0.5), x))(torch.stack([tuned, base]))
    torch.testing.assert_close(both, torch.stack([swept[2], swept[1]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_are_kept(base, tuned, dtype):
    low, high = (p.apply(lambda t: t.to(dtype) if t.is_floating_point() else t) for p in (base, tuned))
    new = add_task_vectors(low, task_vector(high, low), torch.tensor(0.5, dtype=torch.float64))
    assert [t.dtype for t in flat(new).values()] == [t.dtype for t in flat(low).values()]
    swept = vmap(lambda s: add_task_vectors(low, task_vector(high, low), s))(torch.rand(2))
    assert swept["0", "weight"].dtype is dtype


def test_memory_mapped_params(base, tuned, tmp_path):
    mapped = base.memmap(tmp_path)
    before = mapped.clone()
    new = add_task_vectors(mapped, task_vector(tuned, mapped), {"0": 1.0})
    assert new["2"].get("weight") is mapped["2"].get("weight")
    torch.testing.assert_close(torch.Tensor(new["0", "weight"]), tuned["0", "weight"])
    assert (mapped == before).all()


def test_nothing_of_the_caller_is_changed(base, tuned):
    before, tuned_before = base.clone(), tuned.clone()
    vector = task_vector(tuned, base)
    vector_before = vector.clone()
    add_task_vectors(base, [vector, vector], [1.0, {"0": 2.0}])
    assert (base == before).all() and (tuned == tuned_before).all() and (vector == vector_before).all()


@pytest.mark.compile
def test_compiled_equals_eager(f, base, tuned):
    x = torch.randn(5, 3).double()

    def run(s):
        return f(add_task_vectors(base, task_vector(tuned, base), {"0": s, "2.*": 0.5}), x)

    got = torch.compile(run, backend="aot_eager", fullgraph=True)(torch.tensor(0.3))
    torch.testing.assert_close(got, run(torch.tensor(0.3)))


# The choice of a strength -----------------------------------------------------------------------------------------------

ONE = TensorDict(w=torch.tensor(1.0))


def metric(params):
    return 1 - (params["w"] - 3).abs()


def control(params):
    return 2 - params["w"]


@pytest.mark.parametrize(
    ("strengths", "adequacy", "expected"),
    [
        ([0.0, 0.1, 0.2, 2.0], 0.85, 0.1),
        ([0.0, 0.1, 0.2, 2.0], 0.0, 0.2),
        ([0.0, 1.0, 2.0, 3.0], 0.0, 1.0),
        ([0.2, 0.2], 0.5, 0.2),
    ],
)
def test_the_best_of_the_adequate_strengths(strengths, adequacy, expected):
    result = choose_strength(ONE, ONE, metric, control, strengths=torch.tensor(strengths), adequacy=adequacy)
    torch.testing.assert_close(result.strength, torch.tensor(expected))
    s = torch.tensor(strengths)
    torch.testing.assert_close(result.metric, 1 - (s - 2).abs())
    torch.testing.assert_close(result.control, 1 - s)
    assert result.adequate.tolist() == (1 - s >= adequacy).tolist() and result.base_control == 1


def test_the_first_of_equal_ones_and_nan_for_none():
    flat_metric = lambda p: 0 * p["w"]  # noqa: E731
    chosen = choose_strength(ONE, ONE, flat_metric, control, strengths=torch.tensor([0.5, 0.3, 0.1]), adequacy=0.6)
    torch.testing.assert_close(chosen.strength, torch.tensor(0.3))
    none = choose_strength(ONE, ONE, metric, control, strengths=torch.tensor([1.0, 2.0]))
    assert none.strength.isnan() and not none.adequate.any()


def test_a_metric_of_minus_infinity_or_nan_is_not_preferred():
    strengths = torch.tensor([0.0, 0.1, 0.2])
    for bad in (torch.nan, -torch.inf):
        worst_first = lambda p, bad=bad: torch.where(p["w"] < 1.05, bad, -p["w"])  # noqa: E731
        assert choose_strength(ONE, ONE, worst_first, control, strengths=strengths, adequacy=0.1).strength == strengths[1]


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_chunks_change_nothing(chunk_size):
    strengths = torch.linspace(0, 1, 7)
    options = {"strengths": strengths, "adequacy": 0.4}
    a = choose_strength(ONE, ONE, metric, control, **options)
    b = choose_strength(ONE, ONE, metric, control, chunk_size=chunk_size, **options)
    assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.compile
def test_the_choice_compiles_and_vmaps():
    strengths = torch.tensor([0.0, 0.1, 0.2])

    def run(vector):
        return choose_strength(ONE, vector, metric, control, strengths=strengths, adequacy=0.85).strength

    assert torch.compile(run, backend="aot_eager", fullgraph=True)(ONE) == run(ONE)
    several = vmap(run)(torch.stack([ONE, 0.5 * ONE]))
    torch.testing.assert_close(several, torch.stack([run(ONE), run(0.5 * ONE)]))


# Bad input --------------------------------------------------------------------------------------------------------------


def test_params_of_different_structure(base, tuned):
    with pytest.raises(ParamsError, match=r"base has no '0.bias', which finetuned has"):
        task_vector(tuned, base.exclude(("0", "bias")))
    with pytest.raises(ParamsError, match=r"'0.weight' is a float64 .* in finetuned, but a float32"):
        task_vector(tuned, base.float())
    with pytest.raises(ParamsError, match="finetuned is a TensorDict"):
        task_vector(dict(tuned), base)
    with pytest.raises(ParamsError, match="vectors has 'extra', which params has not"):
        add_task_vectors(base, TensorDict(extra=torch.ones(1)))
    with pytest.raises(ParamsError, match=r"vectors\[1\] holds .*\[1\].* at '0.bias', where params has"):
        add_task_vectors(base, [base, TensorDict({"0": {"bias": torch.ones(1)}})])
    with pytest.raises(ParamsError, match="b has no 'x', which a has"):
        analogy(TensorDict(x=torch.ones(1)), TensorDict(), TensorDict())


@pytest.mark.parametrize(
    ("coefficients", "error", "message"),
    [
        ({"9": 1.0}, ParamsError, "coefficients='9': params has no such parameter"),
        ({"0": "half"}, InputError, "coefficients holds 'half'"),
        (torch.ones(3), InputError, "use vmap for several"),
        ([1.0, 2.0], InputError, "coefficients has 2 entries for 1 task vectors"),
        (True, InputError, "coefficients holds True"),
    ],
)
def test_bad_coefficients(base, coefficients, error, message):
    with pytest.raises(error, match=message):
        add_task_vectors(base, base, coefficients)


def test_bad_choices():
    strengths = torch.tensor([0.0, 1.0])
    for bad in ([0.0, 1.0], torch.ones(2, 2), torch.ones(0), torch.tensor([1, 2])):
        with pytest.raises(InputError, match="strengths is a floating-point tensor"):
            choose_strength(ONE, ONE, metric, control, strengths=bad)
    with pytest.raises(InputError, match="adequacy=2 is the share"):
        choose_strength(ONE, ONE, metric, control, strengths=strengths, adequacy=2)
    with pytest.raises(InputError, match="control is negative for params"):
        choose_strength(ONE, ONE, metric, lambda p: -p["w"], strengths=strengths)
    with pytest.raises(TargetError, match="metric returned"):
        choose_strength(ONE, ONE, lambda p: p["w"].expand(2), control, strengths=strengths)
    with pytest.raises(TargetError, match=r"control returned 1.0"):
        choose_strength(ONE, ONE, metric, lambda p: 1.0, strengths=strengths)
    with pytest.raises(InputError, match="at least one"):
        add_task_vectors(ONE, [])
