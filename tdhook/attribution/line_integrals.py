"""The integral of the gradient along a path, in reverse mode, in forward mode, or through a narrow site.

Each takes a `Path`, the nodes of a quadrature, and gives the same numbers at another cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import einsum
from torch import Tensor
from torch.func import vjp, vmap

from ..core.batching import chunks, pull_each, vmap_or_loop
from ..core.compat import is_compiling, is_wrapped
from ..core.explained import Explained
from ..core.forward_mode import push_forward
from ..core.groups import Groups
from ..core.progress import Progress
from ..core.targets import Targets, select
from .paths import Path, straight


@dataclass(frozen=True)
class Nodes:
    """Where the gradient is taken.

    Attributes:
        alphas: Tensor [S], or [S, *B] where each example has nodes of its own.
        weights: of the same shape.
    """

    alphas: Tensor
    weights: Tensor

    @classmethod
    def of(cls, alphas: Sequence[float], weights: Sequence[float], like: Tensor) -> Nodes:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return cls(
            torch.tensor(alphas, dtype=dtype, device=like.device), torch.tensor(weights, dtype=dtype, device=like.device)
        )

    @classmethod
    def padded(cls, rules: Sequence[tuple[Any, Any]], batch: tuple[int, ...], like: Tensor) -> Nodes:
        """Nodes and weights (arrays) for each example; one that has fewer than another gets some of weight zero."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        longest = max(len(alphas) for alphas, _ in rules)
        shape = (longest, len(rules))
        both = torch.full(shape, 0.5, dtype=dtype), torch.zeros(shape, dtype=dtype)
        for e, rule in enumerate(rules):
            for padded, given in zip(both, rule):
                padded[: len(given), e] = torch.from_numpy(given).to(dtype)
        alphas, weights = (padded.reshape(longest, *batch).to(like.device) for padded in both)
        return cls(alphas, weights)

    def __len__(self) -> int:
        return len(self.alphas)

    def __getitem__(self, part: slice) -> Nodes:
        return Nodes(self.alphas[part], self.weights[part])


@dataclass(frozen=True)
class Integrand:
    """What is integrated.

    Attributes:
        path: of the tensors that move.
        targets: the scalars F.
        multiply: whether the gradient is multiplied by the velocity of the path.
        groups: features to sum over, or None.
        several: filled by `scores`: whether there are several targets.
    """

    path: Path
    targets: Targets
    multiply: bool
    groups: Groups | None = None
    several: list[bool] = field(default_factory=list)

    def scores(self, moved: Sequence[Tensor]) -> Tensor:
        """The target values [*B, T]."""
        return self.chosen(self.path.explained.evaluate(moved))

    def ends(self) -> tuple[Tensor, Tensor]:
        """F at the start of the path and at its end, each [T, *B]: two forward passes."""
        start, end = self.path.ends_of_curve()
        return self.scores(start).movedim(-1, 0), self.scores(end).movedim(-1, 0)

    def scores_at_end(self) -> Tensor:
        """The target values [*B, T] of the inputs themselves, without a gradient: one forward pass."""
        with torch.no_grad():
            return self.scores(self.path.ends)

    def batched(self) -> bool:
        """Whether there is a batch axis."""
        return self.scores_at_end().ndim > 1

    def chosen(self, output: Any) -> Tensor:
        values, plural = select(self.targets, output)
        self.several.append(plural)
        return values


def no_progress(done: int, total: int) -> None:
    """What is called where nobody asked for progress."""


