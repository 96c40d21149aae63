"""Wanda against the formula with inputs read by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model

from tdhook import functionalize
from tdhook.core.errors import ModelError, ParamsError, SiteError
from tdhook.weights.pruning import prune
from tdhook.weights.selection import flat
from tdhook.weights.wanda import wanda


def test_linear_layers_over_examples_and_positions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    f, params = functionalize(net)
    x = torch.randn(2, 6, 4).double()
    scores = wanda(f, params, x)
    hidden = net[:2](x).detach()
    for path, values in (("0", x), ("2", hidden)):
        for o in range(len(scores[path, "weight"])):
            for i in range(values.shape[-1]):
                expected = params[path, "weight"][o, i].abs() * values[..., i].square().sum().sqrt()
                torch.testing.assert_close(scores[path, "weight"][o, i], expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_of_convolutions(groups):
    conv = nn.Conv2d(4, 6, 3, groups=groups).double()
    f, params = functionalize(nn.Sequential(conv))
    x = torch.randn(2, 4, 5, 5).double()
    scores = wanda(f, params, x)["0", "weight"]
    norms = x.square().sum((0, 2, 3)).sqrt()
    for o in range(6):
        for i in range(4 // groups):
            channel = (o // (6 // groups)) * (4 // groups) + i
            torch.testing.assert_close(scores[o, i], params["0", "weight"][o, i].abs() * norms[channel])


def test_subclasses_are_layers_too():
    class Padded(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))

    f, params = functionalize(nn.Sequential(Padded(1, 2, 3), nn.Flatten(), nn.Linear(32, 2)))
    assert list(flat(wanda(f, params, torch.randn(2, 1, 4, 4)))) == [("0", "weight"), ("2", "weight")]


def test_a_layer_that_runs_several_times_sees_all_its_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False)

        def forward(self, x):
            return self.layer(self.layer(x))

    f, params = functionalize(Twice())
    x = torch.randn(3, 2)
    both = torch.cat([x, x @ params["layer", "weight"].T])
    expected = params["layer", "weight"].abs() * both.square().sum(0).sqrt()
    torch.testing.assert_close(wanda(f, params, x)["layer", "weight"], expected)


def test_the_linear_layers_of_gpt2_have_inputs_first():
    f, params = functionalize(
        GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=6)).eval(), use_cache=False
    )
    scores = wanda(f, params, {"input_ids": torch.arange(6)[None]}, select="h.0.mlp.c_fc.weight")[
        "h", "0", "mlp", "c_fc", "weight"
    ]
    assert scores.shape == (8, 32)
    ratio = scores / params["h", "0", "mlp", "c_fc", "weight"].abs()
    torch.testing.assert_close(ratio, ratio[:, :1].expand(8, 32))


def test_it_keeps_small_weights_of_large_inputs():
    f, params = functionalize(nn.Sequential(nn.Linear(2, 1, bias=False)))
    params["0", "weight"] = torch.tensor([[1.0, 0.1]])
    x = torch.tensor([[0.01, 10.0]])
    assert prune(params, wanda(f, params, x), 0.5, scope="output").params["0", "weight"].tolist() == [[0.0, pytest.approx(0.1)]]


def test_squares_that_overflow_half_precision():
    class Quiet(nn.Linear):  # torch 2.1 has no product of float16 matrices on a CPU
        def forward(self, x):
            return x

    f, params = functionalize(Quiet(2, 1, bias=False).half())
    x = torch.tensor([[600.0, 1.0], [800.0, 0.0]]).half()
    torch.testing.assert_close(wanda(f, params, x)["weight"], params["weight"].abs() * torch.tensor([1000.0, 1.0]).half())


def test_half_precision_and_one_example():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 2).bfloat16()))
    scores = wanda(f, params, torch.ones(1, 3).bfloat16())
    assert scores["0", "weight"].dtype is torch.bfloat16 and list(flat(scores)) == [("0", "weight")]


@pytest.mark.compile
def test_compiled_equals_eager():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x = torch.randn(5, 3)
    run = torch.compile(lambda p, x: wanda(f, p, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(params, x)["2", "weight"], wanda(f, params, x)["2", "weight"])


def test_bad_input():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 4), nn.Bilinear(4, 4, 2)))
    with pytest.raises(ParamsError, match=r"'1.weight' is no such weight"):
        wanda(f, params, torch.ones(1, 3), select="**.weight")
    f, params = functionalize(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(ParamsError, match="no linear layer and no convolution"):
        wanda(f, params, torch.ones(1, 3))
    with pytest.raises(ModelError, match="has no sites"):
        wanda(lambda p, x: x, params, torch.ones(1, 3))
    f, params = functionalize(nn.MultiheadAttention(4, 2))
    with pytest.raises(SiteError, match="never called this module"):
        wanda(f, params, (torch.ones(2, 1, 4),) * 3, select="out_proj.weight")
