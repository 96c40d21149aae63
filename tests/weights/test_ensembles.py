"""Ensembles of models: moments and rank correlations against scipy and loops."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

from tdhook import functionalize
from tdhook.attribution.saliency import saliency
from tdhook.core import errors
from tdhook.weights.ensembles import average_ranks, ensemble
from tdhook.weights.per_example import per_example_gradients

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def setting(models=4):
    torch.manual_seed(0)
    f, params = functionalize(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double())
    many = [params.apply(lambda p: p + 0.3 * torch.randn_like(p)) for _ in range(models)]
    return f, many, torch.randn(3, 5).double()


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_a_method_of_each_model(chunk_size):
    f, many, x = setting()
    found = ensemble(lambda p: saliency(f, p, x, targets=1), torch.stack(many), batch_dims=1, chunk_size=chunk_size)
    each = torch.stack([saliency(f, p, x, targets=1) for p in many])
    CLOSE(found.values, each)
    CLOSE(found.mean, each.mean(0))
    CLOSE(found.variance, (each - each.mean(0)).square().sum(0) / 3)
    for b in range(3):
        pairs = [spearmanr(each[m, b], each[n, b]).statistic for m, n in combinations(range(4), 2)]
        assert found.stability[b].item() == pytest.approx(np.mean(pairs))
    CLOSE(ensemble(lambda p: saliency(f, p, x, targets=1), many).values, each)


def test_without_batch_dimensions_all_numbers_are_ranked_together():
    f, many, x = setting(2)
    found = ensemble(lambda p: saliency(f, p, x, targets=1), many)
    first, second = (value.flatten() for value in found.values)
    assert found.stability.item() == pytest.approx(spearmanr(first, second).statistic)


def test_the_same_and_the_opposite_ranking():
    params = TensorDict({"s": torch.tensor([1.0, 2.0, -1.0]).double()}, [3])
    row = torch.tensor([1.0, 5.0, 2.0]).double()
    CLOSE(ensemble(lambda p: p["s"] * row, params[:2]).stability, torch.tensor(1.0).double())
    CLOSE(ensemble(lambda p: p["s"] * row, params[1:]).stability, torch.tensor(-1.0).double())
    CLOSE(ensemble(lambda p: p["s"] * row, params).stability, torch.tensor(-1 / 3, dtype=torch.float64))


def test_ties_share_their_rank():
    values = torch.tensor([[3.0, 1.0, 3.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    CLOSE(average_ranks(values), torch.tensor(rankdata(values.numpy(), axis=1)).float())


def test_constant_results_have_no_stability():
    params = TensorDict({"s": torch.tensor([1.0, 2.0])}, [2])
    assert ensemble(lambda p: p["s"] * torch.ones(3), params).stability.isnan()
    assert ensemble(lambda p: p["s"] * torch.tensor([1.0, torch.nan, 2.0]), params).stability.isnan()


class Two(NamedTuple):
    first: torch.Tensor
    second: dict


def test_structures_are_kept():
    f, many, x = setting(2)
    found = ensemble(lambda p: Two(f(p, x), {"p": (p["0", "bias"],)}), many)
    assert isinstance(found.mean, Two) and found.mean.second["p"][0].shape == (6,)
    nested = ensemble(lambda p: per_example_gradients(f, p, x, lambda out: out.sum()), many)
    assert nested.mean["0", "weight"].shape == (3, 6, 5) and nested.stability["0", "weight"].shape == ()


@pytest.mark.compile
def test_under_vmap_and_compiled():
    f, many, x = setting()
    stacked = torch.stack(many)

    def run(stacked, x):
        found = ensemble(lambda p: saliency(f, p, x, targets=1), stacked, batch_dims=1)
        return found.mean, found.variance, found.stability

    CLOSE(torch.compile(run, backend="aot_eager", fullgraph=True)(stacked, x), run(stacked, x))
    together = vmap(lambda s: run(stacked, x * s))(torch.tensor([1.0, 2.0]).double())
    for one, other in zip(together, run(stacked, x * 2)):
        CLOSE(one[1], other)


def test_bad_input():
    f, many, x = setting()
    run = partial(ensemble, lambda p: f(p, x))
    with pytest.raises(errors.InputError, match=r"batch size \[\]; give at least two models"):
        run(many[0])
    with pytest.raises(errors.InputError, match=r"batch size \[1\]"):
        run(many[:1])
    with pytest.raises(errors.ParamsError, match=r"stacked_params\[1\]"):
        run([many[0], functionalize(nn.Linear(5, 3))[1]])
    with pytest.raises(errors.InputError, match="method is 3"):
        ensemble(3, many)
    with pytest.raises(errors.InputError, match="at least 3 dimensions"):
        run(many, batch_dims=3)
    with pytest.raises(errors.InputError, match="floating-point tensors"):
        ensemble(lambda p: f(p, x).argmax(-1), many)
