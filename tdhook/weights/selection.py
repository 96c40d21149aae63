"""Parameters by name: which ones a weight method reads or changes, and params with some of them replaced.

The address of a parameter is its path in `params`, spelled as sites are: `"h.3.mlp.weight"`, `"h.*.mlp.weight"`, `"**.bias"`,
`"h[-1]"`. The address of a module stands for all parameters below it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ..core.errors import InputError, ParamsError, SiteError, did_you_mean
from ..core.sites import Site, Tree, join_path
from ..core.structure import describe

Key = tuple[str, ...]
Select = None | str | re.Pattern[str] | Callable[[str], bool] | Sequence[Any]

MATRICES = 2  # the fewest dimensions of a weight: biases and scales have one


def require_params(name: str, params: Any, single: bool = False) -> None:
    """Raises `ParamsError` unless an argument is a TensorDict of parameters, and with `single` one of a single model."""
    if not isinstance(params, TensorDictBase):
        raise ParamsError(f"{name} is a TensorDict as tdhook.functionalize returns it, got {describe(params)}.")
    if single and params.batch_dims:
        raise ParamsError(
            f"{name} has batch size {list(params.batch_size)}: several models at once, whose parameters would be mixed up; "
            "use torch.func.vmap over it."
        )


def flat(params: TensorDictBase) -> dict[Key, Tensor]:
    """Every tensor under its path, in the order of `params`."""
    named = ((key if isinstance(key, tuple) else (key,), value) for key, value in params.items(True, True))
    return {key: value for key, value in named if isinstance(value, Tensor)}


def nest(tensors: Mapping[Key, Any], batch_size: Sequence[int] = ()) -> TensorDict:
    """A nested TensorDict of tensors under paths; the reverse of `flat`."""
    nested: dict[str, Any] = {}
    for key, tensor in tensors.items():
        level = nested
        for name in key[:-1]:
            level = level.setdefault(name, {})
        level[key[-1]] = tensor
    return TensorDict(nested, batch_size=torch.Size(batch_size))


def replaced(params: TensorDictBase, tensors: Mapping[Key, Tensor]) -> TensorDict:
    """`params` with some tensors replaced; the others are shared, with memory-mapped ones as they are."""
    return _replaced(params, tensors, ())


def _replaced(level: TensorDictBase, tensors: Mapping[Key, Tensor], path: Key) -> TensorDict:
    items = {
        name: _replaced(value, tensors, (*path, name))
        if isinstance(value, TensorDictBase)
        else tensors.get((*path, name), value)
        for name, value in level.items()
    }
    return TensorDict(items, batch_size=level.batch_size)


def parameter_name(key: Key) -> str:
    """The address of a parameter.

    Examples:
        >>> parameter_name(("h", "3", "weight"))
        'h.3.weight'
    """
    return join_path(key)


def select_parameters(
    params: TensorDictBase, select: Select = None, *, name: str = "select", least_dims: int = 0
) -> dict[Key, Tensor]:
    """The floating-point tensors that `select` means, in the order of `params`.

    Args:
        params: nested TensorDict.
        select: an address or a pattern of parameters or modules, a compiled regular expression that matches whole names, a
            predicate of a name, or a sequence of these. None: all floating-point tensors with `least_dims` dimensions.
        name: of the argument, for messages.
        least_dims: the fewest dimensions that a tensor can have.

    Raises:
        ParamsError: nothing in `params` has this name, or what is named cannot be used.

    Examples:
        >>> _, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)))
        >>> list(select_parameters(params, "*.weight"))
        [('0', 'weight'), ('1', 'weight')]
        >>> list(select_parameters(params, "1"))
        [('1', 'weight'), ('1', 'bias')]
    """
    tensors = flat(params)
    usable = {k: t for k, t in tensors.items() if t.is_floating_point() and t.ndim - params.batch_dims >= least_dims}
    if select is None:
        if not usable:
            raise ParamsError(f"params has no floating-point tensor of {least_dims} dimensions or more to work on.")
        return usable
    chosen = set()
    requests = select if isinstance(select, Sequence) and not isinstance(select, str) else [select]
    if not requests:
        raise InputError(f"{name} is empty; give at least one parameter, such as '**.weight', or None for the default.")
    for request in requests:
        found = matching(tuple(tensors), request, name)
        fitting = [key for key in found if key in usable]
        if not fitting:
            tensor = tensors[found[0]]
            raise ParamsError(
                f"{name} names {parameter_name(found[0])!r}, {describe(tensor)}; what it names has to be floating-point"
                + (f" with {least_dims} dimensions or more." if least_dims else ".")
            )
        chosen.update(fitting)
    return {key: tensor for key, tensor in tensors.items() if key in chosen}


def by_parameter(params: TensorDictBase, table: Mapping[Any, Any], name: str) -> dict[Key, Any]:
    """A mapping from patterns turned into one from parameters. Of two patterns that match, the later one counts."""
    values: dict[Key, Any] = {}
    for pattern, value in table.items():
        values.update(dict.fromkeys(select_parameters(params, pattern, name=name), value))
    return values


@torch.compiler.assume_constant_result
def matching(keys: tuple[Key, ...], request: Any, name: str = "select") -> tuple[Key, ...]:
    """The paths that one request means; raises `ParamsError` if there is none."""
    if isinstance(request, re.Pattern) or (callable(request) and not isinstance(request, str)):
        match = request.fullmatch if isinstance(request, re.Pattern) else request
        found = tuple(key for key in keys if match(parameter_name(key)))
        shown = repr(request.pattern) if isinstance(request, re.Pattern) else repr(request)
        if not found:
            raise ParamsError(f"{name}: no parameter matches {shown}; there are {_examples(keys)}.")
        return found
    if not isinstance(request, str):
        raise InputError(f"{name} takes names, regular expressions and predicates, got {describe(request)}.")
    exact = tuple(key for key in keys if parameter_name(key) == request)
    if len(exact) == 1:  # by far the most frequent case, and patterns of many names would be slow
        return exact
    try:
        site = Site.parse(request)
    except SiteError as error:
        raise ParamsError(f"{name}={request!r} is no address of a parameter: {error}") from None
    if site.op or site.call is not None or site.keys or site.port != "out":
        raise ParamsError(f"{name}={request!r} is the address of an activation; a parameter reads 'h.3.mlp.weight'.")
    nodes = tuple(dict.fromkeys(key[:depth] for key in keys for depth in range(1, len(key) + 1)))
    try:
        wanted = {want.site.path for want in Tree(nodes).resolve(site)}
    except SiteError:
        near = did_you_mean(request, map(parameter_name, nodes)) or f" There are {_examples(keys)}."
        raise ParamsError(f"{name}={request!r}: params has no such parameter or module.{near}") from None
    return tuple(key for key in keys if any(key[:depth] in wanted for depth in range(1, len(key) + 1)))


def _examples(keys: Sequence[Key]) -> str:
    names = [repr(parameter_name(key)) for key in keys]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def require_same_structure(first: str, a: TensorDictBase, second: str, b: TensorDictBase) -> None:
    """Raises `ParamsError` unless two TensorDicts have the same keys, shapes and dtypes."""
    one, other = flat(a), flat(b)
    for key in dict.fromkeys((*one, *other)):
        missing = second if key not in other else first if key not in one else None
        if missing is not None:
            raise ParamsError(f"{missing} has no {parameter_name(key)!r}, which {first if missing == second else second} has.")
        x, y = one[key], other[key]
        if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
            raise ParamsError(
                f"{parameter_name(key)!r} is {describe(x)} on {x.device} in {first}, but {describe(y)} on {y.device} in "
                f"{second}."
            )
