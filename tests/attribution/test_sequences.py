"""Attribution of generated tokens against a loop of truncated forwards, and its targets against closed forms."""

from __future__ import annotations

import copy
from functools import cache, partial

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import vmap

from tdhook import functionalize
from tdhook.attribution.ablation import feature_ablation
from tdhook.attribution.integrated_gradients import integrated_gradients
from tdhook.attribution.saliency import input_x_gradient, saliency
from tdhook.attribution.sequences import sequence_attribution
from tdhook.attribution.token_targets import entropy, kl_divergence, next_tokens
from tdhook.attribution.words import aggregate_tokens, word_groups
from tdhook.core import errors

# vmap runs torch's fused attention for the CPU in a loop, and says so
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
VOCABULARY = 40


@cache
def llama(attention="sdpa"):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


@cache
def gpt2(attention="sdpa"):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    return GPT2LMHeadModel(config).double().eval().requires_grad_(False)


SITES = {llama: "model.embed_tokens", gpt2: "transformer.wte"}
MODELS = pytest.mark.parametrize("make", [llama, gpt2])
torch.manual_seed(1)
IDS = torch.randint(1, VOCABULARY, (3, 9))
OTHER = (IDS[:, 5:] + 7) % VOCABULARY
START = 5


def functional(make, attention="sdpa"):
    return functionalize(make(attention), use_cache=False)


def by_loop(model, ids, start, quantity, times_input=True):
    """One truncated forward for each generated token: gradients [G, B, L, D] of `quantity(logits [B, V], place)`."""
    embeddings = model.get_input_embeddings()(ids).detach()
    rows = []
    for place in range(start, ids.shape[1]):
        leaf = embeddings[:, :place].clone().requires_grad_()
        logits = model(inputs_embeds=leaf, use_cache=False).logits[:, -1]
        (gradient,) = torch.autograd.grad(quantity(logits, place).sum(), leaf)
        product = gradient * leaf.detach() if times_input else gradient
        rows.append(F.pad(product, (0, 0, 0, ids.shape[1] - place)))
    return torch.stack(rows)


def picked(values, ids):
    return values[torch.arange(len(values)), ids]


OF_LOGITS = {
    "logit": lambda logits: logits,
    "probability": lambda logits: logits.exp() / logits.exp().sum(-1, keepdim=True),
    "log_probability": lambda logits: logits - logits.exp().sum(-1, keepdim=True).log(),
}


# The matrix ---------------------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("quantity", OF_LOGITS)
def test_equals_one_truncated_forward_per_token(make, quantity):
    f, params = functional(make)
    got = sequence_attribution(f, params, IDS, at=SITES[make], start=START, quantity=quantity)
    assert got.shape == (3, 4, 9)
    expected = by_loop(make(), IDS, START, lambda logits, p: picked(OF_LOGITS[quantity](logits), IDS[:, p]))
    CLOSE(got, expected.sum(-1).transpose(0, 1))


@MODELS
def test_no_token_depends_on_itself_or_on_later_ones(make):
    f, params = functional(make)
    for start in (1, 4, 8):
        got = sequence_attribution(f, params, IDS, at=SITES[make], start=start)
        assert got.shape == (3, 9 - start, 9)
        assert torch.equal(got != 0, torch.ones(3, 9 - start, 9).tril(start - 1).bool())


@MODELS
@pytest.mark.parametrize("quantity", ["logit", "log_probability", "probability"])
def test_this_token_instead_of_that(make, quantity):
    f, params = functional(make)
    run = partial(sequence_attribution, f, params, IDS, at=SITES[make], start=START, quantity=quantity)

    def difference(logits, p):
        values = OF_LOGITS[quantity](logits)
        return picked(values, IDS[:, p]) - picked(values, OTHER[:, p - START])

    CLOSE(run(against=OTHER), by_loop(make(), IDS, START, difference).sum(-1).transpose(0, 1))
    CLOSE(run(against=OTHER[0]), run(against=OTHER[:1].expand(3, -1)))


