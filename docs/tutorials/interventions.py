"""What a language model does inside: lenses, induction heads, a circuit for names, steering; and the same on other models.

    make demo                                                  # the other tutorials, then this: pictures in out/
    python docs/tutorials/interventions.py --short             # fewer heads, prompts and circuits
    python docs/tutorials/interventions.py --only circuit      # one part: lens, induction, circuit, steering or others

Every part ends with checks: numbers that have to agree with another way of computing them, or with what is known to be
true. The script ends with an error if one of them does not hold.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

import tdhook
from checked_parts import check, headline, run
from real_models import minilm, smollm2
from tdhook.attribution.rules import relp
from tdhook.latent import (
    Names,
    ablate,
    ablation_effects,
    activation_patching,
    attribution_patching,
    circuits,
    generate,
    integrated_gradient_patching,
    lenses,
    names,
    steering,
)
from tdhook.plotting import curves, matrix_map, site_position_map

HEADS = 9  # of each layer of SmolLM2; head h of layer l has the number HEADS * l + h


@cache
def language() -> tuple[Any, Any, Names]:
    """The model, its tokenizer, and its standard names.

    One run on fake tensors tells what is what. The same call names the parts of a GPT-2, a Gemma, a BERT or a ViT.
    """
    model, tokenizer = smollm2()
    return model, tokenizer, names(*tdhook.functionalize(model, use_cache=False))


def main() -> int:
    """Run all parts; return the number of checks that failed."""
    parts = {"lens": lens, "induction": induction, "circuit": circuit, "steering": steer, "others": others}
    return run(parts, __doc__, short="fewer heads, prompts and circuits")


# ---------------------------------------------------------------------------------------------------------------------
# Part one: what each layer would say
# ---------------------------------------------------------------------------------------------------------------------

PROMPT = "The Eiffel Tower stands in the city of"


def lens(out: Path, short: bool) -> list[bool]:
    """The logit lens for one prompt, and which heads and MLPs wrote the answer."""
    headline("Lenses: where SmolLM2 has the answer")
    model, tokenizer, found = language()
    f, params = tdhook.functionalize(model, use_cache=False)
    print(found)

    ids, tokens = torch.tensor([tokenizer.encode(PROMPT)]), tokenizer.tokens(PROMPT)
    with torch.no_grad():
        logits = lenses.logit_lens(f, params, ids, names=found)[:, 0]  # [L, S, V]
        output = f(params, ids)
    probability, said = logits.softmax(-1).max(-1)
    (paris,) = tokenizer.encode(" Paris")
    rank = (logits[:, -1] > logits[:, -1, paris, None]).sum(-1)  # how many tokens are before it, at each layer
    shown = [1, 9, 17, 25, 29] if short else [1, 5, 9, 13, 17, 20, 22, *range(24, found.layers)]
    sites = [found.residual_post[layer] for layer in shown]
    title = "SmolLM2: the most probable next token after each layer"
    figure = site_position_map(
        probability[shown], sites, tokens, title=title, label="probability", limits=(0, 1), colors="Blues"
    )
    figure.set_size_inches(10, 1.5 + 0.4 * len(shown))
    for row, layer in enumerate(shown):
        for column, token in enumerate(said[layer].tolist()):
            text = tokenizer.decode([token])
            text = text.strip()[:9] or text.replace(" ", "␣").replace("\n", "⏎")
            color = "white" if probability[layer, column] > 0.5 else "black"
            written = figure.axes[0].text(column, row, text, ha="center", va="center", fontsize=9, color=color)
            written.set_parse_math(False)
    figure.savefig(out / "logit_lens.png", dpi=80)
    print(f"\n{PROMPT!r}: ' Paris' has rank {', '.join(f'{int(rank[i])} after layer {i}' for i in (0, 14, 22, 26, 29))}")

    # The last residual is a sum. Its parts are pushed through the final norm with the scale that it has in this run.
    components = lenses.residual_decomposition(f, params, ids, names=found, heads=True, positions=[-1])[:, 0, 0]
    target = tdhook.targets.logit_difference(paris, tokenizer.encode(" London")[0], key="logits", position=-1)
    parts = lenses.direct_logit_attribution(f, params, ids, targets=target, names=found, heads=True)
    labels = lenses.component_labels(found, heads=True)
    best = parts.components[:, 0].abs().topk(6).indices.tolist()
    show([(labels[i], f"{parts.components[i, 0]:+.2f} of {target(output).item():+.2f} for Paris over London") for i in best])

    stream = tdhook.stop_at(f, found.residual_post[-1])(params, ids)[0, -1]
    return [
        check("the last layer of the lens is the model", close(logits[-1], output.logits[0])),
        check("heads, MLPs and embedding sum to the last residual", close(components[:-1].sum(0), stream)),
        check(
            "their attributions sum to the difference of logits", close(parts.components.sum(0) + parts.bias, target(output))
        ),
        check("Paris comes late, and comes first", bool(rank[-1] == 0 and rank[14] > 50)),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Part two: heads that continue what was there before
# ---------------------------------------------------------------------------------------------------------------------


def induction(out: Path, short: bool) -> list[bool]:
    """Induction heads, found by where they look, confirmed by taking them away."""
    headline("Induction heads: SmolLM2 on random tokens that repeat")
    model, _, found = language()
    f, params = tdhook.functionalize(model, use_cache=False)
    random = torch.Generator().manual_seed(0)
    period, count, draws = 24, 10, 2 if short else 4
    ids = lenses.repeated_tokens(40_000, period, 2 if short else 4, generator=random)

    with torch.no_grad():
        patterns = lenses.attention_patterns(f, params, ids, names=found)  # [L, B, H, S, S]
        scores = lenses.induction_scores(patterns, period).mean(1)  # [L, H]
        previous = lenses.previous_token_scores(patterns).mean(1)
        intact = losses(f(params, ids), ids, period)

        def without(heads: Tensor) -> tuple[float, float]:
            """The losses with some heads silent, given by their numbers."""
            chosen: dict[Any, list[int]] = {}
            for head in heads.tolist():
                chosen.setdefault(found.head_output[head // HEADS], []).append(head % HEADS)
            return losses(ablate(f, params, ids, sites=chosen, axis=-2), ids, period)

        best = scores.flatten().topk(count)
        ablated = without(best.indices)
        # The control: as many other heads of the same layers, so that depth makes no difference.
        layers = sorted(set((best.indices // HEADS).tolist()))
        rest = torch.tensor([HEADS * layer + head for layer in layers for head in range(HEADS)])
        rest = rest[~torch.isin(rest, best.indices)]
        control = [without(rest[torch.randperm(len(rest), generator=random)[:count]]) for _ in range(draws)]

    figure = matrix_map(
        scores,
        range(found.layers),
        range(HEADS),
        title="SmolLM2: induction heads",
        label="induction score",
        row_label="layer",
        column_label="head",
    )
    figure.savefig(out / "induction.png", dpi=80)
    show(
        [
            ("induction heads", heads_text(best.indices[:6], scores)),
            ("previous-token heads", heads_text(previous.flatten().topk(4).indices, previous)),
            ("loss, first time", f"{intact[0]:.2f}; without {count} induction heads {ablated[0]:.2f}"),
            ("loss, second time", f"{intact[1]:.2f}; without them {ablated[1]:.2f}"),
            ("", f"without {count} others of these layers {', '.join(f'{c[1]:.2f}' for c in control)}"),
        ]
    )

    # The score by hand, for the best head.
    layer, head = divmod(int(best.indices[0]), HEADS)
    pattern = patterns[layer, :, head]
    by_hand = torch.stack([pattern[:, q, q - period + 1] for q in range(period, 2 * period)]).mean()
    rise = ablated[1] - intact[1]
    return [
        check("the score as in its formula", close(by_hand, best.values[0])),
        check("the model repeats what it has seen", intact[1] < intact[0] - 8),
        check("without induction heads it does not", rise > 5),
        check("other heads matter far less", rise > 3 * max(c[1] - intact[1] for c in control)),
        check("on new tokens induction heads are no use", abs(ablated[0] - intact[0]) < 0.5),
    ]


def losses(output: Any, ids: Tensor, period: int) -> tuple[float, float]:
    """The mean loss of the tokens when they come the first time, and when they come again."""
    log = output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return -log[:, : period - 1].mean().item(), -log[:, period:].mean().item()


def heads_text(heads: Tensor, values: Tensor) -> str:
    """Heads with a value each."""
    return ", ".join(f"{int(h) // HEADS}.{int(h) % HEADS} ({values.flatten()[h]:.2f})" for h in heads)


# ---------------------------------------------------------------------------------------------------------------------
# Part three: the circuit that finds the indirect object
# ---------------------------------------------------------------------------------------------------------------------

SENTENCE = "When {first} and {second} went to the store, {giver} gave a drink to"
PAIRS = [("Mary", "John"), ("Tom", "James"), ("Anna", "Paul"), ("Sarah", "David")]


def circuit(out: Path, short: bool) -> list[bool]:
    """Which heads carry the name: measured, estimated, and as a circuit of edges."""
    headline("The indirect object: heads, edges and circuits of SmolLM2")
    model, tokenizer, found = language()
    f, params = tdhook.functionalize(model, use_cache=False, logits_to_keep=1)

    # Each pair differs in who gives, hence in who is given to; names come in both orders.
    clean_texts, corrupted_texts, answers = [], [], []
    for number, (right, wrong) in enumerate(PAIRS[: 2 if short else 4]):
        first, second = (right, wrong) if number % 2 else (wrong, right)
        clean_texts.append(SENTENCE.format(first=first, second=second, giver=wrong))
        corrupted_texts.append(SENTENCE.format(first=first, second=second, giver=right))
        answers.append([tokenizer.encode(f" {name}")[0] for name in (right, wrong)])
    clean, corrupted = (torch.tensor([tokenizer.encode(t) for t in texts]) for texts in (clean_texts, corrupted_texts))
    target = torch.tensor(answers)

    def metric(output: Any) -> Tensor:
        """The right name over the wrong one, for each pair."""
        right, wrong = output.logits[:, -1].gather(1, target).unbind(1)
        return right - wrong

    def mean(output: Any) -> Tensor:
        return metric(output).mean()

    pair = (f, params, clean, corrupted)

    # Every head of the later layers, each by a patch of its own; and all of them by one backward pass.
    start = 22 if short else 15
    heads = found.head_output[start:]
    with torch.no_grad():
        measured = activation_patching(*pair, mean, sites=heads, axis=-2)
    gap = measured.clean - measured.corrupted
    exact = (measured.patched - measured.corrupted) / gap
    linear = attribution_patching(*pair, mean, sites=heads, axis=-2).effects / gap
    along = partial(integrated_gradient_patching, *pair, mean, along=found.embedding, steps=2 if short else 5, chunk_size=1)
    averaged = along(sites=heads, axis=-2).effects / gap
    figure = matrix_map(
        exact,
        range(start, found.layers),
        range(HEADS),
        title="SmolLM2: which heads restore the name",
        label="restored (1: as clean)",
        row_label="layer",
        column_label="head",
    )
    figure.savefig(out / "name_heads.png", dpi=80)
    agreement = {"attribution patching": pearson(exact, linear), "integrated gradients": pearson(exact, averaged)}
    # RelP is attribution patching of a model with another backward pass: norms, activations and gates taken as linear.
    relevance = tdhook.with_rules(f, relp())
    if not short:
        by_rules = attribution_patching(relevance, *pair[1:], mean, sites=heads, axis=-2).effects / gap
        agreement["RelP"] = pearson(exact, by_rules)
    best = exact.abs().flatten().topk(6).indices
    print(f"difference of logits: clean {measured.clean:+.2f}, corrupted {measured.corrupted:+.2f}")
    print(f"  {'head':<6}{'measured':>10}{'linear':>10}{'averaged':>10}")
    for head in best.tolist():
        layer, number = start + head // HEADS, head % HEADS
        row = "".join(f"{values.flatten()[head]:>+10.2f}" for values in (exact, linear, averaged))
        print(f"  {layer}.{number:<4}{row}")
    show([(f"Pearson, {name}", f"{value:.3f} over {exact.numel()} heads") for name, value in agreement.items()])

    # The whole stream at the name that differs is a large change, which is no matter of first order.
    giver = int((clean != corrupted)[0].nonzero()[0])
    early = found.residual_post[10:11] if short else found.residual_post[2:12:8]
    with torch.no_grad():
        stream = activation_patching(*pair, mean, sites=early, positions=[giver])
    stream_exact = ((stream.patched - stream.corrupted) / gap)[:, 0]
    stream_linear = (attribution_patching(*pair, mean, sites=early, positions=[giver]).effects / gap)[:, 0]
    for site, true, estimate in zip(early, stream_exact, stream_linear, strict=True):
        print(f"  the stream at the name, {site}: measured {true:.2f}, linear {estimate:.2f}")
    if not short:
        by_rules = attribution_patching(relevance, *pair[1:], mean, sites=early, positions=[giver]).effects / gap
        print(f"  by RelP: {', '.join(f'{value:.2f}' for value in by_rules.flatten())}")

    # Edges: 301 writers, 481 readers, 70,651 edges; all of them scored by one backward pass.
    graph = circuits.edge_graph(f, params, names=found)
    score = circuits.eap(*pair, metric, graph=graph)
    scores = {"EAP": score}
    if not short:
        scores["EAP-IG"] = circuits.eap_ig(*pair, metric, graph=graph, steps=3, chunk_size=1)
    with torch.no_grad():
        late = torch.arange(graph.starts[graph.readers.index("query 20.0")], len(graph))
        sample = late[score[late].abs().topk(6 if short else 16).indices]
        true = circuits.edge_patching(*pair, metric, graph=graph, edges=sample, chunk_size=4)
        sizes = [100, 3000] if short else [30, 100, 300, 1000, 3000, 10_000]
        curve = {}
        for name, each in scores.items():
            nested = [circuits.top_edges(graph, each, size) for size in sizes]
            curve[name] = circuits.faithfulness(*pair, nested, metric, chunk_size=1)
        lots = torch.rand(len(graph), generator=torch.Generator().manual_seed(0))
        by_lot = circuits.faithfulness(*pair, circuits.top_edges(graph, lots, sizes[-1]), metric)
        ends = [circuits.Circuit(graph, torch.full((len(graph),), kept)) for kept in (False, True)]
        whole = circuits.evaluate(*pair, ends, metric, chunk_size=1)
        by_hand = torch.stack([metric(f(params, ids)) for ids in (corrupted, clean)])
    figure = curves(
        sizes,
        torch.stack(list(curve.values())),
        labels=list(curve),
        title=f"SmolLM2: circuits for the name, of {len(graph):,} edges",
        x_label="edges",
        y_label="faithfulness",
        log_x=True,
    )
    figure.savefig(out / "faithfulness.png", dpi=80)
    print("edges that matter most, and the change of the metric without them:")
    print("\n".join("  " + row for row in graph.table(score, 6).splitlines()))
    print(f"  {len(sample)} edges measured: Pearson {pearson(true, score[sample]):.3f}")
    for name, values in curve.items():
        print(f"  faithfulness, {name}: {', '.join(f'{v:.2f} of {s}' for v, s in zip(values, sizes, strict=True))}")
    print(f"  {sizes[-1]} edges by lot: {by_lot:.2f}")
    return [
        check("estimates of heads agree with patches", min(agreement.values()) > 0.8),
        check("of the whole stream they do not", bool((stream_linear < 0.5).all() and (stream_exact > 0.9).all())),
        check("estimates of late edges agree with patches", pearson(true, score[sample]) > 0.9),
        check("the empty circuit is the corrupted run, the full one the clean", close(whole.value, by_hand)),
        check("most of the behaviour is in a few percent of the edges", bool(curve["EAP"][-1] > (0.6 if short else 0.8))),
        check("which lots do not find", bool(by_lot < 0.3)),
    ]


def pearson(first: Tensor, second: Tensor) -> float:
    """The correlation of two tensors."""
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()


# ---------------------------------------------------------------------------------------------------------------------
# Part four: steering
# ---------------------------------------------------------------------------------------------------------------------

SEA = [
    "The ship sailed across the stormy ocean",
    "Whales and fish swim in the deep sea",
    "We walked on the beach and watched the waves",
    "The sailor loved his boat and the salty sea",
    "The tide came in and the ocean was blue",
]
LAND = [
    "We talked about the weather for a long time",
    "She is planning her exam next summer",
    "The public meeting was held in a hall",
    "They got lost at a large station",
    "I was invited to their office",
]
PROMPTS = [
    "I went to the park and",
    "Yesterday my friend told me that",
    "In the morning we",
    "The newspaper reported that",
    "My favourite thing is",
    "Once upon a time there was",
]
WORDS = str.split("sea ocean ship boat fish wave beach sail water whale shore tide island coast")


def steer(out: Path, short: bool) -> list[bool]:
    """A direction from ten sentences, added to the residual stream while the model writes."""
    headline("Steering: to the sea")
    model, tokenizer, found = language()
    f, params = tdhook.functionalize(model)

    sea, land = (padded([tokenizer.encode(t) for t in texts]) for texts in (SEA, LAND))
    sites = list(found.residual_post)
    # The first token is left out: its activations are so huge that lengths of sentences would be all one sees.
    vectors = steering.steering_vectors(f, params, sea, land, sites=sites, pool="mean", skip=1)
    prompts = padded([tokenizer.encode(text) for text in PROMPTS[: 4 if short else 6]])
    start, new = prompts["input_ids"].shape[1], 10 if short else 20

    # How probable the words are as the next token: all strengths at all layers in one vmapped call.
    layers, strengths = ([9, 19], [0.0, 1.0, 2.0]) if short else ([4, 9, 14, 19, 24], [0.0, 0.5, 1.0, 2.0, 4.0])
    words = torch.tensor([tokenizer.encode(f" {word}")[0] for word in WORDS])
    g, _ = tdhook.functionalize(model, use_cache=False, logits_to_keep=1)

    def probability(row: Tensor) -> Tensor:
        writes = {sites[layer]: steering.add(vectors[sites[layer]], s) for layer, s in zip(layers, row, strict=True)}
        return tdhook.intervene(g, writes)(params, prompts).logits[:, -1].softmax(-1)[:, words].sum(-1).mean()

    with torch.no_grad():
        rows = torch.tensor(strengths)[:, None, None] * torch.eye(len(layers))  # one layer, one strength at a time
        table = vmap(probability, chunk_size=4)(rows.flatten(0, 1)).reshape(len(strengths), len(layers))
    figure = matrix_map(
        100 * table,
        [f"{strength:g}" for strength in strengths],
        layers,
        title="The next word is of the sea",
        label="percent",
        row_label="strength",
        column_label="layer",
    )
    figure.savefig(out / "steering.png", dpi=80)

    # And as text.
    layer = 15
    counted = []
    for strength in (0.0, 1.5) if short else (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0):
        steered = tdhook.intervene(f, {sites[layer]: steering.add(vectors[sites[layer]], strength)})
        with torch.no_grad():
            result = generate(steered, params, prompts, max_new_tokens=new)
        texts = [tokenizer.decode(row[start:]) for row in result.tokens]
        counted.append((strength, sum(text.lower().count(word) for text in texts for word in WORDS), texts))
    for strength, number, texts in counted:
        print(f"  strength {strength:+.1f}: {number:2d} words of the sea; {PROMPTS[0]}{texts[0]!r}")
    by_strength = {strength: number for strength, number, _ in counted}

    # The same without a key-value cache, and with nothing added, by the model's own generate.
    write = {sites[layer]: steering.add(vectors[sites[layer]], 2.0, positions="generated")}
    few = {name: value[:2] for name, value in prompts.items()}
    with torch.no_grad():
        fast, slow = (generate(tdhook.intervene(f, write), params, few, max_new_tokens=6, cache=c) for c in (True, False))
        plain = generate(f, params, few, max_new_tokens=6)
        theirs = model.generate(**few, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        one = probability(rows[2, 1])
    return [
        check("words of the sea come", max(by_strength.values()) >= by_strength[0.0] + (2 if short else 5)),
        check("more probable with more strength", bool((table[1:3].diff(dim=0) > 0).any() and table.max() > 10 * table[0, 0])),
        check("the vmapped table as one by one", close(one, table[2, 1])),
        check("with and without cache", torch.equal(fast.tokens, slow.tokens)),
        check("without a write, the model's own generate", torch.equal(plain.tokens, theirs)),
        check("the first new token is not steered", torch.equal(fast.tokens[:, start], plain.tokens[:, start])),
    ]


def padded(encoded: list[list[int]]) -> dict[str, Tensor]:
    """Prompts padded on the left, with their mask."""
    length = max(map(len, encoded))
    ids = torch.tensor([[0] * (length - len(ids)) + ids for ids in encoded])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in encoded])
    return {"input_ids": ids, "attention_mask": mask}


# ---------------------------------------------------------------------------------------------------------------------
# Part five: other models
# ---------------------------------------------------------------------------------------------------------------------


def others(out: Path, short: bool) -> list[bool]:
    """The same functions on a sentence encoder and on an image model."""
    headline("The same functions: MiniLM and a vision transformer")
    encoder, tokenizer = minilm()
    f, params = tdhook.functionalize(encoder)
    texts = ["A man plays the guitar.", "A man eats the guitar.", "Someone makes music."]
    clean, corrupted, reference = (dict(tokenizer(text, return_tensors="pt")) for text in texts)
    music = f(params, reference).last_hidden_state.mean(1)

    def similarity(output: Any) -> Tensor:
        return torch.cosine_similarity(output.last_hidden_state.mean(1), music)

    encoder_checks = recipe("MiniLM", f, params, clean, corrupted, similarity, None)

    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    g, weights = tdhook.functionalize(ViTForImageClassification(config).eval())
    image, other = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return [
        *encoder_checks,
        *recipe("ViT", g, weights, image, other, tdhook.targets.logit_difference(0, 1, key="logits"), image),
    ]


def recipe(
    name: str, f: Any, params: Any, clean: Any, corrupted: Any, metric: Callable[[Any], Tensor], example: Any
) -> list[bool]:
    """Ablation and patching of every head, and of the stream: written once, for any transformer."""
    found = names(f, params, example)
    with torch.no_grad():
        ablation = ablation_effects(f, params, clean, metric, sites=found.head_output, axis=-2)
        stream = activation_patching(f, params, clean, corrupted, metric, sites=found.residual_post)
        whole = activation_patching(f, params, clean, corrupted, metric, sites=found.residual_post, axis=None)
        by_hand = metric(ablate(f, params, clean, sites={found.head_output[1]: [2]}, axis=-2))
    linear = attribution_patching(f, params, clean, corrupted, metric, sites=found.head_output, axis=-2)
    with torch.no_grad():
        heads = activation_patching(f, params, clean, corrupted, metric, sites=found.head_output, axis=-2)
    agreement = pearson(heads.patched - heads.corrupted, linear.effects)
    share = (stream.patched - stream.corrupted).mean(-1) / (stream.clean - stream.corrupted).mean()
    largest = int(ablation.effect.mean(-1).abs().argmax())
    layer, head = divmod(largest, ablation.effect.shape[1])
    print(
        f"{name}: {found.layers} layers of {found.head_count} heads, norm {found.norm!r}; clean {stream.clean.mean():.3f},",
        end=" ",
    )
    print(f"corrupted {stream.corrupted.mean():.3f}, without head {layer}.{head} {ablation.ablated[layer, head].mean():.3f}")
    print(f"  one token of the stream restores at most {share.max():.2f}; ", end="")
    print(f"heads, measured and to first order: Pearson {agreement:.3f}")
    graph = circuits.edge_graph(f, params, example, names=found)
    scores = circuits.eap(f, params, clean, corrupted, metric, graph=graph)
    sizes = [0, len(graph) // 4, len(graph) // 2, len(graph)]
    nested = [circuits.top_edges(graph, scores, size) for size in sizes]
    with torch.no_grad():
        curve = circuits.faithfulness(f, params, clean, corrupted, nested, metric)
    print(f"  {graph!r}; faithful with {', '.join(f'{size}: {value:.2f}' for size, value in zip(sizes, curve))}")
    return [
        check(f"{name}: the whole stream restores all", close(whole.normalized, torch.ones_like(whole.normalized))),
        check(f"{name}: one head, as by itself", close(ablation.ablated[1, 2], by_hand)),
        check(f"{name}: estimates agree with patches", agreement > 0.9),
        check(f"{name}: no edge is the corrupted run, all are the clean one", close(curve[[0, -1]], torch.tensor([0.0, 1.0]))),
    ]


def close(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree in single precision, relative to the largest number."""
    return bool((first - second).abs().max() <= 1e-4 * second.abs().max())


def show(rows: list[tuple[str, str]]) -> None:
    """Print two columns."""
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {text}" for name, text in rows))


if __name__ == "__main__":
    # torch's vmap calls the fused attention kernel once per patch and says so
    warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
    sys.exit(main())
