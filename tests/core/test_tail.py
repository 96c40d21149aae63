"""`start_from`: the tail of a model, and `Tape`: the model resumed from the middle."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.func import grad, vmap

from tdhook import capture, functionalize, intervene, perturb, start_from, stop_at, trace
from tdhook.core.errors import InputError, ModelError, SiteError
from tdhook.core.replay import Tape
from tdhook.core.transforms import resolve

from . import zoo
from .plain import assert_same, leaves, prepared

pytestmark = [
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning"),
]


class Count(nn.Module):
    """A linear layer that counts its runs in a list that no twin copies."""

    runs: ClassVar[dict[str, int]] = {}

    def __init__(self, name: str, width: int = 4):
        super().__init__()
        self.name, self.linear = name, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:  # not the fake run
            Count.runs[self.name] = Count.runs.get(self.name, 0) + 1
        return self.linear(x)


@pytest.fixture
def runs():
    Count.runs.clear()
    return Count.runs


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)])
        self.norm = nn.BatchNorm1d(4)
        self.middle = nn.Conv1d(4, 4, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv1d(8, 4, 3, padding=1), nn.Conv1d(8, 2, 3, padding=1)])

    def forward(self, x):
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.max_pool1d(x, 2)
        x = self.middle(F.relu(self.norm(x)))
        for up in self.up:
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        return x


class Skips(nn.Module):
    """A U-Net that hands its skip connections on in a list that the children change."""

    class Down(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, skips):
            skips.append(self.linear(x))
            return skips[-1]

    class Up(Down):
        def forward(self, x, skips):
            return self.linear(x + skips.pop())

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([self.Down(), self.Down(), self.Down()])
        self.up = nn.ModuleList([self.Up(), self.Up(), self.Up()])

    def forward(self, x):
        skips = []
        for down in self.down:
            x = down(x, skips)
        middle = x
        for up in self.up:
            x = up(x, skips)
        return x + middle


class Rotary(nn.Module):
    """A table computed first, used by every block."""

    def __init__(self):
        super().__init__()
        self.table, self.blocks = nn.Embedding(5, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        table = self.table(torch.arange(x.shape[-2]))
        for block in self.blocks:
            x = x + block(x * table.cos() + x.flip(-1) * table.sin()).tanh()
        return x


class Attributes(nn.Module):
    """The encoder keeps what the decoder needs in an attribute."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.kept = nn.Linear(3, 3), None

        def forward(self, x):
            self.kept = self.linear(x)
            return self.kept * 2

    def __init__(self):
        super().__init__()
        self.encoder, self.middle = self.Encoder(), nn.Linear(3, 3)

    def forward(self, x):
        h = self.middle(self.encoder(x))
        return h if self.encoder.kept is None else h + self.encoder.kept


def _case(name, make):
    return zoo.Case(name, make)


CASES = [
    *[case for case in zoo.everything if case.name != "batchnorm_train"],
    _case("unet", lambda: (UNet().eval(), torch.randn(2, 2, 8))),
    _case("skips_in_a_list", lambda: (Skips(), torch.randn(2, 3))),
    _case("rotary", lambda: (Rotary(), torch.randn(2, 5, 4))),
    _case("attributes", lambda: (Attributes(), torch.randn(2, 3))),
    _case("inside", lambda: (zoo.TransformsInside(), torch.randn(2, 3))),
    _case("llama_without_mask", lambda: (zoo._llama()[0], {"input_ids": torch.randint(0, 30, (2, 5))})),
    _case("gpt2_without_mask", lambda: (zoo._gpt2()[0], {"input_ids": torch.randint(0, 30, (2, 5))})),
]


