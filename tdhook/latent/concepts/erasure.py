"""Erasure of concepts from activations: LEACE, and orthogonal projections to compare with."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import tensorclass
from torch import Tensor

from ...core.compat import visible
from ...core.errors import InputError
from ...core.structure import describe
from .covariances import Covariances, covariances, wide_dtype
from .directions import as_directions, orthonormal


@tensorclass
class Eraser:
    """An affine map that removes a subspace: r(x) = x - write read (x - center).

    It is a function of a value, and so a write of `tdhook.intervene(f, {site: eraser})`.

    Attributes:
        center: Tensor [D], which stays where it is.
        write: Tensor [D, r], what is taken away.
        read: Tensor [r, D], how much of it. `write read` is a projection, orthogonal or oblique.
    """

    center: Tensor
    write: Tensor
    read: Tensor

    def __call__(self, value: Tensor, axis: int = -1) -> Tensor:
        """The value with the concept erased along an axis of D numbers: the last, or 1 for maps [B, C, H, W]."""
        size = self.center.shape[-1]
        if not -value.ndim <= axis < value.ndim or value.shape[axis] != size:
            raise InputError(
                f"the eraser is for {size} features, the value is {describe(value)}; where another axis than {axis} has them, "
                "write lambda value: eraser(value, axis=1)."
            )
        center = self.center
        moved = value.movedim(axis, -1).to(torch.promote_types(value.dtype, center.dtype))
        erased = moved - ((moved - center) @ self.read.mT) @ self.write.mT
        return erased.to(value.dtype).movedim(-1, axis)

    def __hash__(self) -> int:  # transforms keep tables of what they write
        return id(self)

    @property
    def rank(self) -> Tensor:
        """How many dimensions are removed: Tensor []."""
        return (self.read != 0).any(-1).sum(-1)


def leace(x: Tensor | Covariances, z: Tensor | None = None) -> Eraser:
    """The eraser after which no linear predictor of z does better than a constant, and which changes x least.

        r(x) = x - W^+ P W (x - mean x),    W = cov(x)^(-1/2),    P = orthogonal projection on the columns of W cov(x, z)

    Args:
        x: activations [*N, D]; or the `Covariances` of a stream, without z.
        z: the concept: booleans or floats [*N]; integers [*N], which are class labels; or [*N, K], such as one-hot classes or
            several concepts at once.

    Returns:
        `Eraser`, of rank at most K (k - 1 for k classes). Under `torch.func.vmap`, as over layers, a batch of them.

    Raises:
        InputError: shapes that do not fit, NaN, one example only, a z that does not vary, class labels whose number cannot be
            seen (under vmap and compilation; give one-hot classes).

    The covariance of r(x) and z is exactly zero, on the data that it was fitted to; with fewer examples than features that may
    say little about others. The map is an oblique projection about the mean: applied twice it does what it does once.

    Cost: the product x'x, an eigendecomposition of [D, D], a singular value decomposition of [D, K], in float64.

    Source: Belrose et al., "LEACE: Perfect linear concept erasure in closed form" (2023), theorem 4.3.

    Examples:
        >>> z = torch.arange(100) % 2 == 0
        >>> x = torch.randn(100, 3) + z[:, None] * torch.tensor([2.0, 1.0, 0.0])
        >>> eraser = leace(x, z)
        >>> erased = eraser(x)
        >>> torch.allclose(erased[z].mean(0), erased[~z].mean(0), atol=1e-5)
        True
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
        >>> tdhook.intervene(f, {"0": eraser})(params, torch.ones(1, 2)).shape
        torch.Size([1, 3])
    """
    known, dtype = _known("leace", x, z)
    sizes, vectors = torch.linalg.eigh(known.xx / known.count)
    kept = sizes > sizes[-1:] * len(sizes) * torch.finfo(sizes.dtype).eps
    roots = torch.where(kept, sizes, torch.ones_like(sizes)).sqrt()
    whiten, color = ((vectors * (kept * power)) @ vectors.mT for power in (1 / roots, roots))
    left, strengths, _ = torch.linalg.svd(whiten @ (known.xz / known.count), full_matrices=False)
    # What is left of a combination of concepts that does not vary, as the sum of one-hot classes, is rounding.
    columns = left * (strengths > strengths[:1] * torch.finfo(strengths.dtype).eps ** 0.5)
    return _eraser(known.mean_x, color @ columns, columns.mT @ whiten, dtype)


def mean_projection(x: Tensor | Covariances, z: Tensor | None = None) -> Eraser:
    """The orthogonal projection that erases z: it removes the span of cov(x, z), for classes that of the differences of means.

    It erases as completely as `leace`, is symmetric, and changes x more.

    Args:
        x: as for `leace`.
        z: as for `leace`.

    Returns:
        `Eraser` about the mean of x.

    Raises:
        InputError: as `leace`.

    Cost: the product x'z and a singular value decomposition of [D, K].

    Source: Belrose et al. (2023), section 4; for two classes Haghighatkhah et al., "Better Hit the Nail on the Head than Beat
    around the Bush" (2022).

    Examples:
        >>> eraser = mean_projection(torch.tensor([[1.0, 5], [3, -5], [0, 5], [0, -5]]), torch.tensor([1, 1, 0, 0]))
        >>> eraser(torch.tensor([7.0, 8.0]))
        tensor([1., 8.])
    """
    known, dtype = _known("mean_projection", x, z)
    left, strengths, _ = torch.linalg.svd(known.xz, full_matrices=False)
    columns = left * (strengths > strengths[:1] * torch.finfo(strengths.dtype).eps ** 0.5)
    return _eraser(known.mean_x, columns, columns.mT, dtype)


def project_out(directions: Any, *, center: Tensor | None = None) -> Eraser:
    """The orthogonal projection that removes the span of directions.

    Args:
        directions: Tensor [D] or [K, D], `ConceptVectors`, or a fitted probe.
        center: Tensor [D], which stays where it is: the mean of the activations; None: the origin.

    Returns:
        `Eraser`.

    Raises:
        InputError: directions of zeros, or of another shape; a center that does not fit.

    Examples:
        >>> project_out(torch.tensor([0.0, 2.0]))(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 0.]])
    """
    rows = as_directions("directions", directions)
    if rows.ndim > 2:
        raise InputError(f"directions has shape {list(rows.shape)}; give [D] or [K, D].")
    rows = torch.atleast_2d(rows)
    if center is not None and (not isinstance(center, Tensor) or center.shape != rows.shape[1:]):
        raise InputError(f"center is {describe(center)} for directions of {rows.shape[1]} numbers; give a tensor [D].")
    basis = orthonormal(rows.to(wide_dtype(rows)))
    return _eraser(torch.zeros_like(basis[0]) if center is None else center, basis.mT, basis, rows.dtype)


def _eraser(center: Tensor, write: Tensor, read: Tensor, dtype: torch.dtype) -> Eraser:
    kept = torch.promote_types(dtype, torch.float32)
    return Eraser(center=center.to(kept), write=write.to(kept), read=read.to(kept), batch_size=[])  # type: ignore[call-arg]


def _known(method: str, x: Any, z: Any) -> tuple[Covariances, torch.dtype]:
    """The covariances, and the dtype of the activations (float32 for those of a stream)."""
    if isinstance(x, Covariances):
        if z is not None:
            raise InputError(f"{method} takes covariances alone, or x and z.")
        known, dtype = x, torch.float32
    else:
        if not isinstance(z, Tensor):
            raise InputError(f"z is {describe(z)}; give the concept of each example as a tensor [*N] or [*N, K].")
        known, dtype = covariances(x, _as_concepts(x, z)), x.dtype
        if visible(z) and (z == z.reshape(-1, *z.shape[x.ndim - 1 :])[0]).all():
            raise InputError("z is the same for all examples, so there is nothing to erase; give examples with and without it.")
    if visible(known.count) and known.count < 2:
        raise InputError(f"{method} needs at least two examples, got {int(known.count)}.")
    return known, dtype


def _as_concepts(x: Any, z: Tensor) -> Tensor:
    """Class labels [*N] as one-hot [*N, K]; what else z may be, as it is."""
    labels = not (z.is_floating_point() or z.is_complex() or z.dtype == torch.bool)
    if not labels or not isinstance(x, Tensor) or z.ndim != x.ndim - 1 or not z.numel():
        return z
    if not visible(z):
        raise InputError("z holds class labels whose number cannot be seen under vmap or compilation; give one-hot classes.")
    _, labels_from_zero = z.unique(return_inverse=True)
    return torch.nn.functional.one_hot(labels_from_zero)
