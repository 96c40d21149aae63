"""Running a model again from the middle: a `Tape` keeps what the modules returned in one run, and `resume` runs the model with
writes, taking from the tape every call that had finished before the first of them; `resume_until` stops where all is known.

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
from .reading import Reader, StopAt
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
        self.values = {want: value for want, _, value in reader.values}
        self._times = reader.times
        # A batched tensor does not count its writes, so under vmap nothing is known to be still what it was.
        known = not any(is_batched(t) for _, _, output, _ in recorder.finished for _, t in tensors(output))
        self._finished = [entry[:3] for entry in recorder.finished if known and not _changed(entry[3])]

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
        substitutes = {call: output for time, call, output in self._finished if time <= start}
        with _counting_writes():
            return f._run(self.params, self.inputs, (), Execution((writer,), substitutes=substitutes))
