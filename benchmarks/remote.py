"""Competitors in another process: a worker of another environment that waits for commands on its standard input.

Each command is a line of JSON, answered by one: `{"prepare": {...}}`, `{"run": repeats}` (the answer has `seconds` per
call), `{"result": path}` (saves what a call returns) and `{"peak": true}` (the answer has `bytes`).
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


class Remote:
    """A function that runs in a worker, which lives until this object is dropped.

    Args:
        python: interpreter of the worker's environment.
        script: file of `benchmarks/peers/`.
        parameters: what the worker's `prepare` takes.
    """

    def __init__(self, python: Path, script: str, parameters: dict[str, Any]):
        self.command = [str(python), "-P", str(HERE / "peers" / script)]
        self.parameters = parameters
        self._start()

    def _start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self._end = weakref.finalize(self, _end, self.process)
        self.versions = self.ask({"prepare": self.parameters})

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Sends a command and waits for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(self.command)} ended with code {self.process.wait()} on {command}.")
        return json.loads(answer)

    def seconds(self, repeats: int) -> float:
        """Mean time of a call."""
        return self.ask({"run": repeats})["seconds"]

    def peak(self) -> int:
        """Peak memory of a call in bytes, above what was in use before, in a fresh worker."""
        self._end()
        self._start()
        return self.ask({"peak": True})["bytes"]

    def __call__(self) -> Any:
        """What a call returns."""
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "result.pt")
            self.ask({"result": path})
            return torch.load(path, weights_only=True)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
