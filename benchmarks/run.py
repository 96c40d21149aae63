"""Runs benchmarks: `python -m benchmarks.run [--quick] [--only TASK]`.

A whole run writes `benchmarks/results/`, a quick one `out/benchmarks/`: one JSON and one picture per task, and a table
of all.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
from pathlib import Path

import torch

from .case import Options
from .machine import machine, now, versions
from .report import picture, table
from .runner import measure

TASKS = (
    "integrated_gradients",
    "attribution_targets",
    "certified_error",
    "perturbation",
    "activation_maps",
    "activation_patching",
    "patching_sweep",
    "edge_attribution",
    "gpt2_cache",
    "mlp_intervene",
    "lrp",
    "lrp_cnn",
    "attn_lrp",
    "per_example_gradients",
    "tracin",
    "pruning_sweep",
    "similarity",
    "dimension",
    "collection",
    "probes",
    "calls",
    "memory",
)


def run_task(name: str, options: Options, folder: Path, only_case: str = "") -> None:
    """Runs the cases of one task and writes what was found after each of them; other cases keep what was found before."""
    path = folder / f"{name}.json"
    before = {c["name"]: c for c in json.loads(path.read_text("utf-8"))["cases"]} if only_case and path.exists() else {}
    task = importlib.import_module(f"benchmarks.{name}")
    head = {"task": name, "title": task.TITLE, "introduction": task.INTRODUCTION, "quick": options.quick}
    found = {**head, "date": now(), "machine": machine(), "versions": versions(), "cases": []}
    for case in task.cases(options):
        if only_case not in case.name:
            found["cases"] += [before[case.name]] if case.name in before else []
            continue

        def progress(text: str, case=case) -> None:
            if sys.stderr.isatty():
                print(f"\r\033[K{name}: {case.name}: {text}", end="", file=sys.stderr, flush=True)

        result = {**measure(name, case, options, progress), "date": now()}
        found["cases"].append(result)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        _say(result)
        gc.collect()
        _write(found, path)
    if found["cases"]:
        _write(found, path)
        picture(found, folder / f"{name}.png")


def _write(found: dict, path: Path) -> None:
    path.with_suffix(".tmp").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    path.with_suffix(".tmp").replace(path)


def _say(result: dict) -> None:
    print(result["name"], flush=True)
    for reason in ("skipped", "disagreement"):
        if reason in result:
            print(f"  {reason}: {result[reason]}")
    for c in result["competitors"]:
        memory = f"{c['peak_bytes'] / 2**20:9.1f} MiB" if "peak_bytes" in c else ""
        name = f"{c['name']} [{c['setting']}]" if c["setting"] else c["name"]
        print(f"  {c['median'] * 1000:10.3f} ms {c['ratio']:8.2f} x {memory} {name} ({c['rounds']} rounds)")
    for goal in result.get("goals", []):
        print(f"  {'reached' if goal['reached'] else 'MISSED '} {goal['text']}: {goal['value']}")
    for claim in result.get("claims", []):
        print(f"  {'holds' if claim['holds'] else 'FAILS'}: {claim['text']}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, in under five minutes")
    parser.add_argument("--only", choices=TASKS, action="append", help="a task; may be given several times")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=Options.peers, help="interpreter of the peers' environment")
    parser.add_argument("--out", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    # not resolved: the interpreter of an environment is a link out of it
    options = Options(arguments.quick, arguments.threads, arguments.peers.absolute())
    torch.set_num_threads(options.threads)
    folder = arguments.out or Path("out/benchmarks" if options.quick else "benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    if not options.peers.exists():
        missing = "tdhook 0.3.0 of PyPI, nnsight and TransformerLens"
        print(f"{options.peers} does not exist: without {missing} (make .venv-peers/.complete)")
    for name in arguments.only or TASKS:
        run_task(name, options, folder, arguments.case)
    found = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    (folder / "README.md").write_text(table(found), "utf-8")
    print(f"\n{folder / 'README.md'}")
    cases = [case for task in found if task["task"] in (arguments.only or TASKS) for case in task["cases"]]
    return int(any("disagreement" in c or not all(claim["holds"] for claim in c.get("claims", [])) for c in cases))


if __name__ == "__main__":
    sys.exit(main())