def test_a_difference_of_log_probabilities_is_one_of_logits():
    f, params = functional(llama)
    run = partial(sequence_attribution, f, params, IDS, at=SITES[llama], start=START, against=OTHER)
    CLOSE(run(quantity="log_probability"), run(quantity="logit"))


@MODELS
def test_entropy_equals_the_loop(make):
    f, params = functional(make)
    got = sequence_attribution(f, params, IDS, at=SITES[make], start=START, quantity="entropy")

    def closed(logits, p):
        p = OF_LOGITS["probability"](logits)
        return -(p * p.log()).sum(-1)

    CLOSE(got, by_loop(make(), IDS, START, closed).sum(-1).transpose(0, 1))


@MODELS
def test_divergence_from_the_run_of_another_prompt_equals_the_loop(make):
    """The other prompt is two tokens shorter."""
    f, params = functional(make)
    other = torch.cat([(IDS[:, : START - 2] + 1) % VOCABULARY, IDS[:, START:]], 1)
    reference = make()(other).logits
    target = kl_divergence(reference, START)
    got = sequence_attribution(f, params, IDS, at=SITES[make], start=START, quantity=target)

    def closed(logits, place):
        r, p = (OF_LOGITS["probability"](x) for x in (reference[:, place - 3], logits))
        return (r * (r / p).log()).sum(-1)

    CLOSE(got, by_loop(make(), IDS, START, closed).sum(-1).transpose(0, 1))


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("sum", lambda a: a.sum(-1)),
        ("norm", lambda a: a.square().sum(-1).sqrt()),
        ("absolute_sum", lambda a: a.abs().sum(-1)),
        (lambda a: a.amax(-1), lambda a: a.max(-1).values),
    ],
)
def test_reductions_of_the_embedding_axis(reduce, expected):
    f, params = functional(llama)
    signed = partial(saliency, absolute=False)
    got = sequence_attribution(f, params, IDS, at=SITES[llama], start=START, method=signed, reduce=reduce)
    loop = by_loop(llama(), IDS, START, lambda logits, p: picked(logits, IDS[:, p]), times_input=False)
    CLOSE(got, expected(loop).transpose(0, 1))


def test_integrated_gradients_equal_captum_token_by_token():
    f, params = functional(llama)
    base = torch.full_like(IDS, 2)
    method = partial(integrated_gradients, baselines=base, steps=5)
    got = sequence_attribution(f, params, IDS, at=SITES[llama], start=7, method=method, quantity="log_probability")
    model = llama()
    last = captum.attr.LayerIntegratedGradients(
        lambda ids: model(ids, use_cache=False).logits[:, -1].log_softmax(-1), model.model.embed_tokens
    )
    for row, place in zip(got.transpose(0, 1), (7, 8)):
        expected = last.attribute(IDS[:, :place], base[:, :place], target=IDS[:, place], n_steps=5).sum(-1)
        # captum rounds its step sizes to float32
        torch.testing.assert_close(row[:, :place], expected, rtol=1e-5, atol=1e-7)
        assert not row[:, place:].any()


def test_completeness():
    f, params = functional(gpt2)
    base = IDS.flip(0)
    method = partial(integrated_gradients, baselines=base, steps=60)
    got = sequence_attribution(f, params, IDS, at=SITES[gpt2], start=START, method=method, chunk_size=60)
    target = next_tokens(IDS, START)
    torch.testing.assert_close(got.sum(-1), target(gpt2()(IDS)) - target(gpt2()(base)), rtol=1e-5, atol=1e-6)


