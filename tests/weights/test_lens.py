"""The weight lens and circuits against explicit matrix products."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import vmap

from tdhook import functionalize
from tdhook.core import errors
from tdhook.weights.circuits import Factored, ov_circuit, qk_circuit
from tdhook.weights.lens import outliers, top_tokens, z_scores

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
V, D, H, G, S = 11, 6, 4, 2, 3  # vocabulary, width, heads, key-value heads, head size


def weights():
    torch.manual_seed(0)
    shapes = {"q": (H * S, D), "k": (G * S, D), "v": (G * S, D), "o": (D, H * S), "e": (V, D), "u": (V, D)}
    return {name: torch.randn(shape).double() for name, shape in shapes.items()}


@pytest.mark.parametrize("head", range(H))
def test_ov_and_qk_are_the_explicit_products(head):
    w = weights()
    rows, group = slice(head * S, (head + 1) * S), head // 2
    shared = slice(group * S, (group + 1) * S)
    ov = ov_circuit(w["v"], w["o"], heads=H, kv_heads=G, embedding=w["e"], unembedding=w["u"])
    CLOSE(ov.dense()[head], w["u"] @ w["o"][:, rows] @ w["v"][shared] @ w["e"].mT)
    qk = qk_circuit(w["q"], w["k"], heads=H, kv_heads=G, embedding=w["e"])
    CLOSE(qk.dense()[head], (w["e"] @ w["q"][rows].mT) @ (w["e"] @ w["k"][shared].mT).mT / S**0.5)
    assert ov.shape == qk.shape == (H, V, V)


def test_qk_is_the_score_of_attention_and_ov_what_it_writes():
    """torch's own grouped attention on single tokens: where a token attends to one token only, it writes OV of that token."""
    w = weights()
    x = w["e"]
    q, k, v = ((x @ w[n].mT).reshape(V, -1, S).transpose(0, 1) for n in "qkv")
    k, v = (t.repeat_interleave(2, 0) for t in (k, v))
    CLOSE(qk_circuit(w["q"], w["k"], heads=H, kv_heads=G, embedding=x).dense(), q @ k.mT / S**0.5)
    first = torch.nn.functional.scaled_dot_product_attention(q[:, :1], k[:, :1], v[:, :1])
    written = first.transpose(0, 1).reshape(1, -1) @ w["o"].mT
    ov = ov_circuit(w["v"], w["o"], heads=H, kv_heads=G, embedding=x)
    CLOSE(written[0], ov.dense()[:, :, 0].sum(0))


def test_scales_residual_streams_and_other_keys():
    w = weights()
    raw = qk_circuit(w["q"], w["k"], heads=H, kv_heads=G, scale=1.0)
    assert raw.shape == (H, D, D)
    other = qk_circuit(w["q"], w["k"], heads=H, kv_heads=G, embedding=w["e"], key_embedding=w["u"][:5])
    CLOSE(other.dense(), w["e"] @ raw.dense() @ w["u"][:5].mT / S**0.5)


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
@pytest.mark.parametrize("largest", [True, False])
def test_top_entries_are_those_of_the_dense_matrix(chunk_size, largest):
    w = weights()
    ov = ov_circuit(w["v"], w["o"], heads=H, kv_heads=G, embedding=w["e"], unembedding=w["u"])
    found = ov.top(13, largest=largest, chunk_size=chunk_size)
    expected = ov.dense().flatten(1).topk(13, largest=largest)
    CLOSE(found.values, expected.values)
    CLOSE(found.rows * V + found.columns, expected.indices)
    assert ov.top(V * V).values.shape == (H, V * V)


def test_single_entries_diagonals_and_singular_values():
    w = weights()
    ov = ov_circuit(w["v"], w["o"], heads=H, kv_heads=G, embedding=w["e"], unembedding=w["u"])
    dense = ov.dense()
    rows, columns = torch.tensor([0, 10, 3]), torch.tensor([2, 10, 0])
    CLOSE(ov.entries(rows, columns), dense[:, rows, columns])
    CLOSE(ov.diagonal(), dense.diagonal(dim1=-2, dim2=-1))
    CLOSE(ov.singular_values(), torch.linalg.svdvals(dense)[:, :S])


def test_a_rank_above_the_width():
    matrix = Factored(torch.randn(2, 5).double(), torch.randn(5, 3).double())
    CLOSE(matrix.singular_values(), torch.linalg.svdvals(matrix.dense()))


