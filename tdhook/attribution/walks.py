"""Walks along the path of the inputs, watched from sites inside the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils import _pytree as pytree

from ..core.batching import chunks, pull_each, vmap_or_loop
from ..core.checks import require_gradients, require_positive
from ..core.derivatives import perturb
from ..core.errors import InputError
from ..core.explained import moving_leaves
from ..core.functional import FunctionalModel
from ..core.quadrature import quadrature_rule
from ..core.reading import stop_at
from ..core.structure import describe
from ..core.targets import Targets, check, select
from ..core.transforms import Sites, exact_wants, require_sites
from ..core.writing import intervene
from .paths import Path, straight_path


@dataclass(frozen=True)
class Walk:
    """A path of the inputs seen from sites.

    Attributes:
        path: of the tensors that move.
        sites: where the model is looked at.
        reached: the values there at the end of the path.
        values: the values there as a function of the tensors that move.
        output: the output as a function of those and of shifts at the sites.
    """

    path: Path
    sites: list[str]
    reached: list[Tensor]
    values: Callable[[list[Tensor]], list[Tensor]]
    output: Callable[[list[Tensor], list[Tensor]], Any]

    def points(self, nodes: tuple[float, ...]) -> list[Tensor]:
        """Path points, each [S, *shape]."""
        end = self.path.ends[0]
        return vmap(self.path.points)(
            torch.tensor(nodes, dtype=torch.promote_types(end.dtype, torch.float32), device=end.device)
        )


def walk_of(f: Any, params: Any, inputs: Any, baselines: Any, along: Sites | None, at: Sites, name: str) -> Walk:
    sites = [str(want.site) for want in exact_wants(f, at, name)]
    if along is None:
        if not moving_leaves(pytree.tree_flatten(inputs)[0]):
            raise InputError(
                f"inputs is {describe(inputs)}, which has no floating-point tensor to move; for token ids pass "
                "along=<site of the embedding>."
            )
        # The path of the identity: its function puts moved tensors into the inputs.
        path = straight_path(lambda _, moved: moved, params, inputs, baselines, None)
    else:
        path = straight_path(f, params, inputs, baselines, along)
        moving = [str(want.site) for want in exact_wants(f, along, "along")]

    def at_point(moved: list[Tensor]) -> tuple[FunctionalModel, Any]:
        if along is None:
            return f, path.explained.evaluate(moved)
        return intervene(f, dict(zip(moving, moved))), inputs

    def values(moved: list[Tensor]) -> list[Tensor]:
        model, point = at_point(moved)
        found = stop_at(model, sites)(params, point)
        return [found[site] for site in sites]

    def output(moved: list[Tensor], shifts: list[Tensor]) -> Any:
        model, point = at_point(moved)
        return perturb(model, sites)(params, point, dict(zip(sites, shifts)))

    reached = values(path.ends)
    for site, value in zip(sites, reached):
        if not value.is_floating_point():
            raise InputError(f"{name} has {site!r}, which holds {describe(value)}; give a site of floating-point values.")
    return Walk(path, sites, reached, values, output)


def checked_rule(
    method: str, f: Any, targets: Targets, steps: int, quadrature: str, chunk_size: int | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The quadrature, after the checks that all of the methods make."""
    rule = quadrature_rule(quadrature, steps)
    require_positive("chunk_size", chunk_size, optional=True)
    check(targets)
    require_sites(f)
    require_gradients(method)
    return rule


def parts_of(steps: int, chunk_size: int | None) -> list[tuple[slice, int | None]]:
    """Chunks of path points, and how many targets are pulled back at once in each."""
    return [(c, None if chunk_size is None else max(1, chunk_size // (c.stop - c.start))) for c in chunks(steps, chunk_size)]


def gradients_at_sites(
    walk: Walk,
    targets: Targets,
    points: list[Tensor],
    weights: tuple[float, ...],
    then: Callable[[list[Tensor]], list[Tensor]],
    targets_at_once: int | None,
) -> tuple[list[Tensor], bool]:
    """What `then` makes of the weighted gradients of a target at the sites, each [S, *shape] for S path points.

    Returns:
        Its results with a leading dimension T, and whether there are several targets.
    """
    several = []

    def scores(both: tuple[list[Tensor], list[Tensor]]) -> Tensor:
        chosen, plural = select(targets, walk.output(*both))
        several.append(plural)
        return chosen

    shifts = [value.new_zeros(1).expand(len(weights), *value.shape) for value in walk.reached]
    chosen, pull, *_ = vjp(lambda moved: vmap_or_loop(scores, (points, moved)), shifts)
    cotangent = torch.tensor(weights, dtype=chosen.dtype, device=chosen.device).reshape(-1, *[1] * (chosen.ndim - 1))
    return pull_each(lambda unit: then(pull(unit)[0]), chosen, cotangent, targets_at_once), several[0]
