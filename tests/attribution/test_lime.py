"""LIME against regressions by numpy over all masks, and a lasso by coordinate descent."""

from __future__ import annotations

import itertools

import captum._utils.models.model
import captum.attr
import numpy
import pytest
import torch
from torch import nn

from tdhook import functionalize, targets
from tdhook.attribution.lime import lime
from tdhook.core import errors

from .games import CLOSE, MASK, MultiLayer, TwoInputs, X, painted, prepared, two_inputs

F, PARAMS = functionalize(MultiLayer())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Lasso:
    """min sum_s w_s (y_s - a - z_s b)^2 / (2 sum_s w_s) + alpha |b|_1, by coordinate descent."""

    def __init__(self, alpha):
        self.alpha = alpha

    def fit(self, z, y, sample_weight):
        w = sample_weight / sample_weight.sum()
        z, y = z - w @ z, y - w @ y
        self.coef_ = numpy.zeros(z.shape[1])
        for _ in range(200):
            for j in range(z.shape[1]):
                rest = y - z @ self.coef_ + z[:, j] * self.coef_[j]
                slope = (w * z[:, j]) @ rest
                self.coef_[j] = numpy.sign(slope) * max(abs(slope) - self.alpha, 0) / ((w * z[:, j]) @ z[:, j])
        return self


@pytest.mark.parametrize(
    ("options", "expected"), [({}, [73.37, 193.33, 113.33]), ({"groups": MASK}, [271, 111])], ids=["simple", "with_mask"]
)
def test_captums_numbers(options, expected):
    """Its kernel is exp(-d^2 / 2) of the cosine distance of inputs, which are [20, 50, 30] where a mask is on."""

    def kernel(present):
        point = torch.where(present[:, -1:] if present.shape[1] < 3 else present, X, 0 * X)
        if present.shape[1] < 3:
            point = torch.where(present[:, [0, 0, 1]], X, 0 * X)
        return (-(1 - torch.cosine_similarity(point, X)).square() / 2).exp()

    options = {"kernel": kernel, "regressor": Lasso(1.0), "samples": 2000, "generator": seeded(), **options}
    got = lime(F, PARAMS, X, targets=0, **options)
    torch.testing.assert_close(got.value, torch.tensor([expected]).double(), rtol=0, atol=3.0)
    assert got.standard_error.isnan().all()


def all_masks(count):
    return torch.tensor(list(itertools.product([False, True], repeat=count)))


def population(f, params, x, target, weights):
    """Coefficients of the weighted regression with an intercept over all masks, which fair coins draw alike."""
    masks = all_masks(x.shape[-1]).double()
    values = torch.stack([f(params, m * x)[:, target] for m in masks])
    root = weights.sqrt()[:, None]
    design = torch.cat([torch.ones(len(masks), 1).double(), masks], -1)
    return torch.from_numpy(numpy.linalg.lstsq((root * design).numpy(), (root * values).numpy(), rcond=None)[0][1:]).T


@pytest.mark.parametrize(("kernel", "width"), [("cosine", None), ("euclidean", None), ("cosine", 0.6), ("euclidean", 1.2)])
def test_converges_to_the_regression_over_all_masks_with_the_right_standard_error(kernel, width):
    f, params, x = prepared(features=4)
    on = all_masks(4).double().sum(-1)
    if kernel == "cosine":
        squared, scale = (1 - (on / 4).sqrt()) ** 2, width or 0.25
    else:
        squared, scale = 4 - on, width or 1.5
    exact = torch.stack([population(f, params, x, t, (-squared / (2 * scale**2)).exp()) for t in (0, 2)])
    options = {"targets": [0, 2], "kernel": kernel, "kernel_width": width, "ridge": 0}
    runs = [lime(f, params, x, samples=200, generator=seeded(s), **options) for s in range(60)]
    values = torch.stack([r.value for r in runs])
    reported = torch.stack([r.standard_error for r in runs]).square().mean(0).sqrt()
    torch.testing.assert_close(reported.mean(), values.std(0).mean(), rtol=0.15, atol=0)
    large = lime(f, params, x, samples=4000, generator=seeded(), **options)
    assert ((large.value - exact).abs() < 5 * large.standard_error).all()


def test_ridge_equals_the_normal_equations():
    f, params, x = prepared()
    got = lime(
        f, params, x, targets=targets.every(), samples=50, ridge=0.7, kernel=lambda z: z.double().sum(-1), generator=seeded()
    )
    masks = (torch.stack([torch.rand(5, generator=g) for g in [seeded()] for _ in range(50)]) < 0.5).double()
    w = masks.sum(-1)
    design = torch.cat([torch.ones(50, 1).double(), masks], -1)
    penalty = torch.diag(torch.tensor([0.0, *[0.7] * 5], dtype=torch.float64))
    for t in range(3):
        values = torch.stack([f(params, m * x)[:, t] for m in masks])
        solved = torch.linalg.solve(design.T @ (w[:, None] * design) + penalty, design.T @ (w[:, None] * values))
        CLOSE(got.value[t], solved[1:].T)


