"""Bilinear probes against linear ones on all products of coordinates."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch.func import vmap

from tdhook.core.errors import InputError
from tdhook.latent.probes.bilinear import bilinear
from tdhook.latent.probes.probe import decision, predict, predict_probability

CLOSE = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)
QUICK = {"rank": 2, "steps": 15}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(n=40, widths=(3, 4), lead=()):
    return torch.randn(*lead, n, widths[0]).double() + 1, 5 * torch.randn(*lead, n, widths[1]).double()


def products(x):
    """All products of standardised coordinates."""
    first, second = ((v - v.mean(0)) / v.std(0, correction=0) for v in x)
    return (first[:, :, None] * second[:, None, :]).flatten(1)


@pytest.mark.parametrize("n", [40, 8], ids=["more examples", "more products"])
def test_a_full_regression_is_ridge_on_all_products(n):
    x, y = pair(n), torch.randn(n).double() * 3 + 10
    weights = torch.rand(n).double() + 0.5
    z, scale = products(x), y.std(correction=0)
    for options, w in (({}, None), ({"standardize": False, "sample_weight": weights}, weights.numpy())):
        if options:
            z, scale = (x[0][:, :, None] * x[1][:, None, :]).flatten(1), 1.0
        theirs = Ridge(alpha=2.0).fit(z.numpy(), (y / scale).numpy(), sample_weight=w)
        probe = bilinear(x, y, strength=2.0, **options)
        CLOSE(predict(probe, x), torch.from_numpy(theirs.predict(z.numpy())) * scale)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_full_classifier_is_a_logistic_regression_on_all_products(classes):
    x, y = pair(), torch.randint(classes, (40,))
    probe = bilinear(x, y, strength=3.0, tolerance=1e-9)
    z = products(x).numpy()
    theirs = LogisticRegression(C=1 / 3.0, tol=1e-10, max_iter=1000).fit(z, y.numpy())
    torch.testing.assert_close(predict_probability(probe, x), torch.from_numpy(theirs.predict_proba(z)), rtol=1e-5, atol=1e-6)
    assert probe.gradient < 1e-9


def test_a_rank_is_that_of_every_matrix_whatever_the_classes():
    """The reference tied it to the number of classes."""
    x, y = pair(60, (5, 6)), torch.randint(3, (60,))
    for rank in (1, 2, 4):
        probe = bilinear(x, y, rank=rank, strength=1e-3, steps=30, generator=seeded())
        assert torch.linalg.matrix_rank(probe.weight, rtol=1e-6).tolist() == [rank] * 3
    probe = bilinear(x, (y > 0).long(), rank=2, generator=seeded())
    assert probe.weight.shape == (1, 5, 6) and torch.linalg.matrix_rank(probe.weight, rtol=1e-6) <= 2


def test_factors_are_penalised_as_the_nuclear_norm():
    """With R = D the optimum is that of |W|_*: there the slope of the loss has the spectral norm `strength`."""
    x = pair(40, (2, 2))
    y = 4 * x[0][:, 0] * x[1][:, 1] + torch.randn(40).double()
    options = {"rank": 2, "strength": 50.0, "standardize": False, "tolerance": 1e-9, "steps": 500}
    probe = bilinear(x, y, generator=seeded(), **options)
    slope = torch.einsum("n,nd,ne->de", predict(probe, x) - y, *x)
    torch.testing.assert_close(torch.linalg.matrix_norm(slope, 2), torch.tensor(50.0).double(), rtol=1e-4, atol=0)
    nuclear = torch.linalg.matrix_norm(probe.weight[0], "nuc")
    torch.testing.assert_close((probe.left.square().sum() + probe.right.square().sum()) / 2, nuclear, rtol=1e-4, atol=0)


def test_a_planted_form_is_found():
    x = torch.randn(300, 4).double(), torch.randn(300, 5).double()
    u, v = torch.randn(2, 4).double(), torch.randn(2, 5).double()
    y = (((x[0] @ u.T) * (x[1] @ v.T)).sum(-1) > 0).long()
    probe = bilinear(x, y, rank=2, strength=0.1, generator=seeded())
    assert (predict(probe, x) == y).float().mean() > 0.97
    cosine = torch.cosine_similarity(probe.weight[0].flatten(), (u.T @ v).flatten(), dim=0)
    assert cosine > 0.98


@pytest.mark.parametrize("options", [{}, QUICK], ids=["full", "rank"])
@pytest.mark.parametrize("floating", [False, True])
def test_each_pair_and_task_is_fitted_as_if_it_were_alone(options, floating):
    x = pair(20, lead=(3,))
    y = torch.randn(2, 20).double() if floating else torch.randint(2, (2, 20))
    whole = bilinear(x, y, generator=seeded(), **options)
    assert whole.batch_size == (3, 2)
    for chunk_size in (1, 4):
        CLOSE(decision(bilinear(x, y, generator=seeded(), chunk_size=chunk_size, **options), x), decision(whole, x))
    one = x[0][1], x[1][1]
    CLOSE(decision(bilinear(one, y[1], generator=seeded(), **options), one), decision(whole, x)[1, 1])
    CLOSE(decision(whole[1], one), decision(whole, x)[1])


def test_a_mapping_of_pairs_of_several_widths():
    x = {("a", "b"): pair(), ("a", "c"): pair(widths=(3, 2)), ("b", "c"): pair(widths=(2, 3))}
    y = torch.randint(3, (40,))
    probes = bilinear(x, y, generator=seeded(), **QUICK)
    assert list(probes) == list(x)
    for name in x:
        CLOSE(decision(probes[name], x[name]), decision(bilinear(x[name], y, generator=seeded(), **QUICK), x[name]))
    CLOSE(decision(probes, x)["a", "c"], decision(probes["a", "c"], x["a", "c"]))


@pytest.mark.parametrize("options", [{}, QUICK], ids=["full", "rank"])
@pytest.mark.parametrize("floating", [False, True])
def test_absent_examples(options, floating):
    x, y = pair(), torch.randn(40).double() if floating else torch.randint(2, (40,))
    weights = torch.ones(40).double()
    weights[::3] = 0
    spoilt = tuple(torch.where(weights[:, None] > 0, v, torch.nan) for v in x)
    kept = weights > 0
    got = bilinear(spoilt, y, sample_weight=weights, generator=seeded(), **options)
    CLOSE(decision(got, x), decision(bilinear((x[0][kept], x[1][kept]), y[kept], generator=seeded(), **options), x))


def test_without_autograd_and_under_vmap():
    x, y = pair(), torch.randint(2, (40,))
    expected = decision(bilinear(x, y, generator=seeded(), **QUICK), x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            CLOSE(decision(bilinear(tuple(v.clone() for v in x), y, generator=seeded(), **QUICK), x), expected)
    weights = torch.randint(1, 3, (3, 40)).double()

    def scores(w):
        return decision(bilinear(x, y, sample_weight=w, classes=2, generator=seeded(), **QUICK), x)

    CLOSE(vmap(scores, randomness="same")(weights), torch.stack([scores(w) for w in weights]))


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.randn(6, 2), {}, "give a pair of tensors"),
        ((torch.randn(6, 2), torch.randn(5, 2)), {}, "all but the last dimension are the same"),
        ((torch.randn(6, 2), torch.full((6, 2), torch.nan)), {}, "NaN"),
        ((torch.randn(6, 2), torch.randn(6, 2)), {"rank": 0}, "rank is an integer of at least 1"),
        ((torch.randn(6, 2), torch.randn(6, 2)), {"strength": 0}, "strength is a number above 0"),
        ((torch.randn(6, 2), torch.randn(6, 2)), {"steps": 0}, "steps is an integer"),
        ((torch.randn(6, 2), torch.randn(6, 2)), {"chunk_size": 0}, "chunk_size is an integer"),
    ],
)
def test_bad_input(x, options, message):
    with pytest.raises(InputError, match=message):
        bilinear(x, torch.tensor([0, 1] * 3), **options)


def test_other_widths_than_those_of_the_fit():
    x = pair()
    probe = bilinear(x, torch.randint(2, (40,)))
    with pytest.raises(InputError, match="the probe is of widths 3 and 4"):
        decision(probe, x[::-1])
