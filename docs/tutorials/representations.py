"""What trained models hold inside: probes with their controls, erasure, similarity of layers, intrinsic dimension.

    make demo                                                  # the other tutorials, then this: pictures in out/
    python docs/tutorials/representations.py --short           # fewer sentences, texts and resamplings
    python docs/tutorials/representations.py --only number     # one part: number, similarity, dimension, digits or stripes

Every part ends with checks: numbers that have to agree with another way of computing them, or with what is known to be
true. The script ends with an error if one of them does not hold.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import tdhook
from checked_parts import check, headline, run
from real_models import digits, efficientnet, imagenet_classes, minilm, photograph, smollm2
from tdhook.latent import collect, concepts, dimension, names, probes, similarity, top_activating
from tdhook.plotting import curves, matrix_map


def main() -> int:
    """Run all parts; return the number of checks that failed."""
    parts = {"number": number, "similarity": layers, "dimension": dimensions, "digits": images, "stripes": stripes}
    return run(parts, __doc__, short="fewer sentences, texts and resamplings")


# ---------------------------------------------------------------------------------------------------------------------
# Part one: is a noun singular or plural?
# ---------------------------------------------------------------------------------------------------------------------

NOUNS = str.split("""
apple artist bird boat book bottle boy brother car cat chair cloud coat cook cow crown daughter desk doctor dog
dream driver duck eagle engine farmer field flower forest friend garden girl guest hammer hat horse hotel island jacket judge
king lake lamp leader letter lion machine market mirror monkey mountain neighbor nurse ocean office painter paper pencil picture
pilot plant poet prince queen river road rock sailor school ship singer sister soldier song spoon star student table teacher
tiger tower town train tree uncle valley village wall window winner writer yard
""")
TEMPLATES = ["I looked at the", "Yesterday we talked about the", "Nobody had seen the", "She was thinking of the"]
ANIMATE = str.split("""
artist bird boy brother cat cook cow daughter doctor dog driver duck eagle farmer friend girl guest horse judge king leader
lion monkey neighbor nurse painter pilot poet prince queen sailor singer sister soldier student teacher tiger uncle winner
writer
""")


def plural(noun: str) -> str:
    """The plural of a regular noun."""
    return noun[:-1] + "ies" if re.search("[^aeiou]y$", noun) else noun + "s"


def number(out: Path, short: bool) -> list[bool]:
    """Ten labels of nouns in sentences, read at every layer in one call; one of them erased."""
    headline("Probes: SmolLM2 reads singular and plural nouns")
    model, tokenizer = smollm2()
    f, params = tdhook.functionalize(model, use_cache=False, logits_to_keep=1)
    templates = TEMPLATES[:2] if short else TEMPLATES
    cases = [(t, n, p) for t in range(len(templates)) for n in range(len(NOUNS)) for p in (0, 1)]
    sentences = [f"{templates[t]} {plural(NOUNS[n]) if p else NOUNS[n]}" for t, n, p in cases]
    encoded = [tokenizer.encode(sentence) for sentence in sentences]
    stream = names(f, params).residual_post
    sites = ["model.embed_tokens", *stream[:: 5 if short else 1]]

    # The last token of each sentence, at every layer: one pass over the data, which stops after the last site.
    values = collect(f, params, batches_of(encoded, 64), sites, pool="last", progress=None)
    lemma = torch.tensor([n for _, n, _ in cases])
    labels = torch.tensor(
        [
            [p for _, _, p in cases],
            [int(NOUNS[n] in ANIMATE) for _, n, _ in cases],
            [int(NOUNS[n][0] in "aeiou") for _, n, _ in cases],
            [int(len(NOUNS[n]) > 5) for _, n, _ in cases],
            [int(len(ids) > min(map(len, encoded)) + 1) for ids in encoded],
            [t % 2 for t, _, _ in cases],
            [int(NOUNS[n] < "l") for _, n, _ in cases],
            [int("o" in NOUNS[n]) for _, n, _ in cases],
            [int(NOUNS[n].endswith("er")) for _, n, _ in cases],
            [int(NOUNS[n][0] in "bcdfgh") for _, n, _ in cases],
        ]
    )
    titles = ["plural", "animate", "starts with a vowel", "long word", "many tokens", "which sentence", "before l", "has an o"]
    titles += ["ends with er", "starts with b to h"]

    # Nouns of the test folds were not seen in training. All sites, labels and folds are one call.
    fit = partial(probes.logistic, strength=1.0 if short else 10.0, tolerance=1e-4)
    found = probes.cross_validate(fit, values, labels, folds=4, groups=lemma, score="balanced_accuracy")
    accuracy = torch.stack([found[site].mean.value for site in sites])  # [S, T]
    # Two controls with labels drawn by lot. Of words that the probe has seen it can learn them by heart, and does, with 576
    # numbers for each: that the label of a seen word can be read says little. Of words that it has not seen it cannot.
    random = torch.Generator().manual_seed(0)
    seen = probes.selectivity(fit, values, labels[0], 2 * lemma + labels[0], generator=random, score="balanced_accuracy")
    lots = torch.randint(0, 2, (3, len(NOUNS)), generator=random)[:, lemma]
    unseen = probes.cross_validate(fit, values, lots, folds=4, groups=lemma, score="balanced_accuracy")
    control = torch.stack([unseen[site].mean.value.mean() for site in sites])
    by_heart = torch.stack([seen[site].control.value for site in sites])
    places, shown = list(range(len(sites))), [0, 1, 3, 6, 8, 9]
    figure = curves(
        places,
        torch.stack([*accuracy.T[shown], control, by_heart]),
        labels=[*(titles[i] for i in shown), "labels by lot", "the same, of seen words"],
        title="SmolLM2: labels of unseen nouns",
        x_label="layer" if not short else "site",
        y_label="balanced accuracy",
    )
    figure.savefig(out / "probes.png", dpi=80)
    show([(t, f"{accuracy[:, i].max():.2f} at {sites[accuracy[:, i].argmax()]}") for i, t in enumerate(titles)])

    # The same by hand, for one site: train on three quarters of the nouns, test on the others.
    site = sites[len(sites) // 2]
    test = lemma % 4 == 0
    probe = fit(values[site][~test], labels[0][~test])
    by_hand = (probes.predict(probe, values[site][test]) == labels[0][test]).double().mean().item()

    # LEACE removes what is linear in a label, and only that: a new probe is at chance, the word is still animate or not.
    eraser = concepts.leace(values[site][~test], labels[0][~test])
    erased = eraser(values[site])
    again = fit(erased[~test], labels[0][~test])
    after = (probes.predict(again, erased[~test]) == labels[0][~test]).double().mean().item()
    kept = fit(erased[~test], labels[1][~test])
    animate = (probes.predict(kept, erased[test]) == labels[1][test]).double().mean().item()
    print(f"{site}: number {by_hand:.2f}, after erasure {after:.2f} (in training), animate after erasure {animate:.2f}")
    return [
        check("plural is read at nearly every noun", accuracy[:, 0].max().item() > 0.95),
        check("labels by lot are not, unless the word was seen", bool(control.max() < 0.65 and by_heart.max() > 0.8)),
        check("a split by hand agrees", abs(by_hand - accuracy[len(sites) // 2, 0].item()) < 0.1),
        check("erased: at chance", abs(after - 0.5) < 0.02),
        check("erased: another label is still there", animate > 0.75),
    ]


def batches_of(encoded: list[list[int]], size: int) -> list[dict[str, Tensor]]:
    """Sentences as padded batches with their masks."""
    batches = []
    for start in range(0, len(encoded), size):
        part = encoded[start : start + size]
        length = max(map(len, part))
        ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in part])
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in part])
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


# ---------------------------------------------------------------------------------------------------------------------
# Part two: all layers of two models
# ---------------------------------------------------------------------------------------------------------------------


def texts(short: bool) -> list[str]:
    """Sentences of this project's documentation."""
    folder = Path(__file__).resolve().parent.parent
    pages = " ".join((folder / name).read_text() for name in ("getting_started.md", "gotchas.md", "attribution.md"))
    prose = re.sub(r"```.*?```|`[^`]*`|[#*|>\[\]()]", " ", pages, flags=re.DOTALL)
    found = [" ".join(s.split()) for s in re.split(r"(?<=[.:;])\s", prose)]
    return [s for s in found if 25 < len(s) < 160][: 80 if short else 160]


