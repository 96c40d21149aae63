"""Rules under torch.compile, as one graph."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from torch import nn

from tdhook import functionalize, targets, with_rules
from tdhook.attribution import rules as r
from tdhook.attribution.lrp import lrp

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # of Dynamo, about itself
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
]
CLOSE = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)


def network():
    return (
        nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 2),
            nn.GELU(),
            nn.Flatten(-3),
            nn.Linear(16, 3),
        )
        .double()
        .eval()
    )


IMAGES = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1)).double()
TABLES = {
    "epsilon_gamma_box": r.epsilon_gamma_box(-4.0, 4.0),
    "epsilon_alpha2_beta1_flat": r.epsilon_alpha2_beta1_flat(),
    "attn_lrp": r.attn_lrp(),
}


def dense():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize(("table", "backend"), [*((t, "aot_eager") for t in TABLES), ("epsilon_alpha2_beta1_flat", "inductor")])
def test_compiled_equals_eager_and_does_not_recompile(table, backend):
    torch._dynamo.reset()
    f, params = functionalize(network() if backend == "aot_eager" else dense())
    images = IMAGES if backend == "aot_eager" else IMAGES[:, 0, 0, :4].clone()
    run = partial(lrp, rules=TABLES[table], targets=[0, 2])
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for x in (images, 2 * images):
        with torch._dynamo.config.patch(error_on_recompile=True):
            CLOSE(compiled(f, params, x), run(f, params, x))


MAPPING, PRESET = {"linear": r.Epsilon(0.5)}, r.epsilon_plus(0.5)
INSIDE = {
    "a mapping": lambda: MAPPING,
    "a preset": lambda: PRESET,
    "made inside": lambda: r.epsilon_plus(0.5),
    "a mapping made inside": lambda: {"0/linear": r.Gamma(0.3), "linear": r.Epsilon(0.5)},
    "a sum": lambda: {"0/linear": r.Gamma(0.3)} + r.epsilon_plus(0.5),
    "over rules of the model": lambda: {"0/linear": r.Gamma(0.3)},
}


@pytest.mark.parametrize("name", INSIDE)
def test_tables_made_inside_and_outside(name):
    torch._dynamo.reset()
    f, params = functionalize(dense())
    f = with_rules(f, {"linear": r.Epsilon(0.3)}) if "over" in name else f
    table, x = INSIDE[name], torch.randn(2, 4).double()
    run = lambda p, x: lrp(f, p, x, rules=table(), targets=1)  # noqa: E731
    CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(params, x), run(params, x))


def test_vmap_inside():
    torch._dynamo.reset()
    f, params = functionalize(network())
    one = lambda p, x: lrp(f, p, x[None], rules=r.epsilon_plus(), targets=1)[0]  # noqa: E731
    many = torch.compile(torch.func.vmap(one, (None, 0)), fullgraph=True, backend="aot_eager")
    CLOSE(many(params, IMAGES), lrp(f, params, IMAGES, rules=r.epsilon_plus(), targets=1))


def test_a_language_model_at_its_embedding():
    torch._dynamo.reset()
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=50
    )
    f, params = functionalize(transformers.LlamaForCausalLM(config).double().eval(), use_cache=False)
    site, chosen = "model.embed_tokens", targets.index(3, key="logits", position=-1)
    run = lambda p, i: lrp(f, p, i, rules=r.attn_lrp(), targets=chosen, at=site)[site]  # noqa: E731
    inputs = {"input_ids": torch.randint(0, 50, (2, 6))}
    CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(params, inputs), run(params, inputs), rtol=1e-5, atol=1e-8)


def test_a_module_that_is_one_activation_and_guided_backpropagation():
    class Swish(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    torch._dynamo.reset()
    f, params = functionalize(nn.Sequential(nn.Linear(4, 5), Swish(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)).double())
    x = torch.randn(3, 4).double()
    for table in (r.attn_lrp(), r.Rules.of({"relu": r.Guided()}), r.Rules.of({"relu": r.Deconv()})):
        run = partial(lrp, rules=table, targets=[0, 1])
        CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(f, params, x), run(f, params, x))


def test_compiled_forward_and_gradients_outside():
    torch._dynamo.reset()
    f, params = functionalize(network())
    g = with_rules(f, r.epsilon_plus())
    compiled = torch.compile(lambda p, x: g(p, x), fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (compiled, g):
        x = IMAGES.clone().requires_grad_()
        gradients += torch.autograd.grad(run(params, x)[:, 1].sum(), x)
    CLOSE(*gradients)
