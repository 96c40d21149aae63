"""Weights as data, on trained models: pruning, an edited fact, task vectors, influence of training images, weight lens.

    make demo                                                # the other tutorials, then this: pictures in out/
    python docs/tutorials/weights.py --short                 # fewer amounts, texts and steps
    python docs/tutorials/weights.py --only editing          # one part: pruning, editing, vectors, influence or lens

`params` is a TensorDict, so every weight method is a map from params to params, or to scores: the model is never touched,
nothing has to be restored, and many versions of it are one vmap. Every part ends with checks: numbers that have to agree
with another way of computing them, or with what is known to be true. The script ends with an error if one does not hold.
"""

from __future__ import annotations

import copy
import sys
import warnings
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.utils.prune as torch_prune
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy, interpolate

import tdhook
from checked_parts import check, headline, run
from real_models import digits, efficientnet, photograph, smollm2
from tdhook import weights
from tdhook.latent import activation_patching
from tdhook.plotting import curves


def main() -> int:
    """Run all parts; return the number of checks that failed."""
    parts = {"pruning": pruning, "editing": editing, "vectors": task_vectors, "influence": influence, "lens": lens}
    return run(parts, __doc__, short="fewer amounts, texts and steps: under half a minute")


# ---------------------------------------------------------------------------------------------------------------------
# Part one: how much of a network can go
# ---------------------------------------------------------------------------------------------------------------------

PHOTOGRAPHS = ("chelsea", "coffee", "astronaut", "rocket", "retina", "immunohistochemistry")


def pruning(out: Path, short: bool) -> list[bool]:
    """Top-1 agreement of the pruned network with the whole one."""
    headline("Pruning: EfficientNet-Lite0")
    net = efficientnet()
    f, params = tdhook.functionalize(net)
    many = 3 if short else 6
    images, others = (torch.cat([windows(name, many, seed) for name in PHOTOGRAPHS]) for seed in (0, 1))
    with torch.no_grad():
        whole, own = f(params, images).argmax(-1), f(params, others).argmax(-1)

    # Scores are TensorDicts like params. Magnitude looks at the weights only, the others at data: at other windows than those
    # that judge. Of Wanda's scores a sum over inputs is what a weight contributes, at most, to what its layer puts out.
    scores = {
        "magnitude": weights.magnitude(params),
        "Wanda": weights.wanda(f, params, others),
        "Taylor": weights.taylor(f, params, others, cross_entropy, labels=own),
    }
    runs = [(name, "global") for name in scores] + [(name, "tensor") for name in ("magnitude", "Wanda")]
    amounts = torch.linspace(0.1, 0.7, 4 if short else 7, dtype=torch.float64)

    # `pruner` ranks once; the sweep over amounts is one vmap. On a CPU torch has no fast kernel for convolutions of several
    # models at once, so that the vmap runs in chunks of one. On a GPU, or for linear layers, leave `chunk_size` out.
    def agreement(prune_by: Any, amount: Tensor) -> Tensor:
        return (f(prune_by(amount).params, images).argmax(-1) == whole).double().mean()

    agreements = {}
    print(
        f"{len(images)} windows of photographs, {len(whole.unique())} classes: share with the class that the whole network says"
    )
    print(f"{'weights set to zero':<32}" + "".join(f"{a:>7.0%}" for a in amounts.tolist()))
    for name, scope in runs:
        prune_by = weights.pruner(params, scores[name], scope=scope)
        with torch.no_grad():
            found = vmap(partial(agreement, prune_by), chunk_size=1)(amounts)
        label = f"{name}, {'all together' if scope == 'global' else 'within each layer'}"
        agreements[label] = found
        print(f"{label:<32}" + "".join(f"{a:>7.0%}" for a in found.tolist()), flush=True)
    print(
        "\nRanked together, layers that can spare more lose more. Wanda knows which inputs are large. Taylor lets weights go"
        "\nfirst that its own windows do not use, and others may need; but what it keeps goes further."
    )
    curves(
        100 * amounts,
        100 * torch.stack(list(agreements.values())),
        labels=list(agreements),
        title="EfficientNet-Lite0, not trained again",
        x_label="weights set to zero (%)",
        y_label="same class as the whole network (%)",
    ).savefig(out / "pruning.png", dpi=110)

    # The same by torch.nn.utils.prune, on a deep copy.
    amount = 0.3
    other = copy.deepcopy(net)
    torch_prune.global_unstructured(
        [(module, "weight") for module in other.modules() if getattr(module, "weight", torch.zeros(0)).ndim > 1],
        torch_prune.L1Unstructured,
        amount=amount,
    )
    ours = weights.prune(params, scores["magnitude"], amount)
    pairs = [
        (ours.mask[(*n.split("."), "weight")], m.weight_mask) for n, m in other.named_modules() if hasattr(m, "weight_mask")
    ]
    same = torch.cat([(mine == theirs).flatten() for mine, theirs in pairs]).double().mean()
    mean = {name: found.mean() for name, found in agreements.items()}
    gain = mean["Wanda, all together"] - mean["magnitude, all together"]
    spread = mean["magnitude, all together"] - mean["magnitude, within each layer"]
    return [
        check("magnitude: the zeros of torch.nn.utils.prune", same > 1 - 1e-6, same),
        check("Wanda keeps more classes than magnitude", gain > 0, gain),
        check("ranked together is better than within each layer", spread > 0, spread),
    ]


