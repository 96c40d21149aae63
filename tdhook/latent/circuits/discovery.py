"""`edge_graph`: the graph of a transformer, found from its standard names and what one run computes."""

from __future__ import annotations

from typing import Any

from ...core.copying import copy_tree, eager_class
from ...core.errors import InputError, SiteError
from ...core.functional import Blueprint, Functional, FunctionalModel
from ...core.sites import Site, join_path
from ...core.structure import describe
from ...core.transforms import require_sites
from ..names import HeadLayout, Names, Projection
from ..names import names as find_names
from ..names.blocks import linear
from ..names.flow import Flow, record
from ..names.heads import projection_of
from ..names.naming import _example
from .graph import EdgeGraph
from .parts import Entrance, ReaderGroup, Submodel, WriterGroup


def edge_graph(
    f: FunctionalModel, params: Any, inputs: Any = None, *, names: Names | None = None, heads: bool = True
) -> EdgeGraph:
    """The graph of writers and readers of the residual stream of a transformer.

        writers:  embedding, head l.h (or attention l), mlp l
        readers:  query l.h, key l.g, value l.g (or attention l), mlp l, logits
        both, where the stream itself is normalised after each write (BERT):  attention norm l, mlp norm l

    Each reader has a copy of the stream of its own, which it reads through the norm of its branch. The query, the key and the
    value of a head are three readers; with grouped heads a key or value is one reader for all heads that share it. `logits` is
    everything after the last block. A norm that the stream goes through reads the sum before it and writes what comes after it:
    the stream starts anew there, so that no edge leads past it.

    Args:
        f: functional model of a transformer: GPT-2, GPT-NeoX, Llama, BERT and their kin.
        params: its parameters; only shapes matter.
        inputs: an example as `f` takes it; only shapes matter. None as for `names`.
        names: standard names; None to find them.
        heads: attention by heads; False for the coarse graph, where each attention is one writer and one reader.

    Returns:
        `EdgeGraph`. The bias of an output projection belongs to no head, and stays whatever is ablated.

    Raises:
        ModelError: `f` has no sites. SiteError: writes that are neither attention nor MLP; heads of a model that normalises or
            scales what attention writes, or that joins heads in another way than by linear maps; then give
            `EdgeGraph.of(nodes)` by hand.

    Cost: up to four runs on fake tensors, which compute nothing.

    Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021); Goldowsky-Dill et al., "Localizing Model
    Behavior with Path Patching" (2023).

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> f, params = tdhook.functionalize(GPT2LMHeadModel(config).eval(), use_cache=False)
        >>> graph = edge_graph(f, params)
        >>> graph, graph.writers[:4]
        (EdgeGraph(7 writers, 15 readers, 46 edges), ('embedding', 'head 0.0', 'head 0.1', 'mlp 0'))
        >>> graph.edge(45)
        ('mlp 1', 'logits')
    """
    require_sites(f)
    if names is not None and not isinstance(names, Names):
        raise InputError(f"names is {describe(names)}; give what tdhook.latent.names.names(f, params) returned, or None.")
    found = find_names(f, params, inputs) if names is None else names
    run = _Run(f, params, inputs, found)
    parts: list[Any] = [WriterGroup(found.embedding, ("embedding",))]
    for layer in range(found.layers):
        parts += run.block(layer, heads)
    parts.append(ReaderGroup(found.residual_post[-1], ("logits",), ((),)))
    return EdgeGraph.from_parts(parts)


