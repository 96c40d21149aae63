"""Path patching against a hand-written model of two layers and against plain hooks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import vmap

from tdhook import functionalize
from tdhook.core import errors
from tdhook.latent.activation_patching import activation_patching
from tdhook.latent.path_patching import path_patching

from .families import model, named
from .hooks import hooked, values_of
from .pairs import metric, pair

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


class Residual(nn.Module):
    """x1 = x + a(x);  x2 = x1 + b(x1);  y = x2 + c(x2)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in "abc")

    def forward(self, x):
        for part in (self.a, self.b, self.c):
            x = x + part(x)
        return x


@pytest.fixture
def small():
    module = Residual().double()
    f, params = functionalize(module)
    generator = torch.Generator().manual_seed(1)
    clean, corrupted = (torch.randn(2, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    return module, f, params, clean, corrupted


def total(out):
    return out.square().sum(1)


def test_every_path_of_a_model_written_out(small):
    """All paths from `a` in a model of three parts, each as a formula."""
    module, f, params, clean, corrupted = small
    a, b, c = module.a, module.b, module.c
    x = corrupted
    new, old = a(clean), a(x)
    x1, x1_new = x + old, x + new
    x2 = x1 + b(x1)
    run = partial(path_patching, f, params, clean, corrupted, total, senders="a", frozen=["a", "b", "c"])

    def check(got, expected):
        CLOSE(got.patched[0], total(expected).detach())

    # a -> b alone: b reads the new a, the stream holds the old one
    check(run(receivers="b:in"), x1 + b(x1_new) + c(x1 + b(x1_new)))
    # a -> c directly: b is held
    check(run(receivers="c:in"), x2 + c(x1_new + b(x1)))
    # a -> b -> c and no other way
    check(run(receivers="c:in", through=["b"]), x2 + c(x1 + b(x1_new)))
    # a -> output directly
    check(run(receivers=":out"), x1_new + b(x1) + c(x2))
    # a -> b -> output
    check(run(receivers=":out", through=["b"]), x1 + b(x1_new) + c(x2))
    # a -> {b, c} directly
    check(run(receivers=["b:in", "c:in"]), (y := x1 + b(x1_new)) + c(x1_new + b(x1)))
    assert y is not None
    # with b free, a reaches c through b too
    check(run(receivers="c:in", frozen=["c"]), x2 + c(x1_new + b(x1_new)))
    # with nothing held and all receiving, it is activation patching
    check(run(receivers=":out", frozen=[]), (z := x1_new + b(x1_new)) + c(z))


def test_outputs_as_receivers_are_read_before_they_are_held(small):
    _, f, params, clean, corrupted = small
    run = partial(path_patching, f, params, clean, corrupted, total, senders="a", frozen=["a", "b", "c"])
    CLOSE(run(receivers="b").patched, run(receivers="b:in").patched)
    by_b = run(receivers="c:in", through=["b"])
    CLOSE(run(receivers="c", through=["b"]).patched, by_b.patched)
    CLOSE(run(receivers="c:in", through=["b:in", "b"]).patched, by_b.patched)


def test_directions_are_the_two_runs_exchanged(small):
    _, f, params, clean, corrupted = small
    run = partial(path_patching, f, params, metric=total, senders="a", receivers="c:in", frozen=["a", "b", "c"])
    one, other = run(clean, corrupted, direction="noise"), run(corrupted, clean, direction="denoise")
    CLOSE(one.patched, other.patched)
    CLOSE(one.clean, total(f(params, clean)))
    CLOSE(one.corrupted, total(f(params, corrupted)))


def test_equal_runs_give_the_baseline_and_receivers_before_the_sender_hear_nothing(small):
    _, f, params, clean, corrupted = small
    run = partial(path_patching, f, params, frozen=["a", "b", "c"], metric=total)
    CLOSE(run(clean, clean, senders="a", receivers="c:in").patched[0], total(f(params, clean)))
    CLOSE(run(clean, corrupted, senders="c", receivers="b:in").patched[0], total(f(params, corrupted)))


def test_places_of_a_sender_one_by_one(small):
    module, f, params, clean, corrupted = small
    options = {"receivers": "c:in", "frozen": ["a", "b", "c"], "axis": 1}
    got = path_patching(f, params, clean, corrupted, total, senders=["a", "b"], chunk_size=2, **options)
    assert got.patched.shape == (2, 3, 2)
    x1 = corrupted + module.a(corrupted)
    for unit in range(3):
        new = module.a(corrupted).clone()
        new[:, unit] = module.a(clean)[:, unit]
        expected = x1 + module.b(x1) + module.c(corrupted + new + module.b(x1))
        CLOSE(got.patched[0, unit], total(expected).detach())
    run = lambda a, b: path_patching(f, params, a, b, total, senders="a", **options).patched  # noqa: E731
    pairs = torch.stack([clean, clean * 2]), torch.stack([corrupted, corrupted - 1])
    CLOSE(vmap(run)(*pairs), torch.stack([run(a, b) for a, b in zip(*pairs)]))


# Transformers ----------------------------------------------------------------------------------------------------------


NODES = {
    "gpt2": ("transformer.h.{}.attn", "transformer.h.{}.mlp", "transformer.h.0.attn.c_proj:in"),
    "llama": ("model.layers.{}.self_attn", "model.layers.{}.mlp", "model.layers.0.self_attn.o_proj:in"),
}


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("name", NODES)
def test_heads_to_the_queries_of_one_later_head(name, direction):
    """Wang et al.: three hooked runs for each sender."""
    f, params, inputs, found = named(name)
    clean, corrupted = pair(inputs)
    got = path_patching(
        f, params, clean, corrupted, metric, senders=found.head_output[0], axis=-2, direction=direction,
        receivers={found.query[1]: [2]}, receiver_axis=-2, frozen=[*found.head_output, *found.mlp],
    )  # fmt: skip
    source, base = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    attention, mlp, out = NODES[name]
    nodes = [kind.format(layer) for layer in range(2) for kind in (attention, mlp)]
    net = model(name)
    sent, kept = values_of(net, source, [out])[out], values_of(net, base, nodes)
    query = "transformer.h.1.attn.c_attn" if name == "gpt2" else "model.layers.1.self_attn.q_proj"
    columns = slice(16, 24)
    for head in range(4):
        mine = slice(8 * head, 8 * head + 8)

        def send(value, mine=mine):
            value[..., mine] = sent[..., mine]
            return value

        # what the attention of layer 0 becomes when only this head is new
        changed = values_of_with(net, base, out, send, attention.format(0))
        held = {node: (lambda value, node=node: kept[node]) for node in nodes if node != attention.format(0)}
        _, seen = hooked(net, base, {**held, attention.format(0): lambda value, c=changed: c, query: lambda value: value})

        def receive(value, seen=seen):
            value[..., columns] = seen[query][..., columns]
            return value

        CLOSE(got.patched[0, head], metric(hooked(net, base, {query: receive})[0]))
    assert (got.patched[0] - got.patched[0, :1]).abs().max() > 1e-8


def values_of_with(net, inputs, site, edit, read):
    return hooked(net, inputs, {site: edit, read: lambda value: value})[1][read]


def test_direct_effect_on_the_logits():
    """The last residual receives: a later layer does not answer."""
    f, params, inputs, found = named("llama")
    clean, corrupted = pair(inputs)
    nodes = [*found.attention, *found.mlp]
    got = path_patching(f, params, clean, corrupted, metric, senders=found.mlp, receivers=found.residual_post[-1], frozen=nodes)
    last = activation_patching(f, params, clean, corrupted, metric, sites=found.mlp, axis=None)
    CLOSE(got.patched[1], last.patched[1])  # nothing comes after the last MLP
    net = model("llama")
    new = values_of(net, clean, ["model.layers.0.mlp"])["model.layers.0.mlp"]
    sites = ["model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp"]
    kept = values_of(net, corrupted, sites)
    edits = {site: (lambda value, site=site: kept[site]) for site in sites[1:]}
    CLOSE(got.patched[0], metric(hooked(net, corrupted, {sites[0]: lambda value: new, **edits})[0]))
    assert (got.patched[0] - last.patched[0]).abs().max() > 1e-6


def test_one_token_of_the_receiver():
    f, params, inputs, found = named("gpt2")
    clean, corrupted = pair(inputs)
    options = {"senders": found.embedding, "frozen": [*found.attention, *found.mlp]}
    every = path_patching(f, params, clean, corrupted, metric, receivers=found.residual_post[-1], **options)
    last = path_patching(
        f, params, clean, corrupted, metric, receivers={found.residual_post[-1]: [-1]}, receiver_axis=1, **options
    )
    CLOSE(last.patched, every.patched)  # the metric reads the last token
    two = path_patching(
        f, params, clean, corrupted, metric, receivers={found.residual_post[-1]: [2]}, receiver_axis=1, **options
    )
    CLOSE(two.patched[0], two.corrupted)


def test_progress_and_chunks():
    f, params, inputs, found = named("gpt2")
    clean, corrupted = pair(inputs)
    seen = []
    run = partial(
        path_patching, f, params, clean, corrupted, metric, senders=found.head_output, receivers=found.residual_post[-1],
        frozen=[*found.head_output, *found.mlp], axis=-2,
    )  # fmt: skip
    CLOSE(run(chunk_size=1, progress=lambda *s: seen.append(s)).patched, run().patched)
    assert seen == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"senders": "x"}, errors.SiteError, "unknown site 'x'"),
        ({"receivers": []}, errors.SiteError, "receivers is empty"),
        ({"receivers": {}}, errors.SiteError, "receivers is empty"),
        ({"through": [{}]}, errors.SiteError, "through is empty"),
        ({"through": "b"}, errors.InputError, "through is 'b'.*; give a list of stages"),
        ({"through": {"b": [0]}, "receiver_axis": 1}, errors.InputError, "give a list of stages"),
        ({"receivers": "y:in"}, errors.SiteError, "unknown site 'y:in'"),
        ({"through": ["z"]}, errors.SiteError, "unknown site 'z'"),
        ({"frozen": "x"}, errors.SiteError, "unknown site 'x'"),
        ({"receivers": {"b:in": [0]}}, errors.InputError, "give receiver_axis too"),
        ({"receivers": {"b:in": [9]}, "receiver_axis": 1}, errors.InputError, "receivers has 9, out of range"),
        ({"direction": "back"}, errors.InputError, "direction='back' is unknown"),
        ({"positions": [0]}, errors.InputError, "give axis too"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1"),
        ({"metric": lambda out: out}, errors.TargetError, "metric returned"),
        ({"corrupted": torch.ones(2, 4)}, errors.InputError, "patching needs aligned inputs"),
    ],
)
def test_bad_input(small, options, error, message):
    _, f, params, clean, corrupted = small
    given = {"clean": clean, "corrupted": corrupted, "metric": total, "senders": "a", "receivers": "b:in", "frozen": "c"}
    with pytest.raises(error, match=message):
        path_patching(f, params, **{**given, **options})


