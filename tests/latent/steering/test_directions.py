"""Directions from activations and from prompts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import vmap

import tdhook
from tdhook.core.errors import InputError
from tdhook.latent.probes import logistic
from tdhook.latent.steering import (
    activation_addition,
    add,
    difference_of_means,
    principal_difference,
    probe_direction,
    steering_vectors,
)

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


@pytest.mark.parametrize("pool", ["last", "mean", 0, -2])
def test_padding_on_either_side_does_not_matter(pool: str | int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=20,
        max_position_embeddings=32,
    )
    f, params = tdhook.functionalize(LlamaForCausalLM(config).eval().double(), use_cache=False)
    short, long = torch.randint(3, 20, (2, 4)), torch.randint(3, 20, (2, 6))
    sites = ["model.layers.0", "model.layers.1"]
    expected = steering_vectors(f, params, short, long, sites=sites, pool=pool)
    zeros, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4, dtype=torch.long)
    for order in (1, -1):
        padded = {
            "input_ids": torch.cat([zeros, short][::order], 1),
            "attention_mask": torch.cat([zeros, ones][::order], 1),
        }
        found = steering_vectors(f, params, padded, long, sites=sites, pool=pool)
        for site in sites:
            torch.testing.assert_close(found[site], expected[site])


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
