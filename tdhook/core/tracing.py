"""What a model does with given inputs: the table of all sites, found by one run on fake tensors."""

from __future__ import annotations

import copy
import functools
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils import _pytree as pytree

from .compat import is_wrapped
from .errors import ModelError, SiteError, TdhookError, did_you_mean
from .functional import Execution, FunctionalModel
from .scope import Observer
from .sites import Site, SiteLike, Tree
from .structure import reachable_tensors, tensors
from .transforms import require_sites

_Remembering = type(functools.lru_cache(lambda: None))
_VALUE_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@dataclass(frozen=True)
class Row:
    """One value of a trace.

    Attributes:
        site: its canonical address.
        kind: class name of the module, or `"operation"`.
        shape, dtype: of the tensor.
        depth: of the module in the tree, for printing.
    """

    site: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    depth: int


@dataclass(frozen=True, repr=False)
class Trace:
    """All values of one run, in the order in which the modules and operations start.

    `print(trace)` shows an aligned tree; iterating gives `Row`s; `trace["h.0"]` gives one of them; `trace.sites` lists the
    addresses and `trace.select("h.*.attn")` those that match a pattern, a compiled regular expression or a predicate.
    """

    rows: tuple[Row, ...]

    @property
    def sites(self) -> list[str]:
        return [row.site for row in self.rows]

    def select(self, pattern: SiteLike) -> list[str]:
        """The sites that match. A string without an operation matches modules, one with `/op` matches operations.

        Raises `SiteError` for a module that is not in the trace, and for `:in`: a trace lists what is returned.
        """
        if isinstance(pattern, re.Pattern):
            return [site for site in self.sites if pattern.fullmatch(site)]
        if callable(pattern) and not isinstance(pattern, Site):
            return [site for site in self.sites if pattern(site)]
        wanted = pattern if isinstance(pattern, Site) else Site.parse(pattern)
        if wanted.port == "in":
            raise SiteError(f"a trace lists outputs, not {str(wanted)!r}; an input is the output of an earlier row.")
        every: Any = dict.fromkeys(Site.parse(site).path for site in self.sites)
        modules = Tree(tuple(every))
        paths = {want.site.path for want in modules.resolve(wanted)}
        found = []
        for text in self.sites:
            site = Site.parse(text)
            fits = site.path in paths and wanted.call in (None, "*", site.call) and wanted.keys in ((), site.keys)
            if fits and (site.op == wanted.op or (wanted.op == "*" and site.op)):
                found.append(text)
        return found

    def __getitem__(self, site: str) -> Row:
        for row in self.rows:
            if row.site == site:
                return row
        raise SiteError(f"the trace has no site {site!r}." + did_you_mean(site, self.sites))

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        operations = sum(row.kind == "operation" for row in self.rows)
        return f"Trace({len(self.rows) - operations} module sites, {operations} operation sites)"

    def __str__(self) -> str:
        names = ["  " * row.depth + row.site for row in self.rows]
        width = max(map(len, names), default=0)
        kinds = max((len(row.kind) for row in self.rows), default=0)
        lines = [
            f"{name:<{width}}  {row.kind:<{kinds}}  {str(row.dtype).removeprefix('torch.')}{list(row.shape)}"
            for name, row in zip(names, self.rows)
        ]
        return "\n".join(lines)