class Ridge(captum._utils.models.model.Model):
    """A regressor for captum's LIME, whose own need scikit-learn."""

    def fit(self, train_data, **kwargs):
        z, y, w = (torch.cat(part).double() for part in zip(*train_data))
        design = torch.cat([torch.ones(len(z), 1), z], -1) * w.sqrt()[:, None]
        self.coefficients = torch.linalg.lstsq(design, y * w.sqrt()).solution[1:]

    def representation(self):
        return self.coefficients

    def __call__(self, x, **kwargs):
        raise NotImplementedError


def test_several_inputs_agree_with_captum():
    model, inputs = TwoInputs(), two_inputs(1)
    ids = (torch.tensor([[[0, 1], [1, 2]]]), torch.tensor([[2, 0, 3]]))
    weight = lambda present: (present.double().mean(-1) - 1).exp()  # noqa: E731
    options = {"groups": ids, "kernel": weight, "ridge": 0, "generator": seeded()}
    got = lime(*functionalize(model), inputs, targets=1, samples=1000, **options)
    similarity = lambda original, perturbed, mask, **kwargs: weight(mask)  # noqa: E731
    torch.manual_seed(0)
    peer = captum.attr.Lime(model, interpretable_model=Ridge(), similarity_func=similarity)
    peer = peer.attribute(inputs, target=1, feature_mask=ids, n_samples=1000, perturbations_per_eval=100)
    for g, e, p in zip(painted(got.value, ids), painted(got.standard_error, ids), peer):
        assert ((g - p).abs() < 5 * 2**0.5 * e).all()


def test_a_linear_model_is_its_own_explanation():
    f, params = functionalize(nn.Linear(6, 2).double())
    x = torch.randn(3, 6).double()
    got = lime(f, params, x, targets=[0, 1], samples=40, ridge=0, generator=seeded())
    CLOSE(got.value, params["weight"][:, None] * x, rtol=1e-8, atol=1e-10)
    assert got.standard_error.max() < 1e-9


def test_masks_that_determine_nothing_have_no_standard_error():
    f, params, x = prepared(features=6)
    assert lime(f, params, x, targets=0, samples=5, ridge=0).standard_error.isnan().all()


def test_a_regressor_is_copied_for_every_fit():
    f, params, x = prepared(features=3)
    regressor = Lasso(0.0)
    got = lime(f, params, x, targets=[0, 1], samples=64, regressor=regressor, generator=seeded())
    assert not hasattr(regressor, "coef_")
    CLOSE(got.value, lime(f, params, x, targets=[0, 1], samples=64, ridge=0, generator=seeded()).value, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "gauss"}, "kernel='gauss' is unknown; choose 'cosine', 'euclidean'"),
        ({"kernel": lambda z: z}, r"kernel returned a bool tensor of shape \[1000, 3\]; return one weight for each"),
        ({"kernel_width": 0}, "kernel_width=0; give a number above 0"),
        ({"ridge": -1.0}, "ridge=-1.0; give a number of at least 0"),
        ({"regressor": "lasso"}, "regressor is 'lasso' .*; give an instance with fit and coef_"),
        ({"regressor": Lasso}, r"give an instance with fit and coef_, Lasso\(alpha=0.01\) say"),
        ({"samples": 1}, "samples is an integer of at least 2, got 1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(errors.InputError, match=message):
        lime(F, PARAMS, X, targets=0, **options)


def test_regressors_of_scikit_learn():
    """Ridge equals ours; a strong lasso leaves out what matters least."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    weights = torch.tensor([3.0, -2.0, 0.01]).double()
    x = torch.tensor([[1.0, 2.0, 3.0]]).double()

    def method(regressor=None):
        generator = torch.Generator().manual_seed(0)
        options = {} if regressor is None else {"regressor": regressor}
        return lime(lambda _, x: (x * weights).sum(-1), None, x, samples=500, generator=generator, **options).value

    torch.testing.assert_close(method(linear_model.Ridge(alpha=1.0)), method(), rtol=1e-6, atol=1e-8)
    sparse = method(linear_model.Lasso(alpha=0.05))
    assert sparse[0, 2] == 0
    torch.testing.assert_close(sparse[0, :2], torch.tensor([3.0, -4.0]).double(), rtol=0.2, atol=0.3)