def test_a_part_of_what_a_method_returns():
    f, params = functional(gpt2)
    adaptive = partial(integrated_gradients, baselines=IDS.flip(0), steps="auto", tolerance=1e-6)
    run = partial(sequence_attribution, f, params, IDS, at=SITES[gpt2], start=7)
    with pytest.raises(errors.InputError, match="method returned a PathIntegral"):
        run(method=adaptive)
    got = run(method=lambda *args, **options: adaptive(*args, **options).attributions)
    fixed = run(method=partial(integrated_gradients, baselines=IDS.flip(0), steps=60))
    torch.testing.assert_close(got, fixed, rtol=1e-4, atol=1e-5)


def test_a_perturbation_method():
    """One group for each token: what the target loses when the embedding of a token is set to zero."""
    f, params = functional(gpt2)
    site = SITES[gpt2]
    method = partial(feature_ablation, baselines={site: 0.0}, groups={site: torch.arange(9)[:, None]})
    got = sequence_attribution(f, params, IDS, at=site, start=7, method=method)
    model = gpt2()
    embeddings = model.transformer.wte(IDS)
    target = next_tokens(IDS, 7)
    for token in range(9):
        ablated = embeddings.clone()
        ablated[:, token] = 0
        CLOSE(got[..., token], target(model(IDS)) - target(model(inputs_embeds=ablated)))


def test_groups_of_integrated_gradients_are_the_sum_over_the_embedding():
    f, params = functional(gpt2)
    method = partial(integrated_gradients, baselines=IDS.flip(0), steps=3)
    run = partial(sequence_attribution, f, params, IDS, at=SITES[gpt2], start=START)
    grouped = partial(method, groups={SITES[gpt2]: torch.arange(9)[:, None]})
    CLOSE(run(method=grouped), run(method=method))
    CLOSE(run(method=partial(grouped, mode="forward"), chunk_size=5), run(method=method))


def test_one_run_of_the_model_whatever_the_number_of_tokens():
    runs = []

    class Counting(nn.Linear):
        def forward(self, x):
            runs.append(1)
            return super().forward(x)

    f, params = functionalize(nn.Sequential(nn.Embedding(VOCABULARY, 4), Counting(4, VOCABULARY)))
    counts = []
    for start in (8, 1):
        runs.clear()
        sequence_attribution(f, params, IDS, at="0", start=start)
        counts.append(len(runs))
    assert counts == [2, 2]  # the run that finds the embeddings, and what comes after them


def test_how_inputs_reach_the_model_changes_nothing():
    f, params = functional(llama)
    run = partial(sequence_attribution, f, params, at=SITES[llama], start=START)
    expected = run(IDS)
    mask = torch.ones_like(IDS)
    named = {"attention_mask": mask, "input_ids": IDS}
    for inputs in ((IDS,), (IDS, mask), {"input_ids": IDS}, named, {**named, "attention_mask": mask.bool()}):
        CLOSE(run(inputs), expected)
    CLOSE(run(TensorDict(named, [3])), expected)
    CLOSE(run(named, ids=IDS), expected)


def test_an_output_that_is_a_tensor_and_one_under_another_key():
    class Named(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.model = name, llama()

        def forward(self, ids):
            logits = self.model(ids, use_cache=False).logits
            return {self.name: logits} if self.name else logits

    f, params = functional(llama)
    expected = sequence_attribution(f, params, IDS, at=SITES[llama], start=START)
    for name, options in ((None, {}), ("scores", {"key": "scores"})):
        f, params = functionalize(Named(name))
        CLOSE(sequence_attribution(f, params, IDS, at="model." + SITES[llama], start=START, **options), expected)


def test_chunks_change_nothing():
    f, params = functional(gpt2)
    run = partial(sequence_attribution, f, params, IDS, at=SITES[gpt2], start=2)
    for chunk_size in (1, 3, 100):
        CLOSE(run(chunk_size=chunk_size), run())


def test_one_example_is_a_row_of_several():
    f, params = functional(llama)
    run = partial(sequence_attribution, f, params, at=SITES[llama], start=START)
    CLOSE(torch.cat([run(IDS[i : i + 1]) for i in range(3)]), run(IDS))


def test_without_a_batch_axis_and_under_vmap():
    torch.manual_seed(0)

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)

        def forward(self, ids):
            return self.head(self.embedding(ids).cumsum(-2).tanh())

    f, params = functionalize(Small().double())
    run = partial(sequence_attribution, f, params, at="embedding", start=START, quantity="log_probability")
    expected = run(IDS)
    CLOSE(torch.stack([run(ids) for ids in IDS]), expected)
    CLOSE(vmap(run)(IDS), expected)
    CLOSE(vmap(lambda ids, other: run(ids, against=other))(IDS, OTHER), run(IDS, against=OTHER))


