"""Propagation rules on trained models: another backward for a photograph, a language model, two sentences, an LSTM.

    make demo                                                  # the other tutorials, and this: pictures in out/
    python docs/tutorials/rules.py --short                     # fewer images, prompts, layers
    python docs/tutorials/rules.py --only relp                 # one part: maps, flipping, tokens, sentences, relp or lstm

Every part ends with checks: numbers that have to add up, or to agree with another way of computing them. The script ends
with an error if one of them does not hold.
"""

from __future__ import annotations

import sys
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import tdhook
from checked_parts import check, headline, run
from real_models import efficientnet, imagenet_classes, minilm, photograph, smollm2
from tdhook import attribution, metrics
from tdhook.attribution import lrp, rules
from tdhook.latent import activation_patching, attribution_patching
from tdhook.plotting import curves, heat_map_gallery, tokens_html, tokens_terminal


def main() -> int:
    """Run all parts; return the number of checks that failed."""
    parts = {"maps": maps, "flipping": flipping, "tokens": tokens, "sentences": sentences, "relp": patching, "lstm": lstm}
    return run(parts, __doc__, short="fewer images, prompts and layers: under a minute")


# ---------------------------------------------------------------------------------------------------------------------
# Part one: relevance of a photograph, and its books
# ---------------------------------------------------------------------------------------------------------------------

CAT, ESPRESSO = 285, 967  # of ImageNet; 285 is "Egyptian cat"
LOW, HIGH = -127 / 128, 1.0  # black and white, as the network gets them


@cache
def network() -> tuple[Any, Any, Any]:
    """EfficientNet-Lite0 as a function, its parameters, and the same with batch norms merged into convolutions."""
    f, params = tdhook.functionalize(efficientnet())
    # A batch norm shifts and scales, so a rule for "activation times weight" has nothing to say about it. Merged into the
    # convolution before it, which stays the same function, it is part of the weights that the rule sees. `params` is a
    # TensorDict, so this makes another one: no module is touched.
    return f, params, rules.merge_batch_norm(f, params, torch.zeros(1, 3, 224, 224))


def presets() -> dict[str, rules.Rules]:
    """What the field uses for convolutional networks."""
    return {
        "epsilon_plus": rules.epsilon_plus(),
        "epsilon_alpha2_beta1": rules.epsilon_alpha2_beta1(),
        "epsilon_gamma_box": rules.epsilon_gamma_box(LOW, HIGH),
    }


def collage() -> tuple[Tensor, numpy.ndarray]:
    """A cat on the left and a cup of coffee on the right: an image whose answer is known."""
    inputs, pixels = zip(*(photograph(name) for name in ("chelsea", "coffee")), strict=True)
    middle = slice(56, 168)
    return torch.cat([x[..., middle] for x in inputs], -1), numpy.concatenate([p[:, middle] for p in pixels], 1)


