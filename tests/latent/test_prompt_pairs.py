"""Prompt pairs: alignment, and patching at any granularity over a data set of them."""

from __future__ import annotations

from collections import UserDict
from functools import partial

import pytest
import torch
from torch import nn

from tdhook import functionalize
from tdhook.core import errors
from tdhook.latent.activation_patching import activation_patching
from tdhook.latent.pair_patching import patch_pairs
from tdhook.latent.prompt_pairs import differing_positions, require_aligned, token_span
from tdhook.latent.subspaces import span

from .families import model, named
from .hooks import hooked, values_of

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def metric(output):
    return output.logits[:, -1, 3] - output.logits[:, -1, 5]


def pairs_of(inputs, count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, 50, (count, 6), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2] = (corrupted[:, 2] + 1) % 50
    return clean, corrupted


# Alignment -------------------------------------------------------------------------------------------------------------


def test_where_pairs_differ():
    clean, corrupted = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 9, 3], [9, 5, 9]])
    expected = [[False, True, False], [True, False, True]]
    assert differing_positions(clean, corrupted).tolist() == expected
    assert differing_positions({"input_ids": clean}, {"input_ids": corrupted}).tolist() == expected


def test_token_spans():
    ids = torch.tensor([[7, 1, 2, 1, 2], [1, 2, 3, 4, 4]])
    assert token_span(ids, [1, 2]).nonzero().tolist() == [[0, 3], [0, 4], [1, 0], [1, 1]]
    assert token_span(ids, [1, 2], occurrence=0).nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [1, 1]]
    assert token_span({"input_ids": ids}, [[7], [4, 4]]).nonzero().tolist() == [[0, 0], [1, 3], [1, 4]]


def test_token_spans_from_tensors():
    ids = torch.tensor([[7, 1, 2], [1, 2, 3]])
    assert token_span(ids, torch.tensor([1, 2])).nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [1, 1]]
    assert token_span(ids, torch.tensor([[7], [3]])).nonzero().tolist() == [[0, 0], [1, 2]]


MASKED = {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}


def test_the_order_of_named_inputs_does_not_matter():
    require_aligned(MASKED, dict(reversed(MASKED.items())))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: require_aligned(torch.ones(1, 3), torch.ones(1, 4)), "choose prompts of the same length"),
        (lambda: require_aligned(MASKED, {**MASKED, "attention_mask": torch.ones(2, 3).long()}), "padded at .* in example 1"),
        (lambda: require_aligned(MASKED, torch.ones(2, 3)), "inputs of the same structure"),
        (lambda: require_aligned({"a": torch.ones(1)}, {"b": torch.ones(1)}), "inputs of the same structure"),
        (lambda: require_aligned((torch.ones(1), None), (torch.ones(1), torch.ones(1))), "inputs of the same structure"),
        # what a tokenizer returns is a mapping, but no dict
        (lambda: require_aligned(UserDict(x=torch.ones(1, 3)), UserDict(x=torch.ones(1, 4))), "prompts of the same length"),
        (
            lambda: differing_positions(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 5], [3, 4]])),
            "pair 1 has no difference",
        ),
        (lambda: differing_positions(torch.ones(1, 2), torch.ones(1, 2)), "give token ids"),
        (lambda: token_span(torch.tensor([[1, 2]]), [3]), r"tokens=\[3\] comes 0 times in example 0"),
        (lambda: token_span(torch.tensor([[1, 2]]), [1], occurrence=1), "comes 1 times"),
        (lambda: token_span(torch.tensor([[1, 2]]), [[1], [2]]), "tokens has 2 sequences for 1 prompts"),
        (lambda: token_span(torch.tensor([[1, 2]]), []), "not empty"),
        (lambda: token_span(torch.tensor([[1, 2]]), 1), "tokens is 1 of type int; give a sequence"),
    ],
)
def test_misaligned_pairs(make, message):
    with pytest.raises(errors.InputError, match=message):
        make()