def windows(name: str, count: int, seed: int, size: int = 128) -> Tensor:
    """Random windows of a photograph, every other one mirrored: [count, 3, size, size]."""
    photo, _ = photograph(name, size=320)
    generator = torch.Generator().manual_seed(seed)
    cut = []
    for i in range(count):
        side = int(torch.randint(180, 320, (), generator=generator))
        top, left = torch.randint(320 - side + 1, (2,), generator=generator).tolist()
        window = photo[..., top : top + side, left : left + side]
        cut.append(interpolate(window.flip(-1) if i % 2 else window, (size, size), mode="bilinear", antialias=True))
    return torch.cat(cut)


# ---------------------------------------------------------------------------------------------------------------------
# Part two: a fact rewritten
# ---------------------------------------------------------------------------------------------------------------------

LAYER = 8
PREFIXES = ("", "Everyone knows this. ", "I read it in a book: ", "Yesterday it rained. ")
FACT = "The capital of {} is"
PARAPHRASES = (
    "The capital city of {} is",
    "What is the capital of {}? It is",
    "{}'s capital city is called",
    "The seat of the government of {} is the city of",
)
NEIGHBOURS = {
    "Italy": "Rome",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Russia": "Moscow",
    "England": "London",
    "Greece": "Athens",
}
UNRELATED = (
    "Two plus two is",
    "The Eiffel Tower is in the city of",
    "The opposite of hot is",
    "Water freezes at a temperature of",
)


@cache
def language_model() -> tuple[Any, Any]:
    """The model and its tokenizer, which two parts share: loading takes seconds."""
    return smollm2()


def last_logits(output: Any) -> Tensor:
    return output.logits[:, -1]


