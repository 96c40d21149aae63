"""Occlusion: what the model loses when a window slides over the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.checks import require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.explained import Explained
from ..core.progress import Progress
from ..core.targets import Targets, check
from ..core.transforms import Sites
from .coalitions import Game, game, tracked
from .paths import straight_path

Shape = tuple[int, ...]


def occlusion(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    window: Any,
    stride: Any = 1,
    targets: Targets = None,
    baselines: Any = 0.0,
    at: Sites | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """The change of each target when a window is replaced by its baseline, averaged over the windows that cover an element.

        attribution_i = mean over windows w that contain i of F(x) - F(x with x'_w in place of x_w)

    Windows begin at multiples of `stride`, until one reaches the end of an axis; the last may hang over the end and is then
    smaller. Windows of several tensors slide one after the other, in each the other tensors stay as they are.

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them. Floating-point tensors are occluded, others are passed through.
        window: length of the window on every axis of one example, `(3, 15, 15)` for images [B, 3, H, W]; an int stands for the
            same length on every axis. For several tensors such values in the structure of `inputs` (keyed by site for `at`).
        stride: steps of the window, given in the same way; at most the window, so that every element is covered.
        targets: as for `feature_ablation`.
        baselines: as for `feature_ablation`.
        at: sites: occlude activations there instead of the inputs.
        chunk_size: how many copies of the batch run at once; None for all windows of a tensor.
        progress: called as `progress(done, total)`, in windows, for each tensor anew.

    Returns:
        Attributions in the structure of `inputs` (None in place of what is passed through), or a TensorDict keyed by site for
        `at`; each has the shape of what it explains, with a leading dimension T for plural targets.

    Raises:
        InputError: a window or stride that does not fit; otherwise as `feature_ablation`.

    Cost: one forward pass and one for each window, vmapped, whatever the number of targets.

    Source: Zeiler, Fergus, "Visualizing and Understanding Convolutional Networks" (2014).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2, bias=False))
        >>> x = torch.ones(1, 3)
        >>> got = occlusion(f, params, x, targets=0, window=2)
        >>> w = params["weight"][0]
        >>> torch.allclose(got, torch.stack([w[0] + w[1], w[1] + (w[0] + w[2]) / 2, w[1] + w[2]]), atol=1e-6)
        True
    """
    require_positive("chunk_size", chunk_size, optional=True)
    check(targets)
    warn_if_stochastic(f, "occlusion")
    path = straight_path(f, params, inputs, baselines, at)
    windows, strides = _lengths("window", window, path.explained), _lengths("stride", stride, path.explained)
    played = game(path.explained, path.starts, targets)
    batched = played.whole.ndim - 1
    results = []
    for which, value in enumerate(path.ends):
        sizes = value.shape[batched:]
        shape, step = _fitting(windows[which], strides[which], sizes)
        results.append(_occluded(played, which, sizes, shape, step, chunk_size, progress))
    return played.restructure(results)


def _lengths(name: str, given: Any, what: Explained) -> list[Any]:
    """One int or sequence of ints for each tensor."""
    each = [given] * len(what.values) if isinstance(given, int) else what.flatten(name, given)
    for lengths in each:
        for length in lengths if isinstance(lengths, (tuple, list)) else (lengths,):
            require_positive(f"every length in {name}", length)
    return each


def _fitting(window: Any, stride: Any, sizes: Sequence[int]) -> tuple[Shape, Shape]:
    """Window and stride, one length for each axis of the features."""
    shape, step = (tuple(v) if isinstance(v, (tuple, list)) else (v,) * len(sizes) for v in (window, stride))
    for name, lengths in (("window", shape), ("stride", step)):
        if len(lengths) != len(sizes):
            raise InputError(f"{name}={lengths} is for {len(lengths)} axes, but one example has the shape {list(sizes)}.")
    if any(length > size for length, size in zip(shape, sizes)):
        raise InputError(f"window={shape} is larger than one example, which has the shape {list(sizes)}.")
    if any(s > length for s, length in zip(step, shape)):
        raise InputError(f"stride={step} leaves elements uncovered by window={shape}; give at most the window.")
    return shape, step


def _occluded(
    played: Game,
    which: int,
    sizes: Sequence[int],
    window: Shape,
    stride: Shape,
    chunk_size: int | None,
    progress: Progress | None,
) -> Tensor:
    """The attributions [T, *shape] of one tensor."""
    counts = [math.ceil((size - length) / step) + 1 for size, length, step in zip(sizes, window, stride)]
    # covers[d][w, i]: whether the w-th window along axis d contains i. A window is the product of one row for each axis.
    covers = [_covers(n, size, length, step, played.device) for n, size, length, step in zip(counts, sizes, window, stride)]
    number = torch.arange(math.prod(counts), device=played.device)
    value, start = played.what.values[which], played.starts[which]

    def move(number: Tensor) -> list[Tensor]:
        covered = torch.ones((), dtype=torch.bool, device=value.device)
        for axis in reversed(range(len(counts))):
            row = covers[axis][number % counts[axis]]
            number = number // counts[axis]
            covered = covered & row.reshape(-1, *[1] * (len(counts) - 1 - axis))
        moved = list(played.what.values)
        moved[which] = torch.where(covered, start, value)
        return moved

    runs = [played.each(move, number[part]) for part in tracked(len(number), chunk_size, progress)]
    means = (played.whole - torch.cat(runs)).movedim(0, -1).movedim(-2, 0)  # [T, *B, W]
    means = means.reshape(*means.shape[:-1], *counts)
    for cover in covers:  # the first axis of windows goes, an axis of elements comes last
        weights = (cover / cover.sum(0)).to(means.dtype)
        means = torch.tensordot(means, weights, ([means.ndim - len(counts)], [0]))
    return means


def _covers(count: int, size: int, length: int, step: int, device: torch.device) -> Tensor:
    first = torch.arange(count, device=device)[:, None] * step
    element = torch.arange(size, device=device)
    return (element >= first) & (element < first + length)