@pytest.mark.compile
def test_circuits_under_vmap_and_compiled():
    w = weights()

    def top(value, output):
        return ov_circuit(value, output, heads=H, kv_heads=G, embedding=w["e"], unembedding=w["u"]).top(3, chunk_size=4)

    CLOSE(torch.compile(top, backend="aot_eager", fullgraph=True)(w["v"], w["o"]).values, top(w["v"], w["o"]).values)
    layers = vmap(lambda s: top(w["v"] * s, w["o"]))(torch.tensor([1.0, 2.0]).double())
    CLOSE(layers.values[1], 2 * top(w["v"], w["o"]).values)


def test_bad_circuits():
    w = weights()
    with pytest.raises(errors.InputError, match="kv_heads=3 does not divide heads=4"):
        ov_circuit(w["v"], w["o"], heads=4, kv_heads=3)
    with pytest.raises(errors.InputError, match=r"output is .* for 4 heads"):
        ov_circuit(w["v"], w["o"].mT, heads=4, kv_heads=2)
    with pytest.raises(errors.InputError, match=r"value is .* rows are those of 4 heads"):
        ov_circuit(w["v"], w["o"], heads=4)
    with pytest.raises(errors.InputError, match="their heads have the same size"):
        qk_circuit(w["q"], w["k"], heads=2, kv_heads=2)
    with pytest.raises(errors.InputError, match=r"unembedding is .* residual stream of 6"):
        ov_circuit(w["v"], w["o"], heads=4, kv_heads=2, unembedding=w["u"].mT)
    circuit = ov_circuit(w["v"], w["o"], heads=4, kv_heads=2, embedding=w["e"])
    with pytest.raises(errors.InputError, match="k=67 is more than the 66 entries"):
        circuit.top(67)
    with pytest.raises(errors.InputError, match="is not square"):
        circuit.diagonal()


# The lens --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_top_tokens_are_those_of_the_whole_product(chunk_size):
    w = weights()
    vectors, scale = torch.randn(2, 5, D).double(), torch.rand(D).double()
    scores = (vectors * scale) @ w["u"].mT
    found = top_tokens(vectors, w["u"], 4, scale=scale, chunk_size=chunk_size)
    expected = scores.topk(4)
    CLOSE(found.scores, expected.values)
    CLOSE(found.tokens, expected.indices)
    lowest = top_tokens(vectors, w["u"], 4, scale=scale, largest=False)
    CLOSE(lowest.scores, scores.topk(4, largest=False).values)
    centred = top_tokens(vectors[0, 0], w["u"], V, center=True)
    assert centred.tokens.shape == (V,) and centred.scores.sum().abs() < 1e-12


def test_z_scores():
    torch.manual_seed(0)
    _, params = functionalize(nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)).double())
    z = z_scores(params)
    assert list(z.keys(True, True)) == [("0", "weight")]
    weight = params["0", "weight"]
    CLOSE(z["0", "weight"], (weight - weight.mean()) / weight.std(correction=0))
    assert z_scores(params, "1.weight")["1", "weight"].eq(0).all()


def test_outliers_are_found_where_they_are():
    torch.manual_seed(0)
    _, params = functionalize(nn.Linear(30, 20))
    weight = params["weight"].clone()
    weight[3, 7], weight[0, 29] = 9.0, -12.0
    params = params.clone()
    params["weight"] = weight
    found = outliers(params)
    assert list(found) == ["weight"]
    assert found["weight"].places.tolist() == [[0, 29], [3, 7]]
    CLOSE(found["weight"].value, torch.tensor([-12.0, 9.0]))
    assert found["weight"].z[0] < -6 and found["weight"].z[1] > 6
    assert outliers(params, threshold=100.0) == {}


def test_bad_lens():
    w = weights()
    with pytest.raises(errors.InputError, match=r"An output weight \[D, F\] is transposed first"):
        top_tokens(w["o"], w["u"])
    with pytest.raises(errors.InputError, match="k=12 is more than the 11 tokens"):
        top_tokens(w["e"], w["u"], 12)
    with pytest.raises(errors.InputError, match="give the 6 weights of the final norm"):
        top_tokens(w["e"], w["u"], scale=torch.ones(5))
    _, params = functionalize(nn.Linear(3, 2))
    with pytest.raises(errors.InputError, match="threshold is 0"):
        outliers(params, threshold=0)
    with pytest.raises(errors.ParamsError, match="no such parameter"):
        z_scores(params, "weights.0")
