"""The residual stream as the sum of what wrote to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import SiteError
from ...core.functional import FunctionalModel
from ..names import Names
from .stream import at_positions, named, read, require_positions, require_sum


def component_labels(names: Names, *, heads: bool = False) -> tuple[str, ...]:
    """The names of the components that `residual_decomposition` returns, in their order.

    Examples:
        >>> from tdhook.latent.names import names
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> f, params = tdhook.functionalize(GPT2LMHeadModel(config).eval(), use_cache=False)
        >>> component_labels(names(f, params), heads=True)
        ('embedding', 'head 0.0', 'head 0.1', 'bias 0', 'mlp 0', 'rest')
    """
    labels = ["embedding"]
    for layer in range(names.layers):
        if names.attention[layer] is not None and heads:
            count = names.require("head_output", layer).heads
            labels += [*(f"head {layer}.{head}" for head in range(count)), f"bias {layer}"]
        elif names.attention[layer] is not None:
            labels.append(f"attention {layer}")
        labels += [f"other {layer}.{i}" for i in range(len(names.others[layer]))]
        if names.mlp[layer] is not None:
            labels.append(f"mlp {layer}")
    return (*labels, "rest")


def residual_decomposition(
    f: FunctionalModel,
    params: Any,
    inputs: Any,
    *,
    names: Names | None = None,
    heads: bool = False,
    positions: Sequence[int] | None = None,
) -> Tensor:
    """What embedding, attention and MLPs added to the last residual.

        residual_post_L = embedding + sum_l (attention_l + mlp_l) + rest,    attention_l = sum_h z_lh W_O,lh + b_l

    Args:
        f: functional model whose stream is a sum (`names.norm` is not `"post"`).
        params: its parameters.
        inputs: as `f` takes them, B examples.
        names: standard names; None to find them.
        heads: attention by heads, and what is left of it, which is its bias.
        positions: of the stream; None for all.

    Returns:
        Tensor [C, B, S, D], whose components `component_labels` names. Their sum is the last residual: the last one, `rest`, is
        what no name accounts for: rounding, or what a model changes between its blocks.

    Raises:
        SiteError: a stream that is normalised after each write; heads of a model that normalises or scales what attention
            writes, so that it is not the sum of its heads.

    Cost: one forward pass; with `heads` L matrix products. Memory: C times the stream; `positions` bounds it.

    Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> f, params = tdhook.functionalize(GPT2LMHeadModel(config).eval(), use_cache=False)
        >>> ids = {"input_ids": torch.tensor([[1, 2, 3]])}
        >>> components = residual_decomposition(f, params, ids, heads=True)
        >>> _, values = tdhook.capture(f, "transformer.h.1")(params, ids)
        >>> components.shape, torch.allclose(components.sum(0), values["transformer.h.1"], atol=1e-6)
        (torch.Size([10, 1, 3, 8]), True)
    """
    require_positions(positions)
    found = named(f, params, inputs, names)
    require_sum(found, "residual_decomposition")
    sites = _sites(found, heads)
    _, values = read(f, params, inputs, sites)
    return components_of(params, found, dict(zip(sites, values)), heads, positions)


def head_outputs(
    f: FunctionalModel,
    params: Any,
    inputs: Any,
    *,
    names: Names | None = None,
    positions: Sequence[int] | None = None,
) -> Tensor:
    """What each head adds to the residual stream: Tensor [L, H, B, S, D], `z_lh W_O,lh`, without the bias of the projection.

    Args and errors as `residual_decomposition`; a model with post-norm has head outputs too, which are added before the norm.
    L counts the layers that have attention.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> f, params = tdhook.functionalize(GPT2LMHeadModel(config).eval(), use_cache=False)
        >>> head_outputs(f, params, {"input_ids": torch.tensor([[1, 2, 3]])}).shape
        torch.Size([2, 2, 1, 3, 8])
    """
    require_positions(positions)
    found = named(f, params, inputs, names)
    _require_heads(found)
    layers = [layer for layer in range(found.layers) if found.attention[layer] is not None]
    sites = [found.require("head_output", layer).site for layer in layers]
    _, (final, *values) = read(f, params, inputs, [found.residual_post[-1], *sites])
    if not layers:
        found.require("attention")
    parts = [_by_head(found, params, layer, _of_stream(z, final, positions)) for layer, z in zip(layers, values)]
    return torch.stack(parts)


def _of_stream(value: Tensor, final: Tensor, positions: Sequence[int] | None) -> Tensor:
    """A value at some positions of the stream; a model may join the axes of batch and position (OPT)."""
    return at_positions(value.reshape(*final.shape[:-1], value.shape[-1]), positions)


def _by_head(found: Names, params: Any, layer: int, z: Tensor) -> Tensor:
    return torch.einsum("...hd,hdo->h...o", found.split_heads(z, layer), found.output_weight(params, layer))


def _require_heads(found: Names) -> None:
    for layer in range(found.layers):
        if found.attention[layer] is None:
            continue
        found.require("head_output", layer)
        if not found.attention_is_projection[layer]:
            raise SiteError(
                f"what attention writes in layer {layer} is normalised or scaled after its output projection, so it is not the "
                "sum of its heads; leave heads out."
            )


def _sites(found: Names, heads: bool) -> list[str]:
    """All sites that a decomposition reads, without repetition."""
    if heads:
        _require_heads(found)
    sites: list[str | None] = [found.embedding, found.residual_post[-1]]
    for layer in range(found.layers):
        sites += [found.attention[layer], found.mlp[layer], *found.others[layer]]
        if heads and found.attention[layer] is not None:
            sites.append(found.require("head_output", layer).site)
    return list(dict.fromkeys(site for site in sites if site is not None))


def components_of(params: Any, found: Names, values: dict[str, Tensor], heads: bool, positions: Sequence[int] | None) -> Tensor:
    """The components [C, B, S, D] from the values at `_sites`."""
    final = values[found.residual_post[-1]]

    def part(site: str) -> Tensor:
        return _of_stream(values[site], final, positions)

    parts = [part(found.embedding)]
    for layer in range(found.layers):
        written = found.attention[layer]
        if written is not None and heads:
            each = _by_head(found, params, layer, part(found.require("head_output", layer).site))
            parts += [*each, part(written) - each.sum(0)]
        elif written is not None:
            parts.append(part(written))
        parts += [part(site) for site in found.others[layer]]
        if (mlp := found.mlp[layer]) is not None:
            parts.append(part(mlp))
    stacked = torch.stack(parts)
    exact = torch.promote_types(stacked.dtype, torch.float32)  # hundreds of terms would not add up in half precision
    rest = at_positions(final, positions).to(exact) - stacked.sum(0, dtype=exact)
    return torch.cat([stacked, rest.to(stacked.dtype)[None]])