def test_under_vmap_with_a_mask():
    f, params = functional(gpt2, "eager")
    ids, mask = padded("left")
    run = partial(sequence_attribution, f, params, at=SITES[gpt2], start=8)
    got = vmap(lambda i, m: run({"input_ids": i[None], "attention_mask": m[None]})[0])(ids, mask)
    CLOSE(got, run({"input_ids": ids, "attention_mask": mask}))


@pytest.mark.compile
def test_compiled_equals_eager():
    f, params = functional(llama)
    ids, mask = padded("left")
    run = partial(sequence_attribution, at=SITES[llama], start=8, quantity="log_probability", against=ids[:, :3])
    compiled = torch.compile(
        lambda params, ids, mask: run(f, params, {"input_ids": ids, "attention_mask": mask}),
        backend="aot_eager",
        fullgraph=True,
    )
    CLOSE(compiled(params, ids, mask), run(f, params, {"input_ids": ids, "attention_mask": mask}))


def test_bfloat16_has_its_softmax_in_float32():
    f, params = functionalize(copy.deepcopy(llama()).bfloat16(), use_cache=False)
    got = sequence_attribution(f, params, IDS, at=SITES[llama], start=START)
    assert got.dtype == torch.bfloat16 and torch.isfinite(got).all()
    logits = f(params, IDS).logits
    values = next_tokens(IDS, START, quantity="log_probability")(logits)
    assert values.dtype == torch.float32
    assert torch.equal(values, next_tokens(IDS, START, quantity="log_probability")(logits.float()))
    for target in (entropy(START), kl_divergence(logits.roll(1, -1), START)):
        assert target(logits).dtype == torch.float32 and torch.equal(target(logits), target(logits.float()))


