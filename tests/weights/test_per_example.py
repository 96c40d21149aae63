"""Per-example gradients against a loop of autograd."""

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
from tdhook.weights.per_example import per_example_gradients

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


class Mixer(nn.Module):
    """What no list of layer types has: attention, a bare parameter used twice, and a norm."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mix = nn.Parameter(torch.randn(4, 4) / 2)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        h = self.attention(x, x, x, need_weights=False)[0][:, -1]
        return self.norm(h @ self.mix @ self.mix)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


def cnn():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 16, 4))


CASES = {
    "mixer": (Mixer, (5, 4)),
    "convolution": (cnn, (1, 6, 6)),
    "linear": (partial(nn.Linear, 3, 4), (3,)),
}


def case(name, batch=5):
    torch.manual_seed(0)
    make, shape = CASES[name]
    model = make().double().eval()
    return model, torch.randn(batch, *shape).double(), torch.randint(4, (batch,))


def loop(model, x, y):
    named = dict(model.named_parameters())
    rows = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(named.values()))
        rows.append(dict(zip(named, gradients)))
    return {name: torch.stack([row[name] for row in rows]) for name in named}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
def test_a_loop_of_autograd(name, batch, chunk_size):
    model, x, y = case(name, batch)
    f, params = functionalize(model)
    found = per_example_gradients(f, params, x, F.cross_entropy, labels=y, chunk_size=chunk_size)
    expected = loop(model, x, y)
    assert set(found.flatten_keys(".").keys()) == set(expected) and found.batch_size == (batch,)
    for key, value in expected.items():
        CLOSE(found[tuple(key.split("."))], value)


def test_a_model_that_vmap_cannot_take_runs_in_a_loop():
    torch.manual_seed(0)
    model, x, y = Recurrent().double(), torch.randn(3, 5, 3).double(), torch.tensor([0, 3, 1])
    f, params = functionalize(model)
    with pytest.warns(errors.TdhookWarning, match="in a loop"):
        found = per_example_gradients(f, params, x, F.cross_entropy, labels=y)
    for key, value in loop(model, x, y).items():
        CLOSE(found[tuple(key.split("."))], value)


def test_buffers_are_not_trained():
    model, x, y = case("convolution")
    f, params = functionalize(model)
    found = per_example_gradients(f, params, x, F.cross_entropy, labels=y)
    assert ("1", "running_mean") in params.keys(True) and ("1", "running_mean") not in found.keys(True)


def test_a_sum_and_a_mean_over_examples_are_the_same():
    model, x, y = case("linear")
    f, params = functionalize(model)
    mean = per_example_gradients(f, params, x, F.cross_entropy, labels=y)
    total = per_example_gradients(f, params, x, partial(F.cross_entropy, reduction="sum"), labels=y)
    CLOSE(mean["weight"], total["weight"])


def test_selected_parameters():
    model, x, y = case("convolution")
    f, params = functionalize(model)
    found = per_example_gradients(f, params, x, F.cross_entropy, labels=y, select="*.bias")
    everything = per_example_gradients(f, params, x, F.cross_entropy, labels=y)
    assert sorted(found.keys(True, True)) == [("0", "bias"), ("1", "bias"), ("4", "bias")]
    CLOSE(found["4", "bias"], everything["4", "bias"])


@pytest.mark.parametrize("wrap", [tuple, dict, TensorDict])
def test_structured_inputs_and_labels(wrap):
    """f(params, (x, w)) = (p x) w: the gradient of half its square is x² w² p."""

    def f(params, inputs):
        x, w = inputs if isinstance(inputs, tuple) else (inputs["x"], inputs["w"])
        return params["p"] * x * w

    def half_square(out, labels):
        return (out - labels["y"]).square().sum() / 2

    params = TensorDict({"p": torch.tensor([2.0, 3.0])}, [])
    x, w, y = torch.randn(3, 3, 2).unbind(0)
    inputs = {tuple: (x, w), dict: {"x": x, "w": w}, TensorDict: TensorDict({"x": x, "w": w}, [3])}[wrap]
    found = per_example_gradients(f, params, inputs, half_square, labels={"y": y})
    torch.testing.assert_close(found["p"], (params["p"] * x * w - y) * x * w)


def test_under_vmap_over_models():
    model, x, y = case("linear")
    f, params = functionalize(model)
    stacked = torch.stack([params, params * 2])
    both = vmap(lambda p: per_example_gradients(f, p, x, F.cross_entropy, labels=y))(stacked)
    CLOSE(both["weight"][1], per_example_gradients(f, params * 2, x, F.cross_entropy, labels=y)["weight"])


@pytest.mark.compile
def test_compiled():
    model, x, y = case("mixer", 3)  # torch 2.13 cannot compile a vmapped BatchNorm without a warning
    f, params = functionalize(model)

    def gradients(params, x, y):
        return per_example_gradients(f, params, x, F.cross_entropy, labels=y)

    compiled = torch.compile(gradients, backend="aot_eager", fullgraph=True)(params, x, y)
    for key, value in gradients(params, x, y).items(True, True):
        CLOSE(compiled[key], value)


def test_bfloat16_stays():
    model, x, y = case("linear")
    f, params = functionalize(model.bfloat16())
    assert per_example_gradients(f, params, x.bfloat16(), F.cross_entropy, labels=y)["weight"].dtype == torch.bfloat16


def test_nothing_is_changed():
    model, x, y = case("convolution")
    f, params = functionalize(model)
    before, x_before = params.clone(), x.clone()
    per_example_gradients(f, params, x, F.cross_entropy, labels=y)
    assert (params == before).all() and torch.equal(x, x_before)
    assert all(p.grad is None for p in model.parameters())


def test_bad_input():
    model, x, y = case("convolution")
    f, params = functionalize(model)
    run = partial(per_example_gradients, f, params)
    with pytest.raises(errors.ParamsError, match="no such parameter or module"):
        run(x, F.cross_entropy, labels=y, select="5.weight")
    with pytest.raises(errors.ParamsError, match="names buffers only"):
        run(x, F.cross_entropy, labels=y, select="1.running_mean")
    with pytest.raises(errors.InputError, match="one first dimension"):
        run(x, F.cross_entropy, labels=y[:3])
    with pytest.raises(errors.InputError, match="inputs is empty"):
        run(x[:0], F.cross_entropy, labels=y[:0])
    with pytest.raises(errors.InputError, match="holds no tensor"):
        run((), F.cross_entropy)
    with pytest.raises(errors.InputError, match="loss is 'mse'"):
        run(x, "mse", labels=y)
    with pytest.raises(errors.InputError, match="chunk_size is an integer"):
        run(x, F.cross_entropy, labels=y, chunk_size=0)
    with pytest.raises(errors.TargetError, match=r"loss returned a float64 tensor of shape \[1, 4\]"):
        run(x, lambda out: out)
    with pytest.raises(errors.ParamsError, match="params is a TensorDict"):
        per_example_gradients(f, dict(params), x, F.cross_entropy, labels=y)
    with torch.no_grad(), pytest.raises(errors.GradientError, match="grad mode is off"):
        run(x, F.cross_entropy, labels=y)


def test_a_model_in_train_mode_warns():
    model, x, y = case("linear")
    f, params = functionalize(nn.Sequential(model, nn.Dropout(0.5)).train())
    with pytest.warns(errors.TdhookWarning, match="train mode"):
        per_example_gradients(f, params, x, F.cross_entropy, labels=y)
