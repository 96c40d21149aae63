"""The tail of a model: `start_from`, which gives the values at sites and runs only what they do not make superfluous.

What may be left out is a question of data flow, not of order: a rotary table or a skip connection computed before the site may
be needed after it. One run on fake tensors records, for every operation, the storages that it reads and writes and the module
calls around it. Walking back from the outputs gives what is live; module calls without a live operation are then replaced by
placeholders of NaN, which would show in the result if the analysis were wrong.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .compat import is_compiling, storage_key, unwrapped
from .errors import InputError
from .functional import Execution, FunctionalModel
from .scope import Handler, Observer
from .sites import Site, Want
from .structure import describe, reachable_tensors
from .tracing import run_abstract
from .transforms import Sites, Transform, exact_wants, require_sites, take, values_at
from .writing import Writer

_PLAIN = (Tensor, int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice)


def is_plain(value: Any) -> bool:
    """Whether a value consists of tensors and constants only, so that calls can exchange nothing through it unseen."""
    return all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_flatten(value)[0])


class Effects:
    """Watches one module call for what it may do besides returning a value: talk through an object that it was given, change
    a list or dict that it was given, or set an attribute of a module."""

    def __init__(self, f: FunctionalModel, arguments: Any):
        self.f, self.arguments = f, arguments
        self.leaves = pytree.tree_flatten(arguments)[0]
        self.attributes_set = f.base.blueprint.writes()

    def none(self, output: Any) -> bool:
        """Whether the call, which returned `output`, had no effect that data flow does not show."""
        after = pytree.tree_flatten(self.arguments)[0]
        unchanged = len(after) == len(self.leaves) and all(new is old for new, old in zip(after, self.leaves))
        unchanged = unchanged and self.f.base.blueprint.writes() == self.attributes_set
        return unchanged and is_plain(self.leaves) and is_plain(output)


@dataclass(eq=False)
class _Call:
    path: str
    call: int
    start: int
    parent: _Call | None
    effects: Effects
    end: int = -1
    pure: bool = False
    left_out: bool = False
    output: Any = None


class _Flow(Observer):
    """Records operations as (read storages, written storages), and which of them each module call made."""

    def __init__(self, f: FunctionalModel) -> None:
        self.f = f
        self.events: list[tuple[set[int], set[int]]] = []
        self.calls: list[_Call] = []
        self.open: list[_Call] = []
        self.keep: list[Tensor] = []  # a storage that is freed would give its address to another

    def storages(self, value: Any) -> set[int]:
        found = set()
        for tensor in reachable_tensors(value):
            tensor = unwrapped(tensor)  # of a vmap or grad of the model's own
            self.keep.append(tensor)
            found.add(storage_key(tensor))
        return found

    def enter(self, path: str, call: int, args: tuple, kwargs: dict) -> None:
        parent = self.open[-1] if self.open else None
        self.open.append(_Call(path, call, len(self.events), parent, Effects(self.f, (args, kwargs))))

    def leave(self, path: str, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        done = self.open.pop()
        done.end, done.output = len(self.events), output
        done.pure = done.effects.none(output)
        self.calls.append(done)

    def live(self, output: Any) -> tuple[list[bool], set[int]]:
        """Which events the output depends on, and all storages on the way."""
        needed = self.storages(output)
        flags = [False] * len(self.events)
        for i in range(len(self.events) - 1, -1, -1):
            reads, writes = self.events[i]
            if writes & needed:
                flags[i] = True
                needed |= reads
        return flags, needed


class _FlowMode(TorchDispatchMode):
    def __init__(self, flow: _Flow):
        super().__init__()
        self.flow = flow

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        reads = self.flow.storages((args, kwargs))
        output = func(*args, **kwargs)
        writes = self.flow.storages(output) - reads
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                writes |= self.flow.storages(args[i] if i < len(args) else kwargs.get(argument.name))
        self.flow.events.append((reads, writes))
        return output


@dataclass(frozen=True)
class _Placeholder:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        filler = float("nan") if self.dtype.is_floating_point or self.dtype.is_complex else 0
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).fill_(filler)


class _Seen(Handler):
    """Keeps what passes at the sites of surrounding transforms: to them it is a result."""

    def __init__(self, wants: tuple[Want, ...]):
        super().__init__(wants)
        self.values: list[Tensor] = []

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        self.values.append(value)
        return value


def _superfluous(
    g: StartFrom, params: Any, inputs: Any, extra: tuple, writes: dict[Want, Tensor], outer: tuple[Want, ...]
) -> dict[tuple[str, int], Any]:
    """The module calls that need not run, with placeholders for what they return."""
    flow = _Flow(g)
    names = {want: str(want.site) for want in writes}
    kept = (*g.wants, *outer, *inner_wants(g.inner))

    def recorded(params: Any, inputs: Any, extra: tuple, values: dict[str, Tensor]) -> tuple:
        writer = Writer(g.wants, {want: values[name] for want, name in names.items()})
        seen = _Seen(outer)
        with _FlowMode(flow):
            output = g.inner._run(params, inputs, extra, Execution((seen, writer), flow))
        return flow.live((output, seen.values))

    flags, needed = run_abstract(g, recorded, params, inputs, extra, {names[want]: writes[want] for want in writes})
    live_before = [0]
    for flag in flags:
        live_before.append(live_before[-1] + flag)
    counted = _around_shared_modules(flow.calls)
    left_out = {}
    # A call ends after its children, so in reverse a parent comes first; the children of what is left out never start.
    for call in reversed(flow.calls):
        idle = live_before[call.end] == live_before[call.start] and not flow.storages(call.output) & needed
        call.left_out = (call.parent is not None and call.parent.left_out) or (
            idle and call.pure and call not in counted and not surrounds(call.path, kept)
        )
        if call.left_out and not (call.parent is not None and call.parent.left_out):
            left_out[call.path, call.call] = pytree.tree_map_only(
                Tensor, lambda t: _Placeholder(tuple(t.shape), tuple(t.stride()), t.dtype, t.device), call.output
            )
    return left_out


def _around_shared_modules(calls: list[_Call]) -> set[_Call]:
    """The calls around some, but not all calls of a module: without them the others would be counted wrongly."""
    total = Counter(call.path for call in calls)
    inside: dict[_Call, Counter] = {call: Counter() for call in calls}
    for call in calls:
        around = call.parent
        while around is not None:
            inside[around][call.path] += 1
            around = around.parent
    return {call for call, paths in inside.items() if any(total[path] != count for path, count in paths.items())}


@dataclass(frozen=True, eq=False, repr=False)
class StartFrom(Transform):
    single: bool

    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        value, extra = take(extra, "value")
        writes = self._writes(value)
        substitutes = None if is_compiling() else self._left_out(params, inputs, extra, writes, execution)
        if execution.substitutes is not None:
            substitutes = {**(substitutes or {}), **execution.substitutes}
        writer = Writer(self.wants, writes)
        within = Execution((*execution.handlers, writer), execution.observer, substitutes)
        output = self.inner._run(params, inputs, extra, within)
        writer.finish()
        return output

    def _writes(self, value: Any) -> dict[Want, Tensor]:
        writes = values_at(self.wants, {self.wants[0].request: value} if self.single else value, "value")
        for want, tensor in writes.items():
            if not isinstance(tensor, Tensor):
                raise InputError(f"value for {str(want.site)!r} is {describe(tensor)}; give a tensor.")
        return writes

    def _left_out(
        self, params: Any, inputs: Any, extra: tuple, writes: dict[Want, Tensor], execution: Execution
    ) -> dict[tuple[str, int], Any]:
        """The module calls that need not run with these shapes; found once and kept with the model."""
        cache = self.base.blueprint.tails
        outer = tuple(want for handler in execution.handlers for want in handler.wants)
        leaves, spec = pytree.tree_flatten((inputs, extra, list(writes.values())))
        key = (self.inner.key(), self.wants, outer, str(spec), tuple(map(_signature, leaves)))
        if key not in cache:
            try:
                left_out = _superfluous(self, params, inputs, extra, writes, outer)
            except Exception:
                # Its control flow depends on values, or it leaves torch: run all of it. A real error shows there.
                left_out = {}
            while len(cache) >= 64:
                cache.pop(next(iter(cache)))
            cache[key] = left_out
        return {call: pytree.tree_map_only(_Placeholder, _Placeholder.make, output) for call, output in cache[key].items()}


def inner_wants(f: FunctionalModel) -> tuple[Want, ...]:
    """What the transforms that `f` is made of read or write: a call around one of these sites has to run."""
    wants: tuple[Want, ...] = ()
    while isinstance(f, Transform):
        wants += f.wants
        f = f.inner
    return wants


def surrounds(path_text: str, wants: tuple[Want, ...]) -> bool:
    """Whether a site lies inside a module, or at its input, so that the module has to run for the site to be reached."""
    path = Site.parse(path_text).path if path_text and wants else ()
    for want in wants:
        inside = want.site.path[: len(path)] == path
        own_output = want.site.path == path and want.site.op is None and want.site.port == "out"
        if inside and not own_output:
            return True
    return False


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.device)
    return leaf if isinstance(leaf, _PLAIN) else (type(leaf), *map(_signature, reachable_tensors(leaf)))


def start_from(f: FunctionalModel, sites: Sites) -> FunctionalModel:
    """The tail of a model: the values at sites are given, and what only served to compute them does not run.

        start_from(f, s)(params, x, stop_at(f, s)(params, x)) == f(params, x)

    Args:
        f: functional model.
        sites: one exact address, or a list of them.

    Returns:
        `g(params, inputs, value) -> output`: `value` is the tensor at the site, or for a list a mapping from sites to tensors.
        What the tail needs from before the site (masks, rotary tables, skip connections) is computed from `inputs`.

    Raises:
        SiteError: as `intervene`, a pattern, a value that is missing.

    Cost: the part of the forward pass that the output still needs, at the grain of module calls. The first call with new shapes
    adds one run on fake tensors; a model whose control flow depends on values runs whole. Compiled, the compiler drops what is
    not needed.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
        >>> start_from(f, "0")(params, torch.ones(1, 3), torch.tensor([[-1.0, 2.0]]))
        tensor([[0., 2.]])
    """
    require_sites(f)
    return StartFrom(f, exact_wants(f, sites, "start_from"), isinstance(sites, (str, Site)))