# Granularity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gpt2", "transformer.h.{}.attn.c_proj:in"),
        ("llama", "model.layers.{}.self_attn.o_proj:in"),
        ("bert", "bert.encoder.layer.{}.attention.output.dense:in"),
    ],
)
def test_heads_tokens_and_neurons_equal_hooks(name, path, direction):
    f, params, inputs, found = named(name)
    clean, corrupted = ({"input_ids": ids[:2]} for ids in pairs_of(inputs))
    source, base = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    run = partial(activation_patching, f, params, clean, corrupted, metric, direction=direction)
    both = run(sites=found.head_output, axis=(2, 1), positions=[None, [-1, 2]])
    heads = run(sites=found.head_output, axis=-2, chunk_size=3)
    features = run(sites=[layout.site for layout in found.head_output], axis=-1, positions=[0, 31])
    assert both.patched.shape == (2, 4, 2, 2) and heads.patched.shape == (2, 4, 2)

    def by_hook(layer, *index):
        site = path.format(layer)
        there = values_of(model(name), source, [site])[site]

        def write(value):
            value[index] = there[index]
            return value

        return metric(hooked(model(name), base, {site: write})[0])

    every = slice(None)
    for layer in range(2):
        for head in range(4):
            features_of_head = slice(8 * head, 8 * head + 8)
            CLOSE(heads.patched[layer, head], by_hook(layer, every, every, features_of_head))
            CLOSE(both.patched[layer, head, 0], by_hook(layer, every, 5, features_of_head))
            CLOSE(both.patched[layer, head, 1], by_hook(layer, every, 2, features_of_head))
        CLOSE(features.patched[layer, 1], by_hook(layer, every, every, 31))


def test_patching_all_of_the_embedding_restores_everything():
    f, params, inputs, found = named("bert")
    clean, corrupted = pairs_of(inputs)
    got = activation_patching(f, params, clean, corrupted, metric, sites=found.embedding, axis=None)
    CLOSE(got.patched[0], got.clean)
    CLOSE(got.normalized, torch.ones_like(got.patched))


def test_no_fraction_of_nothing():
    f, params = functionalize(nn.Sequential(nn.Identity()))
    a = torch.tensor([[1.0, 2], [3, 4]])
    b = torch.tensor([[5.0, 2], [3, 4]])
    got = activation_patching(f, params, a, b, lambda out: out.sum(1), sites="0")
    with pytest.raises(errors.InputError, match="the clean and the corrupted run of example 1 have the same metric"):
        _ = got.normalized
    got = activation_patching(f, params, a, a, lambda out: out.sum(), sites="0")
    with pytest.raises(errors.InputError, match="run have the same metric"):
        _ = got.normalized


# Data sets -------------------------------------------------------------------------------------------------------------


def test_means_and_standard_errors_are_those_of_all_pairs_at_once():
    f, params, inputs, found = named("gpt2")
    clean, corrupted = pairs_of(inputs)
    whole = activation_patching(f, params, clean, corrupted, metric, sites=found.residual_post)
    for size in (1, 3, 7):
        batches = list(zip(clean.split(size), corrupted.split(size)))
        got = patch_pairs(f, params, batches, metric, sites=found.residual_post)
        CLOSE(got.patched.value, whole.patched.mean(-1))
        CLOSE(got.patched.standard_error, whole.patched.std(-1) / 7**0.5)
        CLOSE(got.clean.value, whole.clean.mean())
        CLOSE(got.corrupted.standard_error, whole.corrupted.std() / 7**0.5)
        assert got.pairs == 7
    scaled = patch_pairs(f, params, batches, metric, sites=found.residual_post, normalize=True, direction="noise")
    noise = activation_patching(f, params, clean, corrupted, metric, sites=found.residual_post, direction="noise")
    CLOSE(scaled.patched.value, noise.normalized.mean(-1))


def test_answers_and_lengths_that_vary():
    f, params, inputs, found = named("llama")
    chosen = lambda out, answers: out.logits[:, -1].gather(1, answers[:, None])[:, 0]  # noqa: E731
    batches, rows = [], []
    for length, seed in ((6, 0), (4, 1)):
        clean, corrupted = (ids[:, -length:] for ids in pairs_of(inputs, 2, seed))
        answers = torch.tensor([3, 7])
        batches.append((clean, corrupted, answers))
        metric = partial(chosen, answers=answers)
        rows.append(activation_patching(f, params, clean, corrupted, metric, sites=found.mlp, positions=[-1]).patched)
    got = patch_pairs(f, params, iter(batches), chosen, sites=found.mlp, positions=[-1])
    CLOSE(got.patched.value, torch.cat(rows, -1).mean(-1))
    with pytest.raises(errors.InputError, match="for prompts of different length give positions"):
        patch_pairs(f, params, batches, chosen, sites=found.mlp)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    f, params, inputs, found = named("gpt2")
    clean, corrupted = pairs_of(inputs)
    batches = list(zip(clean.split(2), corrupted.split(2)))
    path = tmp_path / "patching.pt"
    run = partial(patch_pairs, f, params, sites=found.mlp)
    calls = []

    def counted(output):
        calls.append(1)
        return metric(output)

    def broken():
        yield from batches[:2]
        raise Interrupted

    with pytest.raises(Interrupted):
        run(broken(), counted, path=path)
    first = len(calls)
    calls.clear()
    got = run(batches, counted, path=path, resume=True)
    assert len(calls) == first
    expected = run(batches, metric)
    assert all(torch.equal(a, b) for a, b in zip(got.patched, expected.patched)) and got.pairs == 7
    again = run(batches, lambda out: None, path=path, resume=True)  # all is there: nothing runs
    assert again.patched.value.equal(expected.patched.value)

    with pytest.raises(errors.InputError, match="exists; resume=True goes on"):
        run(batches, metric, path=path)
    with pytest.raises(errors.InputError, match="direction='noise' is not what"):
        run(batches, metric, path=path, resume=True, direction="noise")
    with pytest.raises(errors.InputError, match="batch 3 is not what it was"):
        run(batches[::-1], metric, path=path, resume=True)
    with pytest.raises(errors.InputError, match=r"pairs has 2 batches, but path=.* holds 4"):
        run(batches[:2], metric, path=path, resume=True)
    path.write_bytes(b"nonsense")
    with pytest.raises(errors.InputError, match=r"is damaged or was not written by patch_pairs"):
        run(batches, metric, path=path, resume=True)