def maps(out: Path, short: bool) -> list[bool]:
    """The report, heat maps of two classes, and where the relevance went."""
    headline("Relevance of pixels: EfficientNet-Lite0, a cat and a cup of coffee")
    f, params, merged = network()
    inputs, image = collage()
    names = imagenet_classes()
    targets = [CAT, ESPRESSO]

    # Before anything is computed: which operation gets which rule? Nothing here is a module that was registered; these are
    # the operations that run, functional ones and each call of a shared activation by itself.
    report = rules.explain(f, merged, inputs, rules.epsilon_gamma_box(LOW, HIGH), strict=True)
    shown = str(report).splitlines()
    print("\n".join([*shown[:7], f"... {len(shown) - 12} more ...", *shown[-5:]]), "\n")

    with torch.no_grad():
        same = bool((tdhook.with_rules(f, rules.epsilon_plus())(merged, inputs) == f(merged, inputs)).all())
        moved = relative(f(merged, inputs), f(params, inputs))
        logits = f(merged, inputs)[0, targets]

    found = {
        "gradient": attribution.saliency(f, params, inputs, targets=targets, absolute=False),
        "input x gradient": attribution.input_x_gradient(f, params, inputs, targets=targets),
        **{name: lrp(f, merged, inputs, rules=table, targets=targets) for name, table in presets().items()},
    }
    figure = heat_map_gallery(
        image,
        {name: value.sum(2, keepdim=True) for name, value in found.items()},
        titles=[names[c] for c in targets],
        photograph=False,
        smoothing=1.0,
        percentile=99.5,
    )
    figure.suptitle("EfficientNet-Lite0: what speaks for each class")
    figure.savefig(out / "relevance_maps.png", dpi=80)

    # The cat is on the left, the coffee on the right.
    print(f"{'in the right half':<24}" + "".join(f"{names[c]:>16}" for c in targets) + f"{'sum':>12}{'logit':>9}")
    places = torch.zeros(2, 1, 1, 224, 224, dtype=torch.bool)
    places[0, ..., :112], places[1, ..., 112:] = True, True
    shares = {}
    for name, value in found.items():
        pixels = value.sum(2, keepdim=True)
        shares[name] = metrics.relevance_mass_accuracy(pixels.clamp(min=0), places, batch_dims=2)[:, 0]
        row = "".join(f"{share:>16.2f}" for share in shares[name])
        print(f"{name:<24}{row}{value[0].sum():>12.3f}{logits[0]:>9.3f}")
    best = max(shares["epsilon_plus"].min(), shares["epsilon_gamma_box"].min())

    # The books: relevance is not lost, it is taken up by something. `absorbed=True` says by which operation.
    checks = []
    for name in ("epsilon_gamma_box",) if short else ("epsilon_plus", "epsilon_gamma_box"):
        ledger = lrp(f, merged, inputs, rules=presets()[name], targets=CAT, absorbed=True)
        taken = {site: value.item() for site, value in ledger.absorbed.items()}
        reached = ledger.relevance.sum().item()
        total = reached + sum(taken.values())
        print(f"\n{name}: logit {logits[0]:.3f} = {reached:.3f} in the pixels + {sum(taken.values()):.3f} absorbed, most by")
        for site, value in sorted(taken.items(), key=lambda item: -abs(item[1]))[:4]:
            print(f"    {value:>+8.3f}  {site}")
        error = abs(total / logits[0].item() - 1)
        checks.append(check(f"{name}: pixels + absorbed = logit", error < 1e-3, error))
    print("The convolutions have no bias, so a merged batch norm is left with its shift, and takes up what that is worth.")
    return [
        check("with rules, the same outputs bit for bit", same),
        check("merged batch norms, the same function", moved < 1e-4, moved),
        check("a preset finds the cat left and the coffee right (0.5 is chance)", best > 0.6, best),
        *checks,
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Part two: is it any good
# ---------------------------------------------------------------------------------------------------------------------

PHOTOGRAPHS = ("chelsea", "coffee", "rocket", "astronaut")


def flipping(out: Path, short: bool) -> list[bool]:
    """Patches are blanked, most relevant first: how soon does the logit of the class go?"""
    pictures = PHOTOGRAPHS[:2] if short else PHOTOGRAPHS
    headline(f"Pixel flipping: EfficientNet-Lite0, {len(pictures)} photographs")
    f, params, merged = network()
    inputs = torch.cat([photograph(name)[0] for name in pictures])
    with torch.no_grad():
        logits = f(params, inputs)
    best = tdhook.targets.per_example(logits.argmax(-1))

    side, steps = 14, 7 if short else 14
    ids = torch.arange(224) // (224 // side)
    patches = (ids[:, None] * side + ids).expand(1, 1, 224, 224)
    found = {
        "gradient, magnitude": attribution.saliency(f, params, inputs, targets=best),
        "input x gradient": attribution.input_x_gradient(f, params, inputs, targets=best),
        **{name: lrp(f, merged, inputs, rules=table, targets=best) for name, table in presets().items()},
        "random": torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0)),
    }
    results = {}
    with torch.no_grad():
        for name, value in found.items():
            by_patch = torch.stack([value.sum(1).flatten(1)[:, (patches.flatten() == p)].sum(1) for p in range(side**2)], -1)
            everywhere = by_patch[:, patches[0, 0]][:, None]
            results[name] = metrics.pixel_flipping(
                f, params, inputs, everywhere, targets=best, groups=patches, steps=steps, chunk_size=8
            )
    scale = logits.gather(1, logits.argmax(-1, keepdim=True))
    print(f"{'mean logit left, 1 is all of it':<34}" + "".join(f"{name:>11}" for name in pictures) + f"{'mean':>9}")
    areas = {}
    for name, curve in results.items():
        each = (curve.values / scale).mean(-1)
        areas[name] = each.mean().item()
        print(f"{name:<34}" + "".join(f"{value:>11.3f}" for value in each) + f"{areas[name]:>9.3f}")
    figure = curves(
        100 * next(iter(results.values())).fractions,
        torch.stack([(curve.values / scale).mean(0) for curve in results.values()]),
        labels=list(results),
        title="EfficientNet-Lite0, most relevant patches first",
        x_label="patches taken out (%)",
        y_label="logit left, mean over photographs",
    )
    figure.savefig(out / "relevance_flipping.png", dpi=110)
    ours = min(areas[name] for name in presets())
    checks = [check("the best preset beats chance", ours < areas["random"], areas["random"] - ours)]
    if not short:
        better = areas["input x gradient"] - ours
        checks.append(check("the best preset beats input x gradient", better > 0, better))
    return checks


