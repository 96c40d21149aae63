"""Curvature products against dense matrices and closed forms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

from tdhook import functionalize
from tdhook.core import errors
from tdhook.weights.conjugate_gradient import conjugate_gradient
from tdhook.weights.curvature import fisher_vector_product, gauss_newton_vector_product, hessian_vector_product

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def setting(batch=5):
    torch.manual_seed(0)
    f, params = functionalize(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double())
    x, y = torch.randn(batch, 4).double(), torch.randint(3, (batch,))
    vector = params.apply(torch.randn_like)
    return f, params, x, y, vector


def flat(params):
    return torch.cat([value.flatten() for value in params.values(True, True)])


def unflat(params, vector):
    new = params.clone()
    place = 0
    for key, value in params.items(True, True):
        new[key] = vector[place : place + value.numel()].reshape(value.shape)
        place += value.numel()
    return new


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
def test_a_dense_hessian(batch, chunk_size):
    f, params, x, y, vector = setting(batch)
    dense = torch.autograd.functional.hessian(lambda v: F.cross_entropy(f(unflat(params, v), x), y), flat(params))
    found = hessian_vector_product(f, params, x, F.cross_entropy, vector, labels=y, chunk_size=chunk_size)
    CLOSE(flat(found), dense @ flat(vector))


def test_the_hessian_of_selected_parameters_is_a_block():
    f, params, x, y, vector = setting()
    dense = torch.autograd.functional.hessian(lambda v: F.cross_entropy(f(unflat(params, v), x), y), flat(params))
    block = slice(0, 15)  # the first layer
    first = TensorDict({"0": vector["0"]}, [])
    found = hessian_vector_product(f, params, x, F.cross_entropy, first, labels=y, select="0")
    CLOSE(flat(found), dense[block, block] @ flat(first))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gauss_newton_is_jacobians_around_the_hessian_of_the_loss(chunk_size):
    f, params, x, _, vector = setting()

    def loss(out, labels):
        return (out - labels).pow(4).sum()

    labels = torch.randn(5, 3).double()
    jacobian = torch.autograd.functional.jacobian(lambda v: f(unflat(params, v), x), flat(params))
    middle = torch.diag_embed(12 * (f(params, x) - labels).square())
    dense = torch.einsum("bci,bcd,bdj->ij", jacobian, middle, jacobian) / 5
    found = gauss_newton_vector_product(f, params, x, loss, vector, labels=labels, chunk_size=chunk_size)
    CLOSE(flat(found), dense @ flat(vector))


def test_gauss_newton_of_cross_entropy_is_the_fisher_for_any_label():
    f, params, x, y, vector = setting()
    fisher = fisher_vector_product(f, params, x, vector)
    for labels in (y, (y + 1) % 3):
        CLOSE(flat(gauss_newton_vector_product(f, params, x, F.cross_entropy, vector, labels=labels)), flat(fisher))


def test_gauss_newton_of_a_linear_model_is_the_hessian():
    torch.manual_seed(0)
    f, params = functionalize(nn.Linear(4, 3).double())
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    vector = params.apply(torch.randn_like)
    hessian = hessian_vector_product(f, params, x, F.cross_entropy, vector, labels=y)
    CLOSE(flat(gauss_newton_vector_product(f, params, x, F.cross_entropy, vector, labels=y)), flat(hessian))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_fisher_of_softmax_regression(chunk_size):
    """F V = mean_b (diag p - p p') V x x': Kronecker products of the covariances of labels and of inputs."""
    torch.manual_seed(0)
    f, params = functionalize(nn.Linear(4, 3, bias=False).double())
    x, vector = torch.randn(5, 4).double(), params.apply(torch.randn_like)
    p = f(params, x).softmax(-1)
    pushed = torch.einsum("cd,bd->bc", vector["weight"], x)
    expected = torch.einsum("bc,bd->cd", p * pushed - p * (p * pushed).sum(-1, keepdim=True), x) / 5
    CLOSE(fisher_vector_product(f, params, x, vector, chunk_size=chunk_size)["weight"], expected)


def test_the_fisher_is_the_expected_outer_product_of_scores():
    """E over labels that the model draws itself of g g', summed exactly over all labels."""
    f, params, x, _, vector = setting(3)
    total = 0
    for b in range(3):
        p = f(params, x[b : b + 1]).softmax(-1)[0]
        for c in range(3):
            g = torch.autograd.functional.jacobian(
                lambda v, b=b, c=c: f(unflat(params, v), x[b : b + 1]).log_softmax(-1)[0, c], flat(params)
            )
            total = total + p[c] * g * (g @ flat(vector)) / 3
    CLOSE(flat(fisher_vector_product(f, params, x, vector)), total)


def test_labels_of_many_places_add_up():
    torch.manual_seed(0)
    f, params = functionalize(nn.Linear(4, 3, bias=False).double())
    x, vector = torch.randn(2, 5, 4).double(), params.apply(torch.randn_like)
    whole = fisher_vector_product(f, params, x, vector)
    by_token = fisher_vector_product(f, params, x.flatten(0, 1), vector)
    CLOSE(whole["weight"], 5 * by_token["weight"])
    structured = fisher_vector_product(lambda p, x: {"logits": f(p, x)}, params, x, vector, logits=lambda out: out["logits"])
    CLOSE(structured["weight"], whole["weight"])


def test_attention_with_fused_kernels():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    f, params = functionalize(model)
    x, vector = torch.randn(2, 3, 8).double(), params.apply(torch.randn_like)

    def loss(out):
        return out.pow(4).mean()

    eps = 1e-5
    found = hessian_vector_product(f, params, x, loss, vector)

    def slope(p):
        return torch.func.grad(lambda p: loss(f(p, x)))(p)

    expected = (slope(params + vector * eps) - slope(params - vector * eps)) / (2 * eps)
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("product", ["hessian", "gauss_newton", "fisher"])
def test_under_vmap_over_vectors_and_compiled(product):
    f, params, x, y, _ = setting()
    run = {
        "hessian": lambda v: hessian_vector_product(f, params, x, F.cross_entropy, v, labels=y),
        "gauss_newton": lambda v: gauss_newton_vector_product(f, params, x, F.cross_entropy, v, labels=y),
        "fisher": lambda v: fisher_vector_product(f, params, x, v),
    }[product]
    vectors = [params.apply(torch.randn_like) for _ in range(3)]
    together = vmap(run)(torch.stack(vectors))
    for i, vector in enumerate(vectors):
        CLOSE(flat(together[i]), flat(run(vector)))


@pytest.mark.compile
@pytest.mark.parametrize("product", ["hessian", "gauss_newton", "fisher"])
def test_compiled(product):
    f, params, x, y, vector = setting()
    run = {
        "hessian": lambda p, v: hessian_vector_product(f, p, x, F.cross_entropy, v, labels=y),
        "gauss_newton": lambda p, v: gauss_newton_vector_product(f, p, x, F.cross_entropy, v, labels=y),
        "fisher": lambda p, v: fisher_vector_product(f, p, x, v),
    }[product]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(params, vector)
    CLOSE(flat(compiled), flat(run(params, vector)))


def test_bad_input():
    f, params, x, y, vector = setting()
    run = partial(hessian_vector_product, f, params, x, F.cross_entropy, labels=y)
    with pytest.raises(errors.InputError, match="vector is a float64 tensor"):
        run(flat(vector))
    with pytest.raises(errors.InputError, match=r"vector has no '0\.bias'"):
        run(TensorDict({"0": {"weight": vector["0", "weight"]}, "2": vector["2"]}, []))
    with pytest.raises(errors.InputError, match=r"'2\.weight', which is a buffer or not selected.*vector\.exclude"):
        run(vector, select="0")
    with pytest.raises(errors.InputError, match=r"holds a float32 tensor .* at '0\.weight'"):
        run(vector.float())
    with pytest.raises(errors.TargetError, match="the logits of one example are"):
        fisher_vector_product(lambda p, x: f(p, x).sum(), params, x, vector)
    with torch.no_grad(), pytest.raises(errors.GradientError, match="grad mode is off"):
        run(vector)


# Conjugate gradients ---------------------------------------------------------------------------------------------------


def system(size=6):
    torch.manual_seed(0)
    a = torch.randn(size, size).double()
    return a @ a.mT + torch.eye(size).double(), torch.randn(size).double()


def test_as_many_steps_as_unknowns_solve_a_system():
    a, b = system()
    solution = conjugate_gradient(lambda v: a @ v, b, damping=0.5, iterations=6, tolerance=0.0)
    CLOSE(solution.value, torch.linalg.solve(a + 0.5 * torch.eye(6).double(), b), rtol=1e-7)
    assert solution.residual < 1e-8


def test_steps_after_convergence_change_nothing():
    a, b = system()
    many = conjugate_gradient(lambda v: a @ v, b, iterations=200, tolerance=1e-10)
    torch.testing.assert_close(many.value, torch.linalg.solve(a, b), rtol=1e-7, atol=1e-9)
    assert conjugate_gradient(lambda v: a @ v, b * 0).value.eq(0).all()
    CLOSE(conjugate_gradient(lambda v: v, b, iterations=50).value, b)


def test_negative_curvature_is_reported():
    b = torch.ones(3).double()
    solution = conjugate_gradient(lambda v: -v, b)
    assert solution.value.eq(0).all() and solution.residual == 1


def test_structures():
    b = TensorDict({"a": torch.ones(2), "b": {"c": torch.full((1,), 3.0)}}, [])
    assert (conjugate_gradient(lambda v: v * 2, b).value["b", "c"] - 1.5).abs() < 1e-6
    with pytest.raises(errors.InputError, match="tolerance=-1 is negative"):
        conjugate_gradient(lambda v: v, b, tolerance=-1)
    with pytest.raises(errors.InputError, match="iterations is an integer"):
        conjugate_gradient(lambda v: v, b, iterations=0)
