"""The structural twin: a private copy of a module tree that reports to the scope.

Each module of the twin is a shallow copy whose class is a subclass of the original's, with a `forward` that asks the frame of
the current run first. Parameters and buffers are not held between runs: a run installs them and takes them out again. Shared
modules stay shared, the user's modules are never touched. What a forward writes into attributes, lists and dicts of its modules
is undone when the run ends.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor, nn

from .copying import MODULE_STATE, copy_tree, eager_class, map_containers
from .errors import ParamsError, did_you_mean
from .layers import FORWARDS
from .operations import OperationMode
from .scope import Frame
from .sites import join_path
from .structure import describe, reachable_tensors


class _Absent:
    """The value of an attribute that is not there."""


Undo = list[tuple[nn.Module | dict, str, Any]]  # (module or one of its tables, name, value before)


class Cell:
    """What the modules of one twin share: the frame of the current run and the log of what it wrote."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.written: Undo | None = None


@dataclass(frozen=True)
class Registered:
    """Stands for a parameter or buffer where a module holds it a second time, in a plain attribute."""

    key: tuple[str, ...]


@functools.cache
def twin_class(cls: type, patched: bool) -> type:
    """The subclass of `cls` that reports. `patched`: the instance carries a `forward` of its own, which then is called."""
    own: Any = cls.forward  # type: ignore[attr-defined]
    original: Any = _own_forward if patched else FORWARDS.get(own, own)
    set_attribute: Any = cls.__setattr__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = self._tdhook_cell.frame
        if frame is None:
            return original(self, *args, **kwargs)
        return frame.call_module(self, original, args, kwargs)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        written = self._tdhook_cell.written
        if written is not None:
            written.append(_before(self, name))
        set_attribute(self, name, value)

    members = {
        "forward": functools.wraps(_own_forward if patched else own)(forward),
        "__setattr__": __setattr__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_tdhook_base": cls,
    }
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, (cls,), members)


def _own_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self._tdhook_forward(*args, **kwargs)


def _before(module: nn.Module, name: str) -> tuple[nn.Module | dict, str, Any]:
    for table in (module._parameters, module._buffers, module._modules):
        if name in table:
            return table, name, table[name]
    return module, name, module.__dict__.get(name, _Absent)


def _now(place: nn.Module | dict, name: str) -> Any:
    return place[name] if isinstance(place, dict) else place.__dict__[name]


def _take_back(written: Undo) -> None:
    for place, name, value in reversed(written):
        if isinstance(place, dict):
            place[name] = value
        elif value is not _Absent:
            object.__setattr__(place, name, value)
        elif _before(place, name)[2] is not _Absent:
            delattr(place, name)


