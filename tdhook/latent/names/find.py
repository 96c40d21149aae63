"""Fills in `Names` from the record of a run."""

from __future__ import annotations

from typing import Any

from ...core.errors import SiteError
from .blocks import Block, Core, Linear, find_blocks, find_cores, last_linear, linear
from .decompose import decompose, split_parallel
from .flow import NORMS, Call, Flow, Op
from .heads import Found, attention_heads, attention_output, projection_of, returned, site_of
from .layout import Norm

PER_LAYER = (
    "residual_pre", "residual_mid", "residual_post", "attention", "mlp", "others", "query", "key", "value", "pattern",
    "attention_operation", "head_output", "output_projection", "neurons", "down_projection", "attention_norm", "mlp_norm",
)  # fmt: skip


def find(flow: Flow, blocks: list[str] | None) -> Found:
    """Everything that the record shows.

    Args:
        flow: the record of a run.
        blocks: paths of the blocks; None to find them.

    Raises:
        SiteError: no blocks, or several stacks of them.
    """
    found = Found()
    cores = find_cores(flow)
    stack = find_blocks(flow, cores, blocks)
    norms = list(flow.norm_calls())
    layers = []
    for block in stack:
        inside = {out: read for at, read, out in norms if block.holds(_time(at))}
        try:
            decompose(flow, block, inside)
            split_parallel(flow, block, cores)
        except SiteError as error:
            block.writes, block.stream = [], [block.output[1], block.input[1]]
            found.lack(
                f"{error}", "residual_mid", "attention", "mlp", "neurons", "down_projection", "attention_norm", "mlp_norm"
            )
        layers.append(_layer(flow, block, cores, norms, found))
    entries: dict[str, Any] = {name: tuple(layer.get(name) for layer in layers) for name in PER_LAYER}
    entries["attention_is_projection"] = tuple(bool(layer.get("exact")) for layer in layers)
    entries["blocks"] = tuple(block.call.path for block in stack)
    entries["width"] = flow.shape(stack[0].input[1])[-1]
    entries["parallel"] = bool(layers[0].get("parallel"))
    entries["norm"] = _norm_kind(stack, found)
    first = next((layer for layer in layers if layer.get("head_output")), {})
    heads = first.get("head_output")
    entries["head_count"] = heads.heads if heads else first.get("heads", layers[0].get("heads"))
    entries["head_size"] = heads.size if heads else None
    entries["kv_head_count"] = None  # counted once everything is there, with what is given
    entries |= _ends(flow, stack, cores, norms, found)
    found.entries |= entries
    return found


def _time(at: Call | Op) -> int:
    return at.start if isinstance(at, Call) else at.time


def _layer(flow: Flow, block: Block, cores: list[Core], norms: list, found: Found) -> dict[str, Any]:
    """The entries of one block."""
    layer: dict[str, Any] = {
        "residual_pre": flow.address(block.call, "in", block.input[0]),
        "residual_post": flow.address(block.call, "out", block.output[0]),
        "others": (),
    }
    own = [core for core in cores if block.holds(core.time)]
    branches = [(write, flow.behind(write, block.stream, block.start)) for write in block.writes]
    attending = [i for i, (_, made_from) in enumerate(branches) if any(core.mixed in made_from for core in own)]
    plain = [i for i in range(len(branches)) if i not in attending]
    layer["others"] = tuple(
        site for i in (*attending[1:], *plain[:-1]) if (site := site_of(flow, block.writes[i], block.call)) is not None
    )
    if attending:
        write, made_from = branches[attending[0]]
        core = next(core for core in own if core.mixed in made_from)
        layer["attention"] = site_of(flow, write, block.call)
        layer |= attention_heads(flow, block, core, found)
        projection = last_linear(flow, write, block.start, core.mixed)
        layer |= attention_output(flow, core, projection, layer.get("heads"), found)
        if projection is not None:
            layer["exact"] = flow.moved_only(write, returned(flow, projection)[1], block.start)
        layer["attention_norm"] = _read_norm(flow, block, made_from, norms)
        found.reads_normed.append(layer["attention_norm"] is not None)
        found.writes_normed.append(_writes_norm(flow, write, projection, norms, block))
    else:
        reason = "no write of the block comes from an attention operation (a softmax that multiplies values, or a fused one)"
        found.lack(reason, "attention", "query", "key", "value", "pattern", "attention_operation", "head_output",
                   "output_projection", "attention_norm")  # fmt: skip
    if plain:
        write, made_from = branches[plain[-1]]
        layer["mlp"] = site_of(flow, write, block.call)
        projection = last_linear(flow, write, block.start, block.input[1])
        if projection is None:
            found.lack("the MLP does not end with one linear map (a mixture of experts, say)", "neurons", "down_projection")
        else:
            layer["down_projection"] = projection_of(flow, projection)
            layer["neurons"] = layer["down_projection"].input
        layer["mlp_norm"] = _read_norm(flow, block, made_from, norms)
        found.reads_normed.append(layer["mlp_norm"] is not None)
        found.writes_normed.append(_writes_norm(flow, write, projection, norms, block))
    else:
        found.lack("the block adds nothing to the stream but attention", "mlp", "neurons", "down_projection", "mlp_norm")
    if attending and plain:
        first, second = sorted((attending[0], plain[-1]))
        reads = flow.behind(block.writes[second], since=block.start)
        layer["parallel"] = block.writes[first] not in reads
        if layer["parallel"]:
            found.lack("attention and MLP read the same stream", "residual_mid")
        else:
            shape = flow.shape(block.input[1])
            middle = next(v for v in block.stream if v in reads and flow.shape(v) == shape)
            layer["residual_mid"] = site_of(flow, middle, block.call)
    return layer


