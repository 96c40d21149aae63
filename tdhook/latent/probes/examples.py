"""Checks of what a fit is given: examples, labels and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ...core.checks import require_positive
from ...core.compat import visible
from ...core.errors import InputError
from ...core.structure import describe
from .probe import sites_of


def examples_of(x: Any) -> list[Tensor]:
    """The examples [N, D] of every site, without gradients."""
    if isinstance(x, (Mapping, TensorDictBase)):
        keys = sites_of(x)
        if not keys:
            raise InputError("x has no site; give at least one tensor [N, D].")
        values = [x[key] for key in keys]
        for key, value in zip(keys, values):
            if not isinstance(value, Tensor) or value.ndim != 2:
                raise InputError(f"x has {describe(value)} at the site {key!r}, where a tensor [N, D] is expected.")
            _require_examples(value, f"x at the site {key!r}")
            if value.shape[0] != values[0].shape[0]:
                raise InputError(
                    f"x has {values[0].shape[0]} rows at the site {keys[0]!r} and {value.shape[0]} at {key!r}; "
                    "every site needs the same examples."
                )
            if value.device != values[0].device:
                raise InputError(f"x is on {values[0].device} at the site {keys[0]!r} and on {value.device} at {key!r}.")
    elif isinstance(x, Tensor) and x.ndim in (2, 3):
        _require_examples(x, "x")
        values = [x] if x.ndim == 2 else list(x)
    else:
        raise InputError(f"x has to be a tensor [N, D] or [S, N, D], or a mapping of tensors [N, D], got {describe(x)}.")
    return [value.detach() for value in values]


def _require_examples(value: Tensor, name: str) -> None:
    if not value.is_floating_point():
        raise InputError(f"{name} has to be floating-point, got {describe(value)}.")
    if 0 in value.shape:
        raise InputError(f"{name} is empty: {describe(value)}.")


def weights_of(sites: Sequence[Tensor], sample_weight: Tensor | None) -> Tensor:
    first = sites[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    if sample_weight is None:
        return torch.ones(first.shape[0], dtype=dtype, device=first.device)
    if not isinstance(sample_weight, Tensor) or sample_weight.shape != first.shape[:1] or sample_weight.is_complex():
        raise InputError(f"sample_weight has to be a real tensor [{first.shape[0]}], got {describe(sample_weight)}.")
    weights = sample_weight.detach().to(first.device, dtype)
    if visible(weights):
        if not torch.isfinite(weights).all() or (weights < 0).any():
            raise InputError("sample_weight holds negative, infinite or NaN values; weights are at least 0.")
        if not (weights > 0).any():
            raise InputError("sample_weight is 0 everywhere; give at least one example a positive weight.")
    return weights


def require_rows(y: Any, x: Tensor) -> None:
    if not isinstance(y, Tensor) or y.ndim == 0:
        raise InputError(f"y has to be a tensor [*T, {x.shape[0]}], got {describe(y)}.")
    if y.shape[-1] != x.shape[0]:
        raise InputError(f"y has {y.shape[-1]} examples in its last dimension, x has {x.shape[0]} rows; they have to match.")
    if 0 in y.shape:
        raise InputError(f"y has no task: {describe(y)}.")
    if y.device != x.device:
        raise InputError(f"y is on {y.device}, x on {x.device}.")


def require_labels(y: Any, x: Tensor) -> None:
    require_rows(y, x)
    if y.is_floating_point() or y.is_complex():
        raise InputError(f"y has to hold integer labels, got {describe(y)}; use y.long(), or a regression such as `ridge`.")


def require_finite(x: Any, sites: Sequence[Tensor], weights: Tensor) -> None:
    present = (weights > 0)[:, None]
    for i, site in enumerate(sites):
        if not (torch.isfinite(site) | ~present).all():
            where = f" (site {i})" if isinstance(x, Tensor) and x.ndim == 3 else ""
            where = where if isinstance(x, Tensor) else f" at the site {sites_of(x)[i]!r}"
            raise InputError(
                f"x holds NaN or infinite values{where}; give their examples a sample_weight of 0, or leave them out."
            )


def given_classes(classes: Any, y: Tensor) -> Tensor | None:
    if classes is None:
        return None
    if isinstance(classes, int) and not isinstance(classes, bool):
        require_positive("classes", classes, least=2)
        return torch.arange(classes, device=y.device)
    if not isinstance(classes, Tensor) or classes.ndim != 1 or len(classes) < 2 or classes.is_floating_point():
        raise InputError(f"classes has to be an integer tensor [K] or a number K, K at least 2, got {describe(classes)}.")
    return classes.to(torch.int64)


def found_classes(labels: Tensor, weights: Tensor) -> Tensor:
    """The labels of every task [T, K]."""
    found = [torch.unique(task[weights > 0]) for task in labels]
    for i, own in enumerate(found):
        if len(own) < 2:
            raise InputError(
                f"y has one class only, {own.tolist()}, in task {i} of {len(labels)}; a classifier needs at least two "
                "among the examples with a positive weight."
            )
        if len(own) != len(found[0]):
            raise InputError(
                f"y has {len(found[0])} classes in task 0 and {len(own)} in task {i}; fit them in separate calls, or give "
                "all labels as classes."
            )
    return torch.stack(found)


def require_classes(labels: Tensor, matches: Tensor, classes: Tensor, weights: Tensor, least: int) -> None:
    present = weights > 0
    unknown = ~matches.any(-1) & present
    if unknown.any():
        raise InputError(f"y has the label {int(labels[unknown][0])}, which is none of the classes {classes[0].tolist()}.")
    counts = (matches & present[:, None]).sum(1)
    if (counts < least).any():
        task, position = (int(i) for i in (counts < least).nonzero()[0])
        raise InputError(
            f"class {int(classes[task, position])} has {int(counts[task, position])} examples with a positive weight in task "
            f"{task}, but at least {least} are needed."
        )
