"""Localisation: counts by hand."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch.func import vmap

from tdhook.core import errors
from tdhook.metrics import pointing_game, relevance_mass_accuracy, relevance_rank_accuracy, top_k_intersection

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
METRICS = {
    "mass": relevance_mass_accuracy,
    "rank": relevance_rank_accuracy,
    "top_k": partial(top_k_intersection, k=2),
    "pointing": pointing_game,
}

PHI = torch.tensor([[5.0, -9.0, 3.0, 1.0], [1.0, 2.0, 3.0, 4.0]]).double()
MASK = torch.tensor([[True, True, False, False], [False, True, True, True]])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_by_hand():
    CLOSE(relevance_mass_accuracy(PHI, MASK), values(5 / 9, 9 / 10))
    CLOSE(relevance_mass_accuracy(PHI, MASK, absolute=True), values(14 / 18, 9 / 10))
    CLOSE(relevance_rank_accuracy(PHI, MASK), values(1 / 2, 1))
    CLOSE(relevance_rank_accuracy(PHI, MASK, absolute=True), values(1, 1))
    CLOSE(top_k_intersection(PHI, MASK, k=3), values(1 / 3, 1))
    CLOSE(top_k_intersection(PHI, MASK, k=1), values(1, 1))
    CLOSE(pointing_game(PHI, MASK), values(1, 1))
    CLOSE(pointing_game(PHI, ~MASK), values(0, 0))
    CLOSE(pointing_game(-PHI, MASK), values(1, 0))
    CLOSE(pointing_game(PHI, ~MASK & (PHI < 0), absolute=True), values(0, 0))


def test_ties_are_the_mean_over_their_orders():
    phi, mask = values(3, 2, 2, 2, 1), torch.tensor([True, True, False, True, False])
    for k in (1, 2, 3, 5):
        shares = []
        for order in itertools.permutations(range(5)):
            top = sorted(order, key=lambda i: -phi[i])[:k]  # a stable sort: ties as in the order
            shares.append(sum(bool(mask[i]) for i in top) / k)
        CLOSE(top_k_intersection(phi[None], mask[None], k=k), values(sum(shares) / len(shares)))
    CLOSE(relevance_rank_accuracy(phi[None], mask[None]), top_k_intersection(phi[None], mask[None], k=3))
    CLOSE(pointing_game(values(2, 2, 1)[None], torch.tensor([[True, False, True]])), values(0.5))


def test_zeros_score_the_share_of_the_mask_and_nothing_is_not_a_number():
    zero, mask = torch.zeros(1, 8).double(), torch.arange(8)[None] < 3
    for name in ("rank", "top_k", "pointing"):
        CLOSE(METRICS[name](zero, mask), values(3 / 8))
    assert relevance_mass_accuracy(zero, mask).isnan() and relevance_mass_accuracy(zero - 1, mask).isnan()
    assert relevance_rank_accuracy(zero + 1, mask & False).isnan()
    for metric in METRICS.values():
        assert metric(torch.where(mask, math.nan, zero), mask).isnan()


@pytest.mark.parametrize("tolerance", [1, 2, 5])
def test_a_maximum_within_the_tolerance_is_a_hit(tolerance):
    mask = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    mask[..., 4, 3] = True
    phi = torch.eye(81).double().reshape(81, 1, 9, 9)
    got = pointing_game(phi, mask, tolerance=tolerance).reshape(9, 9)
    places = torch.arange(9)
    near = (places[:, None] - 4) ** 2 + (places - 3) ** 2 <= tolerance**2
    CLOSE(got, near.double())


@pytest.mark.parametrize("name", METRICS)
def test_leading_dimensions(name):
    metric = METRICS[name]
    phi, mask = draw(2, 3, 1, 4, 5), draw(3, 1, 4, 5, seed=1) > 0
    whole = metric(phi, mask, batch_dims=2)
    assert whole.shape == (2, 3)
    CLOSE(whole[1], metric(phi[1], mask))
    CLOSE(whole[1, 2], metric(phi[1, 2], mask[2], batch_dims=0))
    CLOSE(metric(phi, mask.expand(2, 3, 1, 4, 5), batch_dims=2), whole)
    CLOSE(vmap(partial(metric, batch_dims=0))(phi[0], mask), whole[0])
    assert metric(phi[0].bfloat16(), mask).dtype == torch.float32


@pytest.mark.compile
@pytest.mark.parametrize("name", METRICS)
def test_compiled(name):
    phi, mask = draw(3, 1, 4, 5), draw(3, 1, 4, 5, seed=1) > 0
    CLOSE(torch.compile(METRICS[name], backend="aot_eager", fullgraph=True)(phi, mask), METRICS[name](phi, mask))


@pytest.mark.parametrize("name", METRICS)
def test_masks_broadcast_along_axes_of_size_one(name):
    metric = METRICS[name]
    phi, mask = draw(3, 2, 4, 4), draw(1, 1, 4, 4, seed=1) > 0
    CLOSE(metric(phi, mask), metric(phi, mask.expand(3, 2, 4, 4)))


@pytest.mark.parametrize("name", METRICS)
def test_structures(name):
    metric = METRICS[name]
    a, b, in_a, in_b = draw(3, 4), draw(3, 2, 2, seed=1), draw(3, 4, seed=2) > 0, draw(3, 2, 2, seed=3) > 0
    expected = metric(torch.cat([a, b.flatten(1)], 1), torch.cat([in_a, in_b.flatten(1)], 1))
    CLOSE(metric((a, None, b), (in_a, None, in_b)), expected)
    CLOSE(metric({"a": a, "b": b}, {"b": in_b, "a": in_a}), expected)
    CLOSE(metric(TensorDict({"b": b, "a": a}, [3]), TensorDict({"a": in_a, "b": in_b}, [3])), expected)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK.double(), "masks holds a float64 tensor"),
        (MASK[:, :3], r"masks holds .* \[2, 3\] for attributions of shape \[2, 4\]"),
        (MASK[0], r"masks holds .* \[4\] for attributions of shape \[2, 4\]; give a boolean tensor with as many dimensions"),
        (None, "masks holds None"),
        ({"a": MASK}, "masks holds a dict"),
    ],
)
def test_masks_that_do_not_fit(name, mask, message):
    with pytest.raises(errors.InputError, match=message):
        METRICS[name](PHI, mask)


def test_a_mask_for_each_example_is_not_taken_for_one_of_channels():
    """The symptom: with as many channels as examples a mask [B, H, W] would broadcast over the wrong axis."""
    with pytest.raises(errors.InputError, match="as many dimensions"):
        pointing_game(draw(3, 3, 4, 4), draw(3, 4, 4) > 0)


def test_bad_options():
    with pytest.raises(errors.InputError, match="k=5 is more than the 4 features"):
        top_k_intersection(PHI, MASK, k=5)
    with pytest.raises(errors.InputError, match="k is an integer of at least 1, got 0"):
        top_k_intersection(PHI, MASK, k=0)
    with pytest.raises(errors.InputError, match="tolerance is an integer of at least 0, got -1"):
        pointing_game(PHI, MASK, tolerance=-1)
    with pytest.raises(errors.InputError, match="tolerance=1 counts pixels along the last two axes"):
        pointing_game(PHI, MASK, tolerance=1)
    with pytest.raises(errors.InputError, match=r"masks is .* not the structure of"):
        pointing_game((PHI, PHI), (MASK,))