def test_nothing_of_the_caller_is_changed():
    model = copy.deepcopy(gpt2())
    f, params = functionalize(model, use_cache=False)
    ids, mask = padded("left")
    inputs = {"input_ids": ids, "attention_mask": mask}
    before = copy.deepcopy((inputs, model.state_dict()))
    state = torch.get_rng_state()
    sequence_attribution(f, params, inputs, at=SITES[gpt2], start=8)
    assert list(inputs) == ["input_ids", "attention_mask"]
    torch.testing.assert_close((inputs, model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


# Padding ------------------------------------------------------------------------------------------------------------------

LENGTHS = (9, 6, 7)


def padded(side):
    """Texts of 9, 6 and 7 tokens in 11 columns, and their mask. What stands in the padding must not matter."""
    torch.manual_seed(2)
    ids, mask = torch.randint(1, VOCABULARY, (3, 11)), torch.zeros(3, 11, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(11 - length, 11) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = IDS[row, :length], 1
    return ids, mask


@MODELS
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("quantity", ["logit", "entropy"])
def test_padding_changes_nothing(make, attention, side, quantity):
    model, close = make(attention), CLOSE
    if (make, attention) == (llama, "eager"):
        # its softmax is in float32, where the mask that it makes for float64 is -inf: rows of padding are NaN
        model, close = copy.deepcopy(model).float(), partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    f, params = functionalize(model, use_cache=False)
    run = partial(sequence_attribution, f, params, at=SITES[make], quantity=quantity)
    ids, mask = padded(side)
    start = 8 if side == "left" else 3
    got = run({"input_ids": ids, "attention_mask": mask}, start=start)
    for row, length in enumerate(LENGTHS):
        first = 11 - length if side == "left" else 0
        expected = run(IDS[row : row + 1, :length], start=start - first)[0]
        real = mask[row].bool()
        close(got[row][real[start:]][:, real], expected)
        assert not got[row][:, ~real].any() and not got[row][~real[start:]].any()


@MODELS
def test_padding_changes_no_other_method(make):
    f, params = functional(make)
    method = partial(integrated_gradients, baselines={SITES[make]: 0.3}, steps=4)
    run = partial(sequence_attribution, f, params, at=SITES[make], method=method, chunk_size=2)
    ids, mask = padded("left")
    got = run({"input_ids": ids, "attention_mask": mask}, start=8)
    CLOSE(got[1, :, 5:], run(IDS[1:2, :6], start=3)[0])
    assert not got[1, :, :5].any()


def test_positions_that_are_given_are_kept():
    f, params = functional(gpt2)
    ids, mask = padded("left")
    run = partial(sequence_attribution, f, params, at=SITES[gpt2], start=8)
    named = {"input_ids": ids, "attention_mask": mask}
    counted = (mask.cumsum(-1) - 1).clamp(min=0)
    CLOSE(run({**named, "position_ids": counted}), run(named))
    CLOSE(run(TensorDict(named, [3])), run(named))
    columns = torch.arange(11).expand(3, -1)
    assert (run({**named, "position_ids": columns}) - run(named)).abs().max() > 1e-3
    bound, params = functionalize(gpt2(), use_cache=False, position_ids=columns)
    again = sequence_attribution(bound, params, named, at=SITES[gpt2], start=8)
    CLOSE(again, run({**named, "position_ids": columns}))


def test_warns_where_positions_cannot_be_given():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = llama()

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask, use_cache=False).logits

    f, params = functionalize(Wrapped())
    ids, mask = padded("left")
    run = partial(sequence_attribution, f, params, at="model." + SITES[llama], start=8)
    with pytest.warns(errors.TdhookWarning, match="Pad behind the text"):
        run({"input_ids": ids, "attention_mask": mask})
    ids, mask = padded("right")
    run({"input_ids": ids, "attention_mask": mask})


# Targets of tokens --------------------------------------------------------------------------------------------------------

LOGITS = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
TOKENS = torch.tensor([[0, 3, 6, 1, 1], [2, 2, 5, 0, 4]])


def test_each_token_is_predicted_at_the_place_before():
    logits = torch.arange(12.0).reshape(1, 4, 3)
    ids = torch.tensor([[2, 0, 1, 2]])
    assert next_tokens(ids, 1)(logits).tolist() == [[0.0, 4.0, 8.0]]
    assert next_tokens(ids, 3, against=torch.tensor([[0]]))(logits).tolist() == [[2.0]]


@pytest.mark.parametrize("quantity", OF_LOGITS)
def test_values_of_token_targets(quantity):
    got = next_tokens(TOKENS, 2, quantity=quantity)(LOGITS)
    values = OF_LOGITS[quantity](LOGITS)
    expected = [[values[b, p - 1, TOKENS[b, p]] for p in (2, 3, 4)] for b in range(2)]
    CLOSE(got, torch.tensor(expected, dtype=torch.float64))


def test_values_of_entropy_and_divergence():
    p = torch.distributions.Categorical(logits=LOGITS[:, 1:4])
    CLOSE(entropy(2)(LOGITS), p.entropy())
    r = torch.distributions.Categorical(logits=LOGITS.flip(-1)[:, 1:4])
    CLOSE(kl_divergence(LOGITS.flip(-1), 2)(LOGITS), torch.distributions.kl_divergence(r, p))


def test_huge_logits_and_tokens_that_are_ruled_out():
    logits = torch.tensor([[[1e4, 0.0, -torch.inf], [0.0, 0.0, -torch.inf], [1.0, 1.0, 1.0]]], requires_grad=True)
    ids = torch.tensor([[0, 1, 0]])
    cases = [
        (next_tokens(ids, 1, quantity="log_probability"), [-1e4, -0.6931472]),
        (entropy(1), [0.0, 0.6931472]),
        (kl_divergence(torch.tensor([[[0.0, 0, -torch.inf]] * 3]), 1), [4999.3069, 0.0]),
    ]
    for target, expected in cases:
        values = target(logits)
        torch.testing.assert_close(values, torch.tensor([expected]))
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert torch.isfinite(gradient).all()


def test_the_reference_of_a_divergence_has_no_gradient_and_may_be_shared():
    reference = LOGITS[0].flip(-1).clone().requires_grad_()
    values = kl_divergence(reference, 2)(LOGITS)
    assert not values.requires_grad
    CLOSE(values, kl_divergence(reference.expand(2, -1, -1), 2)(LOGITS))


def test_any_method_takes_token_targets():
    f, params = functional(llama)
    for method in (saliency, input_x_gradient, partial(integrated_gradients, baselines=IDS.flip(0), steps=2)):
        got = method(f, params, IDS, targets=next_tokens(IDS, START), at=SITES[llama])[SITES[llama]]
        assert got.shape == (4, 3, 9, 16)


# Words --------------------------------------------------------------------------------------------------------------------


def test_words_of_both_axes():
    scores = torch.arange(24.0).reshape(2, 3, 4)
    columns, rows = [0, 1, 1, 2], [0, 0, 1]
    got = aggregate_tokens(aggregate_tokens(scores, columns), torch.tensor(rows), axis=-2)
    assert got.shape == (2, 2, 3)
    assert got[0].tolist() == [[0 + 4, 1 + 2 + 5 + 6, 3 + 7], [8, 9 + 10, 11]]
    mean = aggregate_tokens(scores, columns, reduce="mean")
    assert mean[1, 2].tolist() == [20, 21.5, 23]


def test_the_largest_magnitude_keeps_its_sign():
    scores = torch.tensor([[1.0, -4.0, 3.0, 0.5, -0.25]])
    assert aggregate_tokens(scores, [0, 0, 0, 3, 3], reduce="max_abs").tolist() == [[-4.0, 0.0, 0.0, 0.5]]
    assert aggregate_tokens(scores, [0, 0, 0, 3, 3], reduce="mean").tolist() == [[0.0, 0.0, 0.0, 0.125]]


def test_groups_need_not_be_neighbours():
    assert aggregate_tokens(torch.tensor([1.0, 2, 4, 8]), [1, 0, 1, 0]).tolist() == [10.0, 5.0]


def test_words_under_vmap_with_gradients():
    scores = torch.randn(3, 4, requires_grad=True)
    for reduce in ("sum", "mean", "max_abs"):
        run = partial(aggregate_tokens, groups=[0, 0, 1, 1], reduce=reduce)
        CLOSE(vmap(run)(scores), run(scores))
        assert torch.autograd.grad(run(scores).sum(), scores)[0].any()


def test_a_sum_over_generated_tokens_explains_the_word():
    f, params = functional(gpt2)
    scores = sequence_attribution(f, params, IDS, at=SITES[gpt2], start=START, quantity="log_probability")
    word = next_tokens(IDS, START, quantity="log_probability")
    whole = input_x_gradient(f, params, IDS, at=SITES[gpt2], targets=lambda out: word(out).sum(-1))[SITES[gpt2]]
    CLOSE(aggregate_tokens(scores, [0] * 4, axis=1)[:, 0], whole.sum(-1))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["The", " cat", "s", " sat", "."], [0, 1, 1, 2, 2]),
        (["The", "Ġcat", "s", "Ċ", "A", "Ġdog"], [0, 1, 1, 2, 3, 4]),
        (["▁The", "▁cat", "s"], [0, 1, 1]),
        (["<s>", "The", "▁cat", "</s>"], [0, 1, 2, 3]),
        (["[CLS]", "play", "##ing", "cards", ".", "[SEP]"], [0, 1, 1, 2, 3, 4]),
        (["one\n", "two"], [0, 1]),
        (["alone"], [0]),
    ],
)
def test_words_by_the_signs_of_tokenizers(tokens, expected):
    assert word_groups(tokens) == expected


