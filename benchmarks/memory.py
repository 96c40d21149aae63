"""Peak memory of integrated gradients as a function of the chunk size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tdhook
from tdhook.attribution import integrated_gradients

from .case import Case, Competitor, Options
from .mlp import mlp

TITLE = "Peak memory of integrated gradients"
INTRODUCTION = """\
An MLP of ten layers of 256 units, batch 64, for several numbers of path points and targets. Each number comes from
a fresh process: the peak of resident memory during a call above what was resident before it, after one call that
loads everything. The memory has to follow the chunk, not steps × targets."""

WIDTH, BATCH = 256, 64


def cases(options: Options) -> Iterator[Case]:
    settings = [(50, 1), (100, 5)] if options.quick else [(50, 1), (50, 10), (200, 1), (200, 10)]
    chunk_sizes = (5, 50, None) if options.quick else (1, 5, 10, 25, 50, 100, 200, None)
    for steps, targets in settings:
        yield Case(
            f"{steps} steps, {targets} target{'s' * (targets > 1)}",
            {"steps": steps, "targets": targets, "width": WIDTH, "batch": BATCH},
            partial(_competitors, steps, targets, chunk_sizes),
            memory=True,
            seconds=0,
        )


def _competitors(steps: int, targets: int, chunk_sizes: tuple[int | None, ...]) -> list[Competitor]:
    model, x = mlp(WIDTH, BATCH, targets=range(targets))
    f, params = tdhook.functionalize(model)

    def explain(chunk_size: int | None) -> Any:
        return integrated_gradients(f, params, x, targets=list(range(targets)), steps=steps, chunk_size=chunk_size)

    return [Competitor(f"chunk_size={c}", {"": partial(explain, c)}) for c in chunk_sizes]


def picture(task: dict[str, Any], path: Path) -> None:
    """Peak memory over the chunk size, one line for each number of steps and targets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for case in task["cases"]:
        whole = case["parameters"]["steps"] * case["parameters"]["targets"]
        sizes, peaks = [], []
        for c in case["competitors"]:
            size = c["name"].removeprefix("chunk_size=")
            sizes.append(whole if size == "None" else int(size))
            peaks.append(c["peak_bytes"] / 2**20)
        (line,) = axes.plot(sizes[:-1], peaks[:-1], marker="o", label=case["name"])
        axes.plot(sizes[-1:], peaks[-1:], marker="s", color=line.get_color(), markersize=8, fillstyle="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set_xlabel("chunk_size (open squares: None, at steps × targets)")
    axes.set_ylabel("peak memory of a call (MiB)")
    axes.set_title(task["title"] + (" (quick run)" if task["quick"] else ""))
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=130)
