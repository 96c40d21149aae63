"""Folds of a cross-validation: which examples are tested together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.checks import require_positive
from ...core.errors import InputError
from ...core.structure import describe


def fold_numbers(
    y: Tensor,
    folds: int | Tensor,
    *,
    stratified: bool | None = None,
    groups: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The fold of every example, drawn at random.

    Args:
        y: Tensor [*T, N].
        folds: how many; or the fold of every example, integer Tensor [N] from 0 up, which is returned.
        stratified: whether each class is spread evenly; of several tasks the first one exactly, the others as far as that
            leaves room. None: for integer labels without groups.
        groups: integer Tensor [N]: examples of one group are in one fold, the folds about equally large.
        generator: for the draw.

    Returns:
        Integer Tensor [N].

    Raises:
        InputError: fewer examples or groups than folds, a fold without examples, stratified floating-point values or groups.

    Examples:
        >>> fold_numbers(torch.tensor([0, 0, 0, 0, 1, 1]), 2).bincount()
        tensor([3, 3])
    """
    count = y.shape[-1]
    if isinstance(folds, Tensor):
        return _given(folds, count)
    require_positive("folds", folds, least=2)
    if folds > count:
        raise InputError(f"folds={folds} is more than the {count} examples; give fewer folds.")
    if stratified and (y.is_floating_point() or groups is not None):
        what = "y, which is floating-point" if y.is_floating_point() else "groups"
        raise InputError(f"stratified=True does not go with {what}; leave it out.")
    source = y.device if generator is None else generator.device
    if groups is not None:
        return _of_groups(groups, folds, count, generator).to(y.device)
    order = torch.randperm(count, generator=generator, device=source).to(y.device)
    if stratified or (stratified is None and not y.is_floating_point()):
        stratum = torch.unique(y.reshape(-1, count), dim=1, return_inverse=True)[1]
        order = order[stratum[order].argsort(stable=True)]
    dealt = torch.arange(count, device=y.device) % folds
    return torch.empty_like(dealt).scatter(0, order, dealt)


def require_trainable(codes: Tensor, classes: Tensor, fold: Tensor, tested: bool) -> None:
    """Raises `InputError` where a fold leaves no example of a class to train on or, if it is `tested` by class, to test on.

    Args:
        codes: Tensor [T, N] from 0 to K - 1.
        classes: Tensor [T, K], the labels.
        fold: Tensor [N].
        tested: whether a score needs every class in every fold.
    """
    counts = torch.stack([_counts(codes[:, fold == f], classes.shape[-1]) for f in range(int(fold.max()) + 1)])
    for lacking, what in ((counts.sum(0) - counts == 0, "train"), (counts == 0, "test")):
        if lacking.any() and (tested or what == "train"):
            f, task, code = (int(i) for i in lacking.nonzero()[0])
            raise InputError(
                f"class {int(classes[task, code])} of task {task} has no example to {what} on in fold {f}; use fewer folds, "
                "stratified folds, or other groups."
            )


def trainable(codes: Tensor, count: int, fold: Tensor) -> bool:
    """Whether the training examples of every fold have all classes in every task."""
    folds = range(int(fold.max()) + 1)
    return all(bool((_counts(codes[:, fold != f], count) > 0).all()) for f in folds)


def _counts(codes: Tensor, classes: int) -> Tensor:
    """How often each class occurs: Tensor [T, K]."""
    return (codes[:, None] == torch.arange(classes, device=codes.device)[:, None]).sum(-1)


def _given(folds: Tensor, count: int) -> Tensor:
    if folds.shape != (count,) or folds.is_floating_point() or folds.is_complex() or folds.dtype is torch.bool:
        raise InputError(f"folds is {describe(folds)}; give a number, or an integer tensor [{count}].")
    folds = folds.long()
    sizes = torch.bincount(folds) if folds.min() >= 0 else folds.new_zeros(1)
    if len(sizes) < 2 or (sizes == 0).any():
        raise InputError(f"folds has the numbers {folds.unique().tolist()[:10]}; they are 0 to F - 1 for at least 2 folds F.")
    return folds


def _of_groups(groups: Any, folds: int, count: int, generator: torch.Generator | None) -> Tensor:
    if not isinstance(groups, Tensor) or groups.shape != (count,) or groups.is_floating_point():
        raise InputError(f"groups is {describe(groups)}; give an integer tensor [{count}].")
    _, group, sizes = torch.unique(groups.cpu(), return_inverse=True, return_counts=True)
    if len(sizes) < folds:
        raise InputError(f"groups has {len(sizes)} groups, fewer than folds={folds}; give fewer folds.")
    device = torch.device("cpu") if generator is None else generator.device
    order = torch.randperm(len(sizes), generator=generator, device=device).cpu()
    order = order[sizes[order].argsort(descending=True, stable=True)]
    held, fold_of = [0] * folds, torch.zeros(len(sizes), dtype=torch.int64)
    for g in order.tolist():  # the largest first, each to the smallest fold
        smallest = held.index(min(held))
        fold_of[g] = smallest
        held[smallest] += int(sizes[g])
    return fold_of[group]
