"""Laws of standard names: what is found adds up, is what hooks see, and is where the reader of each family's code finds it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdhook
from tdhook.core.errors import InputError, ModelError, SiteError
from tdhook.latent.names import HeadLayout, Names, names

from .families import ENDS, FAMILIES, FUSED, GROUPED, SIZES, PlainBlock, example, model, named, plain

ALL = list(FAMILIES)
CASES = [(name, "eager") for name in FAMILIES] + [(name, "sdpa") for name in FUSED]
SITES = (
    "residual_pre",
    "residual_mid",
    "residual_post",
    "attention",
    "mlp",
    "neurons",
    "pattern",
    "attention_norm",
    "mlp_norm",
)


def every_site(found: Names) -> list[str]:
    sites = [site for name in SITES for site in getattr(found, name) if site is not None]
    sites += [site for layer in found.others for site in layer]
    sites += [found.embedding, found.logits] + ([found.final_norm] if found.final_norm else [])
    for name in ("query", "key", "value", "head_output"):
        sites += [layout.site for layout in getattr(found, name) if layout is not None]
    for each in (*found.output_projection, *found.down_projection, found.unembedding):
        sites += [each.site, each.input] if each is not None else []
    return list(dict.fromkeys(sites))


def read(f: Any, params: Any, inputs: Any, *sites: str) -> list[Tensor]:
    values = tdhook.capture(f, list(sites))(params, inputs)[1]
    return [values[site] for site in sites]


def zero_heads(found: Names, layer: int, *heads: int, name: str = "head_output") -> Any:
    def write(value: Tensor) -> Tensor:
        split = found.split_heads(value, layer, name)
        keep = torch.tensor([h not in heads for h in range(split.shape[-2])])
        return found.merge_heads(value, torch.where(keep[:, None], split, 0), layer, name)

    return write


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_every_site_exists_and_the_numbers_are_those_of_the_family(name: str, attention: str) -> None:
    f, params, inputs, found = named(name, attention)
    family = FAMILIES[name]
    tdhook.capture(f, every_site(found))(params, inputs)
    assert (found.head_count, found.kv_head_count, found.head_size) == family.heads
    assert (found.layers, found.width, found.norm, found.parallel) == (2, 32, family.norm, family.parallel)
    assert (found.pattern[0] is None) == (attention == "sdpa")
    lacking = {missing for missing, _ in found.missing} - {
        "pattern",
        "residual_mid",
        "final_norm",
        "final_scale",
        "unembedding",
        "token_embedding",
    }
    assert lacking == ({"neurons", "down_projection"} if name == "mixtral" else set())
    assert (found.residual_mid[0] is None) == family.parallel


@pytest.mark.parametrize(("name", "attention"), [case for case in CASES if FAMILIES[case[0]].norm != "post"])
def test_what_a_block_reads_and_writes_adds_up_to_what_it_returns(name: str, attention: str) -> None:
    f, params, inputs, found = named(name, attention)
    for layer in range(2):
        sites = (found.residual_pre[layer], found.attention[layer], found.mlp[layer], found.residual_post[layer])
        before, attended, computed, after = read(f, params, inputs, *sites)
        torch.testing.assert_close(before + attended + computed.reshape(before.shape), after)
        if not found.parallel:
            torch.testing.assert_close(read(f, params, inputs, found.residual_mid[layer])[0], before + attended)


@pytest.mark.parametrize("name", [name for name in ALL if FAMILIES[name].norm != "post"])
def test_what_is_written_at_a_site_is_what_the_model_goes_on_with(name: str) -> None:
    f, params, inputs, found = named(name)
    before, after = found.residual_pre[1], found.residual_post[1]
    for silenced, other in ((found.attention[1], found.mlp[1]), (found.mlp[1], found.attention[1])):
        written = tdhook.intervene(f, {silenced: 0.0})
        x, kept, y = read(written, params, inputs, before, other, after)
        torch.testing.assert_close(x + kept.reshape(x.shape), y)
    if not found.parallel:
        middle, computed, y = read(
            tdhook.intervene(f, {found.residual_mid[1]: lambda value: value * 2}),
            params,
            inputs,
            found.residual_mid[1],
            found.mlp[1],
            after,
        )
        torch.testing.assert_close(middle + computed.reshape(y.shape), y)
        torch.testing.assert_close(middle, 2 * read(f, params, inputs, found.residual_mid[1])[0])


@pytest.mark.parametrize("name", [*ALL])
def test_a_write_to_the_pattern_reaches_the_heads(name: str) -> None:
    f, params, inputs, found = named(name)
    silent = tdhook.intervene(f, {found.pattern[1]: 0.0})
    assert read(silent, params, inputs, found.head_output[1].site)[0].abs().max() == 0


def test_in_bert_the_stream_is_the_norm_of_the_sum() -> None:
    f, params, inputs, found = named("bert")
    layer = model("bert").bert.encoder.layer[1]
    sites = (getattr(found, name)[1] for name in ("residual_pre", "attention", "residual_mid", "mlp", "residual_post"))
    before, attended, middle, computed, after = read(f, params, inputs, *sites)
    torch.testing.assert_close(layer.attention.output.LayerNorm(before + attended), middle)
    torch.testing.assert_close(layer.output.LayerNorm(middle + computed), after)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("t5", "albert", "vit")])
def test_the_stream_is_what_the_model_itself_records_as_hidden_states(name: str) -> None:
    f, params, inputs, found = named(name)
    hidden = model(name)(**inputs, output_hidden_states=True).hidden_states
    for layer in range(2):
        torch.testing.assert_close(read(f, params, inputs, found.residual_pre[layer])[0], hidden[layer])


@pytest.mark.parametrize("name", [name for name in ALL if name != "vit"])
def test_the_pattern_is_what_the_model_itself_returns_as_attentions(name: str) -> None:
    f, params, inputs, found = named(name)
    attentions = model(name)(**inputs, output_attentions=True).attentions
    for layer in range(2):
        torch.testing.assert_close(read(f, params, inputs, found.pattern[layer])[0], attentions[layer])


@pytest.mark.parametrize(("name", "attention"), [case for case in CASES if FAMILIES[case[0]].output])
def test_ablating_a_head_equals_a_hook_on_the_output_projection(name: str, attention: str) -> None:
    f, params, inputs, found = named(name, attention)
    size, head = FAMILIES[name].heads[2], 2
    net = model(name, attention)

    def ablate(module: nn.Module, args: tuple) -> tuple:
        z = args[0].clone()
        z[..., head * size : (head + 1) * size] = 0
        return (z,)

    handle = net.get_submodule(FAMILIES[name].output).register_forward_pre_hook(ablate)
    expected = net(**inputs)[0]
    handle.remove()
    layout = found.require("head_output", 1)
    output = tdhook.intervene(f, {layout.site: zero_heads(found, 1, head)})(params, inputs)
    torch.testing.assert_close(output[0], expected)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_heads_through_the_output_weight_add_up_to_the_projection(name: str, attention: str) -> None:
    f, params, inputs, found = named(name, attention)
    for layer in range(2):
        projection, layout = found.require("output_projection", layer), found.require("head_output", layer)
        z, returned, written = read(f, params, inputs, layout.site, projection.site, found.attention[layer])
        total = torch.einsum("...hd,hdo->...o", found.split_heads(z, layer), found.output_weight(params, layer))
        bias = projection.offset(params)
        total = total if bias is None else total + bias
        torch.testing.assert_close(total, returned)
        assert torch.allclose(returned, written) == FAMILIES[name].exact == found.attention_is_projection[layer]


@pytest.mark.parametrize("name", [name for name in ALL if name != "olmo2"])  # norms the queries of all heads together
def test_a_head_of_a_projection_reaches_its_own_heads_only(name: str) -> None:
    f, params, inputs, found = named(name)
    out = found.require("head_output", 1)
    z = found.split_heads(read(f, params, inputs, out.site)[0], 1)
    for part in ("query", "key", "value"):
        layout = found.require(part, 1)
        head, group = layout.heads - 1, out.heads // layout.heads
        written = tdhook.intervene(f, {layout.site: zero_heads(found, 1, head, name=part)})
        changed = (found.split_heads(read(written, params, inputs, out.site)[0], 1) - z).abs().amax((0, 1, 3)) > 1e-9
        assert changed.tolist() == [h // group == head for h in range(out.heads)]


def test_fused_projections_are_laid_out_as_each_family_does() -> None:
    starts = {name: [getattr(named(name)[3], part)[0].starts for part in ("query", "key", "value")] for name in ALL}
    assert starts["gpt2"] == [(0, 8, 16, 24), (32, 40, 48, 56), (64, 72, 80, 88)]
    assert starts["gpt_neox"] == starts["bloom"] == [(0, 24, 48, 72), (8, 32, 56, 80), (16, 40, 64, 88)]
    assert starts["falcon"] == [(0, 8, 32, 40), (16, 48), (24, 56)]
    assert starts["phi3"] == [(0, 8, 16, 24), (32, 40), (48, 56)]
    assert starts["llama"] == [(0, 8, 16, 24), (0, 8), (0, 8)]


@pytest.mark.parametrize("name", [name for name in ALL if FAMILIES[name].head])
def test_the_final_norm_through_the_unembedding_is_the_logits(name: str) -> None:
    f, params, inputs, found = named(name)
    normed, logits = read(f, params, inputs, found.final_norm, found.logits)
    offset = found.require("unembedding").offset(params)
    torch.testing.assert_close(normed @ found.unembedding_weight(params) + (0 if offset is None else offset), logits)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "falcon", "gemma2"])
def test_neurons_through_the_down_projection_are_what_it_returns(name: str) -> None:
    f, params, inputs, found = named(name)
    down = found.require("down_projection", 1)
    neurons, returned = read(f, params, inputs, found.neurons[1], down.site)
    bias = down.offset(params)
    torch.testing.assert_close(neurons @ down.matrix(params) + (0 if bias is None else bias), returned)


def test_names_are_those_that_a_reader_of_gpt2_gives() -> None:
    found = named("gpt2", "sdpa")[3]
    h = "transformer.h.1"
    assert found.residual_pre[1] == f"{h}:in" and found.residual_mid[1] == f"{h}/add@0" and found.residual_post[1] == h
    assert found.attention[1] == f"{h}.attn:out[0]" and found.mlp[1] == f"{h}.mlp" and found.neurons[1] == f"{h}.mlp.c_proj:in"
    assert (
        found.attention_norm[1] == f"{h}.ln_1" and found.mlp_norm[1] == f"{h}.ln_2" and found.final_norm == "transformer.ln_f"
    )
    assert found.token_embedding == found.unembedding.weight == "transformer.wte.weight"
    assert found.output_projection[1].transposed is False and found.unembedding.transposed is True
    assert found.logits == ":out[logits]"


def test_shared_blocks_are_told_apart_by_their_calls() -> None:
    found = named("albert")[3]
    path = "albert.encoder.albert_layer_groups.0"
    assert found.residual_post == (f"{path}@0", f"{path}@1")
    assert found.head_output[1].site == f"{path}.albert_layers.0.attention.dense@1:in"


def test_a_transformer_without_linear_modules() -> None:
    net = plain()
    f, params = tdhook.functionalize(net)
    ids = torch.randint(0, 30, (2, 5))
    found = names(f, params, ids)
    tdhook.capture(f, every_site(found))(params, ids)
    assert found.query[0] == HeadLayout("1/matmul@0", (0, 1, 2), 4, 3) and found.key[0].starts == (12, 13, 14)
    assert found.head_output[1].site == "2/linear@0:in" and found.head_output[1].starts == (0, 4, 8)
    assert (found.unembedding.weight, found.final_norm, found.token_embedding) == ("4.weight", "3", "0.weight")
    assert (found.norm, found.attention_norm[1], found.mlp_norm[1]) == ("pre", "2/layer_norm@0", "2/layer_norm@1")
    assert found.output_projection[0].weight == "1.out" and found.output_projection[0].transposed is False
    before, attended, computed, after = read(f, params, ids, "2:in", found.attention[1], found.mlp[1], "2")
    torch.testing.assert_close(before + attended + computed, after)
    (z,) = read(f, params, ids, found.head_output[1].site)
    total = torch.einsum("...hd,hdo->...o", found.split_heads(z, 1), found.output_weight(params, 1)) + params["2", "shift"]
    torch.testing.assert_close(total, attended)


def test_a_key_that_is_put_together_in_place_is_no_single_projection() -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    config = DeepseekV3Config(**SIZES, **ENDS, **latent, num_key_value_heads=4, first_k_dense_replace=2)
    f, params = tdhook.functionalize(DeepseekV3ForCausalLM(config).eval(), use_cache=False)
    found = names(f, params)
    assert found.key == (None, None) and found.query[0].starts == (0, 8, 16, 24)
    assert found.value[0] == HeadLayout("model.layers.0.self_attn.kv_b_proj", (4, 12, 20, 28), 4)
    assert found.head_output[0].size == 4
    with pytest.raises(SiteError, match="the key of attention is not one linear map"):
        found.require("key", 0)


def test_layers_of_two_kinds() -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
    config = Qwen3NextConfig(**{**GROUPED, **ENDS, **linear, "num_hidden_layers": 4}, head_dim=8, mlp_only_layers=[0, 1, 2, 3])
    f, params = tdhook.functionalize(Qwen3NextForCausalLM(config).eval(), use_cache=False)
    found = names(f, params)
    assert found.attention == (None, None, None, "model.layers.3.self_attn:out[0]")
    assert found.others[0] == ("model.layers.0.linear_attn",) and found.mlp[0] == "model.layers.0.mlp"
    assert found.query[3].starts == (0, 16, 32, 48)  # each followed by its gate
    sites = [found.residual_pre[0], *found.others[0], found.mlp[0], found.residual_post[0]]
    values = read(f, params, {"input_ids": torch.ones(1, 5, dtype=torch.long)}, *sites)
    torch.testing.assert_close(sum(values[:-1]), values[-1])


def test_a_single_head_and_a_single_block() -> None:
    net = plain(heads=1)[:2]
    f, params = tdhook.functionalize(net)
    found = names(f, params, torch.zeros(3, 4, dtype=torch.long))
    assert found.layers == 1 and found.head_count == 1 and found.query[0].size == 12 and found.logits == ":out"


@pytest.mark.parametrize("first", [True, False])
def test_the_encoder_of_torch(first: bool) -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=first)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().double()
    f, params = tdhook.functionalize(net)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    found = names(f, params, x)
    assert (found.head_count, found.norm) == (3, "pre" if first else "post")
    assert found.head_output == found.output_projection == (None, None)
    with pytest.raises(SiteError, match="head_output of layer 0 was not found: torch computes this attention inside"):
        found.require("head_output", 0)
    before, attended, middle = read(f, params, x, found.residual_pre[1], found.attention[1], found.residual_mid[1])
    torch.testing.assert_close(before + attended if first else net.layers[1].norm1(before + attended), middle)


def test_of_two_stacks_one_has_to_be_chosen() -> None:
    config = {
        "d_model": 32,
        "d_kv": 6,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 50,
        "decoder_start_token_id": 0,
    }
    from transformers import T5Config, T5ForConditionalGeneration

    f, params = tdhook.functionalize(T5ForConditionalGeneration(T5Config(**config)).eval(), use_cache=False)
    with pytest.raises(SiteError, match=r"several stacks of blocks: 'encoder.block.\*', 'decoder.block.\*'; say which"):
        names(f, params)
    encoder = names(f, params, blocks="encoder.block.*")
    assert encoder.unembedding is None and encoder.final_norm == "encoder.final_layer_norm"
    with pytest.raises(SiteError, match="unembedding was not found: attention stands between the last block and the output"):
        encoder.require("unembedding")
    found = names(f, params, blocks="decoder.block.*")
    assert found.unembedding.weight == "shared.weight"
    inputs = {"input_ids": torch.ones(2, 7, dtype=torch.long), "decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}
    cross = found.others[1]
    assert cross == ("decoder.block.1.layer.1.EncDecAttention:out[0]",)
    values = read(f, params, inputs, found.residual_pre[1], found.attention[1], *cross, found.mlp[1], found.residual_post[1])
    torch.testing.assert_close(sum(values[:-1]), values[-1])


def test_what_is_given_takes_the_place_of_what_is_found() -> None:
    f, params, inputs, found = named("gpt2")
    path = "transformer.h.*.attn.c_proj"
    given = {"attention": path, "head_output": f"{path}:in", "output_projection": path, "unembedding": "lm_head"}
    again = names(f, params, inputs, blocks="transformer.h.*", heads=4, **given)
    expected = tuple(f"transformer.h.{layer}.attn.c_proj" for layer in range(2))
    assert again == replace(found, attention=expected)
    normed = names(f, params, inputs, attention="transformer.h.*.ln_2", final_norm="transformer.h.1.ln_1")
    assert normed.attention_is_projection == (False, False)
    assert normed.final_scale.operation == "transformer.h.1.ln_1/layer_norm"
    sites = {"query": "transformer.h.*.ln_1", "head_output": "transformer.h.*.attn.c_proj:in"}
    assert names(f, params, inputs, heads=2, **sites).head_output[0].starts == (0, 16)


def test_names_do_not_depend_on_the_example_and_are_hashable() -> None:
    f, params, _, found = named("llama")
    again = names(f, params)
    assert again == found and hash(again) == hash(found)
    assert repr(found) == "Names(2 blocks 'model.layers.{0..1}', width 32, 4 heads)"
    assert "model.layers.{0..1}.self_attn.o_proj:in (4 heads of 8)" in str(found)


def test_names_of_a_transformed_model() -> None:
    f, params, inputs, found = named("llama")
    assert names(tdhook.intervene(f, {"model.layers.0.mlp": 0.0}), params, inputs) == found


def test_in_train_mode_the_pattern_is_read_after_dropout() -> None:
    net, found = copy.deepcopy(model("gpt2")).train(), named("gpt2")[3]
    f, params = tdhook.functionalize(net, use_cache=False)
    training = names(f, params)
    assert training.pattern[0] == "transformer.h.0.attn/dropout"
    assert replace(training, pattern=found.pattern) == found


class Joined(nn.Module):
    """A block with separate projections that mixes tokens in one of the ways in which people write it."""

    def __init__(self, way: str, heads: int, width: int = 12):
        super().__init__()
        self.way, self.heads, self.norm = way, heads, nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = self.q(normed), self.k(normed), self.v(normed)
        first, second = x.shape[:2]
        if self.way == "one head, fused":
            return x + self.o(nn.functional.scaled_dot_product_attention(q, k, v))
        if self.way == "einsum":
            q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
            pattern = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
            return x + self.o(torch.einsum("bhqk, bkhd -> bqhd", pattern, v).flatten(2))
        if self.way == "batch first":
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
            z = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).view(first, self.heads, second, -1).transpose(1, 2)
            return x + self.o(z.flatten(2))
        q, k, v = (t.reshape(first, second * self.heads, -1).transpose(0, 1) for t in (q, k, v))
        return x + self.o(torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).transpose(0, 1).reshape(x.shape))


JOINED = [
    ("one head, fused", 1),
    ("einsum", 3),
    ("einsum", 4),
    ("batch first", 3),
    ("sequence first", 3),
    ("sequence first", 4),
]


@pytest.mark.parametrize(("way", "heads"), JOINED)
@pytest.mark.parametrize("width", [12, 16, 9])
def test_heads_however_they_are_joined(way: str, heads: int, width: int) -> None:
    if width % heads:
        return
    torch.manual_seed(0)
    f, params = tdhook.functionalize(nn.Sequential(Joined(way, heads, width), Joined(way, heads, width)).double())
    x = torch.randn(2, 5, width, dtype=torch.float64)
    found = names(f, params, x)
    expected = HeadLayout("0.q", tuple(range(0, width, width // heads)), width // heads)
    assert found.head_count == heads
    assert found.query[0] == expected and found.value[0] == replace(expected, site="0.v")
    assert found.head_output[0] == replace(expected, site="0.o:in")


def test_a_whole_encoder_that_is_a_numbered_module_is_no_block() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    f, params = tdhook.functionalize(nn.Sequential(nn.Embedding(30, 12), encoder, nn.Linear(12, 30)).eval())
    assert names(f, params, torch.ones(2, 5, dtype=torch.long)).blocks == ("1.layers.0", "1.layers.1")


class Around(nn.Module):
    def __init__(self, change: Any):
        super().__init__()
        self.block, self.change = PlainBlock(), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.block(x))


@pytest.mark.parametrize("change", [lambda x: x * 0.5, nn.Linear(12, 12), torch.tanh])
def test_a_stream_that_is_not_passed_on_as_it_is_is_no_sum(change: Any) -> None:
    f, params = tdhook.functionalize(nn.Sequential(Around(change), Around(change)))
    found = names(f, params, torch.randn(2, 5, 12))
    assert found.attention == found.mlp == (None, None)
    with pytest.raises(
        SiteError, match=r"the residual stream of '0' goes through '.*/(mul|linear|tanh)(@0)?', which is no sum"
    ):
        found.require("attention", 0)


class ByHand(nn.Module):
    """A norm in elementary operations, as lessons have it."""

    def __init__(self, root: str):
        super().__init__()
        self.root, self.weight, self.bias = root, nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True) + 1e-5
        scale = {"sqrt": lambda: 1 / variance.sqrt(), "pow": lambda: variance**-0.5, "std": lambda: 1 / x.std(-1, keepdim=True)}
        return centred * scale[self.root]() * self.weight + self.bias


class Lesson(nn.Module):
    def __init__(self, root: str, tokens: int):
        super().__init__()
        self.positions, self.tokens = nn.Embedding(9, 12), nn.Parameter(torch.randn(tokens, 12))
        self.blocks = nn.ModuleList([Joined("einsum", 3), Joined("einsum", 3)])
        for block in self.blocks:
            block.norm = ByHand(root)
        self.final, self.unembed = ByHand(root), nn.Linear(12, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.positions(torch.arange(ids.shape[1])) + self.tokens[ids]
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.final(x))


@pytest.mark.parametrize("root", ["sqrt", "pow", "std"])
@pytest.mark.parametrize("tokens", [30, 12])  # 12: as many as features
def test_norms_and_tables_by_hand(root: str, tokens: int) -> None:
    f, params = tdhook.functionalize(Lesson(root, tokens))
    found = names(f, params, torch.zeros(2, 5, dtype=torch.long))
    assert (found.norm, found.final_norm, found.attention_norm[1]) == ("pre", "final", "blocks.1.norm")
    assert found.final_scale.written_out and found.final_scale.operation.startswith(f"final/{root}")
    assert (found.token_embedding, found.unembedding.weight, found.logits) == ("tokens", "unembed.weight", ":out")


def test_of_several_outputs_the_first_has_the_logits() -> None:
    from transformers import BertForPreTraining

    f, params = tdhook.functionalize(BertForPreTraining(model("bert").config).eval())
    found = names(f, params)
    assert found.logits == ":out[prediction_logits]" and found.unembedding.weight.endswith("word_embeddings.weight")
    f, params, inputs, found = named("gpt2")
    with_loss = names(f, params, {**inputs, "labels": inputs["input_ids"]})
    assert with_loss == found  # the loss comes first


def test_blocks_without_numbers_are_given_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = PlainBlock(), PlainBlock()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    f, params = tdhook.functionalize(Two())
    x = torch.randn(2, 5, 12)
    with pytest.raises(SiteError, match="no blocks were found"):
        names(f, params, x)
    found = names(f, params, x, blocks=["first", "second"])
    assert found.residual_post == ("first", "second") and found.head_count == 3
    assert "blocks               first, second\n" in str(found)


def test_under_vmap_over_parameters() -> None:
    f, params, inputs, found = named("gpt2")
    stacked = torch.stack([params, params * 2])
    weights = torch.func.vmap(lambda p: names(f, p, inputs).output_weight(p, 0))(stacked)
    torch.testing.assert_close(weights[1], 2 * found.output_weight(params, 0))


def test_heads_merge_to_what_was_split() -> None:
    for layout in (HeadLayout("a", (0, 4, 8), 4), HeadLayout("a", (2, 7), 3), HeadLayout("a", (0, 1, 2), 4, 3)):
        value = torch.randn(2, 5, 14)
        heads = layout.split(value)
        assert heads.shape == (2, 5, layout.heads, layout.size)
        assert torch.equal(heads[..., 1, 2], value[..., layout.starts[1] + 2 * layout.step])
        assert torch.equal(layout.merge(value, heads), value)
        zeroed = layout.merge(value, torch.zeros_like(heads))
        assert torch.equal(zeroed == 0, (torch.arange(14)[:, None] == layout.features().flatten()).any(1).expand(2, 5, 14))


def test_merged_heads_broadcast() -> None:
    value = torch.randn(2, 5, 8)
    for layout in (HeadLayout("a", (0, 4), 4), HeadLayout("a", (0, 1), 4, 2), HeadLayout("a", (1, 5), 2)):
        heads = torch.randn(2, layout.size)
        assert torch.equal(layout.split(layout.merge(value, heads)), heads.expand(2, 5, *heads.shape))
        with pytest.raises(InputError, match=r"shape \[3, 2, \d\], which does not broadcast to value"):
            layout.merge(value, heads.expand(3, *heads.shape))


def test_nothing_of_the_caller_is_changed() -> None:
    net = model("llama")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    f, params = tdhook.functionalize(net, use_cache=False)
    names(f, params, example("llama"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_bad_requests_say_what_to_give() -> None:
    f, params, inputs, found = named("gpt2")
    with pytest.raises(ModelError, match="has no sites"):
        names(lambda p, x: x, params, inputs)
    with pytest.raises(InputError, match=r"'atention' is no entry that can be given\. Did you mean 'attention'"):
        names(f, params, inputs, atention="transformer.h.*.attn")
    with pytest.raises(InputError, match="attention is 3 of type int; give a site"):
        names(f, params, inputs, attention=3)
    with pytest.raises(SiteError, match="means 1 sites; give one for each of the 2 blocks"):
        names(f, params, inputs, attention="transformer.h.0.mlp")
    with pytest.raises(SiteError, match=r"c_fc' has the shape \[2, 6, 128\], the residual stream \[2, 6, 32\]"):
        names(f, params, inputs, mlp="transformer.h.*.mlp.c_fc")
    with pytest.raises(SiteError, match="32 features, which 5 heads do not divide"):
        names(f, params, inputs, query="transformer.h.*.ln_1", heads=5)
    with pytest.raises(SiteError, match=r"heads=2, but query at 'transformer.h.0.attn.c_attn' was found to have 4 heads"):
        names(f, params, inputs, heads=2)
    with pytest.raises(SiteError, match=r"'transformer.ln_f' is no module that applies one linear map"):
        names(f, params, inputs, unembedding="transformer.ln_f")
    with pytest.raises(SiteError, match=r"blocks has 'transformer.wte', which never ran, or returned no value of"):
        names(f, params, inputs, blocks=["transformer.h.0", "transformer.wte"])
    with pytest.raises(InputError, match="heads"):
        names(f, params, inputs, heads=0)
    with pytest.raises(SiteError, match="layer 2 is out of range; the model has 2 blocks"):
        found.require("attention", 2)
    with pytest.raises(InputError, match=r"'atention' is no entry of Names\. Did you mean 'attention'"):
        found.require("atention")
    with pytest.raises(InputError, match="final_norm is one for the whole model; leave out layer=0"):
        found.require("final_norm", 0)
    with pytest.raises(SiteError, match="pattern was not found: a fused kernel never forms it"):
        named("gpt2", "sdpa")[3].require("pattern")
    with pytest.raises(SiteError, match=r"final_scale was not found: no norm reads the last residual\.$"):
        named("bert")[3].require("final_scale")
    with pytest.raises(InputError, match="'attention' has no heads; choose from query, key, value, head_output"):
        found.split_heads(torch.ones(2, 32), 0, "attention")
    with pytest.raises(InputError, match=r"heads reach up to feature 31"):
        found.split_heads(torch.ones(2, 16), 0)
    with pytest.raises(InputError, match=r"holds \[..., 4, 8\]"):
        found.merge_heads(torch.ones(2, 32), torch.ones(2, 8, 4), 0)


def test_models_without_blocks_or_without_a_known_example() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    f, params = tdhook.functionalize(net)
    with pytest.raises(SiteError, match=r"no blocks were found: .* give blocks='path.\*'"):
        names(f, params, torch.ones(1, 4))
    with pytest.raises(InputError, match="inputs is None, but the model takes 'input'"):
        names(f, params)
