"""What holds for every linear probe: rows of weight 0, tasks, sites, chunks, modes of torch, and bad input."""

from functools import partial

import pytest
import torch

from tdhook.core import errors
from tdhook.latent.probes.lda import lda
from tdhook.latent.probes.logistic import logistic
from tdhook.latent.probes.mean_difference import mean_difference
from tdhook.latent.probes.ridge import least_squares, ridge
from tdhook.latent.probes.sparse import sparse

from .data import activations, labels, values

CLASSIFIERS = {
    "logistic": logistic,
    "conjugate": partial(logistic, solver="conjugate"),
    "l1": partial(logistic, penalty="l1", strength=2.0),
    "balanced": partial(logistic, class_weight="balanced"),
    "mean_difference": mean_difference,
    "lda": lda,
    "lda_auto": partial(lda, shrinkage="auto"),
    "sparse": partial(sparse, k=2),
}
REGRESSIONS = {
    "ridge": ridge,
    "ridge_loo": partial(ridge, penalty=[0.1, 10.0]),
    "least_squares": least_squares,
}
CLOSED = ("mean_difference", "lda", "lda_auto", "ridge", "ridge_loo", "least_squares")
FITTERS = {**CLASSIFIERS, **REGRESSIONS}
every = pytest.mark.parametrize("name", FITTERS)


def task(name, x, tasks=None):
    return values(x, tasks) if name in REGRESSIONS else labels(x, 2, tasks)


def known(name):
    return FITTERS[name] if name in REGRESSIONS else partial(FITTERS[name], classes=2)


def assert_same(one, other, tolerance=1e-6):
    assert one.batch_size == other.batch_size
    for field in ("weight", "bias", "classes", "penalty", "loo_errors", "selected"):
        a, b = getattr(one, field), getattr(other, field)
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max())), field


@every
@pytest.mark.parametrize("standardize", [True, False])
def test_rows_of_weight_0_are_absent_whatever_they_hold(name, standardize):
    x = activations(60)
    y = task(name, x)
    kept = torch.arange(60) % 4 != 0
    weight = torch.where(kept, 1.0, 0.0)
    alone = FITTERS[name](x[kept], y[kept], standardize=standardize)
    x[~kept] = torch.tensor([torch.nan, torch.inf, 1e30, 0, -5, 7], dtype=x.dtype)
    y[~kept] = torch.nan if name in REGRESSIONS else -100
    assert_same(FITTERS[name](x, y, sample_weight=weight, standardize=standardize), alone)


@every
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
def test_tasks_and_sites_are_those_of_a_loop_in_chunks_of_any_size(name, chunk_size):
    x = torch.stack([activations(60), activations(60, seed=5)])
    y = task(name, x[0], tasks=3)
    probes = FITTERS[name](x, y, chunk_size=chunk_size)
    assert probes.batch_size == (2, 3)
    for site in range(2):
        for i in range(3):
            assert_same(probes[site, i], FITTERS[name](x[site], y[i]))


@every
def test_tasks_of_several_dimensions(name):
    x = activations(60)
    y = task(name, x, tasks=4).reshape(2, 2, 60)
    probes = FITTERS[name](x, y)
    assert probes.batch_size == (2, 2)
    assert_same(probes[1, 0], FITTERS[name](x, y[1, 0]))


@every
def test_sites_of_unequal_width(name):
    x = {"a": activations(60, 5), "b": activations(60, 3), "c": activations(60, 5, seed=4)}
    y = task(name, x["a"], tasks=2)
    probes = FITTERS[name](x, y, chunk_size=3)
    for key in x:
        assert_same(probes[key], FITTERS[name](x[key], y))


@every
def test_without_grad_mode_and_with_inputs_that_require_grad(name):
    x = activations(40).requires_grad_()
    y = task(name, x.detach())
    expected = FITTERS[name](x, y)
    assert not expected.weight.requires_grad
    with torch.no_grad():
        assert_same(FITTERS[name](x, y), expected)
    with torch.inference_mode():
        assert_same(FITTERS[name](x, y), expected)
        assert_same(FITTERS[name](x.detach().clone(), y.clone()), expected)
    assert x.grad is None


@every
def test_nothing_of_the_caller_is_changed(name):
    x = activations(40)
    y, weight = task(name, x), torch.ones(40)
    before = x.clone(), y.clone(), weight.clone()
    FITTERS[name](x, y, sample_weight=weight)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, weight)))