class _Tracer(Observer):
    def __init__(self, operations: bool):
        self.operations = operations
        self.found: list[tuple[tuple[str, str | None, int], str, Any]] = []
        self.places: dict[tuple[str, int], int] = {}

    def enter(self, path: str, call: int, args: tuple, kwargs: dict) -> None:
        self.places[path, call] = len(self.found)
        self.found.append(((path, None, call), "", None))

    def leave(self, path: str, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        self.found[self.places[path, call]] = ((path, None, call), "", _shapes(output))

    def operation(self, path: str, op: str, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        self.found.append(((path, op, call), "operation", _shapes(output)))


def _shapes(output: Any) -> list[tuple[tuple, tuple[int, ...], torch.dtype]]:
    return [(keys, tuple(t.shape), t.dtype) for keys, t in tensors(output)]


def trace(f: FunctionalModel, params: Any, inputs: Any, *extra: Any, operations: bool = True) -> Trace:
    """Lists every site that the model reaches with inputs of these shapes.

    Args:
        f: functional model.
        params: its parameters; only shapes, dtypes and devices matter, here and in what follows.
        inputs: as `f` takes them.
        *extra: the further arguments of `f`, if it takes any.
        operations: list operation sites too.

    Returns:
        A `Trace`: rows of site, kind, shape and dtype, in execution order.

    Cost: one run on fake tensors, which computes nothing. A model whose control flow depends on values is run for real.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
        >>> print(trace(f, params, torch.ones(1, 3)))
        :out        Sequential  float32[1, 2]
          0         Linear      float32[1, 2]
            0/linear  operation   float32[1, 2]
          1         ReLU        float32[1, 2]
            1/relu    operation   float32[1, 2]
    """
    require_sites(f)

    def run(params: Any, inputs: Any, extra: tuple) -> _Tracer:
        tracer = _Tracer(operations)
        f._run(params, inputs, extra, Execution(observer=tracer))
        return tracer

    tracer, _ = run_abstract_or_real(f, run, params, inputs, extra)
    kinds = f.base.blueprint.kinds
    calls: dict[tuple[str, str | None], int] = {}
    for (path, op, _), _, _ in tracer.found:
        calls[path, op] = calls.get((path, op), 0) + 1
    rows = []
    for (path, op, call), kind, shapes in tracer.found:
        site = Site.parse(path) if path else Site()
        site = replace(site, op=op, call=call if calls[path, op] > 1 else None)
        for keys, shape, dtype in shapes or ():
            depth = len(site.path) + (op is not None)
            rows.append(Row(str(replace(site, keys=keys)), kind or kinds[path], shape, dtype, depth))
    return Trace(tuple(rows))


def run_abstract(f: FunctionalModel, run: Callable, *arguments: Any) -> Any:
    """`run(*arguments)`, in which `f` runs, on fake tensors of the same shapes and outside of transforms around the caller."""
    leaves, spec = pytree.tree_flatten(arguments)
    described = [_Spec.of(leaf) for leaf in leaves]

    def abstract() -> Any:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            return run(*pytree.tree_unflatten([d.make() for d in described], spec))

    misses = {cache: cache.cache_info().misses for cache in _caches(f)}
    try:
        return _in_thread(abstract)
    finally:
        for cache, before in misses.items():
            if cache.cache_info().misses > before:
                cache.cache_clear()  # else the fake tensor that it now holds would come out in a real run


def _caches(f: FunctionalModel) -> list[Any]:
    """The functions with an `lru_cache` that the code of a model has at hand."""
    classes = {cls for module in f.base.blueprint.template.root.modules() for cls in type(module).__mro__}
    homes = [sys.modules[name] for name in {cls.__module__ for cls in classes} if name in sys.modules]
    named = (value for place in (*classes, *homes) for value in list(vars(place).values()))
    return [value for value in named if isinstance(value, _Remembering)]


def run_abstract_or_real(f: FunctionalModel, run: Callable, *arguments: Any) -> tuple[Any, bool]:
    """`run_abstract`, or a real run for a model that asks for values or leaves torch (`.item()`, `.numpy()`); and which it was.

    Raises ModelError when that is impossible because the arguments are batched by a surrounding vmap.
    """
    try:
        return run_abstract(f, run, *arguments), True
    except TdhookError:
        raise
    except Exception as error:
        if not any(map(_is_hidden, pytree.tree_flatten(arguments)[0])):

            def real() -> Any:
                leaves, spec = pytree.tree_flatten(arguments)
                with torch.no_grad():
                    clones = [copy.deepcopy(leaf, {id(t): t.clone() for t in reachable_tensors(leaf)}) for leaf in leaves]
                    return run(*pytree.tree_unflatten(clones, spec))

            return _in_thread(real), False
        if isinstance(error, _VALUE_DEPENDENT):
            raise ModelError(
                f"the control flow of the model depends on values, which a transform hides here: {error}"
            ) from error
        raise


def _is_hidden(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and is_wrapped(leaf)


@dataclass(frozen=True)
class _Spec:
    """What a fake copy of a leaf needs, read where the leaf may be looked at."""

    leaf: Any
    tensors: dict[int, tuple[tuple[int, ...], torch.dtype, torch.device]]

    @staticmethod
    def of(leaf: Any) -> _Spec:
        return _Spec(leaf, {id(t): (tuple(t.shape), t.dtype, t.device) for t in reachable_tensors(leaf)})

    def make(self) -> Any:
        fakes = {key: torch.empty(shape, dtype=dtype, device=device) for key, (shape, dtype, device) in self.tensors.items()}
        # Also of an object that is no container, so that a model that writes into it (a key-value cache) leaves it as it is.
        return copy.deepcopy(self.leaf, fakes) if fakes else self.leaf


def _in_thread(function: Callable[[], Any]) -> Any:
    """Calls `function` in a thread of its own: vmap levels, grad modes, function modes and twins are all per thread."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.extend((function(), None))
        except BaseException as error:
            outcome.extend((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    result, error = outcome
    if error is not None:
        raise error
    return result
