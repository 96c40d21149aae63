"""Laws of the masked forward: against written-out models with split readers, at its ends, and in its parts."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import tdhook
from tdhook.core.errors import InputError, ModelError, SiteError
from tdhook.latent.circuits import (
    Circuit,
    EdgeGraph,
    Reader,
    Writer,
    edge_graph,
    edge_patching,
    mask_edges,
    mean_values,
    writer_values,
)

from ..families import FAMILIES, model, named
from .cases import Block, MicroModel, case, difference, micro
from .oracle import ORACLES

COARSE = [name for name in FAMILIES if name not in ("vit", "t5", "mixtral")]
HEADS = [name for name in COARSE if FAMILIES[name].exact]


def random_mask(graph: EdgeGraph, *lead: int, seed: int = 0) -> Tensor:
    return torch.rand(*lead, len(graph), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", list(ORACLES))
def test_masked_is_the_written_out_model_with_split_readers(name: str) -> None:
    c = case(name)
    g = mask_edges(c.f, c.graph)
    for mask in (random_mask(c.graph), random_mask(c.graph, seed=1).round()):
        # The library computes the norms of Llama in single precision.
        torch.testing.assert_close(g(c.params, c.clean, c.values, mask).logits, c.oracle(mask), rtol=1e-5, atol=1e-5)
    other = torch.randn_like(c.values)
    torch.testing.assert_close(g(c.params, c.clean, other, mask).logits, c.oracle(mask, other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "heads"), [(name, True) for name in HEADS] + [(name, False) for name in COARSE])
def test_mask_0_is_the_model_bit_for_bit_and_mask_1_the_corrupted_run(name: str, heads: bool) -> None:
    c = case(name, heads)
    g = mask_edges(c.f, c.graph)
    zeros = torch.zeros(len(c.graph), dtype=torch.float64)
    assert torch.equal(g(c.params, c.clean, c.values, zeros).logits, c.f(c.params, c.clean).logits)
    torch.testing.assert_close(g(c.params, c.clean, c.values, zeros + 1).logits, c.f(c.params, c.corrupted).logits)


@pytest.mark.parametrize("name", ["vit", "t5"])
def test_encoders_have_a_graph_too(name: str) -> None:
    f, params, inputs, found = named(name)
    graph = edge_graph(f, params, inputs, names=found)
    other = {key: value.flip(0) for key, value in inputs.items()}
    output = mask_edges(f, graph)(params, inputs, writer_values(f, params, other, graph), torch.ones(len(graph)))
    torch.testing.assert_close(output[0], f(params, other)[0])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "falcon"])
def test_masks_by_head_that_are_alike_are_the_coarse_mask(name: str) -> None:
    fine, coarse = case(name), case(name, heads=False)
    mask = random_mask(coarse.graph)
    named_mask = dict(zip(coarse.graph.edges, mask))

    def whole(node: str) -> str:
        kind, _, place = node.partition(" ")
        return f"attention {place.partition('.')[0]}" if kind in ("head", "query", "key", "value") else node

    spread = torch.stack([named_mask[whole(writer), whole(reader)] for writer, reader in fine.graph.edges])
    first = mask_edges(fine.f, fine.graph)(fine.params, fine.clean, fine.values, spread)
    # The bias of attention belongs to the coarse writer, and is the same in both runs.
    second = mask_edges(coarse.f, coarse.graph)(coarse.params, coarse.clean, coarse.values, mask)
    torch.testing.assert_close(first.logits, second.logits)


def test_the_micro_model_of_auto_circuit() -> None:
    f, params, graph = micro()
    clean, corrupted = torch.ones(1, 1, 2), -torch.ones(1, 1, 2)
    values = writer_values(f, params, clean, graph)
    g = mask_edges(f, graph)
    edges = [("0.1", "out"), ("0.0", "in 1.1"), ("in", "in 0.0")]
    # Its edge patching runs the corrupted input, and puts clean values into the edges of the circuit.
    outputs = [g(params, corrupted, values, Circuit.of(graph, edges[:k]).complement.mask()).tolist() for k in range(4)]
    assert outputs == [[[[-25.0, -49.0]]], [[[-19.0, -41.0]]], [[[-13.0, -25.0]]], [[[-9.0, -13.0]]]]
    assert g(params, clean, values, torch.zeros(len(graph))).tolist() == [[[25.0, 49.0]]]


def test_all_edges_out_of_a_node_are_the_node() -> None:
    c = case("gpt2")
    g = mask_edges(c.f, c.graph)
    patched = tdhook.intervene(c.f, {"transformer.h.0.mlp": c.values[c.graph.writers.index("mlp 0")]})
    mask = torch.zeros(len(c.graph), dtype=torch.float64).index_fill(0, c.graph.of_writer("mlp 0"), 1)
    torch.testing.assert_close(g(c.params, c.clean, c.values, mask).logits, patched(c.params, c.clean).logits)

    site, corrupted = (
        "transformer.h.1.attn.c_proj:in",
        tdhook.capture(c.f, "transformer.h.1.attn.c_proj:in")(c.params, c.corrupted)[1],
    )
    swap = tdhook.intervene(c.f, {site: lambda z: torch.cat([z[..., :16], corrupted[site][..., 16:24], z[..., 24:]], -1)})
    mask = torch.zeros_like(mask).index_fill(0, c.graph.of_writer("head 1.2"), 1)
    torch.testing.assert_close(g(c.params, c.clean, c.values, mask).logits, swap(c.params, c.clean).logits)


def test_a_query_that_reads_another_stream_leaves_keys_values_and_other_queries() -> None:
    c = case("llama")
    mask = torch.zeros(len(c.graph), dtype=torch.float64).index_fill(0, c.graph.of_reader("query 1.2"), 1)
    sites = [f"model.layers.1.self_attn.{kind}_proj" for kind in "qkv"]
    before = tdhook.capture(c.f, sites)(c.params, c.clean)[1]
    after = tdhook.capture(mask_edges(c.f, c.graph), sites)(c.params, c.clean, c.values, mask)[1]
    assert torch.equal(before[sites[1]], after[sites[1]]) and torch.equal(before[sites[2]], after[sites[2]])
    same = (before[sites[0]] == after[sites[0]]).unflatten(-1, (4, 8)).all(-1).all(0).all(0)
    assert same.tolist() == [True, True, False, True]


def test_zero_ablation_of_every_edge_leaves_biases_alone() -> None:
    c = case("gpt2")
    net = model("gpt2")
    g = mask_edges(c.f, c.graph)
    rest = sum(block.attn.c_proj.bias for block in net.transformer.h)
    expected = net.lm_head(net.transformer.ln_f(rest.expand(2, 6, 32)))
    torch.testing.assert_close(g(c.params, c.clean, 0.0, torch.ones(len(c.graph))).logits, expected)
    zeros = torch.zeros_like(c.values)
    mask = random_mask(c.graph)
    torch.testing.assert_close(g(c.params, c.clean, 0.0, mask).logits, c.oracle(mask, zeros))


def test_a_mask_for_each_example() -> None:
    c = case("llama")
    g = mask_edges(c.f, c.graph)
    masks = random_mask(c.graph, 2)
    together = g(c.params, c.clean, c.values, masks).logits
    for i in range(2):
        torch.testing.assert_close(together[i], g(c.params, c.clean, c.values, masks[i]).logits[i])


def test_a_mask_by_readers() -> None:
    c = case("gpt2")
    g = mask_edges(c.f, c.graph)
    row = torch.rand(6, dtype=torch.float64)
    mask = torch.zeros(len(c.graph), dtype=torch.float64)
    mask[c.graph.of_reader("key 1.3")] = row[:6]
    expected = g(c.params, c.clean, c.values, mask).logits
    assert torch.equal(g(c.params, c.clean, c.values, {"key 1.3": row}).logits, expected)
    assert torch.equal(g(c.params, c.clean, c.values, TensorDict({"key 1.3": row}, [])).logits, expected)


def test_vmap_over_masks_is_the_loop() -> None:
    c = case("gpt2")
    g = mask_edges(c.f, c.graph)
    masks = random_mask(c.graph, 3)
    run = lambda mask: difference(g(c.params, c.clean, c.values, mask))  # noqa: E731
    together = torch.func.vmap(run, chunk_size=2)(masks)
    torch.testing.assert_close(together, torch.stack([run(mask) for mask in masks]))


def test_vmap_over_pairs_of_prompts() -> None:
    c = case("llama")
    g = mask_edges(c.f, c.graph)
    mask = random_mask(c.graph)
    run = lambda ids, values: g(c.params, {"input_ids": ids[None]}, values[:, None], mask).logits[0]  # noqa: E731
    apart = torch.func.vmap(run, in_dims=(0, 1))(c.clean["input_ids"], c.values)
    torch.testing.assert_close(apart, g(c.params, c.clean, c.values, mask).logits, rtol=1e-5, atol=1e-5)


def test_compiled_is_eager() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, vocab_size=9
    )
    f, params = tdhook.functionalize(LlamaForCausalLM._from_config(config, attn_implementation="eager").eval(), use_cache=False)
    ids = {"input_ids": torch.tensor([[1, 2, 3]])}
    graph = edge_graph(f, params, ids)
    g = mask_edges(f, graph)
    masks = random_mask(graph, 2).float()
    run = lambda masks: torch.func.vmap(lambda mask: g(params, ids, 0.0, mask).logits)(masks)  # noqa: E731
    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(masks), run(masks))


def test_half_precision() -> None:
    torch.manual_seed(0)
    net = MicroModel().bfloat16()
    f, params = tdhook.functionalize(net)
    graph = micro()[2]
    x = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    values = writer_values(f, params, -x, graph)
    output = mask_edges(f, graph)(params, x, values, torch.ones(len(graph)))
    assert output.dtype == torch.bfloat16 and torch.equal(output, f(params, -x))


def test_mean_values_are_those_of_the_data_set_whatever_the_batches() -> None:
    c = case("gpt2")
    prompts = torch.randint(3, 50, (5, 6), generator=torch.Generator().manual_seed(4))
    every = writer_values(c.f, c.params, {"input_ids": prompts}, c.graph)
    for sizes in ([5], [2, 2, 1]):
        batches = [{"input_ids": part} for part in prompts.split(sizes)]
        torch.testing.assert_close(mean_values(c.f, c.params, batches, c.graph), every.mean(1, keepdim=True))
        alike = mean_values(c.f, c.params, iter(batches), c.graph, pooled=True)
        torch.testing.assert_close(alike, every.mean((1, 2), keepdim=True))
    mask = random_mask(c.graph)
    ablated = mask_edges(c.f, c.graph)(c.params, c.clean, alike, mask).logits
    torch.testing.assert_close(ablated, c.oracle(mask, alike.expand(-1, 2, 6, 32)))
    with pytest.raises(InputError, match="batches is empty"):
        mean_values(c.f, c.params, [], c.graph)
    with pytest.raises(InputError, match=r"streams of shape \[6, 32\] and \[4, 32\].*pooled=True"):
        mean_values(c.f, c.params, [{"input_ids": prompts}, {"input_ids": prompts[:, :4]}], c.graph)


def test_what_is_written_adds_up_to_the_stream() -> None:
    c = case("llama")
    last = tdhook.capture(c.f, "model.layers.1")(c.params, c.corrupted)[1]["model.layers.1"]
    torch.testing.assert_close(c.values.sum(0), last)


def test_nothing_of_the_caller_is_changed() -> None:
    c = case("llama")
    net = model("llama")
    kept = [net.state_dict()["model.norm.weight"].clone(), c.values.clone(), c.clean["input_ids"].clone()]
    mask = random_mask(c.graph)
    state, before = torch.get_rng_state(), mask.clone()
    mask_edges(c.f, c.graph)(c.params, c.clean, c.values, mask)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(mask, before)
    assert all(map(torch.equal, kept, [net.state_dict()["model.norm.weight"], c.values, c.clean["input_ids"]]))


def test_sites_may_be_spelled_in_any_way() -> None:
    f, params = tdhook.functionalize(nn.Sequential(nn.Identity(), nn.Tanh(), nn.Identity()))
    graph = EdgeGraph.of([Writer("x", "0:out"), Reader("a", "[1]:in"), Writer("b", "1"), Reader("y", "[-1]:in")])
    x = torch.ones(2, 1)
    assert torch.equal(writer_values(f, params, x, graph), torch.stack([x, x.tanh()]))
    mask = torch.tensor([0.0, 1.0, 0.5])
    torch.testing.assert_close(mask_edges(f, graph)(params, x, 0.0, mask), x.tanh() / 2 - 1)
    effects = edge_patching(f, params, x, None, lambda out: out[:, 0], graph=graph, ablation=0.0)
    torch.testing.assert_close(effects, torch.stack([-x.tanh()[0, 0], -torch.ones(()), -x.tanh()[0, 0]]))


def test_slices_count_from_the_end_too() -> None:
    f, params, graph = micro()
    other = EdgeGraph.of([Writer("in", "input"), Reader("r", "blocks.0.read", axis=-2, index=-1), Reader("out", "output:in")])
    x = torch.ones(1, 1, 2)
    expected = mask_edges(f, graph)(params, x, 0.0, {"in 0.1": torch.ones(1)})
    assert torch.equal(mask_edges(f, other)(params, x, 0.0, {"r": torch.ones(1)}), expected)
    assert not torch.equal(expected, f(params, x))


@pytest.mark.parametrize("heads", [2, 4])  # as many as examples, and as positions
def test_an_ablation_is_never_aligned_with_another_axis(heads: int) -> None:
    c = case("gpt2")
    ids = {"input_ids": c.clean["input_ids"][:, :4]}
    values = c.values[:, :, :4]
    g = mask_edges(c.f, c.graph)
    mask = random_mask(c.graph)
    means = values.mean((1, 2), keepdim=True)
    expected = g(c.params, ids, means.expand(-1, 2, 4, 32), mask).logits
    torch.testing.assert_close(g(c.params, ids, means, mask).logits, expected)
    for flat in (means[:, 0, 0], means[:, 0].expand(-1, heads, 32)):
        with pytest.raises(InputError, match=r"give a number or a tensor \[11, 2, 4, 32\], or with 1 in place of any but 11"):
            g(c.params, ids, flat, mask)


def test_norms_that_share_their_scales_are_as_those_with_copies() -> None:
    outputs = []
    for tied in (False, True):
        torch.manual_seed(0)
        first, second = nn.LayerNorm(8), nn.LayerNorm(8)
        nn.init.normal_(first.weight)
        second.load_state_dict(first.state_dict())
        if tied:
            second.weight, second.bias = first.weight, first.bias
        f, params = tdhook.functionalize(nn.Sequential(nn.Embedding(9, 8), Block(first), Block(second), nn.Linear(8, 9)))
        ids = torch.arange(8).reshape(2, 4)
        graph = edge_graph(f, params, ids)
        mask = torch.rand(len(graph), generator=torch.Generator().manual_seed(0))
        outputs.append(mask_edges(f, graph)(params, ids, 0.0, mask))
    assert torch.equal(*outputs)


def test_padding_does_not_count_in_means() -> None:
    c = case("llama")
    ids = c.clean["input_ids"]
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])}
    values = writer_values(c.f, c.params, padded, c.graph)
    kept = torch.cat([values[:, 0, :4], values[:, 1]], 1)
    torch.testing.assert_close(mean_values(c.f, c.params, [padded], c.graph, pooled=True)[:, 0, 0], kept.mean(1))
    means = mean_values(c.f, c.params, [padded], c.graph)[:, 0]
    torch.testing.assert_close(means[:, 4:], values[:, 1, 4:])
    torch.testing.assert_close(means[:, :4], values.mean(1)[:, :4])


def test_a_reader_before_its_writers_is_told() -> None:
    f, params = tdhook.functionalize(nn.Sequential(nn.Identity(), nn.Tanh(), nn.Identity()))
    graph = EdgeGraph.of([Writer("x", "0"), Writer("b", "2"), Reader("a", "1:in")])
    with pytest.raises(SiteError, match=r"'a' at '1:in' reads before all writers .* list the nodes in the order of the run"):
        mask_edges(f, graph)(params, torch.ones(1, 1), 0.0, torch.ones(2))


def test_bad_requests_say_what_to_give() -> None:
    c = case("gpt2")
    g = mask_edges(c.f, c.graph)
    with pytest.raises(ModelError, match="has no sites"):
        mask_edges(lambda params, x: x, c.graph)
    with pytest.raises(InputError, match="graph is 3 of type int; give what edge_graph"):
        mask_edges(c.f, 3)
    with pytest.raises(InputError, match=r"mask is a float32 tensor of shape \[4\]; give a tensor \[..., 110\]"):
        g(c.params, c.clean, c.values, torch.ones(4))
    with pytest.raises(InputError, match=r"give \[E\] or \[B, E\], and vmap for more"):
        g(c.params, c.clean, c.values, torch.ones(1, 1, 110))
    with pytest.raises(InputError, match=r"the graph has no reader 'query 1.9'\. Did you mean"):
        g(c.params, c.clean, c.values, {"query 1.9": torch.ones(6)})
    with pytest.raises(InputError, match=r"mask\['logits'\] is a float32 tensor of shape \[3\]; it reads 11 writers"):
        g(c.params, c.clean, c.values, {"logits": torch.ones(3)})
    with pytest.raises(InputError, match="mask is empty"):
        g(c.params, c.clean, c.values, {})
    with pytest.raises(InputError, match=r"ablation is .* give a number or a tensor \[11, ...\]"):
        g(c.params, c.clean, c.values[:3], torch.ones(110))
    with pytest.raises(InputError, match="ablation is None of type NoneType; give a number"):
        g(c.params, c.clean, None, torch.ones(110))
    with pytest.raises(InputError, match=r"mask is .* for 2 examples; give a row for each, or \[E\]"):
        g(c.params, c.clean, c.values, torch.ones(3, 110))
    with pytest.raises(InputError, match=r"mask\['logits'\] is 1.0 of type float; give a tensor \[n\] or \[B, n\]"):
        g(c.params, c.clean, c.values, {"logits": 1.0})
    with pytest.raises(InputError, match="mask is missing"):
        g(c.params, c.clean, c.values)


def test_nodes_that_do_not_fit_the_stream_are_named() -> None:
    f, params = tdhook.functionalize(nn.Sequential(nn.Identity(), nn.Linear(3, 2), nn.Flatten(0)))
    x, one = torch.ones(2, 3), torch.ones(1)
    graph = EdgeGraph.of([Writer("x", "0"), Writer("a", "1"), Reader("y", "2:in")])
    with pytest.raises(
        SiteError, match=r"'a' writes a float32 tensor of shape \[2, 2\] at '1', but the first writer adds \[2, 3\]"
    ):
        writer_values(f, params, x, graph)
    with pytest.raises(SiteError, match=r"'a' writes .* all writers and readers need the shape of the stream"):
        mask_edges(f, graph)(params, x, 0.0, torch.ones(2))
    with pytest.raises(SiteError, match=r"'y' reads a float32 tensor of shape \[2, 2\] at '2:in'"):
        mask_edges(f, EdgeGraph.of([Writer("x", "0"), Reader("y", "2:in")]))(params, x, 0.0, one)
    with pytest.raises(SiteError, match=r"'y' has axis=1 and index=3, but '1:in' holds a float32 tensor of shape \[2, 3\]"):
        mask_edges(f, EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in", axis=1, index=3)]))(params, x, 0.0, one)
    with pytest.raises(InputError, match=r"pooled=True needs a stream \[B, S, D\], but each writer adds \[2, 3\]"):
        mean_values(f, params, [x], EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in")]), pooled=True)
