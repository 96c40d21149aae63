"""Tables and pictures of what was measured, made from the JSON alone."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#999999", "#f0e442")  # Okabe and Ito


def table(tasks: Sequence[dict[str, Any]]) -> str:
    """All tasks as Markdown."""
    lines = ["# Benchmarks", "", "Made by `python -m benchmarks.run` from the JSON files here; do not edit.", ""]
    for task in tasks:
        lines += _task(task)
    return "\n".join(lines).rstrip() + "\n"


def _task(task: dict[str, Any]) -> list[str]:
    machine, versions = task["machine"], task["versions"]
    lines = [f"## {task['title']}", "", task["introduction"], ""]
    lines += [
        f"{'Quick run' if task['quick'] else 'Run'} of {task['date']} on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gb']} GB, {machine['torch_threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". Load before: {machine['load_before']}.",
        "",
        f"![{task['title']}]({task['task']}.png)",
        "",
    ]
    memory = any("peak_bytes" in c for case in task["cases"] for c in case["competitors"])
    lines += [
        "| case | competitor | setting | median | quartiles | times ours |" + (" peak memory |" if memory else ""),
        "|---|---|---|---:|---:|---:|" + ("---:|" if memory else ""),
    ]
    notes: dict[str, str] = {}
    for case in task["cases"]:
        for reason in ("skipped", "disagreement"):
            if reason in case:
                lines.append(f"| {case['name']} | {reason}: {case[reason]} | | | | |" + (" |" if memory else ""))
        for i, c in enumerate(case["competitors"]):
            cells = [case["name"] if i == 0 else "", c["name"], c["setting"].replace("|", "/"), duration(c["median"])]
            cells += [" – ".join(map(duration, c["quartiles"])), f"{c['ratio']:.2f}"]
            if memory:
                cells.append(f"{c['peak_bytes'] / 2**20:.1f} MiB" if "peak_bytes" in c else "")
            lines.append("| " + " | ".join(cells) + " |")
            if c["note"]:
                notes[c["name"]] = c["note"]
    lines.append("")
    if notes:
        lines += [*(f"- {name}: {note}." for name, note in notes.items()), ""]
    return lines + _goals(task)


def _goals(task: dict[str, Any]) -> list[str]:
    rows = [(case["name"], goal) for case in task["cases"] for goal in case.get("goals", [])]
    lines = []
    if rows:
        lines = ["| case | goal | measured | reached |", "|---|---|---:|---|"]
        lines += [f"| {c} | {g['text']} | {g['value']} | {'yes' if g['reached'] else '**no**'} |" for c, g in rows]
        lines.append("")
    claims = [(case["name"], claim) for case in task["cases"] for claim in case.get("claims", [])]
    if claims:
        lines += [f"- {c}: {claim['text']}: {'yes' if claim['holds'] else '**no**'}" for c, claim in claims]
        lines.append("")
    return lines


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def picture(task: dict[str, Any], path: Path) -> None:
    """One picture: the task's own if its module has `picture`, else bars of times relative to ours."""
    module = importlib.import_module(f"benchmarks.{task['task']}")
    (getattr(module, "picture", None) or _bars)(task, path)


def _bars(task: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    cases = [case for case in task["cases"] if len(case["competitors"]) > 1]
    if not cases:
        return
    names = list(dict.fromkeys(c["name"] for case in cases for c in case["competitors"]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    rows = sum(len(case["competitors"]) + 1 for case in cases)
    figure = Figure(figsize=(9, 1.6 + 0.21 * rows), layout="constrained")
    axes = figure.subplots()
    y, ticks, labels = 0.0, [], []
    for case in cases:
        first = y
        for c in case["competitors"]:
            axes.barh(y, c["ratio"] - 1, left=1, height=0.9, color=colours[c["name"]])
            low, high = (q / c["median"] * c["ratio"] for q in c["quartiles"])
            axes.plot([low, high], [y, y], color="black", linewidth=1)
            axes.annotate(
                f"{c['ratio']:.2f} ({duration(c['median'])})",
                (max(c["ratio"], high, 1), y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
            y += 1
        ticks.append((first + y - 1) / 2)
        labels.append(case["name"])
        y += 1
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.25)  # room for the numbers
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.grid(axis="x", which="both", alpha=0.2)
    axes.set_xlabel("time relative to ours (longer is slower; line: quartiles)")
    axes.set_title(task["title"] + (" (quick run)" if task["quick"] else ""))
    handles = [axes.barh([0], [0], color=colours[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=130)
