"""Expected gradients against closed forms, captum and exhaustive means."""

from __future__ import annotations

import copy
from functools import partial

import captum.attr
import numpy
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

import tdhook
from tdhook import functionalize
from tdhook.attribution.expected_gradients import expected_gradients
from tdhook.attribution.integrated_gradients import integrated_gradients
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data(batch=2, count=5):
    torch.manual_seed(1)
    return torch.randn(batch, 3).double(), torch.randn(count, 3).double()


def exact(f, params, x, baselines, **options):
    """The mean of integrated gradients over all baselines."""
    each = [integrated_gradients(f, params, x, baselines=b.expand_as(x), steps=100, **options) for b in baselines]
    return torch.stack(each).mean(0)


def within(estimate, truth, errors=5.0):
    assert ((estimate.value - truth).abs() <= errors * estimate.standard_error).all()


# Values ----------------------------------------------------------------------------------------------------------------


def test_of_a_linear_function_every_sample_is_the_difference_to_its_baseline():
    weight = torch.tensor([1.0, -2.0, 3.0]).double()
    x, baselines = data()
    got = expected_gradients(lambda w, x: x @ w, weight, x, baselines=baselines[:1], samples=4)
    CLOSE(got.value, (x - baselines[0]) * weight)
    CLOSE(got.standard_error, torch.zeros_like(x))


def test_approaches_the_mean_of_integrated_gradients_within_its_standard_error():
    f, params = functionalize(mlp())
    x, baselines = data()
    got = expected_gradients(f, params, x, baselines=baselines, targets=[0, 3], samples=4000, generator=seeded())
    truth = exact(f, params, x, baselines, targets=[0, 3])
    within(got, truth)
    assert got.value.shape == (2, 2, 3) and got.standard_error.max() < 0.05


def test_the_standard_error_is_the_spread_of_repeated_estimates():
    f, params = functionalize(mlp())
    x, baselines = data(1)
    many = [
        expected_gradients(f, params, x, baselines=baselines, targets=0, samples=40, generator=seeded(i)) for i in range(60)
    ]
    spread = torch.stack([m.value for m in many]).std(0)
    torch.testing.assert_close(torch.stack([m.standard_error for m in many]).mean(0), spread, rtol=0.3, atol=0)


def test_the_sum_approaches_the_difference_to_the_mean_output_of_the_baselines():
    f, params = functionalize(mlp())
    x, baselines = data()
    got = expected_gradients(f, params, x, baselines=baselines, targets=1, samples=5000, stratified=True, generator=seeded())
    difference = f(params, x)[:, 1] - f(params, baselines)[:, 1].mean()
    torch.testing.assert_close(got.value.sum(1), difference, rtol=0, atol=0.05)


def test_equals_captum_in_expectation():
    model = mlp()
    f, params = functionalize(model)
    x, baselines = data()
    numpy.random.seed(0)
    torch.manual_seed(0)
    reference = captum.attr.GradientShap(model).attribute(x, baselines, n_samples=4000, stdevs=0.3, target=2)
    got = expected_gradients(f, params, x, baselines=baselines, targets=2, samples=4000, noise=0.3, generator=seeded())
    assert ((got.value - reference).abs() <= 7 * got.standard_error).all()


def test_noise_moves_the_end_of_the_path():
    """F = x^2 / 2 with one baseline at 0: the sample is z^2 alpha, its mean (x^2 + noise^2) / 2."""
    x = torch.full((1, 1), 2.0).double()
    f = lambda _, x: x.square().sum(-1) / 2  # noqa: E731
    got = expected_gradients(f, {}, x, baselines=torch.zeros_like(x), noise=1.5, samples=20000, generator=seeded())
    within(got, (x.square() + 1.5**2) / 2)
    assert (got.value - x.square() / 2).abs() > 10 * got.standard_error


def test_without_multiplication():
    weight = torch.tensor([1.0, -2.0, 3.0]).double()
    x, baselines = data()
    got = expected_gradients(lambda w, x: x @ w, weight, x, baselines=baselines, multiply_by_inputs=False, samples=2)
    CLOSE(got.value, weight.expand_as(x))


def test_stratified_alphas_are_closer():
    """F = x^3 along one line, where alpha is all that is random."""
    x, f = torch.ones(1, 1).double(), lambda _, x: x.pow(3).sum(-1)
    run = partial(expected_gradients, f, {}, x, baselines=torch.zeros_like(x), samples=50)
    off = {
        s: torch.stack([run(stratified=s, generator=seeded(i)).value - 1 for i in range(20)]).square().mean() for s in (0, 1)
    }
    assert off[1] < off[0] / 100


def test_a_lone_sample_has_no_standard_error():
    f, params = functionalize(mlp())
    x, baselines = data()
    got = expected_gradients(f, params, x, baselines=baselines, targets=0, samples=1)
    assert got.value.isfinite().all() and got.standard_error.isnan().all()


