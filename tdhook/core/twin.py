"""The structural twin: a private copy of a module tree that reports to the scope.

Each module of the twin is a shallow copy whose class is a subclass of the original's, with a `forward` that asks the frame of
the current run first. Parameters and buffers are not held between runs: a run installs them and takes them out again. Shared
modules stay shared, the user's modules are never touched.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .errors import ParamsError, did_you_mean
from .operations import OperationMode
from .scope import Frame
from .sites import join_path


class Cell:
    """What the modules of one twin share: the frame of the current run and the log of attributes it wrote."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.written: list[tuple[nn.Module, str, bool, Any]] | None = None


@functools.lru_cache(maxsize=None)
def twin_class(cls: type, patched: bool) -> type:
    """The subclass of `cls` that reports. `patched`: the instance carries a `forward` of its own, which then is called."""
    original = cls.forward  # type: ignore[attr-defined]
    set_attribute = cls.__setattr__
    if patched:

        def original(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._tdhook_forward(*args, **kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = self._tdhook_cell.frame
        if frame is None:
            return original(self, *args, **kwargs)
        return frame.call_module(self, original, args, kwargs)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        written = self._tdhook_cell.written
        if written is not None and name not in self._parameters and name not in self._buffers:
            written.append((self, name, name in self.__dict__, self.__dict__.get(name)))
        set_attribute(self, name, value)

    members = {
        "forward": functools.wraps(original)(forward),
        "__setattr__": __setattr__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_tdhook_base": cls,
    }
    return type(cls)(cls.__name__, (cls,), members)


@functools.lru_cache(maxsize=None)
def argument_names(cls: type) -> tuple[str, ...]:
    """Names of the parameters of `cls.forward` that can be passed by position."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def copy_tree(root: nn.Module, class_of: Callable[[nn.Module, dict], type]) -> dict[nn.Module, nn.Module]:
    """Shallow copies of all modules under `root`, keyed by the originals, with references among them kept among the copies."""
    copies: dict[nn.Module, nn.Module] = {}
    states: dict[nn.Module, dict] = {}
    for module in root.modules():
        states[module] = dict(module.__dict__)
        copies[module] = object.__new__(class_of(module, states[module]))
    memo: dict[int, Any] = {}
    for module, copied in copies.items():
        state = {name: _remap(value, copies, memo) for name, value in states[module].items()}
        state["_parameters"] = dict(module._parameters)
        state["_buffers"] = dict(module._buffers)
        copied.__dict__.update(state)
    return copies


def _remap(value: Any, copies: dict[nn.Module, nn.Module], memo: dict[int, Any]) -> Any:
    """`value` with the modules in it replaced by their copies; containers are copied, so that neither side sees the other write."""
    if isinstance(value, nn.Module):
        return copies.get(value, value)
    kind = type(value)
    if kind is types.MethodType:
        return types.MethodType(value.__func__, _remap(value.__self__, copies, memo))
    if kind is functools.partial:
        remapped = (_remap(part, copies, memo) for part in (value.func, value.args, value.keywords))
        func, args, keywords = remapped
        return functools.partial(func, *args, **keywords)
    if not isinstance(value, (list, tuple, dict, set)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, dict):
        new: Any = value.copy()
        memo[id(value)] = new
        for key, element in value.items():
            new[key] = _remap(element, copies, memo)
    elif kind is list:
        new = memo[id(value)] = []
        new.extend(_remap(element, copies, memo) for element in value)
    elif kind is tuple:
        new = tuple(_remap(element, copies, memo) for element in value)
    elif kind is set:
        new = {_remap(element, copies, memo) for element in value}
    else:
        new = value
    memo[id(value)] = new
    return new


class Slots:
    """Where the entries of one level of `params` go: `tensors` at this level, `children` one level down."""

    def __init__(self) -> None:
        self.tensors: dict[str, list[dict[str, Tensor | None]]] = {}
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
            cls = getattr(type(module), "_tdhook_base", type(module))
            patched = "forward" in state or "_tdhook_forward" in state
            if "forward" in state:
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
        self._fill_slots(tensor_names, by_path)
        self.recurrent = [m for m in copies.values() if isinstance(m, nn.RNNBase)]
        for module in copies.values():
            _switch_off_fast_path(module)

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
        undo: list[tuple[dict, str, Tensor | None]] = []
        written: list[tuple[nn.Module, str, bool, Any]] = []
        try:
            self._install(self.slots, params, (), undo)
            cell.frame, cell.written = frame, written
            for module in self.recurrent:
                module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
            if frame is not None and frame.wants_operations:
                with OperationMode(frame):
                    return self.root(*args, **kwargs)
            return self.root(*args, **kwargs)
        finally:
            cell.frame, cell.written = before
            for entries, name, value in undo:
                entries[name] = value
            for module, name, was_there, value in reversed(written):
                if was_there:
                    object.__setattr__(module, name, value)
                elif name in module.__dict__:
                    delattr(module, name)

    def _install(self, slots: Slots, params: Any, path: tuple[str, ...], undo: list) -> None:
        try:
            for name, places in slots.tensors.items():
                value = params[name]
                if name in slots.copied:
                    value = value.clone()
                for entries, attribute in places:
                    undo.append((entries, attribute, entries[attribute]))
                    entries[attribute] = value
            for name, child in slots.children.items():
                self._install(child, params[name], (*path, name), undo)
        except KeyError:
            self._raise_missing(params, path)
        if len(params.keys()) != len(slots.tensors) + len(slots.children):
            self._raise_unexpected(slots, params, path)

    def _raise_missing(self, params: Any, path: tuple[str, ...]) -> None:
        slots = self.slots
        for name in path:
            slots = slots.children[name]
        known = [*slots.tensors, *slots.children]
        missing = [join_path((*path, name)) for name in known if name not in params.keys()]
        if not missing:
            raise
        raise ParamsError(f"params has no {missing[0]!r}; it needs the keys that functionalize returned.") from None

    def _raise_unexpected(self, slots: Slots, params: Any, path: tuple[str, ...]) -> None:
        known = [*slots.tensors, *slots.children]
        extra = next(name for name in params.keys() if name not in known)
        raise ParamsError(
            f"params has {join_path((*path, extra))!r}, which the model does not use."
            + did_you_mean(join_path((*path, extra)), self.slots.names())
        )


def _switch_off_fast_path(module: nn.Module) -> None:
    """Makes transformer layers call their children: the fused kernel of inference mode would pass them by."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.__dict__["activation_relu_or_gelu"] = 0
    elif isinstance(module, nn.TransformerEncoder):
        module.__dict__["use_nested_tensor"] = module.__dict__["enable_nested_tensor"] = False


