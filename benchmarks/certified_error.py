"""Integrated gradients at a certified error: captum's documented procedure against `steps="auto"`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from tdhook.attribution.integrated_gradients import integrated_gradients

from .captum_loops import EACH
from .case import Case, Competitor, Goal, Options
from .networks import KINDS, digits, functional, images, network, trained

TITLE = "Integrated gradients at a certified error"
INTRODUCTION = """\
Ten targets, zero baseline; the convergence delta has to be below 1e-3 of F(x) - F(x') for every example and target.
Captum by its documented procedure: for each target `n_steps` is doubled from 10 until its convergence delta says so,
and all attempts are its time. Ours: one call with `steps="auto", tolerance=1e-3`. Both results are checked against
2,000 Gauss–Legendre points: whether every attribution is within 1e-3 of F(x) - F(x') of its example and target.

The networks (those of `attribution_targets`) are smooth, with random weights, or trained for a moment on the images of
MNIST, where F along the path is less of a polynomial. Captum takes 10 points at least, even where 3 do. Where passes
dominate, T targets at S points cost captum 2 T S of them and ours S' (1 + T), and one for each of the 17 or more samples
of F in the search: with T = 10, S = 10 and S' = 4 that is a ratio of 3, with S' = 10 one of 1.6, and more where captum
has to double S."""

TOLERANCE, MOST, REFERENCE, TARGETS = 1e-3, 5120, 2000, list(range(10))
OURS = 'ours, steps="auto"'
GELU, SILU = nn.GELU, nn.SiLU


def cases(options: Options) -> Iterator[Case]:
    for kind in KINDS:
        yield _case(kind, False, GELU, options)
        if not options.quick or kind == "MLP":
            yield _case(kind, True, GELU, options)
    if not options.quick:
        yield _case("MLP", True, SILU, options)
        yield _case("CNN", True, SILU, options)


def _case(kind: str, learnt: bool, activation: Callable, options: Options) -> Case:
    batch = 1 if options.quick else 16 if kind == "MLP" else 4
    weights = "trained" if learnt else "random weights"
    build = partial(_build, kind, learnt, activation, batch)
    return Case(
        f"{kind}, {activation.__name__}, {weights}",
        {"network": kind, "targets": len(TARGETS), "batch": batch, "tolerance": TOLERANCE},
        partial(_competitors, build, options),
        # Both are near the truth, and their distance is a share of the largest attribution.
        tolerance=2e-2,
        goals=(Goal(OURS, EACH, 4.0),),
        claims={} if options.quick and kind != "MLP" else _claims(build),
        memory=not options.quick and learnt,
        seconds=3 if options.quick else 30,
    )


def _build(kind: str, learnt: bool, activation: Callable, batch: int) -> tuple[nn.Module, Tensor]:
    if learnt:
        return trained(kind, activation), digits()[0][:batch]
    return network(kind, 10, activation=activation).requires_grad_(False), images(batch)


def _competitors(build: Callable[[], tuple[nn.Module, Tensor]], options: Options) -> list[Competitor]:
    model, x = build()
    sizes = (None, 4) if options.quick else (None, 10, 2)
    note = "all attempts from 10 steps on, until its convergence delta is small enough"
    return [
        Competitor(
            OURS, {f"chunk_size={c}": partial(_ours, model, x, c) for c in ((None, 4) if options.quick else (None, 20, 4))}
        ),
        Competitor(EACH, {f"internal_batch_size={n and n * len(x)}": partial(_captum, model, x, n) for n in sizes}, note=note),
    ]


def _ours(model: nn.Module, x: Tensor, chunk_size: int | None) -> Tensor:
    f, params = functional(model)
    result = integrated_gradients(f, params, x, targets=TARGETS, steps="auto", tolerance=TOLERANCE, chunk_size=chunk_size)
    if not result.converged.all():
        raise RuntimeError(f"not converged: errors {result.error.max():.2g}")
    return result.attributions


def _captum(model: nn.Module, x: Tensor, points: int | None) -> Tensor:
    """The differences are computed here, once for all targets: captum returns the delta only."""
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(model)
    size = None if points is None else points * len(x)
    with torch.no_grad():
        differences = (model(x) - model(torch.zeros_like(x))).abs()
    found = []
    for target in TARGETS:
        steps = 10
        while True:
            attribution, delta = method.attribute(
                x, target=target, n_steps=steps, internal_batch_size=size, return_convergence_delta=True
            )
            if (delta.abs() < TOLERANCE * differences[:, target]).all():
                break
            steps *= 2
            if steps > MOST:
                raise RuntimeError(f"captum's delta of target {target} is not small enough at {MOST} steps")
        found.append(attribution)
    return torch.stack(found)


def _claims(build: Callable[[], tuple[nn.Module, Tensor]]) -> dict[str, Callable[[], bool]]:
    """What is said about the errors; the reference is computed once."""

    def within(explain: Callable[[nn.Module, Tensor], Tensor]) -> bool:
        return _error(explain, *build()) <= TOLERANCE

    return {
        f"{name}: no attribution is further than {TOLERANCE:g} of F(x) - F(x') from the reference": partial(within, explain)
        for name, explain in ((OURS, lambda m, x: _ours(m, x, 20)), (EACH, lambda m, x: _captum(m, x, 10)))
    }


def _error(explain: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, x: Tensor) -> float:
    """The greatest error of an attribution, relative to F(x) - F(x')."""
    f, params = functional(model)
    reference = integrated_gradients(f, params, x, targets=TARGETS, steps=REFERENCE, chunk_size=20)
    with torch.no_grad():
        differences = (model(x) - model(torch.zeros_like(x))).abs().T
    errors = (explain(model, x) - reference).abs().flatten(2).amax(-1)
    return float((errors / differences).max())