# ---------------------------------------------------------------------------------------------------------------------
# Part three: tokens of a language model
# ---------------------------------------------------------------------------------------------------------------------

EMBEDDING = "model.embed_tokens"
QUESTION = "The Eiffel Tower is in Paris. The Colosseum is in the city of"


@cache
def language_model() -> tuple[Any, Any, Any]:
    """SmolLM2 as a function, its parameters, and its tokenizer."""
    model, tokenizer = smollm2()
    return *tdhook.functionalize(model, use_cache=False, logits_to_keep=1), tokenizer


def tokens(out: Path, short: bool) -> list[bool]:
    """AttnLRP and CP-LRP of the next token, with no code for this model."""
    headline("Relevance of tokens: SmolLM2-135M")
    f, params, tokenizer = language_model()
    ids, words = torch.tensor([tokenizer.encode(QUESTION)]), tokenizer.tokens(QUESTION)
    with torch.no_grad():
        logits = f(params, ids).logits[0, -1]
    answer = int(logits.argmax())
    target = tdhook.targets.index(answer, key="logits", position=-1)
    print(f"{QUESTION} ... {tokenizer.decode([answer])!r}, logit {logits[answer]:.3f}\n")

    report = rules.explain(f, params, ids, rules.attn_lrp(), strict=True)
    block = [line for line in str(report).splitlines() if line.startswith(("model.layers.0.", "model.layers.0/"))]
    print("\n".join(line for line in block if "gradient" not in line), "\n")

    # With epsilon = 0 CP-LRP absorbs nothing in a Llama: norms have a frozen scale, patterns and gates are constants, there
    # are no biases. AttnLRP gives attention patterns relevance, and softmax takes a part of it (which may be negative).
    tables = {
        "input x gradient": {"linear": rules.Gradient()},
        "AttnLRP": rules.attn_lrp(),
        "CP-LRP": rules.cp_lrp(0.0),
    }
    pages, sums = [], {}
    for name, table in tables.items():
        scores = lrp(f, params, ids, rules=table, targets=target, at=EMBEDDING)[EMBEDDING][0].sum(-1)
        sums[name] = scores.sum().item()
        pages.append(tokens_html(words, scores, title=f"SmolLM2-135M, {name}: {tokenizer.decode([answer])!r}", label="logit"))
        print(tokens_terminal(words, scores, titles=[f"{name}, sum {sums[name]:.3f}"], label="part of the logit") + "\n")
    (out / "relevance_tokens.html").write_text("\n".join(pages))

    # In the books of CP-LRP every cut through the residual stream carries the whole logit.
    cuts = [f"model.layers.{i}" for i in (0, 10, 20, 29)]
    carried = lrp(f, params, ids, rules=rules.cp_lrp(0.0), targets=target, at=cuts)
    error = max(abs(carried[cut].sum() / logits[answer] - 1).item() for cut in cuts)
    missing = abs(sums["CP-LRP"] / logits[answer].item() - 1)
    ledger = lrp(f, params, ids, rules=rules.attn_lrp(), targets=target, at=EMBEDDING, absorbed=True)
    groups: dict[str, float] = {}
    for site, value in ledger.absorbed.items():
        kind = site.rpartition("/")[2].partition("@")[0]
        groups[kind] = groups.get(kind, 0.0) + value.item()
    most = ", ".join(f"{kind} {value:+.2f}" for kind, value in sorted(groups.items(), key=lambda item: -abs(item[1]))[:3])
    books = abs((sums["AttnLRP"] + sum(groups.values())) / logits[answer].item() - 1)
    print(f"AttnLRP: {sums['AttnLRP']:.3f} at the tokens, absorbed by {most}")
    return [
        check("CP-LRP: the tokens add up to the logit", missing < 1e-3, missing),
        check("CP-LRP: so do the values at any block", error < 1e-3, error),
        check("AttnLRP: tokens + absorbed = logit", books < 1e-3, books),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Part four: what makes two sentences similar
# ---------------------------------------------------------------------------------------------------------------------

PAIR = ("A cat is sleeping on the warm sofa.", "The kitten naps on a comfortable couch while it rains.")


def sentences(out: Path, short: bool) -> list[bool]:
    """AttnLRP of the dot product of two embeddings; what biases absorb."""
    headline("Two sentences: MiniLM")
    model, tokenizer = minilm()
    f, params = tdhook.functionalize(model)
    batch = dict(tokenizer(list(PAIR), padding=True, return_tensors="pt"))
    real = batch["attention_mask"].float()

    def embeddings(output: Any) -> Tensor:
        return (output.last_hidden_state * real[..., None]).sum(-2) / real.sum(-1, keepdim=True)

    with torch.no_grad():
        fixed = embeddings(f(params, batch))
    direction = fixed.flip(0) / (fixed.norm(dim=-1, keepdim=True) * fixed.flip(0).norm(dim=-1, keepdim=True))

    # The cosine with both lengths held fixed is linear in the embedding that is explained: the relevance starts with it.
    def cosine(output: Any) -> Tensor:
        return (embeddings(output) * direction).sum(-1)

    similarity = cosine_similarity(fixed[0], fixed[1], dim=0).item()
    site = "embeddings.word_embeddings"
    result = lrp(f, params, batch, rules=rules.attn_lrp(), targets=cosine, at=site)
    scores = result[site].sum(-1)
    leading = []
    for i, sentence in enumerate(PAIR):
        count = int(real[i].sum())
        pieces = tokenizer.convert_ids_to_tokens(batch["input_ids"][i, :count].tolist())
        shown = [f" {piece}" for piece in pieces]
        print(tokens_terminal(shown, scores[i, :count], titles=[f"with “{PAIR[1 - i]}”"], label="part of the cosine") + "\n")
        (out / f"relevance_sentence_{i}.html").write_text(tokens_html(shown, scores[i, :count], title=sentence))
        leading.append([pieces[p] for p in scores[i, 1 : count - 1].topk(3).indices + 1])
    shares = ", ".join(f"{value:.2f}" for value in scores.sum(-1))
    print(f"cosine {similarity:.2f}, of which word embeddings have {shares}; biases and positions have the rest")
    nothing = (scores * (1 - real)).abs().max().item()
    return [
        check("nothing comes from padding", nothing < 1e-6, nothing),
        check("an animal is among the three words that count most", "cat" in leading[0] or "kitten" in leading[1]),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Part five: the same rules for patching
# ---------------------------------------------------------------------------------------------------------------------

# Pairs of prompts of the same length whose answers are two names.
PROMPTS = (
    ("When Mary and John went to the store, {} gave a drink to", " John", " Mary"),
    ("Then Tom and James went to the park, and {} handed a ball to", " James", " Tom"),
    ("After Anna and Peter had lunch at the cafe, {} passed the bill to", " Peter", " Anna"),
    ("While David and Sarah were working at the office, {} gave a book to", " Sarah", " David"),
)


def patching(out: Path, short: bool) -> list[bool]:
    """How well attribution patching, RelP and RelP with frozen patterns estimate exact patches."""
    prompts = PROMPTS[:1] if short else PROMPTS
    headline(f"RelP against activation patching: SmolLM2-135M, {len(prompts)} pair{'s' * (len(prompts) > 1)} of prompts")
    f, params, tokenizer = language_model()
    blocks = "[::10]" if short else "[::5]"
    kinds = {
        "residual": tdhook.expand(f, f"model.layers{blocks}"),
        "attention": tdhook.expand(f, f"model.layers{blocks}.self_attn:out[0]"),
        "MLP": tdhook.expand(f, f"model.layers{blocks}.mlp"),
    }
    sites = [site for found in kinds.values() for site in found]
    # One exact patch is a run of the model from the site on. An estimate is the difference of the two runs times a gradient:
    # one backward pass for all sites and tokens. Where the gradient is not what the network does on the way between the two,
    # it is wrong; with rules, "the gradient" is that of a network whose norms and activations are linear.
    models = {
        "attribution patching": f,
        "RelP": tdhook.with_rules(f, rules.relp()),
        "RelP, frozen patterns": tdhook.with_rules(f, rules.relp_ah()),
    }
    correlations: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in models}
    seconds = dict.fromkeys(("exact", *models), 0.0)
    for text, repeated, other in prompts:
        clean, corrupted = (torch.tensor([tokenizer.encode(text.format(name.strip()))]) for name in (repeated, other))
        (right,), (wrong,) = tokenizer.encode(other), tokenizer.encode(repeated)
        metric = tdhook.targets.logit_difference(right, wrong, key="logits", position=-1)
        differ = int((clean != corrupted).nonzero()[0, 1])  # before this token the runs are the same: all effects are 0
        given: dict[str, Any] = {"sites": sites, "positions": range(differ, clean.shape[1])}
        begun = time.perf_counter()
        with torch.no_grad():
            run = activation_patching(f, params, clean, corrupted, metric, **given)
        seconds["exact"] += time.perf_counter() - begun
        effects = (run.patched - run.corrupted).reshape(len(kinds), -1)
        for name, model in models.items():
            begun = time.perf_counter()
            estimates = attribution_patching(model, params, clean, corrupted, metric, **given).effects
            seconds[name] += time.perf_counter() - begun
            for kind, estimate, exact in zip(kinds, estimates.reshape(len(kinds), -1), effects, strict=True):
                correlations[name][kind].append(pearson(estimate, exact))
        print(f"{text.format(repeated.strip())} ...  {run.corrupted.item():+.2f} -> {run.clean.item():+.2f}", flush=True)

    print(f"\n{'Pearson correlation, mean':<26}" + "".join(f"{kind:>12}" for kind in kinds) + f"{'seconds':>12}")
    means = {name: {kind: sum(found) / len(found) for kind, found in row.items()} for name, row in correlations.items()}
    for name, row in means.items():
        print(f"{name:<26}" + "".join(f"{value:>12.3f}" for value in row.values()) + f"{seconds[name]:>12.1f}")
    print(f"{'exact patches':<26}" + 36 * " " + f"{seconds['exact']:>12.1f}")
    print("\nWith frozen patterns (AH) the effect of attention may come out with the wrong sign: compare before trusting it.")
    better = means["RelP"]["MLP"] - means["attribution patching"]["MLP"]
    return [
        check("RelP correlates with exact patches of MLPs", means["RelP"]["MLP"] > 0.7, means["RelP"]["MLP"]),
        check("and better than attribution patching", better > 0, better),
    ]


def pearson(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]).double())[0, 1].item()


