"""LRP as a method: its start, its sites, and books that balance on every kind of model."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

import tdhook
from tdhook import functionalize
from tdhook.attribution import rules
from tdhook.attribution.lrp import lrp
from tdhook.core import errors
from tdhook.core.targets import select

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # fused attention has no batching rule
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # of Dynamo, about itself
]
CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
PRESETS = {
    name: getattr(rules, name)()
    for name in (
        "epsilon_plus",
        "epsilon_plus_flat",
        "epsilon_alpha2_beta1_flat",
        "excitation_backprop",
        "beta_smooth",
        "attn_lrp",
        "cp_lrp",
        "relp",
        "relp_ah",
    )
}
PRESETS["epsilon_gamma_box"] = rules.epsilon_gamma_box(-3.0, 3.0)


def stirred(model):
    """In float64, with biases, scales and statistics that are not trivial."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.ndim < 2 or 1 in p.shape:
            nn.init.uniform_(p, -0.5, 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.double().eval()


def cnn():
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    second = [nn.Conv2d(6, 8, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(-3)]
    return stirred(nn.Sequential(*first, *second, nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 4)))


def normal(*shape):
    torch.manual_seed(7)
    return torch.randn(*shape, dtype=torch.float64)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Odd(nn.Module):
    """Writes in place and through views, joins constants, masks with infinity, takes maxima."""

    def __init__(self):
        super().__init__()
        self.linear, self.token = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, x, y):
        o = torch.zeros_like(x)
        o[:, 0] = x[:, 0] * 2
        o[:, 1] += y[:, 1]
        o[:, 2] = self.token[2]
        z = self.linear(o).relu_() + x
        z += y
        z[:, 1:3].mul_(self.token[1:3]).add_(1.0)
        w = torch.where(z > 0, z, self.token) + z.max(-1, keepdim=True).values * z
        w = F.pad(w, (1, 1), value=0.5)
        w = w.masked_fill(torch.arange(6) == 0, float("-inf"))
        joined = torch.cat([w.softmax(-1) * 3, self.token.expand(len(x), 4)], -1)
        return joined.cumsum(-1) + w[:, 2:3].tanh()


def balance(model, x, table, targets, at=None, **constants):
    """Relevance plus what is absorbed, less F."""
    f, params = functionalize(model, **constants)
    relevance, absorbed = lrp(f, params, x, rules=table, targets=targets, at=at, absorbed=True)
    chosen, plural = select(targets, f(params, x))
    if isinstance(relevance, torch.Tensor):
        parts = [relevance]
    else:
        parts = [r for r in (relevance if isinstance(relevance, tuple) else relevance.values()) if r is not None]
    total = sum(r.flatten(2 if plural else 1).sum(-1) for r in parts) + sum(absorbed.values())
    return total, chosen.movedim(-1, 0) if plural else chosen[..., 0]


# The books ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_the_books_of_a_cnn_balance(name):
    CLOSE(*balance(cnn(), normal(3, 3, 8, 8), PRESETS[name], [1, 2]))


@pytest.mark.parametrize("name", ["epsilon_gamma_box", "epsilon_plus_flat"])
@pytest.mark.parametrize("site", ["0:in", "0", "4", "5", "8:in"])
def test_with_sites_only_what_lies_after_them_counts(site, name):
    x = normal(3, 3, 8, 8)
    x[:, :, 2] = 0.0  # at a site, what a first-layer rule gives to zeros is lost, and counts as absorbed
    CLOSE(*balance(cnn(), x, PRESETS[name], 1, at=site))


def test_where_a_cnn_absorbs():
    f, params = functionalize(cnn())
    x = normal(2, 3, 8, 8)
    absorbed = lrp(f, params, x, rules=PRESETS["excitation_backprop"], targets=1, at="9", absorbed=True).absorbed
    # The last layer is the z+ rule for inputs that are not negative: bias+ takes its share of the positive part.
    hidden = tdhook.stop_at(f, "9")(params, x)
    weight, bias = params["10", "weight"][1].clamp(min=0), params["10", "bias"][1].clamp(min=0)
    z = hidden @ weight + bias
    CLOSE(absorbed["10/linear"], f(params, x)[:, 1] * (1 - (hidden @ weight) / (z + 1e-6)))
    others = [value for site, value in absorbed.items() if site != "10/linear"]
    assert all(bool((value.abs() < 1e-15).all()) for value in others)


