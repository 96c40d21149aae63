"""What holds for every perturbation method: chunks, draws, structures, sites, vmap, compilation, memory, bad input."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

from tdhook import functionalize, targets
from tdhook.attribution.ablation import feature_ablation, feature_permutation
from tdhook.attribution.kernel_shap import kernel_shap
from tdhook.attribution.lime import lime
from tdhook.attribution.occlusion import occlusion
from tdhook.attribution.shapley import shapley_value_sampling, shapley_values
from tdhook.core import errors
from tdhook.core.estimate import Estimate
from tdhook.core.groups import Groups

from .games import CLOSE, Largest, TwoInputs, prepared, two_inputs


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


SAMPLED = {
    "feature_permutation": partial(feature_permutation, samples=3),
    "shapley_value_sampling": partial(shapley_value_sampling, samples=6),
    "antithetic": partial(shapley_value_sampling, samples=6, antithetic=True),
    "kernel_shap": partial(kernel_shap, samples=30),
    "lime": partial(lime, samples=30),
}
EXACT = {
    "feature_ablation": feature_ablation,
    "occlusion": partial(occlusion, window=1),
    "shapley_values": shapley_values,
    "kernel_shap_exact": partial(kernel_shap, samples=1024),
}
METHODS = {**EXACT, **SAMPLED}
FAITHFUL = {"lime": {"ridge": 0}}
every_method = pytest.mark.parametrize("name", METHODS)
every_sampled = pytest.mark.parametrize("name", SAMPLED)


def run(name, *args, seed=0, **options):
    """The value, and for an estimate the standard error."""
    if name in SAMPLED and seed is not None:
        options["generator"] = seeded(seed)
    got = METHODS[name](*args, **options)
    return got[:2] if isinstance(got, Estimate) else (got,)


def close(got, expected, **tolerances):
    for a, b in zip(got, expected, strict=True):
        CLOSE(a, b, equal_nan=True, **tolerances)


@every_method
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 10**6])
def test_chunks_change_nothing(name, chunk_size):
    f, params, x = prepared()
    whole = run(name, f, params, x, targets=[0, 2])
    close(run(name, f, params, x, targets=[0, 2], chunk_size=chunk_size), whole)


@every_method
def test_plural_targets_are_the_single_ones(name):
    f, params, x = prepared()
    plural = run(name, f, params, x, targets=[2, 0])
    for which, target in enumerate((2, 0)):
        close([part[which] for part in plural], run(name, f, params, x, targets=target))
    one = run(name, f, params, x, targets=[2])
    assert one[0].shape == (1, 3, 5)


@every_method
def test_targets_share_the_passes(name):
    count = []

    def f(params, x):
        count.append(1)
        return torch.stack([x.sum(-1), x.prod(-1), x.exp().sum(-1)], -1)

    calls = []
    for chosen in (0, targets.every()):
        count.clear()
        run(name, f, None, torch.randn(2, 5), targets=chosen, chunk_size=4)
        calls.append(len(count))
    assert calls[0] == calls[1]


@every_method
@pytest.mark.parametrize("kind", ["tuple", "dict", "tensordict"])
def test_structures_of_inputs(name, kind):
    model, (a, b) = TwoInputs(), two_inputs()
    f, params = functionalize(model)
    expected = run(name, f, params, (a, b), targets=[0, 1])
    inputs = {"a": a, "b": b}
    if kind == "tuple":
        g, inputs = (lambda p, i: f(p, i[:2])), (a, b, torch.arange(3))
    elif kind == "tensordict":
        g, inputs = (lambda p, i: f(p, (i["a"], i["b"]))), TensorDict(inputs, batch_size=[3])
    else:
        g = f
    got = run(name, g, params, inputs, targets=[0, 1])
    for result, (first, second) in zip(got, expected, strict=True):
        assert type(result) is type(inputs)
        if kind == "tuple":
            assert result[2] is None
            pair = result[:2]
        else:
            pair = (result["a"], result["b"])
        close(pair, (first, second))
        if kind == "tensordict":
            assert result.batch_size == (2, 3)


@every_method
def test_at_a_site_is_the_method_on_the_tail(name):
    f, params, x = prepared()
    baseline = torch.full((1, 8), 0.3).double()
    options, tail = {}, {}
    if name != "feature_permutation":
        options["baselines"], tail["baselines"] = {"1": baseline}, baseline
    if name == "occlusion":
        options["window"], tail["window"] = {"1": 2}, 2
    hidden = nn.functional.linear(x, params["0", "weight"], params["0", "bias"]).tanh()
    last = lambda p, h: nn.functional.linear(h, p["2", "weight"], p["2", "bias"])  # noqa: E731
    got = run(name, f, params, x, targets=[0, 1], at="1", **options)
    close([part["1"] for part in got], run(name, last, params, hidden, targets=[0, 1], **tail))
    if name != "occlusion":
        ids = torch.arange(8) % 4
        got = run(name, f, params, x, targets=[0, 1], at="1", groups={"1": ids}, **options)
        close(got, run(name, last, params, hidden, targets=[0, 1], groups=ids, **tail))


every_grouped = pytest.mark.parametrize("name", [n for n in METHODS if n != "occlusion"])


@every_grouped
def test_groups_give_one_tensor_for_all_inputs(name):
    f, params = functionalize(TwoInputs())
    a, b = two_inputs()
    alone = run(name, f, params, (a, b), targets=[0, 2])
    ids = torch.arange(4).reshape(2, 2), torch.tensor([5, 4, 6])
    for got, (first, second) in zip(run(name, f, params, (a, b), targets=[0, 2], groups=ids), alone, strict=True):
        assert got.shape == (2, 3, 7)
        if name in EXACT:  # other numbers of groups are other draws
            close((got[..., ids[0]], got[..., ids[1]]), (first, second))
    assert run(name, f, params, (a, b), targets=0, groups=ids)[0].shape == (3, 7)


@every_grouped
def test_groups_of_examples_of_their_own(name):
    f, params, x = prepared(batch=2)
    ids = torch.tensor([[0, 1, 1, 2, 3], [3, 2, 2, 1, 0]])
    both = run(name, f, params, x, targets=0, groups=ids)
    if name == "feature_permutation":  # which needs the other example
        assert both[0].shape == (2, 4)
        return
    for example in range(2):
        one = run(name, f, params, x[example : example + 1], targets=0, groups=ids[example])
        close([part[example : example + 1] for part in both], one)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("occlusion", "feature_permutation")])
def test_groups_without_a_batch_axis(name):
    ids = torch.tensor([[0, 1, 2], [0, 1, 2]])
    w = torch.tensor([1.0, -2, 5]).double()
    got = run(name, lambda params, x: (x * w).sum(), None, torch.ones(2, 3).double(), groups=ids, **FAITHFUL.get(name, {}))
    CLOSE(got[0], 2 * w)


@every_grouped
def test_group_scores_of_inputs_of_two_dtypes_have_the_wider_one(name):
    a, b = torch.randn(3, 2), torch.randn(3, 2).double()
    ids = torch.tensor([0, 1]), torch.tensor([1, 2])
    got = run(name, lambda params, x: x[0].sum(-1) + x[1].prod(-1), None, (a, b), groups=ids)
    assert all(part.dtype == torch.float64 for part in got)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "feature_permutation"])
def test_under_vmap_over_examples(name):
    f, params, x = prepared()
    whole = run(name, f, params, x, targets=[0, 2])
    each = vmap(lambda row: tuple(run(name, f, params, row, targets=[0, 2])), randomness="same")(x)
    close([part.transpose(0, 1) for part in each], whole)


@every_method
def test_under_vmap_over_models(name):
    models = [prepared()[1] for _ in range(2)]
    f, _, x = prepared()
    models[1] = models[1].apply(lambda t: t * 0.7)
    each = vmap(lambda p: tuple(run(name, f, p, x, targets=0)), randomness="same")(torch.stack(models))
    for which, params in enumerate(models):
        close([part[which] for part in each], run(name, f, params, x, targets=0))


@every_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradients_are_needed(name, mode):
    f, params, x = prepared()
    expected = run(name, f, params, x, targets=1)
    with mode():
        close(run(name, f, params, x, targets=1), expected)


@every_method
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float32, 1e-4)])
def test_the_dtype_of_the_data_is_kept(name, dtype, tolerance):
    f, params, x = prepared(batch=2)
    exact = run(name, f, params, x, targets=1)[0]
    got = run(name, f, params.to(dtype), x.to(dtype), targets=1)[0]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


@every_method
def test_nothing_of_the_caller_is_changed(name):
    f, params, x = prepared()
    options = {} if name == "feature_permutation" else {"baselines": torch.randn(3, 5).double()}
    if name != "occlusion":
        options["groups"] = torch.tensor([0, 1, 1, 2, 3])
    before = copy.deepcopy((x, params.clone(), options, torch.get_rng_state()))
    run(name, f, params, x, targets=[0, 1], **options)
    assert torch.equal(x, before[0]) and (params == before[1]).all() and torch.equal(torch.get_rng_state(), before[3])
    assert all(torch.equal(options[key], before[2][key]) for key in options)
    assert not x.requires_grad and not any(p.requires_grad for p in params.values(True, True))


@every_sampled
def test_draws_come_from_the_generator(name):
    f, params, x = prepared(features=6)
    first = run(name, f, params, x, targets=0, seed=1)[0]
    assert torch.equal(run(name, f, params, x, targets=0, seed=1)[0], first)
    assert not torch.allclose(run(name, f, params, x, targets=0, seed=2)[0], first, rtol=1e-3)
    torch.manual_seed(1)
    from_global = run(name, f, params, x, targets=0, seed=None)[0]
    torch.manual_seed(1)
    assert torch.equal(run(name, f, params, x, targets=0, seed=None)[0], from_global)


@every_sampled
def test_progress_and_memory(name):
    """With few groups of a large input nothing is as large as two copies of the batch, whatever the number of samples."""
    w = torch.randn(1000).double()
    x, ids = torch.randn(2, 1000).double(), torch.arange(1000) % 5
    seen = []
    options = {"samples": 20, "chunk_size": 1, "groups": ids, "progress": lambda done, total: seen.append((done, total))}
    with Largest() as largest:
        run(name, lambda params, x: (x * w).tanh().sum(-1), None, x, **options)
    assert largest.numel <= 2 * x.numel()
    with Largest() as unbounded:
        run(name, lambda params, x: (x * w).tanh().sum(-1), None, x, **{**options, "chunk_size": None, "progress": None})
    assert unbounded.numel > 2 * x.numel()  # so the measure sees what vmap makes
    total = 10 if name == "kernel_shap" else 20
    assert seen[0] == (0, total) and seen[-1] == (total, total) and len(seen) > 10


@pytest.mark.parametrize("name", EXACT)
def test_progress_of_a_sweep(name):
    f, params, x = prepared()
    seen = []
    run(name, f, params, x, targets=0, chunk_size=2, progress=lambda done, total: seen.append((done, total)))
    total = 31 if "sha" in name else 5
    assert seen == [(min(i, total), total) for i in range(0, total + 2, 2)]


@every_method
def test_ready_groups_are_taken(name):
    if name == "occlusion":
        return
    f, params, x = prepared()
    ids = torch.tensor([0, 1, 1, 2, 3])
    close(run(name, f, params, x, targets=0, groups=Groups([ids], 4)), run(name, f, params, x, targets=0, groups=ids))


@every_method
def test_a_model_that_writes_into_its_own_tensors(name):
    def f(params, x):
        out = torch.zeros(x.shape[0], 2, dtype=x.dtype)
        out[:, :1] = x.prod(-1, keepdim=True)
        return out

    x = torch.randn(3, 4).double()
    with pytest.warns(errors.TdhookWarning, match="vmap cannot run this model"):
        got = run(name, f, None, x, targets=0)
    close(got, run(name, lambda params, x: x.prod(-1), None, x))


@every_method
def test_a_model_in_train_mode_is_warned_about(name):
    f, params = functionalize(nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 1)).train())
    with pytest.warns(errors.TdhookWarning, match="model is in train mode"):
        run(name, f, params, torch.randn(3, 5), targets=0)


@pytest.mark.compile
@every_method
def test_compiled_equals_eager(name):
    torch._dynamo.reset()
    f, params, x = prepared()
    options = {"targets": [0, 2], "chunk_size": 7}
    if name != "occlusion":
        options["groups"] = Groups([torch.tensor([0, 1, 1, 2, 3])], 4)
    if name == "kernel_shap":
        options["samples"] = 10
    method = METHODS[name]
    compiled = torch.compile(partial(method, **options), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = method(f, params, x, **options)
    torch.manual_seed(0)
    got = compiled(f, params, x)
    first, second = ((r[:2] if isinstance(r, Estimate) else (r,)) for r in (got, expected))
    close(first, second, rtol=1e-9)


X = torch.ones(3, 5).double()


@every_method
@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (X.long(), {}, errors.InputError, "no floating-point tensor"),
        (X, {"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None, got 0"),
        (X, {"targets": []}, errors.TargetError, "targets is empty"),
        (X, {"targets": 3}, errors.TargetError, "index=3 is out of range"),
        (X, {"targets": None}, errors.TargetError, "needs an output of one scalar per example"),
        (X, {"at": "7"}, errors.SiteError, "the model has no module '7'"),
        (X, {"baselines": torch.ones(4, 5).double()}, errors.InputError, r"baselines .* does not broadcast to \[3, 5\]"),
        (X, {"baselines": "zero"}, errors.InputError, "baselines holds 'zero'"),
        (X, {"groups": torch.ones(5)}, errors.InputError, "groups holds a float32 tensor"),
        (X, {"groups": torch.tensor([0, 1])}, errors.InputError, r"groups holds .* does not broadcast to \[3, 5\]"),
        (X, {"samples": 0}, errors.InputError, "samples is an integer of at least"),
        (X, {"generator": 0}, errors.InputError, "generator is 0 .*; give a torch.Generator"),
    ],
)
def test_bad_input(name, inputs, options, error, message):
    absent = {"occlusion": {"groups"}, "feature_permutation": {"baselines"}}.get(name, set())
    if name in EXACT and name != "kernel_shap_exact":
        absent = absent | {"samples", "generator"}
    if absent & set(options):
        return
    f, params, _ = prepared()
    with pytest.raises(error, match=message):
        METHODS[name](f, params, inputs, **{"targets": 0, **options})