class _Run:
    """What one run shows about the readers of each block."""

    def __init__(self, f: FunctionalModel, params: Any, inputs: Any, found: Names):
        self.f, self.found = f.base, found
        self.flow: Flow = record(f.base, params, _example(f, params) if inputs is None else inputs)
        flow = self.flow
        places: list[Any] = [*flow.ops, *flow.calls]
        self.values = {flow.address(at, "in", keys): value for at in places for keys, value in at.inputs}
        self.values |= {flow.address(at, "out", keys): value for at in places for keys, value in at.outputs}
        self.maps = {}
        for op in flow.ops:
            map_ = linear(flow, op)
            if map_ is not None:
                projection = projection_of(flow, map_)
                self.maps[projection.site] = (projection, map_.input)

    def block(self, layer: int, heads: bool) -> list[Any]:
        """The readers and writers of a block, in the order of the run."""
        found = self.found
        if found.others[layer]:
            raise SiteError(
                f"block {layer} also writes {found.others[layer][0]!r}, which is neither attention nor MLP (cross-attention, "
                "say); give the graph by hand, with EdgeGraph.of."
            )
        if found.attention[layer] is None and found.mlp[layer] is None:
            reason = dict(found.missing).get("attention", "the model has none there")
            raise SiteError(f"what block {layer} writes was not found: {reason}; give the graph by hand, with EdgeGraph.of.")
        reads, writes = [], []
        if found.attention[layer] is not None:
            attended = self._heads(layer) if heads else self._coarse("attention", layer)
            reads.append(attended[0])
            writes.append(attended[1])
        if found.mlp[layer] is not None:
            read, write = self._coarse("mlp", layer)
            reads.append(read)
            writes.append(write)
        if found.norm == "post":
            return self._normalised(layer, reads, writes)
        if found.parallel or len(reads) == 1:
            return reads + writes
        return [reads[0], writes[0], reads[1], writes[1]]

    def _normalised(self, layer: int, reads: list[Any], writes: list[Any]) -> list[Any]:
        """The nodes of a block in which a norm of the stream follows each write."""
        parts: list[Any] = []
        for read, write in zip(reads, writes):
            kind = "mlp" if read is reads[-1] and self.found.mlp[layer] is not None else "attention"
            after = self.found.residual_post[layer] if read is reads[-1] else self.found.require("residual_mid", layer)
            name = f"{kind} norm {layer}"
            norm = ReaderGroup(self._before_norm(layer, after), (name,), ((name,),))
            parts += [read, write, norm, WriterGroup(after, (name,), restarts=True)]
        return parts

    def _before_norm(self, layer: int, after: str) -> str:
        """The site of what the norm reads that writes the stream anew; raises `SiteError` where there is no such norm."""
        for at, read, out in self.flow.norm_calls():
            if out == self.values[after]:
                return self.flow.address(at, "in", next(keys for keys, taken in at.inputs if taken == read))
        raise SiteError(
            f"block {layer} normalises its stream, but not right after each write; give the graph by hand, with EdgeGraph.of."
        )

    def _coarse(self, kind: str, layer: int) -> tuple[ReaderGroup, WriterGroup]:
        """Attention or MLP as one reader and one writer."""
        found, name = self.found, f"{kind} {layer}"
        site = found.require(kind, layer)
        norm = getattr(found, f"{kind}_norm")[layer]
        stream = found.residual_mid[layer] if kind == "mlp" and not found.parallel else found.residual_pre[layer]
        stream = found.residual_pre[layer] if stream is None else stream
        shared = norm is not None and found.attention_norm[layer] == found.mlp_norm[layer]
        if norm is not None and not shared:
            read = ReaderGroup(f"{norm}:in", (name,), ((name,),))
        elif norm is None:
            read = ReaderGroup(self._entrance(layer, site, stream), (name,), ((name,),))
        else:
            inside = Entrance(self._entrance(layer, site, norm))
            read = ReaderGroup(found.residual_pre[layer], (name,), ((name,),), self._norm(norm), (inside,))
        return read, WriterGroup(site, (name,))

    def _heads(self, layer: int) -> tuple[ReaderGroup, WriterGroup]:
        """The heads of a block: a reader for each query, key and value."""
        found = self.found
        if not found.attention_is_projection[layer]:
            raise SiteError(
                f"what attention writes in block {layer} is normalised or scaled after its output projection, so it is not the "
                "sum of its heads; take the coarse graph, with heads=False."
            )
        out: HeadLayout = found.require("head_output", layer)
        writers = tuple(f"head {layer}.{h}" for h in range(out.heads))
        norm = found.attention_norm[layer]
        entrances: list[Entrance] = []
        readers: list[str] = []
        feeds: list[tuple[str, ...]] = []
        for kind in ("query", "key", "value"):
            layout: HeadLayout = found.require(kind, layer)
            projection = self._reading(layer, kind, layout, norm)
            entrances.append(Entrance(layout.site, (len(readers), len(readers) + layout.heads), layout, projection))
            group = out.heads // layout.heads
            readers += [f"{kind} {layer}.{g}" for g in range(layout.heads)]
            feeds += [writers[g * group : (g + 1) * group] for g in range(layout.heads)]
        read = ReaderGroup(
            found.residual_pre[layer],
            tuple(readers),
            tuple(feeds),
            None if norm is None else self._norm(norm),
            tuple(entrances),
        )
        return read, WriterGroup(out.site, writers, out, found.require("output_projection", layer))

    def _reading(self, layer: int, kind: str, layout: HeadLayout, norm: str | None) -> Projection:
        """The linear map from the normalised stream to the heads; raises `SiteError` where it reads something else."""
        source = self.found.residual_pre[layer] if norm is None else norm
        known = self.maps.get(layout.site)
        if known is None or not self._same(known[1], self.values[source]):
            raise SiteError(
                f"the {kind} of block {layer} at {layout.site!r} is no linear map of {source!r}, so its heads cannot be given "
                "streams of their own; take the coarse graph, with heads=False."
            )
        return known[0]

    def _same(self, value: int, source: int) -> bool:
        """Whether a value is the source, perhaps in another shape."""
        while value != source:
            op = self.flow.maker[value]
            if op is None or op.name not in ("view", "reshape", "flatten", "contiguous", "to", "dropout"):
                return False
            value = op.inputs[0][1]
        return True

    def _entrance(self, layer: int, write: str, read: str) -> str:
        """The site of what a branch takes: the outermost module that takes the value and that the write comes from."""
        flow = self.flow
        value = self.values[read]
        start = self.found.residual_pre[layer]
        block = next(call for call in flow.calls if start in (flow.address(call, "in", keys) for keys, _ in call.inputs))
        made_from = flow.behind(self.values[write], since=block.start)
        for call in flow.calls:
            inside = block.start < call.start and call.end < block.end
            taken = [keys for keys, v in call.inputs if v == value]
            made = [v for _, v in call.outputs]
            if inside and taken and value not in made and any(v in made_from for v in made):
                return flow.address(call, "in", taken[0])
        raise SiteError(
            f"no module of block {layer} takes {read!r} for {write!r} alone; give the graph by hand, with EdgeGraph.of."
        )

    def _norm(self, site: str) -> Submodel:
        address = Site.parse(site)
        if address.op is not None:
            raise SiteError(
                f"the stream is normalised by an operation, {site!r}, and not by a module, so heads cannot be given streams of "
                "their own; take the coarse graph, with heads=False."
            )
        return _submodel(self.f, site.partition(":")[0].partition("@")[0])


def _submodel(f: Functional, path: str) -> Submodel:
    """A module of the model as a functional model of its own."""
    blueprint = f.blueprint
    module = next(m for m in blueprint.template.root.modules() if m._tdhook_path == path)
    within = next(names for names in blueprint.tree.paths if names and join_path(names) == path)
    depth = len(within)
    keys: list[tuple[str, ...]] = []
    owned = {}
    for key, owners in blueprint.tensor_names.items():
        # A tied tensor has its name from where it comes first, which may be outside of the module.
        inside = [(place[depth:], table, name) for place, table, name in owners if place[:depth] == within]
        if inside:
            owned[(str(len(keys)),)] = inside
            keys.append(key)
    skeleton = copy_tree(module, eager_class)[module]
    return Submodel(Functional(Blueprint(skeleton, owned), {}), tuple(keys))