def _read_norm(flow: Flow, block: Block, made_from: set[int], norms: list) -> str | None:
    """The site of the one norm of the stream that a branch starts with."""
    stream = set(block.stream)
    sites = [
        flow.address(at, "out", ())
        for at, read, out in norms
        if block.holds(_time(at)) and read in stream and out in made_from and out not in stream
    ]
    return sites[0] if len(sites) == 1 else None


def _writes_norm(flow: Flow, write: int, projection: Linear | None, norms: list, block: Block) -> bool:
    since = projection.op.time if projection is not None else block.call.end
    after = flow.behind(write, since=since)
    return any(out in after and read in after and since < _time(at) < block.call.end for at, read, out in norms)


def _norm_kind(stack: list[Block], found: Found) -> str:
    if stack[0].normed:
        return "post"
    reads, writes = any(found.reads_normed), any(found.writes_normed)
    return "sandwich" if reads and writes else "pre" if reads else "output" if writes else "none"


def _ends(flow: Flow, stack: list[Block], cores: list[Core], norms: list, found: Found) -> dict[str, Any]:
    """What comes before the first block and after the last."""
    first, last = stack[0], stack[-1]
    final, since = last.output[1], last.call.end
    root = next(call for call in flow.calls if call.path == "")
    entries: dict[str, Any] = {"embedding": flow.address(first.call, "in", first.input[0])}
    entries["token_embedding"] = _token_embedding(flow, first, root)
    if entries["token_embedding"] is None:
        found.lack("the first block reads no table of embeddings", "token_embedding")

    entries["final_norm"] = entries["final_scale"] = None
    for at, read, _ in norms:
        if _time(at) > since and flow.moved_only(read, final, since):
            entries["final_norm"] = flow.address(at, "out", ())
            entries["final_scale"] = final_scale(flow, at, found)
            break
    else:
        found.lack("no norm reads the last residual", "final_norm", "final_scale")

    outputs = [(keys, flow.behind(v, since=since), v) for keys, v in root.outputs]
    outputs = [output for output in outputs if final in output[1]]
    entries["logits"] = flow.address(root, "out", outputs[0][0] if outputs else ())
    entries["unembedding"] = None
    if any(core.time > since and final in flow.behind(core.mixed, since=since) for core in cores):
        found.lack("attention stands between the last block and the output", "unembedding")
        return entries
    maps = [m for op in flow.ops if op.time > since and (m := linear(flow, op)) and final in flow.behind(m.input, since=since)]
    for keys, made_from, value in outputs:
        width = flow.shape(final)[-1]
        own = [m for m in maps if m.output in made_from]
        own = [m for m in own if flow.shape(m.output)[-1] != width or flow.moved_only(value, m.output, since)]
        if own and flow.shape(value):  # a loss is no logit
            entries["unembedding"] = projection_of(flow, own[-1])
            entries["logits"] = flow.address(root, "out", keys)
            return entries
    found.lack("no linear map to another width comes after the last block", "unembedding")
    return entries


def _token_embedding(flow: Flow, first: Block, root: Call) -> str | None:
    """The table that the inputs are looked up in on the way to the first block; not one of positions, if there are both."""
    made_from, given = flow.behind(first.input[1]), [value for _, value in root.inputs]
    tables: list[tuple[bool, str]] = []
    for op in flow.ops:
        if op.name not in ("embedding", "getitem") or op.time > first.start or op.outputs[0][1] not in made_from:
            continue
        table = next((v for v in op.values if v in flow.weights and flow.floating(v)), None)
        index = next((v for v in op.values if not flow.floating(v)), None)
        if table is not None and index is not None and not flow.behind(index).isdisjoint(given):
            tables.append((any(flow.moved_only(index, value, 0) for value in given), flow.weights[table]))
    return next((name for direct, name in tables if direct), tables[0][1] if tables else None)


def final_scale(flow: Flow, at: Call | Op, found: Found) -> Norm | None:
    """Where a norm computes its scale."""
    op = at if isinstance(at, Op) else next(op for op in at.ops if flow.normalises(op))
    shape = op.args[1] if len(op.args) > 1 else op.kwargs.get("normalized_shape")
    if op.name in NORMS and (shape is None or len(shape) != 1):
        found.lack("the final norm goes over several axes", "final_scale")
        return None
    return Norm(flow.address(op, "out", op.outputs[0][0]))
