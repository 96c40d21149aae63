"""Integrated gradients between checkpoints: completeness, closed forms, groups."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

from tdhook import functionalize, targets
from tdhook.core import errors
from tdhook.weights.parameter_paths import parameter_integrated_gradients, sum_by, sum_heads

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def setting(batch=5):
    torch.manual_seed(0)
    f, before = functionalize(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double())
    after = before.apply(lambda p: p + 0.5 * torch.randn_like(p))
    return f, before, after, torch.randn(batch, 4).double()


def test_a_product_of_weights():
    """F = u v x: of the change, half of the interaction goes to each."""
    f = lambda params, x: params["u"] * params["v"] * x  # noqa: E731
    before = TensorDict({"u": torch.tensor(1.0), "v": torch.tensor(2.0)}, []).double()
    after = TensorDict({"u": torch.tensor(4.0), "v": torch.tensor(7.0)}, []).double()
    path = parameter_integrated_gradients(f, before, after, torch.tensor([3.0, 5.0]).double())
    CLOSE(path.attributions["u"], torch.tensor(4.0 * 3 * (2 + 7) / 2).double())
    CLOSE(path.attributions["v"], torch.tensor(4.0 * 5 * (1 + 4) / 2).double())
    CLOSE(path.change, torch.tensor(4.0 * 26).double())


@pytest.mark.parametrize("batch", [1, 5])
def test_completeness(batch):
    f, before, after, x = setting(batch)
    path = parameter_integrated_gradients(f, before, after, x, targets=1)
    CLOSE(path.change, (f(after, x) - f(before, x))[:, 1].mean())
    total = sum(value.sum() for value in path.attributions.values(True, True))
    torch.testing.assert_close(total, path.change, rtol=1e-8, atol=1e-10)
    assert path.error < 1e-8


def test_the_error_is_measured_and_falls_with_the_steps():
    f, before, after, x = setting()
    errors_ = [parameter_integrated_gradients(f, before, after, x, targets=1, steps=n).error for n in (1, 3, 10)]
    assert errors_[0] > 1e-3 and errors_[0] > errors_[1] > errors_[2]


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 9])
def test_plural_targets_are_the_single_ones(chunk_size):
    f, before, after, x = setting()
    plural = parameter_integrated_gradients(f, before, after, x, targets=[0, 2], chunk_size=chunk_size)
    assert plural.attributions.batch_size == (2,) and plural.change.shape == (2,)
    for t, target in enumerate([0, 2]):
        single = parameter_integrated_gradients(f, before, after, x, targets=target)
        for key, value in single.attributions.items(True, True):
            CLOSE(plural.attributions[key][t], value)
        CLOSE(plural.change[t], single.change)


def test_a_plain_loop():
    f, before, after, x = setting()
    key = ("0", "weight")
    total = 0
    for i in range(2000):
        point = before + (after - before) * ((i + 0.5) / 2000)
        point[key] = point[key].clone().requires_grad_()
        total = total + torch.autograd.grad(f(point, x)[:, 1].mean(), point[key])[0] / 2000
    path = parameter_integrated_gradients(f, before, after, x, targets=1)
    torch.testing.assert_close(path.attributions[key], total * (after - before)[key], rtol=1e-5, atol=1e-8)


def test_what_did_not_change_gets_nothing():
    f, before, after, x = setting()
    after["0"] = before["0"]
    path = parameter_integrated_gradients(f, before, after, x, targets=1)
    assert path.attributions["0", "weight"].eq(0).all() and path.attributions["2", "weight"][1].ne(0).all()


def test_selected_parameters_move_alone():
    f, before, after, x = setting()
    half = before.clone()
    half["2"] = after["2"]
    path = parameter_integrated_gradients(f, before, after, x, targets=1, select="2")
    assert list(path.attributions.keys()) == ["2"]
    CLOSE(path.change, (f(half, x) - f(before, x))[:, 1].mean())
    assert path.error < 1e-8


def test_buffers_move_too():
    torch.manual_seed(0)
    f, before = functionalize(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double().eval())
    after = before.apply(lambda p: p + 0.5 if p.is_floating_point() else p + 10)
    path = parameter_integrated_gradients(f, before, after, torch.randn(4, 3).double(), targets=0)
    assert path.attributions["0", "running_var"].abs().sum() > 0 and path.error < 1e-8


def test_every_example_by_vmap_and_every_model():
    f, before, after, x = setting()
    run = partial(parameter_integrated_gradients, f, targets=targets.index(1), steps=4)
    each = vmap(lambda example: run(before, after, example[None]).attributions)(x)
    CLOSE(each["0", "weight"].mean(0), run(before, after, x).attributions["0", "weight"])


@pytest.mark.compile
def test_compiled():
    f, before, after, x = setting()

    def attribute(before, after, x):
        return parameter_integrated_gradients(f, before, after, x, targets=[0, 1], steps=3)

    compiled = torch.compile(attribute, backend="aot_eager", fullgraph=True)(before, after, x)
    expected = attribute(before, after, x)
    for key, value in expected.attributions.items(True, True):
        CLOSE(compiled.attributions[key], value)
    CLOSE(compiled.error, expected.error)


def test_groups_keep_the_sum():
    f, before, after, x = setting()
    path = parameter_integrated_gradients(f, before, after, x, targets=[0, 1])
    layers = sum_by(path.attributions, 1)
    assert list(layers) == ["0", "2"] and layers["0"].shape == (2,)
    torch.testing.assert_close(sum(layers.values()), path.change, rtol=1e-8, atol=1e-10)
    kinds = sum_by(path.attributions, lambda name: "weights" if name.endswith("weight") else None)
    CLOSE(kinds["weights"], sum(path.attributions[i, "weight"].flatten(1).sum(1) for i in "02"))


def test_heads():
    rows = torch.arange(12.0).reshape(6, 2)
    CLOSE(sum_heads(rows, 3, -2), torch.stack([rows[:2].sum(), rows[2:4].sum(), rows[4:].sum()]))
    CLOSE(sum_heads(rows.mT.expand(4, 2, 6), 3, -1), sum_heads(rows, 3, -2).expand(4, 3))
    with pytest.raises(errors.InputError, match="heads=4 do not divide"):
        sum_heads(rows, 4, -2)
    with pytest.raises(errors.InputError, match="axis=0 is unknown"):
        sum_heads(rows, 3, 0)


def test_nothing_is_changed():
    f, before, after, x = setting()
    copies = before.clone(), after.clone()
    parameter_integrated_gradients(f, before, after, x, targets=1)
    assert (before == copies[0]).all() and (after == copies[1]).all()


def test_bad_input():
    f, before, after, x = setting()
    run = partial(parameter_integrated_gradients, f, before)
    other = functionalize(nn.Linear(4, 3).double())[1]
    with pytest.raises(errors.ParamsError, match="after has no"):
        run(other, x, targets=0)
    with pytest.raises(errors.ParamsError, match="float32"):
        run(after.float(), x, targets=0)
    with pytest.raises(errors.ParamsError, match="after is a TensorDict"):
        run(after.to_dict(), x, targets=0)
    with pytest.raises(errors.ParamsError, match="no such parameter"):
        run(after, x, targets=0, select="9")
    with pytest.raises(errors.InputError, match="steps is an integer"):
        run(after, x, targets=0, steps=0)
    with pytest.raises(errors.TargetError, match="targets is None"):
        run(after, x)
    with pytest.raises(errors.TargetError, match="targets is empty"):
        run(after, x, targets=[])
    with pytest.raises(errors.InputError, match="group is an integer"):
        sum_by(before, 0)
    with torch.no_grad(), pytest.raises(errors.GradientError, match="grad mode is off"):
        run(after, x, targets=0)
