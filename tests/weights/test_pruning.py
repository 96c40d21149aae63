"""Pruning against torch.nn.utils.prune, and its laws."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from tensordict import TensorDict
from torch import nn
from torch.func import grad, vmap

from tdhook import functionalize
from tdhook.core.errors import InputError, ParamsError
from tdhook.weights.pruning import prune, pruner
from tdhook.weights.scores import magnitude
from tdhook.weights.selection import flat
from tdhook.weights.units import Units


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 7)).eval()


@pytest.fixture
def net():
    return model()


@pytest.fixture
def fp(net):
    return functionalize(net)


def pruned_by_torch(net, prune_it):
    """The weights after torch has pruned a copy of the model."""
    other = copy.deepcopy(net)
    prune_it(other)
    return {"0": other[0].weight.detach(), "4": other[4].weight.detach()}


# Against torch.nn.utils.prune -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0.0, 0.17, 0.5, 1.0, 0, 31, 486])
def test_global_magnitude_is_that_of_torch(net, fp, amount):
    expected = pruned_by_torch(
        net,
        lambda m: torch_prune.global_unstructured(
            [(m[0], "weight"), (m[4], "weight")], torch_prune.L1Unstructured, amount=amount
        ),
    )
    got = prune(fp[1], magnitude, amount).params
    assert all(torch.equal(got[path, "weight"], weight) for path, weight in expected.items())


@pytest.mark.parametrize("amount", [0.17, 0.5, 5])
def test_magnitude_within_each_tensor_is_that_of_torch(net, fp, amount):
    expected = pruned_by_torch(net, lambda m: [torch_prune.l1_unstructured(m[i], "weight", amount) for i in (0, 4)])
    got = prune(fp[1], magnitude, amount, scope="tensor").params
    assert all(torch.equal(got[path, "weight"], weight) for path, weight in expected.items())


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("amount", [0.5, 1])
def test_units_are_those_of_torch(net, fp, dim, order, amount):
    expected = pruned_by_torch(net, lambda m: [torch_prune.ln_structured(m[i], "weight", amount, order, dim) for i in (0, 4)])
    got = prune(fp[1], magnitude, amount, scope="tensor", structure=dim, order=order).params
    assert all(torch.equal(got[path, "weight"], weight) for path, weight in expected.items())


# Numbers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 10, 25])
@pytest.mark.parametrize("amount", [0.0, 0.05, 0.1, 0.25, 0.5, 0.3, 0.999, 1.0])
def test_the_number_is_exact_also_among_equal_scores(n, amount):
    params = TensorDict(w=torch.ones(n))
    for a in (amount, torch.tensor(amount, dtype=torch.float64)):
        mask = prune(params, params, a).mask["w"]
        assert (~mask).sum() == round(amount * n)
        assert torch.equal(mask, mask.sort().values)  # the first ones go


def test_low_scores_go_first_and_negative_ones_before_all():
    params = TensorDict(a=torch.tensor([1.0, 2.0]), b=torch.tensor([3.0, 4.0]))
    scores = TensorDict(b=torch.tensor([-5.0, 0.5]), a=torch.tensor([0.0, 9.0]))
    result = prune(params, scores, 2)
    assert result.params["a"].tolist() == [0, 2] and result.params["b"].tolist() == [0, 4]


def test_equal_scores_go_in_the_order_of_params():
    params = TensorDict(a=torch.ones(2), b=torch.ones(2))
    mask = prune(params, TensorDict(b=torch.ones(2), a=torch.ones(2)), 3).mask
    assert mask["a"].tolist() == [False, False] and mask["b"].tolist() == [False, True]


def test_within_each_output():
    params = TensorDict(w=torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 7.0, 6.0, 5.0]]))
    result = prune(params, magnitude, 0.5, scope="output")
    assert result.params["w"].tolist() == [[0, 0, 3, 4], [8, 7, 0, 0]]


def test_heads_are_blocks_of_columns():
    w = torch.ones(3, 6)
    w[:, 2:4] = 0.5
    result = prune(TensorDict(w=w), magnitude, 1, structure=Units(1, size=2))
    assert result.params["w"].tolist() == [[1, 1, 0, 0, 1, 1]] * 3
    assert result.mask["w"].shape == (3, 6)


def test_scores_of_units_are_taken_as_they_are():
    result = prune(TensorDict(w=torch.ones(3, 4)), TensorDict(w=torch.tensor([3.0, 1.0, 2.0])), 2, structure=0)
    assert result.params["w"].sum(1).tolist() == [4, 0, 0]


def test_a_head_whose_output_is_pruned_adds_nothing():
    """Attention written out: no columns of head 1 in the output projection is no head 1."""
    torch.manual_seed(0)
    heads = torch.randn(5, 3, 4)
    out = torch.randn(7, 12)
    scores = TensorDict(w=torch.tensor([1.0, 0.0, 2.0]))
    pruned = prune(TensorDict(w=out), scores, 1, structure=Units(1, size=4)).params["w"]
    without = heads.clone()
    without[:, 1] = 0
    torch.testing.assert_close(heads.flatten(1) @ pruned.T, without.flatten(1) @ out.T)


def test_tied_units_go_together(fp):
    _, params = fp
    scores = params.select(("0", "weight"), ("0", "bias"), ("1", "weight"), ("1", "bias")).apply(torch.abs)
    result = prune(params, scores, 2, structure=0, tied=lambda name: "channels")
    total = sum(score.reshape(6, -1).sum(1) for score in flat(scores).values())
    gone = total.argsort()[:2].sort().values
    for key, mask in flat(result.mask).items():
        dead = (~mask).reshape(6, -1).all(1).nonzero()[:, 0]
        assert torch.equal(dead, gone), key


def test_a_mapping_of_structures_prunes_what_it_names(fp):
    result = prune(fp[1], magnitude, 0.5, scope="tensor", structure={"0": 0, "4.weight": Units(1, size=9)})
    assert (result.params["0", "weight"].flatten(1) == 0).all(1).sum() == 3
    assert (result.params["4", "weight"].reshape(7, 6, 9) == 0).all(2).all(0).sum() == 3


def test_select_narrows_what_is_scored(fp):
    result = prune(fp[1], magnitude, 1.0, select="4")
    assert list(flat(result.mask)) == [("4", "weight")]
    assert result.params["0", "weight"] is fp[1]["0", "weight"]


def test_infinite_weights_become_zero():
    assert prune(TensorDict(w=torch.tensor([torch.inf, 1.0])), TensorDict(w=torch.tensor([0.0, 1.0])), 1).params["w"][0] == 0


# Transformations --------------------------------------------------------------------------------------------------------


def test_a_sweep_over_amounts_is_the_loop(fp):
    f, params = fp
    x = torch.randn(3, 2, 5, 5)
    amounts = torch.tensor([0.0, 0.1, 0.5, 0.95, 1.0], dtype=torch.float64)
    scores = magnitude(params)
    for options in ({}, {"scope": "tensor"}, {"structure": 0}, {"scope": "output"}):
        swept = vmap(lambda a, o=options: f(prune(params, scores, a, **o).params, x))(amounts)
        looped = torch.stack([f(prune(params, scores, a, **options).params, x) for a in amounts.tolist()])
        torch.testing.assert_close(swept, looped)


@pytest.mark.parametrize("options", [{}, {"scope": "tensor"}, {"structure": 0}, {"scope": "output"}])
def test_a_pruner_ranks_once_for_all_amounts(fp, options, monkeypatch):
    _, params = fp
    pruned_by = pruner(params, magnitude, **options)
    monkeypatch.setattr(torch.Tensor, "sort", None)
    found = [pruned_by(amount) for amount in (0.0, 0.3, 1.0)]
    swept = vmap(lambda a: pruned_by(a).params["4", "weight"], chunk_size=1)(torch.tensor([0.0, 0.3, 1.0]))
    monkeypatch.undo()
    for amount, pruned, weight in zip((0.0, 0.3, 1.0), found, swept):
        expected = prune(params, magnitude, amount, **options)
        assert torch.equal(pruned.params["4", "weight"], expected.params["4", "weight"])
        assert torch.equal(pruned.mask["0", "weight"], expected.mask["0", "weight"])
        assert torch.equal(weight, expected.params["4", "weight"])


@pytest.mark.parametrize("count", range(7))
def test_of_equal_scores_one_selection_and_a_ranking_take_the_same(count):
    params = TensorDict(a=torch.ones(4), b=torch.ones(2))
    scores = TensorDict(a=torch.tensor([1.0, 0.0, -0.0, torch.inf]), b=torch.tensor([0.0, -torch.inf]))
    once, ranked = prune(params, scores, count), pruner(params, scores)(count)
    for key in ("a", "b"):
        assert torch.equal(once.mask[key], ranked.mask[key])
    assert sum(int((~mask).sum()) for mask in once.mask.values()) == count


def test_a_pruner_refuses_amounts_out_of_range(fp):
    with pytest.raises(InputError, match=r"amount=1\.5 is a fraction"):
        pruner(fp[1], magnitude)(1.5)


def test_a_sweep_over_counts():
    params = TensorDict(w=torch.arange(1.0, 6))
    left = vmap(lambda k: (prune(params, params, k).params["w"] > 0).sum())(torch.arange(6))
    assert left.tolist() == [5, 4, 3, 2, 1, 0]


def test_stacked_checkpoints_are_pruned_each_by_itself(fp):
    params = fp[1]
    other = params.apply(lambda t: 3 * t if t.is_floating_point() else t)
    both = vmap(lambda p: prune(p, magnitude, 0.4).params)(torch.stack([params, other]))
    for i, p in enumerate((params, other)):
        assert torch.equal(both["4", "weight"][i], prune(p, magnitude, 0.4).params["4", "weight"])


def test_gradients_pass_where_weights_are_kept(fp):
    _, params = fp
    scores = magnitude(params)

    def loss(weight):
        new = params.clone(False)
        new["4", "weight"] = weight
        return prune(new, scores, 0.5).params["4", "weight"].sum()

    assert torch.equal(grad(loss)(params["4", "weight"]), prune(params, scores, 0.5).mask["4", "weight"].float())


@pytest.mark.compile
@pytest.mark.parametrize("options", [{}, {"structure": 0, "scope": "tensor"}, {"scope": "output", "select": "4.*"}])
def test_compiled_equals_eager(fp, options):
    f, params = fp
    x, amount = torch.randn(3, 2, 5, 5), torch.tensor(0.3)
    run = torch.compile(lambda p, a: f(prune(p, magnitude, a, **options).params, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(params, amount), f(prune(params, magnitude, amount, **options).params, x))


def test_keys_dtypes_and_buffers_are_kept(fp):
    params = fp[1]
    half = params.apply(lambda t: t.bfloat16() if t.is_floating_point() else t)
    new = prune(half, magnitude, 0.5).params
    assert list(flat(new)) == list(flat(half))
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(flat(new).values(), flat(half).values()))
    assert new["1", "num_batches_tracked"] is half["1", "num_batches_tracked"]


def test_memory_mapped_params(fp, tmp_path):
    mapped = fp[1].memmap(tmp_path)
    before = mapped["4", "weight"].clone()
    new = prune(mapped, magnitude, 0.5, select="0").params
    assert new["4"].get("weight") is mapped["4"].get("weight")
    assert torch.equal(new["0", "weight"], prune(fp[1], magnitude, 0.5, select="0").params["0", "weight"])
    assert torch.equal(mapped["4", "weight"], before)
    new["0", "weight"].zero_()
    assert mapped["0", "weight"].abs().sum() > 0


def test_nothing_of_the_caller_is_changed(fp):
    _, params = fp
    scores = magnitude(params)
    before, scores_before = params.clone(), scores.clone()
    prune(params, scores, 0.5).params.apply_(lambda t: t)
    with pytest.raises(InputError):
        prune(params, scores, 1.5)
    assert (params == before).all() and (scores == scores_before).all()


# Bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        (1.5, "amount=1.5 is a fraction, which is from 0 to 1; for a count give an int"),
        (-0.1, "is a fraction, which is from 0 to 1"),
        (-1, "amount=-1 is a count, which is not negative"),
        (487, "amount=487 is a count of more than the 486 in all scores; a fraction is a float"),
        (torch.tensor(487), "count of more than the 486"),
        (torch.tensor(1.5), "is a fraction"),
        (torch.tensor([0.1, 0.2]), "use torch.func.vmap over amount"),
        (True, "amount is a float from 0 to 1"),
        (float("nan"), "is a fraction"),
        ("half", "amount is a float from 0 to 1"),
    ],
)
def test_amounts_out_of_range(fp, amount, message):
    with pytest.raises(InputError, match=message):
        prune(fp[1], magnitude, amount)


def test_a_count_larger_than_one_tensor(fp):
    with pytest.raises(InputError, match=r"more than the 108 in '0.weight'"):
        prune(fp[1], magnitude, 109, scope="tensor")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scope": "layer"}, InputError, "scope='layer' is unknown; choose from 'global', 'tensor', 'output'"),
        ({"order": 3}, InputError, "order=3 is unknown"),
        ({"structure": "rows"}, InputError, "structure is None, a dimension, Units"),
        ({"structure": 5}, ParamsError, "'0.weight' is .* which has no dimension 5"),
        ({"structure": Units(0, size=4)}, ParamsError, "units of size 4 do not divide dimension 0 of '0.weight'"),
        ({"structure": {"9": 0}}, ParamsError, "structure='9': params has no such parameter"),
        ({"structure": {"0": 0}, "select": "4"}, ParamsError, "structure names no parameter that select names too"),
        ({"structure": 0, "scope": "output"}, InputError, "leave structure and tied out"),
        ({"structure": 0, "tied": lambda name: "all"}, ParamsError, "same number of units: 6 in '0.weight', 7 in '4.weight'"),
        ({"select": "5"}, ParamsError, "select='5': params has no such parameter"),
    ],
)
def test_options_that_do_not_fit(fp, options, error, message):
    with pytest.raises(error, match=message):
        prune(fp[1], magnitude, 0.5, **options)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (TensorDict(nope=torch.ones(2)), ParamsError, "scores has 'nope', which params has not"),
        (TensorDict(w=torch.ones(3)), ParamsError, r"scores\['w'\] is .*\[3\], but the parameter is .*\[2\]"),
        (TensorDict(w=torch.ones(2).long()), ParamsError, "both have to be floating-point"),
        (TensorDict(w=torch.tensor([1.0, torch.nan])), InputError, r"scores\['w'\] holds NaN"),
        ({"w": torch.ones(2)}, ParamsError, "scores is a TensorDict"),
    ],
)
def test_scores_that_do_not_fit(scores, error, message):
    with pytest.raises(error, match=message):
        prune(TensorDict(w=torch.ones(2)), scores, 0.5)


def test_params_that_are_no_params(fp):
    with pytest.raises(ParamsError, match=r"params is a TensorDict as tdhook.functionalize"):
        prune({"w": torch.ones(2)}, magnitude, 0.5)
    with pytest.raises(ParamsError, match=r"params has batch size \[2\].*use torch.func.vmap"):
        prune(torch.stack([fp[1], fp[1]]), magnitude, 0.5)