def module_sites(f, params, inputs, at_most=12):
    """Module sites that can be read: all of them, or `at_most` spread over a large model."""
    sites = [row.site for row in trace(f, params, inputs, operations=False)]
    sites = sites[:: -(-len(sites) // at_most)]
    readable = []
    for site in sites:
        try:
            stop_at(f, site)(params, inputs)
        except SiteError:  # inside a vmap or grad of the model's own, or None in the fused attention
            continue
        readable.append(site)
    return readable


# Law 3 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_tail_of_the_head_is_the_model(case):
    f, params, inputs = prepared(case)
    expected = f(params, inputs)
    sites = module_sites(f, params, inputs)
    assert sites
    for site in sites:
        value = stop_at(f, site)(params, inputs)
        assert_same(start_from(f, site)(params, inputs, value), expected)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_resuming_a_tape_with_nothing_changed_is_the_model(case):
    f, params, inputs = prepared(case)
    expected = f(params, inputs)
    wants = tuple(replace(w, exact=True) for w in resolve(f, module_sites(f, params, inputs)))
    tape = Tape(f, params, inputs, wants)
    assert_same(tape.output, expected)
    for want in wants:
        assert_same(tape.resume({want: tape.values[want]}), expected)
        assert_same(tape.resume({want: lambda value: value}), expected)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("mlp", "unet", "rotary", "llama", "in_place", "cnn")], ids=repr
)
def test_the_tail_of_a_write_is_the_write(case):
    """A value other than the model's own goes the way that `intervene` sends it."""
    f, params, inputs = prepared(case)
    for site in module_sites(f, params, inputs):
        value = stop_at(f, site)(params, inputs)
        if value.is_floating_point():
            value = value + 1
            expected = intervene(f, {site: value})(params, inputs)
            assert_same(start_from(f, site)(params, inputs, value), expected)
            (want,) = resolve(f, site)
            assert_same(Tape(f, params, inputs, (want,)).resume({want: value}), expected)


def test_operations_and_inputs():
    model, x = zoo.Attention(), torch.randn(2, 5, 8)
    f, params = functionalize(model)
    for site in ("/scaled_dot_product_attention", "out:in", "/chunk:in", "qkv/linear"):
        assert_same(start_from(f, site)(params, x, stop_at(f, site)(params, x)), f(params, x))


def test_several_sites():
    f, params, inputs = prepared(next(c for c in CASES if c.name == "gpt2"))
    sites = ["transformer.h.0.mlp", "transformer.h.1.attn:out[0]"]
    values = stop_at(f, sites)(params, inputs)
    assert_same(start_from(f, sites)(params, inputs, values), f(params, inputs))
    assert_same(start_from(f, sites)(params, inputs, dict(values.items())), f(params, inputs))


def test_tensordict_modules():
    model = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 4), in_keys=["x"], out_keys=["h"]),
        TensorDictModule(nn.Linear(4, 2), in_keys=["h"], out_keys=["y"]),
    )
    f, params = functionalize(model)
    inputs = TensorDict({"x": torch.randn(5, 3)}, [5])
    site = "module.0.module"
    output = start_from(f, site)(params, inputs, stop_at(f, site)(params, inputs))
    assert_same(output, f(params, inputs))
    assert set(output.keys()) == {"x", "h", "y"} and inputs.keys() == {"x"}


@pytest.mark.parametrize("make", [zoo._gpt2, zoo._llama])
def test_a_model_that_returns_a_key_value_cache(make):
    torch.manual_seed(0)
    model, inputs = make()
    f, params = functionalize(model, use_cache=True)

    def caches(output):
        return [(layer.keys, layer.values) for layer in output.past_key_values.layers]

    expected = f(params, inputs)
    for site in module_sites(f, params, inputs):
        output = start_from(f, site)(params, inputs, stop_at(f, site)(params, inputs))
        (want,) = resolve(f, site)
        resumed = Tape(f, params, inputs, (want,)).resume({want: lambda value: value})
        for result in (output, resumed):
            assert torch.equal(result.logits, expected.logits)
            assert_same(caches(result), caches(expected))


# What does not run -----------------------------------------------------------------------------------------------------


