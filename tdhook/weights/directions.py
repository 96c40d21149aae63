"""Directional edits: a direction removed from everything that writes into the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from ..core.compat import is_compiling, is_wrapped
from ..core.errors import InputError
from ..core.structure import describe
from .selection import Key, by_parameter, parameter_name, replaced, require_params, select_parameters


def orthogonalize(
    params: Any,
    direction: Tensor,
    writers: str | Sequence[str] | Mapping[str, int],
    *,
    strength: float | Tensor = 1.0,
) -> TensorDict:
    """Parameters that can no longer write along a direction.

        W' = W - strength P W along the axis that writes,  P = projection on the direction(s)

    Args:
        params: nested TensorDict.
        direction: Tensor [D], of any length; or [K, D], whose span is removed.
        writers: names or patterns of the parameters that write into the D numbers: output matrices and their biases, and
            embeddings. The axis that writes is the one of length D: the first of an `nn.Linear` [D, in], the last of an
            embedding [V, D] or a `Conv1D` [in, D], the only one of a bias. Where both have length D, give a mapping from
            name to axis.
        strength: 1 removes, 0 leaves as it is, 2 reflects; a Tensor [] can be vmapped.

    Returns:
        `params` with new writers; everything else is shared. An embedding that is also the output matrix is changed in both
        roles, so that the output no longer reads the direction.

    Raises:
        ParamsError: unknown writers. InputError: a direction of zeros or of another length, a square matrix without an axis.

    Cost: two products of the direction with each writer.

    Source: Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction" (2024), weight orthogonalisation.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2))
        >>> edited = orthogonalize(params, torch.tensor([2.0, 0.0]), ["weight", "bias"])
        >>> f(edited, torch.ones(1, 3))[0, 0].abs() < 1e-6
        tensor(True)
    """
    require_params("params", params, single=True)
    basis = _basis(direction)
    changed: dict[Key, Tensor] = {}
    for key, axis in _axes(params, writers).items():
        weight = params[key]
        changed[key] = _without(weight, basis, _axis(key, weight, axis, basis.shape[1]), strength)
    return replaced(params, changed)


def _axes(params: Any, writers: Any) -> dict[Key, int | None]:
    if isinstance(writers, Mapping):
        return by_parameter(params, writers, "writers")
    return dict.fromkeys(select_parameters(params, writers, name="writers", least_dims=1))


def _axis(key: Key, weight: Tensor, axis: int | None, size: int) -> int:
    """The axis that writes, counted from 0."""
    name, shape = parameter_name(key), list(weight.shape)
    if axis is not None:
        if not isinstance(axis, int) or not -weight.ndim <= axis < weight.ndim or shape[axis] != size:
            raise InputError(
                f"writers says axis {axis!r} of {name!r}, which has shape {shape}; the direction has {size} numbers."
            )
        return axis % weight.ndim
    fitting = [i for i, length in enumerate(shape) if length == size]
    if not fitting:
        raise InputError(f"direction has {size} numbers, but {name!r} has shape {shape}; name parameters that write into it.")
    if len(fitting) > 1:
        raise InputError(
            f"{name!r} has shape {shape}, where more than one axis could write {size} numbers; give writers as a mapping: "
            f"{{{name!r}: 0}} for nn.Linear, {{{name!r}: 1}} for an embedding or Conv1D."
        )
    return fitting[0]


def _basis(direction: Tensor) -> Tensor:
    """An orthonormal basis [K, D] of the span."""
    if not isinstance(direction, Tensor) or not direction.is_floating_point() or direction.ndim not in (1, 2):
        raise InputError(f"direction is {describe(direction)}; give a floating-point tensor [D], or [K, D] for a subspace.")
    wide = torch.atleast_2d(direction).to(torch.promote_types(direction.dtype, torch.float32))
    lengths = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    visible = not is_compiling() and not is_wrapped(wide)
    if visible and not (lengths > 0).all():
        raise InputError("direction is zero; give one that points somewhere.")
    if len(wide) == 1:
        return wide / lengths
    basis, triangle = torch.linalg.qr((wide / lengths).mT)
    if visible and (triangle.shape[0] < len(wide) or triangle.diagonal().abs().min() < 1e-5):
        raise InputError("direction has rows that depend on each other linearly; give a basis of the subspace.")
    return basis.mT


def _without(weight: Tensor, basis: Tensor, axis: int, strength: float | Tensor) -> Tensor:
    dtype = torch.promote_types(weight.dtype, basis.dtype)
    moved, basis = weight.to(dtype).movedim(axis, -1), basis.to(dtype)
    written = (moved @ basis.mT) @ basis
    return (moved - strength * written).movedim(-1, axis).to(weight.dtype)