def test_a_file_knows_its_subspaces_and_answers(tmp_path):
    f, params = functionalize(nn.Sequential(nn.Identity()))
    pairs = [(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([0]))]
    path = tmp_path / "new" / "folder" / "patching.pt"
    metric = lambda out, answers: out.gather(1, answers[:, None])[:, 0]  # noqa: E731
    run = partial(patch_pairs, f, params, metric=metric, sites="0", path=path, axis=None)
    one, two = torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1]])
    first = run(pairs, subspaces=one)
    assert first.patched.value.tolist() == [1] and run(pairs, subspaces=one, resume=True).pairs == 1
    for other in (two, span(one).complement, {"0": two}, None):
        with pytest.raises(errors.InputError, match=r"subspaces=.* is not what"):
            run(pairs, subspaces=other, resume=True)
    with pytest.raises(errors.InputError, match="batch 0 is not what it was"):
        run([(*pairs[0][:2], torch.tensor([1]))], subspaces=one, resume=True)


def test_means_over_many_pairs_are_taken_in_float32_at_least():
    """The symptom: in bfloat16 the running mean stands still after some hundred pairs."""
    f, params = functionalize(nn.Sequential(nn.Identity()))
    pairs = [(torch.full((1, 1), value).bfloat16(), torch.zeros(1, 1).bfloat16()) for value in [1.0] * 400 + [3.0] * 400]
    got = patch_pairs(f, params, pairs, lambda out: out[:, 0], sites="0", axis=None)
    torch.testing.assert_close(got.patched.value, torch.tensor([2.0]))
    torch.testing.assert_close(got.patched.standard_error, torch.tensor([1 / 799**0.5]))


def test_a_metric_of_another_shape_is_told_before_the_sweep():
    f, params = functionalize(nn.Sequential(nn.Identity()))
    calls = []

    def metric(out):
        calls.append(out)
        return out.sum()

    with pytest.raises(errors.TargetError, match=r"metric returned .* for batch 0; return one number for each pair"):
        patch_pairs(f, params, [(torch.ones(1, 2), torch.zeros(1, 2))], metric, sites="0")
    assert len(calls) == 1


def test_progress_counts_batches():
    f, params = functionalize(nn.Sequential(nn.Identity()))
    seen = []
    pairs = [(torch.ones(1, 2), torch.zeros(1, 2))] * 3
    patch_pairs(f, params, pairs, lambda out: out.sum(1), sites="0", progress=lambda *state: seen.append(state))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("pairs", "options", "error", "message"),
    [
        ([], {}, errors.InputError, "give at least one batch"),
        ([torch.ones(1, 2)], {}, errors.InputError, "batch 0 of pairs is a float32 tensor"),
        ([(torch.ones(1, 2), torch.ones(1, 3))], {}, errors.InputError, "patching needs aligned inputs"),
        ([(torch.ones(1, 2),) * 2], {"normalize": True}, errors.InputError, "of example 0 have the same metric"),
        ([(torch.ones(1, 2),) * 2], {"metric": torch.sum}, errors.TargetError, "one number for each pair"),
        ([(torch.ones(1, 2),) * 2], {"direction": "up"}, errors.InputError, "direction='up' is unknown"),
        ([(torch.ones(1, 2),) * 2], {"resume": True}, errors.InputError, "give path"),
        ([(torch.ones(1, 2),) * 2], {"sites": "3"}, errors.SiteError, "unknown site"),
    ],
)
def test_bad_input(pairs, options, error, message):
    f, params = functionalize(nn.Sequential(nn.Identity()))
    given = {"metric": lambda out: out.sum(1), "sites": "0", **options}
    with pytest.raises(error, match=message):
        patch_pairs(f, params, pairs, given.pop("metric"), **given)
