"""Attention, norms and gates: AttnLRP, CP-LRP and RelP against their published formulas and on many kinds of transformers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.func import grad, vjp
from torch.utils import _pytree as pytree

import tdhook
from tdhook import functionalize, targets, with_rules
from tdhook.attribution import rules as r
from tdhook.attribution.lrp import lrp

from ...core import zoo
from ...latent.families import FAMILIES, example, model

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")

PRESETS = {"attn_lrp": r.attn_lrp(), "cp_lrp": r.cp_lrp(), "relp": r.relp(), "relp_ah": r.relp_ah()}


def prepared(name, attention="eager"):
    constants = {} if name in ("t5", "vit") else {"use_cache": False}
    return *functionalize(model(name, attention), **constants), example(name)


def same(a, b):
    pairs = zip(pytree.tree_flatten(a)[0], pytree.tree_flatten(b)[0], strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mixtral"])
def test_every_family_keeps_its_values_and_has_a_rule_for_each_operation(name):
    f, params, inputs = prepared(name)
    for preset in (r.attn_lrp(), r.cp_lrp()):
        assert same(with_rules(f, preset)(params, inputs), f(params, inputs))
        assert r.explain(f, params, inputs, preset, strict=True)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
@pytest.mark.parametrize("preset", PRESETS)
def test_fused_attention_keeps_its_values(name, preset):
    f, params, inputs = prepared(name, "sdpa")
    g = with_rules(f, PRESETS[preset])
    assert same(g(params, inputs), f(params, inputs))
    assert any(line.group == "attention" and line.rule != "gradient" for line in r.explain(g, params, inputs))


CHOSEN = targets.index(3, key="logits", position=-1)
EMBEDDINGS = {"gpt2": "transformer.wte", "llama": "model.embed_tokens", "gpt_neox": "gpt_neox.embed_in"}


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("preset", [r.attn_lrp(0.0), r.cp_lrp(0.0), r.relp(), r.relp_ah()], ids=PRESETS)
def test_fused_and_written_out_attention_have_the_same_relevance(name, preset):
    """Up to what the models themselves compute in float32. Epsilon would be absorbed where the product is an operation."""
    rows = []
    for attention in ("eager", "sdpa"):
        f, params, inputs = prepared(name, attention)
        rows.append(lrp(f, params, inputs, rules=preset, targets=CHOSEN, at=EMBEDDINGS[name])[EMBEDDINGS[name]])
    CLOSE(*rows, rtol=0, atol=1e-5 * rows[0].abs().max().item())


# Attention alone


class Attend(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.fixed = nn.Parameter(torch.randn(2, 3, 5, 4).double())

    def forward(self, q, k, v):
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v


QKV = tuple(torch.randn(3, 2, 3, 5, 4, generator=torch.Generator().manual_seed(3)).double())


def total(y):
    return (y * y.detach().cos()).flatten(1).sum(1)


def test_uniform_products_are_a_quarter_a_quarter_and_a_half():
    """softmax between two uniform products equals the plain gradient with q / 4, k / 4 and v / 2."""
    written = Attend(False)
    plain = [share * x * g for share, x, g in zip((0.25, 0.25, 0.5), QKV, grad(lambda q: total(written(*q)).sum())(QKV))]
    for attend, rules in (
        (written, {"matmul": r.Uniform(), "softmax": r.Gradient()}),
        (Attend(True), {"attention": r.Attention()}),
    ):
        f, params = functionalize(attend)
        for got, expected in zip(lrp(f, params, QKV, rules=rules, targets=total), plain):
            CLOSE(got, expected)


def test_a_frozen_pattern_gives_all_to_the_values():
    """sum V g_V = sum O g_O, nothing to q and k; stopping the softmax, the queries and keys, or the pattern is the same."""
    written, fused = Attend(False), Attend(True)
    f, params = functionalize(written)
    results = [
        lrp(f, params, QKV, rules={"softmax": r.Stop()}, targets=total),
        lrp(*functionalize(fused), QKV, rules={"attention": r.FrozenPattern()}, targets=total),
        lrp(tdhook.freeze(f, "/softmax"), params, QKV, rules={"matmul": r.Uniform(), "*": r.Gradient()}, targets=total),
    ]
    for q, k, v in results:
        assert not q.any() and not k.any()
        CLOSE(v, results[0][2])
        CLOSE(v.flatten(1).sum(1), total(written(*QKV)))


class Cross(nn.Module):
    """Attention of which only some operands depend on the input."""

    def __init__(self, active, fused):
        super().__init__()
        self.active, self.attend = active, Attend(fused)
        self.fixed = nn.ParameterList(QKV)

    def forward(self, x):
        return self.attend(*(x if name in self.active else value for name, value in zip("qkv", self.fixed)))


@pytest.mark.parametrize("active", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
@pytest.mark.parametrize("preset", ["attn_lrp", "cp_lrp"])
def test_what_an_operand_would_get_that_does_not_depend_on_the_input(active, preset):
    """Learned queries, as in a Perceiver: fused attention has the relevance that written-out attention has."""
    rows = []
    for fused in (False, True):
        f, params = functionalize(Cross(active, fused))
        table = {"linear": r.Epsilon(0.0)} + PRESETS[preset]
        rows.append(lrp(f, params, QKV[0].clone(), rules=table, targets=total))
    CLOSE(*rows)


def test_multi_head_attention_is_carried_out_in_parts():
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    nn.init.normal_(layer.in_proj_bias)
    x = torch.randn(3, 5, 8).double()
    f, params = functionalize(layer)
    g = with_rules(f, {"matmul": r.Uniform(), "softmax": r.Gradient()})

    def by_hand(x):
        parts = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
        q, k, v = (share * t + (1 - share) * t.detach() for share, t in zip((0.25, 0.25, 0.5), parts))
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        mixed = (q @ k.mT / 2).softmax(-1) @ v
        return layer.out_proj(mixed.transpose(1, 2).flatten(2))

    CLOSE(g(params, (x, x, x))[0], by_hand(x).detach())
    moving = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(by_hand(moving).square().sum(), moving)
    CLOSE(grad(lambda x: g(params, (x, x, x))[0].square().sum())(x), expected)


MHA = {
    "plain": ({}, {}),
    "no bias": ({"bias": False}, {}),
    "sizes of its own": ({"kdim": 6, "vdim": 5}, {}),
    "sequence first": ({"batch_first": False}, {}),
    "padding": ({}, {"key_padding_mask": torch.tensor([[False] * 4, [False, False, True, True], [False] * 3 + [True]])}),
    "mask": ({}, {"attn_mask": torch.ones(5, 4).triu(1).bool()}),
    "added mask": ({}, {"attn_mask": torch.randn(5, 4).double()}),
    "mask of each head": ({}, {"attn_mask": torch.randn(6, 5, 4).double()}),
    "no weights": ({}, {"need_weights": False}),
    "weights of each head": ({}, {"average_attn_weights": False}),
    "unbatched": ({}, {}),
}


@pytest.mark.parametrize("name", MHA)
def test_multi_head_attention_in_parts_equals_the_whole(name):
    options, constants = MHA[name]
    options = {"batch_first": True, **options}
    layer = nn.MultiheadAttention(8, 2, **options).double().eval()
    shapes = [(3, 5, 8), (3, 4, options.get("kdim", 8)), (3, 4, options.get("vdim", 8))]
    qkv = tuple(torch.randn(shape).double() for shape in shapes)
    if name == "unbatched":
        qkv = tuple(t[0] for t in qkv)
    if name == "sequence first":
        qkv = tuple(t.transpose(0, 1) for t in qkv)
    f, params = functionalize(layer, **constants)
    g = with_rules(f, {"linear": r.Gradient()})
    assert same(g(params, qkv), f(params, qkv))
    for result in (0, 1) if constants.get("need_weights", True) else (0,):
        score = lambda h, q: h(params, q)[result].cos().sum()  # noqa: B023, E731
        for ours, expected in zip(grad(partial(score, g))(qkv), grad(partial(score, f))(qkv)):
            CLOSE(ours, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"add_bias_kv": True}, "bias_k"), ({"add_zero_attn": True}, "add_zero_attn"), ({"dropout": 0.1}, "drops")],
)
def test_multi_head_attention_that_cannot_be_written_out_is_refused(options, message):
    layer = nn.MultiheadAttention(8, 2, **options).train()
    x = torch.randn(5, 3, 8)
    f, params = functionalize(layer)
    with pytest.raises(tdhook.errors.RuleError, match=message):
        with_rules(f, {"linear": r.Epsilon()})(params, (x, x, x))


def test_an_encoder_layer_has_the_values_of_its_slow_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    x = torch.randn(3, 5, 8).double()
    f, params = functionalize(layer)
    for preset in PRESETS.values():
        CLOSE(with_rules(f, preset)(params, x), layer(x).detach())
        assert r.explain(f, params, x, preset, strict=True)


# A block of Llama


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(width) / 4)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    """Causal attention of two heads with a grouped key, a gated MLP, no biases."""

    def __init__(self, width=8, hidden=12):
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(width, n, bias=False) for n in (width, 4, 4, width))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        self.head = nn.Linear(width, 5, bias=False)

    def forward(self, x):
        h = self.norms[0](x)
        q = self.q(h).unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = (t[:, None].expand(-1, 2, -1, -1) for t in (self.k(h), self.v(h)))
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
        pattern = (q @ k.transpose(-2, -1) / 2 + mask).softmax(-1)
        x = x + self.o((pattern @ v).transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(self.norms[2](x))[:, -1]


@pytest.fixture
def block():
    return Block().double(), torch.randn(3, 6, 8).double()


@pytest.mark.parametrize("site", [None, "norms.2:in", "head:in"])
def test_cp_lrp_of_a_block_without_biases_is_the_logit(block, site):
    net, x = block
    f, params = functionalize(net)
    got = lrp(f, params, x, rules=r.cp_lrp(0.0), targets=1, at=site)
    got = got if isinstance(got, Tensor) else got[site]
    logit = net(x)[:, 1].detach()
    CLOSE(got.flatten(1).sum(1), logit)
    plain = x * grad(lambda x: net(x)[:, 1].sum())(x)
    assert ((plain.flatten(1).sum(1) - logit).abs() > 1e-2).all()


def test_attn_lrp_of_a_block_equals_a_hand_written_pass_in_relevance(block):
    """AttnLRP as published: relevance goes from operation to operation, none of it by autograd."""
    net, x = block
    got = lrp(*functionalize(net), x, rules=r.attn_lrp(0.0), targets=1)
    with torch.no_grad():
        n0, n1, n2 = net.norms
        h0 = n0(x)
        q = net.q(h0).unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = net.k(h0), net.v(h0)
        mask = torch.full((6, 6), float("-inf")).double().triu(1)
        scores = q @ k[:, None].mT / 2
        pattern = (scores + mask).softmax(-1)
        heads = pattern @ v[:, None]
        merged = heads.transpose(1, 2).flatten(2)
        attended = net.o(merged)
        x1 = x + attended
        h1 = n1(x1)
        gate, up = net.gate(h1), net.up(h1)
        hidden = F.silu(gate) * up
        fed = net.down(hidden)
        x2 = x1 + fed
        h2 = n2(x2)
        logits = net.head(h2)

        def linear(layer, a, relevance):
            return a * ((relevance / layer(a)) @ layer.weight)

        start = torch.zeros_like(logits)
        start[:, -1, 1] = logits[:, -1, 1]
        r_x2 = linear(net.head, h2, start)  # RMS norm: identity
        r_x1, r_fed = x1 * r_x2 / x2, fed * r_x2 / x2  # sum: in proportion
        r_hidden = linear(net.down, hidden, r_fed)
        r_gate, r_up = r_hidden / 2, r_hidden / 2  # product: evenly; SiLU: identity
        r_x1 = r_x1 + linear(net.gate, h1, r_gate) + linear(net.up, h1, r_up)
        r_x, r_attended = x * r_x1 / x1, attended * r_x1 / x1
        r_heads = linear(net.o, merged, r_attended).unflatten(-1, (2, 4)).transpose(1, 2)
        share = r_heads / (2 * heads)
        r_pattern = pattern * (share @ v[:, None].mT)
        r_v = (v[:, None] * (pattern.mT @ share)).sum(1)  # of the two heads that share it
        finite = torch.where(mask == 0, scores, 0)
        r_scores = finite * (r_pattern - pattern * r_pattern.sum(-1, keepdim=True))  # proposition 3.1
        share = r_scores / (4 * scores)  # of q k, which is twice the scores
        r_q = (q * (share @ k[:, None])).transpose(1, 2).flatten(2)
        r_k = (k[:, None] * (share.mT @ q)).sum(1)
        expected = r_x + linear(net.q, h0, r_q) + linear(net.k, h0, r_k) + linear(net.v, h0, r_v)
    CLOSE(got, expected, rtol=1e-7)


def test_relp_is_a_chain_of_constants(block):
    """RelP: norms, activations and half of each gated product as constants of the derivative."""
    net, x = block

    class ByHand(Block):
        def forward(self, x):
            def norm(layer, x):
                return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6).detach() * layer.weight

            h = norm(self.norms[0], x)
            q = self.q(h).unflatten(-1, (2, 4)).transpose(1, 2)
            k, v = (t[:, None].expand(-1, 2, -1, -1) for t in (self.k(h), self.v(h)))
            mask = torch.full((6, 6), float("-inf")).double().triu(1)
            x = x + self.o(((q @ k.mT / 2 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2))
            h = norm(self.norms[1], x)
            gate = self.gate(h)
            product = gate * gate.sigmoid().detach() * self.up(h)
            x = x + self.down(product / 2 + product.detach() / 2)
            return self.head(norm(self.norms[2], x))[:, -1]

    by_hand = ByHand().double()
    by_hand.load_state_dict(net.state_dict())
    expected = x * grad(lambda x: by_hand(x)[:, 1].sum())(x)
    CLOSE(lrp(*functionalize(net), x, rules=r.relp(), targets=1), expected)


@pytest.mark.parametrize("gate", [nn.SiLU(), nn.GELU(), "written out"], ids=["silu", "gelu", "written out"])
def test_gates_are_found_whatever_the_activation(gate):
    """CP-LRP holds the gate constant, also of an activation that is a module of several operations."""

    class Swish(nn.Module):
        def forward(self, x):
            return 0.5 * x * (1 + torch.tanh(x))

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(4, 6), nn.Linear(4, 6)
            self.act = Swish() if gate == "written out" else gate

        def forward(self, x):
            return self.act(self.gate(x)) * self.up(x)

    net, x = Gated().double(), torch.randn(3, 4).double()
    f, params = functionalize(net)
    held = net.act(net.gate(x)).detach()
    expected = x * grad(lambda x: (held * net.up(x)).sum())(x)
    for rules in (r.cp_lrp(0.0), {"activation": r.Identity(), "product": r.FrozenGate()}):
        CLOSE(lrp(f, params, x, rules=rules, targets=lambda y: y.sum(1)), expected)


def test_a_gated_unit_is_carried_out_in_parts():
    x = torch.randn(3, 6).double()
    f, params = functionalize(nn.GLU())
    CLOSE(lrp(f, params, x, rules=r.cp_lrp(), targets=lambda y: y.sum(1)).sum(1), F.glu(x).sum(1))
    assert torch.equal(with_rules(f, r.attn_lrp())(params, x), F.glu(x))
    halves = lrp(f, params, x, rules={"product": r.Uniform()}, targets=lambda y: y.sum(1)).chunk(2, 1)
    CLOSE(halves[0].sum(1), F.glu(x).sum(1) / 2)


# Token ids


def test_positions_are_no_input():
    """A table of sines that is multiplied is no factor that depends on the input, also where positions are given."""
    made = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(n_embd=8, n_layer=1, n_head=2, rotary_dim=2, vocab_size=20, bos_token_id=0, eos_token_id=0)
    )
    f, params = functionalize(made.double().eval(), use_cache=False)
    ids = torch.randint(0, 20, (2, 5))
    rows = []
    for extra in ({}, {"position_ids": torch.arange(5)[None].expand(2, 5)}):
        got = lrp(f, params, {"input_ids": ids, **extra}, rules=r.attn_lrp(), targets=CHOSEN, at="transformer.wte")
        rows.append(got["transformer.wte"])
    CLOSE(*rows)


@pytest.mark.parametrize("mask", [torch.int64, torch.float64, torch.bool])
def test_embeddings_depend_on_the_input_beside_a_mask_of_any_type(mask):
    f, params, inputs = prepared("bert")
    with_mask = {**inputs, "attention_mask": torch.ones(2, 6, dtype=mask)}
    site, chosen = "bert.embeddings.word_embeddings", targets.index(3, key="logits", position=0)
    rows = [lrp(f, params, i, rules=r.attn_lrp(), targets=chosen, at=site)[site] for i in (inputs, with_mask)]
    CLOSE(*rows, rtol=1e-6)


def test_models_of_token_ids_that_look_up_by_hand():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Parameter(torch.randn(7, 4)), nn.Linear(4, 3, bias=False)
            self.identity = nn.Identity()

        def forward(self, ids):
            return self.head(self.identity(self.table[ids]).relu().mean(1))

    net, ids = Table().double(), torch.randint(0, 7, (2, 5))
    f, params = functionalize(net)
    got = lrp(f, params, ids, rules=r.epsilon_plus(0.0), targets=1, at="identity")["identity"]
    CLOSE(got.flatten(1).sum(1), net(ids)[:, 1].detach())


@pytest.mark.parametrize("case", [c for c in zoo.everything if c.name not in ("encoder", "complex64")], ids=repr)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_values_are_kept_bit_for_bit(case):
    net, inputs = case()
    f, params = functionalize(net)
    for preset in (r.epsilon_plus(), r.epsilon_alpha2_beta1_flat(), r.attn_lrp(), r.cp_lrp()):
        assert same(with_rules(f, preset)(params, inputs), f(params, inputs))


def test_the_value_of_a_pulled_back_run_is_kept_too():
    f, params, inputs = prepared("llama", "sdpa")
    g = with_rules(f, r.attn_lrp())
    embed = tdhook.capture(f, "model.embed_tokens")(params, inputs)[1]["model.embed_tokens"]
    run = tdhook.perturb(g, "model.embed_tokens")
    value, _ = vjp(lambda d: run(params, inputs, {"model.embed_tokens": d}).logits, torch.zeros_like(embed))
    assert torch.equal(value, f(params, inputs).logits)
