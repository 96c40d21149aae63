"""What activation maps share: activations read as channels over space, and maps that are rectified and up-sampled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.checks import require_positive
from ..core.errors import InputError
from ..core.explained import moving_leaves
from ..core.structure import describe

Reshape = Callable[[Tensor], Tensor]
Size = tuple[int, ...] | str | None

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def token_grid(height: int | None = None, width: int | None = None, *, prefix: int = 1) -> Reshape:
    """A `reshape` for transformers: the tokens of patches, laid out as the image they come from.

        [B, prefix + H * W, D]  ->  [B, D, H, W]

    Args:
        height: H; it follows from `width`, and without both the grid is square.
        width: W, likewise.
        prefix: how many tokens (class, registers) come before those of the patches; they are left out.

    Returns:
        A function of the value at a site.

    Raises:
        InputError: bad numbers; when it is called, tokens that do not fill such a grid.

    Examples:
        >>> token_grid()(torch.randn(2, 1 + 9, 5)).shape
        torch.Size([2, 5, 3, 3])
        >>> token_grid(width=4, prefix=0)(torch.randn(2, 8, 5)).shape
        torch.Size([2, 5, 2, 4])
    """
    require_positive("height", height, optional=True)
    require_positive("width", width, optional=True)
    require_positive("prefix", prefix, least=0)

    def reshape(tokens: Tensor) -> Tensor:
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            raise InputError(f"token_grid takes tokens [B, N, D], got {describe(tokens)}.")
        patches = tokens.shape[-2] - prefix
        if height is None and width is None:
            side = math.isqrt(max(patches, 0))
            rows, columns = side, side
        else:
            rows = height if height is not None else patches // (width or 1)
            columns = width if width is not None else patches // rows
        if patches < 1 or rows * columns != patches:
            shape = "a square" if height is None and width is None else f"height={height}, width={width}"
            raise InputError(
                f"token_grid: {tokens.shape[-2]} tokens less prefix={prefix} do not fill {shape}; set height, width and prefix."
            )
        return rearrange(tokens[..., prefix:, :], "... (h w) d -> ... d h w", h=rows, w=columns)

    return reshape


def check_options(size: Size, reshape: Reshape | None, chunk_size: int | None) -> None:
    """Raises `InputError` for options that can fit nothing, before anything runs."""
    require_positive("chunk_size", chunk_size, optional=True)
    if reshape is not None and not callable(reshape):
        raise InputError(f"reshape is {describe(reshape)}; give a function such as token_grid().")
    sides = isinstance(size, (tuple, list)) and len(size) > 0
    if sides:
        for side in size:  # type: ignore[union-attr]
            require_positive("a side of size", side)
    if not sides and size is not None and not (isinstance(size, str) and size == "inputs"):
        raise InputError(f"size={size!r} is unknown; give None, one number per spatial axis such as (224, 224), or 'inputs'.")


def as_channels(value: Tensor, reshape: Reshape | None, batch: torch.Size, site: str) -> Tensor:
    """The value at a site as [*batch, C, *spatial]; raises `InputError` where it is not that."""
    given = value if reshape is None else reshape(value)
    lead = len(batch)
    fits = isinstance(given, Tensor) and given.ndim >= lead + 2 and given.shape[:lead] == batch
    if not fits:
        axes = ", ".join([*map(str, batch), "C", "*spatial"])
        after = "" if reshape is None else f", after reshape {describe(given)}"
        fix = "for tokens pass reshape=token_grid()" if reshape is None else "correct reshape"
        raise InputError(
            f"at has {site!r}, which holds {describe(value)}{after}; a map needs [{axes}]: take a site before pooling, or "
            f"{fix}."
        )
    return given


def map_size(size: Size, inputs: Any, lead: int, spatial: int, site: str) -> tuple[int, ...] | None:
    """The size that a map with `spatial` axes is up-sampled to."""
    if size is None:
        return None
    if isinstance(size, str):
        leaves = pytree.tree_flatten(inputs)[0]
        found = [tuple(leaves[i].shape[lead + 1 :]) for i in moving_leaves(leaves)]
        sizes = {each for each in found if len(each) == spatial}
        if len(sizes) != 1:
            raise InputError(
                f"size='inputs' needs one image size with {spatial} axes, as the map of {site!r} has, and inputs is "
                f"{describe(inputs)}; give size as numbers."
            )
        size = sizes.pop()
    if len(size) != spatial:
        raise InputError(
            f"size={tuple(size)} has {len(size)} numbers for the map of {site!r}, which has {spatial} spatial axes."
        )
    if spatial not in _MODES:
        raise InputError(f"size={tuple(size)}: maps have up to 3 axes to be up-sampled, that of {site!r} has {spatial}.")
    return tuple(size)


def resized(maps: Tensor, size: tuple[int, ...] | None) -> Tensor:
    """Maps [..., *spatial] interpolated linearly along each spatial axis, in the convention align_corners=False."""
    if size is None:
        return maps
    lead = maps.shape[: maps.ndim - len(size)]
    images = maps.reshape(-1, 1, *maps.shape[len(lead) :])
    return F.interpolate(images, size=size, mode=_MODES[len(size)], align_corners=False).reshape(*lead, *size)


def finished(maps: Tensor, relu: bool, size: tuple[int, ...] | None) -> Tensor:
    """Maps [..., *spatial] rectified, then up-sampled."""
    return resized(maps.relu() if relu else maps, size)
