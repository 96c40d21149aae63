"""KernelSHAP against exact Shapley values and a plain constrained regression."""

from __future__ import annotations

import captum.attr
import numpy
import pytest
import torch

from tdhook import functionalize, targets
from tdhook.attribution.kernel_shap import _coalitions, kernel_shap
from tdhook.attribution.shapley import shapley_values
from tdhook.core import errors

from .games import CLOSE, MultiLayer, TwoInputs, X, prepared, two_inputs

F, PARAMS = functionalize(MultiLayer())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [[230 / 3, 590 / 3, 350 / 3]]), ({"baselines": torch.tensor([10.0, 20, 10]).double()}, [[40, 120, 80]])],
)
def test_captums_numbers(options, expected):
    got = kernel_shap(F, PARAMS, X, targets=0, **options)
    CLOSE(got.value, torch.tensor(expected, dtype=torch.float64))
    assert got.standard_error.abs().max() == 0


def test_few_features_are_enumerated():
    f, params, x = prepared()
    got = kernel_shap(f, params, x, targets=targets.every(), samples=32)
    CLOSE(got.value, shapley_values(f, params, x, targets=targets.every()))


def test_sampled_equals_a_constrained_regression():
    """The efficiency constraint taken out by hand, and numpy's least squares on coalitions and complements alike."""
    f, params, x = prepared(features=6)
    got = kernel_shap(f, params, x, targets=1, samples=40, generator=seeded(2))
    half = _coalitions(20, 6, seeded(2), x.device)
    z = torch.cat([half, ~half]).double()
    v = torch.stack([f(params, row * x)[:, 1] for row in z])
    whole, empty = f(params, x)[:, 1], f(params, 0 * x)[:, 1]
    design = z[:, :-1] - z[:, -1:]
    y = v - empty - z[:, -1:] * (whole - empty)
    head = torch.from_numpy(numpy.linalg.lstsq(design.numpy(), y.numpy(), rcond=None)[0]).T
    CLOSE(got.value, torch.cat([head, (whole - empty - head.sum(-1))[:, None]], -1))


def test_coalitions_follow_the_shapley_kernel():
    drawn = _coalitions(20000, 5, seeded(), torch.device("cpu"))
    size = drawn.sum(-1)
    chances = torch.tensor([1 / (k * (5 - k)) for k in range(1, 5)])
    shares = torch.stack([(size == k).double().mean() for k in range(1, 5)])
    torch.testing.assert_close(shares, (chances / chances.sum()).double(), rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.double().mean(0), torch.full((5,), 0.5).double(), rtol=0, atol=0.02)


def test_close_to_exact_with_the_right_standard_error():
    f, params, x = prepared(features=7)
    exact = shapley_values(f, params, x, targets=[0, 2])
    runs = [kernel_shap(f, params, x, targets=[0, 2], samples=100, generator=seeded(seed)) for seed in range(80)]
    values = torch.stack([r.value for r in runs])
    spread = values.std(0)
    assert ((values.mean(0) - exact).abs() < 5 * spread / 80**0.5).all()
    reported = torch.stack([r.standard_error for r in runs]).square().mean(0).sqrt()
    torch.testing.assert_close(reported, spread, rtol=0.3, atol=0)
    torch.testing.assert_close(reported.mean(), spread.mean(), rtol=0.1, atol=0)


def test_sampled_attributions_sum_to_the_difference():
    f, params, x = prepared(features=11)
    got = kernel_shap(f, params, x, targets=targets.every(), samples=60)
    CLOSE(got.value.sum(-1), (f(params, x) - f(params, 0 * x)).T)


def test_an_additive_function_is_exact_from_few_samples():
    x, w = torch.randn(3, 12).double(), torch.randn(12).double()
    got = kernel_shap(lambda params, x: (x.sin() * w).sum(-1) + 3, None, x, samples=100, generator=seeded())
    CLOSE(got.value, x.sin() * w)
    assert got.standard_error.abs().max() < 1e-12


def test_interactions_of_two_are_sampled_without_a_gross_error():
    x = torch.randn(3, 12).double()
    f = lambda params, x: (x[:, :6] * x[:, 6:]).sum(-1)  # noqa: E731
    got = kernel_shap(f, None, x, samples=100, generator=seeded())
    half = (x[:, :6] * x[:, 6:] / 2).repeat(1, 2)
    CLOSE(got.value, half)  # pairs cancel the interactions


def test_coalitions_that_determine_nothing_have_no_standard_error():
    x = torch.randn(1, 4).double()
    seeds = [s for s in range(200) if torch.linalg.matrix_rank(_centred(_coalitions(4, 4, seeded(s), x.device))) < 3]
    got = kernel_shap(lambda params, x: x.sum(-1), None, x, samples=8, generator=seeded(seeds[0]))
    assert got.standard_error.isnan().all()
    CLOSE(got.value.sum(-1), x.sum(-1))


def _centred(coalitions):
    return coalitions.double() - coalitions.double().mean(-1, keepdim=True)


def test_several_inputs_agree_with_captum():
    model, inputs = TwoInputs(), two_inputs(1)
    got = kernel_shap(*functionalize(model), inputs, targets=1)
    torch.manual_seed(0)
    peer = captum.attr.ShapleyValueSampling(model).attribute(inputs, target=1, n_samples=500, perturbations_per_eval=100)
    for g, p in zip(got.value, peer):
        torch.testing.assert_close(g, p, rtol=0, atol=0.02, check_dtype=False)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (1, "samples is an integer of at least 2, got 1"),
        (101, r"samples=101 for 11 groups; give an even number of at least 22, .* up to 6 of them would be exact"),
        (20, "samples=20 for 11 groups; give an even number of at least 22"),
    ],
)
def test_bad_samples(samples, message):
    f, params, x = prepared(features=11)
    with pytest.raises(errors.InputError, match=message):
        kernel_shap(f, params, x, targets=0, samples=samples)


def test_rows_of_a_batch_do_not_meet():
    f, params, x = prepared(features=8)
    got = kernel_shap(f, params, x, targets=0, samples=40, generator=seeded(3))
    for row in range(3):
        alone = kernel_shap(f, params, x[row : row + 1], targets=0, samples=40, generator=seeded(3))
        CLOSE(got.value[row], alone.value[0])
        CLOSE(got.standard_error[row], alone.standard_error[0])
