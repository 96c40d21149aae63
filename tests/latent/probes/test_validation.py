"""Cross-validation against loops, and against scikit-learn on the same folds."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tensordict import TensorDict

from tdhook.core.errors import InputError
from tdhook.latent.probes import lda, least_squares, logistic, mean_difference, ridge
from tdhook.latent.probes.bilinear import bilinear
from tdhook.latent.probes.estimators import scikit
from tdhook.latent.probes.folds import fold_numbers
from tdhook.latent.probes.mlp import mlp
from tdhook.latent.probes.probe import decision, predict
from tdhook.latent.probes.scores import auroc, r2
from tdhook.latent.probes.validation import cross_validate

CLOSE = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8, check_dtype=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data(n=60, d=4, classes=2):
    x = torch.randn(n, d).double() * torch.tensor([1.0, 10.0, 0.1, 1.0]).double() + 3
    return x, (x[:, 0] + torch.randn(n).double() > 3).long() + torch.randint(classes - 1, (n,))


# Folds -----------------------------------------------------------------------------------------------------------------


def test_stratified_folds_have_their_share_of_each_class():
    y = torch.tensor([0] * 20 + [1] * 9 + [2] * 3)
    fold = fold_numbers(y, 3, generator=seeded())
    for c, allowed in ((0, {6, 7}), (1, {3}), (2, {1})):
        assert set(fold[y == c].bincount(minlength=3).tolist()) <= allowed
    assert set(fold.bincount().tolist()) <= {10, 11}
    several = fold_numbers(torch.stack([y, torch.randint(2, (32,))]), 3)
    assert set(several[y == 1].bincount(minlength=3).tolist()) == {3}


def test_groups_stay_together_in_folds_of_equal_size():
    groups = torch.tensor([7, 7, 7, 7, 3, 3, 9, 9, 5, 5, 5, 5])
    fold = fold_numbers(torch.zeros(12).long(), 3, groups=groups, generator=seeded())
    assert fold.bincount().tolist() == [4, 4, 4]
    assert all(len(fold[groups == g].unique()) == 1 for g in groups)


def test_folds_are_those_of_the_generator():
    y = torch.randint(2, (30,))
    state = torch.get_rng_state()
    assert torch.equal(fold_numbers(y, 3, generator=seeded()), fold_numbers(y, 3, generator=seeded()))
    assert not torch.equal(fold_numbers(y, 3, generator=seeded()), fold_numbers(y, 3, generator=seeded(1)))
    assert torch.equal(torch.get_rng_state(), state)


# Cross-validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "classes"),
    [("accuracy", 2), ("accuracy", 3), ("balanced_accuracy", 3), ("auroc", 2), ("log_loss", 2), ("log_loss", 3)],
)
def test_against_scikit_learn(score, classes):
    """Standardisation inside of the fit, as in a pipeline: nothing leaks from the fold that is tested."""
    x, y = data(classes=classes)
    y = 3 - y  # labels that are no numbers from 0 up
    found = cross_validate(partial(logistic, strength=2.0), x, y, score=score, generator=seeded())
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, tol=1e-10, max_iter=1000))
    name = {"auroc": "roc_auc", "log_loss": "neg_log_loss"}.get(score, score)
    folds = PredefinedSplit(found.folds.numpy())
    expected = torch.from_numpy(cross_val_score(theirs, x.numpy(), y.numpy(), cv=folds, scoring=name))
    torch.testing.assert_close(found.scores, abs(expected), rtol=1e-5, atol=1e-5, check_dtype=False)
    assert torch.equal(found.predictions, torch.from_numpy(cross_val_predict(theirs, x.numpy(), y.numpy(), cv=folds)))
    torch.testing.assert_close(found.mean.value, found.scores.mean(0))
    torch.testing.assert_close(found.mean.standard_error, found.scores.std(0) / 5**0.5)


def test_nothing_of_a_fold_reaches_its_own_probe():
    """What is tested may hold anything: its predictions change, those of the other examples of its fold do not."""
    x, y = data()
    fold = torch.arange(60) % 4
    spoilt = x.clone()
    spoilt[0] = 1e6
    fit = partial(ridge, penalty=3.0)
    a, b = (cross_validate(fit, values, y.double(), folds=fold).predictions for values in (x, spoilt))
    own = fold == fold[0]
    CLOSE(a[own][1:], b[own][1:])
    assert not torch.allclose(a[~own], b[~own])


def test_all_sites_and_tasks_equal_loops():
    x = torch.randn(3, 40, 4).double()
    y = torch.stack([(x[1, :, 0] > 0).long(), (x[2, :, 1] > 0).long()])
    fold = fold_numbers(y, 4, generator=seeded())
    found = cross_validate(logistic, x, y, folds=fold)
    assert found.scores.shape == (4, 3, 2) and found.mean.value.shape == (3, 2) and found.predictions.shape == (3, 2, 40)
    for f in range(4):
        probe = logistic(x[:, fold != f], y[:, fold != f])
        expected = predict(probe, x[:, fold == f])
        assert torch.equal(found.predictions[..., fold == f], expected)
        torch.testing.assert_close(found.scores[f], (expected == y[:, fold == f]).float().mean(-1))


@pytest.mark.parametrize(
    "fit",
    [
        logistic,
        mean_difference,
        partial(mlp, hidden=[3], epochs=5, batch_size=7, generator=torch.Generator()),
        scikit(GaussianNB()),
        lambda x, y, sample_weight: logistic(x, y, sample_weight=sample_weight),
    ],
    ids=["logistic", "mean_difference", "mlp", "scikit", "looks for the classes"],
)
def test_chunks_of_folds_change_nothing(fit):
    x, y = data(30)
    found = [cross_validate(fit, x, y + 4, folds=4, chunk_size=c, generator=seeded(), score="log_loss") for c in (1, 3, None)]
    if isinstance(fit, partial):  # its generator moves on from call to call
        found = []
        for c in (1, 3, None):
            fit.keywords["generator"].manual_seed(0)
            found.append(cross_validate(fit, x, y + 4, folds=4, chunk_size=c, generator=seeded(), score="log_loss"))
    for other in found[1:]:
        CLOSE(other.scores, found[0].scores)
        assert torch.equal(other.predictions, found[0].predictions)
    assert set(found[0].predictions.tolist()) <= {4, 5}


def test_vmapped_fits_are_called_once():
    calls = []

    def fit(x, y, *, sample_weight, classes=None):
        calls.append(sample_weight.shape)
        return logistic(x, y, sample_weight=sample_weight, classes=classes)

    x, y = data()
    cross_validate(fit, x, y, folds=6)
    assert len(calls) == 1


def test_mappings_and_pairs():
    x = {"a": torch.randn(30, 3), "b": torch.randn(30, 5)}
    y = torch.randint(2, (30,))
    found = cross_validate(logistic, x, y, folds=3, generator=seeded())
    for site in x:
        alone = cross_validate(logistic, x[site], y, folds=3, generator=seeded())
        torch.testing.assert_close(found[site].scores, alone.scores)
    held = cross_validate(logistic, TensorDict(x, [30]), y, folds=3, generator=seeded())
    assert torch.equal(held["b"].predictions, found["b"].predictions)
    pairs = cross_validate(partial(bilinear, steps=5), {("a", "b"): (x["a"], x["b"])}, y, folds=3)
    assert pairs["a", "b"].scores.shape == (3,)


def test_values():
    x = torch.randn(40, 3).double()
    y = x @ torch.randn(3).double() + 0.1 * torch.randn(2, 40).double()
    found = cross_validate(least_squares, x, y, folds=4)
    assert (found.mean.value > 0.9).all() and found.scores.shape == (4, 2)
    for f in range(4):
        inside = found.folds == f
        CLOSE(found.scores[f], r2(found.predictions[:, inside], y[:, inside]))


def test_auroc_of_several_classes_is_that_of_the_decisions():
    x, y = data(classes=3)
    found = cross_validate(lda, x, y, score="auroc", folds=3)
    for f in range(3):
        inside = found.folds == f
        probe = lda(x[~inside], y[~inside])
        CLOSE(found.scores[f], auroc(decision(probe, x[inside]), y[inside]))


def test_several_labels():
    x = torch.randn(50, 3)
    y = (x > 0).long()
    fit = partial(mlp, hidden=[], multi_label=True, epochs=30, learning_rate=0.15)
    for score in ("accuracy", "auroc", "log_loss"):
        found = cross_validate(fit, x, y, folds=3, multi_label=True, score=score)
        assert found.scores.shape == (3, 3) and found.predictions.shape == (50, 3)
    assert (found.predictions == y).float().mean() > 0.9


def test_a_score_of_your_own():
    x, y = data()
    found = cross_validate(logistic, x, y, score=lambda p, t, sample_weight: (sample_weight * (p != t)).sum(-1))
    assert found.scores.sum() == (found.predictions != y).sum()


def test_without_autograd():
    x, y = data()
    with torch.inference_mode():
        got = cross_validate(logistic, x.clone(), y, generator=seeded())
    assert torch.equal(got.predictions, cross_validate(logistic, x, y, generator=seeded()).predictions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "folds is an integer of at least 2"),
        ({"folds": 13}, "folds=13 is more than the 12 examples"),
        ({"folds": torch.zeros(12).long()}, "they are 0 to F - 1 for at least 2 folds"),
        ({"folds": torch.zeros(5).long()}, r"give a number, or an integer tensor \[12\]"),
        ({"folds": torch.tensor([0] * 6 + [1] * 6)}, "class 0 of task 0 has no example to train on in fold 0"),
        ({"folds": 8, "score": "auroc"}, "has no example to test on in fold"),
        ({"groups": torch.tensor([0, 1] * 6)}, "groups has 2 groups, fewer than folds=5"),
        ({"groups": torch.zeros(3)}, "groups is a float32 tensor"),
        ({"groups": torch.arange(12), "stratified": True}, "stratified=True does not go with groups"),
        ({"score": "f1"}, "score is 'f1' of type str; choose 'accuracy'"),
        ({"score": "r2"}, "score='r2' does not fit y"),
        ({"chunk_size": 0}, "chunk_size is an integer"),
        ({"generator": 0}, "generator is 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        cross_validate(logistic, torch.randn(12, 2), torch.tensor([0] * 6 + [1] * 6), **options)


def test_bad_data():
    x, y = torch.randn(12, 2), torch.tensor([0] * 6 + [1] * 6)
    with pytest.raises(InputError, match="NaN"):
        cross_validate(logistic, x * torch.nan, y)
    with pytest.raises(InputError, match="y has one class only"):
        cross_validate(logistic, x, 0 * y)
    with pytest.raises(InputError, match="y has 11 examples"):
        cross_validate(logistic, x, y[:11])
    with pytest.raises(InputError, match="stratified=True does not go with y, which is floating-point"):
        cross_validate(ridge, x, y.float(), stratified=True)
    with pytest.raises(InputError, match=r"give y.float\(\) to a regression"):
        cross_validate(ridge, x, y)
    with pytest.raises(InputError, match="fit is 3"):
        cross_validate(3, x, y)
    with pytest.raises(InputError, match="x is None"):
        cross_validate(logistic, None, y)
