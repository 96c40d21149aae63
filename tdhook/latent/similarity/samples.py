"""What every measure does first: rows that belong together are checked and centred, in a precision that sums keep.

A measure is two functions: `prepare`, which looks at one representation (its Gram matrix, its neighbours), and `between`,
which compares two that are prepared. So S representations are prepared S times for all of their S^2 pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ...core.compat import is_compiling, is_wrapped
from ...core.errors import InputError
from ...core.structure import describe


@dataclass(frozen=True)
class Measure:
    """How two representations are compared.

    Attributes:
        prepare: from a representation [*lead, N, D] to tensors [*lead, ...].
        between: from two that are prepared to Tensor [*lead].
        least: number of rows that it needs.
        symmetric: whether the order of the two changes nothing.
        column: from S that are prepared, in a list, and another one, to the S results [S, *lead]; None: `between` under vmap.
        matrix: from all representations and those that they are compared with (None: themselves) to [S1, S2, *lead]; in
            place of all others.
        require: raises for a representation, with its name, that it cannot compare.
    """

    prepare: Callable[[Tensor], Any]
    between: Callable[[Any, Any], Tensor]
    least: int = 2
    symmetric: bool = True
    column: Callable[[list[Any], Any], Tensor] | None = None
    matrix: Callable[[list[Tensor], list[Tensor] | None], Tensor] | None = None
    require: Callable[[str, Tensor], None] | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The measure of one pair."""
        self.check({"x": x, "y": y})
        x, y = together([x, y])
        if self.matrix is not None:
            return self.matrix([x], [y])[0, 0]
        return self.between(self.prepare(x), self.prepare(y))

    def check(self, given: dict[str, Tensor]) -> None:
        """Raises `InputError` unless all are representations of the same examples that can be compared."""
        for name, x in given.items():
            require_samples(name, x, self.least)
            if self.require is not None:
                self.require(name, x)
        require_same_rows(given)


def require_samples(name: str, x: Any, least: int = 2) -> None:
    """Raises `InputError` unless `x` is a floating-point tensor [*lead, N, D] of finite values with at least `least` rows."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or 0 in x.shape:
        raise InputError(f"{name} is {describe(x)}; give a floating-point tensor [*lead, N, D] of N examples.")
    if x.shape[-2] < least:
        raise InputError(f"{name} is {describe(x)}; this measure needs at least {least} examples (rows).")
    if not is_compiling() and not is_wrapped(x) and not x.is_meta and not bool(x.detach().isfinite().all()):
        raise InputError(f"{name} has values that are NaN or infinite; leave those examples out of all representations.")


def require_same_rows(given: dict[str, Tensor]) -> None:
    """Raises `InputError` unless the rows of all tensors can be the same examples."""
    (first, x), *others = given.items()
    for name, y in others:
        if x.shape[:-1] != y.shape[:-1] or x.device != y.device:
            raise InputError(
                f"{first} is {describe(x)} on {x.device} and {name} {describe(y)} on {y.device}; give the same examples "
                "in all of them, [*lead, N, D] with D of their own."
            )


def together(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in the widest of their dtypes, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def centred(x: Tensor, scale: bool = True) -> Tensor:
    """Deviations from the mean of the columns; if `scale`, in units of the largest magnitude, so that no square overflows."""
    if scale:
        largest = x.detach().abs().amax((-2, -1), keepdim=True)
        x = x / torch.where(largest > 0, largest, 1)
    x = x - x.mean(-2, keepdim=True)
    return x - x.mean(-2, keepdim=True)  # the first mean was rounded, which shows where it is large


def normalised(x: Tensor) -> Tensor:
    """Deviations from the mean with a sum of squares of 1; NaN where they are but rounding."""
    deviations = centred(x)
    norm = deviations.square().sum((-2, -1), keepdim=True).sqrt()
    rounding = 4 * torch.finfo(x.dtype).eps * (x.shape[-2] * x.shape[-1]) ** 0.5
    return deviations / torch.where(norm > rounding, norm, torch.nan)


def squared_distances(x: Tensor, scale: bool = False) -> Tensor:
    """Squared Euclidean distances [*lead, N, N] between rows, at least 0, and 0 on the diagonal; scaled as `centred`."""
    x = centred(x, scale)
    norms = x.square().sum(-1)
    squares = (norms[..., :, None] + norms[..., None, :] - 2 * (x @ x.mT)).clamp(min=0)
    return torch.where(torch.eye(x.shape[-2], dtype=torch.bool, device=x.device), 0, squares)


def poisoned(result: Tensor, *given: Tensor) -> Tensor:
    """A result [*lead], NaN where what it was made of, [*lead, N, D], is not finite: indices and ranks do not show it."""
    for x in given:
        result = result + (x.detach() * 0).sum((-2, -1))
    return result


def in_column(measure: Measure, left: list[Any], right: Any) -> Tensor:
    """Several that are prepared alike, compared with another one: [S, *lead]."""
    if measure.column is not None:
        return measure.column(left, right)
    return vmap(measure.between, in_dims=(0, None))(stacked(left), right)


def stacked(prepared: list[Any]) -> Any:
    """Tensors, or tuples of tensors, as one with a leading dimension."""
    first = prepared[0]
    if isinstance(first, Tensor):
        return torch.stack(prepared)
    parts = [torch.stack(each) for each in zip(*prepared)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def unstacked(prepared: Any) -> list[Any]:
    """The reverse of `stacked`."""
    if isinstance(prepared, Tensor):
        return list(prepared.unbind())
    each = zip(*(part.unbind() for part in prepared))
    return [type(prepared)(*parts) if hasattr(prepared, "_fields") else tuple(parts) for parts in each]
