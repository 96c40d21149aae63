"""TracIn against captum and loops; influence functions against dense systems and against training again."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from captum.influence import TracInCP
from torch import nn
from torch.func import vmap
from torch.utils.data import TensorDataset

from tdhook import functionalize
from tdhook.core import errors
from tdhook.weights.influence import self_influence, tracin
from tdhook.weights.influence_functions import influence_functions
from tdhook.weights.per_example import per_example_gradients
from tdhook.weights.sketch import count_sketch

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def setting(train=7, test=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    f, params = functionalize(model)
    checkpoints = [params.clone(), params * 0.5, params.apply(lambda p: p + 0.3)]
    x, y = torch.randn(train, 4).double(), torch.randint(3, (train,))
    z, t = torch.randn(test, 4).double(), torch.randint(3, (test,))
    return model, f, checkpoints, (x, y), (z, t)


def flat_gradients(f, params, data):
    each = per_example_gradients(f, params, data[0], F.cross_entropy, labels=data[1])
    return torch.cat([value.flatten(1) for value in each.values(True, True)], 1)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 50])
def test_the_sum_of_inner_products_of_gradients(chunk_size):
    _, f, checkpoints, train, test = setting()
    rates = [0.1, 0.2, 0.4]
    expected = sum(r * flat_gradients(f, p, test) @ flat_gradients(f, p, train).mT for r, p in zip(rates, checkpoints))
    found = tracin(f, checkpoints, train, test, F.cross_entropy, learning_rates=rates, chunk_size=chunk_size)
    CLOSE(found, expected)
    stacked = torch.stack(checkpoints)
    CLOSE(tracin(f, stacked, train, test, F.cross_entropy, learning_rates=torch.tensor(rates).double()), expected, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
def test_captum(tmp_path):
    _, f, checkpoints, train, test = setting()
    model = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    paths = []
    for i, params in enumerate(checkpoints):
        paths.append(str(tmp_path / f"{i}.pt"))
        torch.save({key: value.clone() for key, value in params.flatten_keys(".").items()}, paths[-1])

    def load(model, path):
        model.load_state_dict(torch.load(path))
        return 0.1

    peer = TracInCP(
        model,
        TensorDataset(*train),
        paths,
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=7,
        sample_wise_grads_per_batch=True,
    )
    expected = peer.influence(test)
    found = tracin(f, checkpoints, train, test, F.cross_entropy, learning_rates=0.1)
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-6, atol=1e-8)
    own = self_influence(f, checkpoints, train, F.cross_entropy, learning_rates=0.1)
    torch.testing.assert_close(own, peer.self_influence().to(own.dtype), rtol=1e-6, atol=1e-8)


def test_self_influence_is_the_diagonal():
    _, f, checkpoints, train, _ = setting()
    rates = [0.1, 0.2, 0.4]
    square = tracin(f, checkpoints, train, train, F.cross_entropy, learning_rates=rates)
    for chunk_size in (None, 2):
        own = self_influence(f, checkpoints, train, F.cross_entropy, learning_rates=rates, chunk_size=chunk_size)
        CLOSE(own, square.diagonal())


def test_a_step_of_training_lowers_the_loss_by_the_influence():
    """The first order of what one step of gradient descent on a training example does to the test loss."""
    _, f, checkpoints, (x, y), (z, t) = setting()
    params, rate = checkpoints[0], 1e-6
    influence = tracin(f, [params], (x, y), (z, t), F.cross_entropy, learning_rates=rate)
    gradients = per_example_gradients(f, params, x, F.cross_entropy, labels=y)
    for n in range(len(x)):
        stepped = params - gradients[n] * rate
        drop = F.cross_entropy(f(params, z), t, reduction="none") - F.cross_entropy(f(stepped, z), t, reduction="none")
        torch.testing.assert_close(influence[:, n], drop, rtol=1e-4, atol=1e-11)


def test_projections_are_unbiased_with_the_variance_of_a_count_sketch():
    torch.manual_seed(1)
    a, b = torch.randn(2, 30).double().unbind(0)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(4000):
        sketch = count_sketch([a[:10], a[10:]], 8, generator)
        draws.append(sketch([a[:10], a[10:]]) @ sketch([b[:10], b[10:]]))
    draws = torch.stack(draws)
    variance = ((a @ a) * (b @ b) + (a @ b) ** 2 - 2 * (a * b).square().sum()) / 8
    assert (draws.mean() - a @ b).abs() < 4 * (variance / len(draws)).sqrt()
    assert 0.9 < draws.var() / variance < 1.1


def test_projected_influence_is_near_and_does_not_depend_on_chunks():
    _, f, checkpoints, train, test = setting()
    exact = tracin(f, checkpoints, train, test, F.cross_entropy)
    run = partial(tracin, f, checkpoints, train, test, F.cross_entropy, projection=4096)
    found = run(generator=torch.Generator().manual_seed(0))
    assert (found - exact).norm() < 0.2 * exact.norm()
    for chunk_size in (1, 3):
        CLOSE(run(generator=torch.Generator().manual_seed(0), chunk_size=chunk_size), found)
    state = torch.get_rng_state()
    run(generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_selected_parameters_give_the_part_of_a_layer():
    _, f, checkpoints, train, test = setting()
    parts = [tracin(f, checkpoints, train, test, F.cross_entropy, select=layer) for layer in ("0", "2")]
    CLOSE(parts[0] + parts[1], tracin(f, checkpoints, train, test, F.cross_entropy))


def test_one_example():
    _, f, checkpoints, train, test = setting(1, 1)
    assert tracin(f, checkpoints, train, test, F.cross_entropy).shape == (1, 1)


def test_under_vmap_over_a_scale():
    _, f, checkpoints, train, test = setting()
    scales = torch.tensor([0.5, 2.0]).double()
    both = vmap(lambda s: tracin(f, [checkpoints[0] * s], train, test, F.cross_entropy))(scales)
    CLOSE(both[1], tracin(f, [checkpoints[0] * 2], train, test, F.cross_entropy))


def test_under_vmap_over_a_learning_rate():
    _, f, checkpoints, train, test = setting()
    both = vmap(lambda r: tracin(f, checkpoints, train, test, F.cross_entropy, learning_rates=r))(torch.tensor([0.1, 0.2]))
    CLOSE(both[1], 2 * both[0])


def test_bfloat16_adds_up_in_single_precision():
    _, f, checkpoints, (x, y), (z, t) = setting()
    low = [params.bfloat16() for params in checkpoints]
    found = tracin(f, low, (x.bfloat16(), y), (z.bfloat16(), t), F.cross_entropy)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), tracin(f, checkpoints, (x, y), (z, t), F.cross_entropy), rtol=0.2, atol=0.1)


@pytest.mark.compile
@pytest.mark.parametrize("projection", [None, 16])
def test_compiled(projection):
    _, f, checkpoints, train, test = setting()

    def run(checkpoints, train, test):
        return tracin(f, checkpoints, train, test, F.cross_entropy, learning_rates=[0.1, 0.2, 0.3], projection=projection)

    torch.manual_seed(0)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(checkpoints, train, test)
    if projection is None:  # compiled code draws other random numbers
        CLOSE(compiled, run(checkpoints, train, test))
    assert compiled.shape == (3, 7)


def test_nothing_is_changed():
    _, f, checkpoints, train, test = setting()
    before = [params.clone() for params in checkpoints]
    tracin(f, checkpoints, train, test, F.cross_entropy)
    assert all((a == b).all() for a, b in zip(before, checkpoints))


# Influence functions ---------------------------------------------------------------------------------------------------


def dense_curvature(f, params, data, gauss_newton):
    keys = list(params.keys(True, True))
    shapes = [params[key].shape for key in keys]

    def split(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        new = params.clone()
        for key, part, shape in zip(keys, parts, shapes):
            new[key] = part.reshape(shape)
        return new

    flat = torch.cat([params[key].flatten() for key in keys])
    if not gauss_newton:
        return torch.autograd.functional.hessian(lambda v: F.cross_entropy(f(split(v), data[0]), data[1]), flat)
    jacobian = torch.autograd.functional.jacobian(lambda v: f(split(v), data[0]), flat)
    p = f(params, data[0]).softmax(-1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("bci,bcd,bdj->ij", jacobian, middle, jacobian) / len(p)


@pytest.mark.parametrize(("curvature", "chunk_size"), [("gauss_newton", None), ("hessian", None), ("hessian", 3)])
def test_a_dense_system(curvature, chunk_size):
    _, f, checkpoints, train, test = setting()
    params = checkpoints[0]
    damping = 1.0  # above the most negative eigenvalue of the Hessian
    matrix = dense_curvature(f, params, train, curvature == "gauss_newton")
    matrix = matrix + damping * torch.eye(len(matrix)).double()
    expected = flat_gradients(f, params, test) @ torch.linalg.solve(matrix, flat_gradients(f, params, train).mT)
    found = influence_functions(
        f,
        params,
        train,
        test,
        F.cross_entropy,
        damping=damping,
        curvature=curvature,
        iterations=25,
        tolerance=1e-12,
        chunk_size=chunk_size,
    )
    torch.testing.assert_close(found.scores, expected, rtol=1e-7, atol=1e-9)
    assert (found.residual < 1e-9).all() and found.residual.shape == (3,)


def test_leaving_an_example_out():
    """Ridge regression, where the influence gives the change of the test loss after training without an example."""
    torch.manual_seed(0)
    n, ridge = 4000, 0.5
    x, w = torch.randn(n, 3).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    y = x @ w + torch.randn(n).double()
    z, t = torch.randn(2, 3).double(), torch.randn(2).double()
    f, params = functionalize(nn.Linear(3, 1, bias=False).double())

    def fit(keep):
        # the minimum of mean (x w - y)² / 2 + ridge |w|² / 2, with the mean over all n
        gram = x[keep].mT @ x[keep] / n + ridge * torch.eye(3).double()
        return torch.linalg.solve(gram, x[keep].mT @ y[keep] / n)

    def loss(out, labels):
        return (out[:, 0] - labels).square().sum() / 2

    everything = torch.ones(n, dtype=torch.bool)
    best = fit(everything)
    params = params.apply(lambda p: best[None])
    scores = influence_functions(f, params, (x, y), (z, t), loss, damping=ridge, iterations=10, tolerance=0.0).scores
    for i in (0, 17, 3999):
        without = fit(everything & (torch.arange(n) != i))
        rise = ((z @ without - t).square() - (z @ best - t).square()) / 2
        torch.testing.assert_close(scores[:, i] / n, rise, rtol=2e-2, atol=1e-8)


def test_bad_input():
    _, f, checkpoints, train, test = setting()
    run = partial(tracin, f)
    with pytest.raises(errors.InputError, match="checkpoints is empty"):
        run([], train, test, F.cross_entropy)
    with pytest.raises(errors.InputError, match="stack them with"):
        run(checkpoints[0], train, test, F.cross_entropy)
    with pytest.raises(errors.InputError, match="give a list of params"):
        run(iter(checkpoints), train, test, F.cross_entropy)
    with pytest.raises(errors.ParamsError, match=r"checkpoints\[1\]"):
        run([checkpoints[0], functionalize(nn.Linear(4, 3))[1]], train, test, F.cross_entropy)
    with pytest.raises(errors.InputError, match="learning_rates has 2 numbers for 3 checkpoints"):
        run(checkpoints, train, test, F.cross_entropy, learning_rates=[0.1, 0.2])
    with pytest.raises(errors.InputError, match="learning_rates is None"):
        run(checkpoints, train, test, F.cross_entropy, learning_rates=None)
    with pytest.raises(errors.InputError, match=r"train is .* give a pair"):
        run(checkpoints, train[0], test, F.cross_entropy)
    with pytest.raises(errors.InputError, match="projection is an integer"):
        run(checkpoints, train, test, F.cross_entropy, projection=0)
    with pytest.raises(errors.InputError, match=r"give a torch\.Generator"):
        run(checkpoints, train, test, F.cross_entropy, projection=4, generator=0)
    with pytest.raises(errors.ParamsError, match="no such parameter or module"):
        run(checkpoints, train, test, F.cross_entropy, select="7")
    with pytest.raises(errors.InputError, match="curvature='fisher' is unknown"):
        influence_functions(f, checkpoints[0], train, test, F.cross_entropy, damping=0.1, curvature="fisher")
    with pytest.raises(errors.InputError, match="damping=-1 is negative"):
        influence_functions(f, checkpoints[0], train, test, F.cross_entropy, damping=-1)
