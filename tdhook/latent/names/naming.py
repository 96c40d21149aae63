"""`names`: finds the standard parts of a transformer by following what one run computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...core.checks import require_positive
from ...core.errors import InputError, SiteError, did_you_mean
from ...core.functional import FunctionalModel
from ...core.reading import capture
from ...core.structure import describe, tensors
from ...core.tracing import run_abstract_or_real
from ...core.transforms import expand, require_sites
from .blocks import linear
from .find import final_scale, find
from .flow import Flow, record
from .heads import Found
from .layout import HeadLayout, Projection
from .table import GIVEN, LAYOUTS, PROJECTIONS, SINGLE, SITES, Names


def names(
    f: FunctionalModel,
    params: Any,
    inputs: Any = None,
    *,
    blocks: str | Sequence[str] | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    **given: str | Sequence[str],
) -> Names:
    """Standard names for the values of a transformer, so that a recipe written once runs on any of them.

        residual_pre[l] + attention[l] + mlp[l] = residual_post[l]        (norm "pre", "sandwich", "output" and "none")

    One run is recorded, operation by operation, and read backwards. Blocks are the numbered modules that return a value of the
    shape that they got and contain attention: a softmax that multiplies values, or a fused operation. What a block adds to the
    residual stream are the summands between its output and its input; the one that comes from the attention operation is
    `attention`, the other `mlp`. Each ends with the linear map that its heads or neurons enter by. How heads lie in a fused
    projection is read from the views and slices that the model takes of it. No name of a class or module plays a part.

    Args:
        f: functional model. Of a transformed one the model below is looked at, whose names are the same.
        params: its parameters; only shapes matter.
        inputs: an example as `f` takes it; only shapes matter, and they do not show in the result. None for
            `{"input_ids": zeros [2, 7]}` where the model takes that.
        blocks: paths of the blocks, such as `"decoder.block.*"`, where the model has several stacks or numbers them otherwise.
        heads: query heads, for what is given.
        kv_heads: key-value heads, for what is given; None for `heads`.
        **given: any attribute of `Names` that is a site, as a pattern (`"h.*.attn:out[0]"`) or a sequence of L sites; for
            `output_projection`, `down_projection` and `unembedding` the path of the linear module; for `query`, `key`, `value`
            and `head_output` a site whose last axis holds nothing but the heads in a row.

    Returns:
        `Names`. What the model does not have, or what could not be found, is None there, with the reason under `missing`.

    Raises:
        ModelError: `f` has no sites. InputError: no example; an unknown name.
        SiteError: no blocks; several stacks; a site that does not exist; a residual stream whose shape changes.

    Cost: two runs on fake tensors, which compute nothing (a model whose control flow depends on values runs for real).

    Operation sites (`transformer.h.0/add@0`) are counted in the run that was recorded: use the names with the same options of
    the model (attention implementation, cache), as `functionalize` binds them.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> f, params = tdhook.functionalize(GPT2LMHeadModel(config).eval(), use_cache=False)
        >>> found = names(f, params)
        >>> found.residual_post[1], found.residual_mid[0], found.attention[0]
        ('transformer.h.1', 'transformer.h.0/add@0', 'transformer.h.0.attn:out[0]')
        >>> found.key[0].site, found.key[0].starts, found.output_weight(params, 0).shape
        ('transformer.h.0.attn.c_attn', (8, 12), torch.Size([2, 4, 8]))
    """
    require_sites(f)
    f = f.base  # a write of a transform would cut the flow of values
    require_positive("heads", heads, optional=True)
    require_positive("kv_heads", kv_heads, optional=True)
    for name in given:
        if name not in GIVEN:
            raise InputError(f"{name!r} is no entry that can be given." + did_you_mean(name, (*GIVEN, "blocks", "heads")))
    if inputs is None:
        inputs = _example(f, params)
    paths = None if blocks is None else [site.partition(":")[0] for site in _expanded(f, "blocks", blocks)]
    flow = record(f, params, inputs)
    found = find(flow, paths)
    for name, value in given.items():
        _give(f, flow, found, name, value)
    _check(f, params, inputs, found, heads, kv_heads, given)
    missing = tuple((name, reason) for name, reason in found.missing.items() if _lacking(found.entries.get(name)))
    return Names(**found.entries, missing=missing)


def _lacking(entry: Any) -> bool:
    return entry is None or (isinstance(entry, tuple) and any(each is None for each in entry))


def _example(f: FunctionalModel, params: Any) -> dict[str, torch.Tensor]:
    taken = getattr(f.base.blueprint.template.root, "_tdhook_names", ())
    if "input_ids" not in taken:
        raise InputError(f"inputs is None, but the model takes {', '.join(map(repr, taken))}; give an example of its inputs.")
    device = next((tensor.device for _, tensor in tensors(params)), None)
    example = {"input_ids": torch.zeros(2, 7, dtype=torch.long, device=device)}
    if "decoder_input_ids" in taken and any("decoder" in path for path in f.tree.paths):
        example["decoder_input_ids"] = torch.zeros(2, 6, dtype=torch.long, device=device)
    return example


def _expanded(f: FunctionalModel, name: str, value: str | Sequence[str]) -> list[str]:
    if not isinstance(value, str) and not (isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value)):
        raise InputError(f"{name} is {describe(value)}; give a site, a pattern of sites, or a sequence of sites.")
    return expand(f, value)


def _give(f: FunctionalModel, flow: Flow, found: Found, name: str, value: str | Sequence[str]) -> None:
    """Puts a given entry in place of what was found."""
    sites = _expanded(f, name, value)
    layers = len(found.entries["blocks"])
    single = name in SINGLE or name == "unembedding"
    if len(sites) != (1 if single else layers):
        raise SiteError(
            f"{name}={value!r} means {len(sites)} sites; give {'one' if single else f'one for each of the {layers} blocks'}."
        )
    if name in PROJECTIONS or name == "unembedding":
        maps = {m.op.path: m for op in flow.ops if (m := linear(flow, op)) is not None}
        made = []
        for site in sites:
            if site not in maps:
                raise SiteError(
                    f"{name}={value!r}: {site!r} is no module that applies one linear map." + did_you_mean(site, maps)
                )
            m = maps[site]
            made.append(Projection(site, f"{site}:in", m.weight, m.bias, m.transposed))
        found.entries[name] = made[0] if single else tuple(made)
    elif name in LAYOUTS:
        found.entries[name] = tuple(HeadLayout(site, (0,), 0) for site in sites)  # `_check` measures them
    else:
        found.entries[name] = sites[0] if single else tuple(sites)
    if name == "final_norm":
        at = next((at for at, _, _ in flow.norm_calls() if flow.address(at, "out", ()) == sites[0]), None)
        found.entries["final_scale"] = None if at is None else final_scale(flow, at, found)
    if name in ("attention", "output_projection"):
        pairs = zip(found.entries["attention"], found.entries["output_projection"])
        found.entries["attention_is_projection"] = tuple(_is_projection(flow, *pair) for pair in pairs)


def _is_projection(flow: Flow, site: str | None, projection: Projection | None) -> bool:
    if site is None or projection is None:
        return False
    written, returned = flow.value_at(site), flow.value_at(projection.site)
    return written is not None and returned is not None and flow.moved_only(written, returned, 0)


def _check(
    f: FunctionalModel, params: Any, inputs: Any, found: Found, heads: int | None, kv_heads: int | None, given: Any
) -> None:
    """Reads all sites once on fake tensors: they have to exist and to have the shapes that their names promise."""
    entries = found.entries
    sites: dict[str, None] = {}
    for name in (*SITES, *SINGLE):
        entry = entries[name]
        sites.update(dict.fromkeys(site for site in (entry if isinstance(entry, tuple) else (entry,)) if site is not None))
    for name in LAYOUTS:
        sites.update(dict.fromkeys(layout.site for layout in entries[name] if layout is not None))
    reader = capture(f, list(sites))

    def shapes(params: Any, inputs: Any) -> dict[str, tuple[int, ...]]:
        return {keys[0]: tuple(value.shape) for keys, value in tensors(reader(params, inputs)[1])}

    found_shapes, _ = run_abstract_or_real(f, shapes, params, inputs)
    stream = found_shapes[entries["residual_pre"][0]]
    for name in ("residual_pre", "residual_mid", "residual_post", "attention", "mlp"):
        for site in entries[name]:
            if site is not None and not _same_size(found_shapes[site], stream):
                raise SiteError(
                    f"{name} {site!r} has the shape {list(found_shapes[site])}, the residual stream {list(stream)}; "
                    f"give another by names(..., {name}=...)."
                )
    for name in LAYOUTS:
        grouped = name in ("key", "value") and kv_heads is not None
        count = kv_heads if grouped else heads
        made = []
        for layout in entries[name]:
            if layout is not None and name in given:
                made.append(_even(name, layout.site, found_shapes[layout.site][-1], count or entries["head_count"]))
            elif layout is not None and count not in (None, layout.heads) and (grouped or name in ("query", "head_output")):
                said = "kv_heads" if grouped else "heads"
                raise SiteError(
                    f"{said}={count}, but {name} at {layout.site!r} was found to have {layout.heads} heads; "
                    f"if that is wrong give {name}=... too."
                )
            else:
                made.append(layout)
        entries[name] = tuple(made)
    first = next((each for each in entries["head_output"] if each is not None), None)
    if first is not None:
        entries["head_count"], entries["head_size"] = first.heads, first.size
    keys = next((each for each in entries["key"] if each is not None), None)
    entries["kv_head_count"] = None if keys is None else keys.heads


def _same_size(shape: tuple[int, ...], stream: tuple[int, ...]) -> bool:
    """Whether a value fits the stream; OPT joins the axes of batch and position in its MLP."""
    return shape[-1] == stream[-1] and math.prod(shape) == math.prod(stream)


def _even(name: str, site: str, width: int, heads: int | None) -> HeadLayout:
    if heads is None:
        raise SiteError(f"{name} is given at {site!r}, but the number of heads is unknown; give heads=...")
    if width % heads:
        raise SiteError(
            f"{name} at {site!r} has {width} features, which {heads} heads do not divide; give heads=... or kv_heads=..."
        )
    size = width // heads
    return HeadLayout(site, tuple(size * h for h in range(heads)), size)
