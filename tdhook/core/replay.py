"""Running a model again from the middle: a `Tape` keeps what the modules returned in one run, and `resume` runs the model with
writes, taking from the tape every call that had finished before the first of them; `resume_until` stops where all is known.

Unlike `start_from`, nothing is analysed: what finished before a site cannot depend on it, so replaying it is exact, also for
sites that a residual stream passes by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compat import is_batched, is_compiling
from .functional import Execution, FunctionalModel
from .reading import Reader, StopAt
from .scope import Observer
from .sites import Site, Want
from .structure import tensors
from .tail import Effects, inner_wants, surrounds
from .writing import Write, Writer


class _Finished(NamedTuple):
    """A module call that need not run again; `inside` says which of the calls that were entered ran inside it."""

    time: int
    call: tuple[str, int]
    output: Any
    versions: list[tuple[Tensor, int]]
    inside: slice


class _Recorder(Observer):
    def __init__(self, f: FunctionalModel) -> None:
        self.f = f
        self.kept = inner_wants(f)
        self.time = 0
        self.entered: list[str] = []
        self.own: list[tuple[Tensor, int]] = []
        self.open: list[tuple[Effects, list[tuple[Tensor, int]], int]] = []
        self.finished: list[_Finished] = []

    def start(self, own: list[Tensor]) -> None:
        self.own = _versions(own)

    def enter(self, path: str, call: int, args: tuple, kwargs: dict) -> None:
        self.time += 1
        self.entered.append(path)
        self.open.append((Effects(self.f, (args, kwargs)), _versions((args, kwargs)), len(self.entered)))

    def leave(self, path: str, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        self.time += 1
        effects, before, start = self.open.pop()
        # A call that wrote into its arguments, or may have told others something, has to run again.
        if effects.none(output) and not _changed(before) and not surrounds(path, self.kept):
            inside = slice(start, len(self.entered))
            self.finished.append(_Finished(self.time, (path, call), output, _versions(output), inside))

    def replayable(self) -> Iterator[_Finished]:
        """What is still as it was returned.

        A call around one of several calls of a module has to run, or the later ones would be counted wrongly: a module shared
        by blocks, a layer that is used again and again. What it calls can be replayed.
        """
        if _changed(self.own):
            return  # in a call, which one is not known: left out, the buffer would not be what later ones read
        total = Counter(self.entered)
        for entry in self.finished:
            inside = Counter(self.entered[entry.inside])
            if not _changed(entry.versions) and all(total[path] == count for path, count in inside.items()):
                yield entry


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
        values: the tensor at each of the sites, in the order in which the run reached them.
    """

    def __init__(self, f: FunctionalModel, params: Any, inputs: Any, wants: tuple[Want, ...]):
        self.f, self.params, self.inputs = f, params, inputs
        recorder = _Recorder(f)
        reader = _TimedReader(wants, recorder)
        observer = None if is_compiling() else recorder
        with _counting_writes():
            self.output = f._run(params, inputs, (), Execution((reader,), observer))
        reader.finish()
        self._times = reader.times  # in the order of the run
        self.values = {want: reader.values[want][-1][1] for want in reader.times}
        # A batched tensor does not count its writes, so under vmap nothing is known to be still what it was.
        known = not any(is_batched(t) for entry in recorder.finished for _, t in tensors(entry.output))
        latest = max(self._times.values())
        self._finished = [e[:3] for e in recorder.replayable() if e.time <= latest] if known else []

    def time_of(self, want: Want) -> int:
        """When the run was at a site of the tape, in module calls begun and ended; equal where none lies between two sites.

        A value cannot change by a write that comes later. Compiled, all times are 0: nothing is known of them.
        """
        return self._times[want]

    def resume(self, writes: Mapping[Want, Write]) -> Any:
        """The output of `f` with values written at sites of the tape. Cost: the part of the forward after the first site."""
        writer = Writer(tuple(writes), writes)
        output = self._resumed(self.f, writer)
        writer.finish()
        return output

    def resume_until(self, writes: Mapping[Want, Write], wants: tuple[Want, ...]) -> dict[Want, Tensor]:
        """The values with which a run with writes arrives at sites of the tape, before what is written there itself.

        Cost: the part of the forward between the first write and the last of `wants`.
        """
        start = min(map(self.time_of, writes))
        values = {want: self.values[want] for want in wants}
        later = tuple(want for want in values if self.time_of(want) >= start)
        if later:
            # The reader is closer to the model than the writer. It may stop before some writes, so these are not asked for.
            found = self._resumed(StopAt(self.f, later, False), Writer(tuple(writes), writes))
            values.update((want, found[str(want.site)]) for want in later)
        return values

    def _resumed(self, f: FunctionalModel, writer: Writer) -> Any:
        start = min(map(self.time_of, writer.wants))
        # The operations of a call that is replayed are not counted: where some are written or read, all calls of a module run.
        around = (*writer.wants, *inner_wants(f))
        finished = [entry for entry in self._finished if entry[0] <= start and not surrounds(entry[1][0], around)]
        substitutes = {call: output for _, call, output in finished}
        with _counting_writes():
            return f._run(self.params, self.inputs, (), Execution((writer,), substitutes=substitutes))
