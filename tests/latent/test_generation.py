"""Generation: what transformers generates, with and without a cache, steered or not."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import vmap

import tdhook
from tdhook.core.errors import InputError
from tdhook.latent.generation import Generation, generate
from tdhook.latent.generation.sampling import draw, keep_top_k, keep_top_p
from tdhook.latent.steering import add, at, by_step, clamp, in_order, project_out, replace_component

from .families import ENDS, GROUPED, model, named, plain

CAUSAL = ["gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "phi3", "falcon", "opt", "bloom"]
IDS = torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
PADDED = {"input_ids": torch.where(MASK.bool(), IDS, 0), "attention_mask": MASK}
D = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
LAYER = "model.layers.0"


@cache
def single(name: str) -> nn.Module:
    """In float32: in float64 transformers makes NaN of padding, where it computes the softmax in float32."""
    return copy.deepcopy(model(name)).float()


@cache
def llama() -> tuple[tdhook.FunctionalModel, Any]:
    return tdhook.functionalize(single("llama"))


def reference(net: nn.Module, inputs: dict[str, Tensor], steps: int, **options: Any) -> Tensor:
    """What the model's own `generate` gives."""
    told = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "min_new_tokens": steps, **options}
    return net.generate(**inputs, max_new_tokens=steps, **told)


def both(f: Any, params: Any, inputs: Any, **options: Any) -> tuple[Generation, Generation]:
    return generate(f, params, inputs, cache=True, **options), generate(f, params, inputs, cache=False, **options)


def same(first: Generation, second: Generation) -> None:
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.lengths, second.lengths)
    torch.testing.assert_close(first.log_probabilities, second.log_probabilities)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_padded_batch_equals_the_models_own_generate(name: str) -> None:
    net = single(name)
    f, params = tdhook.functionalize(net)
    expected = reference(net, PADDED, 8)
    cached, uncached = both(f, params, PADDED, max_new_tokens=8)
    assert torch.equal(cached.tokens, expected)
    same(cached, uncached)
    for row in range(3):  # padding makes no difference, and is not needed
        alone = generate(f, params, IDS[row : row + 1, MASK[row] == 1], max_new_tokens=8)
        assert torch.equal(alone.tokens[0, -8:], expected[row, -8:])
        torch.testing.assert_close(alone.log_probabilities[0], cached.log_probabilities[row])


@pytest.mark.parametrize("family", ["Gemma2", "Mistral"])
def test_a_sliding_window_shorter_than_the_text(family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**GROUPED, **ENDS, "sliding_window": 4})
    torch.manual_seed(0)
    net = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    f, params = tdhook.functionalize(net)
    steered = tdhook.intervene(f, {LAYER: add(D, positions=[-1, 8])})
    assert torch.equal(generate(f, params, PADDED, max_new_tokens=10).tokens, reference(net, PADDED, 10))
    same(*both(steered, params, PADDED, max_new_tokens=10))


def test_an_encoder_decoder() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    torch.manual_seed(0)
    net = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval().double()
    f, params = tdhook.functionalize(net)
    inputs = {**PADDED, "decoder_input_ids": torch.zeros(3, 1, dtype=torch.long)}
    expected = reference(net, PADDED, 6)
    for result in both(f, params, inputs, max_new_tokens=6):
        assert torch.equal(result.tokens, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"temperature": 1.5, "top_k": 20}, {"temperature": 1.0, "top_p": 0.6}]
)
def test_sampling_draws_what_the_models_own_generate_draws(name: str, options: dict) -> None:
    net = single(name)
    f, params = tdhook.functionalize(net)
    outer = torch.get_rng_state()
    results = [
        generate(f, params, PADDED, max_new_tokens=8, generator=torch.Generator().manual_seed(5), cache=cached, **options)
        for cached in (True, False, True)
    ]
    assert torch.equal(torch.get_rng_state(), outer)
    same(results[0], results[1])
    same(results[0], results[2])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = reference(net, PADDED, 8, do_sample=True, **{"top_k": 0, "top_p": 1.0, **options})
    assert torch.equal(results[0].tokens, expected)


