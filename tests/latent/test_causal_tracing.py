"""Causal tracing against hooked runs with the same noise."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tdhook import functionalize
from tdhook.core import errors
from tdhook.latent.causal_tracing import causal_trace

from .families import model, named
from .hooks import hooked, values_of

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
SITES = {
    "gpt2": ("transformer.wte", "transformer.h.{}", "transformer.h.{}.mlp"),
    "llama": ("model.embed_tokens", "model.layers.{}", "model.layers.{}.mlp"),
    "bert": ("bert.embeddings", "bert.encoder.layer.{}", "bert.encoder.layer.{}.attention.output.dense"),
}


def probability(output):
    return output.logits[:, -1].softmax(-1)[:, 7]


def trace_of(name, seed=0, **options):
    f, params, inputs, _ = named(name)
    embedding, block, _ = SITES[name]
    given = {"embedding": embedding, "subject": [1, 2], "sites": [block.format(layer) for layer in range(2)], "samples": 3}
    generator = torch.Generator().manual_seed(seed)
    return causal_trace(f, params, inputs, probability, generator=generator, **{**given, **options})


def by_hooks(name, sites, window, noise, samples, subject, seed=0):
    """Meng et al.: noise on the embedding of the subject, clean values restored in a window of layers at one token."""
    inputs = named(name)[2]
    embedding = SITES[name][0]
    clean = values_of(model(name), inputs, [embedding, *sites])
    there = clean[embedding][:, subject]
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(samples):
        shift = noise * there.std() * torch.randn(clean[embedding].shape, generator=generator, dtype=torch.float64)

        def noisy(value, shift=shift):
            value[:, subject] = value[:, subject] + shift[:, subject]
            return value

        corrupted = probability(hooked(model(name), inputs, {embedding: noisy})[0])
        grid = []
        for layer in range(len(sites)):
            near = range(max(0, layer - window // 2), min(len(sites), layer - (-window // 2)))
            for token in range(6):

                def restore(value, site, token=token):
                    value[:, token] = clean[site][:, token]
                    return value

                edits = {embedding: noisy, **{sites[i]: partial(restore, site=sites[i]) for i in near}}
                grid.append(probability(hooked(model(name), inputs, edits)[0]))
        rows.append((torch.stack(grid).unflatten(0, (len(sites), 6)), corrupted))
    return tuple(torch.stack(each) for each in zip(*rows))


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize(("kind", "window"), [(1, 1), (2, 2)])
def test_equals_hooked_runs(name, kind, window):
    sites = [SITES[name][kind].format(layer) for layer in range(2)]
    got = trace_of(name, sites=sites, window=window, chunk_size=4)
    restored, corrupted = by_hooks(name, sites, window, 3.0, 3, [1, 2])
    CLOSE(got.restored.value, restored.mean(0))
    CLOSE(got.restored.standard_error, restored.std(0) / 3**0.5)
    CLOSE(got.corrupted.value, corrupted.mean(0))
    effect = restored - corrupted[:, None, None]
    CLOSE(got.indirect_effect.value, effect.mean(0))
    CLOSE(got.indirect_effect.standard_error, effect.std(0) / 3**0.5)
    CLOSE(got.clean, probability(hooked(model(name), named(name)[2], {})[0]))
    CLOSE(got.total_effect, got.clean - corrupted.mean(0))
    assert effect.abs().max() > 1e-4


def test_a_window_of_three_reaches_one_layer_to_each_side():
    f, params = functionalize(nn.Sequential(*(nn.Identity() for _ in range(5))))
    x = torch.zeros(1, 2, 1)
    # Restoring at the identity of any layer in the window restores the output at that token.
    trace = causal_trace(f, params, x, lambda out: out[:, 0, 0], embedding="2", subject=[0], sites="*", window=3, sigma=1.0)
    zero = [bool((row[0] == 0).all()) for row in trace.restored.value]
    # Values written before the noise are overwritten by it: windows [0, 1], [0..2], [1..3], [2..4], [3, 4]
    assert zero == [False, True, True, True, True]


def test_restoring_all_tokens_of_the_embedding_restores_the_clean_run():
    for name in SITES:
        got = trace_of(name, sites=SITES[name][0], axis=None)
        CLOSE(got.restored.value[0], got.clean)


def test_noise_at_the_subject_alone_and_restoring_it_is_all():
    got = trace_of("gpt2", sites="transformer.wte", subject=torch.tensor([[0, 0, 1, 0, 0, 0]] * 2).bool())
    CLOSE(got.restored.value[0, 2], got.clean)
    CLOSE(got.indirect_effect.value[0, [0, 1, 3, 4, 5]], torch.zeros(5, 2).double())


def test_no_noise_is_the_clean_run():
    got = trace_of("llama", noise=0.0)
    CLOSE(got.corrupted.value, got.clean)
    CLOSE(got.restored.value, got.clean.expand_as(got.restored.value))


def test_sigma_in_place_of_the_spread_of_the_embeddings():
    embedded = values_of(model("gpt2"), named("gpt2")[2], ["transformer.wte"])["transformer.wte"][:, [1, 2]]
    CLOSE(trace_of("gpt2", sigma=embedded.std().item()).restored.value, trace_of("gpt2").restored.value)
    other = trace_of("gpt2", sigma=1.0, noise=0.5).restored.value
    CLOSE(other, trace_of("gpt2", sigma=0.25, noise=2.0).restored.value)


def test_the_spread_of_many_numbers_of_a_short_type():
    """The symptom: in float16 a sum over more than 65,504 numbers is infinite, and the noise was zero."""
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Identity()))
    x = 0.5 * torch.randn(1, 2, 40_000, generator=torch.Generator().manual_seed(0)).half()
    spread = lambda out: (out - x).float().std().reshape(1)  # noqa: E731
    got = causal_trace(f, params, x, spread, embedding="0", subject=[0, 1], sites="1", noise=2.0, samples=2, positions=[0])
    torch.testing.assert_close(got.corrupted.value, torch.tensor([1.0]), rtol=0.02, atol=0)
    with pytest.raises(errors.InputError, match=r"the embedding of the subject is one number, .* give sigma"):
        causal_trace(f, params, x[:, :, :1], spread, embedding="0", subject=[0], sites="1")


def test_draws_depend_on_the_generator_alone():
    state = torch.get_rng_state()
    first = trace_of("gpt2")
    CLOSE(trace_of("gpt2", chunk_size=1).restored.value, first.restored.value)
    assert not trace_of("gpt2", seed=1).restored.value.equal(first.restored.value)
    assert torch.equal(torch.get_rng_state(), state)
    assert trace_of("gpt2", samples=1).restored.standard_error.isnan().all()


def test_one_head_restored_and_progress():
    f, params, inputs, found = named("llama")
    seen = []
    got = causal_trace(
        f, params, inputs, lambda out: probability(out).mean(), embedding=found.embedding, subject=[-1],
        sites=found.head_output, axis=-2, samples=2, progress=lambda *state: seen.append(state),
    )  # fmt: skip
    assert got.restored.value.shape == (2, 4) and got.clean.shape == () and seen == [(i, 4) for i in range(5)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"subject": []}, errors.InputError, "subject is empty for an example"),
        ({"subject": [9]}, errors.InputError, r"subject=\[9\] are no indices of 6 tokens"),
        ({"subject": torch.zeros(2, 6).bool()}, errors.InputError, "subject is empty for an example"),
        ({"subject": torch.ones(2, 5).bool()}, errors.InputError, r"give a bool tensor \[B, L\]"),
        ({"window": 0}, errors.InputError, "window is an integer of at least 1"),
        ({"samples": 0}, errors.InputError, "samples is an integer of at least 1"),
        ({"noise": -1.0}, errors.InputError, "noise is a number of at least 0"),
        ({"sigma": "one"}, errors.InputError, "sigma is a number"),
        ({"embedding": "transformer.*"}, errors.SiteError, "embedding takes exact sites"),
        ({"embedding": ["transformer.wte", "transformer.wpe"]}, errors.SiteError, "embedding has 2 sites; give the one"),
        ({"subject": [True, False]}, errors.InputError, r"subject=\[True, False\] are no indices of 6 tokens"),
        ({"subject": 2}, errors.InputError, "subject=2 are no indices of 6 tokens"),
        ({"positions": [7]}, errors.InputError, "positions has 7, out of range"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        trace_of("gpt2", **options)