@functools.cache
def argument_names(cls: type) -> tuple[str, ...]:
    """Names of the parameters of `cls.forward` that can be passed by position."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


class Slots:
    """Where the entries of one level of `params` go: `tensors` at this level, `children` one level down."""

    def __init__(self) -> None:
        self.tensors: dict[str, list[tuple[dict[str, Any], str]]] = {}
        self.copied: set[str] = set()
        self.children: dict[str, Slots] = {}

    def names(self, prefix: tuple[str, ...] = ()) -> list[str]:
        own = [join_path((*prefix, name)) for name in self.tensors]
        return own + [n for key, child in self.children.items() for n in child.names((*prefix, key))]


class Twin:
    """One instrumented copy of a module tree; used by one thread at a time."""

    def __init__(self, source: nn.Module, tensor_names: Mapping[tuple[str, ...], list[tuple[tuple[str, ...], str, str]]]):
        self.cell = Cell()

        def class_of(module: nn.Module, state: dict) -> type:
            cls = eager_class(module, state)
            patched = "forward" in state
            if patched:
                state["_tdhook_forward"] = state.pop("forward")
            state["_tdhook_cell"] = self.cell
            state["_tdhook_names"] = argument_names(cls)
            return twin_class(cls, patched)

        copies = copy_tree(source, class_of)
        self.root = copies[source]
        by_path: dict[tuple[str, ...], nn.Module] = {}
        for path, module in source.named_modules():
            names = tuple(path.split(".")) if path else ()
            by_path[names] = copies[module]
            copies[module].__dict__["_tdhook_path"] = join_path(names)
        self.slots = Slots()
        self.first: dict[tuple[str, ...], tuple[dict[str, Any], str]] = {}  # where to find an installed tensor
        self.attributes = self._attributes(tensor_names, by_path, list(copies.values()))
        self._fill_slots(tensor_names, by_path)
        for module in copies.values():
            _switch_off_fast_path(module)

    def _attributes(self, tensor_names: Mapping, by_path: Mapping, modules: list[nn.Module]) -> Undo:
        """What a forward may write into although it is not in params: plain attributes that hold tensors or containers, and
        the buffers of modules that are no children. Each run gets copies."""
        keys = {}
        for key, owners in tensor_names.items():
            path, table, name = owners[0]
            self.first[key] = (by_path[path].__dict__[table], name)
            keys[id(by_path[path].__dict__[table][name])] = key
        memo: dict[int, Any] = {}

        def hold(value: Any) -> Any:
            if isinstance(value, Tensor):
                return Registered(keys[id(value)]) if id(value) in keys else value.detach().clone()
            return map_containers(value, hold, memo)

        found: Undo = []
        named = set(by_path.values())
        for module in modules:
            if module not in named:
                found += [(module._buffers, name, hold(buffer)) for name, buffer in module._buffers.items()]
            for name, value in module.__dict__.items():
                if name not in MODULE_STATE and isinstance(value, (Tensor, list, tuple, dict, set, Registered)):
                    held = module.__dict__[name] = hold(value)
                    if not _is_constant(held):
                        found.append((module, name, held))
        return found

    def _renew(self, value: Any, memo: dict[int, Any]) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        if isinstance(value, Registered):
            entries, name = self.first[value.key]
            return entries[name]
        return map_containers(value, lambda leaf: self._renew(leaf, memo), memo)

    def _fill_slots(self, tensor_names: Mapping, by_path: Mapping) -> None:
        for key, owners in tensor_names.items():
            level = self.slots
            for name in key[:-1]:
                level = level.children.setdefault(name, Slots())
            places = []
            for path, table, name in owners:
                module = by_path[path]
                entries = module.__dict__[table]
                entries[name] = None
                places.append((entries, name))
                # What a forward may write in place is copied for each run: buffers, and embeddings renormalised on the way.
                if table == "_buffers" or getattr(module, "max_norm", None) is not None:
                    level.copied.add(key[-1])
            level.tensors[key[-1]] = places

    def run(self, params: Mapping, args: tuple, kwargs: dict, frame: Frame | None) -> Any:
        """One forward with `params` in place. The twin is as before afterwards, also when the forward raises."""
        cell = self.cell
        before = (cell.frame, cell.written)
        undo: Undo = []
        written: Undo = []
        try:
            own: list[Tensor] = []
            self._install(self.slots, params, (), undo, own)
            cell.frame, cell.written = frame, written
            memo: dict[int, Any] = {}
            for place, name, value in self.attributes:
                written.append((place, name, _now(place, name)))
                if isinstance(place, dict):
                    place[name] = self._renew(value, memo)
                else:
                    object.__setattr__(place, name, self._renew(value, memo))
            if frame is not None and frame.observer is not None:
                frame.observer.start(own + [t for place, name, _ in written for t in reachable_tensors(_now(place, name))])
            if frame is not None and frame.wants_operations:
                with OperationMode(frame):
                    return self.root(*args, **kwargs)
            return self.root(*args, **kwargs)
        finally:
            cell.frame, cell.written = before
            _take_back(written)
            _take_back(undo)

    def _install(self, slots: Slots, params: Any, path: tuple[str, ...], undo: list, own: list[Tensor]) -> None:
        try:
            for name, places in slots.tensors.items():
                value = params[name]
                if not isinstance(value, Tensor):
                    raise TypeError
                if name in slots.copied:
                    value = value.clone()
                    own.append(value)
                for entries, attribute in places:
                    undo.append((entries, attribute, entries[attribute]))
                    entries[attribute] = value
            for name, child in slots.children.items():
                self._install(child, params[name], (*path, name), undo, own)
        except (LookupError, TypeError):
            self._raise_misfit(slots, params, path)
        if len(params.keys()) != len(slots.tensors) + len(slots.children):
            self._raise_unexpected(slots, params, path)

    def _raise_misfit(self, slots: Slots, params: Any, path: tuple[str, ...]) -> None:
        at = f"params[{join_path(path)!r}]" if path else "params"
        if not isinstance(params, (Mapping, TensorDictBase)):
            raise ParamsError(f"{at} is {describe(params)}, not a mapping; pass what functionalize returned.") from None
        for name in (*slots.tensors, *slots.children):
            key = join_path((*path, name))
            if name not in params.keys():
                raise ParamsError(f"params has no {key!r}; it needs the keys that functionalize returned.") from None
            if name in slots.tensors and not isinstance(params[name], Tensor):
                raise ParamsError(f"params[{key!r}] is {describe(params[name])}, not a tensor.") from None
        raise

    def _raise_unexpected(self, slots: Slots, params: Any, path: tuple[str, ...]) -> None:
        known = [*slots.tensors, *slots.children]
        extra = next(name for name in params.keys() if name not in known)
        raise ParamsError(
            f"params has {join_path((*path, extra))!r}, which the model does not use."
            + did_you_mean(join_path((*path, extra)), self.slots.names())
        )


def _is_constant(value: Any) -> bool:
    """Whether nothing can be written into a value."""
    return not isinstance(value, (Tensor, list, dict, set, Registered)) and (
        not isinstance(value, tuple) or all(map(_is_constant, value))
    )


def _switch_off_fast_path(module: nn.Module) -> None:
    """Makes transformer layers call their children: the fused kernel of inference mode would pass them by."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.__dict__["activation_relu_or_gelu"] = 0
    elif isinstance(module, nn.TransformerEncoder):
        module.__dict__["use_nested_tensor"] = module.__dict__["enable_nested_tensor"] = False