def test_filters_are_those_of_transformers() -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(200, 30).mul(3).round(decimals=1)  # with ties
    for k in (1, 5, 30, 99):
        assert torch.equal(keep_top_k(scores, k), TopKLogitsWarper(min(k, 30))(None, scores))
    scores = torch.randn(200, 30) * 3
    for p in (1e-6, 0.3, 0.9, 1.0):
        assert torch.equal(keep_top_p(scores, p), TopPLogitsWarper(p)(None, scores))


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    ids = torch.zeros(20000, 1, dtype=torch.long)
    drawn = generate(
        lambda params, x: logits.expand(*x.shape, 4), {}, ids, max_new_tokens=1, temperature=1.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    shares = drawn.tokens[:, 1].bincount(minlength=4) / 20000
    torch.testing.assert_close(shares, logits.exp(), rtol=0, atol=0.015)


EVERYWHERE = {
    "at all positions": lambda n: {n.residual_post[0]: add(D, 2.0)},
    "at the last of the prompt": lambda n: {n.residual_post[0]: add(D, 5.0, positions="last")},
    "at generated positions": lambda n: {n.residual_post[1]: project_out(D, positions="generated")},
    "at columns": lambda n: {n.residual_post[0]: clamp(D, 4.0, positions=[1, -1, 8, 9]), n.attention[1]: add(D, positions=7)},
    "where a mask says": lambda n: {n.residual_post[0]: add(D, 5.0, positions=MASK.bool())},
    "from a position on": lambda n: {n.residual_pre[1]: add(D, 3.0, positions=slice(-2, None))},
    "step by step": lambda n: {n.residual_post[0]: by_step(lambda step: add(D, 5.0 * 0.5**step) if step % 3 else None)},
    "in order": lambda n: {n.residual_post[0]: in_order(add(D, 3.0, positions="last"), at([7, 8], torch.neg), project_out(D))},
    "from another run": lambda n: {n.residual_post[0]: replace_component(D, torch.ones(3, 6, 32), positions="prompt")},
    "heads": lambda n: {n.head_output[1].site: at("generated", lambda value: value * 0)},
    "by a plain function": lambda n: {n.residual_post[0]: lambda value: value + D.float()},
}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("where", EVERYWHERE)
def test_a_cache_changes_nothing_under_interventions(name: str, where: str) -> None:
    f, params = tdhook.functionalize(single(name))
    found = named(name)[3]
    writes = EVERYWHERE[where](found)
    steered = tdhook.capture(tdhook.intervene(f, writes), found.residual_post[1])
    cached, uncached = both(steered, params, PADDED, max_new_tokens=6)
    same(cached, uncached)
    unsteered = generate(f, params, PADDED, max_new_tokens=6)
    assert not torch.allclose(cached.log_probabilities, unsteered.log_probabilities)
    # what each step saw is what one run over all of it sees
    steps = torch.cat([values[found.residual_post[1]] for values in cached.captured], 1)
    whole = uncached.captured[-1][found.residual_post[1]]
    assert len(cached.captured) == 6 and steps.shape == whole.shape == (3, 11, 32)
    torch.testing.assert_close(steps[MASK[:, 0] == 1], whole[MASK[:, 0] == 1])
    torch.testing.assert_close(steps[:, 3:], whole[:, 3:])


def test_a_write_at_a_step_changes_nothing_before_it() -> None:
    f, params = llama()
    before = generate(f, params, IDS, max_new_tokens=8).log_probabilities
    for step in range(8):
        edit = by_step(lambda t, step=step: add(D, 50.0) if t == step else None)
        after = generate(tdhook.intervene(f, {LAYER: edit}), params, IDS, max_new_tokens=8).log_probabilities
        assert torch.equal(after[:, :step], before[:, :step]) and not torch.allclose(after[:, step:], before[:, step:])


def test_positions_are_those_of_one_run_over_the_result() -> None:
    """The oracle: a plain write, by index, in a run over the tokens that came out."""
    f, params = llama()
    result = generate(tdhook.intervene(f, {LAYER: add(D, 4.0, positions=[-2, 7])}), params, IDS, max_new_tokens=5)

    def write(value: Tensor) -> Tensor:
        value[:, [4, 7]] += 4.0 * D
        return value

    logits = tdhook.intervene(f, {LAYER: write})(params, result.tokens[:, :-1]).logits[:, 5:]
    assert torch.equal(logits.argmax(-1), result.tokens[:, 6:])
    expected = logits.log_softmax(-1).gather(-1, result.tokens[:, 6:, None])[..., 0]
    torch.testing.assert_close(result.log_probabilities, expected)


def test_any_pure_function_that_returns_logits() -> None:
    def bigrams(params: Tensor, ids: Tensor) -> Tensor:
        return params[ids]

    table = torch.eye(5).roll(1, 1)  # i is followed by i + 1
    result = generate(bigrams, table, torch.tensor([[0], [3]]), max_new_tokens=4)
    assert result.tokens.tolist() == [[0, 1, 2, 3, 4], [3, 4, 0, 1, 2]]
    torch.testing.assert_close(result.log_probabilities, table.log_softmax(-1).amax(-1)[:4].expand(2, 4))
    named_inputs = generate(lambda p, x: {"logits": p[x["tokens"]]}, table, {"tokens": torch.tensor([[1]])}, max_new_tokens=2)
    assert named_inputs.tokens.tolist() == [[1, 2, 3]]
    assert generate(lambda p, x: (p[x], None), table, torch.tensor([[1]]), max_new_tokens=2, key=0).tokens.tolist() == [
        [1, 2, 3]
    ]


def test_a_plain_torch_model() -> None:
    f, params = tdhook.functionalize(plain())
    edit = add(torch.randn(12, dtype=torch.float64), 3.0, positions="generated")
    ids = IDS % 30
    result = generate(tdhook.intervene(f, {"1": edit}), params, ids, max_new_tokens=4)
    for step in range(4):

        def write(value: Tensor) -> Tensor:
            value[:, 6:] += 3.0 * edit.direction
            return value

        logits = tdhook.intervene(f, {"1": write})(params, ids)[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(result.tokens[:, : 7 + step], ids)


def test_a_sweep_over_strengths_is_one_vmapped_call_with_a_cache() -> None:
    f, params = llama()
    strengths = torch.tensor([0.0, 2.0, 8.0], dtype=torch.float64)

    def run(strength: Tensor) -> Generation:
        return generate(
            tdhook.intervene(f, {LAYER: add(D, strength, positions=slice(-1, None))}), params, PADDED, max_new_tokens=5
        )

    swept = vmap(run)(strengths)
    for i, strength in enumerate(strengths):
        same(Generation(*(part[i] for part in swept[:3])), run(strength))
    assert torch.equal(swept.tokens[0], generate(f, params, PADDED, max_new_tokens=5).tokens)
    assert not torch.equal(swept.tokens[2], swept.tokens[0])


def test_prompts_and_parameters_are_vmapped() -> None:
    f, params = llama()
    one_by_one = vmap(lambda ids: generate(f, params, ids[None], max_new_tokens=4).tokens[0])(IDS)
    assert torch.equal(one_by_one, generate(f, params, IDS, max_new_tokens=4).tokens)
    stacked = torch.stack([params, params * 1.1])
    tokens = vmap(lambda p: generate(f, p, IDS, max_new_tokens=4).tokens)(stacked)
    assert torch.equal(tokens[1], generate(f, params * 1.1, IDS, max_new_tokens=4).tokens)


def test_sampling_is_vmapped_with_the_same_draws() -> None:
    f, params = llama()

    def run(strength: Tensor) -> Tensor:
        steered = tdhook.intervene(f, {LAYER: add(D, strength)})
        generator = torch.Generator().manual_seed(0)
        return generate(steered, params, IDS, max_new_tokens=4, temperature=1.0, generator=generator).tokens

    strengths = torch.tensor([0.0, 5.0], dtype=torch.float64)
    assert torch.equal(vmap(run, randomness="same")(strengths), torch.stack([run(s) for s in strengths]))


def test_stop_tokens_end_a_continuation() -> None:
    f, params = llama()
    free = generate(f, params, IDS, max_new_tokens=8)
    stop = [int(free.tokens[0, 8]), int(free.tokens[1, 6])]
    seen = []
    result = generate(
        f, params, IDS, max_new_tokens=8, stop=stop, pad=0, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[0] == (0, 8) and seen[-1] == (8, 8)
    for row in range(3):
        new = free.tokens[row, 6:].tolist()
        length = next((i + 1 for i, token in enumerate(new) if token in stop), 8)
        assert result.lengths[row] == length
        assert result.tokens[row, 6:].tolist() == new[:length] + [0] * (8 - length)
        torch.testing.assert_close(result.log_probabilities[row, :length], free.log_probabilities[row, :length])
        assert not result.log_probabilities[row, length:].any()
    runs = generate(tdhook.capture(f, LAYER), params, IDS[:1], max_new_tokens=8, stop=stop)
    assert len(runs.captured) == runs.lengths[0] < 8  # what comes after is not run
    assert (runs.tokens[0, 6 + int(runs.lengths[0]) :] == stop[0]).all()
    own = reference(
        single("llama"),
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
        8,
        eos_token_id=stop,
        min_new_tokens=None,
    )
    assert torch.equal(result.tokens[:, : own.shape[1]], own)


def test_log_probabilities_are_differentiable() -> None:
    f, params = tdhook.functionalize(model("gpt2"))

    def total(strength: Tensor) -> Tensor:
        return generate(
            tdhook.intervene(f, {"transformer.h.0": add(D, strength)}), params, IDS, max_new_tokens=3
        ).log_probabilities.sum()

    at_one = torch.tensor(1.0, dtype=torch.float64)
    slope = (total(at_one + 1e-6) - total(at_one - 1e-6)) / 2e-6
    torch.testing.assert_close(torch.func.grad(total)(at_one), slope, rtol=1e-5, atol=1e-7)


def test_bfloat16() -> None:
    f, params = tdhook.functionalize(copy.deepcopy(model("qwen2")).bfloat16())
    result = generate(tdhook.intervene(f, {LAYER: add(D, positions="generated")}), params, PADDED, max_new_tokens=3)
    assert result.log_probabilities.dtype == torch.float32 and result.log_probabilities.isfinite().all()


def test_nothing_of_the_caller_is_changed() -> None:
    f, params = llama()
    inputs = {name: value.clone() for name, value in PADDED.items()}
    weights = params.clone()
    state = torch.get_rng_state()
    edit = add(D, positions="generated")
    steered = tdhook.intervene(f, {LAYER: edit})
    first = generate(steered, params, inputs, max_new_tokens=4)
    same(first, generate(steered, params, inputs, max_new_tokens=4))
    assert all(torch.equal(inputs[name], PADDED[name]) for name in PADDED) and list(inputs) == list(PADDED)
    assert (params == weights).all() and torch.equal(torch.get_rng_state(), state) and edit.where is None


@pytest.mark.compile
def test_compiled_without_a_cache() -> None:
    f, params = tdhook.functionalize(nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 30)).double())

    def run(params: Any, ids: Tensor) -> Tensor:
        return generate(tdhook.intervene(f, {"0": add(D[:12], positions="last")}), params, ids, max_new_tokens=2).tokens

    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(params, IDS % 30), run(params, IDS % 30))


