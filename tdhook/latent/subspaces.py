"""Subspaces of activations, and interchange interventions on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import warn_if_stochastic
from ..core.compat import visible
from ..core.errors import InputError, SiteError, did_you_mean
from ..core.functional import FunctionalModel
from ..core.reading import Capture
from ..core.structure import describe
from ..core.writing import Intervene
from .patches import Axis, Indices, Mask, View, as_axes, at_indices, grid, views, wants_of, writes
from .prompt_pairs import require_aligned


@dataclass(frozen=True, eq=False)
class Subspace:
    """A part of a space of D dimensions that can be exchanged: what the projection `x @ read @ write` keeps.

    Attributes:
        read: Tensor [D, K].
        write: Tensor [K, D], with `write @ read` the identity; for an orthonormal basis Q [K, D] they are Q^T and Q.
        complemented: whether it is the rest that is meant: what the projection takes away.

    A soft mask m on the dimensions of a rotation R (boundless alignment search) is `Subspace(R * m, R.T)`.
    """

    read: Tensor
    write: Tensor
    complemented: bool = False

    @property
    def complement(self) -> Subspace:
        """The rest of the space; together the two are all of it."""
        return Subspace(self.read, self.write, not self.complemented)

    def project(self, x: Tensor) -> Tensor:
        """The component in the subspace of x, Tensor [..., D]."""
        inside = x @ self.read.to(x) @ self.write.to(x)
        return x - inside if self.complemented else inside

    def exchange(self, base: Tensor, source: Tensor) -> Tensor:
        """`base` with the component of `source` in the subspace: `base + project(source - base)`."""
        return base + self.project(source - base)


def span(directions: Tensor) -> Subspace:
    """The subspace that directions span, with the orthogonal projection onto it.

        P = Q^T Q,    Q an orthonormal basis of the rows

    Args:
        directions: Tensor [K, D], or [D] for one; linearly independent. K = 0 is the empty subspace. The first k columns of a
            rotation R (distributed alignment search) are `span(R[:, :k].T)`. Differentiable.

    Returns:
        `Subspace`.

    Raises:
        InputError: no such tensor; directions that depend on each other.

    Cost: a QR decomposition.

    Examples:
        >>> plane = span(torch.tensor([[1.0, 0, 0], [1.0, 1, 0]]))
        >>> plane.exchange(torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30]))
        tensor([10., 20.,  3.])
        >>> plane.complement.exchange(torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30])).round()
        tensor([ 1.,  2., 30.])
    """
    if not isinstance(directions, Tensor) or not directions.is_floating_point() or directions.ndim not in (1, 2):
        raise InputError(f"directions is {describe(directions)}; give a floating-point tensor [K, D] of K directions.")
    rows = directions[None] if directions.ndim == 1 else directions
    if rows.shape[0] > rows.shape[1]:
        raise InputError(f"directions is {describe(directions)}: more directions than dimensions; they are the rows.")
    exact = rows if rows.dtype == torch.float64 else rows.float()
    scale = torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    basis, triangle = torch.linalg.qr((exact / torch.where(scale > 0, scale, 1)).T)
    if visible(triangle):
        least = max(rows.shape) * torch.finfo(exact.dtype).eps
        if not exact.isfinite().all() or (triangle.diagonal().abs() <= least).any():
            raise InputError("directions holds NaN, or depend on each other; give linearly independent ones.")
    basis = basis.to(directions.dtype)
    return Subspace(basis, basis.T)


def projection(matrix: Tensor) -> Subspace:
    """The subspace onto which a matrix projects, orthogonally or not: `project(x) = x @ matrix`.

    Args:
        matrix: Tensor [D, D] with `matrix @ matrix == matrix`.

    Returns:
        `Subspace`.

    Raises:
        InputError: no square matrix; no projection.

    Cost: a matrix product.

    Examples:
        >>> projection(torch.diag(torch.tensor([1.0, 0]))).project(torch.tensor([5.0, 7]))
        tensor([5., 0.])
    """
    square = isinstance(matrix, Tensor) and matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    if not square or not matrix.is_floating_point():
        raise InputError(f"matrix is {describe(matrix)}; give a projection [D, D]; directions [K, D] go to span.")
    if visible(matrix) and len(matrix):
        exact = matrix if matrix.dtype == torch.float64 else matrix.float()
        error, largest = (exact @ exact - exact).abs().max(), max(1.0, float(exact.abs().max()))
        # of half precision the rounding alone is 0.01
        if not error <= min(1e3 * torch.finfo(matrix.dtype).eps, 0.05) * largest**2:
            raise InputError("matrix is no projection: its square differs from it; for a basis use span.")
    return Subspace(matrix, torch.eye(len(matrix), device=matrix.device).to(matrix.dtype))


def subspace_at(given: Any, site: str, part: Tensor) -> Subspace | None:
    """What is given for a site, which holds `part` [..., D]; None for all of it."""
    if isinstance(given, Mapping):
        if site not in given:
            known = [str(key) for key in given]
            raise SiteError(f"subspaces has no {site!r}." + (did_you_mean(site, known) or f" It has {', '.join(known)}."))
        given = given[site]
    if given is None:
        return None
    space = given if isinstance(given, Subspace) else span(given)
    if part.ndim == 0 or space.read.shape[0] != part.shape[-1]:
        raise InputError(
            f"the subspace has {space.read.shape[0]} dimensions, the last axis at {site!r}, {describe(part)}, has another "
            "number; the directions of a subspace are its rows, [K, D]."
        )
    return space


def interchange(
    f: FunctionalModel,
    params: Any,
    base: Any,
    source: Any,
    *,
    subspaces: Mapping[Any, Any],
    axis: Axis = None,
    positions: Indices | Tensor = None,
) -> Any:
    """The output on one input, with a component of the activations from other inputs.

        f(base; do(a_s <- a_s + P_s (a_s(source_s) - a_s)  for all sites s))

    where a_s is the live value, which earlier interchanges have reached. The sources are read from runs without interventions.
    With the whole space that is activation patching; with the empty one nothing changes; a subspace and its complement, one
    after the other, are the whole space.

    Args:
        f: functional model.
        params: its parameters.
        base: inputs.
        source: inputs of the same structure and shapes; or a list of such, one for each entry of `subspaces`.
        subspaces: for each site (an address or a `HeadLayout`, whose values are [..., heads, size]) a `Subspace` of its last
            axis, directions [K, D] that span one, or None for all of it.
        axis: axis of the values that `positions` count, such as 1 for tokens; or several.
        positions: indices along it where the interchange is made; None for all. For several axes a sequence with one such
            for each. Where they differ between examples, and without `axis`, a bool tensor of the first axes of the values,
            such as [B, L] (`token_span` gives one).

    Returns:
        What `f` returns.

    Raises:
        InputError: inputs that do not align, a subspace of another size, a bool tensor of another shape or with `axis`.
        SiteError: as `capture`. Warns for a model in train mode.

    Cost: one forward pass for each source and one for the base.

    Source: Geiger et al., "Causal Abstractions of Neural Networks" (2021); "Finding Alignments Between Interpretable Causal
    Variables and Distributed Neural Representations" (2024).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity()))
        >>> interchange(f, params, torch.zeros(1, 2), torch.tensor([[3.0, 4]]), subspaces={"0": torch.tensor([[1.0, 0]])})
        tensor([[3., 0.]])
    """
    if not isinstance(subspaces, Mapping) or not subspaces:
        raise InputError(f"subspaces is {describe(subspaces)}; give a mapping from sites to subspaces, None for whole values.")
    groups = [views(f, where, "subspaces") for where in subspaces]
    sources = source if isinstance(source, list) else [source]
    if len(sources) not in (1, len(groups)):
        raise InputError(f"source is a list of {len(sources)} inputs for {len(groups)} sites; give one, or one for each.")
    for each in sources:
        require_aligned(base, each)
    axes = as_axes(axis)
    spots = positions if isinstance(positions, Tensor) and positions.dtype == torch.bool else None
    if spots is not None and axes:
        raise InputError(f"positions is {describe(positions)}, which says itself where; leave out axis={axis!r}.")
    warn_if_stochastic(f, "interchange")

    patches = []
    if len(sources) == 1:
        _, values = Capture(f, wants_of(*groups))(params, sources[0])
    for number, (seen, given) in enumerate(zip(groups, subspaces.values())):
        if len(sources) > 1:
            _, values = Capture(f, wants_of(seen))(params, sources[number])
        for view in seen:
            there = view.of(values[view.name])
            mask = _mask(view, values[view.name], axes, positions) if spots is None else _at(view, there, spots)
            patches.append((view, _exchange(subspace_at(given, view.name, there), there), mask))
    table = writes(patches)
    return Intervene(f, tuple(table), table)(params, base)


def _exchange(space: Subspace | None, source: Tensor) -> Any:
    return source if space is None else lambda there: space.exchange(there, source)


def _mask(view: View, value: Tensor, axes: tuple[int, ...], positions: Any) -> Mask | None:
    lists = grid(view, value, axes, positions)
    return (lambda part: at_indices(part, axes, lists)) if axes else None


def _at(view: View, part: Tensor, spots: Tensor) -> Mask:
    if spots.ndim == 0 or part.shape[: spots.ndim] != spots.shape:
        raise InputError(
            f"positions is {describe(spots)}; {view.name!r} holds {describe(part)}, give a bool tensor of its first axes."
        )
    mask = spots.to(part.device).reshape(*spots.shape, *[1] * (part.ndim - spots.ndim))
    return lambda there: mask
