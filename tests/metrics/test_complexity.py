"""Sparseness, entropy and counts: closed forms."""

from __future__ import annotations

import math
from functools import partial

import pytest
import scipy.stats
import torch
from tensordict import TensorDict
from torch.func import vmap

from tdhook.core import errors
from tdhook.metrics import complexity, effective_complexity, sparseness

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
METRICS = [sparseness, complexity, effective_complexity]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_feature_and_all_features():
    one, every = torch.eye(8).double()[:1] * -3, torch.full((1, 8), 0.7).double()
    CLOSE(sparseness(torch.cat([one, every])), torch.tensor([1 - 1 / 8, 0]).double())
    CLOSE(complexity(torch.cat([one, every])), torch.tensor([0, math.log(8)], dtype=torch.float64))
    CLOSE(effective_complexity(torch.cat([one, every])), torch.tensor([1, 8]).double())


def test_the_gini_index_is_half_the_relative_mean_difference():
    phi = draw(4, 3, 5)
    a = phi.abs().flatten(1)
    expected = (a[:, :, None] - a[:, None]).abs().mean((1, 2)) / (2 * a.mean(1))
    CLOSE(sparseness(phi), expected)


def test_the_entropy_equals_scipy():
    phi = draw(4, 3, 5)
    CLOSE(complexity(phi), torch.tensor(scipy.stats.entropy(phi.abs().flatten(1).numpy(), axis=1)))


def test_the_threshold_is_exclusive():
    phi = torch.tensor([[0.5, -0.5, 0.25, -0.75]])
    assert effective_complexity(phi, threshold=0.5).item() == 1 and effective_complexity(phi, threshold=0).item() == 4


@pytest.mark.parametrize("metric", METRICS)
def test_structures_are_taken_together(metric):
    a, b = draw(3, 4), draw(3, 2, 2, seed=1)
    expected = metric(torch.cat([a, b.flatten(1)], 1))
    CLOSE(metric((a, None, b)), expected)
    CLOSE(metric({"a": a, "b": b}), expected)
    CLOSE(metric(TensorDict({"a": a, "b": b}, [3])), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_leading_dimensions(metric):
    phi = draw(2, 3, 4, 5)
    whole = metric(phi, batch_dims=2)
    assert whole.shape == (2, 3)
    CLOSE(whole[1], metric(phi[1]))
    CLOSE(whole[1, 2], metric(phi[1, 2], batch_dims=0))
    CLOSE(vmap(vmap(partial(metric, batch_dims=0)))(phi), whole)


@pytest.mark.compile
@pytest.mark.parametrize("metric", METRICS)
def test_compiled(metric):
    phi = draw(3, 4, 5)
    CLOSE(torch.compile(metric, backend="aot_eager", fullgraph=True)(phi), metric(phi))


@pytest.mark.parametrize("metric", METRICS)
def test_scale_does_not_matter_and_half_types_give_float32(metric):
    phi = draw(3, 6)
    CLOSE(metric(7.0 * phi), metric(phi))
    assert metric(phi.half()).dtype == torch.float32


def test_zeros_and_what_is_not_a_number():
    bad = torch.tensor([[0.0, 0.0], [math.nan, 1.0]])
    assert sparseness(bad).isnan().all() and complexity(bad).isnan().all()
    counted = effective_complexity(bad)
    assert counted[0] == 0 and counted[1].isnan()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("phi", "options", "message"),
    [
        (torch.ones(2, 3).long(), {}, "attributions holds a int64 tensor"),
        ((), {}, "attributions is .* holds no tensor"),
        ("map", {}, "attributions holds 'map'"),
        (torch.ones(2, 3), {"batch_dims": 3}, "batch_dims is 0, 1 or 2, got 3"),
        (torch.ones(2), {"batch_dims": 2}, r"attributions holds .* \[2\]; the first batch_dims=2"),
        ((torch.ones(2, 3), torch.ones(3, 3)), {}, r"\[3, 3\]; the first batch_dims=1 dimensions"),
        (torch.ones(2, 0), {}, "which has no features"),
    ],
)
def test_bad_input(metric, phi, options, message):
    with pytest.raises(errors.InputError, match=message):
        metric(phi, **options)


def test_a_bad_threshold():
    with pytest.raises(errors.InputError, match="threshold is a number of at least 0, got -1"):
        effective_complexity(torch.ones(1, 2), threshold=-1)
