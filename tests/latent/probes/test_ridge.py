"""Ridge regression and least squares against scikit-learn and against leaving examples out one by one."""

import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler

from tdhook.core import errors
from tdhook.latent.probes.probe import predict
from tdhook.latent.probes.ridge import least_squares, ridge

from .data import activations, values, weights

SHAPES = pytest.mark.parametrize("shape", [(40, 6), (12, 30), (10, 10)])
INTERCEPT = pytest.mark.parametrize("fit_intercept", [True, False])


@SHAPES
@INTERCEPT
def test_ridge_equals_scikit_learn(shape, fit_intercept):
    x, w = activations(*shape), weights(shape[0])
    y = values(x, tasks=3)
    probe = ridge(x, y, penalty=0.7, standardize=False, sample_weight=w, fit_intercept=fit_intercept)
    model = Ridge(0.7, fit_intercept=fit_intercept, solver="svd").fit(x.numpy(), y.mT.numpy(), sample_weight=w.numpy())
    assert torch.allclose(probe.weight[:, 0], torch.from_numpy(model.coef_), rtol=1e-6, atol=1e-8)
    assert torch.allclose(predict(probe, x), torch.from_numpy(model.predict(x.numpy())).mT, rtol=1e-7)
    assert torch.equal(probe.penalty, torch.full((3,), 0.7, dtype=torch.float64))


def test_standardised_ridge_equals_a_pipeline():
    x = activations()
    y = values(x)
    scaled = StandardScaler().fit_transform(x.numpy())
    expected = Ridge(5.0).fit(scaled, y.numpy()).predict(scaled)
    assert torch.allclose(predict(ridge(x, y, penalty=5.0), x), torch.from_numpy(expected))


@SHAPES
@INTERCEPT
def test_the_leave_one_out_choice_equals_scikit_learn(shape, fit_intercept):
    x = activations(*shape)
    y = values(x, tasks=4) * torch.tensor([[1.0], [1.0], [1.0], [0.0]]) + torch.linspace(-3, 3, shape[0]).cos()
    candidates = [0.01, 1.0, 30.0, 1e3]
    probe = ridge(x, y, penalty=candidates, standardize=False, fit_intercept=fit_intercept)
    for task in range(4):
        model = RidgeCV(candidates, fit_intercept=fit_intercept, store_cv_results=True).fit(x.numpy(), y[task].numpy())
        assert probe.penalty[task] == model.alpha_
        assert torch.allclose(probe.loo_errors[task], torch.from_numpy(model.cv_results_).mean(0), rtol=1e-6)
        assert torch.allclose(probe.weight[task, 0], torch.from_numpy(model.coef_), rtol=1e-6, atol=1e-9)
    assert len(set(probe.penalty.tolist())) > 1


@SHAPES
@INTERCEPT
def test_leave_one_out_errors_are_those_of_refitting(shape, fit_intercept):
    x, w = activations(*shape), weights(shape[0])
    y = values(x)
    candidates = [0.1, 10.0]
    options = dict(standardize=False, fit_intercept=fit_intercept)
    probe = ridge(x, y, penalty=candidates, sample_weight=w, **options)
    for i, penalty in enumerate(candidates):
        errors_left_out = []
        for n in range(len(x)):
            kept = torch.arange(len(x)) != n
            without = ridge(x[kept], y[kept], penalty=penalty, sample_weight=w[kept], **options)
            errors_left_out.append(predict(without, x[n : n + 1])[0] - y[n])
        expected = (w * torch.stack(errors_left_out).square()).sum() / w.sum()
        assert torch.allclose(probe.loo_errors[i], expected, rtol=1e-6)


@SHAPES
@INTERCEPT
def test_least_squares_equals_scikit_learn(shape, fit_intercept):
    x, w = activations(*shape), weights(shape[0])
    y = values(x, tasks=2)
    probe = least_squares(x, y, sample_weight=w, fit_intercept=fit_intercept)
    model = LinearRegression(fit_intercept=fit_intercept).fit(x.numpy(), y.mT.numpy(), sample_weight=w.numpy())
    assert torch.allclose(predict(probe, x), torch.from_numpy(model.predict(x.numpy())).mT, rtol=1e-6, atol=1e-7)
    if shape[0] != shape[1]:  # a square matrix, centred, has no digits to spare
        assert torch.allclose(probe.weight[:, 0], torch.from_numpy(model.coef_), rtol=1e-6, atol=1e-7)


def test_a_repeated_coordinate_is_shared_equally():
    x = activations(30, 3)
    probe = least_squares(torch.cat([x, x[:, :1]], 1), 2 * x[:, 0])
    assert torch.allclose(probe.weight, torch.tensor([[1.0, 0, 0, 1.0]], dtype=torch.float64), atol=1e-8)


def test_large_means_and_outlying_coordinates_in_float32():
    x = activations(100, 8) + 100
    x[:, 0] *= 1e4
    y = values(activations(100, 8))
    single = ridge(x.float(), y.float(), penalty=[1e-2, 1.0], standardize=False)
    exact = ridge(x.float().double(), y, penalty=[1e-2, 1.0], standardize=False)
    assert torch.allclose(single.weight.double(), exact.weight, rtol=1e-4)
    assert single.weight.dtype == torch.float32 and single.penalty == exact.penalty


@pytest.mark.parametrize("fit", [ridge, least_squares])
def test_integers_are_values_and_a_single_example_is_its_own_mean(fit):
    x = activations(1)
    probe = fit(x, torch.tensor([3]))
    assert torch.equal(probe.weight, torch.zeros_like(probe.weight)) and torch.allclose(
        predict(probe, x), torch.tensor(3.0).double()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(penalty=0.0), "penalty is a number above 0, got 0.0"),
        (dict(penalty=[]), "penalty has no candidate"),
        (dict(penalty=[1.0, -1.0]), "penalty is a number above 0, got -1.0"),
        (dict(penalty="best"), "penalty is a number above 0, got 'best'"),
        (dict(penalty=float("inf")), "penalty is a number above 0, got inf"),
    ],
)
def test_bad_penalties(options, message):
    with pytest.raises(errors.InputError, match=message):
        ridge(activations(), values(activations()), **options)


def test_bad_values():
    x = activations()
    with pytest.raises(errors.InputError, match="y holds NaN or infinite values"):
        ridge(x, torch.full((80,), torch.nan))
    with pytest.raises(errors.InputError, match="y has to be real"):
        ridge(x, torch.zeros(80, dtype=torch.complex64))
    with pytest.raises(errors.InputError, match="1 examples with a positive weight, but at least 2 are needed"):
        ridge(x[:1], values(x)[:1], penalty=[1.0, 2.0])
