"""Integrated gradients in reverse mode, in forward mode, through a narrow site, and summed over groups: the same numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

from tdhook import edit_gradient, functionalize, targets
from tdhook.attribution.integrated_gradients import integrated_gradients
from tdhook.core import errors
from tdhook.core.forward_mode import push_forward
from tdhook.core.groups import Groups

CLOSE = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 12), nn.Softplus(), nn.Linear(12, 12)
    ).double()


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.Flatten(-3), nn.Linear(48, 2), nn.Linear(2, 7)).double()


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.join, self.head = nn.Linear(5, 2), nn.Linear(2, 6)

    def forward(self, a, b):
        return self.head(self.join(torch.cat([a.tanh(), b**2], -1)).sigmoid())


CHEAPER = [
    {"mode": "forward"},
    {"through": "narrow"},
    {"through": "narrow", "chunk_size": 2},
    {"mode": "forward", "chunk_size": 5},
]


def ours(options, narrow):
    return {k: narrow if v == "narrow" else v for k, v in options.items()}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", CHEAPER)
@pytest.mark.parametrize("chosen", [4, [0, 5, 2], targets.every()])
def test_the_same_numbers_at_another_cost(options, chosen, batch):
    f, params = functionalize(mlp())
    x = torch.randn(batch, 6).double()
    want = integrated_gradients(f, params, x, targets=chosen, steps=7, mode="reverse", baselines=0.3)
    CLOSE(integrated_gradients(f, params, x, targets=chosen, steps=7, baselines=0.3, **ours(options, "2")), want)


@pytest.mark.parametrize("options", CHEAPER)
def test_images(options):
    f, params = functionalize(cnn())
    x = torch.randn(2, 2, 6, 6).double()
    want = integrated_gradients(f, params, x, targets=targets.every(), steps=4, mode="reverse")
    CLOSE(integrated_gradients(f, params, x, targets=targets.every(), steps=4, **ours(options, "3")), want)


@pytest.mark.parametrize("options", CHEAPER)
def test_several_inputs(options):
    f, params = functionalize(TwoInputs().double())
    for lead in ((), (1,), (3,)):
        inputs = (torch.randn(*lead, 2).double(), torch.randn(*lead, 3).double())
        want = integrated_gradients(f, params, inputs, targets=targets.every(), steps=4, mode="reverse")
        got = integrated_gradients(f, params, inputs, targets=targets.every(), steps=4, **ours(options, "join"))
        for g, w in zip(got, want):
            CLOSE(g, w)


@pytest.mark.parametrize("options", CHEAPER)
def test_at_a_site_and_without_multiplication(options):
    f, params = functionalize(mlp())
    x = torch.randn(3, 6).double()
    method = partial(integrated_gradients, f, params, x, targets=[0, 7, 3], at="0", multiply_by_inputs=False, steps=5)
    CLOSE(method(**ours(options, "3"))["0"], method(mode="reverse")["0"])


@pytest.mark.parametrize("options", [{"mode": "reverse"}, *CHEAPER])
def test_groups_are_sums(options):
    f, params = functionalize(cnn())
    x = torch.randn(3, 2, 6, 6).double()
    rows = torch.arange(6)[:, None]  # one group for each row of pixels, in all channels
    each = integrated_gradients(f, params, x, targets=[0, 3], steps=4, mode="reverse")
    got = integrated_gradients(f, params, x, targets=[0, 3], steps=4, groups=rows, **ours(options, "3"))
    CLOSE(got, each.sum(-1).sum(-2))
    single = integrated_gradients(f, params, x, targets=3, steps=4, groups=Groups([rows], 6), **ours(options, "3"))
    CLOSE(single, got[1])


def test_groups_across_inputs_and_of_each_example():
    f, params = functionalize(TwoInputs().double())
    inputs = (torch.randn(2, 2).double(), torch.randn(2, 3).double())
    a, b = integrated_gradients(f, params, inputs, targets=[0, 1], steps=4)
    groups = (torch.tensor([0, 1]), torch.tensor([[0, 0, 1], [1, 1, 0]]))
    want = torch.stack(
        [
            torch.stack([a[:, 0, 0] + b[:, 0, :2].sum(-1), a[:, 0, 1] + b[:, 0, 2]], -1),
            torch.stack([a[:, 1, 0] + b[:, 1, 2], a[:, 1, 1] + b[:, 1, :2].sum(-1)], -1),
        ],
        1,
    )
    for mode in ("reverse", "forward"):
        CLOSE(integrated_gradients(f, params, inputs, targets=[0, 1], steps=4, groups=groups, mode=mode), want)


def test_tensordicts():
    class Named(TwoInputs):
        pass

    f, params = functionalize(Named().double())
    inputs = TensorDict({"a": torch.randn(3, 2).double(), "b": torch.randn(3, 3).double()}, batch_size=[3])
    want = integrated_gradients(f, params, inputs, targets=[0, 1], steps=4, mode="reverse")
    for options in ({"mode": "forward"}, {"through": "join"}):
        got = integrated_gradients(f, params, inputs, targets=[0, 1], steps=4, **options)
        assert got.batch_size == want.batch_size
        CLOSE(got["a"], want["a"])
        CLOSE(got["b"], want["b"])


def test_through_a_narrow_site_few_cotangents_are_pulled_back():
    """3 coordinates instead of 12 targets: counted where the narrow site hands its cotangents down."""
    f, params = functionalize(mlp())
    seen = []

    def count(cotangent):
        seen.append(1)
        return cotangent

    counted = edit_gradient(f, {"0": count})
    x = torch.randn(2, 6).double()
    integrated_gradients(counted, params, x, targets=targets.every(), steps=3, through="2", chunk_size=1)
    through = len(seen)
    seen.clear()
    integrated_gradients(counted, params, x, targets=targets.every(), steps=3, mode="reverse", chunk_size=1)
    assert (through, len(seen)) == (3 * 3, 3 * 12)


@pytest.mark.parametrize(("outputs", "forward"), [(5, False), (6, False), (7, True)])
def test_auto_takes_the_mode_with_fewer_passes(outputs, forward, monkeypatch):
    """Six inputs; only forward mode asks for the forward-mode derivative."""
    pushed = []

    def push(*arguments):
        pushed.append(1)
        return push_forward(*arguments)

    monkeypatch.setattr("tdhook.attribution.line_integrals.push_forward", push)
    f, params = functionalize(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, outputs)).double())
    integrated_gradients(f, params, torch.randn(2, 6).double(), targets=targets.every(), steps=3)
    assert bool(pushed) == forward


def test_auto_keeps_an_edited_backward():
    f, params = functionalize(mlp())
    doubled = edit_gradient(f, {"3": lambda cotangent: 2 * cotangent})
    x = torch.randn(2, 6).double()
    plain = integrated_gradients(f, params, x, targets=targets.every(), steps=3)
    CLOSE(integrated_gradients(doubled, params, x, targets=targets.every(), steps=3), 2 * plain)


def test_a_site_that_is_passed_by():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.head = nn.Linear(6, 2), nn.Linear(2, 6)

        def forward(self, x):
            return x + self.head(self.narrow(x))

    f, params = functionalize(Residual())
    with pytest.raises(errors.InputError, match="through='narrow' is passed by: the targets depend on what moves"):
        integrated_gradients(f, params, torch.randn(2, 6), targets=0, through="narrow")


@pytest.mark.parametrize("options", [{"mode": "forward"}, {"through": "2"}, {"groups": Groups([torch.arange(6) // 2], 3)}])
def test_vmap_over_examples_is_the_batch(options):
    f, params = functionalize(mlp())
    x = torch.randn(3, 6).double()
    method = partial(integrated_gradients, f, params, targets=[0, 4, 9], steps=4, **options)
    CLOSE(vmap(method, out_dims=1)(x), method(x))


@pytest.mark.compile
@pytest.mark.parametrize("options", [{"mode": "forward"}, {"through": "2"}, {"groups": Groups([torch.arange(6) // 2], 3)}])
def test_compiled(options):
    f, params = functionalize(mlp())
    method = partial(integrated_gradients, f, targets=[0, 4, 9], steps=4, **options)
    compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(3, 6).double()
        CLOSE(compiled(params, x), method(params, x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_fused_attention_forward():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(2, 30)

        def forward(self, x):
            return self.out(nn.functional.scaled_dot_product_attention(x, x, x).mean(-2))

    f, params = functionalize(Attention().double())
    x = torch.randn(3, 4, 2).double()
    method = partial(integrated_gradients, f, params, x, targets=targets.every(), steps=4)
    want = method(mode="reverse")
    CLOSE(method(), want)
    CLOSE(method(groups=torch.arange(4)[:, None]), want.sum(-1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "backward"}, "mode='backward' is unknown; choose from auto, reverse, forward"),
        ({"mode": "forward", "through": "2"}, "mode='forward' has no meaning with through='2'"),
        ({"groups": torch.arange(6), "multiply_by_inputs": False}, "groups sums attributions"),
        ({"groups": torch.arange(6.0)}, "groups holds a float32 tensor"),
        ({"groups": torch.arange(5)}, "does not broadcast"),
    ],
)
def test_bad_options(options, match):
    f, params = functionalize(mlp())
    with pytest.raises(errors.InputError, match=match):
        integrated_gradients(f, params, torch.randn(2, 6).double(), targets=0, **options)


def test_an_unknown_site_to_go_through():
    f, params = functionalize(mlp())
    with pytest.raises(errors.SiteError, match="narrow"):
        integrated_gradients(f, params, torch.randn(2, 6).double(), targets=0, through="narrow")
