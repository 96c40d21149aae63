"""Parameters by name."""

from __future__ import annotations

import re

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook import functionalize
from tdhook.core.errors import InputError, ParamsError
from tdhook.weights.selection import (
    by_parameter,
    flat,
    nest,
    parameter_name,
    replaced,
    require_same_structure,
    select_parameters,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(3))
        self.head = nn.Linear(2, 2)


@pytest.fixture
def params():
    return functionalize(Net())[1]


def names(params, select, **options):
    return [parameter_name(key) for key in select_parameters(params, select, **options)]


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("head.weight", ["head.weight"]),
        ("head", ["head.weight", "head.bias"]),
        ("h.*.0.weight", ["h.0.0.weight", "h.1.0.weight", "h.2.0.weight"]),
        ("h[-1].0", ["h.2.0.weight", "h.2.0.bias"]),
        ("h[1:].0.bias", ["h.1.0.bias", "h.2.0.bias"]),
        ("**.running_var", ["h.0.1.running_var", "h.1.1.running_var", "h.2.1.running_var"]),
        (re.compile(r"h\.1\..*weight"), ["h.1.0.weight", "h.1.1.weight"]),
        (lambda name: name.endswith("0.bias"), ["h.0.0.bias", "h.1.0.bias", "h.2.0.bias"]),
        (["head.bias", "h.0.0.bias"], ["h.0.0.bias", "head.bias"]),
    ],
)
def test_addresses_patterns_regular_expressions_and_predicates(params, select, expected):
    assert names(params, select) == expected


def test_none_is_every_floating_point_tensor_with_enough_dimensions(params):
    assert names(params, None, least_dims=2) == ["h.0.0.weight", "h.1.0.weight", "h.2.0.weight", "head.weight"]
    assert len(names(params, None)) == 20  # the counters of the norms are integers


def test_names_with_dots_are_quoted():
    params = TensorDict({"a.b": {"w": torch.ones(1)}})
    assert names(params, '["a.b"].w') == ['["a.b"].w']


def test_later_patterns_of_a_mapping_count(params):
    table = by_parameter(params, {"**": 1, "head": 2}, "coefficients")
    assert table["head", "bias"] == 2 and table["h", "0", "0", "weight"] == 1


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("head.wieght", r"no such parameter or module. Did you mean 'head.weight'"),
        ("nothing.like.it", r"There are 'h.0.0.weight', .* and \d+ more"),
        ("head..weight", "is no address of a parameter"),
        ("head:in", "is the address of an activation"),
        (re.compile("zz"), "no parameter matches 'zz'"),
        (lambda name: False, "no parameter matches <function"),
        ("h.0.1.num_batches_tracked", "has to be floating-point"),
        ("head.bias", "with 2 dimensions or more"),
    ],
)
def test_what_is_not_there_is_an_error(params, select, message):
    with pytest.raises(ParamsError, match=message):
        select_parameters(params, select, least_dims=2 if select == "head.bias" else 0)


@pytest.mark.parametrize(("select", "message"), [([], "select is empty"), (3, "takes names, regular expressions")])
def test_what_is_no_name_is_an_error(params, select, message):
    with pytest.raises(InputError, match=message):
        select_parameters(params, select)


def test_replaced_shares_the_others_and_keeps_everything_else():
    params = TensorDict({"a": {"w": torch.ones(2)}, "empty": TensorDict({}), "n": torch.tensor(3)})
    new = replaced(params, {("a", "w"): torch.zeros(2)})
    assert list(new.keys()) == ["a", "empty", "n"]
    assert new["n"] is params["n"] and new["a", "w"].sum() == 0 and params["a", "w"].sum() == 2


def test_flat_and_nest_are_inverse(params):
    back = nest(flat(params))
    assert list(flat(back)) == list(flat(params)) and all(a is b for a, b in zip(flat(back).values(), flat(params).values()))


def test_different_structures_are_named(params):
    other = params.clone()
    other["head", "bias"] = torch.zeros(3)
    with pytest.raises(ParamsError, match=r"'head.bias' is a float32 tensor of shape \[2\] on cpu in a, but .*\[3\].* in b"):
        require_same_structure("a", params, "b", other)
    with pytest.raises(ParamsError, match=r"b has no 'head.weight', which a has"):
        require_same_structure("a", params, "b", params.exclude(("head", "weight")))
