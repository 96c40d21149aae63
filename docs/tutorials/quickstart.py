"""The quickstart: which pixels made the network say "cat", and where in a language model the name is.

    make demo                         # all of it: pictures in out/
    make demo DEMO_ARGS=--short       # fewer path points, fewer layers

Two questions to two trained models, each answered twice: with tdhook, and with the loop that one would write by hand.
The answers have to agree, else the script ends with an error; the times of both are printed.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

import tdhook
from real_models import efficientnet, imagenet_classes, photograph, smollm2
from tdhook.attribution import convergence_delta, integrated_gradients
from tdhook.latent import activation_patching
from tdhook.plotting import heat_map_over_image, heat_maps_over_image, site_position_maps

# The two answers may differ by this much, relative to the largest number.
TOLERANCE = 1e-4


def main() -> int:
    """Run both parts; return the number of disagreements."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--short", action="store_true", help="fewer path points and layers: under a minute")
    arguments.add_argument("--out", type=Path, default=Path("out"), help="folder of the pictures")
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    agreements = [cat(options.out, options.short), names(options.out, options.short)]
    print(f"\npictures in {options.out}/, {time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")
    return agreements.count(False)


# ---------------------------------------------------------------------------------------------------------------------
# Part one: which pixels made the network say "cat"?
# ---------------------------------------------------------------------------------------------------------------------


def cat(out: Path, short: bool) -> bool:
    """Explain the five most probable classes of a photograph."""
    headline("Integrated gradients: EfficientNet-Lite0 and a cat")
    model = efficientnet()
    inputs, image = photograph("chelsea")
    classes = imagenet_classes()

    # A model becomes a function and its parameters. The module itself is never touched again.
    f, params = tdhook.functionalize(model)
    scores = f(params, inputs)
    top = scores[0].topk(5).indices.tolist()

    # Integrated gradients ask how the score grows on the way from a baseline to the photograph. Our baseline is 0, mid-
    # grey for this network's inputs: it holds no edge and no texture, and the network finds nothing in it (no class is
    # more probable than 0.2 %), so all of the score has to be explained by what the photograph adds. A black one would
    # call dark fur unimportant, because dark fur is already what black is.
    #
    # The five classes with the highest scores make it five questions in one call. (They are fixed here: `top_k(5)` would
    # choose again at every point of the path.) The questions share every forward pass, and the five backward passes are
    # one vmapped pass. `chunk_size` bounds how many copies of the network are in memory at once, and changes nothing
    # else.
    steps = 16 if short else 64
    targets = tdhook.targets.per_example(scores.topk(5).indices)
    begun = time.perf_counter()
    bar = tdhook.tqdm_progress("path points", unit="point", leave=False)
    attributions = integrated_gradients(
        f, params, inputs, targets=targets, baselines=0.0, steps=steps, chunk_size=4, progress=bar
    )
    took = time.perf_counter() - begun

    # Completeness: the attributions of a class should add up to its score minus its score for the baseline. What is
    # missing comes from the finite number of path points. Most of the score appears on the first tenth of the path,
    # where the photograph becomes visible at all, and the gradient is wild there: that is why this needs so many
    # points.
    deltas = convergence_delta(f, params, inputs, attributions, targets=targets, baselines=0.0)

    print(f"{steps} path points, 5 classes, one call: {took:.1f} s\n")
    print(f"{'class':<16}{'probability':>12}{'score':>9}{'sum of attributions':>22}{'completeness error':>21}")
    for i, c in enumerate(top):
        probability = f"{scores.softmax(-1)[0, c]:.1%}"
        print(f"{classes[c]:<16}{probability:>12}{scores[0, c]:>9.2f}{attributions[i].sum():>22.2f}{deltas[i, 0]:>21.2f}")

    titles = [f"{classes[c]} ({scores.softmax(-1)[0, c]:.1%})" for c in top]
    grid = heat_maps_over_image(image, attributions, titles=titles, smoothing=1.5)
    grid.suptitle("EfficientNet-Lite0: what speaks for each class (red) and against it (blue)")
    grid.savefig(out / "cat_top_five.png", dpi=110)
    heat_map_over_image(image, attributions[0], title=titles[0], smoothing=1.5).savefig(out / "cat.png", dpi=140)

    return compare_gradients(model, inputs, top)