def test_heads_alone_are_held_as_in_the_paper():
    """Wang et al., appendix B: MLPs are part of the direct path, so they are computed anew."""
    f, params, inputs, found = named("gpt2")
    clean, corrupted = pair(inputs)
    got = path_patching(
        f, params, clean, corrupted, metric, senders=found.head_output[0], axis=-2, receivers=found.residual_post[-1],
        frozen=found.head_output, direction="noise",
    )  # fmt: skip
    net, first, second = model("gpt2"), *(f"transformer.h.{layer}.attn.c_proj:in" for layer in range(2))
    sent, kept = values_of(net, corrupted, [first])[first], values_of(net, clean, [second])[second]
    for head in range(4):

        def send(value, head=head):
            value[..., 8 * head : 8 * head + 8] = sent[..., 8 * head : 8 * head + 8]
            return value

        CLOSE(got.patched[0, head], metric(hooked(net, clean, {first: send, second: lambda value: kept})[0]))


def test_what_is_held_around_a_sender_is_an_error_unless_a_receiver_lies_inside():
    """The symptom: heads as senders with attention held had no effect at all."""
    f, params, inputs, found = named("llama")
    clean, corrupted = pair(inputs)
    run = partial(path_patching, f, params, clean, corrupted, metric, frozen=[*found.attention, *found.mlp], axis=-2)
    last = found.residual_post[-1]
    with pytest.raises(errors.SiteError, match=r"frozen holds 'model.layers.0.self_attn:out.0.', inside of which"):
        run(senders=found.head_output, receivers=last)
    with pytest.raises(errors.SiteError, match=r"inside of which 'model.layers.1.self_attn.o_proj:in' sends"):
        run(senders=found.query[1], through=[{found.head_output[1]: None}], receivers=last)
    inside = run(senders=found.query[1], receivers={found.head_output[1]: None})
    assert (inside.patched[0] - inside.corrupted).abs().max() > 1e-8


