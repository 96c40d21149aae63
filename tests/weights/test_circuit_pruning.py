"""Circuit pruning against values written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import vmap

from tdhook import capture, functionalize
from tdhook.core.errors import InputError, ModelError, SiteError
from tdhook.weights.circuit_pruning import prune_circuit


@pytest.fixture
def fp():
    torch.manual_seed(0)
    return functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))


RELEVANCE = {"1": torch.tensor([4.0, 1.0, 6.0, 2.0]), "3": torch.tensor([3.0, 9.0, 0.5, 8.0, 7.0])}


def by_hand(f, params, x, masks, means=None):
    """Three layers written out, with units replaced."""
    means = means or {"1": torch.zeros(4), "3": torch.zeros(5)}
    h = torch.where(masks["1"], torch.tanh(x @ params["0", "weight"].T + params["0", "bias"]), means["1"])
    h = torch.where(masks["3"], torch.tanh(h @ params["2", "weight"].T + params["2", "bias"]), means["3"])
    return h @ params["4", "weight"].T + params["4", "bias"]


def test_units_of_all_sites_are_ranked_together(fp):
    f, params = fp
    x = torch.randn(6, 3)
    circuit = prune_circuit(f, RELEVANCE, 4)
    assert circuit.mask["1"].tolist() == [True, False, True, False]
    assert circuit.mask["3"].tolist() == [False, True, False, True, True]
    torch.testing.assert_close(circuit.f(params, x), by_hand(f, params, x, circuit.mask))


def test_units_of_each_site_are_ranked_by_themselves(fp):
    circuit = prune_circuit(fp[0], RELEVANCE, 0.5, scope="tensor")
    assert [int((~circuit.mask[site]).sum()) for site in ("1", "3")] == [2, 2]


def test_means_take_the_place_of_units(fp):
    f, params = fp
    x = torch.randn(6, 3)
    means = {site: value.mean(0) for site, value in capture(f, ["1", "3"])(params, torch.randn(20, 3))[1].items()}
    circuit = prune_circuit(f, RELEVANCE, 5, ablation=means)
    torch.testing.assert_close(circuit.f(params, x), by_hand(f, params, x, circuit.mask, means))


def test_nothing_and_everything(fp):
    f, params = fp
    x = torch.randn(6, 3)
    assert torch.equal(prune_circuit(f, RELEVANCE, 0.0).f(params, x), f(params, x))
    torch.testing.assert_close(prune_circuit(f, RELEVANCE, 1.0).f(params, x), params["4", "bias"].expand(6, 2))


def test_channels():
    f, params = functionalize(nn.Sequential(nn.Conv2d(1, 3, 1)))
    out = prune_circuit(f, {"0": torch.tensor([1.0, 0.0, 2.0])}, 1, axis=1).f(params, torch.randn(2, 1, 4, 4))
    assert (out[:, 1] == 0).all() and (out[:, [0, 2]] != 0).all()


def test_a_sweep_is_the_loop_and_compiles(fp):
    f, params = fp
    x = torch.randn(6, 3)
    amounts = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    swept = vmap(lambda a: prune_circuit(f, RELEVANCE, a).f(params, x))(amounts)
    torch.testing.assert_close(swept, torch.stack([prune_circuit(f, RELEVANCE, a).f(params, x) for a in amounts.tolist()]))


@pytest.mark.compile
def test_compiled_equals_eager(fp):
    f, params = fp
    x = torch.randn(6, 3)
    run = torch.compile(lambda p, a: prune_circuit(f, RELEVANCE, a).f(p, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(params, torch.tensor(0.4)), prune_circuit(f, RELEVANCE, 0.4).f(params, x))


def test_patterns_and_their_own_relevance():
    f, params = functionalize(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    circuit = prune_circuit(f, {"*": torch.tensor([1.0, 2.0])}, 0.5)
    assert circuit.mask["0"].tolist() == [False, True] and circuit.mask["1"].tolist() == [False, True]
    assert (circuit.f(params, torch.randn(3, 2))[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("relevance", "options", "error", "message"),
    [
        ({"nope": torch.ones(4)}, {}, SiteError, "unknown site 'nope'"),
        ({"1": torch.ones(2, 4)}, {}, InputError, r"relevance\['1'\] is .*; give a floating-point tensor \[U\]"),
        ({"1": torch.full((4,), torch.nan)}, {}, InputError, "holds NaN"),
        ({"1": torch.ones(4)}, {"scope": "output"}, InputError, "scope='output' is unknown"),
        ({"1": torch.ones(4)}, {"amount": 5}, InputError, "more than the 4 in all sites"),
        ({"1": torch.ones(4)}, {"ablation": {"3": torch.ones(4)}}, SiteError, "ablation has no '1'"),
        ({"1": torch.ones(4)}, {"ablation": "mean"}, InputError, "ablation is a number or a mapping"),
    ],
)
def test_bad_input(fp, relevance, options, error, message):
    with pytest.raises(error, match=message):
        prune_circuit(fp[0], relevance, **{"amount": 0.5, **options})


def test_what_does_not_fit_the_values(fp):
    f, params = fp
    with pytest.raises(SiteError, match=r"relevance at '1' has 3 units, but axis=-1 of the value there is .*\[2, 4\]"):
        prune_circuit(f, {"1": torch.ones(3)}, 1).f(params, torch.ones(2, 3))
    with pytest.raises(SiteError, match="does not broadcast"):
        prune_circuit(f, {"1": torch.ones(4)}, 1, ablation={"1": torch.ones(3)}).f(params, torch.ones(2, 3))
    with pytest.raises(ModelError, match="has no sites"):
        prune_circuit(lambda p, x: x, {"1": torch.ones(4)}, 1)
