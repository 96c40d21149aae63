"""Edits of the component of a value along a direction, or in a subspace: removed, clamped, or taken from elsewhere.

All are one formula, with rows B that are an orthonormal basis of the subspace:

    x' = x + (c' - c) B,    c = B x
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.structure import describe
from ..concepts.directions import orthonormal
from .arguments import as_direction, as_strength, per_example, widened
from .edits import Edit
from .positions import Positions, Where, require_columns, require_positions


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Rewrite(Edit):
    """Other coefficients c' [*B, S, K] in a basis [K, D]."""

    basis: Tensor
    coefficients: Callable[[Tensor], Tensor]

    def changed(self, value: Tensor, where: Where) -> Tensor:
        wide, basis = widened("the edit", value, self.basis)
        present = wide @ basis.mT
        return (wide + (self.coefficients(present) - present) @ basis).to(value.dtype)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FromSource(Edit):
    """The coefficients that another value has, column by column."""

    basis: Tensor
    source: Tensor

    def changed(self, value: Tensor, where: Where) -> Tensor:
        wide, basis, source = widened("the edit", value, self.basis, self.source)
        if source.ndim > 1 and source.shape[-2] > 1:
            require_columns(value, where)
            source = self._here(source, where)
        try:
            torch.broadcast_shapes(source.shape, value.shape)
        except RuntimeError:
            raise InputError(
                f"source is {describe(self.source)}, the value is {describe(value)}; give what broadcasts."
            ) from None
        return (wide + ((source - wide) @ basis.mT) @ basis).to(value.dtype)

    def _here(self, source: Tensor, where: Where) -> Tensor:
        """The columns of the source that lie where the value does; zeros for those that it lacks and nobody asked for."""
        size = source.shape[-2]
        last = where.total if self.positions is None else size
        if size < where.prompt or last > size:
            raise InputError(
                f"source has {size} positions where {where.total if size >= where.prompt else where.prompt} are run; give one "
                "for each, one for all, or positions='prompt'."
            )
        missing = max(0, where.stop - size)
        longer = torch.cat([source, source.new_zeros(*source.shape[:-2], missing, source.shape[-1])], -2)
        return longer[..., where.start : where.stop, :]


def project_out(
    directions: Any, *, strength: float | Tensor = 1.0, center: Tensor | None = None, positions: Positions = None
) -> Edit:
    """Directional ablation: the component along directions is removed.

        x' = x - strength * P (x - center),    P = the orthogonal projection on the span of the directions

    Args:
        directions: Tensor [D], or [K, D], whose span is removed; or what has one as `.direction`.
        strength: 1 removes, 0 leaves as it is, 2 reflects; a number, or Tensor [] or [B], one for each example.
        center: Tensor [D], which stays where it is, such as the mean of activations; None: the origin.
        positions: which ones; None for all. See `tdhook.latent.steering.positions`.

    Returns:
        `Edit`: a write of `tdhook.intervene`. Written at all that adds to the residual stream (embeddings, the outputs of
        attention and of MLPs), it keeps the directions out of the stream, as `tdhook.weights.orthogonalize` does with
        parameters; at the outputs of blocks alone, an MLP still reads what the attention of its own block has written.

    Raises:
        InputError: no floating-point directions, zeros, a center that does not fit; when called, a value of another width.

    Source: Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction" (2024), directional ablation.

    Examples:
        >>> project_out(torch.tensor([0.0, 2.0]))(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 0.]])
    """
    require_positions(positions)
    basis = _basis("directions", directions, 2)
    strength = as_strength("strength", strength)
    kept = None
    if center is not None:
        if not isinstance(center, Tensor) or center.shape != basis.shape[1:]:
            raise InputError(f"center is {describe(center)} for directions of {basis.shape[1]} numbers; give a tensor [D].")
        kept = basis @ center.to(basis)

    def removed(present: Tensor) -> Tensor:
        amount = per_example("strength", strength, present)
        return (1 - amount) * present + (0 if kept is None else amount * kept.to(present))

    return Rewrite(basis=basis, coefficients=removed, positions=positions)


