"""Targets: which scalars of the output a method explains."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from tensordict import TensorDict
from torch.func import vmap

from tdhook import targets as T
from tdhook.core.errors import TargetError
from tdhook.core.targets import check, select

LOGITS = torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 3.0]])
SEQUENCE = torch.arange(24.0).reshape(2, 4, 3)
Out = namedtuple("Out", ["logits", "hidden"])


def test_index():
    assert T.index(1)(LOGITS).tolist() == [5, 0]
    assert T.index(-1)(LOGITS).tolist() == [2, 3]


def test_indices():
    assert T.indices([2, 0])(LOGITS).tolist() == [[2, 1], [3, 4]]
    many = list(range(-20, 20))
    wide = torch.randn(3, 40)
    assert torch.equal(T.indices(many)(wide), torch.stack([wide[:, i] for i in many], -1))


def test_per_example():
    assert T.per_example(torch.tensor([2, 0]))(LOGITS).tolist() == [2, 4]


def test_logit_difference():
    assert T.logit_difference(0, 1)(LOGITS).tolist() == [-4, 4]
    assert T.logit_difference(torch.tensor([1, 2]), 0)(LOGITS).tolist() == [4, -1]
    assert T.logit_difference(0, 1, position=-1)(SEQUENCE).tolist() == [-1, -1]


def test_top_k():
    assert T.top_k(2)(LOGITS).tolist() == [[5, 2], [4, 3]]


def test_every():
    assert torch.equal(T.every()(LOGITS), LOGITS)


@pytest.mark.parametrize(
    "make", [T.index, lambda i, **kw: T.indices([i], **kw), lambda i, **kw: T.logit_difference(i, 0, **kw)]
)
def test_a_key_picks_from_structured_outputs(make):
    expected = make(1)(LOGITS)
    hidden = torch.zeros(7)
    assert torch.equal(make(1, key="logits")({"logits": LOGITS, "hidden": hidden}), expected)
    assert torch.equal(make(1, key="logits")(Out(LOGITS, hidden)), expected)
    assert torch.equal(make(1, key=0)((LOGITS, hidden)), expected)
    assert torch.equal(make(1, key="logits")(TensorDict({"logits": LOGITS}, [2])), expected)


def test_a_position_picks_from_sequences():
    assert T.index(1, position=-1)(SEQUENCE).tolist() == [10, 22]
    assert T.index(1, position=torch.tensor([0, 2]))(SEQUENCE).tolist() == [1, 19]
    assert T.every(position=1)(SEQUENCE).tolist() == [[3, 4, 5], [15, 16, 17]]
    assert T.per_example(torch.tensor([0, 2]), position=0)(SEQUENCE).tolist() == [0, 14]


def test_one_example_without_a_batch_axis():
    assert T.index(1)(LOGITS[0]).item() == 5
    assert T.top_k(1)(LOGITS[0]).tolist() == [5]


@pytest.mark.parametrize(
    "target", [T.index(1), T.indices([0, 2]), T.top_k(2), T.every(), T.logit_difference(0, 2)], ids=lambda t: str(t.plural)
)
def test_vmapped_over_examples_is_batched(target):
    assert torch.equal(vmap(target)(LOGITS), target(LOGITS))


def test_per_example_under_vmap():
    classes = torch.tensor([2, 0])
    assert vmap(lambda c, row: T.per_example(c)(row))(classes, LOGITS).tolist() == [2, 4]


# select ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected", "several"),
    [
        (1, [[5], [0]], False),
        ([1], [[5], [0]], True),
        ([1, -1], [[5, 2], [0, 3]], True),
        ((0, T.index(1), lambda out: out.sum(-1)), [[1, 5, 8], [4, 0, 7]], True),
        (lambda out: out.sum(-1), [[8], [7]], False),
        (lambda out: out[:, :2], [[1, 5], [4, 0]], True),
        (T.top_k(1), [[5], [4]], True),
    ],
)
def test_select_gives_one_column_per_target(target, expected, several):
    check(target)
    values, plural = select(target, LOGITS)
    assert values.tolist() == expected and plural == several


def test_no_target_takes_one_scalar_per_example():
    values, plural = select(None, LOGITS[:, 0])
    assert values.tolist() == [[1], [4]] and not plural


# Errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([], "targets is empty"),
        ((), "targets is empty"),
        ("cat", "None, an int, a sequence or a function"),
        (True, "None, an int, a sequence or a function"),
        (1.0, "None, an int, a sequence or a function"),
        ([0, 1.5], "an element of targets is an int, got 1.5"),
        ([0, True], "an element of targets is an int, got True"),
        (torch.tensor([0, 1]), r"say tdhook.targets.per_example\(tensor\) or tensor.tolist\(\)"),
    ],
)
def test_what_can_be_no_target_is_refused_at_once(target, message):
    with pytest.raises(TargetError, match=message):
        check(target)


@pytest.mark.parametrize(
    ("target", "output", "message"),
    [
        (3, LOGITS, "index=3 is out of range for an output with 3 classes"),
        (-4, LOGITS, "index=-4 is out of range"),
        ([0, 3], LOGITS, "indices=3 is out of range"),
        (T.top_k(4), LOGITS, "top_k=4 is out of range"),
        (T.top_k(0), LOGITS, "top_k=0 is out of range"),
        (T.per_example(torch.tensor([0, 3])), LOGITS, "per_example holds class 3"),
        (T.per_example(torch.tensor([0, -1])), LOGITS, "per_example holds class -1"),
        (T.per_example(torch.tensor([0])), LOGITS, r"per_example has shape \[1\] for an output of shape \[2, 3\]"),
        (None, LOGITS, "targets is None, which needs an output of one scalar per example"),
        (0, SEQUENCE, r"shape \[2, 4, 3\]; pass position=-1 for the last one"),
        (0, torch.ones(2, 3, 4, 5), "pass a function of the output"),
        (0, {"logits": LOGITS}, r"not a tensor; pass key='logits', as in tdhook.targets.index\(3, key='logits'\)"),
        (0, "text", "the output is 'text' of type str, not a tensor"),
        (T.index(0, key="scores"), {"logits": LOGITS}, "key='scores' is not in the output"),
        (T.index(0, position=4), SEQUENCE, "position=4 is out of range for 4 positions"),
        (T.index(0, position=0), LOGITS[0], "position=0 needs an output of shape"),
        (T.index(0, position=torch.tensor([0])), SEQUENCE, "position has 1 entries"),
        (lambda out: 3.0, LOGITS, "targets returned 3.0 of type float"),
        (lambda out: SEQUENCE, LOGITS, r"return a tensor of shape \[B\] or \[B, T\]"),
        (lambda out: out.argmax(-1), LOGITS, "gradients need floating-point ones"),
        ([0, T.top_k(2)], LOGITS, "an element that gives several targets"),
        ([0, lambda out: out.argmax(-1)], LOGITS, "gradients need floating-point ones"),
    ],
)
def test_what_does_not_fit_the_output_is_refused(target, output, message):
    with pytest.raises(TargetError, match=message):
        select(target, output)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T.index(1.0), "index is an int, got 1.0"),
        (lambda: T.index(True), "index is an int, got True"),
        (lambda: T.indices([]), "indices is empty"),
        (lambda: T.indices([0, "a"]), "indices is an int, got 'a'"),
        (lambda: T.top_k(2.0), "top_k is an int"),
        (lambda: T.per_example([0, 1]), "per_example takes an integer tensor"),
        (lambda: T.per_example(torch.ones(2)), "per_example takes an integer tensor"),
        (lambda: T.per_example(torch.tensor([True, False])), "per_example takes an integer tensor"),
        (lambda: T.logit_difference(0, 1.5), "takes an integer tensor"),
    ],
)
def test_a_target_that_makes_no_sense_is_not_made(make, message):
    with pytest.raises(TargetError, match=message):
        make()


def test_several_classes_of_its_own_for_each_example():
    output = torch.arange(12.0).reshape(3, 4)
    classes = torch.tensor([[0, 3], [1, 1], [2, 0]])
    chosen, plural = select(T.per_example(classes), output)
    assert plural
    assert chosen.tolist() == [[0, 3], [5, 5], [10, 8]]
    with pytest.raises(TargetError, match=r"per_example has shape \[3, 2\] for an output of shape \[2, 4\]"):
        select(T.per_example(classes), output[:2])
