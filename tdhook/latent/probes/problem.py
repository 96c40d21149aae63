"""What a fit is given: examples of one or several sites, and one or several labelings of them, checked and stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.batching import chunks
from ...core.checks import require_positive
from ...core.compat import visible
from ...core.errors import InputError
from ...core.structure import describe
from .examples import (
    examples_of,
    found_classes,
    given_classes,
    require_classes,
    require_finite,
    require_labels,
    require_rows,
    weights_of,
)
from .probe import LinearProbe, collected, sites_of

Solve = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Problem:
    """The arguments of a fit, checked.

    Attributes:
        x: what the caller gave: it has the structure of the result.
        groups: for each width, the positions of its sites in the caller's order and their examples, S tensors [N, D].
        y: Tensor [T, N]: for classes their numbers 0 to K - 1 (0 in rows that are absent), for regression values.
        classes: Tensor [T, K], the caller's labels; None for regression.
        weights: Tensor [N], of the examples. An example of weight 0 is absent: nothing that it holds has an effect.
        tasks: the dimensions of y before the last.
    """

    x: Any
    groups: Sequence[tuple[Sequence[int], Sequence[Tensor]]]
    y: Tensor
    classes: Tensor | None
    weights: Tensor
    tasks: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """Whether the result has a leading dimension of sites."""
        return isinstance(self.x, Tensor) and self.x.ndim == 3

    def solve(
        self, solve: Solve, *tasks: Tensor, chunk_size: int | None = None, build: Callable[..., Any] | None = None
    ) -> Any:
        """Fits every site and task, and gives the probes the structure of `x`.

        Args:
            solve: function of x [S, N, D] (in its own dtype, at least float32; absent rows are zero), y [T, N], and `tasks`
                cut like y, to the fields of the probes without `classes`, tensors [S, T, ...]. It is called with at most
                `chunk_size` sites times tasks.
            tasks: more tensors [T, ...].
            chunk_size: how many fits run at once; None for all.
            build: makes a probe of the fields, `classes` and `batch_size`; None: a `LinearProbe`.
        """
        return self.solve_shared(lambda x: partial(solve, x), *tasks, chunk_size=chunk_size, build=build)

    def solve_shared(
        self,
        prepare: Callable[[Tensor], Solve],
        *tasks: Tensor,
        chunk_size: int | None,
        build: Callable[..., Any] | None = None,
    ) -> Any:
        """As `solve`, where `prepare(x)` computes what all tasks share, and returns the function of y and `tasks`."""
        require_positive("chunk_size", chunk_size, optional=True)
        make: Callable[..., Any] = LinearProbe if build is None else build  # dynamo cannot call a class that is a default
        count = len(self.y)
        at_once = chunk_size if chunk_size is not None else count * sum(len(sites) for sites, _ in self.groups)
        results: dict[int, Any] = {}
        for sites, values in self.groups:
            found = []
            for part in chunks(len(sites), max(1, at_once // count)):
                solve = prepare(self._stack(values[part]))
                each = [solve(self.y[c], *(task[c] for task in tasks)) for c in chunks(count, at_once)]
                found.append({name: torch.cat([fields[name] for fields in each], 1) for name in each[0]})
            fields = {name: torch.cat([fields[name] for fields in found]) for name in found[0]}
            batch = (len(sites), *self.tasks)
            fields = {name: field.reshape(*batch, *field.shape[2:]) for name, field in fields.items()}
            classes = None if self.classes is None else self.classes.reshape(*self.tasks, -1).expand(*batch, -1)
            if self.stacked:
                return make(**fields, classes=classes, batch_size=batch)
            for i, site in enumerate(sites):
                own = {name: field[i] for name, field in fields.items()}
                results[site] = make(**own, classes=None if classes is None else classes[i], batch_size=self.tasks)
        if isinstance(self.x, Tensor):
            return results[0]
        return collected({key: results[i] for i, key in enumerate(sites_of(self.x))}, self.x, self.tasks)

    def example_weights(self, class_weight: str | Tensor | None) -> Tensor:
        """Tensor [T, N]: the weight of every example in every task, times that of its class.

        Args:
            class_weight: None; Tensor [K] in the order of `classes`; or `"balanced"`: N / (K N_class), counted in weights.
        """
        weights = self.weights.expand(self.y.shape)
        if class_weight is None:
            return weights
        assert self.classes is not None
        count = self.classes.shape[-1]
        if isinstance(class_weight, str) and class_weight == "balanced":
            numbers = torch.arange(count, device=self.y.device)
            own = torch.where(self.y[:, None] == numbers[:, None], self.weights, 0).sum(-1)
            per_class = torch.where(own > 0, self.weights.sum() / (count * torch.where(own > 0, own, 1)), 0)
            return weights * per_class.gather(1, self.y)
        if not isinstance(class_weight, Tensor) or class_weight.shape != (count,):
            raise InputError(f"class_weight has to be None, 'balanced' or a tensor [{count}], got {describe(class_weight)}.")
        if visible(class_weight) and not (torch.isfinite(class_weight) & (class_weight > 0)).all():
            raise InputError(f"class_weight has to be positive and finite, got {class_weight.tolist()}.")
        return weights * class_weight.detach().to(weights)[self.y]

    def _stack(self, values: Sequence[Tensor]) -> Tensor:
        x = torch.stack(list(values))
        present = (self.weights > 0)[:, None]
        return torch.where(present, x, 0).to(torch.promote_types(x.dtype, torch.float32))


def classification(
    x: Any, y: Any, sample_weight: Tensor | None = None, classes: int | Tensor | None = None, least: int = 1
) -> Problem:
    """The checked problem of a classifier.

    Args:
        x: Tensor [N, D] or [S, N, D], or a mapping of tensors [N, D_site].
        y: integer Tensor [*T, N].
        sample_weight: Tensor [N]; None: 1 for each.
        classes: the labels: Tensor [K], or K for 0 to K - 1; None: those found in y. Every task has as many. Under vmap and
            compilation, where they cannot be looked for, they have to be given.
        least: how many examples every class has at least.
    """
    sites = examples_of(x)
    weights = weights_of(sites, sample_weight)
    require_labels(y, sites[0])
    labels = y.detach().reshape(-1, y.shape[-1])
    labels = labels.to(torch.int64)
    readable = visible(y, weights, *sites)
    if readable:
        require_finite(x, sites, weights)
    given = given_classes(classes, y)
    if given is None:
        if not readable:
            raise InputError("the classes cannot be found in y under vmap or compilation; give them, as in classes=2.")
        given = found_classes(labels, weights)
    else:
        given = given.to(y.device).expand(len(labels), -1)
    matches = labels[..., None] == given[:, None]
    if readable:
        require_classes(labels, matches, given, weights, least)
    codes = torch.where(weights > 0, matches.to(torch.int8).argmax(-1), 0)
    return Problem(x, _groups(sites), codes, given.to(y.dtype), weights, tuple(y.shape[:-1]))


def regression(x: Any, y: Any, sample_weight: Tensor | None = None, least: int = 1) -> Problem:
    """The checked problem of a regression: as `classification`, with numbers y [*T, N]; `least` counts all examples."""
    sites = examples_of(x)
    weights = weights_of(sites, sample_weight)
    require_rows(y, sites[0])
    if y.is_complex():
        raise InputError(f"y has to be real, got {describe(y)}.")
    values = y.detach().reshape(-1, y.shape[-1])
    if not values.is_floating_point():
        values = values.to(weights.dtype)
    present = weights > 0
    if visible(y, weights, *sites):
        require_finite(x, sites, weights)
        if not torch.isfinite(values[:, present]).all():
            raise InputError("y holds NaN or infinite values; give their examples a sample_weight of 0, or leave them out.")
        if present.sum() < least:
            raise InputError(f"{int(present.sum())} examples with a positive weight, but at least {least} are needed.")
    values = torch.where(present, values, 0).to(torch.promote_types(values.dtype, torch.float32))
    return Problem(x, _groups(sites), values, None, weights, tuple(y.shape[:-1]))


def _groups(sites: Sequence[Tensor]) -> list[tuple[list[int], list[Tensor]]]:
    """Sites of equal width and dtype together."""
    groups: dict[Any, tuple[list[int], list[Tensor]]] = {}
    for i, site in enumerate(sites):
        positions, values = groups.setdefault((site.shape[1], site.dtype), ([], []))
        positions.append(i)
        values.append(site)
    return list(groups.values())
