"""Logistic regression against scikit-learn, and its minimisers against each other."""

import numpy
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tdhook.core import errors
from tdhook.latent.probes.logistic import logistic
from tdhook.latent.probes.probe import predict, predict_probability

from .data import activations, generator, labels, weights


def reference(x, y, standardize=True, sample_weight=None, fit_intercept=True, l1=False, **options):
    """Weight and bias of scikit-learn, in the units of x."""
    scale, mean = numpy.ones(x.shape[1]), numpy.zeros(x.shape[1])
    if standardize:
        scaler = StandardScaler(with_mean=fit_intercept).fit(x.numpy(), sample_weight=sample_weight)
        scale, mean = scaler.scale_, scaler.mean_ if fit_intercept else mean
    how = dict(l1_ratio=1.0, solver="saga") if l1 else dict(solver="newton-cholesky")
    model = LogisticRegression(tol=1e-12, max_iter=200_000, fit_intercept=fit_intercept, random_state=0, **how, **options)
    model.fit((x.numpy() - mean) / scale, y.numpy(), sample_weight=sample_weight)
    weight = model.coef_ / scale
    return torch.from_numpy(weight), torch.from_numpy(model.intercept_ - weight @ mean)


def assert_close(probe, expected, tolerance=1e-6):
    weight, bias = expected
    assert torch.allclose(probe.weight, weight, rtol=tolerance, atol=tolerance * weight.abs().max())
    centred = probe.bias - probe.bias.mean() if len(bias) > 1 else probe.bias
    assert torch.allclose(centred, bias - bias.mean() if len(bias) > 1 else bias, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver", ["direct", "conjugate"])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_equals_scikit_learn(solver, classes, standardize, fit_intercept):
    x = activations(120)
    y, w = labels(x, classes), weights(120)
    options = dict(standardize=standardize, fit_intercept=fit_intercept)
    probe = logistic(x, y, strength=0.5, sample_weight=w, solver=solver, **options)
    assert probe.converged.all()
    assert_close(probe, reference(x, y, C=2.0, sample_weight=w.numpy(), **options))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", ["balanced", "given", "both"])
def test_class_weights_equal_scikit_learn(classes, kind):
    x = activations()
    y = labels(x, classes).clamp(min=1) if classes == 3 else labels(x) * (torch.arange(80) % 3 == 0)
    y = torch.where(torch.arange(80) % 7 == 0, 0, y)
    w = weights() if kind == "both" else None
    given = torch.tensor([0.5, 2.0, 3.0])[:classes]
    probe = logistic(x, y, class_weight=given if kind == "given" else "balanced", sample_weight=w)
    theirs = dict(enumerate(given.tolist())) if kind == "given" else "balanced"
    if kind == "both":  # scikit-learn counts examples before version 1.7, ours are weights
        share = [float(w.sum() / (classes * w[y == c].sum())) for c in range(classes)]
        theirs = dict(enumerate(share))
    assert_close(probe, reference(x, y, class_weight=theirs, sample_weight=None if w is None else w.numpy()))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("standardize", [True, False])
def test_l1_equals_scikit_learn(classes, standardize):
    x = activations(60, 4) / 5
    y = labels(x, classes)
    probe = logistic(x, y, penalty="l1", strength=3.0, standardize=standardize)
    assert probe.converged.all()
    expected = reference(x, y, C=1 / 3, standardize=standardize, l1=True)
    assert_close(probe, expected)
    assert torch.equal(probe.weight == 0, expected[0] == 0) and (probe.weight == 0).any()


def test_a_strong_l1_penalty_leaves_the_base_rate():
    x, y = activations(), labels(activations())
    probe = logistic(x, y, penalty="l1", strength=1e3)
    assert probe.weight.count_nonzero() == 0
    assert torch.allclose(probe.bias.sigmoid(), y.double().mean())


def test_l2_of_more_coordinates_than_examples():
    x = activations(20, 50)
    y = labels(x, tasks=2)
    probe = logistic(x, y, strength=0.1)
    for task in range(2):
        assert_close(probe[task], reference(x, y[task], C=10))


@pytest.mark.parametrize("classes", [2, 3])
def test_the_gradient_is_zero_without_a_penalty(classes):
    x = activations()
    y = labels(x, classes)
    probe = logistic(x, y, strength=0, standardize=False)
    p = predict_probability(probe, x)
    wrong = p - torch.nn.functional.one_hot(y, classes)
    assert (wrong.mT @ x).abs().max() < 1e-5 and wrong.sum(0).abs().max() < 1e-6


def test_solvers_agree_on_many_tasks():
    x = activations(100, 30)
    y = labels(x, 3, tasks=4)
    direct, conjugate = (logistic(x, y, solver=solver, strength=0.01) for solver in ("direct", "conjugate"))
    assert direct.converged.all() and conjugate.converged.all()
    assert torch.allclose(direct.weight, conjugate.weight, rtol=1e-6, atol=1e-6)


def test_float32_and_bfloat16():
    x = activations(200, 8)
    y = labels(x)
    exact = logistic(x, y)
    single = logistic(x.float(), y)
    assert single.weight.dtype == torch.float32 and single.converged
    assert torch.allclose(single.weight.double(), exact.weight, rtol=1e-3, atol=1e-4)
    half = logistic(x.bfloat16(), y)
    assert half.weight.dtype == torch.float32 and half.converged
    assert (predict(half, x.bfloat16()) == predict(exact, x)).double().mean() > 0.95


def test_coordinates_of_very_different_size():
    x = activations(200, 8) * torch.logspace(-4, 4, 8, dtype=torch.float64)
    probe = logistic(x.float(), labels(x))
    assert probe.converged
    assert torch.allclose(probe.weight.double(), logistic(x, labels(x)).weight, rtol=1e-3)


def test_labels_change_names_not_probes():
    x = activations()
    y = labels(x, 3)
    probe, other = logistic(x, y), logistic(x, torch.tensor([5, -1, 100])[y])  # in order: -1, 5, 100
    assert other.classes.tolist() == [-1, 5, 100]
    assert torch.allclose(other.weight, probe.weight[[1, 0, 2]], atol=1e-7)
    given = logistic(x, torch.tensor([5, -1, 100])[y], classes=torch.tensor([5, -1, 100]))
    assert torch.allclose(given.weight, probe.weight, atol=1e-12)
    swapped = logistic(x, (y == 0).long(), classes=torch.tensor([1, 0]))
    assert torch.allclose(swapped.weight, -logistic(x, (y == 0).long()).weight, atol=1e-9)


def test_tasks_may_have_labels_of_their_own():
    x = activations()
    y = torch.stack([labels(x), 3 + labels(x, seed=9)])
    probe = logistic(x, y)
    assert probe.classes.tolist() == [[0, 1], [3, 4]]
    assert torch.equal(predict(probe, x)[1], 3 + predict(logistic(x, y[1] - 3), x))


def test_a_fit_that_does_not_converge_warns():
    x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    with pytest.warns(errors.TdhookWarning, match="logistic: 1 of 1 fits did not converge"):
        probe = logistic(x, torch.tensor([0, 0, 1, 1]), strength=0, max_iterations=3)
    assert not probe.converged and probe.iterations == 3


def test_separable_classes_converge_with_a_penalty():
    x = torch.cat([activations(40), 100 + activations(40, seed=1)])
    y = torch.arange(80) // 40
    probe = logistic(x, y, strength=1e-6)
    assert probe.converged and torch.equal(predict(probe, x), y)


def test_fits_that_end_early_wait_for_the_others():
    x = activations(100, 6)
    y = torch.stack([labels(x), (x[:, 0] > x[:, 0].median()).long()])
    together = logistic(x, y, strength=1e-3)
    alone = [logistic(x, each, strength=1e-3) for each in y]
    assert together.iterations[0] != together.iterations[1]
    for i in range(2):
        assert together.iterations[i] == alone[i].iterations
        assert torch.allclose(together[i].weight, alone[i].weight, rtol=1e-10)


def test_folds_under_vmap_are_fits_of_the_rows_that_are_left():
    x = activations(60)
    y = labels(x)
    folds = (torch.arange(60) % 3 != torch.arange(3)[:, None]).double()
    for options in (dict(solver="direct"), dict(solver="conjugate"), dict(penalty="l1", strength=2.0)):
        probes = torch.func.vmap(lambda w, o=options: logistic(x, y, sample_weight=w, classes=2, **o).weight)(folds)
        for fold, weight in zip(folds, probes):
            alone = logistic(x[fold > 0], y[fold > 0], **options)
            assert torch.allclose(weight, alone.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.compile
def test_newton_compiles():
    x = activations(30, 2)
    y = labels(x, tasks=2)
    options = dict(strength=100.0, tolerance=1e-5, max_iterations=2)  # one task takes a step, the other one two
    fit = torch.compile(lambda x, y: logistic(x, y, classes=2, **options), fullgraph=True, backend="aot_eager")
    compiled, eager = fit(x, y), logistic(x, y, **options)
    assert compiled.converged.all() and torch.allclose(compiled.weight, eager.weight, rtol=1e-6)
    assert torch.equal(compiled.iterations, eager.iterations)


@pytest.mark.compile
@pytest.mark.parametrize("options", [dict(penalty="l1"), dict(solver="conjugate")])
def test_what_takes_as_many_steps_as_needed_does_not_compile(options):
    fit = torch.compile(lambda x, y: logistic(x, y, classes=2, **options), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="which compiled code cannot"):
        fit(activations(), labels(activations()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(penalty="elastic"), "penalty='elastic' is unknown; choose from l2, l1"),
        (dict(strength=-1.0), "strength is a number of at least 0, got -1.0"),
        (dict(solver="lbfgs"), "solver='lbfgs' is unknown"),
        (dict(penalty="l1", solver="direct"), "is of penalty='l2'"),
        (dict(tolerance=0.0), "tolerance is a number above 0"),
        (dict(max_iterations=0), "max_iterations is an integer of at least 1"),
        (dict(chunk_size=0), "chunk_size is an integer of at least 1"),
        (dict(class_weight="equal"), "class_weight has to be None, 'balanced' or a tensor"),
        (dict(class_weight=torch.ones(3)), r"a tensor \[2\], got a float32 tensor of shape \[3\]"),
        (dict(class_weight=torch.tensor([1.0, 0.0])), r"class_weight has to be positive and finite, got \[1.0, 0.0\]"),
        (dict(classes=1), "classes is an integer of at least 2"),
        (dict(classes=torch.tensor([0.0, 1.0])), "classes has to be an integer tensor"),
        (dict(classes=torch.tensor([0, 2])), r"y has the label 1, which is none of the classes \[0, 2\]"),
        (dict(classes=3), "class 2 has 0 examples"),
    ],
)
def test_bad_options(options, message):
    x = activations()
    with pytest.raises(errors.InputError, match=message):
        logistic(x, labels(x), **options)


def test_random_noise_is_not_learned_in_the_limit():
    x = torch.randn(100, 3, generator=generator(), dtype=torch.float64)
    probe = logistic(x, torch.arange(100) % 2, strength=1e8)
    assert probe.weight.abs().max() < 1e-6
