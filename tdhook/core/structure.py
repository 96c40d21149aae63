"""Structured values: tensors inside tuples, mappings, dataclasses and TensorDicts, addressed by keys, not written in place."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .compat import is_compiling


def get(value: Any, key: int | str) -> Any:
    """The element of `value` at `key`; raises LookupError when there is none."""
    if is_tensor_collection(value):
        if str(key) not in value.keys():
            raise KeyError(key)
        return value.get(str(key)) if isinstance(value, TensorDictBase) else getattr(value, str(key))
    if isinstance(value, Mapping):
        return value[_own_key(value, key)]
    if isinstance(value, (tuple, list)):
        if isinstance(key, int):
            return value[key]
        if key in getattr(value, "_fields", ()):
            return getattr(value, key)
    elif isinstance(key, str) and not isinstance(value, Tensor) and hasattr(value, key):
        return getattr(value, key)
    raise KeyError(key)


def _own_key(value: Mapping, key: int | str) -> Any:
    """The key of a mapping that an address means: itself, its spelling, or the position of an entry."""
    if key in value:
        return key
    for own in value:
        if not isinstance(own, (int, str)) and str(own) == key:
            return own
    if isinstance(key, int):
        return list(value)[key]
    raise KeyError(key)


def put(value: Any, key: int | str, new: Any) -> Any:
    """A shallow copy of `value` with the element at `key` replaced."""
    if is_tensor_collection(value):
        edited = value.copy()
        edited.set(str(key), new)
        return edited
    if isinstance(value, Mapping):
        key = _own_key(value, key)
        if type(value) is dict:
            return {**value, key: new}
        edited = copy.copy(value)
        edited[key] = new  # type: ignore[index]
        return edited
    if isinstance(value, (tuple, list)):
        items = list(value)
        fields = getattr(value, "_fields", None)
        items[fields.index(key) if fields and isinstance(key, str) else int(key)] = new
        return type(value)(*items) if fields else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{str(key): new})
    edited = copy.copy(value)
    setattr(edited, str(key), new)
    return edited


def put_in(value: Any, keys: tuple, new: Any) -> Any:
    """A copy of `value` with the element that `keys` lead to replaced."""
    return put(value, keys[0], put_in(get(value, keys[0]), keys[1:], new)) if keys else new


def entries(value: Any) -> Iterator[tuple[int | str, Any]]:
    """The (key, element) pairs one level down; none for a tensor or a plain object."""
    if isinstance(value, Tensor):
        return
    if isinstance(value, Mapping) or is_tensor_collection(value):
        yield from ((key if isinstance(key, (int, str)) else str(key), element) for key, element in value.items())
    elif isinstance(value, (tuple, list)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))


def tensors(value: Any, keys: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """Every tensor inside `value` with the keys that lead to it."""
    if isinstance(value, Tensor):
        yield keys, value
        return
    for key, element in entries(value):
        yield from tensors(element, (*keys, key))


def reachable_tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Every tensor in a value, also inside objects that are no containers (a key-value cache, say)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, TensorDictBase)):
        for element in value.values():
            yield from reachable_tensors(element, depth)
    elif isinstance(value, (tuple, list, set)):
        for element in value:
            yield from reachable_tensors(element, depth)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        yield from reachable_tensors(vars(value), depth - 1)


def describe(value: Any) -> str:
    """What a value is, in a few words for an error message."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value):
        return f"a {type(value).__name__} of {len(value)}"
    found = [k for k, _ in entries(value)]
    if found:
        return f"a {type(value).__name__} with {', '.join(repr(k) for k in found[:8])}"
    return f"{value!r} of type {type(value).__name__}" if len(repr(value)) < 60 else f"a {type(value).__name__}"


def fresh(inputs: Any) -> Any:
    """A copy of the caller's inputs that the model may write into; one tensor passed twice stays one tensor."""
    seen: list[tuple[Tensor, Tensor]] = []  # found by `is`: on an id, compiled code would be specialised

    def copy_once(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return _fresh_object(leaf)
        for original, copied in seen:
            if original is leaf:
                return copied
        seen.append((leaf, leaf.clone()))
        return seen[-1][1]

    return copy_once(inputs) if isinstance(inputs, Tensor) else pytree.tree_map(copy_once, inputs)


def _fresh_object(leaf: Any) -> Any:
    """A copy of an object that holds tensors (a key-value cache, which the model would write into), else the object itself."""
    if is_compiling() or not hasattr(leaf, "__dict__") or isinstance(leaf, (type, nn.Module)):
        return leaf
    copies = {id(tensor): tensor.clone() for tensor in reachable_tensors(leaf)}
    return copy.deepcopy(leaf, copies) if copies else leaf