def test_more_tokens_than_positions() -> None:
    f, params = tdhook.functionalize(model("gpt2"))
    assert generate(f, params, IDS[:1], max_new_tokens=35).tokens.shape == (1, 41)
    with pytest.raises(
        InputError, match=r"6 tokens of a prompt and 36 new ones .* 40 positions; give max_new_tokens=35 at most"
    ):
        generate(f, params, IDS, max_new_tokens=36)
    with pytest.raises(InputError, match="a prompt of 60 tokens is too long for a model of 40 positions"):
        generate(f, params, IDS.repeat(1, 10), max_new_tokens=1)
    with pytest.raises(InputError, match="give max_new_tokens=3 at most"):
        generate(lambda p, x: x, {}, IDS, max_new_tokens=9, position_limit=8)


def test_bad_requests_say_what_to_give() -> None:
    f, params = llama()
    without, _ = tdhook.functionalize(model("llama"), use_cache=False)
    flat, table = tdhook.functionalize(plain())
    for inputs, message in [
        (IDS[0], r"input_ids is .*\[6\]; give token ids, an integer tensor \[B, L\]"),
        (IDS.double(), "input_ids is a float64 tensor"),
        (IDS[:, :0], r"input_ids is .*\[3, 0\]"),
        (IDS[:0], r"input_ids is .*\[0, 6\]; give token ids"),
        ({"tokens": IDS, "mask": MASK}, "one of them has to be called 'input_ids'"),
        ({"input_ids": IDS, "past_key_values": None}, "give the whole prompt"),
        ({"input_ids": IDS, "attention_mask": MASK.flip(1)}, "pad on the left"),
        ({"input_ids": IDS, "attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1]] * 3)}, "attention_mask has a gap"),
        ({"input_ids": IDS, "attention_mask": MASK[:, 1:]}, r"attention_mask is .*give one of the same shape"),
        ({"input_ids": IDS, "position_ids": MASK[:, 1:]}, r"position_ids is .*give \[B, L\]"),
    ]:
        with pytest.raises(InputError, match=message):
            generate(f, params, inputs, max_new_tokens=2)
    for options, message in [
        ({"max_new_tokens": 0}, "max_new_tokens is an integer of at least 1"),
        ({"temperature": -1.0}, "temperature is a number of at least 0"),
        ({"top_k": 3}, "top_k is given, but temperature=0 draws nothing"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is an integer of at least 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "generator": 3}, "generator is 3"),
        ({"stop": []}, r"stop is \[\]"),
        ({"stop": -1}, "stop is -1"),
        ({"pad": 3}, "pad=3 follows a stop token"),
        ({"stop": 1, "pad": -3}, "pad is -3"),
        ({"cache": "yes"}, "cache is 'yes'"),
        ({"position_limit": 0}, "position_limit"),
        ({"key": "scores"}, "which has no 'scores'; give key"),
        ({"logits_processor": 3}, "logits_processor is 3"),
        ({"logits_processor": lambda tokens, logits: logits[0]}, r"logits_processor returned .*return logits \[B, V\]"),
    ]:
        with pytest.raises(InputError, match=message):
            generate(f, params, IDS, **{"max_new_tokens": 2, **options})
    with pytest.raises(InputError, match="the model was made with use_cache=False"):
        generate(without, params, IDS, max_new_tokens=2, cache=True)
    with pytest.raises(InputError, match="the model takes no past_key_values"):
        generate(flat, table, IDS % 30, max_new_tokens=2, cache=True)
    with pytest.raises(InputError, match="has no past_key_values; give cache=False"):
        generate(lambda p, x: torch.ones(3, 1, 4), {}, {"input_ids": IDS}, max_new_tokens=2, cache=True)
    with pytest.raises(InputError, match=r"the logits are .*; a language model returns \[B, S, V\]"):
        generate(lambda p, x: torch.ones(3, 4), {}, IDS, max_new_tokens=2)
    with pytest.raises(InputError, match="positions has 7, out of range for 6 positions and 1 after it"):
        generate(tdhook.intervene(f, {LAYER: add(D, positions=[7])}), params, IDS, max_new_tokens=2)


def test_a_site_that_does_not_count_positions_is_refused() -> None:
    """OPT's MLP flattens the batch and the positions, so that nobody can tell which is which."""
    f, params = tdhook.functionalize(model("opt"))
    steered = tdhook.intervene(f, {"model.decoder.layers.0.fc2": add(D, positions="generated")})
    with pytest.raises(InputError, match=r"of 6 positions that are run the site holds a float64 tensor of shape \[18, 32\]"):
        generate(steered, params, PADDED, max_new_tokens=2)


def test_nested_captures_are_kept_apart() -> None:
    f, params = llama()
    write = tdhook.intervene(tdhook.capture(f, LAYER), {LAYER: add(D)})
    result = generate(tdhook.capture(write, LAYER), params, IDS, max_new_tokens=2)
    after, before = result.captured[1]
    torch.testing.assert_close(after[LAYER], (before[LAYER] + D).float())


@pytest.mark.parametrize("processor", ["repetition", "repeated words", "both"])
def test_processors_of_logits_are_those_of_transformers(processor: str) -> None:
    from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    f, params = llama()
    told = {"repetition": {"repetition_penalty": 1.8}, "repeated words": {"no_repeat_ngram_size": 2}}
    made = {"repetition": RepetitionPenaltyLogitsProcessor(1.8), "repeated words": NoRepeatNGramLogitsProcessor(2)}
    names = list(made) if processor == "both" else [processor]
    function = LogitsProcessorList([made[name] for name in names])
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    expected = reference(single("llama"), inputs, 12, **{key: value for name in names for key, value in told[name].items()})
    free, result = (generate(f, params, IDS, max_new_tokens=12, logits_processor=each) for each in (None, function))
    assert torch.equal(result.tokens, expected) and not torch.equal(free.tokens, expected)
    logits = f(params, result.tokens).logits[:, 5:-1]  # as they were before
    expected = logits.log_softmax(-1).gather(-1, result.tokens[:, 6:, None])[..., 0]
    torch.testing.assert_close(result.log_probabilities, expected)


def test_a_processor_that_writes_in_place_changes_the_choice_and_nothing_else() -> None:
    def processor(tokens: Tensor, logits: Tensor) -> Tensor:
        logits[:, tokens[0, -1] + 1] = -torch.inf
        return logits

    table = torch.eye(6).roll(1, 1)
    ids = torch.tensor([[0, 1]])
    result = generate(lambda p, x: p[x], table, ids, max_new_tokens=1, logits_processor=processor)
    assert result.tokens.tolist() == [[0, 1, 0]] and torch.equal(table, torch.eye(6).roll(1, 1))
    torch.testing.assert_close(result.log_probabilities, table[1].log_softmax(-1)[:1, None])


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_draws_of_a_vmap(randomness: str) -> None:
    """Of equal prompts, or of equal beginnings that are steered later, the same draws or different ones."""
    f, params = llama()

    def of_prompt(ids: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return generate(f, params, ids[None], max_new_tokens=6, temperature=2.0, generator=generator).tokens[0]

    def later(strength: Tensor) -> Tensor:
        steered = tdhook.intervene(f, {LAYER: add(D, strength, positions="generated")})
        return generate(steered, params, IDS[:1], max_new_tokens=6, temperature=2.0).tokens[0]

    count = 1 if randomness == "same" else 5
    assert len(vmap(of_prompt, randomness=randomness)(IDS[:1].expand(5, -1)).unique(dim=0)) == count
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = vmap(later, randomness=randomness)(torch.zeros(5))
    assert len(tokens.unique(dim=0)) == count


def test_draws_that_a_vmap_forbids_are_refused() -> None:
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda scale: draw(torch.ones(2, 3) * scale, None))(torch.ones(4))


def test_types_of_tokens_go_on_with_the_last() -> None:
    """GPT-2 adds the embedding of the type: types of another length than the tokens would be spread over the batch."""
    f, params = tdhook.functionalize(single("gpt2"))
    types = torch.tensor([[7, 7, 8, 8, 9, 9], [7, 8, 9, 7, 8, 3], [4, 4, 4, 4, 4, 4]])
    inputs = {**PADDED, "token_type_ids": types}
    expected = reference(single("gpt2"), inputs, 6)
    for result in both(f, params, inputs, max_new_tokens=6):
        assert torch.equal(result.tokens, expected)
    assert not torch.allclose(
        result.log_probabilities, generate(f, params, PADDED, max_new_tokens=6).log_probabilities, atol=1e-3
    )
    with pytest.raises(InputError, match=r"token_type_ids is .*\[3, 5\] for token ids of shape \[3, 6\]"):
        generate(f, params, {**PADDED, "token_type_ids": types[:, 1:]}, max_new_tokens=2)


def test_prompts_in_a_tensordict_whose_batch_size_counts_positions() -> None:
    f, params = llama()
    expected = generate(f, params, PADDED, max_new_tokens=4)
    for size in ([], [3], [3, 6]):
        for result in both(f, params, TensorDict(PADDED, batch_size=size), max_new_tokens=4):
            same(result, expected)


def test_a_plain_function_around_a_model() -> None:
    """It cannot be asked what it takes, so that a cache that it would not be given is refused."""
    f, params = llama()
    expected = generate(f, params, IDS, max_new_tokens=5)
    same(generate(lambda p, x: f(p, x), params, IDS, max_new_tokens=5), expected)
    for cached in (True, False, None):
        same(generate(lambda p, x: f(p, x), params, {"input_ids": IDS}, max_new_tokens=5, cache=cached), expected)
    with pytest.raises(InputError, match="cache=True, but a cache goes along by name"):
        generate(lambda p, x: f(p, x), params, IDS, max_new_tokens=5, cache=True)


def test_logits_that_are_no_numbers_are_refused() -> None:
    f, params = llama()
    steered = tdhook.intervene(f, {LAYER: at("generated", lambda value: value * torch.nan)})
    with pytest.raises(InputError, match="the logits of prompt 0 at step 1 hold NaN"):
        generate(steered, params, IDS, max_new_tokens=4)
    table = torch.zeros(5, 5)
    table[1] = torch.nan
    table[0, 1] = 1.0  # a prompt that has ended is of no interest
    result = generate(lambda p, x: p[x], table, torch.tensor([[0], [2]]), max_new_tokens=3, stop=1)
    assert result.tokens.tolist()[0] == [0, 1, 1, 1] and result.lengths.tolist() == [1, 2]


def test_positions_that_never_come_are_refused_before_anything_is_run() -> None:
    f, params = llama()

    def never(value: Tensor) -> Tensor:
        raise AssertionError

    for positions in ([7], torch.ones(9, dtype=torch.bool)):
        steered = tdhook.intervene(f, {"model.embed_tokens": never, LAYER: add(D, positions=positions)})
        with pytest.raises(InputError, match=r"positions (has 7, out of range|is a mask of 9 positions)"):
            generate(steered, params, IDS, max_new_tokens=2)
