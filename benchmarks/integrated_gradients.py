"""Integrated gradients of several targets of an MLP: the task of tdhook's paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import tdhook
from tdhook.attribution import convergence_delta, integrated_gradients

from .case import Case, Competitor, Goal, Options
from .mlp import mlp
from .remote import Remote

TITLE = "Integrated gradients of several targets"
INTRODUCTION = """\
MLP of ten times Linear(width, width) and one shared ReLU, torch's initialisation, normal inputs, zero baseline, 50
Gauss–Legendre points, multiplied by inputs, convergence delta on (the task of tdhook's paper, arXiv 2509.25475). Ours
returns one attribution and one delta per target and example. `captum, one call per target` does the same; `captum,
summed` and `tdhook 0.3.0` return the sum over the targets only. Ours and captum each take the fastest of a few chunk
sizes. Where the multiplications of wide layers dominate, T targets cost captum T forward and T backward passes, and
ours one and T: at most 2T / (1 + T) is to be gained, 1.33 for two targets and 1.82 for ten."""

STEPS = 50
LIMIT = 8e9  # bytes


def cases(options: Options) -> Iterator[Case]:
    sizes = [(w, b) for w in (10, 100, 1000) for b in (10, 100, 1000)]
    if options.quick:
        sizes = [(10, 10), (100, 100), (1000, 10)]
    for width, batch in sizes:
        yield _case("two targets", width, batch, (4, 7), options, _two_goals(width, batch))
    for width, batch in sizes:
        if batch <= 100 and (not options.quick or width == 10):
            yield _case("sum of two targets", width, batch, (4, 7), options, (), summed=True)
    for width, batch in [(10, 10)] if options.quick else [(10, 10), (100, 100), (1000, 10), (1000, 100)]:
        goal = Goal("ours", "captum, one call per target", 3.0)
        yield _case("ten targets", width, batch, tuple(range(10)), options, (goal,))


def _two_goals(width: int, batch: int) -> tuple[Goal, ...]:
    captum = "captum, one call per target"
    if (width, batch) == (10, 10):
        return Goal("ours", captum, 5.0), Goal("ours, compiled", captum, 15.0)
    return (Goal("ours", captum, 1.5),) if width == 1000 else ()


def _case(
    what: str,
    width: int,
    batch: int,
    targets: tuple[int, ...],
    options: Options,
    goals: Sequence[Goal],
    summed: bool = False,
) -> Case:
    # kept for the backward: inputs and the outputs of ten layers; for each target at once a cotangent before and after
    needed = 4.0 * STEPS * batch * width * (12 + 3 * len(targets))
    return Case(
        f"{what}, width {width}, batch {batch}",
        {"targets": list(targets), "width": width, "batch": batch, "steps": STEPS, "summed": summed},
        lambda: _competitors(width, batch, targets, options, summed),
        # At 5e7 activations and more, rounding decides on which side of some ReLUs' kinks a value falls, so that any two ways
        # differ in the third digit at a few places. In double precision they agree as far as captum's weights, which stay
        # single, allow; that is checked too.
        tolerance=2e-2 if width * batch >= 100_000 else 1e-4,
        claims={} if summed else {"agrees with captum to 1e-8 in double precision": lambda: _agree(width, targets)},
        goals=goals,
        memory=not options.quick and not summed and (width, batch) in ((1000, 10), (1000, 100)),
        skipped=_too_large(width, batch, needed),
    )


def _competitors(width: int, batch: int, targets: tuple[int, ...], options: Options, summed: bool) -> list[Competitor]:
    torch.compiler.reset()
    model, x = mlp(width, batch, targets=targets)
    f, params = tdhook.functionalize(model)
    chosen: Any = _sum_of(targets) if summed else list(targets)

    def explain(params: Any, x: Tensor, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
        attributions = integrated_gradients(f, params, x, targets=chosen, steps=STEPS, chunk_size=chunk_size)
        return attributions, convergence_delta(f, params, x, attributions, targets=chosen)

    compiled = torch.compile(explain, fullgraph=True, dynamic=False)
    chunk_sizes = (None,) if width * batch < 10_000 else (None, 50, 10)
    ours = {f"chunk_size={c}": lambda c=c: explain(params, x, c) for c in chunk_sizes}
    ours_compiled = {f"chunk_size={c}": lambda c=c: compiled(params, x, c) for c in chunk_sizes[:2]}
    peer = "captum, summed" if summed else "captum, one call per target"
    captum = {f"internal_batch_size={s}": _captum(model, x, targets, summed, s) for s in (None, 25 * batch, 5 * batch)}
    found = [Competitor("ours", ours), Competitor("ours, compiled", ours_compiled), Competitor(peer, captum)]
    if not options.quick:
        run = _captum(torch.compile(model, dynamic=False), x, targets, summed, None)
        note = "captum itself does not compile, the model that it calls does"
        found.append(Competitor(f"{peer}, compiled model", {"internal_batch_size=None": run}, note=note))
    if options.peers.exists() and len(targets) == 2:
        parameters = {
            "threads": options.threads,
            "width": width,
            "batch": batch,
            "steps": STEPS,
            "targets": list(targets),
        }
        found.append(
            Competitor(
                "tdhook 0.3.0 (PyPI)",
                {"": Remote(options.peers, "tdhook_pypi.py", parameters)},
                view=lambda result: [result[0] if summed else result[0].sum(0)],
                note="returns the sum over targets; its one delta, of the whole batch, is not compared",
            )
        )
    return found


def _too_large(width: int, batch: int, needed: float) -> str:
    """Why a case is not run, or nothing."""
    if needed > LIMIT:
        return f"needs about {needed / 1e9:.0f} GB"
    return "half a minute for each call of each competitor" if width * batch >= 1_000_000 else ""


def _agree(width: int, targets: Sequence[int]) -> bool:
    """Whether ours and captum's numbers are the same in double precision, for four examples."""
    model, x = mlp(width, 4, targets=targets)
    model, x = model.double(), x.double()
    f, params = tdhook.functionalize(model)
    ours = integrated_gradients(f, params, x, targets=list(targets), steps=STEPS)
    theirs, _ = _captum(model, x, targets, False, None)()
    return bool((ours - theirs).abs().max() <= 1e-8 * theirs.abs().max())


def _sum_of(targets: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def total(output: Tensor) -> Tensor:
        first, *others = (output[:, t] for t in targets)
        return sum(others, first)

    return total


def _captum(
    model: Callable, x: Tensor, targets: Sequence[int], summed: bool, internal_batch_size: int | None
) -> Callable[[], tuple[Tensor, Tensor]]:
    from captum.attr import IntegratedGradients

    total = _sum_of(targets)
    method = IntegratedGradients((lambda inputs: total(model(inputs))) if summed else model)

    def one(target: int | None) -> tuple[Tensor, Tensor]:
        return method.attribute(
            x,
            baselines=torch.zeros_like(x),
            target=target,
            n_steps=STEPS,
            method="gausslegendre",
            internal_batch_size=internal_batch_size,
            return_convergence_delta=True,
        )

    def run() -> tuple[Tensor, Tensor]:
        if summed:
            return one(None)
        attributions, deltas = zip(*(one(target) for target in targets))
        return torch.stack(attributions), torch.stack(deltas)

    return run