# Sets of baselines -----------------------------------------------------------------------------------------------------


def test_each_example_draws_for_itself():
    """F = x: a sample is x - b, so that equal draws for all examples would give equal estimates."""
    x = torch.zeros(6, 1).double()
    got = expected_gradients(lambda _, x: x.sum(-1), {}, x, baselines=torch.arange(1000.0).double()[:, None], samples=3)
    assert len(got.value.unique()) == 6


def test_a_set_of_whole_batches_keeps_examples_together():
    """Each example has a baseline of its own: the set of the second example never reaches the first."""
    x = torch.zeros(2, 1).double()
    whole = torch.tensor([[1.0, 10.0], [1.0, 20.0]]).double()[..., None]
    got = expected_gradients(lambda _, x: x.sum(-1), {}, x, baselines=whole, samples=50, generator=seeded())
    assert got.value[0, 0] == -1 and -20 < got.value[1, 0] < -10


def test_several_inputs_move_from_the_same_row_of_their_sets():
    """F = a b with equal sets for both: rows drawn apart would give sums other than 1 - b^2."""
    a = torch.ones(4, 1).double()
    sets = torch.tensor([[0.0], [3.0]]).double()
    got = expected_gradients(
        lambda _, i: (i[0] * i[1] * i[2]).sum(-1), {}, (a, a, 2), baselines=(sets, sets, None), samples=9000, generator=seeded()
    )
    value, error = got.value, got.standard_error
    assert value[2] is None and error[2] is None
    total = value[0] + value[1]
    torch.testing.assert_close(total, torch.full_like(total, 2 * (1 - 4.5)), rtol=0, atol=0.4)


def test_a_tensordict():
    model = lambda _, i: (i["a"] * i["b"]).sum(-1)  # noqa: E731
    inputs = TensorDict({"a": torch.ones(4, 2).double(), "b": torch.ones(4, 2).double(), "n": torch.arange(4)}, [4])
    sets = TensorDict({"a": torch.zeros(5, 2).double(), "b": torch.zeros(5, 2).double(), "n": torch.arange(5)}, [5])
    got = expected_gradients(model, {}, inputs, baselines=sets, targets=[lambda out: out] * 3, samples=2000, generator=seeded())
    assert got.value.batch_size == (3, 4) and set(got.value.keys()) == {"a", "b"}
    torch.testing.assert_close(got.value["a"], torch.full((3, 4, 2), 0.5).double(), rtol=0, atol=0.1)


def test_at_a_site_the_set_is_that_of_its_activations():
    f, params = functionalize(mlp())
    x, baselines = data()
    run = partial(expected_gradients, f, params, x, targets=[0, 1], at="1", samples=6)
    by_inputs = run(baselines=baselines, generator=seeded())
    by_site = run(baselines={"1": tdhook.stop_at(f, "1")(params, baselines)}, generator=seeded())
    whole = run(baselines={"1": tdhook.stop_at(f, "1")(params, baselines[:1]).expand(1, 2, 8)}, generator=seeded())
    CLOSE(by_inputs.value["1"], by_site.value["1"])
    CLOSE(by_inputs.standard_error["1"], by_site.standard_error["1"])
    hidden = torch.stack([tdhook.stop_at(f, "1")(params, v) for v in (x, baselines[:1].expand_as(x))])
    CLOSE(whole.value["1"], (hidden[0] - hidden[1]) * params["2", "weight"][:2, None])


def test_token_ids_at_the_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(-2), nn.Linear(12, 2, bias=False)).double()
    f, params = functionalize(model)
    ids, others = torch.tensor([[0, 1, 2]]), torch.tensor([[3, 4, 5]])
    got = expected_gradients(f, params, ids, baselines=others, targets=0, at="0", samples=2).value["0"]
    embedding = params["0", "weight"]
    CLOSE(got, (embedding[ids] - embedding[others]) * params["2", "weight"][0].reshape(3, 4))


# Laws ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("options", [{}, {"noise": 0.5}, {"stratified": True}, {"at": "0", "noise": 0.1}])
def test_chunks_change_nothing(chunk_size, options):
    f, params = functionalize(mlp())
    x, baselines = data(3)
    run = partial(expected_gradients, f, params, x, baselines=baselines, targets=[0, 2], samples=7, **options)
    for a, b in zip(run(generator=seeded(), chunk_size=chunk_size)[:2], run(generator=seeded())[:2]):
        CLOSE(*((a["0"], b["0"]) if options.get("at") else (a, b)))


def test_targets_share_the_draws():
    f, params = functionalize(mlp())
    x, baselines = data()
    run = partial(expected_gradients, f, params, x, baselines=baselines, samples=5)
    CLOSE(run(targets=[1, 2], generator=seeded()).value[1], run(targets=2, generator=seeded()).value)