# Encoders -----------------------------------------------------------------------------------------------------------------


def test_the_similarity_of_sentence_embeddings():
    """Through a function of the output, at the word embeddings of a BERT, with padding; against captum."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    model = BertModel(config, add_pooling_layer=False).double().eval()
    ids, mask = padded("right")
    query = F.normalize(torch.randn(16).double(), dim=-1)

    def embedded(hidden: Tensor) -> Tensor:
        return F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)

    def similarity(output):
        return embedded(output.last_hidden_state) @ query

    f, params = functionalize(model)
    inputs = {"input_ids": ids, "attention_mask": mask}
    base = torch.zeros_like(ids)
    site = "embeddings.word_embeddings"
    got = integrated_gradients(
        f, params, inputs, targets=similarity, baselines={**inputs, "input_ids": base}, at=site, steps=6
    )[site]
    reference = captum.attr.LayerIntegratedGradients(
        lambda ids: similarity(model(ids, attention_mask=mask)), model.embeddings.word_embeddings
    )
    torch.testing.assert_close(got, reference.attribute(ids, base, n_steps=6, internal_batch_size=3), rtol=1e-5, atol=1e-8)
    assert not got[mask == 0].any()


# Bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"start": 0}, errors.InputError, "start is an integer of at least 1"),
        ({"start": 9}, errors.InputError, "start=9 is out of range for 9 tokens"),
        ({"start": 2.0}, errors.InputError, "start is an integer"),
        ({"quantity": "logits"}, errors.InputError, "quantity='logits' is unknown"),
        ({"quantity": ["logit"]}, errors.InputError, "is unknown"),
        ({"quantity": "entropy", "against": OTHER}, errors.InputError, "against has no meaning"),
        ({"against": OTHER[:, :3]}, errors.InputError, r"against has shape \[3, 3\] for the tokens 5 to 8"),
        ({"against": OTHER[:2]}, errors.InputError, r"give shape \[3, 4\] or \[4\]"),
        ({"against": OTHER.double()}, errors.InputError, "against is a float64 tensor"),
        ({"against": 3}, errors.InputError, "against is 3"),
        ({"against": OTHER + VOCABULARY}, errors.TargetError, "against holds token"),
        ({"ids": IDS[:, 1:]}, errors.TargetError, r"for ids of shape \[3, 8\]"),
        ({"ids": IDS.double()}, errors.InputError, "ids is a float64 tensor"),
        ({"reduce": "max"}, errors.InputError, "reduce='max' is unknown"),
        ({"reduce": lambda a: a}, errors.InputError, "reduce returned"),
        ({"method": "saliency"}, errors.InputError, "method is 'saliency'"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size"),
        ({"key": "scores"}, errors.TargetError, "key='scores' is not in the output"),
        ({"at": ["model.embed_tokens", "model.norm"]}, errors.SiteError, "at means 2 sites"),
        ({"at": "model.embed"}, errors.SiteError, "model.embed"),
        ({"quantity": lambda out: out.logits[:, -1, :2]}, errors.InputError, "one value for each generated token"),
        ({"method": partial(integrated_gradients, steps=2, baselines=IDS, groups={})}, errors.InputError, "groups"),
        ({"method": lambda *a, **o: saliency(*a, **o)["model.embed_tokens"][0]}, errors.InputError, "method returned"),
        ({"method": lambda *a, **o: None}, errors.InputError, "method returned None"),
    ],
)
def test_bad_options(options, error, match):
    f, params = functional(llama)
    with pytest.raises(error, match=match):
        sequence_attribution(f, params, IDS, **{"at": SITES[llama], "start": START, **options})


def test_bad_inputs():
    f, params = functional(llama)
    run = partial(sequence_attribution, f, params, at=SITES[llama], start=START)
    with pytest.raises(errors.InputError, match=r"pass them as ids=\."):
        run({"inputs_embeds": torch.zeros(3, 9, 16).double()})
    with pytest.raises(errors.InputError, match="attention_mask is a int64 tensor of shape"):
        run({"input_ids": IDS, "attention_mask": torch.ones(3, 8, dtype=torch.long)})
    with pytest.raises(errors.ModelError, match="has no sites"):
        sequence_attribution(lambda params, ids: ids, params, IDS, at="0", start=1)


def test_needs_gradients():
    f, params = functional(llama)
    with torch.no_grad(), pytest.raises(errors.GradientError, match="grad mode is off"):
        sequence_attribution(f, params, IDS, at=SITES[llama], start=START)


def test_logits_of_the_last_position_only():
    f, params = functionalize(llama(), use_cache=False, logits_to_keep=1)
    for quantity in ("logit", "entropy"):
        with pytest.raises(errors.TargetError, match="logits_to_keep=0"):
            sequence_attribution(f, params, IDS, at=SITES[llama], start=START, quantity=quantity)


def test_bad_targets():
    with pytest.raises(errors.InputError, match="start"):
        entropy(0)
    with pytest.raises(errors.InputError, match="reference_logits is a int64"):
        kl_divergence(IDS, 1)
    with pytest.raises(errors.InputError, match="start"):
        kl_divergence(LOGITS, 0)
    with pytest.raises(errors.TargetError, match="at least 4 positions"):
        kl_divergence(LOGITS[:, :3], 2)(LOGITS)
    with pytest.raises(errors.TargetError, match="of a vocabulary of 7"):
        kl_divergence(LOGITS[..., :6], 2)(LOGITS)
    with pytest.raises(errors.TargetError, match="does not fit"):
        kl_divergence(LOGITS[[0, 0, 1]], 2)(LOGITS)
    with pytest.raises(errors.TargetError, match="the targets need logits of shape"):
        entropy(1)(LOGITS[0, 0])
    with pytest.raises(errors.TargetError, match="start=5 is out of range for the logits of 5 positions"):
        entropy(5)(LOGITS)


@pytest.mark.parametrize(
    ("scores", "groups", "options", "match"),
    [
        (torch.ones(2, 3), [0, 1], {}, "one id for each of 3 tokens"),
        (torch.ones(2, 3), [0, 1, -1], {}, "ids are integers from 0 on"),
        (torch.ones(2, 3), [0, 1, 1.0], {}, "ids are integers from 0 on"),
        (torch.ones(2, 3), torch.zeros(3), {}, "one integer for each token"),
        (torch.ones(2, 3), [0, 0], {"axis": 2}, "axis=2 is out of range"),
        (torch.ones(2, 3), [0, 0], {"axis": 0, "reduce": "max"}, "reduce='max' is unknown"),
        (torch.ones(2, 3).int(), [0, 0, 0], {}, "floating-point"),
        (torch.ones(2, 0), [], {}, "groups is empty"),
    ],
)
def test_bad_groups(scores, groups, options, match):
    with pytest.raises(errors.InputError, match=match):
        aggregate_tokens(scores, groups, **options)


@pytest.mark.parametrize(("tokens", "match"), [([], "tokens is"), ("a text", "tokens is"), (["a", 3], "tokens holds 3")])
def test_bad_tokens(tokens, match):
    with pytest.raises(errors.InputError, match=match):
        word_groups(tokens)