def clamp(
    direction: Any,
    value: float | Tensor | None = None,
    *,
    minimum: float | Tensor | None = None,
    maximum: float | Tensor | None = None,
    positions: Positions = None,
) -> Edit:
    """The component along a direction set to a value, or kept within bounds.

        x' = x + (c' - c) u,    u = direction / |direction|,    c = <u, x>,    c' = value, or min(max(c, minimum), maximum)

    Args:
        direction: Tensor [D], or what has one as `.direction`.
        value: the component, in units of activation; a number, or Tensor [] or [B], one for each example.
        minimum: lower bound, as `value`; at least one of the three has to be given, and a value excludes bounds.
        maximum: upper bound, as `value`.
        positions: which ones; None for all. See `tdhook.latent.steering.positions`.

    Returns:
        `Edit`: a write of `tdhook.intervene`.

    Raises:
        InputError: no floating-point direction, zeros, no value and no bound, or both, a minimum above the maximum; when
            called, a value of another width.

    Source: Templeton et al., "Scaling Monosemanticity" (2024). There what is clamped is the activation that the encoder of a
    dictionary gives a feature; here it is the component along the direction.

    Examples:
        >>> clamp(torch.tensor([0.0, 2.0]), 7.0)(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 7.]])
        >>> clamp(torch.tensor([0.0, 2.0]), maximum=1.0)(torch.tensor([[3.0, 4.0], [3.0, -4.0]]))
        tensor([[ 3.,  1.],
                [ 3., -4.]])
    """
    require_positions(positions)
    basis = _basis("direction", direction, 1)
    bounded = minimum is not None or maximum is not None
    if bounded == (value is not None):
        raise InputError("clamp takes a value, or minimum, maximum or both; give one of these.")
    given = {"value": value, "minimum": minimum, "maximum": maximum}
    numbers = {name: as_strength(name, number) for name, number in given.items() if number is not None}
    least, most = numbers.get("minimum"), numbers.get("maximum")
    if isinstance(least, float) and isinstance(most, float) and least > most:
        raise InputError(f"minimum={least:g} is above maximum={most:g}; no component is within these bounds.")

    def clamped(present: Tensor) -> Tensor:
        if "value" in numbers:
            return torch.zeros_like(present) + per_example("value", numbers["value"], present)
        if "minimum" in numbers:
            least = per_example("minimum", numbers["minimum"], present)
            present = torch.where(present < least, least, present)
        if "maximum" in numbers:
            most = per_example("maximum", numbers["maximum"], present)
            present = torch.where(present > most, most, present)
        return present

    return Rewrite(basis=basis, coefficients=clamped, positions=positions)


def replace_component(directions: Any, source: Tensor, *, positions: Positions = None) -> Edit:
    """The component in a subspace taken from another activation: an interchange of that subspace.

        x' = x + P (source - x),    P = the orthogonal projection on the span of the directions

    Args:
        directions: Tensor [D], or [K, D]; or what has one as `.direction`.
        source: Tensor that broadcasts to the value [*B, S, D], such as the same site in another run, or a mean [D]. If it has
            several positions, they are those of the sequence from its start.
        positions: which ones; None for all. See `tdhook.latent.steering.positions`.

    Returns:
        `Edit`: a write of `tdhook.intervene`.

    Raises:
        InputError: no floating-point directions, zeros; when called, a source or a value that does not fit.

    Source: Geiger et al., "Finding Alignments Between Interpretable Causal Variables and Distributed Neural Representations"
    (2023).

    Examples:
        >>> replace_component(torch.tensor([0.0, 2.0]), torch.tensor([8.0, 9.0]))(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 9.]])
    """
    require_positions(positions)
    basis = _basis("directions", directions, 2)
    if not isinstance(source, Tensor) or not source.is_floating_point() or source.ndim == 0:
        raise InputError(f"source is {describe(source)}; give a floating-point tensor that broadcasts to the value.")
    if source.shape[-1] != basis.shape[-1]:
        raise InputError(f"source has {source.shape[-1]} features, the directions have {basis.shape[-1]}.")
    return FromSource(basis=basis, source=source, positions=positions)


def _basis(name: str, given: Any, most: int) -> Tensor:
    """An orthonormal basis [K, D], in float32 at least."""
    rows = torch.atleast_2d(as_direction(name, given, most))
    return orthonormal(rows.to(torch.promote_types(rows.dtype, torch.float32)))
