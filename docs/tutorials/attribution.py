"""Attribution on trained models: maps of a photograph, all classes at once, tokens of a language model, two sentences.

    make demo                                                  # the quickstart, then this: pictures in out/
    python docs/tutorials/attribution.py --short               # fewer path points, methods and tokens
    python docs/tutorials/attribution.py --only steps          # one part: maps, classes, tokens, steps or sentences

Every part ends with checks: numbers that have to agree with another way of computing them, or with what is known to be
true. The script ends with an error if one of them does not hold.
"""

from __future__ import annotations

import sys
import time
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity, interpolate

import tdhook
from checked_parts import check, headline, run
from real_models import efficientnet, imagenet_classes, minilm, photograph, smollm2
from tdhook import attribution, metrics
from tdhook.attribution import aggregate_tokens, integrated_gradients, sequence_attribution
from tdhook.plotting import curves, heat_map_gallery, token_matrix, tokens_html, tokens_terminal


def main() -> int:
    """Run all parts; return the number of checks that failed."""
    parts = {"maps": maps, "classes": all_classes, "tokens": tokens, "steps": path_points, "sentences": sentences}
    return run(parts, __doc__, short="fewer path points, methods and tokens: under a minute")


# ---------------------------------------------------------------------------------------------------------------------
# Part one: maps of a photograph
# ---------------------------------------------------------------------------------------------------------------------

CAT, ESPRESSO, CUP = 285, 967, 968  # of ImageNet; 285 is "Egyptian cat"

# The last convolution's output, after its ReLU6. The network calls one activation module at its beginning and at its end:
# "@1" is the second call.
LAST = "_swish@1"


def collage() -> tuple[Tensor, numpy.ndarray]:
    """A cat on the left and a cup of coffee on the right: an image whose answer is known."""
    inputs, pixels = zip(*(photograph(name) for name in ("chelsea", "coffee")), strict=True)
    middle = slice(56, 168)
    return torch.cat([x[..., middle] for x in inputs], -1), numpy.concatenate([p[:, middle] for p in pixels], 1)


