"""Scores against scikit-learn and by hand."""

from __future__ import annotations

from functools import partial

import pytest
import sklearn.calibration
import sklearn.metrics
import torch
from torch.func import vmap

from tdhook.core.errors import InputError
from tdhook.latent.probes.calibration import calibration
from tdhook.latent.probes.scores import accuracy, auroc, balanced_accuracy, log_loss, r2
from tdhook.latent.probes.scoring import score_function

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10, check_dtype=False)
N = 60


def each(function, *arrays):
    """An independent score of every row."""
    return torch.tensor([function(*(a.numpy() for a in row)) for row in zip(*arrays)], dtype=torch.float64)


def labels(classes, rows=4):
    return torch.randint(classes, (rows, N))


def integer_weights():
    """With zeros, for which an example is absent."""
    return torch.randint(0, 3, (N,)).double()


@pytest.mark.parametrize("weighted", [False, True])
def test_labels_against_scikit_learn(weighted):
    y, predicted = labels(3), labels(3)
    weights = integer_weights() if weighted else torch.ones(N).double()
    for ours, theirs in [
        (accuracy, sklearn.metrics.accuracy_score),
        (balanced_accuracy, sklearn.metrics.balanced_accuracy_score),
    ]:
        CLOSE(
            ours(predicted, y, sample_weight=weights),
            each(lambda a, b, w=weights, score=theirs: score(a, b, sample_weight=w.numpy()), y, predicted),
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_auroc_with_ties_against_scikit_learn(weighted):
    y, scores = labels(2), torch.randint(0, 6, (4, N)).double()
    weights = integer_weights() if weighted else torch.ones(N).double()
    expected = each(lambda a, b: sklearn.metrics.roc_auc_score(a, b, sample_weight=weights.numpy()), y, scores)
    CLOSE(auroc(scores, y, sample_weight=weights), expected)
    CLOSE(auroc(-scores, y, sample_weight=weights), 1 - expected)


def test_auroc_of_several_classes_against_scikit_learn():
    y, probability = labels(3), torch.randint(1, 5, (4, N, 3)).double()
    probability = probability / probability.sum(-1, keepdim=True)
    CLOSE(auroc(probability, y), each(lambda a, b: sklearn.metrics.roc_auc_score(a, b, multi_class="ovr"), y, probability))


@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_probabilities_against_scikit_learn(weighted):
    weights = integer_weights() if weighted else torch.ones(N).double()
    y, predicted = torch.randn(4, N).double(), torch.randn(4, N).double()
    CLOSE(
        r2(predicted, y, sample_weight=weights),
        each(lambda a, b: sklearn.metrics.r2_score(a, b, sample_weight=weights.numpy()), y, predicted),
    )
    y, probability = labels(3), torch.randn(4, N, 3).double().softmax(-1)
    CLOSE(
        log_loss(probability, y, sample_weight=weights),
        each(lambda a, b: sklearn.metrics.log_loss(a, b, sample_weight=weights.numpy(), labels=[0, 1, 2]), y, probability),
    )


def test_the_loss_of_two_classes_takes_the_probability_of_the_second():
    p, y = torch.rand(N).double(), labels(2)[0]
    CLOSE(log_loss(p, y), log_loss(torch.stack([1 - p, p], -1), y))
    assert log_loss(torch.tensor([0.0]), torch.tensor([1])).isfinite()


def test_calibration_table_against_scikit_learn():
    p, y = torch.rand(N).double(), labels(2)[0]
    got = calibration(p, y, bins=5)
    frequency, confidence = sklearn.calibration.calibration_curve(y.numpy(), p.numpy(), n_bins=5)
    CLOSE(got.frequency, torch.from_numpy(frequency))
    CLOSE(got.confidence, torch.from_numpy(confidence))
    CLOSE(got.error, (got.share * (got.frequency - got.confidence).abs()).sum())
    CLOSE(got.share.sum(), torch.tensor(1.0).double())


def test_calibration_of_several_classes_looks_at_the_likeliest():
    probability = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.6, 0.4, 0.0], [0.3, 0.4, 0.3]])
    got = calibration(probability, torch.tensor([0, 2, 1, 0]), bins=2)
    # one in the lower bin (0.4, wrong), three in the upper (0.7 and 0.8 right, 0.6 wrong)
    torch.testing.assert_close(got.frequency, torch.tensor([0.0, 2 / 3]))
    torch.testing.assert_close(got.error, torch.tensor(0.25 * 0.4 + 0.75 * (0.7 - 2 / 3)))


