"""Peak memory of a call, in a fresh process.

Also loaded by the workers of other environments, so it imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes that a call needs at its peak, above what the process holds before it.

    A first call goes before: what it loads and compiles is not the method's. `ru_maxrss` is for systems without /proc
    only: it is the peak since the start of the process, and a child may inherit it from its parent.
    """
    run()
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # resets VmHWM
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text("ascii").splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_in_fresh_process(request: dict[str, Any]) -> int:
    """Bytes; `request` names the task, the case, the competitor and the choice, as `benchmarks.single` takes them."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.single", json.dumps(request)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    return json.loads(done.stdout.splitlines()[-1])["bytes"]
