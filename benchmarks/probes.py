"""Logistic probes of every layer and label, in one call."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tdhook.latent.probes.logistic import logistic

from .case import Case, Competitor, Goal, Options

TITLE = "Logistic probes of every layer and label"
INTRODUCTION = """\
Binary L2 logistic regression (strength 1, standardised activations, float64) of every site and label. Activations are
correlated as in a residual stream: the spectrum falls as a power law, sites share most of their variance, one
coordinate is fifty times as large as the others; labels follow a direction with noise. Ours is one call for all sites
and labels. scikit-learn is a loop over them of `LogisticRegression` on activations that `StandardScaler` scaled once
for each site, with the faster of two solvers, at tolerances at which the weights agree to 1e-4 of the largest one; in
the full case a tenth of the sites is timed, and its time multiplied by ten. Ours is run to its own tolerance, at which
it is the more accurate one."""

LOOP = "scikit-learn, a loop"


def cases(options: Options) -> Iterator[Case]:
    sites, labels, examples, width = (2, 10, 1000, 288) if options.quick else (30, 10, 2000, 576)
    timed = sites if options.quick else sites // 10
    yield Case(
        f"{sites} sites, {labels} labels, {examples} examples of {width} coordinates",
        {"sites": sites, "labels": labels, "examples": examples, "width": width},
        partial(_competitors, sites, labels, examples, width, timed),
        tolerance=1e-4,
        goals=(Goal("ours", LOOP, 5.0),),
        memory=not options.quick,
        seconds=3 if options.quick else 60,
    )


def activations(sites: int, labels: int, examples: int, width: int) -> tuple[dict[str, Tensor], Tensor]:
    """Activations [N, D] of every site, and binary labels [T, N] that they tell in part."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    spectrum = (1 + torch.arange(width, dtype=torch.float64)).rsqrt()
    shared = draw(examples, width)
    x = {}
    for site in range(sites):
        rotation = torch.linalg.qr(draw(width, width)).Q
        values = ((shared + 0.5 * draw(examples, width)) * spectrum) @ rotation + 1
        x[f"layers.{site}"] = values * torch.where(torch.arange(width) == 7, 50, 1)
    scores = shared @ (draw(labels, width) * spectrum).mT
    return x, (2 * scores / scores.std(0) + draw(examples, labels) > 0).long().mT


def _competitors(sites: int, labels: int, examples: int, width: int, timed: int) -> list[Competitor]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, y = activations(sites, labels, examples, width)
    some = {name: values.numpy() for name, values in list(x.items())[:timed]}

    def ours(chunk_size: int | None) -> Tensor:
        """[S, T, D], in the units of the activations."""
        return torch.stack([probe.weight[:, 0] for probe in logistic(x, y, chunk_size=chunk_size).values()])

    def loop(solver: str, tolerance: float) -> Tensor:
        found = []
        for values in some.values():
            scaler = StandardScaler().fit(values)
            scaled = scaler.transform(values)
            for label in y.numpy():
                model = LogisticRegression(tol=tolerance, max_iter=10_000, solver=solver).fit(scaled, label)
                found.append(torch.from_numpy(model.coef_[0] / scaler.scale_))
        return torch.stack(found).unflatten(0, (len(some), -1))

    settings = {"lbfgs": 1e-7, "newton-cholesky": 1e-6}
    return [
        Competitor("ours", {"": partial(ours, None), f"chunk_size={labels}": partial(ours, labels)}),
        Competitor(
            LOOP,
            {f"{solver}, tol={tolerance:g}": partial(loop, solver, tolerance) for solver, tolerance in settings.items()},
            view=lambda whole: whole[:timed],
            scale=sites / timed,
            note="" if timed == sites else f"{timed} of {sites} sites were timed",
        ),
    ]