def test_what_only_served_to_compute_the_site_does_not_run(runs):
    f, params = functionalize(nn.Sequential(*(Count(name) for name in "abcd")))
    x = torch.randn(2, 4)
    g = start_from(f, "2")
    g(params, x, torch.ones(2, 4))
    assert runs == {"d": 1}
    g(params, x, torch.zeros(2, 4))
    assert runs == {"d": 2}


def test_a_skip_connection_past_the_site_runs(runs):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Count("a"), Count("b"), Count("c")

        def forward(self, x):
            h = self.a(x)
            return self.c(h + self.b(h))

    f, params = functionalize(Residual())
    start_from(f, "b")(params, torch.randn(2, 4), torch.ones(2, 4))
    assert runs == {"a": 1, "c": 1}
    runs.clear()
    start_from(f, "c:in")(params, torch.randn(2, 4), torch.ones(2, 4))
    assert runs == {"c": 1}


def test_of_several_sites_all_that_served_only_them_is_left_out(runs):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Count("a"), Count("b"), Count("c")

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

    f, params = functionalize(Two())
    start_from(f, ["a", "b"])(params, torch.ones(2, 4), {"a": torch.ones(2, 4), "b": torch.ones(2, 4)})
    assert runs == {"c": 1}


def test_what_does_not_run_is_known_anew_for_new_shapes(runs):
    class ByLength(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Count("a"), Count("b"), Count("c")

        def forward(self, x):
            h = self.a(x)
            return self.c(self.b(h)) + (h if len(x) > 2 else 0)

    f, params = functionalize(ByLength())
    g = start_from(f, "b")
    for rows, expected in ((2, {"c": 1}), (3, {"a": 1, "c": 1}), (2, {"c": 1})):
        runs.clear()
        x = torch.randn(rows, 4)
        assert_same(g(params, x, stop_at(f, "b")(params, x)), f(params, x))
        runs.clear()
        g(params, x, torch.ones(rows, 4))
        assert runs == expected


def test_a_tape_does_not_run_the_prefix(runs):
    f, params = functionalize(nn.Sequential(*(Count(name) for name in "abcd")))
    (want,) = resolve(f, "2")
    tape = Tape(f, params, torch.randn(2, 4), (want,))
    assert runs == {"a": 1, "b": 1, "c": 1, "d": 1}
    tape.resume({want: torch.ones(2, 4)})
    assert runs == {"a": 1, "b": 1, "c": 1, "d": 2}


def test_a_tape_does_not_run_the_prefix_though_a_residual_stream_passes_by(runs):
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Count(name) for name in "abcd")

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x)
            return x

    f, params = functionalize(Stream())
    (want,) = resolve(f, "blocks.2:in")
    tape = Tape(f, params, torch.randn(2, 4), (want,))
    runs.clear()
    tape.resume({want: lambda value: value + 1})
    assert runs == {"c": 1, "d": 1}


def test_a_module_that_returns_its_input_is_no_placeholder():
    class Aliases(nn.Module):
        def __init__(self):
            super().__init__()
            self.same, self.view, self.linear = nn.Identity(), nn.Flatten(0), nn.Linear(3, 3)

        def forward(self, x):
            a, b = self.same(x), self.view(x)
            return self.linear(x) + a + b.reshape(x.shape)

    f, params = functionalize(Aliases())
    x = torch.randn(2, 3)
    assert_same(start_from(f, "linear")(params, x, torch.zeros(2, 3)), 2 * x)


# Effects that data flow does not show ----------------------------------------------------------------------------------


def test_control_flow_on_values_is_decided_anew_in_each_run():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            return a + b if x.sum() > 0 else b * 1

    f, params = functionalize(Branch())
    for x in (-torch.ones(2, 3), torch.ones(2, 3)):
        assert_same(start_from(f, "b")(params, x, stop_at(f, "b")(params, x)), f(params, x))


