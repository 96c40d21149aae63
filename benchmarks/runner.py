"""Measures a case: agreement first, then rounds that alternate between the competitors."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .case import Case, Competitor, Options
from .peak import peak_in_fresh_process
from .remote import Remote

SAMPLE = 0.005  # seconds that a sample lasts at least: shorter calls are repeated within it
Progress = Callable[[str], None]


class Disagreement(Exception):
    """The results of two competitors differ: their times cannot be compared."""


def measure(task: str, case: Case, options: Options, progress: Progress = lambda text: None) -> dict[str, Any]:
    """Runs a case and returns what was found, as JSON can hold it."""
    found: dict[str, Any] = {"name": case.name, "parameters": dict(case.parameters), "competitors": []}
    if case.skipped:
        return {**found, "skipped": case.skipped}
    competitors = case.build()
    found["claims"] = [{"text": text, "holds": bool(holds())} for text, holds in case.claims.items()]
    progress("agreement")
    try:
        differences = _differences(case, competitors)
    except Disagreement as error:
        return {**found, "disagreement": str(error)}
    progress("settings")
    fastest = {competitor.name: _fastest(competitor) for competitor in competitors}
    chosen = {name: choice for name, (choice, _) in fastest.items()}
    budget = (4 if options.quick else 20) if case.seconds is None else case.seconds
    one_round = sum(seconds for _, seconds in fastest.values())
    least = 1 if budget == 0 or one_round > 60 else 3 if options.quick or one_round > 10 else 5
    samples = _rounds(competitors, fastest, budget, least, progress)
    medians = {c.name: statistics.median(samples[c.name]) * c.scale for c in competitors}
    for c in competitors:
        low, middle, high = (q * c.scale for q in _quartiles(samples[c.name]))
        entry = {
            "name": c.name,
            "setting": chosen[c.name],
            "median": middle,
            "quartiles": [low, high],
            "best": min(samples[c.name]) * c.scale,
            "rounds": len(samples[c.name]),
            "ratio": medians[c.name] / medians[competitors[0].name],
            "difference": differences[c.name],
            "note": c.note,
        }
        if case.memory:
            progress(f"memory: {c.name}")
            entry["peak_bytes"] = _peak(task, case, c, chosen[c.name], options)
        found["competitors"].append(entry)
    found["goals"] = [goal.judge(medians) for goal in case.goals if {goal.competitor, goal.against} - {""} <= set(medians)]
    return found


def _differences(case: Case, competitors: Sequence[Competitor]) -> dict[str, float]:
    """The largest difference of each competitor from the first one; every setting is tried."""
    reference: Any = None
    largest: dict[str, float] = {}
    for competitor in competitors:
        largest[competitor.name] = 0.0
        for choice, run in competitor.choices.items():
            result = pytree.tree_map_only(Tensor, Tensor.detach, run())
            if reference is None:
                reference = result
            expected = reference if competitor.view is None else competitor.view(reference)
            difference = _difference(expected, result, case.absolute)
            if not difference <= case.tolerance:
                raise Disagreement(
                    f"{competitor.name} ({choice}) differs by {difference:.2g} from {competitors[0].name}; "
                    f"{case.tolerance:g} is allowed."
                )
            largest[competitor.name] = max(largest[competitor.name], difference)
    return largest


def _difference(expected: Any, result: Any, absolute: bool) -> float:
    expected, result = ([t for t in pytree.tree_leaves(r) if t is not None] for r in (expected, result))
    shapes = [[tuple(t.shape) for t in r] for r in (expected, result)]
    if shapes[0] != shapes[1]:
        raise Disagreement(f"results of shapes {shapes[0]} and {shapes[1]}.")
    if not expected:
        return 0.0
    scale = 1.0 if absolute else expected[0].abs().max().item()
    if scale == 0:
        raise Disagreement("the result is zero, so its agreement means nothing.")
    return max((a - b).abs().max().item() for a, b in zip(expected, result)) / scale


def _fastest(competitor: Competitor) -> tuple[str, float]:
    """The setting with the shortest call, and its seconds. Calls under half a second have three tries."""
    times = {}
    for choice, run in competitor.choices.items():
        times[choice] = _sample(run, 1)
        if times[choice] < 0.5:
            times[choice] = min(times[choice], *(_sample(run, 1) for _ in range(2)))
    choice = min(times, key=times.__getitem__)
    return choice, times[choice]


def _rounds(
    competitors: Sequence[Competitor],
    fastest: dict[str, tuple[str, float]],
    budget: float,
    least: int,
    progress: Progress,
) -> dict[str, list[float]]:
    """Seconds per call of each competitor, one sample in each round; every other round goes backwards."""
    runs = {c.name: c.choices[fastest[c.name][0]] for c in competitors}
    repeats = {name: max(1, round(SAMPLE / seconds)) for name, (_, seconds) in fastest.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    start = perf_counter()
    count = 0
    while count < least or (count < 200 and perf_counter() - start < budget):
        for name in list(runs)[:: -1 if count % 2 else 1]:
            samples[name].append(_sample(runs[name], repeats[name]))
        count += 1
        progress(f"round {count}")
    return samples


def _sample(run: Callable[[], Any], repeats: int) -> float:
    """Mean seconds of a call."""
    if hasattr(run, "seconds"):  # it takes its own time, in another process
        return run.seconds(repeats)
    start = perf_counter()
    for _ in range(repeats):
        run()
    return (perf_counter() - start) / repeats


def _quartiles(samples: list[float]) -> tuple[float, ...]:
    return tuple(torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist())


def _peak(task: str, case: Case, competitor: Competitor, choice: str, options: Options) -> int:
    run = competitor.choices[choice]
    if isinstance(run, Remote):
        return run.peak()
    request = {"task": task, "case": case.name, "competitor": competitor.name, "choice": choice}
    settings = {"quick": options.quick, "threads": options.threads, "peers": str(options.peers)}
    return peak_in_fresh_process({**request, **settings})
