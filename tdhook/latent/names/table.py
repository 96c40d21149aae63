"""`Names`: what the values of a transformer are called, whatever the family calls them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ...core.errors import InputError, SiteError, did_you_mean
from .layout import HeadLayout, Norm, Projection

# What `names(...)` takes.
SITES = (
    "residual_pre", "residual_mid", "residual_post", "attention", "mlp", "pattern", "attention_operation", "neurons",
    "attention_norm", "mlp_norm",
)  # fmt: skip
SINGLE = ("embedding", "final_norm", "logits")
LAYOUTS = ("query", "key", "value", "head_output")
PROJECTIONS = ("output_projection", "down_projection")
GIVEN = (*SITES, *SINGLE, *LAYOUTS, *PROJECTIONS, "unembedding")

Sites = tuple[str | None, ...]
Layouts = tuple[HeadLayout | None, ...]


@dataclass(frozen=True, repr=False)
class Names:
    """Addresses of the values of a transformer with L blocks, found by `names`. Immutable and hashable; prints as a table.

    Every address is a site for `capture`, `intervene` and the rest. What a model does not have is None; `missing` says why.

    Attributes:
        blocks: paths of the modules that repeat.
        width: D, the size of the residual stream.
        embedding: what the first block reads, after positions and norms are applied to it.
        token_embedding: name in `params` of the table of tokens [V, D].
        residual_pre: [L] the stream that block l reads, Tensor [B, S, D].
        residual_mid: [L] the stream between attention and MLP; None where both read the same (`parallel`).
        residual_post: [L] the stream that block l returns.
        attention: [L] what attention adds to the stream, after all norms and scales in the branch; None without attention.
        mlp: [L] what the MLP (or whatever stands in for it) adds to the stream.
        others: [L] sites of further writes, such as cross-attention.
        query: [L] heads of what the query projection returns, before rotations and norms of heads.
        key: [L] as `query`; with grouped heads fewer.
        value: [L] as `key`.
        pattern: [L] attention probabilities [B, H, Q, K] as they multiply the values; None where a fused kernel hides them.
        attention_operation: [L] the operation that mixes tokens: a softmax, or a fused one.
        head_output: [L] heads of what the output projection reads (z).
        output_projection: [L] the linear map from there to the stream.
        attention_is_projection: [L] whether that map returns what `attention` is, without a norm or a scale in between.
        neurons: [L] what the last linear map of the MLP reads, Tensor [B, S, F].
        down_projection: [L] that map.
        attention_norm: [L] the normalised stream that attention reads.
        mlp_norm: [L] the normalised stream that the MLP reads.
        final_norm: the normalised stream that the unembedding reads.
        final_scale: where that norm computes its scale.
        unembedding: the linear map from there to the logits; None where attention comes between (a decoder after an encoder).
        logits: the first output of the model, but a loss, that depends on the unembedding, or else on the last block.
        head_count: H, query heads of a block.
        kv_head_count: key-value heads, each shared by H / kv_head_count query heads in a row.
        head_size: d, features of `head_output` of one head.
        parallel: whether attention and MLP read the same stream (GPT-NeoX, GPT-J, Falcon, Phi), not one after the other.
        norm: `"pre"`: what is read is normalised (GPT-2, Llama); `"post"`: the stream is, after each write (BERT), so that
            `residual_mid` and `residual_post` are values after the norm, and the writes are added before it; `"sandwich"`: what
            is read and what is written (Gemma 2); `"output"`: only what is written (OLMo 2); `"none"`.
        missing: pairs of a name and the reason why it was not found.
    """

    blocks: tuple[str, ...]
    width: int
    embedding: str
    token_embedding: str | None
    residual_pre: tuple[str, ...]
    residual_mid: Sites
    residual_post: tuple[str, ...]
    attention: Sites
    mlp: Sites
    others: tuple[tuple[str, ...], ...]
    query: Layouts
    key: Layouts
    value: Layouts
    pattern: Sites
    attention_operation: Sites
    head_output: Layouts
    output_projection: tuple[Projection | None, ...]
    attention_is_projection: tuple[bool, ...]
    neurons: Sites
    down_projection: tuple[Projection | None, ...]
    attention_norm: Sites
    mlp_norm: Sites
    final_norm: str | None
    final_scale: Norm | None
    unembedding: Projection | None
    logits: str
    head_count: int | None
    kv_head_count: int | None
    head_size: int | None
    parallel: bool
    norm: str
    missing: tuple[tuple[str, str], ...]

    @property
    def layers(self) -> int:
        """L, the number of blocks."""
        return len(self.blocks)

    def require(self, name: str, layer: int | None = None) -> Any:
        """The entry called `name`, of one layer where there is one for each; negative layers count from the end.

        Raises `SiteError` with the reason where it was not found (of all layers: in none of them), `InputError` for a name
        that is no entry.
        """
        known = [each.name for each in fields(self)]
        if name not in known:
            raise InputError(f"{name!r} is no entry of Names." + did_you_mean(name, known))
        entry = getattr(self, name)
        if layer is not None:
            if not isinstance(entry, tuple) or name == "missing":
                raise InputError(f"{name} is one for the whole model; leave out layer={layer}.")
            if not -self.layers <= layer < self.layers:
                raise SiteError(f"layer {layer} is out of range; the model has {self.layers} blocks.")
            entry = entry[layer]
        if entry is None or (isinstance(entry, tuple) and entry and all(each is None for each in entry)):
            at = "" if layer is None else f" of layer {layer}"
            reason = dict(self.missing).get(name, "the model has none there")
            raise SiteError(
                f"{name}{at} was not found: {reason}" + (f"; give it by names(..., {name}=...)." if name in GIVEN else ".")
            )
        return entry

    def _layout(self, name: str, layer: int) -> HeadLayout:
        if name not in LAYOUTS:
            raise InputError(f"{name!r} has no heads; choose from {', '.join(LAYOUTS)}.")
        return self.require(name, layer)

    def split_heads(self, value: Tensor, layer: int, name: str = "head_output") -> Tensor:
        """The heads of a value: [..., width] gives [..., heads, size].

        Args:
            value: what was read at the site of `name`.
            layer: the block.
            name: `"head_output"`, `"query"`, `"key"` or `"value"`.
        """
        return self._layout(name, layer).split(value)

    def merge_heads(self, value: Tensor, heads: Tensor, layer: int, name: str = "head_output") -> Tensor:
        """`value` with these heads [..., heads, size] in it; the reverse of `split_heads`."""
        return self._layout(name, layer).merge(value, heads)

    def output_weight(self, params: Any, layer: int) -> Tensor:
        """The output projection by heads, Tensor [heads, size, D].

        The sum over heads of `head_output` times this, and the bias, is what the projection returns
        (`output_projection[layer].site`): `attention[layer]` unless a norm or a scale follows in the branch.
        """
        matrix = self.require("output_projection", layer).matrix(params)
        return self.require("head_output", layer).split(matrix.mT).movedim(0, -1)

    def unembedding_weight(self, params: Any) -> Tensor:
        """The unembedding, Tensor [D, V]."""
        return self.require("unembedding").matrix(params)

    def __repr__(self) -> str:
        return (
            f"Names({self.layers} blocks {_template(self.blocks, self.blocks)!r}, width {self.width}, {self.head_count} heads)"
        )

    def __str__(self) -> str:
        rows = []
        for each in fields(self):
            entry = getattr(self, each.name)
            if each.name == "missing":
                rows += [(f"no {name}", reason) for name, reason in entry]
            elif isinstance(entry, tuple):
                if any(entry) and each.name != "attention_is_projection":
                    rows.append((each.name, _template(tuple(map(_shown, entry)), self.blocks)))
            elif entry is not None:
                rows.append((each.name, _shown(entry)))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _shown(entry: Any) -> str:
    if isinstance(entry, HeadLayout):
        where = "" if entry.contiguous and not entry.starts[0] else f" at {entry.starts[0]}"
        strides = {b - a for a, b in zip(entry.starts, entry.starts[1:])}
        spaced = "" if entry.contiguous else f", one every {min(strides)}" if len(strides) == 1 else ", unevenly spaced"
        return f"{entry.site} ({entry.heads} heads of {entry.size}{where}{spaced})"
    if isinstance(entry, Projection):
        return f"{entry.weight} [{'out, in' if entry.transposed else 'in, out'}]"
    if isinstance(entry, Norm):
        return entry.operation
    return ", ".join(entry) if isinstance(entry, tuple) else str(entry)


def _template(texts: tuple[str, ...], blocks: tuple[str, ...]) -> str:
    """One line for all layers: with `{l}` for the number of the layer where they differ in nothing else."""
    parents = [block.rpartition(".") for block in blocks]
    if not all(number.isdecimal() for _, _, number in parents):
        return ", ".join(texts)
    general = [text.replace(block, f"{parent}{dot}{{l}}", 1) for text, block, (parent, dot, _) in zip(texts, blocks, parents)]
    if len(set(general)) == 1:
        count = len(blocks)
        return general[0].replace("{l}", f"{{0..{count - 1}}}", 1) if count > 1 else texts[0]
    return ", ".join(texts)
