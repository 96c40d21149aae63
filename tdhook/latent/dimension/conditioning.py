"""Activations as sets of points: one for each channel, or one for each position."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.errors import InputError
from ...core.structure import describe
from .estimates import of_sites


@of_sites(0)
def per_channel(x: Any, *, channel: int = 1) -> Tensor:
    """One set of points for each channel: what varies is where it is active.

    Args:
        x: Tensor [N, C, *positions], or a mapping from sites to such tensors.
        channel: the axis of the channels; -1 for tokens [N, T, C].

    Returns:
        Tensor [C, N, F] with F positions; or a TensorDict of them keyed by site.

    Raises:
        InputError: fewer than three dimensions, a `channel` that is no axis after the first.

    Examples:
        >>> per_channel(torch.randn(10, 3, 4, 5)).shape
        torch.Size([3, 10, 20])
    """
    return _channels_first(x, channel).flatten(2)


@of_sites(0)
def per_position(x: Any, *, channel: int = 1) -> Tensor:
    """One set of points for each position: what varies is which channels are active there.

    Args:
        x: Tensor [N, C, *positions], or a mapping from sites to such tensors.
        channel: the axis of the channels; -1 for tokens [N, T, C].

    Returns:
        Tensor [P, N, C] with P positions, in order; or a TensorDict of them keyed by site.

    Raises:
        InputError: as `per_channel`.

    Examples:
        >>> per_position(torch.randn(10, 3, 4, 5)).shape
        torch.Size([20, 10, 3])
    """
    return _channels_first(x, channel).flatten(2).permute(2, 1, 0)


def _channels_first(x: Any, channel: int) -> Tensor:
    """[C, N, *positions]."""
    if not isinstance(x, Tensor) or x.ndim < 3:
        raise InputError(f"x is {describe(x)}; a tensor [N, C, *positions] of three or more dimensions is expected.")
    whole = isinstance(channel, int) and not isinstance(channel, bool)
    if not whole or channel not in range(-x.ndim + 1, x.ndim) or channel == 0:
        raise InputError(f"channel={channel!r} is no axis of x after the first; x is {describe(x)}.")
    return x.movedim(channel, 0)
