"""Directions from activations and from prompts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import vmap
from transformers import LlamaConfig, LlamaForCausalLM

import tdhook
from tdhook.core.errors import InputError, SiteError
from tdhook.latent.probes import logistic
from tdhook.latent.steering import (
    activation_addition,
    add,
    difference_of_means,
    principal_difference,
    probe_direction,
    steering_vectors,
)

from ..families import model

P, N = torch.randn(6, 4, dtype=torch.float64) + 1, torch.randn(6, 4, dtype=torch.float64)


def language_model() -> tuple[tdhook.FunctionalModel, object]:
    torch.manual_seed(0)
    return tdhook.functionalize(nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 20)).double())


def test_the_difference_of_means_of_pairs_is_the_mean_of_differences() -> None:
    torch.testing.assert_close(difference_of_means(P, N), (P - N).mean(0))
    torch.testing.assert_close(difference_of_means(P, N[:3]), P.mean(0) - N[:3].mean(0))


def test_the_principal_difference_maximises_the_projections_and_points_to_the_positive() -> None:
    direction = principal_difference(P, N)
    assert direction.norm().isclose(torch.ones(()).double()) and direction @ (P - N).mean(0) > 0
    energy = ((P - N) @ direction).square().sum()
    others = nn.functional.normalize(torch.randn(500, 4, dtype=torch.float64), dim=-1)
    assert (energy >= ((P - N) @ others.T).square().sum(0)).all()
    torch.testing.assert_close(principal_difference(N, P), -direction)


def test_differences_that_are_all_the_same_are_found() -> None:
    """A centred analysis sees nothing here."""
    constant = torch.tensor([0.0, 3.0, 0.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(principal_difference(N + constant, N), constant / 5)


@pytest.mark.parametrize("fit", [difference_of_means, principal_difference])
def test_layers_are_batched(fit: object) -> None:
    positive, negative = torch.randn(3, 6, 4), torch.randn(3, 6, 4)
    expected = torch.stack([fit(p, n) for p, n in zip(positive, negative)])
    torch.testing.assert_close(fit(positive, negative), expected)
    torch.testing.assert_close(vmap(fit)(positive, negative), expected)
    assert fit(positive.bfloat16(), negative.bfloat16()).dtype == torch.bfloat16


def test_a_probe_points_to_the_positive() -> None:
    direction = probe_direction(logistic)(P + 3, N)
    assert direction.shape == (4,) and direction @ difference_of_means(P + 3, N) > 0
    torch.testing.assert_close(probe_direction(lambda x, y: x[y == 1].sum(0))(P, N), P.sum(0))


def test_vectors_of_all_layers_come_from_one_run() -> None:
    f, params = language_model()
    positive, negative = torch.randint(0, 20, (5, 3)), torch.randint(0, 20, (4, 6))
    found = steering_vectors(f, params, positive, negative, sites="*")
    assert list(found.keys()) == ["0", "1", "2"]
    for site in found.keys():
        a, b = (tdhook.stop_at(f, site)(params, ids)[:, -1].mean(0) for ids in (positive, negative))
        torch.testing.assert_close(found[site], a - b)
    for size in (1, 2, 100):
        again = steering_vectors(f, params, positive, negative, sites="*", chunk_size=size)
        torch.testing.assert_close(again["1"], found["1"])


def test_adding_the_difference_moves_the_mean_of_one_set_to_that_of_the_other() -> None:
    f, params = language_model()
    positive, negative = torch.randint(0, 20, (5, 3)), torch.randint(0, 20, (5, 3))
    vector = steering_vectors(f, params, positive, negative, sites="1")["1"]
    moved = tdhook.capture(tdhook.intervene(f, {"1": add(vector, positions="last")}), "1")(params, negative)[1]["1"]
    torch.testing.assert_close(moved[:, -1].mean(0), tdhook.stop_at(f, "1")(params, positive)[:, -1].mean(0))


@cache
def llama() -> tuple[tdhook.FunctionalModel, Any]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    return tdhook.functionalize(LlamaForCausalLM(LlamaConfig(**sizes)).eval().double(), use_cache=False)


SHORT, LONG = torch.randint(3, 20, (2, 4)), torch.randint(3, 20, (2, 6))
ZEROS, ONES = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4, dtype=torch.long)
LAYERS = ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("pool", ["last", "mean", "max", 0, -2, "rows"])
def test_padding_on_either_side_does_not_matter(pool: str | int, skip: int) -> None:
    f, params = llama()
    options = {"sites": LAYERS, "pool": pool, "skip": skip}
    expected = steering_vectors(f, params, SHORT, LONG, **options)
    for order in (1, -1):
        padded = {
            "input_ids": torch.cat([ZEROS, SHORT][::order], 1),
            "attention_mask": torch.cat([ZEROS, ONES][::order], 1),
        }
        given = TensorDict(padded, batch_size=[2])
        for inputs, chunk_size in [(padded, None), (padded, 1), (given, None), (given, 1)]:
            found = steering_vectors(f, params, inputs, LONG, chunk_size=chunk_size, **options)
            for site in LAYERS:
                torch.testing.assert_close(found[site], expected[site])


def test_the_first_tokens_are_left_out() -> None:
    f, params = language_model()
    table = params["0", "weight"]
    positive, negative = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8], [9, 10]])
    padded = {"input": torch.tensor([[1, 2, 3], [0, 5, 6]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}

    def direction(positive: Any, model: Any = f, **options: Any) -> Tensor:
        return steering_vectors(model, params, positive, negative, sites="0", **options)["0"]

    expected = table[[2, 3, 5, 6]].mean(0) - table[[8, 10]].mean(0)
    torch.testing.assert_close(direction(positive, pool="mean", skip=1), expected)
    torch.testing.assert_close(direction(positive, pool=0, skip=1), table[[2, 5]].mean(0) - table[[8, 10]].mean(0))
    torch.testing.assert_close(direction(positive, skip=1), direction(positive))
    assert torch.equal(direction(positive, pool="mean"), direction(positive, pool="mean", skip=0))

    class Masked(nn.Sequential):
        def forward(self, input: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(input)

    masked, _ = tdhook.functionalize(Masked(nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 20)).double())
    expected = (table[[2, 3]].mean(0) + table[6]) / 2 - table[[8, 10]].mean(0)
    torch.testing.assert_close(direction(padded, masked, pool="mean", skip=1), expected)
    for options in ({"pool": "mean"}, {"pool": "mean", "chunk_size": 1}):
        with pytest.raises(InputError, match="positive has a prompt of 2 tokens, padding aside; with skip=2 each needs 3"):
            direction(padded, masked, skip=2, **options)
    with pytest.raises(InputError, match="negative has a prompt of 2 tokens, padding aside; with skip=2 each needs 3"):
        direction(positive, skip=2)
    with pytest.raises(InputError, match="skip is an integer of at least 0"):
        direction(positive, skip=-1)
    with pytest.raises(InputError, match="skip=1 leaves positions out of a pool, and pool=None keeps them all"):
        direction(positive, pool=None, skip=1)


def test_positions_that_a_model_finds_in_the_tokens_are_left_to_it() -> None:
    """RoBERTa counts from 2 on: the positions of a mask, which count from 0, are others."""
    f, params = tdhook.functionalize(model("roberta"))
    ids, site = torch.randint(3, 50, (2, 4)), "roberta.encoder.layer.0"
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = tdhook.stop_at(f, site)(params, ids)[:, -1].mean(0)
    zero = {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])}
    found = steering_vectors(f, params, whole, zero, sites=site, fit=lambda positive, negative: positive.mean(0))
    torch.testing.assert_close(found[site], expected)


def test_rows_that_are_no_vectors_are_refused() -> None:
    """A fit would take the examples, or the heads, for layers."""
    f, params = language_model()
    ids = torch.randint(0, 20, (2, 3))
    with pytest.raises(InputError, match=r"pool=None makes .*\[2, 3, 4\] of .* at '0', and fits are to rows \[N, D\]"):
        steering_vectors(f, params, ids, ids, sites="0", pool=None)
    mlp, weights = tdhook.functionalize(nn.Linear(4, 3).double())
    x = torch.randn(5, 4, dtype=torch.float64)
    found = steering_vectors(mlp, weights, x, -x, sites=":out", pool=None)[":out"]
    torch.testing.assert_close(found, 2 * x.mean(0) @ weights["weight"].T)
    with pytest.raises(InputError, match=r"positive is .*\[2, 5, 4\]; a probe is fitted to \[N, D\]"):
        probe_direction(logistic)(x.expand(2, 5, 4), x.expand(2, 5, 4))
    shared, weights = tdhook.functionalize(Shared())
    with pytest.raises(SiteError, match=r"site 'shared' holds .*\[1, 3, 4\] for 2 prompts"):
        steering_vectors(shared, weights, ids, ids, sites="shared")


class Shared(nn.Module):
    """A value that all examples share, as the positions of some models are."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(3, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return ids[..., None] + self.shared(torch.arange(3)[None])


