"""The loop of a worker of `benchmarks.remote`.

Workers are run with their own interpreter and `-P`, so that neither this folder nor the working directory goes before what
is installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import torch


def neighbour(name: str) -> ModuleType:
    """A file of `benchmarks/`, loaded without its package: it has to be free of what the environment lacks."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(methods: Mapping[str, Callable[..., Callable[[], Any]]], packages: Sequence[str]) -> None:
    """Answers commands until the standard input ends.

    Args:
        methods: for the `method` of `prepare` what makes the function to run from the other parameters; without it the first.
        packages: whose versions to tell.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    run: Callable[[], Any] = lambda: None  # noqa: E731
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        if "prepare" in command:
            parameters = dict(command["prepare"])
            torch.set_num_threads(parameters.pop("threads"))
            run = methods[parameters.pop("method", next(iter(methods)))](**parameters)
            answer = {name: metadata.version(name) for name in packages}
        elif "run" in command:
            start = perf_counter()
            for _ in range(command["run"]):
                run()
            answer = {"seconds": (perf_counter() - start) / command["run"]}
        elif "result" in command:
            torch.save(run(), command["result"])
        else:
            answer = {"bytes": neighbour("peak").peak_of(run)}
        print(json.dumps(answer), file=answers, flush=True)
