"""Occlusion against captum, closed forms and feature ablation."""

from __future__ import annotations

from functools import partial

import captum.attr
import pytest
import torch
from torch import nn

from tdhook import functionalize
from tdhook.attribution.ablation import feature_ablation
from tdhook.attribution.occlusion import occlusion
from tdhook.core import errors

from .games import BOTH, CLOSE, MultiLayer, TwoInputs, X, prepared, two_inputs

F, PARAMS = functionalize(MultiLayer())
CAPTUM = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6, check_dtype=False)  # it answers in float32


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"window": 2, "baselines": 10.0}, [[200, 220, 240]]), ({"window": (2,), "stride": 2}, [[280, 280, 120]])],
)
def test_captums_numbers(options, expected):
    CLOSE(occlusion(F, PARAMS, X, targets=0, **options), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("window", "stride"),
    [((1, 2, 3), (1, 1, 2)), ((2, 3, 3), 1), ((2, 4, 1), (2, 3, 1)), ((2, 5, 6), 1), ((1, 3, 4), (1, 3, 4))],
)
def test_images_equal_captum(window, stride):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(-3), nn.Linear(36, 3)).double()
    x, baseline = torch.randn(3, 2, 5, 6).double(), torch.randn(1, 2, 5, 6).double()
    got = occlusion(*functionalize(model), x, targets=[0, 2], window=window, stride=stride, baselines=baseline, chunk_size=7)
    for g, target in zip(got, (0, 2)):
        CAPTUM(g, captum.attr.Occlusion(model).attribute(x, window, stride, baseline, target))


def test_several_inputs_equal_captum():
    model, inputs = TwoInputs(), two_inputs()
    options = {"window": ((1, 2), (2,)), "stride": (1, (2,))}
    got = occlusion(*functionalize(model), inputs, targets=1, **options)
    peer = captum.attr.Occlusion(model).attribute(inputs, ((1, 2), (2,)), ((1, 1), (2,)), target=1)
    for g, p in zip(got, peer):
        CAPTUM(g, p)


def test_windows_of_one_element_are_feature_ablation():
    f, params, x = prepared()
    CLOSE(occlusion(f, params, x, targets=[0, 1], window=1), feature_ablation(f, params, x, targets=[0, 1]))


def test_a_window_over_everything_is_the_whole_difference():
    f, params, x = prepared()
    got = occlusion(f, params, x, targets=0, window=5)
    CLOSE(got, (f(params, x) - f(params, 0 * x))[:, :1].expand(3, 5))


def test_the_first_axis_slides_too_where_there_is_no_batch():
    x = torch.arange(6.0).reshape(2, 3)
    assert occlusion(lambda params, x: x.sum(), None, x, window=(2, 1)).tolist() == [[3, 5, 7], [3, 5, 7]]


def test_at_a_site():
    got = occlusion(F, PARAMS, BOTH, targets=0, at="linear1", window={"linear1": 4})
    difference = F(PARAMS, BOTH)[:, 0] + 1
    # the baseline of the site is its value for a zero input: relu([-10, 1, 1, 1]) sums to 3
    CLOSE(got["linear1"], (difference - 3)[:, None].expand(2, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "every length in window is an integer of at least 1, got 0"),
        ({"window": (1.5,)}, "every length in window is an integer of at least 1, got 1.5"),
        ({"window": (1, 2)}, r"window=\(1, 2\) is for 2 axes, but one example has the shape \[3\]"),
        ({"window": 4}, r"window=\(4,\) is larger than one example, which has the shape \[3\]"),
        ({"window": 2, "stride": 3}, r"stride=\(3,\) leaves elements uncovered by window=\(2,\)"),
        ({"window": 2, "stride": -1}, "every length in stride is an integer of at least 1, got -1"),
        ({"window": {"x": 2}}, "every length in window is an integer of at least 1, got a dict"),
    ],
)
def test_bad_windows(options, message):
    with pytest.raises(errors.InputError, match=message):
        occlusion(F, PARAMS, X, targets=0, **options)