def test_activation_addition_of_one_pair_is_added_token_by_token() -> None:
    f, params = language_model()
    love, hate = torch.tensor([[3, 7]]), torch.tensor([[4, 9]])
    found = activation_addition(f, params, love, hate, sites=["0", "1"])
    table = params["0", "weight"]
    torch.testing.assert_close(found["0"], table[[3, 7]] - table[[4, 9]])
    prompt = torch.tensor([[1, 2, 5], [6, 6, 6]])
    steered = tdhook.intervene(f, {"0": add(found["0"], 5.0, positions=slice(0, 2))})
    added = torch.cat([5 * found["0"], torch.zeros(1, 4).double()])
    torch.testing.assert_close(steered(params, prompt), tdhook.intervene(f, {"0": lambda v: v + added})(params, prompt))


def test_bad_sets_say_what_to_give() -> None:
    f, params = language_model()
    ids = torch.randint(0, 20, (2, 3))
    with pytest.raises(InputError, match=r"positive is .*give floating-point activations \[N, D\]"):
        difference_of_means(P.long(), N)
    with pytest.raises(InputError, match=r"negative is .*\[0, 4\]"):
        difference_of_means(P, N[:0])
    with pytest.raises(InputError, match="their features differ"):
        difference_of_means(P, N[:, :2])
    with pytest.raises(InputError, match="principal_difference takes pairs"):
        principal_difference(P, N[:2])
    with pytest.raises(InputError, match="fit is 3"):
        probe_direction(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fit is None"):
        steering_vectors(f, params, ids, ids, sites="0", fit=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"what fit returned is 1\.0"):
        steering_vectors(f, params, ids, ids, sites="0", fit=lambda p, n: 1.0)
    with pytest.raises(InputError, match="pool='first' is unknown"):
        steering_vectors(f, params, ids, ids, sites="0", pool="first")
    with pytest.raises(InputError, match=r"negative is .*of the same number of prompts"):
        steering_vectors(f, params, ids, {"input": ids, "other": ids[:1]}, sites="0")
    with pytest.raises(InputError, match="chunk_size"):
        steering_vectors(f, params, ids, ids, sites="0", chunk_size=0)
    with pytest.raises(InputError, match="the same number of tokens"):
        activation_addition(f, params, ids[:1], ids[:1, :2], sites="0")
    with pytest.raises(InputError, match="give one prompt each"):
        activation_addition(f, params, ids, ids, sites="0")
    linear, weights = tdhook.functionalize(nn.Linear(4, 3).double())
    with pytest.raises(SiteError, match=r"site ':out' holds .*\[1, 3\].*; choose one of \[1, P, D\]"):
        activation_addition(linear, weights, P[:1], P[:1], sites=":out")


@pytest.mark.compile
@pytest.mark.parametrize(
    "options", [{"pool": "last"}, {"pool": "mean", "skip": 1}, {"pool": "max", "fit": principal_difference}]
)
def test_compiled(options: dict[str, Any]) -> None:
    f, params = language_model()

    def run(params: Any, positive: Tensor, negative: Tensor) -> Tensor:
        return steering_vectors(f, params, positive, negative, sites="0", chunk_size=2, **options)["0"]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(params, LONG, LONG.flip(1))
    torch.testing.assert_close(compiled, run(params, LONG, LONG.flip(1)))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.embedding(input_ids)


@pytest.mark.compile
@pytest.mark.parametrize("pool", ["last", 1, "mean"])
def test_compiled_and_vmapped_over_masks(pool: Any) -> None:
    f, params = tdhook.functionalize(Masked())
    ids, mask = torch.randint(0, 9, (2, 3, 5)), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])

    def run(mask: Tensor) -> Tensor:
        prompts = [{"input_ids": each, "attention_mask": mask} for each in ids]
        return steering_vectors(f, params, *prompts, sites="embedding", pool=pool)["embedding"]

    expected = torch.stack([run(mask), run(mask.flip(0))])
    torch.testing.assert_close(torch.vmap(run)(torch.stack([mask, mask.flip(0)])), expected)
    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(mask), expected[0])
    if pool == 1:
        short = torch.tensor([[0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
        assert torch.vmap(run)(torch.stack([mask, short])).isnan().all(1).tolist() == [False, True]
