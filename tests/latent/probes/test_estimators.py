"""Estimators of scikit-learn as probes."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression, Perceptron, RidgeClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from tensordict import TensorDict
from torch.func import vmap

from tdhook.core.errors import InputError
from tdhook.latent.probes.estimators import scikit
from tdhook.latent.probes.probe import decision, predict, predict_probability

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


class Nearest(ClassifierMixin, BaseEstimator):
    """It has labels and nothing else."""

    def fit(self, x, y):
        self.nearest_ = KNeighborsClassifier(1).fit(x, y)
        return self

    def predict(self, x):
        return self.nearest_.predict(x)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(),
        make_pipeline(StandardScaler(), LogisticRegression()),
        KNeighborsClassifier(3),
        RandomForestClassifier(5, random_state=0),
        GaussianNB(),
        SVC(),
        RidgeClassifier(),
        Nearest(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_it_says_what_the_estimator_says(estimator, classes):
    x, y = torch.randn(40, 3).double(), torch.randint(classes, (40,))
    probe, theirs = scikit(estimator)(x, y + 5), estimator.fit(x.numpy(), y.numpy())
    assert torch.equal(predict(probe, x) - 5, torch.from_numpy(theirs.predict(x.numpy())))
    if hasattr(theirs, "predict_proba"):
        CLOSE(predict_probability(probe, x), torch.from_numpy(theirs.predict_proba(x.numpy())))
    elif hasattr(theirs, "decision_function"):
        CLOSE(decision(probe, x), torch.from_numpy(theirs.decision_function(x.numpy())))


def test_regression():
    x, y = torch.randn(30, 3).double(), torch.randn(2, 30).double()
    probe = scikit(LinearRegression())(x, y)
    assert probe.batch_size == (2,)
    design = torch.cat([x, torch.ones(30, 1).double()], -1)
    CLOSE(predict(probe, x)[1], design @ torch.linalg.lstsq(design, y[1]).solution)
    with pytest.raises(InputError, match="a regression, which has no probabilities"):
        predict_probability(probe, x)


def test_sites_and_tasks():
    x, y = torch.randn(2, 30, 3), torch.randint(2, (4, 30))
    probe = scikit(GaussianNB())(x, y)
    assert probe.batch_size == (2, 4) and decision(probe, x).shape == (2, 4, 30)
    alone = scikit(GaussianNB())(x[1], y[2])
    CLOSE(decision(probe, x)[1, 2], decision(alone, x[1]))
    for sites in ({"a": x[0], "b": x[1]}, TensorDict({"a": x[0], "b": x[1]}, [30])):
        CLOSE(decision(scikit(GaussianNB())(sites, y), sites)["b"], decision(probe, x)[1])


def test_the_estimator_is_left_as_it_is():
    estimator = LogisticRegression()
    scikit(estimator)(torch.randn(10, 2), torch.tensor([0, 1] * 5))
    assert not hasattr(estimator, "coef_")


def test_weights():
    x, y = torch.randn(30, 3).double(), torch.randint(2, (30,))
    weights = torch.randint(0, 2, (30,))
    kept = weights > 0
    for estimator in (LogisticRegression(), KNeighborsClassifier(3)):
        fit = scikit(estimator)
        spoilt = torch.where(kept[:, None], x, torch.nan)
        CLOSE(predict_probability(fit(spoilt, y, sample_weight=weights), x), predict_probability(fit(x[kept], y[kept]), x))
    twice = torch.arange(30).repeat_interleave(weights + 1)
    got = scikit(LogisticRegression(tol=1e-8))(x, y, sample_weight=weights + 1)
    expected = scikit(LogisticRegression(tol=1e-8))(x[twice], y[twice])
    torch.testing.assert_close(decision(got, x), decision(expected, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="the fit of KNeighborsClassifier takes no weights"):
        scikit(KNeighborsClassifier(3))(x, y, sample_weight=weights + 1)


def test_half_precision():
    x = torch.randn(20, 3, dtype=torch.bfloat16)
    assert decision(scikit(Perceptron())(x, (x[:, 0] > 0).long()), x).dtype == torch.float32


def test_bad_input(monkeypatch):
    x, y = torch.randn(10, 2), torch.tensor([0, 1] * 5)
    with pytest.raises(InputError, match="give an instance with fit and predict"):
        scikit(SVC)
    with pytest.raises(InputError, match="y has one class only"):
        scikit(SVC())(x, 0 * y)
    with pytest.raises(InputError, match="NaN"):
        scikit(SVC())(x * torch.nan, y)
    with pytest.raises(InputError, match="does not run under vmap"):
        vmap(lambda w: decision(scikit(SVC())(x, y, sample_weight=w, classes=2), x))(torch.ones(2, 10))
    with pytest.raises(InputError, match="the probe has the batch size"):
        decision(scikit(SVC())(x.expand(2, -1, -1), y), x.expand(3, -1, -1))
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(ImportError, match=r"tdhook\[sklearn\]"):
        scikit(SVC())