def test_a_generator_reproduces_and_leaves_the_global_one_alone():
    f, params = functionalize(mlp())
    x, baselines = data()
    state = torch.get_rng_state()
    run = partial(expected_gradients, f, params, x, baselines=baselines, targets=0, samples=5, noise=0.1)
    first, again, other = (run(generator=seeded(i)).value for i in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    without = run().value
    torch.manual_seed(3)
    assert torch.equal(without, run().value)


def test_nothing_of_the_caller_is_changed():
    f, params = functionalize(mlp())
    x, baselines = data()
    before = copy.deepcopy((x, baselines, params.clone()))
    expected_gradients(f, params, x, baselines=baselines, targets=0, noise=0.1)
    assert torch.equal(x, before[0]) and torch.equal(baselines, before[1]) and (params == before[2]).all()


def test_under_vmap_over_examples():
    """A lone example has no batch dimension, its baselines one more than it."""
    f, params = functionalize(mlp())
    x, baselines = data(3)

    def run(x):
        return expected_gradients(f, params, x, baselines=baselines, targets=[0, 1], samples=3000)[:2]

    torch.manual_seed(0)
    value, error = vmap(run, randomness="different")(x)
    truth = exact(f, params, x, baselines, targets=[0, 1]).transpose(0, 1)
    assert value.shape == (3, 2, 3)
    assert ((value - truth).abs() <= 5 * error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_data_is_kept(dtype):
    model = mlp()
    x, baselines = data()
    f, params = functionalize(mlp())
    truth = exact(f, params, x, baselines, targets=0)
    f, params = functionalize(model.to(dtype))
    got = expected_gradients(
        f, params, x.to(dtype), baselines=baselines.to(dtype), targets=0, samples=3000, chunk_size=500, generator=seeded()
    )
    assert got.value.dtype == got.standard_error.dtype == dtype
    torch.testing.assert_close(got.value.double(), truth, rtol=0, atol=0.1)


@pytest.mark.compile
def test_compiled_equals_eager():
    torch._dynamo.reset()
    f, params = functionalize(mlp())
    x, baselines = data()

    def run(f, params, x, baselines):
        return expected_gradients(f, params, x, baselines=baselines, targets=[0, 1], samples=4, noise=0.1, chunk_size=2)[:2]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    got = compiled(f, params, x, baselines)
    torch.manual_seed(0)
    for a, b in zip(got, run(f, params, x, baselines)):
        CLOSE(a, b)


X = torch.ones(3, 6)
SET = torch.ones(5, 6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"baselines": 0.0}, errors.InputError, r"baselines holds 0.0 .* a tensor \[N, 6\] like it"),
        ({"baselines": SET.double()}, errors.InputError, "baselines holds a float64 tensor"),
        (
            {"baselines": torch.ones(5, 7)},
            errors.InputError,
            r"shape \[5, 7\], which is no set .* give \[N, 6\], or \[N, \*\[3, 6\]\]",
        ),
        ({"baselines": torch.ones(6)}, errors.InputError, r"shape \[6\], which is no set"),
        ({"baselines": torch.ones(0, 6)}, errors.InputError, "baselines is an empty set"),
        ({"baselines": (SET, SET)}, errors.InputError, "baselines holds a tuple"),
        ({"samples": 0}, errors.InputError, "samples is an integer of at least 1, got 0"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None"),
        ({"noise": -1.0}, errors.InputError, "noise is a standard deviation of at least 0, got -1.0"),
        ({"noise": float("nan")}, errors.InputError, "noise is a standard deviation"),
        ({"generator": 0}, errors.InputError, "generator is 0"),
        ({"targets": 9}, errors.TargetError, "index=9 is out of range"),
        ({"targets": []}, errors.TargetError, "targets is empty"),
        ({"at": "9"}, errors.SiteError, "the model has no module '9'"),
        ({"at": "0", "baselines": {"0": torch.ones(5, 9)}}, errors.InputError, r"baselines for '0' holds .* is no set"),
        ({"at": "0", "baselines": 0.0}, errors.InputError, "baselines holds 0.0 .* for a float32 tensor .* a set of inputs"),
    ],
)
def test_bad_input(options, error, message):
    f, params = functionalize(nn.Sequential(nn.Linear(6, 4)))
    with pytest.raises(error, match=message):
        expected_gradients(f, params, X, **{"targets": 0, "baselines": SET, **options})


def test_sets_of_several_lengths_are_refused():
    f = lambda _, i: (i[0] * i[1]).sum(-1)  # noqa: E731
    with pytest.raises(errors.InputError, match=r"several lengths.*as many baselines for each tensor"):
        expected_gradients(f, {}, (X, X), baselines=(SET, SET[:2]))


def test_gradients_cannot_be_asked_for_without_grad_mode():
    with torch.no_grad(), pytest.raises(errors.GradientError, match="expected_gradients needs gradients"):
        expected_gradients(lambda _, x: x.sum(-1), {}, X, baselines=SET)
