"""Covariances of activations with concepts, all at once or as a stream: what erasure needs to know of data."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import tensorclass
from torch import Tensor

from ...core.compat import visible
from ...core.errors import InputError
from ...core.structure import describe


@tensorclass
class Covariances:
    """Counts, means and sums of products of deviations of activations x and concepts z, in float64 where there is one.

    Attributes:
        count: Tensor [].
        mean_x, mean_z: Tensor [D] and [K].
        xx, xz: Tensor [D, D] and [D, K], sums over the examples, not divided by their number.
    """

    count: Tensor
    mean_x: Tensor
    mean_z: Tensor
    xx: Tensor
    xz: Tensor


def covariances(x: Tensor, z: Tensor) -> Covariances:
    """What `leace` needs to know of data.

    Args:
        x: activations [*N, D]: rows, or tokens [B, L, D].
        z: concepts [*N, K], or [*N] for one; booleans, integers or floats. Classes are one-hot here.

    Returns:
        `Covariances`; add more data with `update_covariances`, or join two with `merge_covariances`.

    Raises:
        InputError: shapes that do not fit, NaN.

    Examples:
        >>> x, z = torch.randn(10, 3), torch.randn(10, 2)
        >>> streamed = update_covariances(covariances(x[:4], z[:4]), x[4:], z[4:])
        >>> torch.allclose(streamed.xz, covariances(x, z).xz)
        True
    """
    rows, concepts = _rows(x, z)
    mean_x, mean_z = rows.mean(0), concepts.mean(0)
    centered = rows - mean_x
    return Covariances(  # type: ignore[call-arg]
        count=mean_x.new_full((), len(rows)),
        mean_x=mean_x,
        mean_z=mean_z,
        xx=centered.mT @ centered,
        xz=centered.mT @ (concepts - mean_z),
        batch_size=[],
    )


def update_covariances(known: Covariances, x: Tensor, z: Tensor) -> Covariances:
    """`known` with more examples; `x` and `z` as for `covariances`."""
    return merge_covariances(known, covariances(x, z))


def merge_covariances(first: Covariances, second: Covariances) -> Covariances:
    """The covariances of two sets of examples together (Chan, Golub, LeVeque, 1979).

    Raises:
        InputError: another number of features or concepts.
    """
    if first.xz.shape != second.xz.shape:
        raise InputError(
            f"covariances of {list(first.xz.shape)} features and concepts do not merge with those of {list(second.xz.shape)}."
        )
    count = first.count + second.count
    shift_x, shift_z = second.mean_x - first.mean_x, second.mean_z - first.mean_z
    part, weight = second.count / count, first.count * second.count / count
    return Covariances(  # type: ignore[call-arg]
        count=count,
        mean_x=first.mean_x + part * shift_x,
        mean_z=first.mean_z + part * shift_z,
        xx=first.xx + second.xx + weight * torch.outer(shift_x, shift_x),
        xz=first.xz + second.xz + weight * torch.outer(shift_x, shift_z),
        batch_size=[],
    )


def _rows(x: Any, z: Any) -> tuple[Tensor, Tensor]:
    """Activations [N, D] and concepts [N, K] in a wide dtype."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or not x.numel():
        raise InputError(f"x is {describe(x)}; give floating-point activations [*N, D].")
    if not isinstance(z, Tensor) or z.is_complex() or z.shape[: x.ndim - 1] != x.shape[:-1] or z.ndim > x.ndim:
        raise InputError(
            f"z is {describe(z)} for activations {list(x.shape)}; give one for each, {list(x.shape[:-1])}, or with a last "
            "dimension K for several concepts."
        )
    rows = x.reshape(-1, x.shape[-1]).to(wide_dtype(x))
    concepts = z.reshape(len(rows), -1).to(rows.dtype)
    if visible(x, z) and not (rows.isfinite().all() and concepts.isfinite().all()):
        raise InputError("x or z holds NaN or infinity.")
    return rows, concepts


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which covariances are summed and decomposed."""
    return torch.float32 if x.device.type == "mps" else torch.float64  # which has no float64