@pytest.mark.parametrize("name", ["attn_lrp", "cp_lrp"])
def test_the_books_of_an_lstm_balance(name):
    CLOSE(*balance(stirred(Recurrent()), normal(3, 5, 4), PRESETS[name], [0, 1]))


@pytest.mark.parametrize("name", ["attn_lrp", "relp_ah"])
def test_the_books_of_a_transformer_layer_balance(name):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = stirred(nn.Sequential(layer, nn.Flatten(), nn.Linear(80, 3)))
    CLOSE(*balance(model, normal(3, 5, 16), PRESETS[name], [0, 1]))


@pytest.mark.parametrize("stop", [True, False])
def test_the_books_of_odd_operations_balance(stop):
    table = [rules.on("linear", rules.Epsilon(0.1)), *([rules.on("softmax", rules.Stop())] if stop else [])]
    CLOSE(*balance(stirred(Odd()), (normal(3, 4), normal(3, 4).flip(0)), table, [0, 3]))


def test_a_target_that_is_not_linear_takes_its_share():
    f, params = functionalize(cnn())
    target = lambda y: y.log_softmax(-1)[:, 2]  # noqa: E731
    CLOSE(*balance(cnn(), normal(3, 3, 8, 8), PRESETS["epsilon_plus"], target))
    absorbed = lrp(f, params, normal(1, 3, 8, 8), rules=PRESETS["epsilon_plus"], targets=target, absorbed=True).absorbed
    assert absorbed[":out"].abs() > 0.1
    assert lrp(f, params, normal(1, 3, 8, 8), rules=PRESETS["epsilon_plus"], targets=2, absorbed=True).absorbed[":out"] == 0


def test_position_embeddings_and_class_tokens_are_in_the_books():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    model = stirred(transformers.ViTForImageClassification(config))
    x = {"pixel_values": normal(2, 3, 16, 16)}
    targets = tdhook.targets.indices([0, 1], key="logits")
    CLOSE(*balance(model, x, PRESETS["attn_lrp"], targets))
    f, params = functionalize(model)
    absorbed = lrp(f, params, x, rules=PRESETS["attn_lrp"], targets=targets, absorbed=True).absorbed
    taken = [site for site, value in absorbed.items() if site.startswith("vit.embeddings/") and value.abs().max() > 1e-6]
    assert {site.split("/")[1].split("@")[0] for site in taken} == {"cat", "add"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_books_of_language_models_balance(kind, attention):
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=20, bos_token_id=0, eos_token_id=0
        )
        model, site = transformers.GPT2LMHeadModel, "transformer.wte"
    else:
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
        )
        model, site = transformers.LlamaForCausalLM, "model.embed_tokens"
    config._attn_implementation = attention
    ids = {"input_ids": torch.arange(14).reshape(2, 7)}
    targets = tdhook.targets.indices([3, 4], key="logits", position=-1)
    for name in ("attn_lrp", "cp_lrp"):
        CLOSE(*balance(stirred(model(config)), ids, PRESETS[name], targets, at=site, use_cache=False))


# Options -----------------------------------------------------------------------------------------------------------------


def test_relevance_is_the_same_with_its_ledger():
    f, params = functionalize(cnn())
    x = normal(3, 3, 8, 8)
    run = partial(lrp, f, params, x, rules=PRESETS["epsilon_plus"], targets=[1, 0])
    result = run(absorbed=True)
    assert torch.equal(result.relevance, run())
    assert {tuple(v.shape) for v in result.absorbed.values()} == {(2, 3)}
    for chunk_size in (1, 4, 100):
        other = run(absorbed=True, chunk_size=chunk_size)
        assert all(torch.allclose(other.absorbed[k], v, rtol=0, atol=1e-14) for k, v in result.absorbed.items())


def test_start_one_is_a_share():
    f, params = functionalize(cnn())
    x = normal(3, 3, 8, 8)
    relevance, absorbed = lrp(f, params, x, rules=PRESETS["epsilon_plus"], targets=[1, 0], start="one", absorbed=True)
    CLOSE(relevance.flatten(2).sum(-1) + sum(absorbed.values()), torch.ones(2, 3).double())
    whole = lrp(f, params, x, rules=PRESETS["epsilon_plus"], targets=[1, 0])
    CLOSE(relevance * f(params, x)[:, [1, 0]].mT[..., None, None, None], whole)


