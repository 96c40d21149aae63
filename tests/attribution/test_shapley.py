"""Shapley values, exact and sampled, against their definition over orders, captum and the axioms."""

from __future__ import annotations

import captum.attr
import pytest
import torch

from tdhook import functionalize, targets
from tdhook.attribution.shapley import shapley_value_sampling, shapley_values
from tdhook.core import errors

from .games import BOTH, CLOSE, MASKS, MultiLayer, TwoInputs, X, by_orders, painted, prepared, two_inputs

MODEL = MultiLayer()
F, PARAMS = functionalize(MODEL)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("x", "options", "expected"),
    [
        (X, {}, [[230 / 3, 590 / 3, 350 / 3]]),
        (BOTH, {}, [[7, 32.5, 10.5], [230 / 3, 590 / 3, 350 / 3]]),
        (BOTH, {"groups": MASKS}, [[39.5, 10.5], [115, 275]]),
        (X, {"baselines": torch.tensor([10.0, 20, 10]).double()}, [[40, 120, 80]]),
    ],
)
def test_captums_numbers(x, options, expected):
    CLOSE(shapley_values(F, PARAMS, x, targets=0, **options), torch.tensor(expected, dtype=torch.float64))


def test_the_definition_over_orders():
    f, params, x = prepared()
    baseline = torch.randn(1, 5).double()
    got = shapley_values(f, params, x, targets=targets.every(), baselines=baseline)
    for t in range(3):
        CLOSE(got[t], by_orders(lambda x, t=t: f(params, x)[..., t], x, baseline))


def test_several_inputs_equal_captum():
    model, inputs = TwoInputs(), two_inputs()
    ids = (torch.tensor([[[0, 1], [1, 2]]]), torch.tensor([[2, 0, 3]]))
    got = shapley_values(*functionalize(model), inputs, targets=[0, 2], groups=ids, baselines=two_inputs(1))
    for which, target in enumerate((0, 2)):
        peer = captum.attr.ShapleyValues(model).attribute(inputs, two_inputs(1), target, feature_mask=ids)
        for g, p in zip(painted(got, ids), peer):
            torch.testing.assert_close(g[which], p, rtol=1e-6, atol=1e-7, check_dtype=False)


def test_axioms():
    x = torch.randn(4, 5).double()
    f = lambda params, x: torch.stack([x[:, 0] * x[:, 1] * x[:, 2].exp(), (x[:, 3] + x[:, 1] + x[:, 0]) ** 3], -1)  # noqa: E731
    first, second = shapley_values(f, None, x, targets=[0, 1])
    CLOSE((first + second).sum(-1), (f(None, x) - f(None, 0 * x)).sum(-1))  # efficiency
    assert first[:, 3:].abs().max() < 1e-14 and second[:, [2, 4]].abs().max() < 1e-13  # dummy
    both = shapley_values(lambda p, x: f(p, x) @ torch.tensor([2.0, -3]).double(), None, x)
    CLOSE(both, 2 * first - 3 * second)  # linearity
    swapped = shapley_values(f, None, x[:, [3, 1, 2, 0, 4]], targets=1)
    CLOSE(swapped[:, [3, 1, 2, 0, 4]], second)  # symmetry


def test_what_does_not_depend_on_anything_is_zero_in_spite_of_a_large_offset():
    got = shapley_values(lambda params, x: x[:, 0] + 1e9, None, torch.ones(1, 8).double())
    torch.testing.assert_close(got, torch.eye(8)[:1].double(), rtol=0, atol=1e-6)


def test_one_feature_gets_everything():
    x = torch.randn(3, 1).double()
    got = shapley_values(lambda params, x: x[:, 0].exp(), None, x)
    CLOSE(got, x.exp() - 1)
    sampled = shapley_value_sampling(lambda params, x: x[:, 0].exp(), None, x, samples=2)
    CLOSE(sampled.value, got)
    assert sampled.standard_error.abs().max() == 0


def test_too_many_features_are_refused_with_the_price():
    f, params, x = prepared(features=17)
    with pytest.raises(errors.InputError, match=r"17 groups need 2\^17 = 131,072 forward passes; .* max_features=16"):
        shapley_values(f, params, x, targets=0)
    with pytest.raises(errors.InputError, match="max_features is an integer of at least 1, got 0"):
        shapley_values(f, params, x, targets=0, max_features=0)


# Sampled ---------------------------------------------------------------------------------------------------------------


def test_one_order_is_its_marginal_contributions():
    f, params, x = prepared(features=4)
    ranks = torch.rand(4, generator=seeded(5)).argsort(-1)
    got = shapley_value_sampling(f, params, x, targets=1, samples=1, generator=seeded(5))
    point, before, expected = torch.zeros_like(x), f(params, 0 * x)[:, 1], torch.zeros_like(x)
    for feature in ranks.argsort().tolist():
        point[:, feature] = x[:, feature]
        expected[:, feature] = f(params, point)[:, 1] - before
        before = f(params, point)[:, 1]
    CLOSE(got.value, expected)
    assert got.standard_error.isnan().all()


@pytest.mark.parametrize("antithetic", [False, True])
def test_unbiased_with_the_right_standard_error(antithetic):
    f, params, x = prepared()
    exact = shapley_values(f, params, x, targets=[0, 2])
    run = lambda seed, n: shapley_value_sampling(  # noqa: E731
        f, params, x, targets=[0, 2], samples=n, antithetic=antithetic, generator=seeded(seed)
    )
    large = run(0, 2000)
    assert ((large.value - exact).abs() < 5 * large.standard_error + 1e-12).all()
    runs = [run(seed, 30) for seed in range(1, 80)]
    spread = torch.stack([r.value for r in runs]).std(0)
    reported = torch.stack([r.standard_error for r in runs]).square().mean(0).sqrt()
    torch.testing.assert_close(reported.mean(), spread.mean(), rtol=0.1, atol=0)


@pytest.mark.parametrize("antithetic", [False, True])
def test_every_sampled_order_is_efficient(antithetic):
    f, params, x = prepared()
    got = shapley_value_sampling(f, params, x, targets=targets.every(), samples=2, antithetic=antithetic)
    CLOSE(got.value.sum(-1), (f(params, x) - f(params, 0 * x)).T)


def test_reversed_orders_are_exact_for_interactions_of_two():
    f = lambda params, x: x[:, 0] * x[:, 1] - 3 * x[:, 1] * x[:, 2] + x[:, 3].exp()  # noqa: E731
    x = torch.randn(3, 4).double()
    got = shapley_value_sampling(f, None, x, samples=4, antithetic=True)
    CLOSE(got.value, shapley_values(f, None, x))
    assert got.standard_error.abs().max() < 1e-14


def test_antithetic_runs_pairs():
    with pytest.raises(errors.InputError, match="samples=5 is odd, but antithetic runs pairs"):
        shapley_value_sampling(F, PARAMS, X, targets=0, samples=5, antithetic=True)


def test_sampled_values_agree_with_captums():
    model, inputs = TwoInputs(), two_inputs()
    got = shapley_value_sampling(*functionalize(model), inputs, targets=1, samples=400, generator=seeded())
    torch.manual_seed(0)
    peer = captum.attr.ShapleyValueSampling(model).attribute(inputs, target=1, n_samples=200, perturbations_per_eval=7)
    for g, e, p in zip(got.value, got.standard_error, peer):
        assert ((g - p).abs() < 5 * 3**0.5 * e).all()