def layers(out: Path, short: bool) -> list[bool]:
    """Similarity of every layer of a language model with every layer of a sentence encoder."""
    headline("Similarity: SmolLM2 and MiniLM on the same sentences")
    sentences = texts(short)
    model, tokenizer = smollm2()
    f, params = tdhook.functionalize(model, use_cache=False, logits_to_keep=1)
    language = ["model.embed_tokens", *names(f, params).residual_post]

    def without_first(batch: dict[str, Tensor]) -> Tensor:
        # The first token carries huge activations in every layer, which would make all layers alike.
        mask = batch["attention_mask"].clone()
        mask[:, 0] = 0
        return mask.bool()

    encoded = [tokenizer.encode(s) for s in sentences]
    of_language = collect(f, params, batches_of(encoded, 16), language, pool="mean", positions=without_first)

    encoder, encoder_tokenizer = minilm()
    g, encoder_params = tdhook.functionalize(encoder)
    sites = ["embeddings", *names(g, encoder_params).residual_post]
    encoded = [encoder_tokenizer(s)["input_ids"] for s in sentences]
    of_encoder = collect(g, encoder_params, batches_of(encoded, 16), sites, pool="mean")

    # More features than sentences: only the debiased measure tells anything.
    alike = partial(similarity.cka, debiased=True)
    within = similarity.compare(alike, of_language)
    between = similarity.compare(alike, of_language, of_encoder)
    matrix_map(*within, title=f"SmolLM2, {len(sentences)} sentences", label="CKA, debiased").savefig(out / "cka.png", dpi=80)
    figure = matrix_map(*between, title="SmolLM2 and MiniLM", label="CKA, debiased", row_label="SmolLM2", column_label="MiniLM")
    figure.savefig(out / "cka_two_models.png", dpi=80)
    biased = similarity.cka(of_language[language[5]], of_encoder[sites[-1]])
    best = between.matrix.argmax().item()
    print(f"nearest: {between.rows[best // len(sites)]} and {between.columns[best % len(sites)]}, {between.matrix.max():.2f}")

    x, y = (v.double() - v.double().mean(0) for v in (of_language[language[3]], of_language[language[20]]))
    by_hand = (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    neighbours = torch.stack([within.matrix[i, i + 1] for i in range(1, len(language) - 1)]).mean().item()
    return [
        check("CKA as in its formula", abs(similarity.cka(x, y) - by_hand).item() < 1e-9),
        check("a layer is most like itself", bool((within.matrix.diagonal() > 0.999).all())),
        check("the next layer is alike", neighbours > 0.8),
        check("debiasing lowers it", bool(between.matrix[5, -1] < biased)),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Part three: dimension by layer
# ---------------------------------------------------------------------------------------------------------------------


def dimensions(out: Path, short: bool) -> list[bool]:
    """How many directions a token can move in, layer by layer."""
    headline("Intrinsic dimension: the tokens of a text in SmolLM2")
    model, tokenizer = smollm2()
    f, params = tdhook.functionalize(model, use_cache=False, logits_to_keep=1)
    ids = tokenizer.encode(" ".join(texts(False)))[: 600 if short else 1500]
    windows = [ids[i : i + 100] for i in range(0, len(ids) - 99, 100)]
    sites = names(f, params).residual_post[:: 6 if short else 3]
    values = collect(f, params, batches_of(windows, 4), list(sites), pool="rows", keep=None)
    later = values["position"] > 0  # the first token of every window is a near copy of the others
    points = {site: values[site][later] for site in sites}

    found = {
        "TwoNN": dimension.two_nn(points),
        "Levina-Bickel, k = 10": dimension.levina_bickel(points, k=10),
        "local PCA, k = 40": dimension.local_pca(points, k=40),
    }
    rows = {name: torch.stack([result[site].value for site in sites]) for name, result in found.items()}
    interval = dimension.confidence_interval(
        dimension.two_nn, points[sites[0]], samples=50 if short else 200, generator=torch.Generator().manual_seed(0)
    )
    figure = curves(
        list(range(0, 30, 6 if short else 3)),
        torch.stack(list(rows.values())),
        labels=list(rows),
        title=f"Dimension of {int(later.sum())} tokens in 576",
        x_label="layer",
        y_label="dimension",
    )
    figure.savefig(out / "dimension.png", dpi=80)
    show([(name, " ".join(f"{v:5.1f}" for v in row.tolist())) for name, row in rows.items()])
    print(f"first layer, TwoNN: {interval.value:.1f}, 95 % in [{interval.low:.1f}, {interval.high:.1f}]")

    ball = torch.randn(1500, 5, generator=torch.Generator().manual_seed(1)) @ torch.randn(5, 576)
    known = dimension.two_nn(ball).value.item()
    return [
        check("a plane of 5 dimensions has 5", abs(known - 5) < 0.6),
        check("far fewer than there are directions", bool(torch.stack(list(rows.values())).max() < 60)),
        check("the interval holds the estimate", bool(interval.low < interval.value < interval.high)),
        check("the dimension grows from the first layer to the last", bool(rows["TwoNN"][-1] > rows["TwoNN"][0])),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Part four: a classifier of digits
# ---------------------------------------------------------------------------------------------------------------------


def images(out: Path, short: bool) -> list[bool]:
    """What each layer of a classifier knows, and which images excite its units."""
    headline("Digits: the label, layer by layer, and the units of a layer")
    model, x, y = digits()
    x, y = x[::5], y[::5]
    f, params = tdhook.functionalize(model)
    trace = tdhook.trace(f, params, x[:2], operations=False)
    sites = [row.site for row in trace if row.depth == 1][:: 1 if not short else 2]
    values = collect(f, params, x.split(100), sites, pool=lambda value, mask: value.flatten(1)[:, :2000])
    fit = partial(probes.ridge, penalty=(1.0, 10.0, 100.0, 1000.0))
    one_hot = torch.eye(10)[y].T  # ten regressions, one for each digit
    train = torch.arange(len(y)) % 4 != 0
    fitted = fit({site: v[train] for site, v in values.items() if site in sites}, one_hot[:, train])
    accuracy = {}
    for site in sites:
        scores = probes.decision(fitted[site], values[site][~train])
        accuracy[site] = (scores.argmax(0) == y[~train]).float().mean().item()
    show([(site, f"{a:.3f}") for site, a in accuracy.items()])

    last = sites[-2] if len(sites) > 1 else sites[-1]
    best = top_activating(f, params, x.split(100), last, k=9)
    chosen = best.units[best.values[:, 0].argsort(descending=True)[:8]]
    rows = [numpy.concatenate(list(x[best.examples[u]].squeeze(1).numpy()), 1) for u in chosen.tolist()]
    save_strip(
        out / "top_digits.png", rows, [f"unit {u}" for u in chosen.tolist()], f"Images that excite units of {last!r} most"
    )
    with torch.no_grad():
        everything = tdhook.stop_at(f, last)(params, x)
    by_hand = everything.flatten(2).amax(-1) if everything.ndim > 2 else everything
    expected = by_hand.topk(9, dim=0).values.T
    return [
        check("the label is there in the end", accuracy[sites[-1]] > 0.97),
        check("more than in the pixels", accuracy[sites[-1]] > accuracy[sites[0]]),
        check("the streamed top 9 are those of a full sort", torch.allclose(best.values, expected[best.units])),
    ]


def save_strip(path: Path, rows: list[Any], titles: list[str], title: str) -> None:
    """Rows of pictures with a title each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.8 * len(rows) + 0.6))
    for axes, row, name in zip(figure.subplots(len(rows), 1), rows, titles, strict=True):
        axes.imshow(row, cmap="gray_r")
        axes.set_axis_off()
        axes.set_title(name, fontsize=7, loc="left", pad=2)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=80)


# ---------------------------------------------------------------------------------------------------------------------
# Part five: a concept in an image classifier
# ---------------------------------------------------------------------------------------------------------------------

ZEBRA, ESPRESSO = 340, 967


def stripes(out: Path, short: bool) -> list[bool]:
    """Is a zebra striped? Concept vectors of stripes, and whether classes depend on them."""
    headline("Concepts: stripes in EfficientNet-Lite0")
    f, params = tdhook.functionalize(efficientnet())
    random = torch.Generator().manual_seed(0)
    places = [photograph(name)[0] for name in ("chelsea", "coffee", "rocket", "astronaut")]
    backgrounds = torch.cat([torch.roll(p, (31 * i, 17 * i), (2, 3)) for p in places for i in range(6 if short else 10)])
    backgrounds = backgrounds + 0.1 * torch.randn(backgrounds.shape, generator=random)

    def marked(x: Tensor, striped: bool) -> Tensor:
        """Half of the pixels dark, in stripes or in blots, so that nothing but the shape differs."""
        marks = []
        for _ in range(len(x)):
            period = int(torch.randint(8, 24, (), generator=random))
            column = (torch.arange(224) // (period // 2)) % 2
            bars = column.expand(224, 224) if torch.rand((), generator=random) < 0.5 else column[:, None].expand(224, 224)
            blots = torch.rand(224 // period + 1, 224 // period + 1, generator=random).round().long()
            marks.append(bars if striped else blots.repeat_interleave(period, 0).repeat_interleave(period, 1)[:224, :224])
        dark = torch.stack(marks)[:, None] == 1
        return torch.where(dark, x.amin(), 0.5 * x + 0.5 * x.amax())

    site = "_blocks.12"
    half = len(backgrounds) // 2
    concept = collect(f, params, marked(backgrounds, True).split(8), site, pool="mean", axis=(2, 3))[site]
    others = collect(f, params, marked(backgrounds, False).split(8), site, pool="mean", axis=(2, 3))[site]
    sets = [others[torch.randperm(len(others), generator=random)[:half]] for _ in range(6)]
    found = concepts.cav([concept], sets)
    names_of = imagenet_classes()
    pictures = backgrounds[:: max(1, len(backgrounds) // 16)]
    sensitivity = concepts.tcav(f, params, pictures, site, found, targets=[ZEBRA, ESPRESSO], axis=1, chunk_size=4)
    scores = sensitivity.sign_count  # [T, K, R]
    push = sensitivity.magnitude.flatten(1).mean(1)  # the mean derivative
    for t, c in enumerate((ZEBRA, ESPRESSO)):
        share = f"{scores[t].mean():.2f} of the pictures look more like it with more stripes"
        print(f"{names_of[c]}: {share}, the logit rises by {push[t]:.2f} for a unit of the concept")
    return [
        check("stripes can be told from blots", found.accuracy.mean().item() > 0.9),
        check("a zebra is striped", scores[0].mean().item() > 0.8),
        check("more than an espresso is", (push[0] > push[1]).item()),
    ]


def show(rows: list[tuple[str, str]]) -> None:
    """Print two columns."""
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {text}" for name, text in rows))


if __name__ == "__main__":
    sys.exit(main())
