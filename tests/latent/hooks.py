"""Plain PyTorch hooks: the oracle of the tests of interventions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]


def hooked(model: nn.Module, inputs: Any, edits: Mapping[str, Edit]) -> tuple[Any, dict[str, Tensor]]:
    """The output of a run, and the value at every site of `edits` before its edit.

    A site is the path of a module for its (first) output, or with `:in` for its first input.
    """
    seen: dict[str, Tensor] = {}
    handles = []

    def edited(site: str, value: Tensor) -> Tensor:
        seen[site] = value.detach().clone()
        return edits[site](value.clone())

    for site in edits:
        module = model.get_submodule(site.removesuffix(":in"))
        if site.endswith(":in"):

            def before(module, args, kwargs, site=site):
                if args:
                    return (edited(site, args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": edited(site, kwargs["hidden_states"])}

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(module, args, output, site=site):
                return edited(site, output) if isinstance(output, Tensor) else (edited(site, output[0]), *output[1:])

            handles.append(module.register_forward_hook(after))
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    for handle in handles:
        handle.remove()
    return output, seen


def same(value: Tensor) -> Tensor:
    return value


def values_of(model: nn.Module, inputs: Any, sites: list[str]) -> dict[str, Tensor]:
    return hooked(model, inputs, dict.fromkeys(sites, same))[1]


def put(*index: Any, new: Tensor | float) -> Edit:
    """An edit that writes at an index."""

    def edit(value: Tensor) -> Tensor:
        value[index] = new
        return value

    return edit
