"""The epsilon rule on an MLP, which is the task of tdhook's paper, against zennit, tdhook 0.3.0 and the plain gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import tdhook
from tdhook.attribution import lrp
from tdhook.attribution.rules import epsilon_plus
from tests.attribution.rules.oracle import INSTALLED, zennit

from .case import Case, Competitor, Goal, Options
from .mlp import mlp
from .remote import Remote

TITLE = "Layer-wise relevance propagation of an MLP"
INTRODUCTION = """\
MLP of ten times Linear(width, width) and one shared ReLU, torch's initialisation, normal inputs; the composite
epsilon-plus with epsilon = 1e-6 (the task of tdhook's paper, arXiv 2509.25475). The relevance of the output is the
output itself; with ten targets, one unit after the other, which ours pulls back together. Hooks of zennit and tdhook
0.3.0 are registered once, outside of what is timed. `plain gradient` is autograd's gradient times the input, another
number: it bounds what any way of propagating can reach, so only its time is compared."""

PLAIN = "plain gradient"
ZENNIT = "zennit"


def cases(options: Options) -> Iterator[Case]:
    sizes = [(100, 100)] if options.quick else [(w, b) for w in (100, 1000) for b in (100, 1000)]
    for width, batch in sizes:
        goals = [Goal("ours", ZENNIT, 2.0)]
        if width == 1000:
            goals += [Goal("ours", PLAIN, 1 / 1.15), Goal("ours, compiled", PLAIN, 1.0)]
        yield _case("all outputs", width, batch, (), options, goals)
    for width, batch in sizes[:1] if options.quick else ((100, 100), (1000, 100)):
        yield _case("ten targets", width, batch, tuple(range(10)), options, [Goal("ours", ZENNIT, 2.0)])


def _case(what: str, width: int, batch: int, targets: tuple[int, ...], options: Options, goals: Sequence[Goal]) -> Case:
    return Case(
        f"{what}, width {width}, batch {batch}",
        {"targets": list(targets), "width": width, "batch": batch},
        lambda: _competitors(width, batch, targets, options),
        # Rounding decides on which side of its kink a ReLU is, and what a denominator next to zero is worth.
        tolerance=2e-2 if width * batch >= 100_000 else 1e-3,
        claims={"agrees with zennit to 1e-8 in double precision": lambda: _agree(width, targets)} if INSTALLED else {},
        goals=goals,
        memory=not options.quick and (width, batch) in ((1000, 100), (1000, 1000)),
        seconds=None if options.quick else 30,
    )


def _competitors(width: int, batch: int, targets: tuple[int, ...], options: Options) -> list[Competitor]:
    torch.compiler.reset()
    model, x = mlp(width, batch, targets=targets)
    f, params = tdhook.functionalize(model)
    compiled = torch.compile(_ours, fullgraph=True, dynamic=False)
    found = [
        Competitor("ours", {"": lambda: _ours(f, params, x, targets)}),
        Competitor("ours, compiled", {"": lambda: compiled(f, params, x, targets)}),
        Competitor(PLAIN, {"": _unlike(_plain(model, x, targets))}, view=_nothing, note="another number; a bound"),
    ]
    if not options.quick:
        run = _unlike(_plain(torch.compile(model, dynamic=False), x, targets))
        found.append(Competitor(f"{PLAIN}, compiled model", {"": run}, view=_nothing, note="another number; a bound"))
    if INSTALLED:
        found.append(Competitor(ZENNIT, {"": _zennit(model, x, targets)}))
    if options.peers.exists() and not targets:
        parameters = {"method": "lrp", "threads": options.threads, "width": width, "batch": batch}
        found.append(Competitor("tdhook 0.3.0 (PyPI)", {"": Remote(options.peers, "tdhook_pypi.py", parameters)}))
    return found


def _ours(f: Any, params: Any, x: Tensor, targets: Sequence[int]) -> Tensor:
    """[B, width], or [T, B, width]"""
    return lrp(f, params, x, rules=epsilon_plus(), targets=list(targets) if targets else _total)


def _total(output: Tensor) -> Tensor:
    return output.sum(-1)


def _plain(model: Callable, x: Tensor, targets: Sequence[int]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        given = x.clone().requires_grad_()
        output = model(given)
        scalars = [output[:, t].sum() for t in targets] or [output.sum()]
        rows = [torch.autograd.grad(s, given, retain_graph=s is not scalars[-1])[0] * x for s in scalars]
        return torch.stack(rows) if targets else rows[0]

    return run


def _zennit(model: torch.nn.Module, x: Tensor, targets: Sequence[int]) -> Callable[[], Tensor]:
    """One forward, and a backward for each target."""
    import copy

    hooked = copy.deepcopy(model)  # it stays hooked, and `model` is also what others run
    zennit().composites.EpsilonPlus().register(hooked)

    def run() -> Tensor:
        given = x.clone().requires_grad_()
        output = hooked(given)
        if not targets:
            return torch.autograd.grad(output, given, output.detach())[0]
        rows = []
        for t in targets:
            start = torch.zeros_like(output)
            start[:, t] = output[:, t].detach()
            rows.append(torch.autograd.grad(output, given, start, retain_graph=t != targets[-1])[0])
        return torch.stack(rows)

    return run


def _agree(width: int, targets: Sequence[int]) -> bool:
    """Whether ours and zennit's numbers are the same in double precision, for four examples."""
    model, x = mlp(width, 4, targets=targets)
    model, x = model.double(), x.double()
    theirs = _zennit(model, x, targets)()
    return bool((_ours(*tdhook.functionalize(model), x, targets) - theirs).abs().max() <= 1e-8 * theirs.abs().max())


def _unlike(run: Callable[[], Any]) -> Callable[[], list]:
    """A run whose numbers are not compared."""

    def discarded() -> list:
        run()
        return []

    return discarded


def _nothing(result: Any) -> list:
    return []