def editing(out: Path, short: bool) -> list[bool]:
    """ROME: the capital of France is moved to Rome."""
    headline("A fact rewritten: SmolLM2-135M and the capital of France")
    model, tokenizer = language_model()
    f, params = tdhook.functionalize(model, use_cache=False, logits_to_keep=1)

    def ids(text: str) -> Tensor:
        return torch.tensor([tokenizer.encode(text)])

    def place(template: str) -> int:
        """Of the last token of the subject."""
        return len(tokenizer.encode(template.partition("{}")[0] + "France")) - 1

    (target,), (original,) = tokenizer.encode(" Rome"), tokenizer.encode(" Paris")

    # Where is it? Run the prompt with another country, and put back what one MLP gave for the country: which ones bring the
    # answer back? The first one, all of it: it sees little but the token. Then some around a third of the way, where the
    # edit goes: late enough to know the country, and early enough for the last token to read it.
    def answer(output: Any) -> Tensor:
        return last_logits(output)[:, original] - last_logits(output)[:, target]

    with torch.no_grad():
        traced = activation_patching(
            f,
            params,
            ids(FACT.format("France")),
            ids(FACT.format("Italy")),
            answer,
            sites="model.layers.*.mlp",
            positions=[place(FACT)],
            chunk_size=1,
        ).normalized[:, 0, 0]
    shown = ", ".join(f"{layer} ({traced[layer]:+.0%})" for layer in traced.topk(5).indices.tolist())
    print(f"MLPs that bring ' Paris' back against ' Rome', at the country: {shown}")

    # The keys of this layer, over texts that come with Python: its documentation. They say which directions are in use.
    site = f"model.layers[{LAYER}].mlp.down_proj"
    text = "\n".join(topics.values())[: 12_000 if short else 40_000]
    tokens = torch.tensor(tokenizer.encode(text))
    batches = list(tokens[: len(tokens) // 128 * 128].reshape(-1, 128).split(8))
    with torch.no_grad():
        statistics = weights.key_covariance(f, params, batches, site)
    prefixes = PREFIXES[:2] if short else PREFIXES
    edited = weights.rome(
        f,
        params,
        [ids(prefix + FACT.format("France")) for prefix in prefixes],
        position=[place(prefix + FACT) for prefix in prefixes],
        site=site,
        target=target,
        statistics=statistics,
        damping=0.05,
        logits=last_logits,
        preserve=[ids("France is a")],
        preserve_position=place("{} is a"),
        steps=12 if short else 20,
    )
    key = ("model", "layers", str(LAYER), "mlp", "down_proj", "weight")
    change = edited[key] - params[key]
    print(f"{int(statistics.count)} keys; the weight changed by {change.norm() / params[key].norm():.1%}, in one rank\n")

    with torch.no_grad():
        found = weights.evaluate_edit(
            f,
            params,
            edited,
            [ids(FACT.format("France"))],
            target=target,
            original=original,
            paraphrases=[ids(text.format("France")) for text in PARAPHRASES],
            logits=last_logits,
        )
        print(f"{'prompt':<52}{'before':>18}{'after':>18}")
        kept = []
        for text in (
            FACT.format("France"),
            *(text.format("France") for text in PARAPHRASES),
            *(FACT.format(country) for country in NEIGHBOURS),
            *UNRELATED,
        ):
            before, after = (last_logits(f(p, ids(text)))[0].softmax(-1).max(-1) for p in (params, edited))
            said = [f"{tokenizer.decode([int(p.indices)])!r} {p.values:.0%}" for p in (before, after)]
            print(f"{text:<52}{said[0]:>18}{said[1]:>18}")
            if "France" not in text:
                kept.append(bool(before.indices == after.indices))
    assert found.paraphrase is not None
    rephrased = weights.efficacy(
        f, params, [ids(text.format("France")) for text in PARAPHRASES], target=target, original=original, logits=last_logits
    )
    print(
        f"\nefficacy {found.efficacy.success:.0%}: p(' Rome') > p(' Paris'), by {found.efficacy.margin:+.2f}; "
        f"paraphrases {found.paraphrase.success:.0%} (before {rephrased.success:.0%}); "
        f"specificity {sum(kept)}/{len(kept)}: the same first token"
    )

    rank = int(torch.linalg.matrix_rank(change, rtol=1e-3))
    shared = all(edited[k] is params[k] for k in params.keys(True, True) if k != key)
    return [
        check("the model says ' Rome'", found.efficacy.top == 1, found.efficacy.top),
        check(
            "it prefers ' Rome' in at least half of the paraphrases", found.paraphrase.success >= 0.5, found.paraphrase.success
        ),
        check("most other answers are what they were", sum(kept) >= 0.8 * len(kept), sum(kept) / len(kept)),
        check("one weight changed, in one rank", rank == 1 and shared, rank),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Part three: what fine-tuning changed, as a vector
# ---------------------------------------------------------------------------------------------------------------------


def task_vectors(out: Path, short: bool) -> list[bool]:
    """Digits that lie on their side, or in a mirror: learnt apart, added, merged, and taken away."""
    headline("Task vectors: digits on their side and in a mirror")
    net, images, labels = digits()
    f, base = tdhook.functionalize(net)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:2000], order[2000 : 2200 if short else 2300]
    views = {"upright": lambda x: x, "on its side": lambda x: x.rot90(1, (-2, -1)), "mirrored": lambda x: x.flip(-1)}
    steps = 25 if short else 60
    learn = partial(trained, f, base, labels=labels[train], steps=steps, generator=generator)
    side, mirror = (learn(views[view](images[train])) for view in ("on its side", "mirrored"))
    tau_side, tau_mirror = weights.task_vector(side, base), weights.task_vector(mirror, base)

    def accuracy(view: str, params: Any) -> Tensor:
        return (f(params, views[view](images[test])).argmax(-1) == labels[test]).double().mean()

    # How strong? The best on the new task among the strengths that leave 95 % of the old one: all are one vmapped call.
    strengths = torch.linspace(0, 1, 6 if short else 11)
    with torch.no_grad():
        choose = partial(weights.choose_strength, strengths=strengths, chunk_size=1)
        added = choose(base, tau_side, partial(accuracy, "on its side"), partial(accuracy, "upright"))
        both = tau_side + tau_mirror
        merged = weights.ties([tau_side, tau_mirror], density=0.2)
        summed, elected = (
            choose(
                base, vector, lambda p: (accuracy("on its side", p) + accuracy("mirrored", p)) / 2, partial(accuracy, "upright")
            )
            for vector in (both, merged)
        )
        # Forgetting: a model that knows both views, minus what the sideways view taught another one.
        knows = trained(
            f,
            base,
            torch.cat([images[train], views["on its side"](images[train])]),
            torch.cat([labels[train], labels[train]]),
            steps=steps,
            generator=generator,
        )
        gone = choose(knows, -tau_side, lambda p: 1 - accuracy("on its side", p), partial(accuracy, "upright"))
        rows = {
            "base": base,
            "fine-tuned: on its side": side,
            f"base + {added.strength:.1f} side": weights.add_task_vectors(base, tau_side, added.strength),
            f"base + {summed.strength:.1f} (side + mirror)": weights.add_task_vectors(base, both, summed.strength),
            f"base + {elected.strength:.1f} TIES(side, mirror)": weights.add_task_vectors(base, merged, elected.strength),
            "fine-tuned: upright and side": knows,
            f"  - {gone.strength:.1f} side": weights.add_task_vectors(knows, tau_side, -gone.strength),
        }
        print(f"{'accuracy':<34}" + "".join(f"{view:>14}" for view in views))
        table = {name: [accuracy(view, params).item() for view in views] for name, params in rows.items()}
    for name, values in table.items():
        print(f"{name:<34}" + "".join(f"{value:>14.1%}" for value in values))
    curves(
        strengths,
        100 * torch.stack([added.metric, added.control]),
        labels=["on its side", "upright"],
        title=f"base + strength * what the sideways view taught; chosen: {added.strength:.1f}",
        x_label="strength",
        y_label="accuracy (%)",
    ).savefig(out / "task_vector.png", dpi=110)

    # Which layers carry it? Integrated gradients of the loss along the line from one model to the other.
    some = test[:100]
    loss = tdhook_loss(labels[some])
    path = weights.parameter_integrated_gradients(
        f, base, side, views["on its side"](images[some]), targets=loss, steps=8 if short else 24
    )
    by_layer = weights.sum_by(path.attributions, 1)
    print(f"\nfrom base to fine-tuned the loss changed by {path.change:.2f}, of which")
    print("  " + ", ".join(f"{layer} {part / path.change:.0%}" for layer, part in by_layer.items()))
    names = list(table)
    looped = max(
        abs(accuracy("on its side", weights.add_task_vectors(base, tau_side, s)) - a)
        for s, a in zip(strengths[::5].tolist(), added.metric[::5])
    )
    missing = path.error / path.change.abs()
    base_row, forgot = table["base"], table[names[-1]]
    return [
        check("the vmapped grid is the loop", looped == 0, looped),
        check("the chosen strength leaves 95 % of upright", table[names[2]][0] >= 0.95 * base_row[0], table[names[2]][0]),
        check("it reads digits on their side far better", table[names[2]][1] > base_row[1] + 0.2, table[names[2]][1]),
        check("negation forgets the side, keeps upright", forgot[1] < table[names[-2]][1] - 0.2, forgot[1]),
        check("the path adds up to the change of the loss", missing < 0.02, missing),
    ]


def tdhook_loss(labels: Tensor) -> Any:
    """The cross-entropy of each example, as a target."""
    return lambda logits: cross_entropy(logits, labels, reduction="none")


def trained(
    f: Any, params: Any, images: Tensor, labels: Tensor, *, steps: int, generator: torch.Generator, rate: float = 0.02
) -> Any:
    """Params after a few steps of gradient descent with momentum: those given stay what they are."""
    slope = grad(lambda p, x, y: cross_entropy(f(p, x), y))
    velocity = params * 0
    for _ in range(steps):
        batch = torch.randint(len(images), (100,), generator=generator)
        velocity = velocity * 0.9 + slope(params, images[batch], labels[batch])
        params = params - velocity * rate
    return params


# ---------------------------------------------------------------------------------------------------------------------
# Part four: which training images did it
# ---------------------------------------------------------------------------------------------------------------------


def influence(out: Path, short: bool) -> list[bool]:
    """Wrong labels found by self-influence; helpful and harmful training images by TracIn."""
    headline("Influence: training images with wrong labels among them")
    net, images, labels = digits()
    f, params = tdhook.functionalize(net)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    count, planted = (300, 15) if short else (600, 30)
    train, test = order[:count], order[1000:3000]
    given = labels.clone()
    wrong = train[:planted]
    given[wrong] = (labels[wrong] + torch.randint(1, 10, (planted,), generator=generator)) % 10
    data = (images[train], given[train])

    # The last two layers are learnt anew, with the wrong labels. Every pass leaves a checkpoint.
    params = params.clone()
    for layer in ("linear1", "linear2"):
        shape = params[layer, "weight"].shape
        params[layer, "weight"] = torch.randn(shape, generator=generator) * (2 / shape[1]) ** 0.5
        params[layer, "bias"] = torch.zeros(shape[0])
    rate = 0.05
    batches = [torch.randperm(count, generator=generator).split(50) for _ in range(4)]

    def learnt(without: Tensor | None = None) -> list[Any]:
        """The checkpoints of a training, some images left out."""
        kept = torch.ones(count) if without is None else torch.ones(count).index_fill(0, without, 0)
        slope = grad(lambda p, i: (cross_entropy(f(p, data[0][i]), data[1][i], reduction="none") * kept[i]).mean())
        now, found = params, []
        for passed in batches:
            for i in passed:
                now = now - slope(now, i) * rate
            found.append(now)
        return found

    checkpoints = learnt()
    with torch.no_grad():
        said = f(checkpoints[-1], images[test])
    mistaken = test[said.argmax(-1) != labels[test]]
    hardest = cross_entropy(said, labels[test], reduction="none").topk(3).indices
    picked = test[hardest]
    print(f"{count} training images, {planted} labels wrong; {len(mistaken)} of {len(test)} test images mistaken")

    # Whose gradient is large against all others? An image that only its own (wrong) label explains.
    options: Any = {"learning_rates": rate, "select": "linear*", "chunk_size": 50}
    own = weights.self_influence(f, checkpoints, data, cross_entropy, **options)
    suspects = own.argsort(descending=True)
    found = int((suspects[:planted] < planted).sum())
    print(f"of the {planted} images with the largest influence on themselves {found} have a wrong label")

    scores = weights.tracin(f, checkpoints, data, (images[picked], labels[picked]), cross_entropy, **options)
    helpful, harmful = scores.topk(5).indices, (-scores).topk(5).indices
    share = (harmful < planted).double().mean()
    print(f"of the five most harmful for each of three test images {share:.0%} have a wrong label")
    sketched = weights.tracin(
        f,
        checkpoints,
        data,
        (images[picked], labels[picked]),
        cross_entropy,
        projection=4096,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    likeness = torch.corrcoef(torch.stack([scores.flatten(), sketched.flatten()]))[0, 1]
    influence_picture(images, labels, given, train, picked, said[hardest].argmax(-1), helpful, harmful).savefig(
        out / "influence.png", dpi=90
    )
    suspects_picture(images, labels, given, train, suspects[:20]).savefig(out / "suspects.png", dpi=90)

    # Is it true? Train again without the twenty images that harm the three most, and without twenty others.
    def loss(without: Tensor | None) -> float:
        with torch.no_grad():
            return cross_entropy(f(learnt(without)[-1], images[picked]), labels[picked]).item()

    worst, any_ = (-scores.mean(0)).topk(20).indices, torch.randperm(count, generator=generator)[:20]
    losses = {"all": loss(None), "without the 20 most harmful": loss(worst), "without any 20": loss(any_)}
    print("trained again, loss of the three: " + ", ".join(f"{name} {value:.2f}" for name, value in losses.items()))
    return [
        check("self-influence finds most wrong labels", found > 0.6 * planted, found / planted),
        check(
            "without harmful images the loss falls, more than without any",
            losses["without the 20 most harmful"] < min(losses["all"], losses["without any 20"]),
        ),
        check("4,096 numbers for each gradient say the same", likeness > 0.9, likeness),
    ]


def influence_picture(
    images: Tensor, labels: Tensor, given: Tensor, train: Tensor, picked: Tensor, said: Tensor, helpful: Tensor, harmful: Tensor
) -> Figure:
    """A row for each test image: itself, what helped, what harmed. Wrong labels are red."""
    rows = [
        [(images[test], f"test: {labels[test]}, says {answer}", False)]
        + [(images[train[i]], *caption(labels, given, train[i])) for i in (*good.tolist(), *bad.tolist())]
        for test, answer, good, bad in zip(picked, said, helpful, harmful, strict=True)
    ]
    figure = picture(rows)
    figure.suptitle("Test image, five helpful and five harmful training images; red: the label given is wrong")
    return figure


def suspects_picture(images: Tensor, labels: Tensor, given: Tensor, train: Tensor, suspects: Tensor) -> Figure:
    """The training images with the largest influence on themselves."""
    cells = [(images[train[i]], *caption(labels, given, train[i])) for i in suspects.tolist()]
    figure = picture([cells[:10], cells[10:]])
    figure.suptitle("Largest self-influence; red: the label given is wrong")
    return figure


def caption(labels: Tensor, given: Tensor, i: Tensor) -> tuple[str, bool]:
    return f"label {given[i]}", bool(given[i] != labels[i])


def picture(rows: list[list[tuple[Tensor, str, bool]]]) -> Figure:
    """Images with captions, in rows."""
    figure = Figure(figsize=(1.15 * len(rows[0]), 1.4 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for row, places in zip(rows, axes, strict=True):
        for (image, text, red), place in zip(row, places, strict=True):
            place.imshow(image[0], cmap="Greys")
            place.set_title(text, fontsize=8, color="firebrick" if red else "black")
            place.set_axis_off()
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Part five: what weights say in tokens
# ---------------------------------------------------------------------------------------------------------------------


def lens(out: Path, short: bool) -> list[bool]:
    """Neurons and heads of SmolLM2, read without running it."""
    headline("Weight lens: SmolLM2-135M without a forward pass")
    model, tokenizer = language_model()
    _, params = tdhook.functionalize(model)
    embedding, norm = params["model", "embed_tokens", "weight"], params["model", "norm", "weight"]

    # A neuron writes a column of the output weight: which tokens does that promote?
    for layer in (24, 27):
        written = params["model", "layers", str(layer), "mlp", "down_proj", "weight"].mT
        for neuron in written.norm(dim=1).topk(2 if short else 3).indices:
            best = weights.top_tokens(written[neuron], embedding, 7, scale=norm, center=True).tokens
            print(
                f"layer {layer}, neuron {int(neuron):>4} writes: "
                + ", ".join(repr(tokenizer.decode([t])) for t in best.tolist())
            )

    # A head copies where attending to a token raises the logit of that token: the diagonal of its OV circuit, a matrix of
    # 49,152 x 49,152 that is never formed. The scale of the norm before attention is folded into the embedding.
    circuit, copying = None, []
    layers = (10, 22) if short else range(2, 30, 4)
    for layer in layers:
        block = params["model", "layers", str(layer)]
        attention = block["self_attn"]
        circuit = weights.ov_circuit(
            attention["v_proj", "weight"],
            attention["o_proj", "weight"],
            heads=9,
            kv_heads=3,
            embedding=embedding * block["input_layernorm", "weight"],
            unembedding=embedding * norm,
        )
        copying += [(share, layer, head) for head, share in enumerate((circuit.diagonal() > 0).double().mean(1).tolist())]
    copying.sort(reverse=True)
    print("heads that copy most tokens: " + ", ".join(f"{layer}.{head} ({share:.0%})" for share, layer, head in copying[:5]))
    print(
        "heads that suppress them:    " + ", ".join(f"{layer}.{head} ({share:.0%})" for share, layer, head in copying[-1:-4:-1])
    )

    assert circuit is not None
    ids = torch.tensor([tokenizer.encode(f" {word}")[0] for word in ("Paris", "France", "Rome", "dog")])
    rows, columns = ids.repeat_interleave(4), ids.repeat(4)
    block = params["model", "layers", str(layers[-1])]
    tokens = (embedding * block["input_layernorm", "weight"])[ids]
    values = (tokens @ block["self_attn", "v_proj", "weight"].mT).unflatten(-1, (3, 64)).repeat_interleave(3, 1)
    by_hand = torch.einsum("ihd,ohd->hoi", values, block["self_attn", "o_proj", "weight"].unflatten(1, (9, 64)))
    logits = torch.einsum("vo,hoi->hvi", (embedding * norm)[ids], by_hand).flatten(1)
    difference = relative(circuit.entries(rows, columns), logits)
    extreme = weights.outliers(params, threshold=20.0)
    name, found = max(extreme.items(), key=lambda item: item[1].z[0].abs())
    print(f"weights 20 standard deviations from the mean: in {len(extreme)} tensors, the farthest {found.z[0]:+.0f} in {name}")
    return [
        check("entries of an OV circuit = values and outputs by hand", difference < 1e-4, difference),
        check("some head copies nearly all tokens", copying[0][0] > 0.9, copying[0][0]),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------------


def relative(values: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest number of the reference."""
    return ((values - reference).abs().max() / reference.abs().max()).item()


if __name__ == "__main__":
    # torch's vmap calls the fused attention kernel once per model and says so
    warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
    sys.exit(main())