def test_a_left_out_module_may_not_have_changed_a_list():
    f, params = functionalize(Skips())
    x, value = torch.randn(2, 3), torch.randn(2, 3)
    for site in ("up.0", "up.1", "up.2"):
        assert_same(start_from(f, site)(params, x, value), intervene(f, {site: value})(params, x))


def test_python_state_on_the_way_is_kept():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.linear = 0, nn.Linear(3, 3)

        def forward(self, x):
            self.calls += 1
            return self.linear(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Counter(), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(self.a(x)) * self.a.calls

    f, params = functionalize(Model())
    x = torch.randn(2, 3)
    assert_same(start_from(f, "b")(params, x, stop_at(f, "b")(params, x)), f(params, x))
    (want,) = resolve(f, "b")
    assert_same(Tape(f, params, x, (want,)).resume({want: lambda value: value}), f(params, x))


# With other transforms -------------------------------------------------------------------------------------------------


@pytest.fixture
def nested():
    torch.manual_seed(0)
    return *functionalize(
        nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))
    ), torch.randn(2, 3)


@pytest.mark.parametrize("site", ["0", "1", "1.0", "1.1:in", "1.1/relu"])
def test_what_a_surrounding_capture_reads_is_computed(nested, site):
    """The symptom: a capture read the NaN of a placeholder, or did not find its site."""
    f, params, x = nested
    _, values = capture(start_from(f, "2"), site)(params, x, torch.ones(2, 3))
    assert_same(values[site], capture(f, site)(params, x)[1][site])


def test_a_surrounding_stop_reads_what_lies_before(nested):
    f, params, x = nested
    assert_same(stop_at(start_from(f, "2"), "0")(params, x, torch.ones(2, 3)), stop_at(f, "0")(params, x))


def test_a_surrounding_write_comes_after(nested):
    f, params, x = nested
    g = intervene(start_from(f, "1"), {"1": lambda value: value * 2, "2": lambda value: value - 1})
    one = torch.ones(2, 3)
    assert_same(g(params, x, one), f_tail(params, 2 * one) - 1)


def f_tail(params, h):
    return F.linear(h, params["2", "weight"], params["2", "bias"])


@pytest.mark.parametrize("site", ["0", "1.0", "1.1/relu", "1.0:in"])
def test_writes_further_in_reach_their_sites(nested, site):
    """The symptom: the inner write was not reached, because what surrounds it was left out."""
    f, params, x = nested
    inner = intervene(f, {site: lambda value: value * 0})
    assert_same(start_from(inner, "2")(params, x, torch.ones(2, 3)), torch.ones(2, 3))
    assert_same(start_from(inner, "1")(params, x, torch.ones(2, 3)), f_tail(params, torch.ones(2, 3)))
    (want,) = resolve(f, "2:in")
    tape = Tape(inner, params, x, (want,))
    assert_same(tape.resume({want: lambda value: value}), inner(params, x))


def test_reads_further_in_are_results(nested):
    f, params, x = nested
    output, values = start_from(capture(f, ["0", "1.0"]), "2")(params, x, torch.ones(2, 3))
    assert_same(output, torch.ones(2, 3))
    assert_same(values, capture(f, ["0", "1.0"])(params, x)[1])


def test_a_tail_of_a_tail(nested):
    f, params, x = nested
    g = start_from(start_from(f, "0"), "1")
    assert_same(g(params, x, torch.ones(2, 3), torch.zeros(2, 3)), f_tail(params, torch.ones(2, 3)))


def test_a_perturbed_tail(nested):
    f, params, x = nested
    one = torch.ones(2, 3)
    assert_same(perturb(start_from(f, "1"), "1")(params, x, {"1": one}, one), f_tail(params, 2 * one))
    assert_same(start_from(perturb(f, "1"), "2")(params, x, one, {"1": one}), one)


# Under function transforms ---------------------------------------------------------------------------------------------


