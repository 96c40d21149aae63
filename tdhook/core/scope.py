"""The scope of one run: which values are wanted where, and what happens to them on the way.

A transform contributes a `Handler` for the length of one call. `Frame` merges the handlers of that call and is what the twin
reports to. A value passes the innermost handler first and the outermost last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import structure
from .compat import is_compiling
from .errors import SiteError
from .sites import Site, Want, join_path


class Stop(BaseException):
    """Ends a run early. Not an `Exception`, so that a model's own `except Exception` lets it pass."""


class Handler:
    """What one transform does at its sites during one run. Subclasses override `visit`.

    Attributes:
        changes_dependence: it cuts values off from the input, so that what surrounds it has to know.
    """

    changes_dependence = False

    def __init__(self, wants: tuple[Want, ...]):
        self.wants = wants
        self.reached: dict[Want, None] = {}
        self.counts: dict[tuple[str, str | None], int] = {}

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        """The value that goes on; `site` says which call and element `value` is when a pattern asked."""
        raise NotImplementedError

    def finish(self) -> None:
        """Raises `SiteError` for a request that nothing answered."""
        answered = {want.request for want in self.reached}
        for want in self.wants:
            if want in self.reached or (not want.exact and want.request in answered):
                continue
            calls = self.calls(want.site)
            name = str(want.site) if want.exact else want.request
            if isinstance(want.site.call, int) and calls:
                exist = "@0 exists" if calls == 1 else f"@0 to @{calls - 1} exist"
                raise SiteError(f"site {name!r} was not reached: only {exist}.")
            if want.site.op:
                ran = sorted(op for path, op in self.counts if op and path == module_path(want.site))
                raise SiteError(
                    f"site {name!r} was not reached: the module ran "
                    + (f"the operations {', '.join(ran)}." if ran else "no operation of its own.")
                )
            raise SiteError(
                f"site {name!r} was not reached: the model never called this module (or the run stopped before it, or its "
                "parent used its parameters directly); tdhook.trace(f, params, inputs) lists what runs."
            )

    def calls(self, site: Site) -> int:
        """How often the module or operation of a site ran."""
        return self.counts.get((module_path(site), site.op), 0)


class Ruler(Handler):
    """A handler that carries operations out in its own way. Of several the outermost one does."""

    def __init__(self) -> None:
        super().__init__(())

    def operation(self, frame: Frame, path: str, op: str, function: Callable, in_place: bool) -> Callable:
        """What is called in place of an operation: `function` itself, to leave it as it is."""
        return function

    def module(self, frame: Frame, module: Any, path: str, call: int, forward: Callable) -> Callable:
        """What is called in place of the forward of a module."""
        return forward