def test_nothing_runs_behind_the_last_receiver_of_a_stage():
    runs = []

    class Part(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.linear = name, nn.Linear(3, 3)

        def forward(self, x):
            runs.append(self.name)
            return self.linear(x)

    f, params = functionalize(nn.Sequential(*map(Part, "abcd")))
    clean, corrupted = torch.ones(1, 3), torch.zeros(1, 3)
    path_patching(f, params, clean, corrupted, torch.sum, senders="0", receivers="2:in", frozen=[])
    assert "".join(runs) == "abcd" * 2 + "b" + "cd"


def test_left_padding_and_several_receivers():
    f, params, inputs, found = named("gpt2")
    clean, corrupted = pair(inputs)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    padded = [{**each, "attention_mask": mask, "position_ids": position_ids} for each in (clean, corrupted)]
    options = {
        "senders": found.head_output[0], "axis": -2, "receiver_axis": -2, "frozen": [*found.head_output, *found.mlp],
        "receivers": {found.query[1]: [2], found.key[1]: [1], found.value[1]: [0, 3]},
    }  # fmt: skip
    both = path_patching(f, params, *padded, metric, **options)
    alone = [
        path_patching(f, params, *({"input_ids": each["input_ids"][:1, 2:]} for each in (clean, corrupted)), metric, **options),
        path_patching(f, params, *({"input_ids": each["input_ids"][1:]} for each in (clean, corrupted)), metric, **options),
    ]
    CLOSE(both.patched, torch.cat([each.patched for each in alone], -1))
    assert (both.patched - both.corrupted).abs().max() > 1e-8


@pytest.mark.compile
def test_compiled(small):
    torch._dynamo.reset()
    _, f, params, clean, corrupted = small

    def run(a, b):
        options = {"senders": ["a", "b"], "receivers": "c:in", "through": ["b"], "frozen": ["a", "b", "c"]}
        return path_patching(f, params, a, b, total, axis=1, **options).patched

    CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(clean, corrupted), run(clean, corrupted))