def test_under_vmap_over_values():
    f, params, inputs = prepared(next(c for c in CASES if c.name == "gpt2"))
    site = "transformer.h.0"
    values = torch.stack([stop_at(f, site)(params, inputs) + i for i in range(3)])
    g = start_from(f, site)
    together = vmap(lambda value: g(params, inputs, value).logits)(values)
    for one, value in zip(together, values):
        torch.testing.assert_close(one, g(params, inputs, value).logits, rtol=1e-5, atol=1e-6)


def test_under_vmap_over_everything():
    models = [nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double() for _ in range(3)]
    f, _ = functionalize(models[0])
    stacked = torch.stack([functionalize(m)[1] for m in models])
    x, value = torch.randn(3, 2, 3).double(), torch.randn(3, 2, 3).double()
    together = vmap(start_from(f, "0"))(stacked, x, value)
    assert_same(together, torch.stack([m[1:](v) for m, v in zip(models, value)]), rtol=1e-12, atol=1e-12)
    (want,) = resolve(f, "0")
    resumed = vmap(lambda p, x, v: Tape(f, p, x, (want,)).resume({want: v}))(stacked, x, value)
    assert_same(resumed, together, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_tail_is_the_gradient_at_the_site():
    f, params, inputs = prepared(next(c for c in CASES if c.name == "llama"))
    site = "model.layers.0"
    value = stop_at(f, site)(params, inputs)
    by_tail = grad(lambda v: start_from(f, site)(params, inputs, v).logits.square().sum())(value)
    by_delta = grad(lambda d: perturb(f, site)(params, inputs, {site: d}).logits.square().sum())(torch.zeros_like(value))
    torch.testing.assert_close(by_tail, by_delta)
    (want,) = resolve(f, site)
    by_tape = grad(lambda v: Tape(f, params, inputs, (want,)).resume({want: v}).logits.square().sum())(value)
    torch.testing.assert_close(by_tape, by_delta)


def test_gradients_of_parameters_reach_through_a_tape():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)))
    x = torch.randn(2, 3)
    (want,) = resolve(f, "2:in")
    got = grad(lambda p: Tape(f, p, x, (want,)).resume({want: lambda v: v * 2}).sum())(params)
    expected = grad(lambda p: intervene(f, {"2:in": lambda v: v * 2})(p, x).sum())(params)
    assert_same(got, expected)


def test_in_inference_mode():
    for case in ("mlp", "in_place", "gpt2"):
        f, params, inputs = prepared(next(c for c in CASES if c.name == case))
        expected = f(params, inputs)
        wants = tuple(resolve(f, module_sites(f, params, inputs)))
        with torch.inference_mode():
            tape = Tape(f, params, inputs, wants)
            for want in wants:
                assert_same(tape.resume({want: lambda value: value}), expected)
                value = stop_at(f, str(want.site))(params, inputs)
                assert_same(start_from(f, str(want.site))(params, inputs, value), expected)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["mlp", "residual", "in_place", "gpt2"])
def test_compiled(name):
    case = next(c for c in CASES if c.name == name)
    f, params, inputs = prepared(case)
    site = {"mlp": "layers.1", "residual": "/relu", "in_place": "act", "gpt2": "transformer.h.0"}[name]
    value = stop_at(f, site)(params, inputs)
    compiled = torch.compile(start_from(f, site), fullgraph=True, backend="aot_eager")
    assert_same(leaves(compiled(params, inputs, value)), leaves(f(params, inputs)), rtol=1e-5, atol=1e-6)


# Errors ----------------------------------------------------------------------------------------------------------------


def test_a_plain_function_has_no_sites():
    with pytest.raises(ModelError, match="has no sites"):
        start_from(lambda params, x: x, "0")


def test_patterns_and_unknown_sites(nested):
    f, _, _ = nested
    with pytest.raises(SiteError, match=r"start_from takes exact sites, got the pattern '\*'"):
        start_from(f, "*")
    with pytest.raises(SiteError, match="no module '3'"):
        start_from(f, "3")