def test_an_example_of_weight_zero_is_absent_whatever_it_holds():
    y, scores = labels(2)[0], torch.randn(N)
    weights = torch.ones(N)
    weights[:20] = 0
    spoilt = torch.where(weights > 0, scores, torch.nan)
    for score in (auroc, r2):
        torch.testing.assert_close(score(spoilt, y, sample_weight=weights), score(scores[20:], y[20:]))
    probability = spoilt.sigmoid()
    torch.testing.assert_close(log_loss(probability, y, sample_weight=weights), log_loss(scores[20:].sigmoid(), y[20:]))
    got, expected = calibration(probability.nan_to_num(), y, sample_weight=weights), calibration(scores[20:].sigmoid(), y[20:])
    torch.testing.assert_close(tuple(got), tuple(expected), equal_nan=True)


def test_leading_dimensions_broadcast():
    """Three folds of weights, four sites, two tasks."""
    predicted, y, weights = torch.randint(2, (4, 2, N)), labels(2, 2), torch.randint(0, 2, (3, 1, 1, N)).float()
    got = balanced_accuracy(predicted, y, sample_weight=weights)
    assert got.shape == (3, 4, 2)
    assert got[1, 3, 0] == balanced_accuracy(predicted[3, 0], y[0], sample_weight=weights[1, 0, 0])
    assert auroc(torch.randn(4, 2, N), y, sample_weight=weights).shape == (3, 4, 2)


def test_under_vmap():
    y, scores = labels(3), torch.randn(4, N, 3)
    got = vmap(lambda s, t: (auroc(s, t), balanced_accuracy(s.argmax(-1), t, classes=3), log_loss(s.softmax(-1), t)))(scores, y)
    torch.testing.assert_close(
        got, (auroc(scores, y), balanced_accuracy(scores.argmax(-1), y), log_loss(scores.softmax(-1), y))
    )


@pytest.mark.compile
def test_compiled():
    def scores(s, y):
        return (
            auroc(s, y),
            balanced_accuracy(s.argmax(-1), y, classes=3),
            log_loss(s.softmax(-1), y),
            calibration(s.sigmoid(), y)[0],
        )

    s, y = torch.randn(4, N, 3), labels(3)
    compiled = torch.compile(scores, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(s, y), scores(s, y))


def test_what_does_not_exist_is_nan():
    ones = torch.ones(5).long()
    assert auroc(torch.randn(5), ones).isnan()
    assert r2(torch.randn(5), torch.ones(5)).isnan()
    assert accuracy(ones, ones, sample_weight=torch.zeros(5)).isnan()
    assert auroc(torch.tensor([0.0, torch.nan]), torch.tensor([0, 1])).isnan()
    # Classes without examples are left out of means.
    assert balanced_accuracy(ones, ones, classes=3) == 1


def test_bad_input():
    y = torch.tensor([0, 1, 2])
    with pytest.raises(InputError, match=r"predicted has shape \[4\], y \[3\]"):
        accuracy(torch.zeros(4), y)
    with pytest.raises(InputError, match="holds the label 2; labels are from 0 to 1"):
        auroc(torch.zeros(3), y)
    with pytest.raises(InputError, match="holds the label -1; labels are from 0 up"):
        balanced_accuracy(y, y - 1)
    with pytest.raises(InputError, match="say per_class=True"):
        auroc(torch.zeros(3, 3), y)
    with pytest.raises(InputError, match=r"integer labels, y.long\(\)"):
        log_loss(torch.rand(3), torch.rand(3))
    with pytest.raises(InputError, match="bins is an integer of at least 1"):
        calibration(torch.rand(3), y, bins=0)
    with pytest.raises(InputError, match=r"sample_weight \[2\]"):
        accuracy(y, y, sample_weight=torch.ones(2))
    with pytest.raises(InputError, match="classes=None needs the values of y"):
        vmap(lambda t: balanced_accuracy(t, t))(y[None])
    with pytest.raises(InputError, match="score is 'acuracy' of type str; choose 'accuracy'"):
        score_function("acuracy", y)
    with pytest.raises(InputError, match="score='r2' does not fit y"):
        score_function("r2", y)
    with pytest.raises(InputError, match="give a tensor of a number for each example"):
        accuracy([0, 1], y)
