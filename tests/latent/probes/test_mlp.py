"""Perceptrons against linear optima, and against themselves fitted one by one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from tensordict import TensorDict
from torch.func import vmap

from tdhook.core.errors import InputError
from tdhook.latent.probes.mlp import mlp
from tdhook.latent.probes.probe import decision, predict, predict_probability

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
QUICK = {"hidden": [5], "epochs": 8}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data(n=60, d=4):
    x = torch.randn(n, d).double() * torch.tensor([1.0, 3.0, 0.2, 1.0]).double() + 2
    return x, (x[:, 0] + x[:, 1] / 3 + torch.randn(n).double() > 4).long()


def standardized(x):
    return (x - x.mean(0)) / x.std(0, correction=0)


@pytest.mark.parametrize("classes", [2, 3])
def test_without_hidden_layers_it_is_a_logistic_regression(classes):
    x, y = data()
    if classes == 3:
        y = y + (x[:, 2] > 2).long()
    probe = mlp(x, y, hidden=[], weight_decay=0.1, epochs=200, learning_rate=0.1)
    theirs = LogisticRegression(C=1 / (0.1 * len(x)), tol=1e-10, max_iter=1000).fit(standardized(x).numpy(), y.numpy())
    expected = torch.from_numpy(theirs.predict_proba(standardized(x).numpy()))
    torch.testing.assert_close(predict_probability(probe, x), expected, rtol=1e-4, atol=1e-4)


def test_without_hidden_layers_it_is_a_ridge_regression():
    x, _ = data()
    y = (x @ torch.randn(4).double() + torch.randn(60).double()) * 7 + 100
    probe = mlp(x, y, hidden=[], weight_decay=0.1, epochs=250, learning_rate=0.1)
    z = standardized(y)
    theirs = Ridge(alpha=0.1 * len(x)).fit(standardized(x).numpy(), z.numpy())
    fitted = torch.from_numpy(theirs.predict(standardized(x).numpy()))
    torch.testing.assert_close(predict(probe, x), fitted * y.std(correction=0) + y.mean(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(probe.loss, (predict(probe, x) - y).square().mean() / 2)


def test_it_learns_what_no_linear_probe_can():
    x = torch.randn(300, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    options = {"epochs": 60, "learning_rate": 0.05, "generator": seeded()}
    assert (predict(mlp(x, y, hidden=[16], **options), x) == y).float().mean() > 0.9
    assert (predict(mlp(x, y, hidden=[], **options), x) == y).float().mean() < 0.65


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 16}, {"validation": 0.3, "patience": 2}], ids=lambda o: next(iter(o), "whole")
)
def test_each_site_and_task_is_fitted_as_if_it_were_alone(options):
    x, y = torch.randn(3, 40, 4).double(), torch.randint(2, (2, 40))
    options = {**QUICK, **options}
    whole = mlp(x, y, generator=seeded(), **options)
    assert whole.batch_size == (3, 2)
    for chunk_size in (1, 4, 100):
        chunked = mlp(x, y, generator=seeded(), chunk_size=chunk_size, **options)
        CLOSE(decision(chunked, x), decision(whole, x))
    alone = mlp(x[1], y[1], generator=seeded(), **options)
    CLOSE(decision(alone, x[1]), decision(whole, x)[1, 1])
    assert alone.epochs == whole.epochs[1, 1]


def test_mappings_of_sites_of_several_widths():
    x = {"a": torch.randn(30, 3), "b": torch.randn(30, 5), "c": torch.randn(30, 3)}
    y = torch.randint(3, (30,))
    probes = mlp(x, y, generator=seeded(), **QUICK)
    assert list(probes) == ["a", "b", "c"]
    for site in x:
        alone = mlp(x[site], y, generator=seeded(), **QUICK)
        torch.testing.assert_close(decision(probes, x)[site], decision(alone, x[site]))
    assert isinstance(mlp(TensorDict(x, [30]), y, **QUICK), TensorDict)


def test_several_labels():
    x = torch.randn(200, 4)
    y = torch.stack([x[:, 0] > 0, x[:, 1] * x[:, 2] > 0, x[:, 3] < 0.5], -1).long()
    probe = mlp(x, y, multi_label=True, hidden=[16], epochs=60, learning_rate=0.05, generator=seeded())
    assert decision(probe, x).shape == (200, 3)
    assert ((predict(probe, x) == y).float().mean(0) > 0.9).all()
    CLOSE(predict_probability(probe, x)[..., 1], decision(probe, x).sigmoid())
    # One label is a binary task, and tasks of several labels have a dimension.
    single = mlp(x, y[:, :1], multi_label=True, generator=seeded(), **QUICK)
    torch.testing.assert_close(decision(single, x)[:, 0], decision(mlp(x, y[:, 0], generator=seeded(), **QUICK), x))
    tasks = mlp(x.expand(2, -1, -1), torch.stack([y, 1 - y]), multi_label=True, generator=seeded(), **QUICK)
    assert tasks.batch_size == (2, 2) and decision(tasks, x.expand(2, -1, -1)).shape == (2, 2, 200, 3)
    assert predict(tasks, x.expand(2, -1, -1)).shape == (2, 2, 200, 3)


@pytest.mark.parametrize("options", [{}, {"batch_size": 7}, {"validation": 0.3}], ids=lambda o: next(iter(o), "whole"))
def test_what_an_absent_example_holds_has_no_effect(options):
    x, y = data(40)
    weights = torch.ones(40).double()
    weights[::3] = 0
    spoilt, wrong = torch.where(weights[:, None] > 0, x, torch.nan), torch.where(weights > 0, y, 1 - y)
    fit = partial(mlp, sample_weight=weights, **QUICK, **options)
    CLOSE(decision(fit(spoilt, wrong, generator=seeded()), x), decision(fit(x, y, generator=seeded()), x))
    if not options:
        CLOSE(
            decision(fit(x, y, generator=seeded()), x),
            decision(mlp(x[weights > 0], y[weights > 0], generator=seeded(), **QUICK), x),
        )


def test_weights_count_as_copies():
    x, y = data(30)
    weights = torch.randint(1, 3, (30,))
    twice = torch.arange(30).repeat_interleave(weights)
    got = mlp(x, y, sample_weight=weights, generator=seeded(), **QUICK)
    CLOSE(decision(got, x), decision(mlp(x[twice], y[twice], generator=seeded(), **QUICK), x))


def test_early_stopping_keeps_the_best_parameters():
    x, y = torch.randn(40, 10), torch.randint(2, (40,))  # nothing to learn
    probe = mlp(x, y, validation=0.3, epochs=200, patience=3, learning_rate=0.05, generator=seeded())
    assert probe.epochs < 20
    shorter = mlp(x, y, validation=0.3, epochs=int(probe.epochs), patience=3, learning_rate=0.05, generator=seeded())
    torch.testing.assert_close(decision(shorter, x), decision(probe, x))


def test_without_autograd():
    """A fit inside of no_grad failed in the reference."""
    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    expected = decision(mlp(x, y, generator=seeded(), **QUICK), x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(decision(mlp(x.clone(), y, generator=seeded(), **QUICK), x), expected)
            assert torch.is_grad_enabled() is False


def test_randomness_is_that_of_the_generator():
    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    state = torch.get_rng_state()
    a, b, c = (decision(mlp(x, y, generator=seeded(s), **QUICK), x) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_folds_of_weights_are_one_vmapped_fit():
    x, y = data(30)
    folds = torch.randint(0, 2, (4, 30)).double()

    def scores(w):
        return decision(mlp(x, y, sample_weight=w, classes=2, generator=seeded(), validation=0.2, **QUICK), x)

    CLOSE(vmap(scores, randomness="same")(folds), torch.stack([scores(w) for w in folds]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    x = torch.randn(20, 3, dtype=dtype)
    y = (x[:, 0] > 0).long() * 4 - 1
    assert decision(mlp(x, y, **QUICK), x).dtype == torch.float32
    assert predict(mlp(x, y, hidden=[], epochs=50), x).unique().tolist() == [-1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 64}, "hidden is 64 of type int; give the widths"),
        ({"hidden": [0]}, "an element of hidden is an integer of at least 1"),
        ({"activation": "relo"}, "activation is 'relo' of type str; choose 'relu'"),
        ({"epochs": 0}, "epochs is an integer of at least 1"),
        ({"batch_size": 0}, "batch_size is an integer of at least 1"),
        ({"validation": 1.0}, "validation is 1.0 of type float; it is a share"),
        ({"weight_decay": -1}, "weight_decay is a number of at least 0"),
        ({"learning_rate": 0}, "learning_rate is a number above 0"),
        ({"patience": 0}, "patience is an integer"),
        ({"chunk_size": 0}, "chunk_size is an integer"),
        ({"generator": 3}, "generator is 3"),
        ({"multi_label": True}, "with multi_label it is a tensor"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        mlp(torch.randn(6, 2), torch.tensor([0, 1] * 3), **options)


def test_bad_data():
    x, y = torch.randn(6, 2), torch.tensor([0, 1] * 3)
    with pytest.raises(InputError, match="y has one class only"):
        mlp(x, 0 * y)
    with pytest.raises(InputError, match="NaN"):
        mlp(x * torch.nan, y)
    with pytest.raises(InputError, match="y has 5 examples"):
        mlp(x, y[:5])
    with pytest.raises(InputError, match="values other than 0 and 1"):
        mlp(x, y[:, None] + 1, multi_label=True)
    with pytest.raises(InputError, match="the probe is of width 2"):
        decision(mlp(x, y, **QUICK), torch.randn(6, 3))
