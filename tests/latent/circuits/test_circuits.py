"""Laws of graphs and circuits: who is in them, what ACDC keeps, and how a circuit is judged."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import Tensor, nn

import tdhook
from tdhook.core.errors import InputError, SiteError, TargetError
from tdhook.latent.circuits import (
    Circuit,
    EdgeGraph,
    Reader,
    Writer,
    acdc,
    completeness,
    eap,
    edge_graph,
    edge_overlap,
    edge_patching,
    evaluate,
    faithfulness,
    kl_divergence_from,
    mask_edges,
    top_edges,
    writer_values,
)

from ..families import named, plain
from .cases import Block, Case, case, difference, micro


def ladder() -> EdgeGraph:
    """Two nodes, a and b, between x and y."""
    return EdgeGraph.of(
        [
            Writer("x", "0"),
            Reader("a in", "1:in", feeds=("a",)),
            Writer("a", "1"),
            Reader("b in", "2:in", feeds=("b",)),
            Writer("b", "2"),
            Reader("y", "3:in"),
        ]
    )


def test_the_nodes_of_each_family() -> None:
    sequential, grouped, parallel = (case(name).graph for name in ("gpt2", "llama", "gpt_neox"))
    assert sequential.writers[:6] == ("embedding", "head 0.0", "head 0.1", "head 0.2", "head 0.3", "mlp 0")
    assert len(sequential) == 12 * 1 + 5 + 12 * 6 + 10 + 11
    assert grouped.readers[:9] == (*(f"query 0.{h}" for h in range(4)), "key 0.0", "key 0.1", "value 0.0", "value 0.1", "mlp 0")
    assert len(grouped) == 8 * 1 + 5 + 8 * 6 + 10 + 11
    assert ("head 0.0", "mlp 0") not in parallel.edges and ("head 0.0", "mlp 1") in parallel.edges
    group = grouped.feeds[grouped.readers.index("key 1.1")]
    assert [grouped.writers[w] for w in group] == ["head 1.2", "head 1.3"]
    assert case("llama", heads=False).graph.readers == ("attention 0", "mlp 0", "attention 1", "mlp 1", "logits")


def test_edges_have_numbers_and_names() -> None:
    graph = case("llama").graph
    assert [graph.edge(i) for i in range(len(graph))] == list(graph.edges)
    assert graph.index(graph.edges).tolist() == list(range(len(graph)))
    assert graph.edge(len(graph) - 1) == ("mlp 1", "logits")
    assert [graph.edge(i)[0] for i in graph.of_writer("mlp 1").tolist()] == ["mlp 1"]
    assert len(graph.of_reader("mlp 1")) == 10
    assert EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in"), Writer("z", "2")]).of_writer("z").tolist() == []


def test_a_graph_is_printed_and_so_are_scores() -> None:
    graph = case("llama").graph
    assert repr(graph) == "EdgeGraph(11 writers, 19 readers, 82 edges)"
    assert "reads   query 1.0 .. value 1.1 (8)  model.layers.1:in" in str(graph)
    scores = torch.zeros(82).index_fill(0, torch.tensor([81]), -2.5)
    assert graph.table(scores, 1) == "mlp 1 -> logits  -2.5"
    circuit = Circuit.of(graph, [("embedding", "logits")])
    assert str(circuit) == "Circuit(1 of 82 edges)\nembedding -> logits" and circuit.nodes == ("embedding",)


class Raw(Block):
    """Reads the stream without a module."""

    def project(self, x: Tensor) -> Tensor:
        return x @ self.qkv.weight.T


def test_models_without_such_a_graph_say_why() -> None:
    f, params, inputs, found = named("gemma2")
    with pytest.raises(SiteError, match="not the sum of its heads; take the coarse graph, with heads=False"):
        edge_graph(f, params, inputs, names=found)
    f, params = tdhook.functionalize(plain())
    ids = torch.randint(0, 30, (2, 5))
    with pytest.raises(SiteError, match=r"normalised by an operation, .* take the coarse graph, with heads=False"):
        edge_graph(f, params, ids)
    with pytest.raises(InputError, match="names is 3"):
        edge_graph(f, params, ids, names=3)
    block = Block(nn.Sequential(nn.LayerNorm(8), nn.Tanh()))
    f, params = tdhook.functionalize(nn.Sequential(nn.Embedding(30, 8), block, nn.Linear(8, 30)))
    with pytest.raises(SiteError, match=r"the query of block 0 at '1.qkv' is no linear map of .* with heads=False"):
        edge_graph(f, params, ids)
    f, params = tdhook.functionalize(nn.Sequential(nn.Embedding(30, 8), Raw(nn.Identity()), nn.Linear(8, 30)))
    with pytest.raises(SiteError, match=r"no module of block 0 takes '1:in' .* by hand, with EdgeGraph\.of"):
        edge_graph(f, params, ids, heads=False)


def test_bad_nodes_say_what_to_give() -> None:
    with pytest.raises(InputError, match=r"nodes holds 'x' of type str; give Writer\(name, site\)"):
        EdgeGraph.of(["x"])
    with pytest.raises(InputError, match="two writers are called 'x'"):
        EdgeGraph.of([Writer("x", "0"), Writer("x", "1"), Reader("y", "2")])
    with pytest.raises(InputError, match="reader 'y' feeds 'x', which is no writer that comes after it"):
        EdgeGraph.of([Writer("x", "0"), Reader("y", "2", feeds=("x",))])
    with pytest.raises(InputError, match="the graph has no edge"):
        EdgeGraph.of([Reader("y", "2"), Writer("x", "0")])
    graph = case("llama").graph
    with pytest.raises(InputError, match=r"the graph has no writer 'head 1.7'\. Did you mean"):
        Circuit.of(graph, [("head 1.7", "logits")])
    with pytest.raises(InputError, match="the graph has no reader 'logit'"):
        Circuit.of(graph, [("mlp 1", "logit")])
    with pytest.raises(InputError, match="no edge 'mlp 1' -> 'mlp 0': the writer comes after the reader"):
        Circuit.of(graph, [("mlp 1", "mlp 0")])
    with pytest.raises(InputError, match="no edge 'mlp 0' -> 'mlp 1': the stream starts anew between them"):
        Circuit.of(case("bert").graph, [("mlp 0", "mlp 1")])
    with pytest.raises(InputError, match="an edge is a pair"):
        Circuit.of(graph, ["mlp 1"])
    with pytest.raises(InputError, match="give a bool tensor"):
        Circuit(graph, torch.ones(82))
    with pytest.raises(InputError, match=r"give a tensor \[..., 82\]"):
        top_edges(graph, torch.ones(3), 1)
    with pytest.raises(InputError, match="method='best' is unknown; choose from top, greedy"):
        top_edges(graph, torch.ones(82), 1, method="best")
    with pytest.raises(InputError, match="count"):
        top_edges(graph, torch.ones(82), -1)
    with pytest.raises(InputError, match=r"scores is .* give \[82\]"):
        top_edges(graph, torch.ones(2, 82), 1)
    with pytest.raises(InputError, match="graph is 3 of type int; give what edge_graph"):
        Circuit(3, torch.ones(82))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the graph has no writer"):
        Circuit.of_nodes(graph, ["head 1.7"])
    with pytest.raises(InputError, match="'b' reads what another node reads at '2:in'; give each node a site"):
        EdgeGraph.of([Writer("x", "0"), Reader("a", "2:in"), Reader("b", "2:in")])
    with pytest.raises(InputError, match="'b' writes what another node writes at '0'"):
        EdgeGraph.of([Writer("a", "0", axis=1, index=2), Writer("b", "0", axis=1, index=2), Reader("y", "2:in")])
    with pytest.raises(InputError, match=r"scores is .* give \[82\]"):
        graph.table(torch.ones(2, 82))
    with pytest.raises(InputError, match="count is an integer of at least 1, got 0"):
        graph.table(torch.ones(82), 0)
    with pytest.raises(InputError, match="edge 82 is out of range"):
        graph.edge(82)


def test_dangling_edges_are_pruned() -> None:
    graph = ladder()
    kept = [("x", "a in"), ("a", "b in"), ("b", "y")]
    assert Circuit.of(graph, kept).pruned().edges == tuple(kept)
    assert Circuit.of(graph, kept[:2]).pruned().edges == ()  # nothing reaches y
    assert Circuit.of(graph, kept[1:]).pruned().edges == ()  # nothing starts at x
    assert Circuit.of(graph, [*kept[:2], ("x", "y")]).pruned().edges == (("x", "y"),)


def test_pruning_changes_nothing_of_what_a_circuit_computes() -> None:
    c = case("llama")
    scores = eap(*c.ends, difference, graph=c.graph)
    circuits = [top_edges(c.graph, scores, n, prune=False) for n in (8, 20, 40)]
    assert any(len(circuit.pruned()) < len(circuit) for circuit in circuits)
    whole = evaluate(*c.ends, circuits, difference).value
    torch.testing.assert_close(evaluate(*c.ends, [x.pruned() for x in circuits], difference).value, whole)


def test_the_highest_edges() -> None:
    graph = ladder()  # x>a, x>b, a>b, x>y, a>y, b>y
    scores = torch.tensor([1.0, -9.0, 8.0, 0.0, 2.0, -3.0])
    assert top_edges(graph, scores, 2, prune=False).edges == (("x", "b in"), ("a", "b in"))
    assert top_edges(graph, scores, 2, absolute=False, prune=False).edges == (("a", "b in"), ("a", "y"))
    assert len(top_edges(graph, scores, 2)) == 0
    assert top_edges(graph, scores, 2, method="greedy", prune=False).edges == (("x", "b in"), ("b", "y"))
    assert len(top_edges(graph, scores, 99)) == 6 and len(top_edges(graph, scores, 0, method="greedy")) == 0


def test_a_circuit_is_plain_data() -> None:
    c = case("llama")
    circuit = Circuit.of(c.graph, [("mlp 1", "logits"), ("embedding", "key 0.1")])
    assert Circuit.of(c.graph, json.loads(json.dumps(circuit.edges))).edges == circuit.edges
    again = edge_graph(c.f, c.params)  # found anew, and read from a file: the same graph
    kept = pickle.loads(pickle.dumps(circuit))
    assert again == c.graph == kept.graph and hash(again) == hash(c.graph)
    found = evaluate(*c.ends, [circuit, Circuit(again, circuit.kept), kept], difference).value
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_circuit_of_nodes_ablates_all_other_nodes() -> None:
    c = case("gpt2")
    nodes = ["embedding", "head 0.1", "mlp 1"]
    circuit = Circuit.of_nodes(c.graph, nodes)
    assert list(circuit.nodes) == nodes and set(circuit.edges) == {edge for edge in c.graph.edges if edge[0] in nodes}
    number = c.graph.writers.index("mlp 0")
    rest = Circuit.of_nodes(c.graph, [name for name in c.graph.writers if name != "mlp 0"])
    patched = tdhook.intervene(c.f, {"transformer.h.0.mlp": c.values[number]})(c.params, c.clean)
    torch.testing.assert_close(evaluate(*c.ends, rest, difference).value, difference(patched))


def test_overlap() -> None:
    scores = torch.tensor([1.0, -9.0, 8.0, 0.0])
    assert edge_overlap(scores, -scores, 2) == 1 and edge_overlap(scores, -scores, 1, absolute=False) == 0
    with pytest.raises(InputError, match="count=9"):
        edge_overlap(scores, scores, 9)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_whole_graph_is_faithful_and_no_edge_is_not(name: str) -> None:
    c = case(name)
    every = Circuit(c.graph, torch.ones(len(c.graph), dtype=torch.bool))
    circuits = [every, every.complement]
    found = evaluate(*c.ends, circuits, difference, chunk_size=1)
    torch.testing.assert_close(found.value[0], difference(c.f(c.params, c.clean)))
    torch.testing.assert_close(found.value[1], difference(c.f(c.params, c.corrupted)))
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(faithfulness(*c.ends, circuits, difference), ends)
    torch.testing.assert_close(completeness(*c.ends, circuits, difference), 1 - ends)
    torch.testing.assert_close(faithfulness(*c.ends, every, difference), ends[0])
    one = Circuit.of(c.graph, [("mlp 0", "logits"), ("embedding", "mlp 0")])
    expected = difference(c.oracle(one.mask(torch.float64)))
    torch.testing.assert_close(evaluate(*c.ends, one, difference).value, expected, rtol=1e-5, atol=1e-5)


def test_bad_circuits_say_what_to_give() -> None:
    c = case("gpt2")
    with pytest.raises(InputError, match="circuits is empty"):
        evaluate(*c.ends, [], difference)
    with pytest.raises(InputError, match="circuits holds 3"):
        evaluate(*c.ends, [3], difference)
    for method in (evaluate, faithfulness, completeness):
        with pytest.raises(InputError, match="circuits holds 3"):
            method(*c.ends, 3, difference)
    with pytest.raises(InputError, match="circuits holds None"):
        completeness(*c.ends, [None], difference)
    with pytest.raises(InputError, match="of several graphs"):
        evaluate(*c.ends, [Circuit.of(c.graph, []), Circuit.of(ladder(), [])], difference)


def one_by_one(c: Case, loss: object, threshold: float) -> Tensor:
    """ACDC as it is told: edge after edge, from the output to the input."""
    g = mask_edges(c.f, c.graph)
    run = lambda mask: loss(g(c.params, c.clean, c.values, mask)).mean()  # type: ignore[operator]  # noqa: E731
    mask = torch.zeros(len(c.graph), dtype=torch.float64)
    order = [
        c.graph.starts[r] + w for r in reversed(range(len(c.graph.readers))) for w in reversed(range(len(c.graph.reads[r])))
    ]
    for edge in order:
        without = mask.index_fill(0, torch.tensor(edge), 1)
        if run(without) - run(mask) < threshold:
            mask = without
    return mask == 0


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
@pytest.mark.parametrize("threshold", [1e-3, 0.05])
def test_acdc_decides_as_edge_after_edge_does(threshold: float, chunk_size: int) -> None:
    c = case("gpt2", heads=False)
    loss = kl_divergence_from(c.f(c.params, c.clean), key="logits", position=-1)
    found = acdc(*c.ends, loss, graph=c.graph, threshold=threshold, chunk_size=chunk_size)
    expected = one_by_one(c, loss, threshold)
    assert torch.equal(found.kept, expected) and 0 < len(found) < len(c.graph)


def test_acdc_at_its_ends() -> None:
    c = case("llama", heads=False)
    loss = kl_divergence_from(c.f(c.params, c.clean), key="logits")
    assert len(acdc(*c.ends, loss, graph=c.graph, threshold=float("inf"))) == 0
    assert len(acdc(*c.ends, loss, graph=c.graph, threshold=float("-inf"))) == len(c.graph)
    seen: list[tuple[int, int]] = []
    acdc(*c.ends, loss, graph=c.graph, threshold=0.1, progress=lambda *at: seen.append(at))
    assert seen[-1] == (15, 15)
    with pytest.raises(InputError, match="threshold is 'low'"):
        acdc(*c.ends, loss, graph=c.graph, threshold="low")
    with pytest.raises(InputError, match="chunk_size"):
        acdc(*c.ends, loss, graph=c.graph, threshold=0.1, chunk_size=0)


def test_divergence_is_that_of_torch() -> None:
    first, second = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (first, second)))
    torch.testing.assert_close(kl_divergence_from(first)(second), kl.mean(1))
    torch.testing.assert_close(kl_divergence_from({"a": first}, key="a", position=-1)({"a": second}), kl[:, -1])
    with pytest.raises(TargetError, match="needs logits"):
        kl_divergence_from({"a": first})
    with pytest.raises(TargetError, match="position=4 is out of range"):
        kl_divergence_from(first, position=4)
    closed = torch.tensor([[0.0, 1.0, -torch.inf]])  # a class that cannot be
    expected = kl_divergence_from(closed[:, :2])(torch.zeros(1, 2))
    torch.testing.assert_close(kl_divergence_from(closed)(torch.tensor([[0.0, 0.0, -torch.inf]])), expected)


def test_micro_circuit_by_hand() -> None:
    f, params, graph = micro()
    circuit = Circuit.of(graph, [("in", "out"), ("in", "in 0.0"), ("0.0", "out")])
    metric = lambda out: out[:, -1, 0]  # noqa: E731
    found = evaluate(f, params, torch.ones(1, 1, 2), None, circuit, metric, ablation=0.0)
    assert found.value.tolist() == [2.0] and found.clean.tolist() == [25.0] and found.ablated.tolist() == [0.0]
    torch.testing.assert_close(found.normalized, torch.tensor(2 / 25))


def test_no_fraction_of_nothing_is_given():
    f, params = tdhook.functionalize(nn.Sequential(nn.Identity(), nn.Identity()))
    circuit = Circuit.of(EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in")]), [("x", "y")])
    alike = torch.ones(1, 1)
    with pytest.raises(InputError, match="have the same metric"):
        faithfulness(f, params, alike, alike, circuit, lambda out: out[:, 0])


class Renormalised(nn.Module):
    """Two writes, a norm of the stream after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.a, self.norm, self.b = nn.Identity(), nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.x(x)
        x = self.norm(x + self.a(x))
        return x + self.b(x)