def test_a_value_is_needed_and_has_to_fit(nested):
    f, params, x = nested
    with pytest.raises(InputError, match="value is missing"):
        start_from(f, "0")(params, x)
    with pytest.raises(InputError, match=r"value for '0' is 1.0 of type float; give a tensor"):
        start_from(f, "0")(params, x, 1.0)
    with pytest.raises(SiteError, match=r"write at '0' is a float32 tensor of shape \[2, 4\]"):
        start_from(f, "0")(params, x, torch.ones(2, 4))
    with pytest.raises(InputError, match="value is a mapping from sites to tensors"):
        start_from(f, ["0", "2"])(params, x, torch.ones(2, 3))
    with pytest.raises(SiteError, match="value has no '2'; it has '0'"):
        start_from(f, ["0", "2"])(params, x, {"0": torch.ones(2, 3)})


def test_one_that_failed_leaves_the_next_right(nested):
    f, params, x = nested
    g = start_from(f, "0")
    with pytest.raises(SiteError, match="write at '0'"):
        g(params, x, torch.ones(2, 4))
    assert_same(g(params, x, stop_at(f, "0")(params, x)), f(params, x))


class Again(nn.Module):
    """One cell, used again and again; and blocks that share a module."""

    def __init__(self):
        super().__init__()
        relu = nn.ReLU()
        self.cell = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), relu) for _ in range(3)))

    def forward(self, x):
        for _ in range(4):
            x = torch.sigmoid(self.cell(x))
        return self.blocks(x)


@pytest.mark.parametrize(
    "site", ["cell@0", "cell@2", "cell.1@1", "cell.1/tanh@2", "cell@3:in", "blocks.0", "blocks.1.0", "blocks.0.1@1", "blocks.2"]
)
def test_a_tape_counts_the_calls_of_shared_modules(site):
    """The symptom: a later call of a shared module was taken for the first one, and its old value was replayed."""
    f, params = functionalize(Again().double())
    x = torch.randn(2, 3).double()
    (want,) = resolve(f, site)
    write = lambda value: value + 1  # noqa: E731
    assert_same(Tape(f, params, x, (want,)).resume({want: write}), intervene(f, {site: write})(params, x))


class Memory(nn.Module):
    """A module writes into a buffer that a later one reads."""

    def __init__(self, registered):
        super().__init__()
        self.write, self.read = nn.Linear(3, 3), nn.Linear(3, 3)
        seen = torch.zeros(3).double()
        if registered:
            self.write.register_buffer("seen", seen)
        else:
            self.write.seen = [seen]
        self.read.seen = self.write.seen
        self.write.forward = self._write
        self.middle = nn.Tanh()

    def _write(self, x):
        seen = self.write.seen
        (seen if isinstance(seen, torch.Tensor) else seen[0]).add_(x.sum(0))
        return 2 * x

    def forward(self, x):
        x = self.middle(self.write(x))
        seen = self.read.seen
        return self.read(x + (seen if isinstance(seen, torch.Tensor) else seen[0]))


@pytest.mark.parametrize("registered", [True, False])
def test_a_tape_does_not_replay_what_wrote_into_a_buffer(registered):
    f, params = functionalize(Memory(registered).double())
    x = torch.randn(2, 3).double()
    (want,) = resolve(f, "middle")
    write = lambda value: value + 1  # noqa: E731
    expected = intervene(f, {"middle": write})(params, x)
    assert_same(Tape(f, params, x, (want,)).resume({want: write}), expected)


@pytest.mark.parametrize("site", ["cell@2", "cell.1@1", "blocks.1.0", "blocks.0.1@1", "blocks.0.1@2"])
def test_a_tail_counts_the_calls_of_shared_modules(site):
    """The symptom: the value was written at another call, or its site was not reached."""
    f, params = functionalize(Again().double())
    x = torch.randn(2, 3).double()
    value = stop_at(f, site)(params, x) + 1
    assert_same(start_from(f, site)(params, x, value), intervene(f, {site: value})(params, x))
