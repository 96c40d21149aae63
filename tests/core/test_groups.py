"""Groups of features: masks, sums and their reverse, against loops over elements."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch.func import vmap

from tdhook import functionalize
from tdhook.core import errors
from tdhook.core.explained import explained
from tdhook.core.groups import Groups, feature_groups

A, B = torch.randn(3, 2, 2), torch.randn(3, 4)
TWO = explained(lambda params, inputs: inputs[0].sum(), None, (A, B))
SHARED = (torch.tensor([[0, 1], [1, 1]]), torch.tensor([2, 0, 0, 3]))
OWN = (torch.arange(3)[:, None, None].expand(3, 2, 2), torch.tensor([[0], [3], [3]]))
ARGUMENTS = [None, SHARED, OWN]


def members(groups, value, which, example):
    """The group of every element of one example, by looking it up."""
    return groups.ids[which].expand(value.shape)[example]


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_masks_have_the_value_of_the_group_of_every_element(argument):
    groups = feature_groups(argument, TWO, True)
    present = torch.rand(5, groups.count) < 0.5
    for which, (mask, value) in enumerate(zip(groups.masked(present), (A, B))):
        mask = mask.expand(5, *value.shape)
        for example in range(3):
            assert torch.equal(mask[:, example], present[:, members(groups, value, which, example)])


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_one_group_is_left_out(argument):
    groups = feature_groups(argument, TWO, True)
    for which, mask in enumerate(groups.without(1)):
        assert torch.equal(mask, groups.ids[which] != 1)
    assert any((~mask).any() for mask in groups.without(1))


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_spread_gives_every_element_the_score_of_its_group_in_its_example(argument):
    groups = feature_groups(argument, TWO, True)
    scores = torch.randn(2, 3, groups.count)
    for which, (got, value) in enumerate(zip(groups.spread(scores), (A, B))):
        assert got.shape == (2, *value.shape)
        for example in range(3):
            assert torch.equal(got[:, example], scores[:, example][:, members(groups, value, which, example)])


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_sums_add_the_members_in_all_tensors(argument):
    groups = feature_groups(argument, TWO, True)
    got = groups.sums([torch.stack([A, 2 * A]), torch.stack([B, 2 * B])])
    assert got.shape == (2, 3, groups.count)
    for example in range(3):
        for g in range(groups.count):
            expected = sum(v[example][members(groups, v, i, example) == g].sum() for i, v in enumerate((A, B)))
            torch.testing.assert_close(got[:, example, g], torch.stack([expected, 2 * expected]))


def test_every_element_is_a_group_of_its_own_by_default():
    groups = feature_groups(None, TWO, True)
    assert groups.count == 8
    assert all(torch.equal(a, b) for a, b in zip(groups.spread(groups.sums([A, B])), (A, B)))


@pytest.mark.parametrize(("argument", "count"), [(None, 24), ((torch.tensor([0, 1]), torch.tensor(2)), 3), (OWN, 4)])
def test_without_a_batch_axis_the_first_axis_is_a_feature(argument, count):
    groups = feature_groups(argument, TWO, False)
    assert groups.count == count
    sums = groups.sums([A, B])
    assert sums.shape == (count,)
    torch.testing.assert_close(sums.sum(), A.sum() + B.sum())
    for which, (got, value) in enumerate(zip(groups.spread(sums), (A, B))):
        assert torch.equal(got, sums[groups.ids[which]]) and got.shape == value.shape


def test_an_id_that_no_element_has_scores_zero():
    groups = feature_groups((torch.tensor([[0, 2], [2, 2]]), torch.tensor([3])), TWO, True)
    assert groups.count == 4 and groups.sums([A, B])[:, 1].abs().max() == 0


def test_ready_groups_are_aligned_to_the_values():
    given = Groups([SHARED[0], SHARED[1]], 6)
    groups = feature_groups(given, TWO, True)
    assert groups.count == 6 and groups.ids[0].shape == (1, 2, 2)
    assert torch.equal(groups.masked(torch.arange(6))[1][0], SHARED[1])


@pytest.mark.parametrize("kind", [dict, TensorDict])
def test_named_inputs(kind):
    inputs = TensorDict({"a": A, "b": B}, [3]) if kind is TensorDict else {"a": A, "b": B}
    what = explained(lambda params, inputs: inputs["a"].sum(), None, inputs)
    ids = {"b": SHARED[1], "a": SHARED[0]}
    assert torch.equal(feature_groups(ids, what, True).ids[0][0], SHARED[0])


def test_inputs_that_are_passed_through_have_no_groups():
    inputs = (torch.arange(3), A)
    what = explained(lambda params, inputs: inputs[1].sum(), None, inputs)
    assert feature_groups((None, SHARED[0]), what, True).count == 2


def test_keyed_by_sites():
    f, params = functionalize(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Tanh()))
    what = explained(f, params, B, ["0", "1"])
    groups = feature_groups({"1": torch.tensor([1, 1]), "0": torch.tensor([0, 2])}, what, True)
    assert groups.ids[0].tolist() == [[0, 2]] and groups.ids[1].tolist() == [[1, 1]]


def test_under_vmap_with_ids_of_their_own():
    ids, present = torch.tensor([[0, 0, 1], [1, 0, 0]]), torch.tensor([True, False])

    def run(ids, x):
        what = explained(lambda params, x: x.sum(), None, x)
        groups = feature_groups(Groups([ids], 2), what, False)
        return groups.masked(present)[0], groups.spread(groups.sums([x]))[0]

    x = torch.randn(2, 3)
    mask, totals = vmap(run)(ids, x)
    assert mask.tolist() == [[True, True, False], [False, True, True]]
    torch.testing.assert_close(totals[0], torch.stack([x[0, 0] + x[0, 1], x[0, 0] + x[0, 1], x[0, 2]]))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ((A, SHARED[1]), r"groups holds a float32 tensor of shape \[3, 2, 2\]; give an integer tensor"),
        ((SHARED[0].bool(), SHARED[1]), "groups holds a bool tensor"),
        ((SHARED[0], None), "groups holds None"),
        ((SHARED[0] - 1, SHARED[1]), "the id -1; the ids of 4 groups run from 0 to 3"),
        ((torch.arange(3), SHARED[1]), r"does not broadcast to \[3, 2, 2\]"),
        (SHARED[0], "groups is a int64 tensor .* not the structure of inputs"),
        (Groups([SHARED[0]], 4), "groups has ids for 1 tensors, but 2 are explained"),
        (Groups(SHARED, 3), "the id 3; the ids of 3 groups run from 0 to 2"),
        (Groups(SHARED, 0), "the count of groups is an integer of at least 1, got 0"),
    ],
)
def test_bad_groups(argument, message):
    with pytest.raises(errors.InputError, match=message):
        feature_groups(argument, TWO, True)


def test_ids_that_cannot_be_read_need_a_count():
    def run(ids):
        what = explained(lambda params, x: x.sum(), None, B)
        return feature_groups(ids, what, True).ids[0]

    with pytest.raises(
        errors.InputError, match=r"cannot be read inside of torch.compile or vmap; pass Groups\(\[ids\], count\)"
    ):
        vmap(run)(torch.zeros(2, 4).long())