@every
def test_a_constant_coordinate_is_not_read(name):
    x = activations(60)
    y = task(name, x)
    x[:, 2] = 1e3
    probe = FITTERS[name](x, y)
    assert torch.isfinite(probe.bias).all() and probe.weight[:, 2].abs().max() < 1e-9


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_under_vmap(name):
    x = torch.stack([activations(40), activations(40, seed=7)])
    y = torch.stack([task(name, each) for each in x])
    weight = (torch.arange(40) % 5 != torch.arange(2)[:, None]).double()
    probes = torch.func.vmap(lambda x, y, w: known(name)(x, y, sample_weight=w))(x, y, weight)
    for i in range(2):
        alone = FITTERS[name](x[i], y[i], sample_weight=weight[i])
        assert torch.allclose(probes.weight[i], alone.weight, rtol=1e-6) and torch.allclose(
            probes.bias[i], alone.bias, rtol=1e-6
        )


@pytest.mark.compile
@pytest.mark.parametrize("name", [n for n in CLOSED if n not in ("lda", "ridge")])  # the same with fewer options
def test_closed_forms_compile(name):
    x = activations(40)
    y = task(name, x, tasks=2)
    compiled = torch.compile(lambda x, y: known(name)(x, y), fullgraph=True, backend="aot_eager")(x, y)
    assert_same(compiled, FITTERS[name](x, y))


@every
def test_float32_gives_float32(name):
    x = activations(60)
    y = task(name, x)
    probe = FITTERS[name](x.float(), y.float() if name in REGRESSIONS else y)
    assert probe.weight.dtype == probe.bias.dtype == torch.float32
    exact = FITTERS[name](x, y)
    assert torch.allclose(probe.weight.double(), exact.weight, rtol=1e-2, atol=1e-3 * float(exact.weight.abs().max()))


X = activations()
WRONG = [
    (lambda x, y: (x.long(), y), "x has to be floating-point, got a int64 tensor"),
    (lambda x, y: (x[0], y), r"x has to be a tensor \[N, D\] or \[S, N, D\], or a mapping"),
    (lambda x, y: ([x], y), "x has to be a tensor"),
    (lambda x, y: (x[:, :0], y), "x is empty"),
    (lambda x, y: ({}, y), "x has no site"),
    (lambda x, y: ({"a": x[0]}, y), r"at the site 'a', where a tensor \[N, D\] is expected"),
    (lambda x, y: ({"a": x, "b": x[1:]}, y), "80 rows at the site 'a' and 79 at 'b'; every site needs the same examples"),
    (lambda x, y: (x[1:], y), "y has 80 examples in its last dimension, x has 79 rows"),
    (lambda x, y: (x, y[0]), r"y has to be a tensor \[\*T, 80\]"),
    (lambda x, y: (x, y.tolist()), r"y has to be a tensor \[\*T, 80\]"),
    (lambda x, y: (x, y[None][:0]), "y has no task"),
    (lambda x, y: (torch.where(x > 3, torch.nan, x), y), "x holds NaN or infinite values; give their examples"),
    (lambda x, y: ({"a": x, "b": x / 0}, y), "NaN or infinite values at the site 'b'"),
    (lambda x, y: (torch.stack([x, x / 0]), y), r"NaN or infinite values \(site 1\)"),
]


@pytest.mark.parametrize("name", ["logistic", "ridge", "lda"])
@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_bad_data(name, wrong, message):
    x, y = wrong(X, task(name, X))
    with pytest.raises(errors.InputError, match=message):
        FITTERS[name](x, y)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_bad_labels(name):
    fit = FITTERS[name]
    with pytest.raises(errors.InputError, match=r"y has to hold integer labels, got a float64 tensor"):
        fit(X, labels(X).double())
    with pytest.raises(errors.InputError, match=r"y has one class only, \[3\], in task 1 of 2"):
        fit(X, torch.stack([labels(X), torch.full((80,), 3)]))
    with pytest.raises(errors.InputError, match=r"one class only, \[1\]"):
        fit(X, (labels(X) == 1).long(), sample_weight=(labels(X) == 1).double())
    with pytest.raises(errors.InputError, match="2 classes in task 0 and 3 in task 1"):
        fit(X, torch.stack([labels(X), labels(X, 3)]))
    with pytest.raises(errors.InputError, match="the classes cannot be found in y under vmap"):
        torch.func.vmap(lambda y: fit(X, y).weight)(labels(X, tasks=2))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(79), r"sample_weight has to be a real tensor \[80\], got a float32 tensor of shape \[79\]"),
        (-torch.ones(80), "sample_weight holds negative"),
        (torch.full((80,), torch.nan), "sample_weight holds negative, infinite or NaN"),
        (torch.zeros(80), "sample_weight is 0 everywhere"),
    ],
)
def test_bad_sample_weights(weight, message):
    for fit, y in ((ridge, values(X)), (logistic, labels(X))):
        with pytest.raises(errors.InputError, match=message):
            fit(X, y, sample_weight=weight)


def test_boolean_labels_are_two_classes():
    probe = logistic(X, labels(X).bool())
    assert probe.classes.tolist() == [False, True]
    assert torch.equal(probe.weight, logistic(X, labels(X).to(torch.uint8)).weight)
