"""Shallow copies of module trees: tensors are shared, structure is not, and references among modules stay among the copies."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

MODULE_STATE = frozenset(nn.Module().__dict__)


class _Eager(nn.Module):
    """Takes the place of a compiled submodule, whose call would lead back to the module of the user."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["_orig_mod"], name)


def eager_class(module: nn.Module, state: dict) -> type:
    """The class of a module without what makes it a twin or compiled; takes the same out of `state`."""
    cls = getattr(type(module), "_tdhook_base", type(module))
    if "_tdhook_forward" in state:
        state["forward"] = state.pop("_tdhook_forward")
    for name in ("_tdhook_cell", "_tdhook_names", "_tdhook_path"):
        state.pop(name, None)
    state["_compiled_call_impl"] = None
    if "dynamo_ctx" in state and "_orig_mod" in module._modules:  # what torch.compile(module) returns
        for name in set(state) - MODULE_STATE:
            del state[name]
        return _Eager
    return cls


def copy_tree(root: nn.Module, class_of: Callable[[nn.Module, dict], type]) -> dict[nn.Module, nn.Module]:
    """Shallow copies of all modules under `root`, keyed by the originals, with references among them kept among the copies."""
    copies: dict[nn.Module, nn.Module] = {}
    states: dict[nn.Module, dict] = {}
    for module in root.modules():
        states[module] = dict(module.__dict__)
        copies[module] = object.__new__(class_of(module, states[module]))
    memo: dict[int, Any] = {}
    for module, state in states.items():
        _fill(copies[module], module, state, copies, memo)
    return copies


def _fill(copied: nn.Module, module: nn.Module, state: dict, copies: dict[nn.Module, nn.Module], memo: dict) -> None:
    copied.__dict__.update({name: _remap(value, copies, memo) for name, value in state.items()})
    copied.__dict__.update(_parameters=dict(module._parameters), _buffers=dict(module._buffers))


def _copy_hidden(module: nn.Module, copies: dict[nn.Module, nn.Module], memo: dict) -> nn.Module:
    """A copy of a module that is no child of any: it has no sites and its tensors are constants, but what it holds may have."""
    state = dict(module.__dict__)
    copied: nn.Module = object.__new__(eager_class(module, state))
    copies[module] = copied
    _fill(copied, module, state, copies, memo)
    for name, tensor in copied._parameters.items():
        copied.__dict__["_parameters"][name] = None if tensor is None else tensor.detach()
    return copied


def _remap(value: Any, copies: dict[nn.Module, nn.Module], memo: dict[int, Any]) -> Any:
    """`value` with the modules in it replaced by their copies, also those that bound methods, partials and closures hold."""
    if isinstance(value, nn.Module):
        return copies[value] if value in copies else _copy_hidden(value, copies, memo)
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _remap(value.__self__, copies, memo))
    if type(value) is functools.partial:
        func, args, keywords = (_remap(part, copies, memo) for part in (value.func, value.args, value.keywords))
        return functools.partial(func, *args, **keywords)
    if isinstance(value, types.FunctionType):
        return _remap_closure(value, copies, memo)
    return map_containers(value, lambda leaf: _remap(leaf, copies, memo), memo)


def _remap_closure(function: types.FunctionType, copies: dict[nn.Module, nn.Module], memo: dict[int, Any]) -> Any:
    if id(function) in memo:
        return memo[id(function)]
    memo[id(function)] = function  # one that refers to itself stays as it is
    cells = []
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # an empty cell
            held = None
        # Lists and dicts stay shared: a hook that collects into one of the user's goes on doing so.
        reaches = isinstance(held, (nn.Module, types.MethodType, types.FunctionType, functools.partial))
        new = _remap(held, copies, memo) if reaches else held
        cells.append(types.CellType(new) if new is not held and new != held else cell)
    if all(new is old for new, old in zip(cells, function.__closure__ or ())):
        return function
    remapped = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    remapped.__kwdefaults__ = function.__kwdefaults__
    remapped.__dict__.update(function.__dict__)
    memo[id(function)] = remapped
    return remapped


def map_containers(value: Any, function: Callable[[Any], Any], memo: dict[int, Any]) -> Any:
    """`value` with its lists, dicts, sets and tuples copied, `function` applied to what they hold; shared ones stay shared."""
    kind: Any = type(value)
    if not (isinstance(value, dict) or kind in (list, tuple, set)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    new: Any
    if isinstance(value, dict):
        new = memo[id(value)] = value.copy()
        for key, element in value.items():
            new[key] = function(element)
    elif kind is list:
        new = memo[id(value)] = []
        for element in value:
            new.append(function(element))
    else:
        new = memo[id(value)] = kind([function(element) for element in value])
    return new