class Observer:
    """Sees every module call and, where `operations` is set, every operation."""

    operations = False

    def start(self, own: list[Tensor]) -> None:
        """Before the run; `own`: copies of the model's buffers and tensor attributes for this run, which it may write into."""

    def enter(self, path: str, call: int, args: tuple, kwargs: dict) -> None:
        """Before a module runs."""

    def leave(self, path: str, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        """After a module ran."""

    def operation(self, path: str, op: str, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        """After an operation ran."""


class Frame:
    """One run of the model.

    Args:
        handlers: of the transforms around the model, outermost first.
        observer: sees all calls.
        substitutes: outputs of module calls that are not run, keyed by (path, call).
    """

    def __init__(
        self,
        handlers: Sequence[Handler] = (),
        observer: Observer | None = None,
        substitutes: dict[tuple[str, int], Any] | None = None,
    ):
        self.observer = observer
        self.substitutes = substitutes
        self.counts: dict[tuple[str, str | None], int] = {}
        self.stack: list[str] = []
        self.paused = False  # while a handler works, its own torch functions are not the model's operations
        self.modules: dict[str, list[tuple[Handler, Want]]] = {}
        self.operations: dict[str, list[tuple[Handler, Want]]] = {}
        for handler in reversed(handlers):
            handler.counts = self.counts
            for want in handler.wants:
                table = self.modules if want.site.op is None else self.operations
                table.setdefault(module_path(want.site), []).append((handler, want))
        self.ruler = next((handler for handler in handlers if isinstance(handler, Ruler)), None)
        self.watches_all = observer is not None or substitutes is not None or self.wants_operations

    @property
    def wants_operations(self) -> bool:
        watched = self.observer is not None and self.observer.operations
        return watched or bool(self.operations) or self.ruler is not None

    def call_module(self, module: Any, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs one module call of the twin."""
        path = module._tdhook_path
        taps = self.modules.get(path, ())
        if not taps and not self.watches_all:
            return forward(module, *args, **kwargs)
        call = self._count(path, None)
        if self.substitutes is not None and (path, call) in self.substitutes:
            output = self.substitutes[path, call]
            return self._visit_output(taps, None, call, output) if taps else output
        if self.observer is not None:
            self.observer.enter(path, call, args, kwargs)
        if taps:
            args, kwargs = self._visit_inputs(taps, None, call, args, kwargs, module._tdhook_names)
        if self.ruler is not None:
            forward = self.ruler.module(self, module, path, call, forward)
        self.stack.append(path)
        try:
            output = forward(module, *args, **kwargs)
        finally:
            self.stack.pop()
        if self.observer is not None:
            self.observer.leave(path, call, args, kwargs, output)
        return self._visit_output(taps, None, call, output) if taps else output

    def call_operation(self, op: str, function: Callable, in_place: bool, args: tuple, kwargs: dict) -> Any:
        """Runs one operation inside the current module; `in_place` when it overwrites its first argument and returns it."""
        path = self.stack[-1] if self.stack else ""
        taps = [tap for tap in self.operations.get(path, ()) if tap[1].site.op in ("*", op)]
        call = self._count(path, op)
        if taps:
            args, kwargs = self._visit_inputs(taps, op, call, args, kwargs, ())
        own = function if self.ruler is None else self.ruler.operation(self, path, op, function, in_place)
        target = None
        if (taps or own is not function) and in_place and args and isinstance(args[0], Tensor):
            # `x.relu_()` without assignment: the model goes on with x, so the written value has to be in x. The operation
            # itself writes into a copy, which its backward may keep.
            target, args = args[0], (note(args[0].clone(), noted(args[0])), *args[1:])
        output = own(*args, **kwargs)
        if self.observer is not None:
            self.observer.operation(path, op, call, args, kwargs, output)
        if taps:
            output = self._visit_output(taps, op, call, output)
        return output if target is None else note(target.copy_(output), noted(output))

    def _count(self, path: str, op: str | None) -> int:
        call = self.counts.get((path, op), 0)
        self.counts[path, op] = call + 1
        return call

    def _visit_output(self, taps: Sequence, op: str | None, call: int, output: Any) -> Any:
        for handler, want in taps:
            if want.site.port == "out" and _asks_for(want, call):
                output = self._visit(handler, want, op, call, want.site.keys, output)
        return output

    def _visit_inputs(
        self, taps: Sequence, op: str | None, call: int, args: tuple, kwargs: dict, names: tuple[str, ...]
    ) -> tuple[tuple, dict]:
        for handler, want in taps:
            if want.site.port == "in" and _asks_for(want, call):
                bound: Any = {**dict(enumerate(args)), **kwargs}
                keys = want.site.keys
                if keys:
                    keys = (_argument(keys[0], bound, names, want), *keys[1:])
                elif want.exact:
                    keys = (_only_argument(bound, want),)
                bound = self._visit(handler, want, op, call, keys, bound)
                args = tuple(bound[i] for i in range(len(args)))
                kwargs = {name: bound[name] for name in kwargs}
        return args, kwargs

    def _visit(self, handler: Handler, want: Want, op: str | None, call: int, keys: tuple, value: Any) -> Any:
        """Passes the tensors that `want` means inside `value` through the handler; returns `value` with what came back."""
        places = [(keys, _at(want, keys, value))] if want.exact or keys else list(structure.tensors(value))
        for place, tensor in places:
            if tensor is None:
                continue
            site = want.site if want.exact else Site(want.site.path, op, call, want.site.port, place)
            handler.reached[want] = None
            paused, self.paused = self.paused, True
            try:
                new = handler.visit(want, site, tensor)
            finally:
                self.paused = paused
            if new is not tensor:
                value = structure.put_in(value, place, new)
        return value


def note(value: Tensor, something: Any) -> Tensor:
    """`value`, with something that a rule wants to know of it later in the run; None for nothing."""
    if something is not None or noted(value) is not None:
        value._tdhook_note = something  # type: ignore[attr-defined]
    return value


def noted(value: Tensor) -> Any:
    """What is noted on a value."""
    return getattr(value, "_tdhook_note", None)


def module_path(site: Site) -> str:
    """The path part of a resolved site, as the twin knows it."""
    return join_path(site.path) if is_compiling() else _joined(site.path)  # Dynamo warns of a cache


_joined = functools.lru_cache(maxsize=2**16)(join_path)


def _asks_for(want: Want, call: int) -> bool:
    """Whether a request is for this call; a second call of a site that was addressed without `@` is an error."""
    if want.site.call is None and want.exact and call > 0:
        name = str(want.site)
        base, _, port = name.partition(":")
        port = f":{port}" if port else ""
        raise SiteError(
            f"site {name!r} is called more than once; say which call is meant: '{base}@0{port}', '{base}@1{port}', ... "
            f"or '{base}@*{port}' for each."
        )
    return want.site.call in (None, "*", call)


def _at(want: Want, keys: tuple, value: Any) -> Tensor | None:
    """The tensor at `keys` inside `value`; where there is none, None for a pattern and `SiteError` for an exact address."""
    for key in keys:
        try:
            value = structure.get(value, key)
        except (LookupError, AttributeError):
            if not want.exact:
                return None
            raise SiteError(
                f"site {str(want.site)!r} has no element [{key}]: the value there is {structure.describe(value)}."
            ) from None
    if isinstance(value, Tensor):
        return value
    if want.exact:
        _raise_not_a_tensor(want, value)
    return None


def _raise_not_a_tensor(want: Want, value: Any) -> None:
    keys = [k for k, _ in structure.entries(value)]
    text = str(want.site) if want.site.port == "in" or want.site.keys or not want.site.path else f"{want.site}:out"
    fix = f"; address an element, such as '{text}[{keys[0]}]'" if keys else ""
    raise SiteError(f"site {str(want.site)!r} holds {structure.describe(value)}, not a tensor{fix}.")


def _argument(key: int | str, bound: dict, names: tuple[str, ...], want: Want) -> int | str:
    """Which entry of the bound arguments `in[key]` means: a parameter may be passed by position or by name."""
    if key in bound:
        return key
    if isinstance(key, str) and key in names and names.index(key) in bound:
        return names.index(key)
    if isinstance(key, int) and 0 <= key < len(names) and names[key] in bound:
        return names[key]
    if not want.exact:
        return key
    raise SiteError(f"site {str(want.site)!r}: the call got no argument {key!r}, it got {', '.join(map(repr, bound))}.")


def _only_argument(bound: dict, want: Want) -> int | str:
    """What `:in` means without a key: the first positional argument, or the only tensor among the named ones."""
    if 0 in bound:
        return 0
    found = [name for name, value in bound.items() if isinstance(value, Tensor)]
    if len(found) == 1:
        return found[0]
    text = str(want.site)
    raise SiteError(f"site {text!r} is ambiguous: the call got {', '.join(map(repr, bound)) or 'nothing'}; say '{text}[name]'.")
