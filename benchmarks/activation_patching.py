"""The activation-patching sweep of a language model, against one hooked forward per patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tdhook
from tdhook.latent import activation_patching

from .case import Case, Competitor, Goal, Options
from .language_model import PROMPT, smollm2, token_ids

TITLE = "Activation patching of SmolLM2-135M"
INTRODUCTION = """\
Every patch of {residual stream, attention, MLP} × 30 layers × all tokens of an indirect-object sentence (clean into
corrupted, metric: logit difference of the two names). The peer is one forward per patch under `torch.no_grad()` with
a forward hook that writes the clean activation; of its patches only an evenly spaced part is timed, and scaled. `from
the first difference` hooks only the patches at or after the first token in which the sentences differ, which is where
a patch can change anything. Ours takes the fastest of a few chunk sizes, and its time includes the two unpatched
runs; the peer's does not include the clean run."""

LATE = PROMPT.replace("John gave", "Mary gave")
EARLY = PROMPT.replace("Mary and John", "John and Mary")
HOOKED, FROM_DIFFERENCE = "one hooked forward per patch", "one hooked forward per patch, from the first difference"


def cases(options: Options) -> Iterator[Case]:
    layers = range(3, 30, 12) if options.quick else range(30)  # about as deep on average
    sites = [site for i in layers for site in _sites(i)]
    goals = (Goal("ours", HOOKED, 7.0),)
    shared = {"layers": len(layers), "sites": len(sites)}
    yield _case("second name swapped", LATE, sites, options, shared, goals=goals)
    yield _case("first names swapped", EARLY, sites, options, shared)
    if not options.quick:
        yield _case("second name swapped, last token unembedded", LATE, sites, options, shared, logits_to_keep=1)
        yield _case("first names swapped, last token unembedded", EARLY, sites, options, shared, logits_to_keep=1)


def _sites(layer: int) -> tuple[str, str, str]:
    block = f"model.layers.{layer}"
    return block, f"{block}.self_attn:out[0]", f"{block}.mlp"


def _case(
    name: str,
    corrupted: str,
    sites: Sequence[str],
    options: Options,
    parameters: dict[str, Any],
    goals: Sequence[Goal] = (),
    **constants: Any,
) -> Case:
    return Case(
        name,
        {**parameters, "clean": PROMPT, "corrupted": corrupted, **constants},
        partial(_competitors, corrupted, sites, options, constants),
        tolerance=1e-4,
        absolute=True,
        goals=goals,
        seconds=5 if options.quick else 30,
    )


def _competitors(corrupted_text: str, sites: Sequence[str], options: Options, constants: dict[str, Any]) -> list[Competitor]:
    model, tokenizer = smollm2()
    clean, corrupted = token_ids(PROMPT), token_ids(corrupted_text)
    mary, john = (tokenizer.encode(name)[0] for name in (" Mary", " John"))
    f, params = tdhook.functionalize(model, use_cache=False, **constants)

    def metric(output: Any) -> Tensor:
        return output.logits[0, -1, mary] - output.logits[0, -1, john]

    def sweep(chunk_size: int | None) -> Tensor:
        with torch.no_grad():
            return activation_patching(f, params, clean, corrupted, metric, sites=sites, chunk_size=chunk_size).patched

    length = clean.shape[1]
    first = int((clean != corrupted).any(0).nonzero()[0])
    with torch.no_grad():
        values = tdhook.capture(f, list(sites))(params, clean)[1]
    hooked = partial(_hooked, model, corrupted, metric, values, constants)
    every = [(s, p) for s in range(len(sites)) for p in range(length)]
    useful = [(s, p) for s, p in every if p >= first]
    chunk_sizes = (None,) if options.quick else (None, 8, 4)
    return [
        Competitor("ours", {f"chunk_size={c}": partial(sweep, c) for c in chunk_sizes}),
        _peer(HOOKED, hooked, sites, every, 8 if options.quick else 36),
        _peer(FROM_DIFFERENCE, hooked, sites, useful, 8 if options.quick else 36),
    ]


def _peer(name: str, hooked: Callable, sites: Sequence[str], patches: list[tuple[int, int]], count: int) -> Competitor:
    """Times `count` patches that are evenly spaced over the sweep."""
    # an odd step, so that the part does not keep to one kind of site or one position
    part = patches[:: max(1, len(patches) // count) | 1]
    at = torch.tensor(part)

    def run() -> Tensor:
        return torch.stack([hooked(sites[s], p) for s, p in part])

    return Competitor(
        name,
        {"": run},
        view=lambda patched: patched[at[:, 0], at[:, 1]],
        scale=len(patches) / len(part),
        note=f"{len(part)} of {len(patches)} patches timed, and scaled (numbers of the last case)",
    )


@torch.no_grad()
def _hooked(
    model: Any, inputs: Tensor, metric: Callable, values: Any, constants: dict[str, Any], site: str, position: int
) -> Tensor:
    """The metric after one patch, the usual way."""
    value = values[site]

    def write(module: Any, args: Any, output: Any) -> Any:
        written = (output[0] if isinstance(output, tuple) else output).clone()
        written[:, position] = value[:, position]
        return (written, *output[1:]) if isinstance(output, tuple) else written

    handle = model.get_submodule(site.removesuffix(":out[0]")).register_forward_hook(write)
    try:
        return metric(model(inputs, use_cache=False, **constants))
    finally:
        handle.remove()