def test_under_vmap():
    f, params = functionalize(cnn())
    x = normal(3, 3, 8, 8)
    run = lambda x: lrp(f, params, x[None], rules=PRESETS["epsilon_plus"], targets=[1, 2], absorbed=True)  # noqa: E731
    whole = lrp(f, params, x, rules=PRESETS["epsilon_plus"], targets=[1, 2], absorbed=True)
    each = vmap(run)(x)
    CLOSE(each.relevance[:, :, 0].transpose(0, 1), whole.relevance)
    assert all(torch.allclose(each.absorbed[k][..., 0].T, v, rtol=0, atol=1e-14) for k, v in whole.absorbed.items())


@pytest.mark.compile
def test_compiled_equals_eager():
    torch._dynamo.reset()
    f, params = functionalize(cnn())
    table = PRESETS["epsilon_gamma_box"]

    def run(params, x):
        result = lrp(f, params, x, rules=table, targets=[1, 2], absorbed=True)
        return result.relevance, result.absorbed

    eager = run(params, normal(2, 3, 8, 8))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(params, normal(2, 3, 8, 8))
    CLOSE(compiled[0], eager[0])
    assert all(torch.allclose(compiled[1][k], v, rtol=0, atol=1e-14) for k, v in eager[1].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(dtype):
    f, params = functionalize(cnn().to(dtype))
    relevance, absorbed = lrp(f, params, normal(1, 3, 8, 8).to(dtype), rules=PRESETS["attn_lrp"], targets=0, absorbed=True)
    assert relevance.dtype == dtype and absorbed["10/linear"].dtype == torch.float32
    total = relevance.float().sum() + sum(absorbed.values())
    exact = f(params, normal(1, 3, 8, 8).to(dtype))[:, 0].float()
    torch.testing.assert_close(total, exact, rtol=0.1 if dtype is torch.bfloat16 else 1e-4, atol=0.05)


def test_nothing_of_the_caller_is_changed():
    f, params = functionalize(stirred(Odd()))
    x = (normal(3, 4), normal(3, 4))
    before = copy.deepcopy((x, params.clone()))
    lrp(f, params, x, rules={"linear": rules.Epsilon()}, targets=0, absorbed=True)
    assert torch.equal(x[0], before[0][0]) and torch.equal(x[1], before[0][1]) and (params == before[1]).all()


def test_the_absorbed_can_be_differentiated():
    f, params = functionalize(cnn())
    x = normal(1, 3, 8, 8).requires_grad_()
    run = lambda x: lrp(f, params, x, rules=PRESETS["epsilon_plus"], targets=1, absorbed=True)  # noqa: E731
    result = run(x)
    (slope,) = torch.autograd.grad(result.absorbed["10/linear"].sum(), x)
    step = torch.zeros_like(x)
    step[0, 1, 2, 3] = 1e-5
    ends = [run((x + sign * step).detach()).absorbed["10/linear"].sum() for sign in (1, -1)]
    torch.testing.assert_close(slope[0, 1, 2, 3], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rules": None}, errors.RuleError, "rules is None, and f is not what"),
        ({"start": "half"}, errors.InputError, "start is 'half'"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None, got 0"),
        ({"targets": []}, errors.TargetError, "targets is empty"),
        ({"targets": 9}, errors.TargetError, "index=9 is out of range"),
        ({"at": "*"}, errors.SiteError, "at takes exact sites"),
        ({"at": "nowhere"}, errors.SiteError, "no module 'nowhere'"),
    ],
)
def test_bad_input(options, error, message):
    f, params = functionalize(cnn())
    with pytest.raises(error, match=message):
        lrp(f, params, normal(1, 3, 8, 8), **{"targets": 0, "rules": PRESETS["epsilon_plus"], **options})


def test_what_it_needs():
    f, params = functionalize(cnn())
    with torch.no_grad(), pytest.raises(errors.GradientError, match="lrp needs gradients"):
        lrp(f, params, normal(1, 3, 8, 8), rules=PRESETS["epsilon_plus"], targets=0)
    with pytest.raises(errors.ModelError, match="has no sites"):
        lrp(lambda params, x: x.sum((1, 2, 3)), {}, normal(1, 3, 8, 8), rules=PRESETS["epsilon_plus"])
