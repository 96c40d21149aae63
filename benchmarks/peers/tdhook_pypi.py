"""Worker of `benchmarks.remote` for the package `tdhook` of PyPI, which has our import name.

It is run with its own interpreter and `-P`, so that neither this folder nor the working directory is importable.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib import metadata
from pathlib import Path
from time import perf_counter

import torch
from tensordict import TensorDict

from tdhook.attribution import IntegratedGradients


def neighbour(name: str):
    """A file of `benchmarks/`, loaded without its package: both are free of what this environment lacks."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(threads: int, steps: int, targets: list[int], **sizes: int):
    """Integrated gradients of the sum of several targets: what a run returns is [B, *features]."""
    torch.set_num_threads(threads)
    model, inputs = neighbour("mlp").mlp(targets=targets, **sizes)
    method = IntegratedGradients(
        init_attr_targets=lambda out, _: TensorDict({"chosen": out["output"][..., targets]}, out.batch_size),
        multiply_by_inputs=True,
        compute_convergence_delta=True,
        n_steps=steps,
    )
    # entered once: setting the hooks is not what is timed
    hooked = method.prepare(model).__enter__()

    def run() -> list[torch.Tensor]:
        given = {"input": inputs, ("baseline", "input"): torch.zeros_like(inputs)}
        result = hooked(TensorDict(given, batch_size=len(inputs)))
        return [result["attr", "input"].detach()]

    return run


def main() -> None:
    run = None
    for line in sys.stdin:
        command = json.loads(line)
        if "prepare" in command:
            run = prepare(**command["prepare"])
            answer = {name: metadata.version(name) for name in ("tdhook", "torch", "tensordict")}
        elif "run" in command:
            start = perf_counter()
            for _ in range(command["run"]):
                run()
            answer = {"seconds": (perf_counter() - start) / command["run"]}
        elif "result" in command:
            torch.save(run(), command["result"])
            answer = {}
        else:
            answer = {"bytes": neighbour("peak").peak_of(run)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
