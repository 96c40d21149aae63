"""The lowest of many scores, an exact number of them: by ranks, so that the number may be a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.compat import is_compiling, is_wrapped
from ..core.errors import InputError
from ..core.structure import describe

Amount = int | float | Tensor


def require_amount(amount: Any, name: str = "amount") -> None:
    """Raises `InputError` unless `amount` is a fraction from 0 to 1 (float) or a count (int), or a tensor [] of either."""
    allowed = "a float from 0 to 1 (a fraction), an int (a count), or a tensor of shape [] of either"
    if isinstance(amount, Tensor):
        if amount.ndim or amount.dtype is torch.bool or amount.is_complex():
            sweep = f"; for several use torch.func.vmap over {name}" if amount.ndim else ""
            raise InputError(f"{name} is {allowed}, got {describe(amount)}{sweep}.")
        if is_compiling() or is_wrapped(amount) or amount.is_meta:
            return
        amount = amount.item()
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise InputError(f"{name} is {allowed}, got {describe(amount)}.")
    if isinstance(amount, float) and not 0 <= amount <= 1:
        raise InputError(f"{name}={amount!r} is a fraction, which is from 0 to 1; for a count give an int.")
    if amount < 0:
        raise InputError(f"{name}={amount!r} is a count, which is not negative.")


def count_of(amount: Amount, total: int, what: str, name: str = "amount") -> int | Tensor:
    """How many of `total` an amount is: `round(amount * total)` for a fraction, to the even number at a half.

    Raises `InputError` for a count larger than `total`.
    """
    if isinstance(amount, Tensor):
        if amount.is_floating_point():
            return (amount.double() * total).round().long()
        if not (is_compiling() or is_wrapped(amount) or amount.is_meta):
            count_of(int(amount), total, what, name)
        return amount.long()
    if isinstance(amount, float):
        return round(amount * total)
    if amount > total:
        raise InputError(f"{name}={amount} is a count of more than the {total} in {what}; a fraction is a float, such as 1.0.")
    return amount


def ranks(scores: Tensor) -> Tensor:
    """The rank of each score along the last dimension, from 0 for the lowest; of equal scores the first ones are the lowest.

    Examples:
        >>> ranks(torch.tensor([3.0, 1.0, 2.0, 1.0])).tolist()
        [3, 0, 2, 1]
    """
    order = scores.sort(dim=-1, stable=True).indices  # torch 2.1 has no batching rule for argsort
    # half the memory, which is what reading the ranks again for every amount costs
    dtype = torch.int32 if scores.shape[-1] < 2**31 else torch.int64
    positions = torch.arange(scores.shape[-1], device=scores.device, dtype=dtype).expand(scores.shape)
    return torch.zeros_like(order, dtype=dtype).scatter(-1, order, positions)


def above_lowest(scores: Tensor, count: int | Tensor) -> Tensor:
    """False for the `count` lowest scores along the last dimension, and True for the others.

    Of equal scores the first ones are the lowest. Scores that do not depend on a vmap around are sorted once for all counts.

    Examples:
        >>> above_lowest(torch.tensor([3.0, 1.0, 2.0, 1.0]), 2)
        tensor([ True, False,  True, False])
    """
    if isinstance(count, Tensor) or is_compiling() or is_wrapped(scores):
        return ranks(scores) >= count
    if not count:
        return torch.ones_like(scores, dtype=torch.bool)
    # One threshold is found in a seventh of the time of a sort.
    threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    return ~(below | (equal & (equal.cumsum(-1) <= count - below.sum(-1, keepdim=True))))


def require_ordered(name: str, scores: Tensor) -> None:
    """Raises `InputError` for NaN, which has no rank, where values can be looked at."""
    if not (is_compiling() or is_wrapped(scores) or scores.is_meta) and bool(scores.isnan().any()):
        raise InputError(f"{name} holds NaN, which cannot be ranked.")
