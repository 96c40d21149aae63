"""Measures the peak memory of one competitor and prints it as JSON: what `peak.peak_in_fresh_process` starts."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch

from .case import Options
from .peak import peak_of


def main() -> None:
    request = json.loads(sys.argv[1])
    options = Options(request["quick"], request["threads"], Path(request["peers"]))
    torch.set_num_threads(options.threads)
    task = importlib.import_module(f"benchmarks.{request['task']}")
    case = next(case for case in task.cases(options) if case.name == request["case"])
    competitor = next(c for c in case.build() if c.name == request["competitor"])
    print(json.dumps({"bytes": peak_of(competitor.choices[request["choice"]])}))


if __name__ == "__main__":
    main()