def maps(out: Path, short: bool) -> list[bool]:
    """Activation maps and pixel attributions of three classes."""
    headline("Maps: EfficientNet-Lite0, a cat and a cup of coffee")
    f, params = tdhook.functionalize(efficientnet())
    inputs, image = collage()
    names = imagenet_classes()
    targets = [CAT, ESPRESSO, CUP]
    with torch.no_grad():
        probabilities = f(params, inputs)[0].softmax(-1)
    titles = [f"{names[c]} ({probabilities[c]:.0%})" for c in targets]

    # Each call explains all three classes: one forward pass, and three backward passes from the logits to the site.
    by_gradient = {
        "GradCAM": attribution.grad_cam,
        "GradCAM++": attribution.grad_cam_plus_plus,
        "HiResCAM": attribution.hires_cam,
        "XGradCAM": attribution.x_grad_cam,
        "LayerCAM": attribution.layer_cam,
        "EigenGradCAM": attribution.eigen_grad_cam,
    }
    found = {name: cam(f, params, inputs, at=LAST, targets=targets)[LAST] for name, cam in by_gradient.items()}

    # Without gradients. EigenCAM knows no class. AblationCAM takes away each of 1,280 channels, which costs little: only
    # pooling and the last layer come after the site. ScoreCAM lets each channel through as a mask of the photograph, a
    # whole pass for each: at the block before, which has 320 channels.
    with torch.no_grad():
        eigen = attribution.eigen_cam(f, params, inputs, at=LAST)[LAST]
        found["EigenCAM (no class)"] = eigen.expand(len(targets), *eigen.shape)
        found["AblationCAM"] = attribution.ablation_cam(f, params, inputs, at=LAST, targets=targets, chunk_size=64)[LAST]
        if not short:
            block = "_blocks.15"
            found["ScoreCAM"] = attribution.score_cam(f, params, inputs, at=block, targets=targets, chunk_size=8)[block]
    figure = heat_map_gallery(image, found, titles=titles, photograph=False)
    figure.suptitle("Activation maps of EfficientNet-Lite0")
    figure.savefig(out / "maps.png", dpi=70)

    # The cat is on the left, the coffee on the right: how much of each map lies where it belongs?
    right = torch.zeros(1, 1, 224, 224, dtype=torch.bool)
    right[..., 112:] = True
    places = torch.stack([~right, right, right])
    print(f"{'share on the right half':<26}" + "".join(f"{names[c]:>16}" for c in targets) + f"{'worst in place':>18}")
    shares = {}
    for name, cam in found.items():
        full = interpolate(cam, (224, 224), mode="bilinear")[:, :, None]
        shares[name] = metrics.relevance_mass_accuracy(full, places, batch_dims=2)[:, 0]
        on_right = metrics.relevance_mass_accuracy(full, right[None], batch_dims=2)[:, 0]
        print(f"{name:<26}" + "".join(f"{share:>16.2f}" for share in on_right) + f"{shares[name].min():>18.2f}")

    # Earlier sites have finer maps and know less of classes. All sites come out of one backward pass for each class.
    sites = ["_blocks.4", "_blocks.10", LAST]
    at_sites = {
        f"{label} at {site}": value
        for label, cam in (("GradCAM", attribution.grad_cam), ("LayerCAM", attribution.layer_cam))
        for site, value in cam(f, params, inputs, at=sites, targets=targets).items()
    }
    heat_map_gallery(image, at_sites, titles=titles, photograph=False).savefig(out / "maps_at_sites.png", dpi=70)

    # Down to pixels. Guided GradCAM multiplies a map with guided backpropagation; the other two look at the pixels only.
    grey = torch.Generator().manual_seed(0)
    smoothgrad = attribution.smooth(attribution.saliency, samples=3 if short else 16, chunk_size=2, generator=grey)
    steps = 4 if short else 24
    pixels = {
        "guided GradCAM": attribution.guided_grad_cam(f, params, inputs, at=LAST, targets=targets),
        "integrated gradients": integrated_gradients(f, params, inputs, targets=targets, steps=steps, chunk_size=4),
        "smoothed saliency": smoothgrad(f, params, inputs, targets=targets).value,
    }
    heat_map_gallery(image, pixels, titles=titles, photograph=False, smoothing=1.5).savefig(out / "pixels.png", dpi=80)

    # Between this site and the logits there is only an average over space and a linear layer. Then the gradient is the
    # same at all positions, and GradCAM, HiResCAM and XGradCAM are one method. They differ at earlier sites.
    same = max(relative(found[name], found["GradCAM"]) for name in ("HiResCAM", "XGradCAM"))
    return [
        check("GradCAM, every class: more than 0.7 in its half", shares["GradCAM"].min() > 0.7, shares["GradCAM"].min()),
        check("before a linear head GradCAM = HiResCAM = XGradCAM", same < 1e-4, same),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Part two: all 1,000 classes, and whether to believe an attribution
# ---------------------------------------------------------------------------------------------------------------------


def all_classes(out: Path, short: bool) -> list[bool]:
    """Integrated gradients of every class for sixteen patches; deletion and insertion."""
    side = 2 if short else 4
    headline(f"All classes: EfficientNet-Lite0, {side**2} patches")
    f, params = tdhook.functionalize(efficientnet())
    inputs, image = collage()
    names = imagenet_classes()

    # A backward pass explains one class, so a thousand classes take a thousand at every path point; and the network has no
    # site narrower than that (its last features are 1,280) that `through=` could use. But whoever asks for sixteen patches
    # needs sixteen passes in forward mode, whatever the number of classes. `mode="auto"` sees that.
    #
    # The path begins at a blurred photograph. From grey it would need many more points: there the photograph appears on the
    # first tenth of the path.
    ids = torch.arange(224) // (224 // side)
    patches = ids[:, None] * side + ids
    every, steps = tdhook.targets.every(), 8 if short else 16
    blurred = avg_pool2d(inputs, 31, 1, 15, count_include_pad=False)
    explain = partial(integrated_gradients, f, params, inputs, baselines=blurred, steps=steps)
    begun = time.perf_counter()
    scores = explain(targets=every, groups=patches, chunk_size=1)
    took = time.perf_counter() - begun
    print(f"{scores.shape[0]} classes x {scores.shape[-1]} patches, {steps} path points, one call: {took:.1f} s\n")

    # The classes that each half of the image speaks for most.
    grid = rearrange(scores[:, 0], "t (h w) -> t h w", h=side)
    for where, half in (("left", grid[..., : side // 2]), ("right", grid[..., side // 2 :])):
        best = half.sum((-2, -1)).topk(6)
        print(f"{where:>6}: " + ", ".join(f"{names[c]} {v:+.1f}" for v, c in zip(*map(Tensor.tolist, best))))

    classes = [CAT, ESPRESSO, CUP]
    begun = time.perf_counter()
    reverse = explain(targets=classes, groups=patches, mode="reverse", chunk_size=4)
    each = (time.perf_counter() - begun) / 3
    # With ReLU6, a rounding error decides at a kink which of two slopes is taken, so single precision agrees to a percent.
    difference = relative(scores[classes], reverse)
    with torch.no_grad():
        gained = (f(params, inputs) - f(params, blurred))[0]
    missing = (scores[:, 0].sum(-1) - gained).abs().mean() / gained.abs().mean()
    print(f"\nreverse mode: {each:.1f} s for each class, {1000 * each:.0f} s for all")
    print(f"completeness with {steps} path points: {missing:.0%} of the difference is missing, on average over all classes")
    agreement = numpy.corrcoef(scores[:, 0].sum(-1).numpy(), gained.numpy())[0, 1]
    titles = [names[c] for c in classes]
    heat_map_gallery(
        image,
        {f"{side**2} patches": grid[classes].repeat_interleave(224 // side, -1).repeat_interleave(224 // side, -2)},
        titles=titles,
    ).savefig(out / "patches.png", dpi=80)

    # Who is right? Put the pixels into the blurred image, most relevant first: the class should come soon. Take them out:
    # it should go soon. A random order is the yardstick. Pixel by pixel, integrated gradients of a network with such kinks are
    # scattered: good at taking the cat out, hardly better than chance at putting it in.
    generator = torch.Generator().manual_seed(0)
    smoothgrad = attribution.smooth(attribution.saliency, samples=2 if short else 8, chunk_size=2, generator=generator)
    path = partial(integrated_gradients, baselines=blurred, steps=4 if short else 24, chunk_size=4)
    pixelwise = {
        "GradCAM": attribution.grad_cam(f, params, inputs, at=LAST, targets=CAT, size="inputs")[LAST][:, None],
        "integrated gradients": path(f, params, inputs, targets=CAT).sum(1, keepdim=True),
        "smoothed saliency": smoothgrad(f, params, inputs, targets=CAT).value.sum(1, keepdim=True),
        "random": torch.rand(1, 1, 224, 224, generator=generator),
    }

    def probability(output: Tensor) -> Tensor:
        return output.softmax(-1)[:, CAT]

    print(f"\n{'area under the curve':<24}{'insertion':>12}{'deletion':>12}")
    runs: dict[str, Any] = {}
    with torch.no_grad():
        for name, method in (("insertion", metrics.insertion), ("deletion", metrics.deletion)):
            measure = partial(method, targets=probability, baselines=blurred, steps=6 if short else 16, chunk_size=4)
            runs[name] = {label: measure(f, params, inputs, scored) for label, scored in pixelwise.items()}
    for label in pixelwise:
        print(f"{label:<24}" + "".join(f"{runs[name][label].area.item():>12.3f}" for name in runs))
    for name, results in runs.items():
        fractions = next(iter(results.values())).fractions
        figure = curves(
            100 * fractions,
            torch.cat([curve.values for curve in results.values()]),
            labels=list(results),
            title=f"{name.capitalize()}: pixels in the order of their attribution",
            x_label=f"pixels {'put in' if name == 'insertion' else 'taken out'} (%)",
            y_label=f"probability of {names[CAT]}",
        )
        figure.savefig(out / f"{name}.png", dpi=110)
    better = runs["insertion"]["GradCAM"].area - runs["insertion"]["random"].area
    return [
        check("forward mode = reverse mode, three classes", difference < 0.02, difference),
        check("sums over patches follow the scores of all classes", agreement > 0.5, agreement),
        check("GradCAM inserts the cat sooner than chance", better > 0, better),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Part three: which token comes from which
# ---------------------------------------------------------------------------------------------------------------------

EMBEDDING = "model.embed_tokens"
STORY = "The cat chased the mouse because it was hungry. The one who was hungry was the"
QUESTION = "The capital of France is"


@cache
def language_model() -> tuple[Any, Any]:
    """The model and its tokenizer, which two parts share: loading takes seconds."""
    return smollm2()


def tokens(out: Path, short: bool) -> list[bool]:
    """A matrix of generated against source tokens; every token of the vocabulary."""
    headline("Tokens: SmolLM2-135M and its own continuation")
    model, tokenizer = language_model()
    f, params = tdhook.functionalize(model, use_cache=False)
    prompt = torch.tensor([tokenizer.encode(STORY)])
    with torch.no_grad():
        ids = model.generate(prompt, max_new_tokens=8 if short else 20, do_sample=False, pad_token_id=0)
    start, words = prompt.shape[1], [tokenizer.decode([i]) for i in ids[0].tolist()]
    print(f"{STORY}\n... {tokenizer.decode(ids[0, start:].tolist())!r}\n")

    # One pass over prompt and continuation predicts every token: each row is one backward pass through that one run.
    begun = time.perf_counter()
    logits = sequence_attribution(f, params, ids, at=EMBEDDING, start=start, chunk_size=4)[0]
    took = time.perf_counter() - begun
    print(f"{logits.shape[0]} generated x {logits.shape[1]} source tokens, one teacher-forced pass: {took:.1f} s")

    # A logit alone also holds what speaks for many tokens. Sharper: why this token and not that one? For the animals the
    # other animal, for all others the runner-up. The gradient is local: where " cat" counts against the answer " cat", a
    # larger embedding would lower it, which does not say that the word is not needed.
    with torch.no_grad():
        best = f(params, ids).logits[0, start - 1 : -1].topk(2).indices
    (cat,), (mouse,) = tokenizer.encode(" cat"), tokenizer.encode(" mouse")
    swapped = {cat: mouse, mouse: cat}
    against = torch.tensor([swapped.get(token, second) for token, second in best.tolist()])
    contrast = sequence_attribution(f, params, ids, at=EMBEDDING, start=start, against=against, chunk_size=4)[0]

    ahead = torch.arange(start, ids.shape[1])[:, None] <= torch.arange(ids.shape[1])
    rivals = [tokenizer.decode([token]) for token in against.tolist()]
    rows = [f"{word.strip(' ')}/{rival.strip(' ')}" for word, rival in zip(words[start:], rivals, strict=True)]
    figure = token_matrix(
        contrast.masked_fill(ahead, torch.nan)[:, :-1],
        words[:-1],
        rows,
        title="SmolLM2-135M: what speaks for each token rather than for another one",
        label="part of the difference of logits",
        percentile=99.0,
    )
    figure.savefig(out / "token_matrix.png", dpi=110)
    page = tokens_html(
        words[:start], contrast[0, :start], title=f"SmolLM2-135M: {rows[0]}", label="part of the logit difference"
    )
    (out / "tokens.html").write_text(page)
    print(tokens_terminal(words[:start], contrast[0, :start], titles=[rows[0]], label="part of the logit difference"))

    # By hand: the gradient of one logit, times the embedding.
    row = 2
    embedded = params["model", "embed_tokens", "weight"][ids].requires_grad_()
    logit = model(inputs_embeds=embedded, use_cache=False).logits[0, start + row - 1, ids[0, start + row]]
    (gradient,) = torch.autograd.grad(logit, embedded)
    by_hand = relative(logits[row], (gradient * embedded).sum(-1)[0].detach())

    return [
        check("nothing comes from a token that is not there yet", bool((logits[ahead] == 0).all()), logits[ahead].abs().max()),
        check("one row = autograd by hand", by_hand < 1e-3, by_hand),
        *vocabulary(model, tokenizer, short),
    ]


def vocabulary(model: Any, tokenizer: Any, short: bool) -> list[bool]:
    """Integrated gradients of all 49,152 tokens at the last position."""
    f, params = tdhook.functionalize(model, use_cache=False, logits_to_keep=1)
    ids = torch.tensor([tokenizer.encode(QUESTION)])
    words = tokenizer.tokens(QUESTION)

    # Each source token is a group: five passes in forward mode at each path point give all 49,152 logits. The path begins
    # at the mean embedding, a token that says nothing in particular; the next part tells why the first token stays.
    table = params["model", "embed_tokens", "weight"]
    start = first_kept(table[ids[0]], table.mean(0))
    options: dict[str, Any] = dict(
        at=EMBEDDING,
        baselines={EMBEDDING: start},
        groups={EMBEDDING: torch.arange(len(words))[:, None]},
        steps=2 if short else 16,
    )
    every = tdhook.targets.every(key="logits", position=-1)
    begun = time.perf_counter()
    scores = integrated_gradients(f, params, ids, targets=every, chunk_size=1, **options)[:, 0]
    took = time.perf_counter() - begun
    print(f"\n{scores.shape[0]} logits x {scores.shape[1]} source tokens, {options['steps']} path points: {took:.1f} s")
    print(f"{QUESTION} ...   which logits each token raised most, above what it did to all:\n")
    for i, word in list(enumerate(words))[1:]:
        best = (scores[:, i] - scores[:, i].mean()).topk(6)
        print(f"{word!r:>12}  " + ", ".join(f"{tokenizer.decode([c])!r} {v:+.1f}" for v, c in zip(*map(Tensor.tolist, best))))

    (paris,) = tokenizer.encode(" Paris")
    target = tdhook.targets.index(paris, key="logits", position=-1)
    reverse = integrated_gradients(f, params, ids, targets=target, mode="reverse", chunk_size=8, **options)[0]
    difference = relative(scores[paris], reverse)
    return [check("all 49,152 logits by forward mode: ' Paris' = reverse mode", difference < 1e-3, difference)]


# ---------------------------------------------------------------------------------------------------------------------
# Part four: how many path points
# ---------------------------------------------------------------------------------------------------------------------


def path_points(out: Path, short: bool) -> list[bool]:
    """A fixed number of path points against `steps="auto"`, from four baselines."""
    headline("How many path points: SmolLM2-135M from four baselines")
    model, tokenizer = language_model()
    f, params = tdhook.functionalize(model, use_cache=False, logits_to_keep=1)
    ids = torch.tensor([tokenizer.encode(QUESTION)])
    other = torch.tensor([tokenizer.encode(QUESTION.replace("France", "Italy"))])
    (paris,) = tokenizer.encode(" Paris")
    table = params["model", "embed_tokens", "weight"]
    # A Llama reads the first token in a way of its own: most attention that has nowhere to go goes there, and early layers
    # make it huge. Where the path moves it, it passes through states in which the network does nothing that makes sense.
    starts = {
        "zero": torch.zeros_like(table[ids[0]]),
        "mean embedding": table.mean(0).expand(len(ids[0]), -1),
        "mean, first kept": first_kept(table[ids[0]], table.mean(0)),
        "corrupted prompt": table[other[0]],
    }
    if short:
        del starts["mean embedding"]
    target = tdhook.targets.index(paris, key="logits", position=-1)

    # What is missing of F(x) - F(x') says how good an integral is. A fixed number of points may be right by luck, and wrong
    # again with more of them; `steps="auto"` measures, goes on where needed, and says when it gave up.
    most = 16 if short else 100
    fixed = [2, 8] if short else [2, 4, 8, 16, 32, 64]
    tail = tdhook.start_from(f, EMBEDDING)
    explain = partial(integrated_gradients, f, params, ids, targets=target, at=EMBEDDING, chunk_size=8)
    print(f"error of completeness, relative to F(x) - F(x'), of the logit of ' Paris'; auto takes at most {most} points")
    print(f"{QUESTION} ...\n")
    print(f"{'baseline':<18}{'F(x)-F(x_0)':>12}" + "".join(f"{n:>9}" for n in fixed) + f"{'auto':>11}{'points':>8}  converged")
    errors, found = [], {}
    for name, start in starts.items():
        baselines = {EMBEDDING: start}
        with torch.no_grad():
            high, low = (target(tail(params, ids, value)).item() for value in (table[ids], start[None]))
        difference = high - low
        sums = [explain(baselines=baselines, steps=n)[EMBEDDING].sum().item() for n in fixed]
        errors.append([abs(total / difference - 1) for total in sums])
        found[name] = explain(baselines=baselines, steps="auto", max_steps=most)
        result, error = found[name], (found[name].error / abs(difference)).item()
        row = "".join(f"{e:>9.1e}" for e in errors[-1])
        print(
            f"{name:<18}{difference:>12.2f}{row}{error:>11.1e}{result.steps.item():>8}  {result.converged.item()}", flush=True
        )
        found[name] = (result, error)
    print(
        "\nWhere the first token moves, no number of points that one would take means anything, and auto says so. Keep it, or"
        "\nbegin at a prompt that differs in what is asked about: that is also the cheapest, and the clearest question.\n"
    )

    figure = curves(
        fixed,
        errors,
        labels=[f"{name}, fixed" for name in starts],
        title="SmolLM2-135M; stars: steps='auto'",
        x_label="path points",
        y_label="error of completeness, relative",
        log_x=True,
        log_y=True,
    )
    axes = figure.axes[0]
    for line, (result, error) in zip(list(axes.lines), found.values(), strict=True):
        axes.plot(result.steps.item(), error, "*", color=line.get_color(), markersize=14, markeredgecolor="black")
    axes.axhline(1e-3, color="0.4", linestyle=":", linewidth=1)
    axes.autoscale()
    axes.margins(x=0.08)
    figure.savefig(out / "path_points.png", dpi=110)

    zero, zero_error = found["zero"]
    checks = [
        check("from a corrupted prompt auto converges", found["corrupted prompt"][0].converged, found["corrupted prompt"][1]),
        check("from zero it does not, and says so", not zero.converged and zero_error > 1e-3, zero_error),
    ]
    if not short:
        checks += [
            check("from zero some rule misses more than half of the difference", max(errors[0]) > 0.5, max(errors[0])),
            check("keeping the first token makes auto converge", found["mean, first kept"][0].converged),
        ]
    return checks


def first_kept(embedded: Tensor, other: Tensor) -> Tensor:
    """Embeddings [L, D] in which every token but the first is another."""
    return torch.cat([embedded[:1], other.expand(len(embedded) - 1, -1)])


# ---------------------------------------------------------------------------------------------------------------------
# Part five: what makes two sentences similar
# ---------------------------------------------------------------------------------------------------------------------

PAIR = ("A cat is sleeping on the warm sofa.", "The kitten naps on a comfortable couch while it rains.")


def sentences(out: Path, short: bool) -> list[bool]:
    """Integrated gradients of the cosine between the embeddings of two sentences."""
    headline("Two sentences: MiniLM")
    model, tokenizer = minilm()
    f, params = tdhook.functionalize(model)
    encoded = tokenizer(list(PAIR), padding=True, return_tensors="pt")
    batch = dict(encoded)
    real = batch["attention_mask"].float()

    def embeddings(output: Any) -> Tensor:
        return (output.last_hidden_state * real[..., None]).sum(-2) / real.sum(-1, keepdim=True)

    with torch.no_grad():
        fixed = embeddings(f(params, batch))

    # Each sentence is explained with the other one held fixed: two examples, one call. The path begins at "[MASK]" in
    # place of every word, and keeps the marks at both ends, which are in every sentence.
    def cosine(output: Any) -> Tensor:
        return cosine_similarity(embeddings(output), fixed.flip(0), dim=-1)

    site, table = "embeddings.word_embeddings", params["embeddings", "word_embeddings", "weight"]
    special = torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids))
    masked = torch.where(special, batch["input_ids"], tokenizer.mask_token_id)
    result = integrated_gradients(
        f, params, batch, targets=cosine, at=site, baselines={site: table[masked]}, steps="auto", chunk_size=8
    )
    scores = result.attributions[site].sum(-1)
    with torch.no_grad():
        gained = cosine(f(params, batch)) - cosine(f(params, {**batch, "input_ids": masked}))
    similarity = cosine_similarity(fixed[0], fixed[1], dim=0).item()
    print(f"cosine {similarity:.2f}; {result.steps.tolist()} path points, error {result.error.max():.1e}\n")

    pages, leading = [], []
    for i, sentence in enumerate(PAIR):
        # The tokens at both ends did not move; the others belong to words, some of several tokens.
        of_word = encoded.word_ids(i)
        inside = [p for p, word in enumerate(of_word) if word is not None]
        by_word = aggregate_tokens(scores[i, inside], [of_word[p] for p in inside])
        spans = [encoded.word_to_chars(i, word) for word in range(len(by_word))]
        words = [sentence[span.start : span.end] for span in spans]
        shown = [" " * (span.start > 0 and sentence[span.start - 1] == " ") + w for span, w in zip(spans, words, strict=True)]
        print(tokens_terminal(shown, by_word, label="part of the cosine") + "\n")
        title = f"MiniLM: cosine {similarity:.2f} with “{PAIR[1 - i]}”"
        pages.append(tokens_html(shown, by_word, title=title, label="part of the cosine"))
        leading.append([words[w] for w in by_word.topk(3).indices])
        print(f"most: {', '.join(leading[-1])}\n")
    (out / "sentences.html").write_text("\n".join(pages))

    missing = ((scores.sum(-1) - gained).abs() / gained.abs()).max().item()
    return [
        check("the parts sum to the difference of the cosines", missing < 2e-3, missing),
        check("the animals are among the words that count most", "cat" in leading[0] and "kitten" in leading[1]),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------------


def relative(values: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest number of the reference."""
    return ((values - reference).abs().max() / reference.abs().max()).item()


if __name__ == "__main__":
    # torch's vmap calls the fused attention kernel once per path point and says so
    warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
    sys.exit(main())
