"""Laws of edge attribution and edge patching: finite differences, closed forms, sums along paths, and single masked runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdhook
from tdhook.core.errors import GradientError, InputError, SiteError, TargetError
from tdhook.latent.circuits import (
    EdgeGraph,
    Reader,
    Writer,
    eap,
    eap_ig,
    edge_patching,
    mask_edges,
    mean_over_pairs,
    writer_values,
)

from .cases import Case, case, difference, micro
from .oracle import ORACLES


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square, self.end = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.square(x.square()))


def zeros(c: Case, *lead: int) -> Tensor:
    return torch.zeros(*lead, len(c.graph), dtype=torch.float64)


def some(c: Case, count: int = 12) -> Tensor:
    return torch.randperm(len(c.graph), generator=torch.Generator().manual_seed(3))[:count]


@pytest.mark.parametrize("name", list(ORACLES))
def test_eap_is_the_slope_of_the_written_out_model_at_mask_0(name: str) -> None:
    c = case(name)
    scores = eap(*c.ends, difference, graph=c.graph)
    mask = zeros(c).requires_grad_()
    (slopes,) = torch.autograd.grad(difference(c.oracle(mask)).mean(), mask)
    torch.testing.assert_close(scores, slopes, rtol=1e-5, atol=1e-5)
    if name == "gpt2":  # the norms of Llama are in single precision, too coarse for differences
        for edge in some(c, 4).tolist():
            step = zeros(c).index_fill(0, torch.tensor(edge), 1e-5)
            slope = (difference(c.oracle(step)) - difference(c.oracle(-step))).mean() / 2e-5
            torch.testing.assert_close(scores[edge], slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", list(ORACLES))
def test_edge_patching_is_the_written_out_model_with_one_edge_ablated(name: str) -> None:
    c = case(name)
    chosen = some(c)
    effects = edge_patching(*c.ends, difference, graph=c.graph, edges=chosen, per_example=True)
    masks = zeros(c, len(chosen)).scatter(1, chosen[:, None], 1)
    expected = torch.stack([difference(c.oracle(mask)) - difference(c.oracle(zeros(c))) for mask in masks], 1)
    torch.testing.assert_close(effects, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "heads"), [("gpt_neox", True), ("bert", True), ("phi", False), ("gemma2", False), ("gpt2", False)]
)
def test_edge_patching_is_a_mask_with_a_single_1(name: str, heads: bool) -> None:
    c = case(name, heads)
    chosen = some(c, 8)
    g = mask_edges(c.f, c.graph)
    effects = edge_patching(*c.ends, difference, graph=c.graph, edges=chosen)
    base = difference(c.f(c.params, c.clean))
    masks = zeros(c, len(chosen)).scatter(1, chosen[:, None], 1)
    expected = torch.stack([(difference(g(c.params, c.clean, c.values, mask)) - base).mean() for mask in masks])
    torch.testing.assert_close(effects, expected)


def test_in_a_linear_model_attribution_is_exact() -> None:
    f, params, graph = micro()
    clean, corrupted = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    metric = lambda out: out[:, -1, 0] - 2 * out[:, 1, 1]  # noqa: E731
    exact = edge_patching(f, params, clean, corrupted, metric, graph=graph)
    torch.testing.assert_close(eap(f, params, clean, corrupted, metric, graph=graph), exact)
    torch.testing.assert_close(eap_ig(f, params, clean, corrupted, metric, graph=graph, steps=1), exact)


def test_the_sign_and_the_closed_form() -> None:
    f, params = tdhook.functionalize(nn.Sequential(nn.Identity(), nn.Identity()))
    graph = EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in")])
    ends = (f, params, torch.tensor([[3.0], [5.0]]), torch.tensor([[1.0], [2.0]]))
    square = lambda out: out[:, 0].square()  # noqa: E731
    assert eap(*ends, square, graph=graph, per_example=True).tolist() == [[-12.0], [-30.0]]  # 2 x (corrupted - clean)
    assert edge_patching(*ends, square, graph=graph, per_example=True).tolist() == [[-8.0], [-21.0]]
    assert edge_patching(*ends, square, graph=graph).tolist() == [-14.5]
    assert eap(f, params, ends[2], None, square, graph=graph, ablation=0).tolist() == [-34.0]  # the mean of -2 x^2
    assert eap(*ends, lambda out: square(out).sum(), graph=graph).tolist() == [-42.0]


@pytest.mark.parametrize(
    ("quadrature", "expected"),
    [("riemann_left", -10.0), ("riemann_right", -6.0), ("trapezoid", -8.0), ("midpoint", -8.0), ("gauss_legendre", -8.0)],
)
@pytest.mark.parametrize("path", ["inputs", "mask", "activations"])
def test_quadratures_count_from_clean_to_corrupted(path: str, quadrature: str, expected: float) -> None:
    f, params = tdhook.functionalize(nn.Sequential(nn.Identity(), nn.Identity()))
    graph = EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in")])
    ends = (f, params, torch.tensor([[3.0]]), torch.tensor([[1.0]]), lambda out: out[:, 0].square())
    scores = eap_ig(*ends, graph=graph, path=path, steps=2, quadrature=quadrature)
    torch.testing.assert_close(scores, torch.tensor([expected]))


@pytest.mark.parametrize("name", list(ORACLES))
def test_integrated_along_inputs_is_the_mean_gradient_of_the_written_out_model(name: str) -> None:
    c = case(name)
    before = writer_values(c.f, c.params, c.clean, c.graph)
    expected = zeros(c)
    for t in (1 / 3, 2 / 3, 1.0):  # as Hanna et al.'s code: the corrupted end and not the clean one
        mask = zeros(c).requires_grad_()
        embedding = before[0] + t * (c.values[0] - before[0])
        moved = c.oracle(mask, embedding=embedding, differences=c.values - before)
        expected += torch.autograd.grad(difference(moved).mean(), mask)[0] / 3
    scores = eap_ig(*c.ends, difference, graph=c.graph, steps=3, quadrature="riemann_right")
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ablation", [None, 0.5])
def test_along_the_mask_scores_sum_to_the_effect_of_ablating_everything(ablation: Any) -> None:
    c = case("gpt2")
    corrupted = c.corrupted if ablation is None else None
    options: Any = {"graph": c.graph, "ablation": ablation, "path": "mask", "steps": 24}
    scores = eap_ig(c.f, c.params, c.clean, corrupted, difference, per_example=True, **options)
    values = c.values if ablation is None else ablation
    last = difference(mask_edges(c.f, c.graph)(c.params, c.clean, values, zeros(c) + 1))
    torch.testing.assert_close(scores.sum(1), last - difference(c.f(c.params, c.clean)), rtol=1e-3, atol=1e-3)


def test_along_activations_scores_of_a_node_sum_to_patching_it() -> None:
    c = case("gpt2", heads=False)
    scores = eap_ig(*c.ends, difference, graph=c.graph, path="activations", steps=24)
    g = mask_edges(c.f, c.graph)
    base = difference(c.f(c.params, c.clean))
    for writer in ("embedding", "attention 0", "mlp 1"):
        leaving = c.graph.of_writer(writer)
        patched = difference(g(c.params, c.clean, c.values, zeros(c).index_fill(0, leaving, 1)))
        torch.testing.assert_close(scores[leaving].sum(), (patched - base).mean(), rtol=1e-3, atol=1e-3)


def test_the_scores_of_a_node_are_attribution_patching() -> None:
    c = case("gpt2")
    site = "transformer.h.0.mlp"
    (before,) = tdhook.capture(c.f, site)(c.params, c.clean)[1].values()
    moved = tdhook.perturb(c.f, site)
    slope = torch.func.grad(lambda d: difference(moved(c.params, c.clean, {site: d})).mean())(torch.zeros_like(before))
    number = c.graph.writers.index("mlp 0")
    expected = ((c.values[number] - before) * slope).sum()
    scores = eap(*c.ends, difference, graph=c.graph)
    torch.testing.assert_close(scores[c.graph.of_writer("mlp 0")].sum(), expected)
    torch.testing.assert_close(c.graph.writer_scores(scores)[number], expected)


def test_the_error_of_attribution_is_of_second_order() -> None:
    c = case("gpt2")
    before = writer_values(c.f, c.params, c.clean, c.graph)
    errors = []
    for size in (0.02, 0.01):
        options: Any = {"graph": c.graph, "ablation": before + size * (c.values - before)}
        ends = (c.f, c.params, c.clean, None, difference)
        errors.append((eap(*ends, **options) - edge_patching(*ends, **options)).abs().max())
    assert 3.5 < errors[0] / errors[1] < 4.5


@pytest.mark.parametrize("method", [eap, eap_ig, edge_patching])
def test_scores_of_examples_are_those_of_each_alone_and_their_mean_the_score(method: Any) -> None:
    c = case("llama", heads=False)
    apart = method(*c.ends, difference, graph=c.graph, per_example=True)
    for i in range(2):
        clean, corrupted = ({"input_ids": pair["input_ids"][i : i + 1]} for pair in (c.clean, c.corrupted))
        torch.testing.assert_close(apart[i], method(c.f, c.params, clean, corrupted, difference, graph=c.graph))
    torch.testing.assert_close(apart.mean(0), method(*c.ends, difference, graph=c.graph))


@pytest.mark.parametrize("chunk_size", [1, 2, 1000])
def test_chunks_change_nothing(chunk_size: int) -> None:
    c = case("llama", heads=False)
    for method in (eap_ig, edge_patching):
        options: Any = {"graph": c.graph, "chunk_size": chunk_size}
        torch.testing.assert_close(method(*c.ends, difference, **options), method(*c.ends, difference, graph=c.graph))


def test_edges_come_in_the_order_asked_for() -> None:
    c = case("llama", heads=False)
    every = edge_patching(*c.ends, difference, graph=c.graph)
    order = torch.tensor([9, 0, 14, 3])
    torch.testing.assert_close(edge_patching(*c.ends, difference, graph=c.graph, edges=order), every[order])
    pairs = [c.graph.edge(i) for i in order.tolist()]
    torch.testing.assert_close(edge_patching(*c.ends, difference, graph=c.graph, edges=pairs), every[order])


def test_alike_pairs_have_no_effects() -> None:
    c = case("gpt2")
    ends = (c.f, c.params, c.clean, c.clean, difference)
    assert not eap(*ends, graph=c.graph).any()
    assert edge_patching(*ends, graph=c.graph, edges=some(c)).abs().max() < 1e-12


def test_progress_counts_edges() -> None:
    f, params, graph = micro()
    seen: list[tuple[int, int]] = []
    metric = lambda out: out[:, -1, 0]  # noqa: E731
    edge_patching(
        f, params, torch.ones(1, 1, 2), torch.zeros(1, 1, 2), metric, graph=graph, progress=lambda *at: seen.append(at)
    )
    assert seen[0] == (1, 13) and seen[-1] == (13, 13) and seen == sorted(seen)


@pytest.mark.parametrize("method", [eap, eap_ig])
def test_vmap_over_pairs(method: Any) -> None:
    c = case("llama", heads=False)

    def scores(clean: Tensor, corrupted: Tensor) -> Tensor:
        pair = ({"input_ids": clean[None]}, {"input_ids": corrupted[None]})
        return method(c.f, c.params, *pair, difference, graph=c.graph)

    apart = torch.func.vmap(scores)(c.clean["input_ids"], c.corrupted["input_ids"])
    torch.testing.assert_close(apart, method(*c.ends, difference, graph=c.graph, per_example=True))


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, "autograd"])
def test_scores_have_derivatives_of_their_own(transform: Any) -> None:
    """The score of an edge from a node a = x^2 under the metric y^3 is (0 - x^2) * 3 x^4, with the derivative -18 x^5."""
    f, params = tdhook.functionalize(Square())
    graph = EdgeGraph.of([Writer("a", "square"), Reader("y", "end:in")])
    scores = lambda x: eap(f, params, x, None, lambda out: out[:, 0].pow(3), graph=graph, ablation=0.0)  # noqa: E731
    x = torch.tensor([[2.0]], requires_grad=transform == "autograd")
    assert scores(x).tolist() == [-192.0]
    slope = torch.autograd.grad(scores(x), x)[0] if transform == "autograd" else transform(scores)(x)
    assert slope.flatten().tolist() == [-576.0]


def test_a_list_of_edges_compiles() -> None:
    f, params, graph = micro()
    metric = lambda out: out[:, -1].square().sum(-1)  # noqa: E731
    pair = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    edges = [("1.0", "out"), ("in", "in 0.1")]
    run = lambda a, b: edge_patching(f, params, a, b, metric, graph=graph, edges=edges)  # noqa: E731
    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(*pair), run(*pair))


@pytest.mark.parametrize("method", [eap, eap_ig, edge_patching])
def test_compiled_is_eager(method: Any) -> None:
    f, params, graph = micro()
    metric = lambda out: out[:, -1].square().sum(-1)  # noqa: E731

    def scores(clean: Tensor, corrupted: Tensor) -> Tensor:
        return method(f, params, clean, corrupted, metric, graph=graph)

    pair = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    torch.testing.assert_close(torch.compile(scores, backend="aot_eager", fullgraph=True)(*pair), scores(*pair))


def test_the_mean_over_a_data_set_does_not_depend_on_the_batches() -> None:
    f, params, graph = micro()
    clean, corrupted = torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    metric = lambda out: out[:, -1].square().sum(-1)  # noqa: E731
    scores = lambda a, b: eap(f, params, a, b, metric, graph=graph, per_example=True)  # noqa: E731
    every = scores(clean, corrupted)
    seen: list[tuple[int, int]] = []
    for sizes in ([5], [2, 2, 1]):
        pairs = zip(clean.split(sizes), corrupted.split(sizes))
        found = mean_over_pairs(scores, pairs, progress=lambda *at: seen.append(at))
        torch.testing.assert_close(found.value, every.mean(0))
        torch.testing.assert_close(found.standard_error, every.std(0) / 5**0.5)
    assert seen == [(0, 1), (1, 1), (0, 1), (1, 2), (2, 3), (3, 3)]
    with pytest.raises(InputError, match="batches is empty"):
        mean_over_pairs(scores, [])
    with pytest.raises(InputError, match="per_example=True"):
        mean_over_pairs(lambda a, b: scores(a, b).mean(0), [(clean, corrupted)])
    with pytest.raises(InputError, match="batch 0 of pairs is a float32 tensor"):
        mean_over_pairs(scores, [clean])


def test_a_long_stream_in_half_precision_keeps_its_mean() -> None:
    rows = torch.cat([torch.full((600, 1), 3.0), torch.ones(600, 1)]).bfloat16()
    found = mean_over_pairs(lambda clean, corrupted: corrupted, [(row, row) for row in rows.split(1)])
    assert found.value.dtype == torch.bfloat16 and found.value.item() == 2


def test_bad_requests_say_what_to_give() -> None:
    c = case("llama", heads=False)
    f, params, clean, _ = c.ends
    for method in (eap, edge_patching):
        with pytest.raises(InputError, match="choose prompts of the same length"):
            method(f, params, clean, {"input_ids": clean["input_ids"][:, :4]}, difference, graph=c.graph)
        with pytest.raises(InputError, match="corrupted is None, and so is ablation"):
            method(f, params, clean, None, difference, graph=c.graph)
        with pytest.raises(InputError, match="both given"):
            method(*c.ends, difference, graph=c.graph, ablation=0.0)
        with pytest.raises(InputError, match="ablation is 'mean'"):
            method(f, params, clean, None, difference, graph=c.graph, ablation="mean")
        with pytest.raises(InputError, match="graph is None"):
            method(*c.ends, difference, graph=None)
        with pytest.raises(TargetError, match=r"return a floating-point tensor of shape \[\] or \[B\]"):
            method(*c.ends, lambda out: out.logits, graph=c.graph)
        with pytest.raises(TargetError, match="metric returned one number"):
            method(*c.ends, lambda out: difference(out).mean(), graph=c.graph, per_example=True)
    with pytest.raises(InputError, match="metric is 3"):
        eap(*c.ends, 3, graph=c.graph)
    with pytest.raises(GradientError, match="eap needs gradients"), torch.no_grad():
        eap(*c.ends, difference, graph=c.graph)
    with pytest.raises(InputError, match="path='edges' is unknown; choose from inputs, mask, activations"):
        eap_ig(*c.ends, difference, graph=c.graph, path="edges")
    with pytest.raises(InputError, match="quadrature='simpson' is unknown"):
        eap_ig(*c.ends, difference, graph=c.graph, quadrature="simpson")
    with pytest.raises(InputError, match="path='inputs' goes from clean to corrupted inputs"):
        eap_ig(f, params, clean, None, difference, graph=c.graph, ablation=0.0)
    f, params, graph = micro()
    slices = EdgeGraph.of([Writer("head", "blocks.0.write", axis=2), Reader("out", "output:in")])
    ends = (f, params, torch.ones(1, 1, 2), torch.zeros(1, 1, 2), lambda out: out[:, -1, 0])
    with pytest.raises(InputError, match="path='inputs' moves what the first writer writes, but 'head' is a slice"):
        eap_ig(*ends, graph=slices)
    late = EdgeGraph.of(
        [Writer("in", "input"), Writer("1.0", "blocks.1.write", axis=2), Reader("out", "blocks.0.read", axis=2)]
    )
    with pytest.raises(SiteError, match=r"'out' at 'blocks.0.read' reads before all writers .* order of the run"):
        edge_patching(*ends, graph=late)
    with pytest.raises(InputError, match=r"ablation is .* give a number or a tensor \[5, 1, 1, 2\]"):
        edge_patching(f, params, ends[2], None, ends[4], graph=graph, ablation=torch.zeros(5, 2))
    with pytest.raises(InputError, match="chunk_size"):
        edge_patching(*c.ends, difference, graph=c.graph, chunk_size=0)
    with pytest.raises(InputError, match="edge 99 is out of range; the graph has 15 edges"):
        edge_patching(*c.ends, difference, graph=c.graph, edges=torch.tensor([99]))
    with pytest.raises(InputError, match="edges is empty"):
        edge_patching(*c.ends, difference, graph=c.graph, edges=[])
    with pytest.raises(InputError, match="give an integer tensor"):
        edge_patching(*c.ends, difference, graph=c.graph, edges=torch.ones(3))
