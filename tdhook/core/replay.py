"""Running a model again from the middle: a `Tape` keeps what the modules returned in one run, and `resume` runs the model with
writes, taking from the tape every call that had finished before the first of them.

Unlike `start_from`, nothing is analysed: what finished before a site cannot depend on it, so replaying it is exact, also for
sites that a residual stream passes by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .compat import is_batched, is_compiling
from .functional import Execution, FunctionalModel
from .reading import Reader
from .scope import Observer
from .sites import Site, Want
from .structure import tensors
from .tail import Effects, inner_wants, surrounds
from .writing import Write, Writer


class _Recorder(Observer):
    def __init__(self, f: FunctionalModel) -> None:
        self.f = f
        self.kept = inner_wants(f)
        self.time = 0
        self.open: list[tuple[Effects, list[tuple[Tensor, int]]]] = []
        self.finished: list[tuple[int, tuple[str, int], Any, list[tuple[Tensor, int]]]] = []

    def enter(self, path: str, call: int, args: tuple, kwargs: dict) -> None:
        self.time += 1
        self.open.append((Effects(self.f, (args, kwargs)), _versions((args, kwargs))))

    def leave(self, path: str, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        self.time += 1
        effects, before = self.open.pop()
        # A call that wrote into its arguments, or may have told others something, has to run again.
        if effects.none(output) and not _changed(before) and not surrounds(path, self.kept):
            self.finished.append((self.time, (path, call), output, _versions(output)))


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    return [(t, t._version) for _, t in tensors(value)]


def _changed(versions: list[tuple[Tensor, int]]) -> bool:
    return any(t._version != version for t, version in versions)


@contextmanager
def _counting_writes() -> Iterator[None]:
    """Tensors of inference mode do not count their writes, so a tape works outside of it."""
    if is_compiling() or not torch.is_inference_mode_enabled():
        yield
    else:
        with torch.inference_mode(False), torch.no_grad():
            yield


class _TimedReader(Reader):
    """Reads the values at sites and the time at which each passes."""

    def __init__(self, wants: tuple[Want, ...], recorder: _Recorder):
        super().__init__(wants)
        self.recorder = recorder
        self.times: dict[Want, int] = {}

    def visit(self, want: Want, site: Site, value: Tensor) -> Tensor:
        self.times.setdefault(want, self.recorder.time)
        return super().visit(want, site, value)


class Tape:
    """One run of `f`, kept so that it can be resumed from the sites `wants`.

    Attributes:
        output: what `f(params, inputs)` returned.
        values: the tensor at each of the sites.
    """

    def __init__(self, f: FunctionalModel, params: Any, inputs: Any, wants: tuple[Want, ...]):
        self.f, self.params, self.inputs = f, params, inputs
        recorder = _Recorder(f)
        reader = _TimedReader(wants, recorder)
        observer = None if is_compiling() else recorder
        with _counting_writes():
            self.output = f._run(params, inputs, (), Execution((reader,), observer))
        reader.finish()
        self.values = {want: value for (want, _), value in reader.values.items()}
        self._times = reader.times
        # A batched tensor does not count its writes, so under vmap nothing is known to be still what it was.
        known = not any(is_batched(t) for _, _, output, _ in recorder.finished for _, t in tensors(output))
        self._finished = [entry[:3] for entry in recorder.finished if known and not _changed(entry[3])]

    def resume(self, writes: Mapping[Want, Write]) -> Any:
        """The output of `f` with values written at sites of the tape. Cost: the part of the forward after the first site."""
        start = min(self._times[want] for want in writes)
        substitutes = {call: output for time, call, output in self._finished if time <= start}
        writer = Writer(tuple(writes), writes)
        with _counting_writes():
            output = self.f._run(self.params, self.inputs, (), Execution((writer,), substitutes=substitutes))
        writer.finish()
        return output
