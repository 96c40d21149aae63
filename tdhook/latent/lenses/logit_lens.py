"""The logit lens: what the model would say if it stopped after each block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.batching import vmap_or_loop
from ...core.checks import require_positive
from ...core.errors import InputError, SiteError
from ...core.functional import FunctionalModel
from ...core.structure import describe
from ...core.transforms import expand
from ..names import Names
from .stream import at_positions, logits_of, named, read, require_positions, tail
from .translators import Translators


def logit_lens(
    f: FunctionalModel,
    params: Any,
    inputs: Any,
    *,
    names: Names | None = None,
    sites: Sequence[str] | None = None,
    translators: Translators | None = None,
    positions: Sequence[int] | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """The logits that the model's own final norm and unembedding give for the residual stream of every layer.

        lens_l = unembed(final_norm(residual_post_l)),    with translators: residual_post_l + residual_post_l W_l + b_l

    What stands between the last block and the logits is the model's own, with all that it has there: the head of a BERT, the
    cap of Gemma 2, the scale of Cohere. The last entry (without translators) is the output of the model.

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them, B examples.
        names: standard names; None to find them.
        sites: addresses of values of the residual stream, Tensor [B, S, D], patterns too; None for `names.residual_post`.
        translators: one affine map for each site, as `fit_translators` returns them: the tuned lens.
        positions: of the logits, counted from the end if negative; None for all.
        chunk_size: how many layers go through the unembedding at once; None for all.

    Returns:
        Tensor [L, *logits]: [L, B, S, V] for a language model, [L, B, C] for a classifier.

    Raises:
        ModelError: `f` has no sites. InputError: translators of another shape, positions out of range.
        SiteError: no blocks, or a site that does not exist or holds no value of the stream.

    Cost: one forward pass, and L passes through what follows the last block. Memory: `chunk_size` times the logits.

    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020); Belrose et al., "Eliciting Latent Predictions from
    Transformers with the Tuned Lens" (2023).

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> f, params = tdhook.functionalize(GPT2LMHeadModel(config).eval(), use_cache=False)
        >>> ids = {"input_ids": torch.tensor([[1, 2, 3]])}
        >>> lens = logit_lens(f, params, ids)
        >>> lens.shape, torch.allclose(lens[-1], f(params, ids).logits, atol=1e-6)
        (torch.Size([2, 1, 3, 11]), True)
    """
    require_positive("chunk_size", chunk_size, optional=True)
    require_positions(positions)
    found = named(f, params, inputs, names)
    asked = found.residual_post if sites is None else (sites,) if isinstance(sites, str) else sites
    chosen = [site for each in asked for site in expand(f, each)]
    _require_fitting(translators, len(chosen), found.width)
    _, (final, *values) = read(f, params, inputs, [found.residual_post[-1], *chosen])
    for site, value in zip(chosen, values):
        if value.shape[-1:] != final.shape[-1:] or value.numel() != final.numel():
            raise SiteError(f"site {site!r} holds {describe(value)}, the residual stream {describe(final)}; give its sites.")
    stream = torch.stack([value.reshape(final.shape) for value in values])
    if translators is not None:
        stream = translators.translate(stream)
    finish = tail(f, params, inputs, found)
    return vmap_or_loop(lambda value: _at(logits_of(found, finish(value)), positions), stream, chunk_size)


def _require_fitting(translators: Translators | None, count: int, width: int) -> None:
    if translators is None:
        return
    if not isinstance(translators, Translators):
        raise InputError(f"translators is {describe(translators)}; give what fit_translators or train_translators returned.")
    if len(translators.weight) != count:
        raise InputError(f"translators has {len(translators.weight)} maps for {count} sites; give one for each.")
    if translators.weight.shape[-1] != width:
        raise InputError(f"translators is for a stream of {translators.weight.shape[-1]} features, this one has {width}.")


def _at(logits: Tensor, positions: Sequence[int] | None) -> Tensor:
    if positions is not None and logits.ndim < 3:
        raise InputError(f"positions={positions!r}, but the logits have the shape {list(logits.shape)}, without positions.")
    return at_positions(logits, positions)
