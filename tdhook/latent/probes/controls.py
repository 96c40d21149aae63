"""Is it the activations that know, or the probe that learns: control tasks and permuted labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.batching import chunks
from ...core.checks import require_positive
from ...core.errors import InputError
from ...core.estimate import Estimate
from ...core.randomness import integers, require_generator, stacked, uniform
from ...core.structure import describe
from .folds import trainable
from .scoring import Score
from .validation import Fit, mean_over_folds, prepared

ATTEMPTS = 100


class Selectivity(NamedTuple):
    """How much better a probe does on a task than on memorising random labels; each an `Estimate` [*S, *T] over folds.

    Attributes:
        value: the score of the task minus that of its control tasks.
        task: the score of the task.
        control: the mean score of its control tasks.
    """

    value: Estimate
    task: Estimate
    control: Estimate


class PermutationTest(NamedTuple):
    """A score, and what it is where labels have nothing to do with activations.

    Attributes:
        score: Tensor [*S, *T], the mean over folds.
        permuted: Tensor [M, *S, *T], the same for permuted y.
        p_value: Tensor [*S, *T]: (1 + how many of them are at least as good) / (1 + M).
    """

    score: Tensor
    permuted: Tensor
    p_value: Tensor


def selectivity(
    fit: Fit,
    x: Any,
    y: Tensor,
    types: Tensor,
    *,
    controls: int = 1,
    folds: int | Tensor = 5,
    stratified: bool | None = None,
    groups: Tensor | None = None,
    score: str | Score | Callable[..., Tensor] | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    """The score of a probe minus its score on control tasks, which only a probe that memorises can do.

        selectivity = score(y) - mean over controls c of score(y^c),    y^c_i = label drawn for the type of example i

    A control task gives every type (of word, say) one random label, drawn from the labels of y as often as they occur. Probes
    are cross-validated; types are in training and in test folds, so that what was memorised counts.

    Args:
        fit: a fit with its options bound, as for `cross_validate`.
        x: as `fit` takes it, N examples.
        y: labels or values, Tensor [*T, N].
        types: integer Tensor [N], the type of every example.
        controls: how many control tasks for each task.
        folds: as for `cross_validate`.
        stratified: as for `cross_validate`.
        groups: as for `cross_validate`.
        score: as for `cross_validate`.
        generator: for the folds and the control labels.
        chunk_size: how many folds are fitted at once; None for all. The result does not depend on it.

    Returns:
        `Selectivity` of tensors [*S, *T]; for a mapping of sites a dict of them.

    Raises:
        InputError: types that do not match, too few of them for every class to be learned in every fold. Otherwise as
            `cross_validate`.

    Cost: F fits to (1 + controls) T tasks at once.

    Source: Hewitt and Liang, "Designing and Interpreting Probes with Control Tasks" (2019).

    Examples:
        >>> types = torch.arange(200) % 50
        >>> x = torch.randn(50, 8)[types] + 0.1 * torch.randn(200, 8)  # an embedding of each type
        >>> y = (x[:, 0] > 0).long()
        >>> found = selectivity(tdhook.latent.probes.logistic, x, y, types, controls=5)
        >>> found.task.value > found.control.value
        tensor(True)
    """
    require_positive("controls", controls)
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)
    if not isinstance(types, Tensor) or types.ndim != 1 or types.is_floating_point() or len(types) != y.shape[-1]:
        raise InputError(f"types is {describe(types)}; give an integer tensor [{y.shape[-1]}], the type of every example.")
    work, codes = prepared(fit, x, y, folds, stratified, groups, score, False, generator, chunk_size)
    of_type, type_of = torch.unique(types.to(y.device), return_inverse=True)
    flat = codes.reshape(-1, codes.shape[-1])

    def draw() -> list[Tensor]:
        shape = (len(flat), len(of_type))
        for _ in range(ATTEMPTS):
            rows = integers(0, flat.shape[-1], shape, generator, y.device)
            control = flat.gather(1, rows)[:, type_of]
            if work.labels is None or trainable(control, work.labels.shape[-1], work.fold):
                return [control]
        raise InputError(
            f"types has {len(of_type)} types, too few for random labels of them to have every class in every fold; use fewer "
            "folds."
        )

    (drawn,) = stacked(draw, controls)
    found = {}
    for site, (_, scores) in work(torch.cat([flat[None], drawn])).items():
        scores = scores.movedim(-2, 1)  # [F, 1 + controls, *S, T]
        scores = scores.reshape(*scores.shape[:-1], *y.shape[:-1])
        task, control = scores[:, 0], scores[:, 1:].mean(1)
        found[site] = Selectivity(mean_over_folds(task - control), mean_over_folds(task), mean_over_folds(control))
    return found.get(None, found)


def permutation_test(
    fit: Fit,
    x: Any,
    y: Tensor,
    *,
    permutations: int = 100,
    within: Tensor | None = None,
    folds: int | Tensor = 5,
    stratified: bool | None = None,
    groups: Tensor | None = None,
    score: str | Score | Callable[..., Tensor] | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    """How likely a score as good as that of y is, if activations and y have nothing to do with each other.

        p = (1 + #{m: score(permuted y_m) >= score(y)}) / (1 + M)

    Scores are cross-validated with the folds of y, for all sites with the same permutations: these are tasks of one fit. Where
    folds are stratified, labels are permuted within folds, as folds that are stratified for y are not for other orders of it.

    Args:
        fit: a fit with its options bound, as for `cross_validate`.
        x: as `fit` takes it, N examples.
        y: labels or values, Tensor [*T, N].
        permutations: their number M; the smallest possible p is 1 / (1 + M).
        within: integer Tensor [N]: y is exchanged only between examples with the same number, such as those of one subject.
        folds: as for `cross_validate`.
        stratified: as for `cross_validate`.
        groups: as for `cross_validate`.
        score: as for `cross_validate`.
        generator: for the folds and the permutations.
        chunk_size: how many permutations are fitted at once; None for all. The result does not depend on it.

    Returns:
        `PermutationTest` of tensors [*S, *T]; for a mapping of sites a dict of them.

    Raises:
        InputError: as `cross_validate`; a `within` that does not match, or that leaves nothing to permute.

    Cost: F fits to (1 + M) T tasks.

    Source: Ojala and Garriga, "Permutation Tests for Studying Classifier Performance" (2010); Phipson and Smyth, "Permutation
        P-values Should Never Be Zero" (2010).

    Examples:
        >>> x = torch.randn(40, 3)
        >>> y = (x[:, 0] > 0).long()
        >>> permutation_test(tdhook.latent.probes.mean_difference, x, y, permutations=49).p_value
        tensor(0.0200)
    """
    require_positive("permutations", permutations)
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)
    work, codes = prepared(fit, x, y, folds, stratified, groups, score, False, generator, None)
    if groups is None and stratified is not False and not isinstance(folds, Tensor) and not y.is_floating_point():
        stratum = work.fold
    else:
        stratum = torch.zeros_like(work.fold)
    if within is not None:
        if not isinstance(within, Tensor) or within.shape != stratum.shape or within.is_floating_point():
            raise InputError(f"within is {describe(within)}; give an integer tensor [{len(stratum)}].")
        stratum = torch.unique(torch.stack([stratum, within.to(stratum)]), dim=1, return_inverse=True)[1]
    if torch.bincount(stratum).max() < 2:
        raise InputError(
            "no two examples can be exchanged: each has its own fold, or its own number in within; use fewer folds."
        )
    home = stratum.argsort(stable=True)

    def draw() -> list[Tensor]:
        order = uniform(stratum.shape, generator, y.device, torch.float64).argsort()
        order = order[stratum[order].argsort(stable=True)]  # by stratum, at random within each
        return [torch.empty_like(order).scatter(0, home, order)]

    orders = torch.cat([torch.arange(len(home), device=y.device)[None], *stacked(draw, permutations)])
    flat = codes.reshape(-1, codes.shape[-1])
    parts: dict[Any, list[Tensor]] = {}
    for part in chunks(len(orders), chunk_size):
        for site, (_, scores) in work(flat[:, orders[part]].transpose(0, 1)).items():
            parts.setdefault(site, []).append(scores.mean(0).movedim(-2, 0))
    found = {}
    for site, each in parts.items():
        scores = torch.cat(each)
        scores = scores.reshape(*scores.shape[:-1], *y.shape[:-1])
        found[site] = _tested(scores[0], scores[1:], work.score.larger_is_better)
    return found.get(None, found)


def _tested(score: Tensor, permuted: Tensor, larger_is_better: bool) -> PermutationTest:
    gain = permuted - score if larger_is_better else score - permuted
    # What differs by rounding is equal, and counts.
    as_good = gain >= -16 * torch.finfo(score.dtype).eps * score.abs()
    return PermutationTest(score, permuted, (1 + as_good.sum(0)) / (1 + len(permuted)))
