"""What the tutorials share: parts that run one after the other, and checks that are counted."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Part = Callable[[Path, bool], list[bool]]  # the folder of the pictures, whether to be short; what its checks found


def run(parts: Mapping[str, Part], description: str | None, short: str) -> int:
    """Run all parts, or the one that the command line asks for; return the number of checks that failed."""
    arguments = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    arguments.add_argument("--short", action="store_true", help=short)
    arguments.add_argument("--only", choices=parts, help="run one part")
    arguments.add_argument("--out", type=Path, default=Path("out"), help="folder of the pictures")
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    checks: list[bool] = []
    for name, part in parts.items():
        if options.only in (None, name):
            begun = time.perf_counter()
            checks += part(options.out, options.short)
            print(f"({time.perf_counter() - begun:.0f} s)", flush=True)
    failed = checks.count(False)
    print(f"\n{len(checks)} checks, {failed} failed; pictures in {options.out}/, {time.perf_counter() - start:.0f} s")
    return failed


def check(claim: str, holds: Any, value: Any = None) -> bool:
    """Print a claim and whether it holds."""
    number = "" if value is None else f" ({float(value):.2g})"
    print(f"  {'ok    ' if holds else 'FAILED'}  {claim}{number}", flush=True)
    return bool(holds)


def headline(text: str) -> None:
    """Print a title."""
    print(f"\n{text}\n{'─' * len(text)}", flush=True)
