"""What tests compare with: values and gradients by plain hooks, and fingerprints of everything that a call must not change."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tdhook
from tdhook import Site
from tdhook.core.structure import get, put, tensors

from .zoo import Case, call


@cache
def prepared(case: Case) -> tuple[tdhook.FunctionalModel, Any, Any]:
    """f, params and inputs of a case. They may be shared among tests because nothing may change them."""
    model, inputs = case()
    return *tdhook.functionalize(model), inputs


def leaves(value: Any) -> dict[tuple, Tensor]:
    return dict(tensors(value))


def assert_same(actual: Any, expected: Any, **tolerances: float) -> None:
    """Equal structure, and tensors equal bit for bit, or to `tolerances`."""
    actual, expected = leaves(actual), leaves(expected)
    assert actual.keys() == expected.keys()
    for keys, tensor in actual.items():
        torch.testing.assert_close(
            tensor,
            expected[keys],
            equal_nan=True,
            **(tolerances or {"rtol": 0, "atol": 0}),
            msg=lambda m, keys=keys: f"{keys}: {m}",
        )


def hooked_values(model: nn.Module, inputs: Any, edit: Callable[[str, Tensor], Tensor] = lambda s, t: t) -> tuple[Any, dict]:
    """The output, and the tensor outputs of all module calls by site; `edit` may replace each of them."""
    paths = {module: Site.parse(f"{''.join(_spell(path))}").path if path else () for path, module in model.named_modules()}
    found: dict[tuple, list[Any]] = {}
    values: dict[Site, Tensor] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        calls = found.setdefault(paths[module], [])
        calls.append(None)
        for keys, tensor in tensors(output):
            site = Site(paths[module], None, len(calls) - 1, "out", keys)
            new = edit(str(replace(site, call=None)), tensor)
            values[site] = new.clone()
            output = _replace(output, keys, new)
        return output

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        output = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return output, {
        str(site if len(found[site.path]) > 1 else replace(site, call=None)): value for site, value in values.items()
    }


def _replace(value: Any, keys: tuple, new: Tensor) -> Any:
    return put(value, keys[0], _replace(get(value, keys[0]), keys[1:], new)) if keys else new


def _spell(path: str) -> list[str]:
    return ['["' + name.replace("\\", "\\\\").replace('"', '\\"') + '"]' for name in path.split(".")]


def fingerprint(*things: Any) -> Any:
    """Everything about modules, tensors and containers that a call could change, and the global state of torch."""
    seen: set[int] = set()
    state = [
        torch.random.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled() if hasattr(torch.backends, "mha") else None,  # torch 2.1 has none
        torch._C._len_torch_function_stack(),
        torch._C._functorch.peek_interpreter_stack() is None,
        len(nn.modules.module._global_forward_hooks),
    ]
    return [state, *(_look(thing, seen) for thing in things)]


def _look(thing: Any, seen: set[int]) -> Any:
    if isinstance(thing, Tensor):
        data = thing.detach()
        bits = None if data.is_meta else data.reshape(-1).view(torch.uint8).tolist()
        return (
            id(thing),
            thing._version,
            thing.requires_grad,
            thing.shape,
            _look(thing.grad if thing.is_leaf else None, seen),
            bits,
        )
    if thing is None or isinstance(thing, (bool, int, float, str, torch.dtype)):
        return thing
    if id(thing) in seen:
        return id(thing)
    seen.add(id(thing))
    if isinstance(thing, TensorDictBase):
        return id(thing), [(key, _look(thing.get(key), seen)) for key in thing.keys(True, True)]
    if isinstance(thing, dict):
        return id(thing), [(repr(key), _look(value, seen)) for key, value in thing.items()]
    if isinstance(thing, (list, tuple)):
        return id(thing), [_look(value, seen) for value in thing]
    if isinstance(thing, types.MethodType):  # made anew at each access
        return _look(thing.__self__, seen), thing.__func__
    if hasattr(thing, "__dict__") and not isinstance(thing, (type, types.FunctionType)):
        return id(thing), type(thing), _look(thing.__dict__, seen)
    return id(thing)


@contextmanager
def unchanged(*things: Any) -> Any:
    """Asserts that what happens inside leaves everything bit for bit as it was."""
    before = fingerprint(*things)
    try:
        yield
    finally:
        assert fingerprint(*things) == before


def stacked(values: list) -> Any:
    """One structure of tensors with a leading axis, from several of the same structure."""
    leaves, spec = zip(*map(pytree.tree_flatten, values))
    return pytree.tree_unflatten([torch.stack(each) for each in zip(*leaves)], spec[0])
