"""Fits of many bilinear forms at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value

from ...core.randomness import normal
from .descent import Layout, differentiable, each_job, lbfgs, usable
from .frame import frame


@dataclass(frozen=True)
class Training:
    """How every bilinear probe is fitted: a function of joined pairs [S, N, D1 + D2] and y [T, N] to tensors [S, T, ...]."""

    weights: Tensor
    split: int
    outputs: int
    rank: int | None
    floating: bool
    strength: float
    standardize: bool
    steps: int
    tolerance: float
    seed: int

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        framed = frame(x, self.weights, standardize=self.standardize, center=self.standardize)
        first, second = framed.x[..., : self.split], framed.x[..., self.split :]
        target, weights = y.to(x.dtype), self.weights.to(x.dtype)
        if self.floating:
            values = frame(target[..., None], weights, standardize=self.standardize, center=self.standardize)
            target = values.x[..., 0]
        if self.floating and self.rank is None:
            found, gradient = closed_form(first, second, target, weights, self.strength), None
        else:
            found, gradient = self._descend(first, second, target, weights)
        scores = bilinear_scores(first[:, None, None], second[:, None, None], found["left"], found.get("right"))
        scores = (scores + found["bias"][..., None]).mT
        loss = (weights * self._losses(scores, target.expand(scores.shape[:-1]))).sum(-1) / weights.sum()
        if self.floating:
            unit = values.scale[..., None]
            found["bias"] = found["bias"] * unit[..., 0] + values.mean
            side = "left" if self.rank is None else "right"
            found[side] = found[side] * unit[..., None]
            loss = loss * values.scale[:, 0].square()
        first_scale, second_scale = framed.scale[:, None, None, None].split([self.split, second.shape[-1]], -1)
        if self.rank is None:
            found["left"] = found["left"] / (second_scale.mT * first_scale)
        else:
            found["left"], found["right"] = found["left"] / first_scale, found["right"] / second_scale
        means = framed.mean[:, None].expand(-1, len(target), -1)
        found |= {"first_mean": means[..., : self.split], "second_mean": means[..., self.split :]}
        return {**found, "loss": loss, "gradient": torch.zeros_like(loss) if gradient is None else gradient}

    def _descend(self, first: Tensor, second: Tensor, y: Tensor, weights: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        widths = first.shape[-1], second.shape[-1]
        rows = widths[1] if self.rank is None else self.rank
        shapes = {"left": (self.outputs, rows, widths[0]), "bias": (self.outputs,)}
        if self.rank is not None:
            shapes["right"] = (self.outputs, rows, widths[1])
        layout = Layout(shapes)
        total = weights.sum()

        def objective(flat: Tensor, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
            p = layout.unpack(flat)
            first, second = x.split(widths, -1)
            scores = (bilinear_scores(first[None], second[None], p["left"], p.get("right")) + p["bias"][:, None]).mT
            size = p["left"].square().sum() + (p["right"].square().sum() if self.rank else 0)
            return ((w * self._losses(scores, y)).sum() + self.strength / 2 * size) / total

        slopes = each_job(grad_and_value(objective))
        with differentiable():
            x, y, weights, start = (usable(t) for t in (torch.cat([first, second], -1), y, weights, self._start(layout, first)))

            def evaluate(flat: Tensor) -> tuple[Tensor, Tensor]:
                gradient, value = slopes(flat, x, y, weights)
                return value, gradient

            found = lbfgs(evaluate, start.expand(len(x), len(y), -1), steps=self.steps, tolerance=self.tolerance)
        return layout.unpack(found.parameters.detach()), found.gradient.detach()

    def _start(self, layout: Layout, like: Tensor) -> Tensor:
        """Zero for a convex problem; else small random factors, as zero is a saddle of it."""
        generator = torch.Generator().manual_seed(self.seed)
        values = {}
        for name, shape in layout.shapes.items():
            drawn = self.rank is not None and name != "bias"
            value = normal(shape, generator, like.device, torch.float32) / shape[-1] ** 0.5 if drawn else like.new_zeros(shape)
            values[name] = value.to(like.dtype)
        return layout.pack(values)

    def _losses(self, scores: Tensor, y: Tensor) -> Tensor:
        """The loss of each example [*lead, N] for scores [*lead, N, C]."""
        if self.floating:
            return (scores[..., 0] - y).square() / 2
        if self.outputs == 1:
            return F.softplus(scores[..., 0]) - y * scores[..., 0]
        return scores.logsumexp(-1) - scores.gather(-1, y.long()[..., None])[..., 0]


def closed_form(first: Tensor, second: Tensor, y: Tensor, weights: Tensor, strength: float) -> dict[str, Tensor]:
    """The ridge regression on all products of coordinates, with an intercept.

    In N unknowns, the products of the pairs are (x1 . x1') (x2 . x2'), so that D1 D2 products are never made; or in D1 D2.

    Args:
        first, second: Tensor [S, N, D1] and [S, N, D2].
        y: Tensor [T, N].
        weights: Tensor [N].
        strength: above 0.
    """
    count, widths = first.shape[1], (first.shape[-1], second.shape[-1])
    root = weights.sqrt()[:, None]
    if widths[0] * widths[1] <= count:
        z = (second[..., :, None] * first[..., None, :]).flatten(-2)
        share = (weights / weights.sum())[:, None]
        center, middle = (share * z).sum(-2, keepdim=True), (share * y.mT).sum(0, keepdim=True)
        z = root * (z - center)
        normal_matrix = z.mT @ z + strength * torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        found = torch.linalg.solve(normal_matrix, z.mT @ (root * (y.mT - middle))).mT
        bias = middle[0] - (found * center).sum(-1)
        left = found.unflatten(-1, widths[::-1])
    else:
        kernel = root * (first @ first.mT) * (second @ second.mT) * root.mT
        kernel = kernel + strength * torch.eye(count, dtype=kernel.dtype, device=kernel.device)
        sides = torch.linalg.solve(kernel, torch.cat([root, root * y.mT], -1).expand(len(first), -1, -1))
        of_one, of_y = sides[..., :1], sides[..., 1:]
        bias = (root * of_y).sum(-2) / (root * of_one).sum(-2)
        dual = (root * (of_y - of_one * bias[..., None, :])).mT
        left = torch.einsum("stn,snd,sne->sted", dual, first, second)
    return {"left": left[:, :, None], "bias": bias[..., None]}


def bilinear_scores(first: Tensor, second: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """Scores [*lead, C, N] of [*lead, 1, N, D1] and [*lead, 1, N, D2]."""
    return ((first @ left.mT) * (second if right is None else second @ right.mT)).sum(-1)