def test_a_stream_that_starts_anew() -> None:
    net = Renormalised().double()
    f, params = tdhook.functionalize(net)
    nodes = [
        Writer("x", "x"),
        Reader("a", "a:in", feeds=("a",)),
        Writer("a", "a"),
        Reader("norm", "norm:in", feeds=("norm",)),
        Writer("norm", "norm", restarts=True),
        Reader("b", "b:in", feeds=("b",)),
        Writer("b", "b"),
        Reader("y", ":out"),
    ]
    graph = EdgeGraph.of(nodes)
    edges = [("x", "a"), ("x", "norm"), ("a", "norm"), ("norm", "b"), ("norm", "y"), ("b", "y")]
    assert list(graph.edges) == edges and [graph.edge(i) for i in range(6)] == edges
    assert graph.index(edges).tolist() == list(range(6)) and graph.of_writer("norm").tolist() == [3, 4]
    assert graph.of_reader("y").tolist() == [4, 5]
    assert graph.writer_scores(torch.arange(6.0)).tolist() == [1, 2, 7, 5]
    assert pickle.loads(pickle.dumps(graph)) == graph

    clean, corrupted = torch.randn(2, 4, 3).double()
    metric = lambda out: out[:, 0]  # noqa: E731
    mixed = net.norm(clean + net.a(corrupted))
    effects = edge_patching(f, params, clean, corrupted, metric, graph=graph, edges=[("a", "norm")])
    torch.testing.assert_close(effects[0], metric(mixed + net.b(mixed) - net(clean)).mean())
    ablation = writer_values(f, params, corrupted, graph)
    mask = torch.tensor([0.0, 0, 0, 0, 1, 1]).double()  # all that the output reads
    torch.testing.assert_close(mask_edges(f, graph)(params, clean, ablation, mask), net(corrupted))

    dead = Circuit.of(graph, [("x", "a"), ("norm", "b"), ("b", "y")]).pruned()
    assert dead.edges == ()  # nothing reaches the norm
    whole = Circuit.of(graph, [("x", "a"), ("a", "norm"), ("norm", "b"), ("b", "y")])
    assert whole.pruned().edges == whole.edges
    with pytest.raises(InputError, match="no edge 'a' -> 'y': the stream starts anew between them"):
        graph.index([("a", "y")])
