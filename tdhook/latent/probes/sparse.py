"""Probes that read a few coordinates only: neurons rather than directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.checks import require_positive
from ...core.errors import InputError
from .frame import Frame, frame
from .mean_difference import class_means
from .minimisation import Minimisation, warn_unconverged
from .problem import classification

SCORES = ("mean_difference", "f", "logistic")


def sparse(
    x: Any,
    y: Tensor,
    *,
    k: int,
    score: str = "mean_difference",
    strength: float = 1.0,
    classes: int | Tensor | None = None,
    standardize: bool = True,
    class_weight: str | Tensor | None = None,
    sample_weight: Tensor | None = None,
    fit_intercept: bool = True,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    chunk_size: int | None = None,
) -> Any:
    """A k-sparse probe: the k coordinates that score best, and a logistic regression of these alone.

        mean_difference: score_j = sum over classes of |mean_kj - mean_j|
        f:               score_j = variance of j between classes / variance within
        logistic:        score_j = norm of the weights of j in a logistic regression of all coordinates

    Args:
        x: Tensor [N, D], [S, N, D] for stacked sites, or a mapping of tensors [N, D_site] with the same examples; detached.
        y: integer Tensor [*T, N], labels; leading dimensions are tasks.
        k: how many coordinates every task of every site may read.
        score: `"mean_difference"`, `"f"` or `"logistic"`; all of standardised activations with `standardize`.
        strength: of the L2 penalty, as of `logistic`.
        classes: as of `logistic`.
        standardize: as of `logistic`.
        class_weight: as of `logistic`.
        sample_weight: as of `logistic`.
        fit_intercept: as of `logistic`.
        tolerance: as of `logistic`.
        max_iterations: as of `logistic`.
        chunk_size: how many fits (sites times tasks) run at once; None for all. Each holds N x k values of its own.

    Returns:
        `LinearProbe` with batch size [*T], or [S, *T] for stacked sites, with weights of 0 elsewhere, and `selected` [*batch,
        k]; a mapping of them for a mapping.

    Raises:
        InputError: k above the number of coordinates, an unknown score; otherwise as `logistic`.

    Cost: that of the score, and that of `logistic` for k coordinates, of which no two tasks share a decomposition.

    Source: Gurnee et al., "Finding Neurons in a Haystack: Case Studies with Sparse Probing" (2023).

    Examples:
        >>> x = torch.randn(200, 30)
        >>> probe = sparse(x, (x[:, 7] - x[:, 3] > 0).long(), k=2)
        >>> probe.selected.sort().values, probe.weight.count_nonzero()
        (tensor([3, 7]), tensor(2))
    """
    minimisation = Minimisation("l2", strength, fit_intercept, "auto", tolerance, max_iterations)
    minimisation.require_valid()
    require_positive("k", k)
    if score not in SCORES:
        raise InputError(f"score={score!r} is unknown; choose from {', '.join(SCORES)}.")
    problem = classification(x, y, sample_weight, classes)
    widest = min(sites[0].shape[-1] for _, sites in problem.groups)
    if k > widest:
        raise InputError(f"k={k} is more than the {widest} coordinates of x.")
    weights = problem.example_weights(class_weight)

    def solve(x: Tensor, y: Tensor, weights: Tensor) -> dict[str, Tensor]:
        framed = frame(x, problem.weights, standardize=standardize, center=fit_intercept)
        if score == "logistic":
            dense = minimisation.prepare(framed, problem)(y, weights)["weight"] * framed.scale[:, None, None]
            scores = dense.norm(dim=2)
        else:
            scores = _scores(framed.x, y, weights, len(problem.classes[0]), score)  # type: ignore[index]
        selected = scores.topk(k, dim=-1).indices  # [S, T, k]
        kept = [_kept(framed, selected[:, t], k) for t in range(len(y))]
        fits = [minimisation.prepare(part, problem)(y[t : t + 1], weights[t : t + 1]) for t, part in enumerate(kept)]
        fields = {name: torch.cat([fit[name] for fit in fits], 1) for name in fits[0]}
        rows = fields["weight"].shape[2]
        places = selected[:, :, None].expand(-1, -1, rows, -1)
        empty = torch.zeros_like(fields["weight"][..., :1]).expand(-1, -1, -1, x.shape[-1])
        return {**fields, "weight": empty.scatter(-1, places, fields["weight"]), "selected": selected}

    probes = problem.solve(solve, weights, chunk_size=chunk_size)
    warn_unconverged("sparse", probes)
    return probes


def _scores(x: Tensor, y: Tensor, weights: Tensor, count: int, score: str) -> Tensor:
    """Tensor [S, T, D]."""
    per_task = [_scores_of_task(x, y[t : t + 1], weights[t], count, score) for t in range(len(y))]
    return torch.cat(per_task, 1)


def _scores_of_task(x: Tensor, y: Tensor, weights: Tensor, count: int, score: str) -> Tensor:
    weights = weights.to(x.dtype)
    means = class_means(x, y, weights, count)  # [S, 1, K, D]
    total = weights.sum()
    overall = torch.einsum("n,snd->sd", weights / total, x)[:, None]
    away = means - overall[:, :, None]
    if score == "mean_difference":
        return away.abs().sum(2)
    sizes = torch.where(y[:, None] == torch.arange(count, device=y.device)[:, None], weights, 0).sum(-1)
    between = (away.square() * (sizes / total)[..., None]).sum(2)
    whole = torch.einsum("n,snd->sd", weights / total, (x - overall).square())[:, None]
    within = whole - between
    return torch.where(whole > 0, between / torch.where(within > 0, within, torch.finfo(x.dtype).tiny), 0)


def _kept(framed: Frame, selected: Tensor, k: int) -> Frame:
    """The frame of the selected coordinates [S, k]."""
    x = framed.x.gather(2, selected[:, None].expand(-1, framed.x.shape[1], -1))
    return Frame(x, framed.mean.gather(1, selected), framed.scale.gather(1, selected))