def compare_gradients(model: nn.Module, inputs: Tensor, classes: list[int]) -> bool:
    """Integrated gradients by hand, one class at a time."""
    steps = 8
    f, params = tdhook.functionalize(model)

    # The times, in the precision that one uses: five classes, eight path points, alternating and the best of two.
    together, one_by_one = alternate(
        lambda: integrated_gradients(f, params, inputs, targets=classes, steps=steps, chunk_size=4),
        lambda: torch.stack([gradients_by_hand(model, inputs, c, steps) for c in classes]),
    )

    # The agreement, in double precision: with ReLU6 everywhere, a rounding error in the seventh digit decides on which
    # side of a kink a value falls, so two correct ways differ by up to a percent in single precision. A smaller
    # photograph and two path points keep it short.
    small, _ = photograph("chelsea", size=96)
    double, small = efficientnet().double(), small.double()
    f, params = tdhook.functionalize(double)
    ours = integrated_gradients(f, params, small, targets=classes[:2], steps=2)
    by_hand = torch.stack([gradients_by_hand(double, small, c, 2) for c in classes[:2]])
    return verdict("five classes at once", together, "one class at a time", one_by_one, ours, by_hand)


def gradients_by_hand(model: nn.Module, inputs: Tensor, c: int, steps: int) -> Tensor:
    """Integrated gradients of one class from a zero baseline, with nothing but autograd."""
    import numpy

    nodes, weights = (torch.from_numpy(a / 2).to(inputs) for a in numpy.polynomial.legendre.leggauss(steps))
    points = ((nodes + 0.5).reshape(-1, 1, 1, 1) * inputs).requires_grad_()
    (gradients,) = torch.autograd.grad((model(points)[:, c] * weights).sum(), points)
    return inputs * gradients.sum(0, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Part two: where in a language model is the name?
# ---------------------------------------------------------------------------------------------------------------------

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"


def names(out: Path, short: bool) -> bool:
    """Patch every block and token of a language model that completes a sentence with one of two names."""
    headline("Activation patching: SmolLM2-135M and two names")
    model, tokenizer = smollm2()
    clean, corrupted = (torch.tensor([tokenizer.encode(text)]) for text in (CLEAN, CORRUPTED))
    pairs = zip(tokenizer.tokens(CLEAN), tokenizer.tokens(CORRUPTED), strict=True)
    tokens = [token if token == other else f"{token}/{other.strip()}" for token, other in pairs]
    (mary,), (john,) = tokenizer.encode(" Mary"), tokenizer.encode(" John")

    # `use_cache=False` is bound once: a cache would let calls of the model talk to each other.
    f, params = tdhook.functionalize(model, use_cache=False)

    # What is measured: how much more the model believes in " Mary" than in " John" after the last token.
    metric = tdhook.targets.logit_difference(mary, john, key="logits", position=-1)

    # Addresses, called sites: all blocks (the residual stream), all attentions, all MLPs. An attention returns a tuple,
    # so its tensor is addressed by element.
    blocks = "[::6]" if short else ".*"
    kinds = {
        "residual stream": f"model.layers{blocks}",
        "attention output": f"model.layers{blocks}.self_attn:out[0]",
        "MLP output": f"model.layers{blocks}.mlp",
    }

    # Each patch runs the corrupted sentence with a single vector (one site, one token) taken from the run of the clean
    # one. If " Mary" comes back, that vector carried what the model needed. All patches of a site run as one batch, and
    # only through what lies after the site.
    panels = {}
    print(f"clean:      {CLEAN} ...\ncorrupted:  {CORRUPTED} ...\n")
    begun = time.perf_counter()
    with torch.no_grad():
        for kind, pattern in kinds.items():
            sites = tdhook.expand(f, pattern)
            progress = tdhook.tqdm_progress(f"{kind:<16}", unit="site", file=sys.stdout)
            result = activation_patching(f, params, clean, corrupted, metric, sites=sites, progress=progress)
            panels[kind] = (result.normalized[..., 0], sites)
    took = time.perf_counter() - begun

    count = sum(values.numel() for values, _ in panels.values())
    print(f"\n' Mary' − ' John': clean {result.clean.item():+.2f}, corrupted {result.corrupted.item():+.2f}")
    print(f"{count} patches in {took:.1f} s. Where one vector restores most of it (0: as corrupted, 1: as clean):\n")
    print(f"{'':<18}{'site':<36}{'token':<14}{'restored':>9}")
    for kind, (values, sites) in panels.items():
        best = int(values.argmax())
        site, position = divmod(best, len(tokens))
        print(f"{kind:<18}{sites[site]:<36}{tokens[position]!r:<14}{values.flatten()[best]:>9.2f}")

    figure = site_position_maps(
        panels,
        tokens,
        title="SmolLM2-135M: how much of ' Mary' over ' John' one patched vector restores",
        label="restored (0: as corrupted, 1: as clean)",
        limits=(-1.0, 1.0),
    )
    figure.savefig(out / "names.png", dpi=110)

    subset = sites_of_subset(f)
    return compare_patching(model, f, params, clean, corrupted, metric, subset)


def sites_of_subset(f: tdhook.FunctionalModel) -> list[str]:
    """Four blocks, spread evenly, so that what lies before and after them is what it is on average."""
    return tdhook.expand(f, "model.layers[3::8]")


def compare_patching(
    model: nn.Module, f: Any, params: Any, clean: Tensor, corrupted: Tensor, metric: Callable, sites: list[str]
) -> bool:
    """The same patches by hand, one at a time, with a forward hook."""
    blocks = [model.get_submodule(site) for site in sites]
    positions = range(clean.shape[1])
    # Three things make the difference: patches run as one batch, only what lies after the block runs, and a patch that
    # would write what is already there (a token before the first difference of the sentences) is recognised and not run.
    # The benchmark in benchmarks/activation_patching.py tells them apart.

    def one_by_one() -> Tensor:
        values = []
        for block in blocks:
            (kept,) = hooked(model, block, clean, lambda output: output)
            for position in positions:
                # called at once, so the loop variables are what they should be
                def patch(output: Tensor, position: int = position, kept: Tensor = kept) -> Tensor:
                    output = output.clone()
                    output[:, position] = kept[:, position]
                    return output

                values.append(metric(hooked(model, block, corrupted, patch, whole=True)))
        return rearrange(torch.cat(values), "(s p) -> s p 1", s=len(blocks))

    def together() -> Tensor:
        return activation_patching(f, params, clean, corrupted, metric, sites=sites).patched

    with torch.no_grad():
        ours, by_hand = alternate(together, one_by_one)
    name = f"{len(sites) * len(positions)} patches in batches"
    return verdict(name, ours, "one hooked forward each", by_hand, ours[1], by_hand[1])


def hooked(model: nn.Module, block: nn.Module, ids: Tensor, edit: Callable[[Tensor], Tensor], whole: bool = False) -> Any:
    """One forward pass with a hook on a block: the block's output, or with `whole` the output of the model."""
    seen = []

    def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        seen.append(edit(output))
        return seen[-1]

    handle = block.register_forward_hook(hook)
    try:
        output = model(ids, use_cache=False)
    finally:
        handle.remove()
    return output if whole else seen


# ---------------------------------------------------------------------------------------------------------------------
# Measuring and comparing
# ---------------------------------------------------------------------------------------------------------------------


def alternate(first: Callable[[], Tensor], second: Callable[[], Tensor], rounds: int = 2) -> Any:
    """Run two functions in turn; return (shortest time, result) of each."""
    best = [float("inf"), float("inf")]
    results: list[Any] = [None, None]
    for _ in range(rounds):
        for i, function in enumerate((first, second)):
            begun = time.perf_counter()
            results[i] = function()
            best[i] = min(best[i], time.perf_counter() - begun)
    return [(seconds, result) for seconds, result in zip(best, results, strict=True)]


def verdict(name: str, ours: Any, other_name: str, other: Any, values: Tensor, by_hand: Tensor) -> bool:
    """Print the times of two ways and whether their values agree."""
    difference = ((values - by_hand).abs().max() / by_hand.abs().max()).item()
    agree = difference <= TOLERANCE
    print(f"\n{name}: {ours[0]:.2f} s; {other_name}: {other[0]:.2f} s; {other[0] / ours[0]:.1f} times as fast")
    print(f"largest relative difference {difference:.1e}: {'they agree' if agree else 'FAILED'}")
    return agree


def headline(text: str) -> None:
    print(f"\n{text}\n{'─' * len(text)}", flush=True)


if __name__ == "__main__":
    # torch's vmap calls the fused attention kernel once per patch and says so; the time below includes it
    warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
    sys.exit(main())
