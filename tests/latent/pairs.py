"""What the tests of approximations share: a prompt pair of a tiny transformer, and what patches measure there."""

from __future__ import annotations

from tdhook.latent.activation_patching import activation_patching

from .families import named


def metric(output):
    return output.logits[:, -1, 3] - output.logits[:, -1, 5]


def pair(inputs):
    clean = inputs["input_ids"]
    corrupted = clean.clone()
    corrupted[:, 2] = (corrupted[:, 2] + 1) % 50
    return {"input_ids": clean}, {"input_ids": corrupted}


def of(name):
    f, params, inputs, found = named(name)
    return f, params, *pair(inputs), found


def exact_effects(*arguments, **options):
    got = activation_patching(*arguments, **options)
    return got.patched - (got.corrupted if options.get("direction", "denoise") == "denoise" else got.clean)
