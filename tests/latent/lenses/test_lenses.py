"""Laws of lenses and decompositions: they end at the model's own logits, sum exactly, and equal closed forms and hooks."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import vmap

import tdhook
from tdhook.core.errors import GradientError, InputError, SiteError, TargetError
from tdhook.latent.lenses import (
    Translators,
    attention_patterns,
    component_labels,
    direct_logit_attribution,
    duplicate_token_scores,
    fit_translators,
    head_outputs,
    identity_translators,
    induction_scores,
    logit_lens,
    previous_token_scores,
    repeated_tokens,
    residual_decomposition,
    train_translators,
)
from tdhook.latent.names import names

from ..families import ENDS, FAMILIES, GROUPED, HIDDEN, model, named, plain

SUMS = [name for name in FAMILIES if FAMILIES[name].norm != "post"]
HEADS = [name for name in SUMS if FAMILIES[name].exact]
TARGET = tdhook.targets.index(7, key="logits", position=-1)


def logits(f: Any, params: Any, inputs: Any) -> Tensor:
    return f(params, inputs)["logits"]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2", "cohere", "bert", "vit", "opt"])
def test_the_logit_lens_of_the_last_layer_is_the_output(name: str) -> None:
    f, params, inputs, found = named(name)
    lens = logit_lens(f, params, inputs, names=found)
    torch.testing.assert_close(lens[-1], logits(f, params, inputs))
    assert not torch.allclose(lens[0], lens[1])


def test_the_logit_lens_is_final_norm_and_unembedding_of_each_layer() -> None:
    f, params, inputs, found = named("llama")
    net = model("llama")
    hidden = net(**inputs, output_hidden_states=True).hidden_states
    lens = logit_lens(f, params, inputs, names=found, sites=[found.embedding, *found.residual_post])
    torch.testing.assert_close(lens[0], net.lm_head(net.model.norm(hidden[0])))
    torch.testing.assert_close(lens[1], net.lm_head(net.model.norm(hidden[1])))
    torch.testing.assert_close(logit_lens(f, params, inputs, names=found, sites=["model.layers.*"]), lens[1:])
    torch.testing.assert_close(logit_lens(f, params, inputs, names=found, sites="model.layers[-1]"), lens[2:])


def test_positions_and_chunks_of_the_logit_lens() -> None:
    f, params, inputs, found = named("gpt2")
    whole = logit_lens(f, params, inputs)
    torch.testing.assert_close(logit_lens(f, params, inputs, names=found, chunk_size=1), whole)
    torch.testing.assert_close(logit_lens(f, params, inputs, names=found, positions=[-1, 0]), whole[:, :, [-1, 0]])


@pytest.mark.parametrize("name", SUMS)
def test_the_components_sum_to_the_last_residual_and_nothing_is_left(name: str) -> None:
    f, params, inputs, found = named(name)
    components = residual_decomposition(f, params, inputs, names=found)
    values = tdhook.capture(f, [found.residual_post[-1], found.mlp[0]])(params, inputs)[1]
    labels = component_labels(found)
    assert len(labels) == len(components) == 6
    torch.testing.assert_close(components.sum(0), values[found.residual_post[-1]])
    torch.testing.assert_close(components[labels.index("mlp 0")].flatten(), values[found.mlp[0]].flatten())
    assert components[-1].abs().max() < (1e-5 if FAMILIES[name].dtype is torch.float32 else 1e-12)


@pytest.mark.parametrize("name", HEADS)
def test_heads_and_their_bias_sum_to_attention(name: str) -> None:
    f, params, inputs, found = named(name)
    parts, whole = (residual_decomposition(f, params, inputs, names=found, heads=heads) for heads in (True, False))
    labels = component_labels(found, heads=True)
    of_attention = [i for i, label in enumerate(labels) if label.startswith(("head 1.", "bias 1"))]
    torch.testing.assert_close(parts[of_attention].sum(0), whole[component_labels(found).index("attention 1")])
    bias = found.output_projection[1].offset(params)
    expected = torch.zeros(32, dtype=parts.dtype) if bias is None else bias
    torch.testing.assert_close(parts[labels.index("bias 1")], expected.expand(parts.shape[1:]))


def test_the_output_of_a_head_is_what_its_ablation_takes_away() -> None:
    f, params, inputs, found = named("llama")
    site = found.head_output[1].site

    def ablate(z: Tensor) -> Tensor:
        heads = found.split_heads(z, 1)
        return found.merge_heads(z, torch.where(torch.arange(4)[:, None] == 2, 0, heads), 1)

    whole = tdhook.capture(f, found.attention[1])(params, inputs)[1][found.attention[1]]
    ablated = tdhook.capture(tdhook.intervene(f, {site: ablate}), found.attention[1])(params, inputs)[1][found.attention[1]]
    outputs = head_outputs(f, params, inputs, names=found)
    assert outputs.shape == (2, 4, 2, 6, 32)
    torch.testing.assert_close(outputs[1, 2], whole - ablated)
    torch.testing.assert_close(head_outputs(f, params, inputs, names=found, positions=[3]), outputs[..., [3], :])


@pytest.mark.parametrize("name", [name for name in SUMS if FAMILIES[name].head or name == "cohere"])
def test_the_parts_of_a_logit_sum_to_it(name: str) -> None:
    f, params, inputs, found = named(name)
    heads = FAMILIES[name].exact
    parts = direct_logit_attribution(f, params, inputs, targets=TARGET, names=found, heads=heads)
    torch.testing.assert_close(parts.components.sum(0) + parts.bias, logits(f, params, inputs)[:, -1, 7])
    assert parts.components.shape == (len(component_labels(found, heads=heads)), 2)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma"])
def test_the_parts_of_a_logit_equal_those_by_hand(name: str) -> None:
    f, params, inputs, found = named(name)
    values = tdhook.capture(f, [found.residual_post[-1], found.mlp[0]])(params, inputs)[1]
    residual, written = values[found.residual_post[-1]][:, -1], values[found.mlp[0]][:, -1]
    norm = model(name).get_submodule(found.final_norm)
    scale, bias = norm.weight, 0.0
    if isinstance(norm, nn.LayerNorm):
        deviation = (residual.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        written, bias = written - written.mean(-1, keepdim=True), (norm.bias @ found.unembedding_weight(params))[7]
    else:
        eps = norm.eps if name == "gemma" else norm.variance_epsilon
        deviation = (residual.square().mean(-1, keepdim=True) + eps).sqrt()
        scale = 1 + scale if name == "gemma" else scale
    expected = (written / deviation * scale) @ found.unembedding_weight(params)[:, 7]
    parts = direct_logit_attribution(f, params, inputs, targets=TARGET, names=found)
    torch.testing.assert_close(parts.components[component_labels(found).index("mlp 0")], expected)
    # Gemma computes its norm in single precision.
    torch.testing.assert_close(parts.bias, torch.as_tensor(bias, dtype=parts.bias.dtype).expand(2), rtol=1e-6, atol=2e-6)


def _odd(name: str) -> tuple[nn.Module, dict[str, Tensor], Any]:
    """Models whose final norm is not a plain one: scales made from a parameter, single precision, a read of one position."""
    if name == "clip":
        config = transformers.CLIPVisionConfig(**HIDDEN, intermediate_size=40, image_size=8, patch_size=4, projection_dim=12)
        images = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        net = transformers.CLIPVisionModelWithProjection(config)
        return net, {"pixel_values": images}, tdhook.targets.index(7, key="image_embeds")
    config = getattr(transformers, f"{name}Config")(**GROUPED, **ENDS)
    return getattr(transformers, f"{name}ForCausalLM")(config), {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}, TARGET


@pytest.mark.parametrize("name", ["Nemotron", "Olmo", "clip"])
def test_a_final_norm_of_another_kind_is_affine_too(name: str) -> None:
    torch.manual_seed(0)
    net, inputs, target = _odd(name)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    f, params = tdhook.functionalize(net.double().eval(), **({} if name == "clip" else {"use_cache": False}))
    parts = direct_logit_attribution(f, params, inputs, targets=target, heads=True)
    torch.testing.assert_close(parts.components.sum(0) + parts.bias, target(f(params, inputs)))
    # of the affine map, the same for all examples
    torch.testing.assert_close(parts.bias, parts.bias[:1].expand_as(parts.bias), rtol=1e-5, atol=1e-6)


def test_several_targets_add_a_dimension_and_chunks_change_nothing() -> None:
    f, params, inputs, found = named("gpt2")
    several = tdhook.targets.indices([7, 3, 1], key="logits", position=-1)
    parts = direct_logit_attribution(f, params, inputs, targets=several, names=found)
    single = direct_logit_attribution(f, params, inputs, targets=TARGET, names=found)
    assert parts.components.shape == (3, 6, 2) and parts.bias.shape == (3, 2)
    torch.testing.assert_close(parts.components[0], single.components)
    chunked = direct_logit_attribution(f, params, inputs, targets=several, names=found, chunk_size=1)
    torch.testing.assert_close(chunked, parts)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "falcon", "bert", "t5"])
def test_fused_attention_has_the_pattern_of_the_written_out_one(name: str) -> None:
    f, params, inputs, found = named(name, "sdpa")
    _, _, _, written_out = named(name)
    expected = attention_patterns(named(name)[0], params, inputs, names=written_out)
    torch.testing.assert_close(attention_patterns(f, params, inputs, names=found), expected, rtol=1e-5, atol=1e-6)


def test_patterns_under_a_padding_mask_are_those_that_the_model_returns() -> None:
    f, params, inputs, found = named("llama", "sdpa")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    inputs = {**inputs, "attention_mask": mask}
    single = copy.deepcopy(model("llama")).float()  # in double precision the mask of transformers overflows
    expected = torch.stack(single(**inputs, output_attentions=True).attentions)
    got = attention_patterns(f, params, inputs, names=found).float()
    torch.testing.assert_close(got[:, 1], expected[:, 1])
    torch.testing.assert_close(got[:, 0, :, 2:], expected[:, 0, :, 2:])
    assert got[:, 0, :, :2].abs().max() == 0


@pytest.mark.parametrize("heads", [1, 2])
def test_patterns_of_heads_that_are_joined_with_the_batch(heads: int) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            parts = self.qkv(x).view(2, 3, 3, heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = parts.flatten(1, 2).unbind()
            z = (q @ k.mT).softmax(-1) @ v
            return x + self.out(z.view(2, heads, 3, -1).transpose(1, 2).flatten(2))

    net = nn.Sequential(Joined(), Joined())
    f, params = tdhook.functionalize(net)
    x = torch.randn(2, 3, 4)
    q, k = net[0].qkv(x).view(2, 3, 3, heads, -1).permute(2, 0, 3, 1, 4)[:2]
    torch.testing.assert_close(attention_patterns(f, params, x)[0], (q @ k.mT).softmax(-1))


def test_heads_of_the_layers_that_have_attention() -> None:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
    options = {**GROUPED, **ENDS, **linear, "num_hidden_layers": 4, "head_dim": 8, "mlp_only_layers": [0, 1, 2, 3]}
    net = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**options)).eval()
    f, params = tdhook.functionalize(net, use_cache=False)
    ids = {"input_ids": torch.tensor([[3, 4, 5]])}
    written = tdhook.capture(f, "model.layers.3.self_attn:out[0]")(params, ids)[1]["model.layers.3.self_attn:out[0]"]
    outputs = head_outputs(f, params, ids)
    assert outputs.shape == (1, 4, 1, 3, 32)
    torch.testing.assert_close(outputs[0].sum(0), written)


def test_scores_of_perfect_heads_and_of_even_attention() -> None:
    causal = torch.ones(8, 8).tril() / torch.arange(1, 9)[:, None]
    queries = torch.arange(4, 8)
    torch.testing.assert_close(previous_token_scores(causal), (1 / torch.arange(2.0, 9.0)).mean())
    torch.testing.assert_close(induction_scores(causal, 4), (1 / (queries + 1.0)).mean())
    heads = torch.stack([torch.eye(8).roll(1, 0), torch.eye(8).roll(3, 0), torch.eye(8).roll(4, 0)])
    assert previous_token_scores(heads).tolist() == [1, 0, 0]
    assert induction_scores(heads, 4).tolist() == [0, 1, 0]
    assert duplicate_token_scores(heads, 4).tolist() == [0, 0, 1]


def test_repeated_tokens_follow_the_generator() -> None:
    state = torch.get_rng_state()
    first, second = (repeated_tokens(50, 4, 3, repeats=3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (3, 12) and torch.equal(first[:, :4], first[:, 8:])
    assert torch.equal(torch.get_rng_state(), state)


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(3, 50, (8, 9), generator=generator)} for _ in range(count)]


def test_translators_that_change_nothing_are_the_logit_lens() -> None:
    f, params, inputs, found = named("gpt2")
    identity = identity_translators(found, torch.zeros((), dtype=torch.float64))
    lens = logit_lens(f, params, inputs, names=found, translators=identity)
    torch.testing.assert_close(lens, logit_lens(f, params, inputs, names=found))


def test_translators_in_closed_form_are_least_squares() -> None:
    f, params, _, found = named("gpt2")
    data = batches(4)
    fitted = fit_translators(f, params, data, names=found, ridge=0.0)
    values = tdhook.capture(f, list(found.residual_post))(params, {"input_ids": torch.cat([d["input_ids"] for d in data])})[1]
    x, y = (values[site].reshape(-1, 32) for site in found.residual_post)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], 1), y - x).solution
    torch.testing.assert_close(fitted.weight[0], solution[:-1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(fitted.bias[0], solution[-1], rtol=1e-5, atol=1e-7)
    assert fitted.weight[1].abs().max() == 0 and fitted.bias[1].abs().max() == 0


def test_padding_has_no_part_in_translators() -> None:
    f, params, inputs, found = named("llama", "sdpa")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    pairs = (mask.bool()[:, None, None] & torch.ones(6, 6, dtype=torch.bool).tril()) | torch.eye(6, dtype=torch.bool)
    padded = {**inputs, "attention_mask": pairs}
    values = tdhook.capture(f, list(found.residual_post))(params, padded)[1]
    x, y = (values[site][mask.bool()] for site in found.residual_post)
    x, gap = x - x.mean(0), (y - x) - (y - x).mean(0)
    ridge = 1e-3 * x.square().mean() * torch.eye(32, dtype=x.dtype)
    solution = torch.linalg.solve(x.mT @ x / len(x) + ridge, x.mT @ gap / len(x))
    fitted = fit_translators(f, params, [padded], names=found, positions=lambda batch: mask)
    torch.testing.assert_close(fitted.weight[0], solution)
    other = {**padded, "input_ids": inputs["input_ids"].index_fill(1, torch.tensor([0]), 3)}  # changes the first row's padding
    other["input_ids"][1] = inputs["input_ids"][1]
    trained = [train_translators(f, params, [each], names=found, positions=lambda batch: mask) for each in (padded, other)]
    torch.testing.assert_close(trained[0].weight, trained[1].weight)


def test_a_mask_of_padding_is_used_by_itself() -> None:
    net = copy.deepcopy(model("llama", "sdpa")).float()
    f, params = tdhook.functionalize(net, use_cache=False)
    found, inputs = named("llama", "sdpa")[3], named("llama")[2]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    padded = {**inputs, "attention_mask": mask}
    for method in (fit_translators, train_translators):
        by_itself, given = (
            method(f, params, [padded], names=found),
            method(f, params, [padded], names=found, positions=lambda b: mask),
        )
        assert torch.equal(by_itself.weight, given.weight)
        everything = method(f, params, [padded], names=found, positions=lambda b: torch.ones_like(mask))
        assert not torch.allclose(by_itself.weight, everything.weight)


def test_training_leaves_the_last_layer_as_it_is() -> None:
    f, params, _, found = named("gpt2")
    trained = train_translators(f, params, batches(5), names=found, learning_rate=0.1)
    assert trained.weight[-1].abs().max() == 0 and trained.bias[-1].abs().max() == 0
    assert trained.weight[0].abs().max() > 0.1


def test_translators_in_half_precision() -> None:
    net = copy.deepcopy(model("gpt2")).bfloat16()
    f, params = tdhook.functionalize(net, use_cache=False)
    found, inputs = named("gpt2")[3:1:-1]
    for translators in (
        fit_translators(f, params, batches(2), names=found),
        train_translators(f, params, batches(2), names=found),
    ):
        assert translators.weight.dtype is torch.bfloat16
        lens = logit_lens(f, params, inputs, names=found, translators=translators)
        torch.testing.assert_close(lens[-1], f(params, inputs).logits)
    wide = identity_translators(found, torch.zeros(()))  # single precision, for a stream of half of it
    assert logit_lens(f, params, inputs, names=found, translators=wide).dtype is torch.bfloat16


def test_a_fitted_and_a_trained_lens_say_more_of_the_output_than_the_logit_lens() -> None:
    f, params, inputs, found = named("gpt2")

    def divergence(translators: Translators | None) -> Tensor:
        said = logit_lens(f, params, inputs, names=found, translators=translators)[0].log_softmax(-1)
        expected = logits(f, params, inputs).log_softmax(-1)
        return (expected.exp() * (expected - said)).sum(-1).mean()

    losses: list[Tensor] = []
    plain, fitted = divergence(None), divergence(fit_translators(f, params, batches(8), names=found))
    trained = train_translators(
        f, params, batches(30), names=found, learning_rate=0.01, report=lambda step, loss: losses.append(loss)
    )
    assert fitted < 0.8 * plain and divergence(trained) < 0.8 * plain
    assert len(losses) == 30 and losses[-1][0] < losses[0][0] and losses[0].shape == (2,)


def test_the_first_training_step_moves_against_the_gradient_by_the_learning_rate() -> None:
    f, params, _, found = named("gpt2")
    data = batches(1)

    def loss(bias: Tensor) -> Tensor:
        translators = Translators(weight=torch.zeros(2, 32, 32, dtype=torch.float64), bias=bias, batch_size=[])
        said = logit_lens(f, params, data[0], names=found, translators=translators).log_softmax(-1)
        expected = logits(f, params, data[0]).log_softmax(-1)
        return (expected.exp() * (expected - said)).sum(-1).mean((1, 2))[0]

    gradient = torch.func.grad(loss)(torch.zeros(2, 32, dtype=torch.float64))
    trained = train_translators(f, params, data, names=found, learning_rate=0.5)
    torch.testing.assert_close(trained.bias[0], -0.5 * gradient[0].sign(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # fused attention on CPU has no batching rule
def test_under_vmap_over_inputs() -> None:
    f, params, inputs, found = named("llama", "sdpa")
    ids = torch.stack([inputs["input_ids"], inputs["input_ids"].flip(-1)])
    for method in (
        lambda x: logit_lens(f, params, {"input_ids": x}, names=found),
        lambda x: residual_decomposition(f, params, {"input_ids": x}, names=found, heads=True),
        lambda x: attention_patterns(f, params, {"input_ids": x}, names=found),
        lambda x: direct_logit_attribution(f, params, {"input_ids": x}, targets=TARGET, names=found).components,
    ):
        torch.testing.assert_close(vmap(method)(ids), torch.stack([method(each) for each in ids]))


@pytest.mark.compile
def test_compiled() -> None:
    f, params = tdhook.functionalize(plain())
    ids = torch.randint(0, 30, (2, 5))
    found = names(f, params, ids)

    def call(ids: Tensor) -> tuple:
        target = tdhook.targets.indices([7, 3], position=-1)
        parts = direct_logit_attribution(f, params, ids, targets=target, names=found, heads=True)
        return logit_lens(f, params, ids, names=found), parts, attention_patterns(f, params, ids, names=found)

    torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(ids), call(ids))


@pytest.mark.compile
def test_patterns_of_fused_attention_compiled() -> None:
    f, params, inputs, found = named("gpt2", "sdpa")
    compiled = torch.compile(lambda x: attention_patterns(f, params, x, names=found), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs), attention_patterns(f, params, inputs, names=found))


def test_bad_requests_say_what_to_give() -> None:
    f, params, inputs, found = named("gpt2")
    with pytest.raises(InputError, match=r"names is 3 of type int; give what tdhook\.latent\.names"):
        logit_lens(f, params, inputs, names=3)
    with pytest.raises(InputError, match="positions has 6, out of range for 6 positions"):
        logit_lens(f, params, inputs, names=found, positions=[6])
    with pytest.raises(InputError, match="positions is -1; give a sequence"):
        residual_decomposition(f, params, inputs, names=found, positions=-1)
    identity = identity_translators(found, torch.zeros((), dtype=torch.float64))
    with pytest.raises(InputError, match="translators has 2 maps for 1 sites"):
        logit_lens(f, params, inputs, names=found, sites=[found.embedding], translators=identity)
    with pytest.raises(InputError, match="translators is 3 of type int; give what fit_translators"):
        logit_lens(f, params, inputs, names=found, translators=3)
    with pytest.raises(InputError, match="translators is for a stream of 30 features, this one has 32"):
        logit_lens(f, params, inputs, names=found, translators=identity_translators(replace(found, width=30), torch.ones(())))
    for wrong in ("transformer.h.0.mlp.c_fc", "transformer.h.0.attn/transpose@0"):  # the second one has as many numbers
        with pytest.raises(
            SiteError, match=r"holds a float64 tensor of shape .*, the residual stream a .*\[2, 6, 32\]; give its"
        ):
            logit_lens(f, params, inputs, names=found, sites=[wrong])
    with pytest.raises(
        SiteError, match=r"the model never ran '.*dot_product_attention'; give names that were found with this model"
    ):
        attention_patterns(f, params, inputs, names=named("gpt2", "sdpa")[3])
    with pytest.raises(InputError, match="ridge is 0, and 12 positions do not determine 32 features"):
        fit_translators(f, params, [inputs], names=found, ridge=0.0)
    with pytest.raises(InputError, match="batches is a dict with 'input_ids'; give an iterable of batches"):
        fit_translators(f, params, inputs, names=found)
    with pytest.raises(InputError, match="batches is empty"):
        fit_translators(f, params, [])
    with pytest.raises(InputError, match="batches is empty"):
        train_translators(f, params, [])
    with pytest.raises(InputError, match="ridge is a number of at least 0"):
        fit_translators(f, params, batches(1), ridge=-1.0)
    with pytest.raises(TargetError, match="targets is empty"):
        direct_logit_attribution(f, params, inputs, targets=[])
    with torch.no_grad(), pytest.raises(GradientError, match="direct_logit_attribution needs gradients"):
        direct_logit_attribution(f, params, inputs, targets=TARGET)
    with pytest.raises(InputError, match="the score starts at position 5, but patterns has 5 positions"):
        induction_scores(torch.eye(5), 5)
    with pytest.raises(InputError, match="give attention within one sequence"):
        previous_token_scores(torch.ones(2, 3))
    with pytest.raises(InputError, match="period is an integer of at least 1, got 0"):
        repeated_tokens(5, 0, 2)


def test_what_a_family_does_not_have_is_an_error() -> None:
    f, params, inputs, found = named("bert")
    with pytest.raises(SiteError, match="normalises the stream after each write"):
        residual_decomposition(f, params, inputs, names=found)
    f, params, inputs, found = named("gemma2")
    with pytest.raises(SiteError, match="normalised or scaled after its output projection"):
        residual_decomposition(f, params, inputs, names=found, heads=True)
    f, params, inputs, found = named("vit")
    with pytest.raises(InputError, match="without positions"):
        logit_lens(f, params, inputs, names=found, positions=[0])
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), 1, enable_nested_tensor=False).eval()
    f, params = tdhook.functionalize(net)
    with pytest.raises(SiteError, match="one function of torch, whose pattern cannot be computed"):
        attention_patterns(f, params, torch.ones(1, 4, 12))
    with pytest.raises(SiteError, match="head_output of layer 0 was not found: torch computes this attention inside"):
        head_outputs(f, params, torch.ones(1, 4, 12))
    net = transformers.XLMWithLMHeadModel(transformers.XLMConfig(emb_dim=32, n_layers=2, n_heads=4, vocab_size=50)).eval()
    f, params = tdhook.functionalize(net)
    with pytest.raises(SiteError, match=r"attention was not found: the residual stream .* which is no sum"):
        residual_decomposition(f, params, {"input_ids": torch.tensor([[3, 4, 5]])})
