"""Erasure: nothing linear is left, and nothing smaller does it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.func import vmap

from tdhook import functionalize, intervene, start_from, stop_at
from tdhook.attribution.integrated_gradients import integrated_gradients
from tdhook.core.errors import InputError
from tdhook.latent.concepts import (
    ConceptVectors,
    Covariances,
    covariances,
    iterative_nullspace_projection,
    leace,
    mean_projection,
    merge_covariances,
    project_out,
    update_covariances,
)

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


def data(classes: int = 2, n: int = 300, d: int = 6):
    """Correlated activations with classes in several directions."""
    labels = torch.arange(n) % classes
    means = 2 * torch.randn(classes, d).double()
    mix = torch.randn(d, d).double() * torch.logspace(-1, 1, d).double()
    return (torch.randn(n, d).double() + means[labels]) @ mix + 5, labels


def cross_covariance(x: Tensor, z: Tensor) -> Tensor:
    z = z.double() if z.ndim > 1 else z.double()[:, None]
    return (x - x.mean(0)).T @ (z - z.mean(0)) / len(x)


def one_hot(labels: Tensor) -> Tensor:
    return nn.functional.one_hot(labels)


def matrix(eraser) -> Tensor:
    return eraser.write @ eraser.read


# LEACE -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("method", [leace, mean_projection])
def test_no_covariance_is_left(classes, method):
    x, labels = data(classes)
    erased = method(x, labels)(x)
    CLOSE(cross_covariance(erased, one_hot(labels)), torch.zeros(6, classes).double())
    assert cross_covariance(x, one_hot(labels)).abs().max() > 0.1


def test_the_closed_form():
    """Theorem 4.3 of the paper, written with matrix square roots of NumPy."""
    x, labels = data(3)
    z = one_hot(labels).double().numpy()
    c = x.numpy() - x.numpy().mean(0)
    sizes, vectors = np.linalg.eigh(c.T @ c / len(c))
    w = vectors @ np.diag(sizes**-0.5) @ vectors.T
    a = w @ c.T @ (z - z.mean(0)) / len(c)
    projection = np.linalg.inv(w) @ a @ np.linalg.pinv(a, rcond=1e-10) @ w
    CLOSE(matrix(leace(x, labels)), torch.from_numpy(projection))


def test_a_refitted_probe_is_at_chance():
    x, labels = data()
    erased = leace(x, labels)(x)
    before, after = (LogisticRegression(C=1e4, max_iter=1000).fit(each, labels) for each in (x.numpy(), erased.numpy()))
    assert before.score(x.numpy(), labels) > 0.9
    np.testing.assert_allclose(after.predict_proba(erased.numpy()), 0.5, atol=1e-3)
    slope = torch.linalg.lstsq(erased - erased.mean(0), labels.double()[:, None] - 0.5, driver="gelsd").solution
    assert ((erased - erased.mean(0)) @ slope).abs().max() < 1e-6


@pytest.mark.parametrize("classes", [2, 4])
def test_the_map_is_an_oblique_projection_about_the_mean(classes):
    x, labels = data(classes)
    eraser = leace(x, labels)
    p = matrix(eraser)
    CLOSE(p @ p, p)
    CLOSE(eraser(eraser(x)), eraser(x))
    CLOSE(eraser(x).mean(0), x.mean(0))
    assert (p - p.T).abs().max() > 0.01
    symmetric = matrix(mean_projection(x, labels))
    CLOSE(symmetric, symmetric.T)
    CLOSE(symmetric @ symmetric, symmetric)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_rank_is_one_less_than_the_classes(classes):
    x, labels = data(classes)
    for eraser in (leace(x, labels), mean_projection(x, labels)):
        assert eraser.rank == classes - 1
        assert torch.linalg.matrix_rank(matrix(eraser)) == classes - 1
    assert leace(x, one_hot(labels)[:, :1]).rank == 1


def test_the_change_is_the_smallest():
    """No other linear map that erases changes x less: not the orthogonal projection, not perturbations that keep erasing."""
    x, labels = data(3)
    p = matrix(leace(x, labels))
    centered = x - x.mean(0)

    def change(projection: Tensor) -> Tensor:
        return (centered @ projection.T).square().sum(1).mean()

    least = change(p)
    assert least < 0.99 * change(matrix(mean_projection(x, labels)))
    kept = torch.eye(6).double() - matrix(mean_projection(x, labels))  # null on cov(x, z)
    for _ in range(20):
        assert change(p + 0.01 * torch.randn(6, 6).double() @ kept) > least
    # first order: the gradient vanishes along all maps that erase
    covariance = centered.T @ centered / len(x)
    CLOSE(p @ covariance @ kept.T, torch.zeros(6, 6).double())


def test_a_concept_that_is_one_coordinate_of_white_data():
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
    CLOSE(leace(x, x[:, 0])(x), x * torch.tensor([0.0, 1.0]).double())


def test_labels_booleans_floats_and_one_hot_agree():
    x, labels = data()
    expected = matrix(leace(x, labels))
    for z in (labels == 1, labels.double(), one_hot(labels), labels * 7 - 3, labels[:, None]):
        CLOSE(matrix(leace(x, z)), expected)


def test_several_continuous_concepts():
    x, _ = data()
    z = x @ torch.randn(6, 2).double() + torch.randn(300, 2).double()
    eraser = leace(x, z)
    assert eraser.rank == 2
    CLOSE(cross_covariance(eraser(x), z), torch.zeros(6, 2).double())


def test_more_features_than_examples_and_constant_features():
    x, labels = torch.randn(20, 50).double(), torch.arange(20) % 2
    x[:, 3] = 1.0
    eraser = leace(x, labels)
    CLOSE(cross_covariance(eraser(x), labels), torch.zeros(50, 1).double())
    CLOSE(eraser(eraser(x)), eraser(x))


def test_tokens():
    x, labels = data()
    eraser = leace(x.reshape(3, 100, 6), labels.reshape(3, 100))
    CLOSE(matrix(eraser), matrix(leace(x, labels)))
    CLOSE(eraser(x.reshape(3, 100, 6)), leace(x, labels)(x).reshape(3, 100, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    x, labels = data()
    x = x.to(dtype)
    eraser = leace(x, labels)
    assert eraser.write.dtype == torch.float32 and eraser(x).dtype == dtype
    left = cross_covariance(eraser(x.float()).double(), labels).abs().max()
    assert left < 1e-4 * cross_covariance(x.double(), labels).abs().max()


# Streams ---------------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_whole():
    x, labels = data(3)
    z = one_hot(labels)
    stream = covariances(x[:50], z[:50])
    for start in (50, 60, 199):
        end = {50: 60, 60: 199, 199: 300}[start]
        stream = update_covariances(stream, x[start:end], z[start:end])
    whole = covariances(x, z)
    for name in ("count", "mean_x", "mean_z", "xx", "xz"):
        CLOSE(getattr(stream, name), getattr(whole, name))
    torch.testing.assert_close(matrix(leace(stream)).double(), matrix(leace(x, labels)), rtol=1e-4, atol=1e-5)
    CLOSE(whole.xx / 300, torch.cov(x.T, correction=0))


def test_streams_merge_and_are_not_changed():
    x, labels = data()
    first, second = covariances(x[:100], labels[:100]), covariances(x[100:], labels[100:])
    kept = first.clone()
    merged = merge_covariances(first, second)
    CLOSE(merged.xz, covariances(x, labels).xz)
    assert isinstance(merged, Covariances) and torch.equal(first.xx, kept.xx)


# In a model ------------------------------------------------------------------------------------------------------------


def model():
    torch.manual_seed(0)
    return functionalize(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double())


def test_an_eraser_is_a_write():
    f, params = model()
    x, z = torch.randn(200, 4).double(), torch.arange(200) % 2
    x = x + 2 * z[:, None]
    eraser = leace(stop_at(f, "1")(params, x), z)
    g = intervene(f, {"1": eraser})
    output = g(params, x)
    assert abs(output[z == 1].mean() - output[z == 0].mean()) < 1e-10  # what follows is linear
    CLOSE(start_from(g, "1")(params, x, stop_at(g, "1")(params, x)), output)
    attributions = integrated_gradients(g, params, x, targets=0, at="0")["0"]
    assert attributions.shape == (200, 6)


@pytest.mark.compile
def test_compiled():
    f, params = model()
    x, z = torch.randn(20, 4).double(), (torch.arange(20) % 2).double()

    def run(x, z):
        return intervene(f, {"1": leace(stop_at(f, "1")(params, x), z)})(params, x)

    CLOSE(torch.compile(run, backend="aot_eager", fullgraph=True)(x, z), run(x, z))


def test_under_vmap_over_layers():
    x, labels = data(3)
    layers = torch.stack([x, x @ torch.randn(6, 6).double(), x.flip(1)])
    erasers = vmap(leace, (0, None))(layers, one_hot(labels))
    for i, layer in enumerate(layers):
        CLOSE(erasers[i](layer), leace(layer, labels)(layer))
    assert erasers.rank.tolist() == [2, 2, 2]


def test_another_axis():
    x = torch.randn(5, 3, 4, 4).double()
    eraser = project_out(torch.tensor([0.0, 2.0, 0.0]).double())
    expected = x.clone()
    expected[:, 1] = 0
    CLOSE(eraser(x, axis=1), expected)
    CLOSE(eraser(x, axis=-3), expected)


# Projections -----------------------------------------------------------------------------------------------------------


def test_directions_are_projected_out():
    rows = torch.randn(2, 5).double()
    x = torch.randn(10, 5).double()
    got = project_out(rows)(x)
    CLOSE(got @ rows.T, torch.zeros(10, 2).double())
    basis, _ = torch.linalg.qr(rows.T)
    CLOSE(got, x - x @ basis @ basis.T)
    CLOSE(project_out(torch.cat([rows, rows.sum(0)[None]]))(x), got)  # rows that depend on each other
    assert project_out(torch.cat([rows, rows])).rank == 2


def test_the_center_stays():
    x = torch.randn(10, 5).double() + 3
    v = ConceptVectors(direction=torch.randn(5).double(), accuracy=torch.tensor(1.0), batch_size=[])
    got = project_out(v, center=x.mean(0))(x)
    CLOSE(got.mean(0), x.mean(0))
    CLOSE(got @ v.direction, (x.mean(0) @ v.direction).expand(10))


def test_the_mean_projection_of_two_classes_removes_the_difference_of_means():
    x, labels = data()
    difference = x[labels == 1].mean(0) - x[labels == 0].mean(0)
    CLOSE(matrix(mean_projection(x, labels)), torch.outer(difference, difference) / difference.square().sum())


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.lstsq(x - x.mean(0), y.to(x) - y.to(x).mean(), driver="gelsd").solution


def test_iterative_projection_removes_what_each_probe_finds():
    x, labels = data()
    eraser = iterative_nullspace_projection(x, labels, rounds=2, fit=lambda x, y: least_squares(x, y[:, None])[:, 0])
    first = least_squares(x, labels[:, None])[:, 0]
    once = project_out(first, center=x.mean(0))(x)
    second = least_squares(once, labels[:, None])[:, 0]
    CLOSE(matrix(eraser), matrix(project_out(torch.stack([first, second]))))
    assert eraser.rank == 2
    CLOSE(eraser(x).mean(0), x.mean(0))


def test_iterative_projection_until_chance_takes_more_than_leace():
    x, labels = data(2, d=4)
    eraser = iterative_nullspace_projection(x, labels, rounds=4, fit=lambda x, y: least_squares(x, y[:, None])[:, 0])
    erased = eraser(x)
    assert eraser.rank > 1
    assert cross_covariance(erased, labels).abs().max() < 0.05 * cross_covariance(x, labels).abs().max()


def test_iterative_projection_with_the_logistic_probe():
    x, labels = data()
    eraser = iterative_nullspace_projection(x, labels, rounds=3)
    assert eraser.rank == 3
    before, after = (LogisticRegression(max_iter=5000).fit(v, labels).score(v, labels) for v in (x.numpy(), eraser(x).numpy()))
    assert after < before


# Bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [leace, mean_projection])
@pytest.mark.parametrize(
    ("x", "z", "message"),
    [
        (torch.randn(4, 3), torch.ones(4), "z is the same for all examples"),
        (torch.randn(4, 3), torch.ones(4, 2), "z is the same for all examples"),
        (torch.randn(4, 3), torch.arange(3), r"z is .* for activations \[4, 3\]; give one for each, \[4\]"),
        (torch.randn(4, 2, 3), torch.arange(4).float(), r"z is .* for activations \[4, 2, 3\]"),
        (torch.randn(4), torch.arange(4), "x is .*give floating-point activations"),
        (torch.full((4, 3), torch.nan), torch.arange(4), "x or z holds NaN"),
        (torch.randn(4, 3), None, "z is None .*; give the concept"),
        (torch.randn(4, 3), [0, 1, 0, 1], "z is .*; give the concept"),
        (covariances(torch.randn(4, 3), torch.arange(4)), torch.arange(4), "takes covariances alone"),
        (covariances(torch.randn(1, 3), torch.arange(1)), None, "needs at least two examples, got 1"),
    ],
)
def test_bad_input(method, x, z, message):
    with pytest.raises(InputError, match=message):
        method(x, z)


def test_labels_that_cannot_be_seen():
    with pytest.raises(InputError, match="give one-hot classes"):
        vmap(leace)(torch.randn(2, 4, 3), torch.arange(8).reshape(2, 4) % 2)


def test_covariances_that_do_not_merge():
    with pytest.raises(InputError, match=r"\[3, 1\] features and concepts do not merge with those of \[3, 2\]"):
        update_covariances(covariances(torch.randn(4, 3), torch.arange(4)), torch.randn(4, 3), torch.randn(4, 2))


def test_values_that_do_not_fit_an_eraser():
    eraser = project_out(torch.ones(3))
    with pytest.raises(InputError, match=r"the eraser is for 3 features, the value is .*axis=1"):
        eraser(torch.randn(2, 3, 4))


@pytest.mark.parametrize(
    ("directions", "center", "message"),
    [
        (torch.zeros(3), None, "directions is zero"),
        (torch.randn(2, 3, 4), None, r"directions has shape \[2, 3, 4\]; give \[D\] or \[K, D\]"),
        (torch.ones(3), torch.ones(2), "center is .* for directions of 3 numbers"),
    ],
)
def test_bad_directions(directions, center, message):
    with pytest.raises(InputError, match=message):
        project_out(directions, center=center)


def test_bad_input_of_iterative_projection():
    with pytest.raises(InputError, match="rounds is an integer of at least 1"):
        iterative_nullspace_projection(torch.randn(4, 3), torch.arange(4), rounds=0)
    with pytest.raises(InputError, match=r"y is .* for x"):
        iterative_nullspace_projection(torch.randn(4, 3), torch.arange(3), rounds=1)
