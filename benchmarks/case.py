"""What a task declares: cases, their competitors, and what is to be reached.

A task is a module with a `TITLE`, an `INTRODUCTION`, and `cases(options) -> Iterable[Case]`. The list of cases is cheap
to make; models are made when a case is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """How the benchmarks are run.

    Attributes:
        quick: small sizes and few rounds.
        threads: of torch, in every process.
        peers: the interpreter of the environment of peers that cannot share ours.
    """

    quick: bool = False
    threads: int = 2
    peers: Path = Path(".venv-peers/bin/python")


@dataclass(frozen=True)
class Competitor:
    """One way to do the work of a case.

    Attributes:
        name: says what it is.
        choices: the settings that it may use, by their description, each with the function to time. The fastest is
            reported. A function with a method `seconds(repeats)` takes its own time, in another process; see `Remote`.
        view: from the result of the first competitor to what this one returns, where it returns less.
        scale: the work of the case in units of what one call does, where only a part is timed.
        note: what a reader has to know to judge the number.
    """

    name: str
    choices: Mapping[str, Callable[[], Any]]
    view: Callable[[Any], Any] | None = None
    scale: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Goal:
    """`competitor` is at least `ratio` times as fast as `against`, or takes at most `seconds`."""

    competitor: str
    against: str = ""
    ratio: float = 0.0
    seconds: float = 0.0

    def judge(self, medians: Mapping[str, float]) -> dict[str, Any]:
        """The goal in words, the number measured, and whether it was reached."""
        own = medians[self.competitor]
        if not self.against:
            text = f"{self.competitor}: at most {self.seconds * 1000:g} ms"
            return {"text": text, "value": f"{own * 1000:.3g} ms", "reached": own <= self.seconds}
        value = medians[self.against] / own
        if self.ratio < 1:
            text = f"{self.competitor}: at most {1 / self.ratio:g} times {self.against}"
            return {"text": text, "value": f"{1 / value:.3f}", "reached": value >= self.ratio}
        text = f"{self.competitor}: at least {self.ratio:g} times faster than {self.against}"
        return {"text": text, "value": f"{value:.2f}", "reached": value >= self.ratio}


@dataclass(frozen=True)
class Case:
    """The same work for several competitors; the first is ours, and ratios are to it.

    Attributes:
        name: unique within the task.
        parameters: what distinguishes it from its siblings.
        build: makes the competitors, with models and data.
        tolerance: of the results' agreement. Relative to the largest magnitude of the result's first tensor, unless
            `absolute`.
        goals: what is to be reached.
        claims: other things to be checked, by their description; called after `build`.
        memory: also measure the peak memory of one call, each in a fresh process.
        seconds: time budget of the timed rounds; None for the runner's own.
        skipped: why the case is not run.
    """

    name: str
    parameters: Mapping[str, Any]
    build: Callable[[], Sequence[Competitor]]
    tolerance: float = 1e-4
    absolute: bool = False
    goals: Sequence[Goal] = ()
    claims: Mapping[str, Callable[[], bool]] = field(default_factory=dict)
    memory: bool = False
    seconds: float | None = None
    skipped: str = ""