# ---------------------------------------------------------------------------------------------------------------------
# Part six: a recurrent network
# ---------------------------------------------------------------------------------------------------------------------


class Adder(nn.Module):
    """An LSTM that reads pairs (number, mark) and returns the sum of the two numbers that are marked."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 24, batch_first=True)
        self.head = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])[:, 0]


def marked(batch: int, length: int = 8) -> tuple[Tensor, Tensor]:
    """Sequences [B, L, 2] of numbers and marks, and the sums [B] of the two numbers that are marked."""
    numbers = torch.rand(batch, length) + 0.2
    marks = torch.zeros(batch, length).scatter(1, torch.rand(batch, length).topk(2).indices, 1.0)
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(-1)


def lstm(out: Path, short: bool) -> list[bool]:
    """A tiny LSTM, trained on the spot to add two marked numbers; which steps does it use?"""
    headline("An LSTM that adds two marked numbers")
    torch.manual_seed(0)
    model = Adder()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(500):
        x, wanted = marked(128)
        optimiser.zero_grad()
        loss = ((model(x) - wanted) ** 2).mean()
        loss.backward()
        optimiser.step()
    f, params = tdhook.functionalize(model.eval().requires_grad_(False))
    x, wanted = marked(200)

    # torch runs an LSTM as one fused operation. With rules it is carried out in its parts; its values stay the fused ones.
    # CP-LRP takes gates for constants, which for LSTMs is the rule of Arras et al.: all relevance goes to the signal.
    g = tdhook.with_rules(f, rules.cp_lrp())
    with torch.no_grad():
        same = bool((g(params, x) == f(params, x)).all())
        error = (f(params, x) - wanted).abs().mean().item()
    found = {
        "gradient, magnitude": attribution.saliency(f, params, x),
        "input x gradient": attribution.input_x_gradient(f, params, x),
        "CP-LRP": lrp(f, params, x, rules=rules.cp_lrp()),
        "AttnLRP (half to gates)": lrp(f, params, x, rules=rules.attn_lrp()),
    }
    print(f"mean error {error:.3f}\n{'share of |relevance| at the two marked steps (0.25 is chance)':<62}")
    marks = x[..., 1].bool()
    shares = {}
    for name, value in found.items():
        steps = value.sum(-1).abs()
        shares[name] = ((steps * marks).sum(-1) / steps.sum(-1)).mean().item()
        print(f"    {name:<26}{shares[name]:.2f}")
    print(
        "The mark acts by opening gates, and a gate that is a constant has no relevance: the gradient sees it, CP-LRP does not."
    )
    ledger = lrp(f, params, x[:1], rules=rules.cp_lrp(), absorbed=True)
    total = (ledger.relevance.sum() + sum(value.sum() for value in ledger.absorbed.values())).item()
    books = abs(total / f(params, x[:1]).item() - 1)
    return [
        check("with rules, the same outputs bit for bit", same),
        check("CP-LRP finds the marked steps", shares["CP-LRP"] > 0.4, shares["CP-LRP"]),
        check("CP-LRP: steps + absorbed = output", books < 1e-3, books),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------------


def relative(values: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest number of the reference."""
    return ((values - reference).abs().max() / reference.abs().max()).item()


if __name__ == "__main__":
    # torch's vmap calls the backward of the fused attention kernel once per example and says so
    warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
    sys.exit(main())
