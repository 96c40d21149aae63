"""Mean differences by hand, and linear discriminant analysis against scikit-learn."""

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from tdhook.core import errors
from tdhook.latent.probes.lda import lda
from tdhook.latent.probes.mean_difference import mean_difference
from tdhook.latent.probes.probe import decision, predict, predict_probability

from .data import activations, labels


def test_the_boundary_is_midway_between_the_means():
    x = activations()
    y = labels(x)
    low, high = x[y == 0].mean(0), x[y == 1].mean(0)
    probe = mean_difference(x, y, normalize=False)
    assert torch.allclose(probe.weight[0], high - low)
    assert torch.allclose(probe.bias[0], (low.square().sum() - high.square().sum()) / 2)
    unit = mean_difference(x, y)
    assert torch.allclose(unit.weight[0], (high - low) / (high - low).norm())
    assert torch.allclose(decision(unit, ((low + high) / 2)[None]), torch.zeros(1, dtype=x.dtype), atol=1e-9)


def test_standardised_mean_differences():
    x = activations()
    y = labels(x)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    assert torch.allclose(decision(mean_difference(x, y, standardize=True), x), decision(mean_difference(z, y), z))


def test_classes_of_equal_mean_have_no_direction():
    probe = mean_difference(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([0, 0, 1, 1]))
    assert probe.weight == 0 and probe.bias == 0


def test_without_an_intercept():
    x = activations()
    y = labels(x)
    for fit in (mean_difference, lda):
        probe = fit(x, y, fit_intercept=False)
        assert torch.equal(probe.bias, torch.zeros_like(probe.bias))
        assert torch.allclose(probe.weight, fit(x, y).weight)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3, 1.0, "auto"])
def test_lda_equals_scikit_learn(classes, shrinkage):
    x = activations()
    y = labels(x, classes)
    probe = lda(x, y, shrinkage=shrinkage)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.numpy(), y.numpy())
    assert torch.allclose(predict_probability(probe, x), torch.from_numpy(model.predict_proba(x.numpy())), rtol=1e-6)
    coefficients, ours = torch.from_numpy(model.coef_), probe.weight
    if classes > 2:  # the same vector may be added to all rows
        coefficients, ours = coefficients - coefficients.mean(0), ours - ours.mean(0)
    assert torch.allclose(ours, coefficients, rtol=1e-6)


def test_priors_move_the_boundary_only():
    x = activations()
    y = labels(x, 3)
    priors = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    probe, plain = lda(x, y, priors=priors), lda(x, y)
    share = torch.bincount(y) / 80
    assert torch.equal(probe.weight, plain.weight)
    assert torch.allclose(probe.bias - plain.bias, (priors / share).log())


def test_fewer_examples_than_coordinates():
    x = activations(20, 40)
    y = labels(x)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x.numpy(), y.numpy())
    assert torch.allclose(lda(x, y, shrinkage="auto").weight, torch.from_numpy(model.coef_), rtol=1e-6)
    assert torch.isfinite(lda(x, y).weight).all()
    assert torch.equal(predict(lda(x, y, shrinkage=0.1), x), y)


def test_discriminants_do_not_depend_on_units():
    x = activations()
    y = labels(x, 3)
    scaled = x * torch.logspace(-3, 3, 6, dtype=x.dtype) + 7
    for options in (dict(), dict(standardize=True, shrinkage=0.2)):
        one, other = lda(x, y, **options), lda(scaled, y, **options)
        assert torch.allclose(predict_probability(one, x), predict_probability(other, scaled), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(shrinkage="oas"), "shrinkage='oas' is unknown; give None, 'auto' or a number from 0 to 1"),
        (dict(shrinkage=2.0), "from 0 to 1, got 2.0"),
        (dict(shrinkage=-0.1), "shrinkage is a number of at least 0, got -0.1"),
        (dict(priors=torch.ones(3) / 3), r"priors has to be a floating-point tensor \[2\]"),
        (dict(priors=torch.tensor([0.5, 0.6])), "positive with a sum of 1"),
    ],
)
def test_bad_options(options, message):
    x = activations()
    with pytest.raises(errors.InputError, match=message):
        lda(x, labels(x), **options)


def test_a_class_of_one_example_has_no_covariance():
    x = activations()
    with pytest.raises(errors.InputError, match=r"class 1 has 1 examples .* at least 2 are needed"):
        lda(x, (torch.arange(80) == 3).long())


def test_mean_difference_is_for_two_classes():
    x = activations()
    with pytest.raises(errors.InputError, match="mean_difference is for two classes, y has 3; use `lda` or `logistic`"):
        mean_difference(x, labels(x, 3))