def integrate_in_reverse(what: Integrand, nodes: Nodes, chunk_size: int | None, progress: Progress) -> list[Tensor]:
    """One forward pass per node, and one backward pass per node and target. Each result is [T, *shape], or [T, *B, G]."""
    totals: list[Tensor] = []
    progress(0, len(nodes))
    for chunk in chunks(len(nodes), chunk_size):
        at_once = None if chunk_size is None else max(1, chunk_size // len(nodes[chunk]))
        totals = _added(totals, _chunk_in_reverse(what, nodes[chunk], at_once))
        progress(chunk.stop, len(nodes))
    if what.multiply and what.path.curve is straight:
        totals = [g * (end - start) for g, start, end in zip(totals, what.path.starts, what.path.ends)]
    return totals if what.groups is None else [what.groups.sums(totals)]


def _chunk_in_reverse(what: Integrand, nodes: Nodes, targets_at_once: int | None) -> list[Tensor]:
    """The same for some of the nodes, all at once. On its own, so that what autograd keeps is freed before the next chunk."""
    points = vmap(what.path.points)(nodes.alphas)
    curved = what.multiply and what.path.curve is not straight
    velocities = vmap(what.path.velocities)(nodes.alphas) if curved else None

    def shifted(shifts: list[Tensor]) -> Tensor:
        # One shift for all path points: its gradient is already the sum over them.
        along = shifts if velocities is None else [v * shift for v, shift in zip(velocities, shifts)]
        return vmap_or_loop(what.scores, [point + shift for point, shift in zip(points, along)])

    chosen, pull, *_ = vjp(shifted, [torch.zeros_like(end) for end in what.path.ends])
    cotangent = nodes.weights.to(chosen.dtype).reshape(*nodes.weights.shape, *[1] * (chosen.ndim - nodes.weights.ndim))
    (gradients,) = pull_each(pull, chosen, cotangent, targets_at_once)
    return list(gradients)


def integrate_forward(what: Integrand, groups: Groups, nodes: Nodes, chunk_size: int | None, progress: Progress) -> Tensor:
    """One forward-mode pass per node and group of features, whatever the number of targets. The result is [T, *B, G]."""
    total: list[Tensor] = []
    progress(0, len(nodes))
    for chunk in chunks(len(nodes), chunk_size):
        at_once = None if chunk_size is None else max(1, chunk_size // len(nodes[chunk]))
        parts = [_chunk_forward(what, groups, some, nodes[chunk]) for some in chunks(groups.count, at_once)]
        total = _added(total, [torch.cat(parts)])
        progress(chunk.stop, len(nodes))
    return total[0].movedim(0, -1).movedim(-2, 0)  # [G, *B, T] -> [T, *B, G]


def _chunk_forward(what: Integrand, groups: Groups, some: slice, nodes: Nodes) -> Tensor:
    """Derivatives along the groups, summed over the nodes: [G, *B, T]."""
    masks = groups.masked(torch.eye(groups.count, device=nodes.alphas.device)[some])

    def derivatives(alpha: Tensor) -> Tensor:
        points, velocities = what.path.points(alpha), what.path.velocities(alpha)
        if not what.multiply:
            velocities = [torch.ones_like(v) for v in velocities]

        def along(present: list[Tensor]) -> Tensor:
            tangents = [v * mask.to(v.dtype) for v, mask in zip(velocities, present)]
            return push_forward(what.scores, (points,), (tangents,))[1]

        return vmap(along)(masks)

    each = vmap_or_loop(derivatives, nodes.alphas)  # [S, G, *B, T]
    weights = nodes.weights.to(each.dtype)
    return (each * weights.reshape(len(weights), 1, *weights.shape[1:], *[1] * (each.ndim - 1 - weights.ndim))).sum(0)


def integrate_through(
    what: Integrand, head: Explained, tail: Explained, nodes: Nodes, chunk_size: int | None, progress: Progress
) -> list[Tensor]:
    """One backward pass per node and coordinate of the narrow site, whatever the number of targets.

        dF_t/dx = sum_h dF_t/dh dh/dx

    Args:
        what: the path and the targets.
        head: the narrow site's value as a function of the tensors that move.
        tail: the output as a function of the narrow site's value.
        nodes, chunk_size, progress: as for the others.

    Returns:
        As `integrate_in_reverse`.
    """
    totals: list[Tensor] = []
    first: Tensor | None = None  # dF/dh at the first node, as long as it is the same at all others
    summed: list[Tensor] = []
    progress(0, len(nodes))
    width = head.evaluate(head.values)[(0,) * int(what.batched())].numel()
    for chunk in chunks(len(nodes), chunk_size and max(1, chunk_size // width)):
        at_once = chunk_size and max(1, chunk_size // len(nodes[chunk]))
        after, before = _two_jacobians(what, head, tail, nodes[chunk], at_once)
        if chunk.start == 0 and not is_compiling() and not is_wrapped(after):
            first = after[:, :1]
        if first is not None and bool((after == first).all()):
            # Linear from the narrow site on: the nodes can be summed up before the product.
            summed = _added(summed, [jacobian.sum(1, keepdim=True) for jacobian in before])
        else:
            totals = _added(totals, _products(after, before))
        progress(chunk.stop, len(nodes))
    return _added(totals, _products(first, summed)) if first is not None and summed else totals


def _two_jacobians(
    what: Integrand, head: Explained, tail: Explained, nodes: Nodes, at_once: int | None
) -> tuple[Tensor, list[Tensor]]:
    """dF/dh [H, S, *B, T], and dh/dx [H, S, *B, *features] times the velocity and the weights of the nodes."""
    points = vmap(what.path.points)(nodes.alphas)
    velocities = vmap(what.path.velocities)(nodes.alphas) if what.multiply else [torch.ones_like(p) for p in points]
    factors = [
        v * nodes.weights.to(v.dtype).reshape(*nodes.weights.shape, *[1] * (v.ndim - nodes.weights.ndim)) for v in velocities
    ]
    narrow, pull, *_ = vjp(lambda moved: vmap_or_loop(head.evaluate, moved), points)  # [S, *B, *H]

    def scores(values: Tensor) -> Tensor:
        return vmap_or_loop(lambda value: what.chosen(tail.evaluate([value])), values)

    lead = scores(narrow).ndim - 1
    units = torch.eye(narrow[(0,) * lead].numel(), dtype=narrow.dtype, device=narrow.device)
    units = units.reshape(-1, *[1] * lead, *narrow.shape[lead:]).expand(-1, *narrow.shape)
    after = vmap(lambda unit: push_forward(scores, (narrow,), (unit,))[1], chunk_size=at_once)(units)

    def pulled(unit: Tensor) -> list[Tensor]:
        products = [b * factor for b, factor in zip(pull(unit)[0], factors)]
        return products if what.groups is None else [what.groups.sums(products)]

    return after, list(vmap(pulled, chunk_size=at_once)(units))


def _products(after: Tensor, before: Sequence[Tensor]) -> list[Tensor]:
    """The sum over coordinates and nodes of [H, S, *B, T] times [H, S, *B, *features]: each [T, *B, *features]."""
    batch, count = after.shape[2:-1], after.shape[-1]
    left = after.reshape(-1, batch.numel(), count)
    results = []
    for jacobian in before:
        features = jacobian.shape[2 + len(batch) :]
        right = jacobian.reshape(-1, batch.numel(), features.numel())
        results.append(einsum(left, right, "h b t, h b d -> t b d").reshape(count, *batch, *features))
    return results


def _added(totals: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
    return [total + part for total, part in zip(totals, parts)] if totals else parts
