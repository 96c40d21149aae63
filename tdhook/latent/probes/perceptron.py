"""Training of many perceptrons at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from ...core.randomness import uniform
from .descent import Adam, Layout, differentiable, each_job, usable
from .frame import frame
from .newton import all_true

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Training:
    """How every perceptron is trained: a function of x [S, N, D] and y [T, N] to tensors [S, T, ...]."""

    weights: Tensor
    hidden: tuple[int, ...]
    activation: Callable[[Tensor], Tensor]
    outputs: int
    labels: bool
    weight_decay: float
    learning_rate: float
    epochs: int
    batch_size: int | None
    validation: float
    patience: int
    standardize: bool
    seed: int

    def __call__(self, x: Tensor, y: Tensor, several: Tensor | None = None) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        count = x.shape[1]
        layout = self._layout(x.shape[-1])
        start = layout.pack(self._start(layout, generator, x))
        held = self._held_out(generator, count)
        weights = torch.where(held, 0, self.weights)
        weights = weights / weights.sum()
        checks = torch.where(held, self.weights, 0)
        framed = frame(x, weights, standardize=self.standardize, center=self.standardize)
        center, scale = framed.mean[:, None, None], framed.scale[:, None, None]
        z = (x - center[:, 0]) / scale[:, 0]
        target = y.to(x.dtype) if several is None else several.mT.to(x.dtype)
        if not self.labels:
            values = frame(target[..., None], weights, standardize=self.standardize, center=self.standardize)
            target = (target - values.mean) / values.scale

        def loss(flat: Tensor, z: Tensor, y: Tensor, w: Tensor) -> Tensor:
            return (w * self._losses(forward(layout.unpack(flat), self.depth, self.activation, z), y)).sum()

        def objective(flat: Tensor, z: Tensor, y: Tensor, w: Tensor) -> Tensor:
            sizes = [value.square().sum() for name, value in layout.unpack(flat).items() if name.startswith("weight")]
            return loss(flat, z, y, w) + self.weight_decay / 2 * torch.stack(sizes).sum()

        gradient, value = each_job(grad(objective)), each_job(loss)
        with differentiable():
            z, target, weights, checks, start = (usable(t) for t in (z, target, weights, checks, start))
            flat = start.expand(len(x), len(target), -1)
            best, least = flat, torch.full(flat.shape[:-1], torch.inf, dtype=flat.dtype, device=flat.device)
            waited = taken = torch.zeros(flat.shape[:-1], dtype=torch.int64, device=flat.device)
            state = Adam()
            for epoch in range(1, self.epochs + 1):
                stopped = waited >= self.patience
                if all_true(stopped):
                    break
                for rows in self._batches(generator, count, x.device):
                    share = count / len(rows)  # a batch stands for all
                    slope = gradient(flat, z[:, rows], target[:, rows], share * weights[rows])
                    moved, state = state.step(flat, slope, self.learning_rate)
                    flat = torch.where(stopped[..., None], flat, moved)
                checked = value(flat, z, target, checks) if self.validation else -flat.new_full(flat.shape[:-1], float(epoch))
                better = (checked < least) & ~stopped
                best, least = torch.where(better[..., None], flat, best), torch.where(better, checked, least)
                taken = torch.where(better, epoch, taken)
                waited = torch.where(better, 0, waited + 1)
            final = value(best, z, target, weights)
        found = layout.unpack(best.detach())
        # The units of the activations again, and those of the values.
        found["weight0"] = found["weight0"] / scale
        found["bias0"] = found["bias0"] - (found["weight0"] * center).sum(-1)
        if not self.labels:
            last = self.depth - 1
            found[f"weight{last}"] = found[f"weight{last}"] * values.scale[..., None]
            found[f"bias{last}"] = found[f"bias{last}"] * values.scale + values.mean
            final = final * values.scale[:, 0].square()
        return {**found, "loss": final.detach(), "epochs": taken}

    @property
    def depth(self) -> int:
        return len(self.hidden) + 1

    def _layout(self, width: int) -> Layout:
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (before, after) in enumerate(pairwise([width, *self.hidden, self.outputs])):
            shapes |= {f"weight{i}": (after, before), f"bias{i}": (after,)}
        return Layout(shapes)

    def _start(self, layout: Layout, generator: torch.Generator, like: Tensor) -> dict[str, Tensor]:
        """Parameters as those of a new `torch.nn.Linear`."""
        values: dict[str, Tensor] = {}
        for i in range(self.depth):
            bound = layout.shapes[f"weight{i}"][1] ** -0.5
            for name in (f"weight{i}", f"bias{i}"):
                drawn = uniform(layout.shapes[name], generator, like.device, torch.float32)
                values[name] = (bound * (2 * drawn - 1)).to(like.dtype)
        return values

    def _held_out(self, generator: torch.Generator, count: int) -> Tensor:
        """Which examples are held out: a share of those that are present."""
        drawn = uniform((count,), generator, self.weights.device)
        present = self.weights > 0
        rank = torch.where(present, drawn, 2).argsort().argsort()
        return present & (rank < (self.validation * present.sum()).ceil())

    def _batches(self, generator: torch.Generator, count: int, device: torch.device) -> Sequence[Any]:
        if self.batch_size is None or self.batch_size >= count:
            return [torch.arange(count, device=device)]
        return torch.randperm(count, generator=generator).to(device).split(self.batch_size)

    def _losses(self, scores: Tensor, y: Tensor) -> Tensor:
        """The loss of each example [N] for scores [N, K]."""
        if not self.labels:
            return (scores[:, 0] - y).square() / 2
        if y.ndim == 2:
            return F.binary_cross_entropy_with_logits(scores, y, reduction="none").mean(-1)
        if self.outputs == 1:
            return F.binary_cross_entropy_with_logits(scores[:, 0], y, reduction="none")
        return F.cross_entropy(scores, y.long(), reduction="none")


def forward(layers: Any, depth: int, activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Scores [*batch, N, K] of x [*batch, N, D]."""
    for i in range(depth):
        x = (activation(x) if i else x) @ layers[f"weight{i}"].mT + layers[f"bias{i}"][..., None, :]
    return x
