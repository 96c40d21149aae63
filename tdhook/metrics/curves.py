"""Deletion, insertion and pixel flipping: the output while features are removed or added in the order of their attribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.baselines import replacements
from ..core.batching import chunks
from ..core.checks import require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.structure import describe
from ..core.targets import Targets
from ..core.transforms import Sites
from .features import Features, features

ORDERS = ("morf", "lerf")


class Curve(NamedTuple):
    """The output as a function of how much was removed or added.

    Attributes:
        fractions: Tensor [K + 1], from 0 on.
        values: Tensor [B, K + 1], or [T, B, K + 1] for plural targets: the output there.
        area: Tensor [B] or [T, B], below the curve by the trapezoid rule over the fractions.
    """

    fractions: Tensor
    values: Tensor
    area: Tensor

    @property
    def aopc(self) -> Tensor:
        """The mean drop from the first value over all K + 1 points, Tensor [B] or [T, B] (Samek et al., 2017)."""
        return (self.values[..., :1] - self.values).mean(-1)


def deletion(
    f: Callable,
    params: Any,
    inputs: Any,
    attributions: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    steps: int = 20,
    at: Sites | None = None,
    groups: Any = None,
    chunk_size: int | None = None,
) -> Curve:
    """The output while features are replaced by the baseline, most relevant first. A faithful attribution has a small area.

        values_k = F(x with the n_k features of largest phi from x'), n_k = round(k D / steps)

    Args, Returns, Raises, Cost: as `pixel_flipping`, of which it is `order="morf"`.

    The paper explains and measures a softmax probability: `targets=lambda out: out.softmax(-1)[:, 3]`.

    Source: Petsiuk, Das, Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models" (2018).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(2, 1, bias=False))
        >>> params["weight"].copy_(torch.tensor([[3.0, 1.0]]))
        tensor([[3., 1.]])
        >>> deletion(f, params, torch.ones(1, 2), torch.tensor([[3.0, 1.0]]), targets=0).values
        tensor([[4., 1., 0.]])
    """
    warn_if_stochastic(f, "deletion")
    options = (targets, baselines, at, groups, steps, chunk_size)
    return _curve(f, params, inputs, attributions, *options, order="morf", remove=True)


def insertion(
    f: Callable,
    params: Any,
    inputs: Any,
    attributions: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    steps: int = 20,
    at: Sites | None = None,
    groups: Any = None,
    chunk_size: int | None = None,
) -> Curve:
    """The output while features are put into the baseline, most relevant first. A faithful attribution has a large area.

        values_k = F(x' with the n_k features of largest phi from x), n_k = round(k D / steps)

    Args, Returns, Raises, Cost: as `pixel_flipping`. The paper starts from a blurred image: `baselines=blur(x)`.

    Source: Petsiuk, Das, Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models" (2018).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(2, 1, bias=False))
        >>> params["weight"].copy_(torch.tensor([[3.0, 1.0]]))
        tensor([[3., 1.]])
        >>> insertion(f, params, torch.ones(1, 2), torch.tensor([[3.0, 1.0]]), targets=0).values
        tensor([[0., 3., 4.]])
    """
    warn_if_stochastic(f, "insertion")
    options = (targets, baselines, at, groups, steps, chunk_size)
    return _curve(f, params, inputs, attributions, *options, order="morf", remove=False)


def pixel_flipping(
    f: Callable,
    params: Any,
    inputs: Any,
    attributions: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    order: str = "morf",
    steps: int = 20,
    at: Sites | None = None,
    groups: Any = None,
    chunk_size: int | None = None,
) -> Curve:
    """The output while features are replaced by the baseline, in the order of their attribution.

        values_k = F(x with the first n_k features from x'), n_k = round(k D / steps), k = 0 .. steps
        area = trapezoid rule of values over n_k / D;  aopc = mean_k (values_0 - values_k)

    Halves are rounded up in n_k.

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them.
        attributions: phi, in the structure of `inputs` (or keyed by site), with a leading dimension T for plural targets. Every
            element is a feature. A size of 1 makes all elements along that axis one feature: a saliency map [B, 1, H, W]
            for images [B, C, H, W] removes whole pixels, [B, L, 1] at an embedding whole tokens.
        targets: the scalars F that were explained; see `tdhook.targets`.
        baselines: x': a number, or the structure of `inputs` (keyed by site for `at`) with tensors that broadcast.
        order: `"morf"`: most relevant features first; `"lerf"`: least relevant first. The signed attribution counts. Equal
            attributions go in the order of their indices, in both.
        steps: number of steps K; with D features at most D.
        at: sites, if the attributions are those of activations, which are then what is removed.
        groups: integer tensors in the structure of `inputs` (or keyed by site) that broadcast to it: elements with equal ids
            are one feature, whose score is the sum over its members.
        chunk_size: how many copies of the model run at once (steps times targets); None for all. It bounds memory and does not
            change the result.

    Returns:
        `Curve` with `fractions` [K + 1] = n_k / D, `values` [B, K + 1] (or [T, B, K + 1]), `area` [B] (or [T, B]), and `aopc`.
        NaN for an attribution that ranks nothing (all of several scores equal) or holds a NaN. Half types give float32.

    Raises:
        InputError: attributions, baselines or groups that do not fit, a bad `order`, `steps` or `chunk_size`. TargetError,
            SiteError. Warns for a model in train mode.

    Cost: (K + 1) * T + 1 forward passes, vmapped: each target has an order of its own.

    Quantus' PixelFlipping normalises and takes absolute attributions first, and leaves out the unperturbed value. Its default
    baseline is the smallest value of each example. Ties are sorted unstably there.

    Source: Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation"
    (2015); Samek et al., "Evaluating the Visualization of What a Deep Neural Network Has Learned" (2017).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(2, 1, bias=False))
        >>> params["weight"].copy_(torch.tensor([[3.0, 1.0]]))
        tensor([[3., 1.]])
        >>> curve = pixel_flipping(f, params, torch.ones(1, 2), torch.tensor([[3.0, 1.0]]), targets=0, order="lerf")
        >>> curve.values, curve.area
        (tensor([[4., 3., 0.]]), tensor([2.5000]))
    """
    if order not in ORDERS:
        raise InputError(f"order is {describe(order)}; choose 'morf' (most relevant first) or 'lerf' (least relevant first).")
    warn_if_stochastic(f, "pixel_flipping")
    options = (targets, baselines, at, groups, steps, chunk_size)
    return _curve(f, params, inputs, attributions, *options, order=order, remove=True)


def ranks(scores: Tensor, order: str) -> Tensor:
    """The place 0 .. D - 1 of each feature in the order of removal; equal scores in the order of their indices."""
    places = scores.sort(dim=-1, descending=order == "morf", stable=True).indices
    counted = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return torch.zeros_like(places).scatter(-1, places, counted)


def known_order(scores: Tensor) -> Tensor:
    """Tensor [T, *B] of booleans: whether scores rank something, rather than being all equal or in part NaN."""
    differ = scores.amax(-1) != scores.amin(-1)
    return (differ | (scores.shape[-1] == 1)) & ~scores.isnan().any(-1)


def outputs_on_the_diagonal(values: Tensor, targets: int) -> Tensor:
    """From outputs [K * T, T, *B], where the run k * T + t is meant for target t only, to [T, *B, K]."""
    apart = values.reshape(-1, targets, *values.shape[1:])
    return apart.diagonal(dim1=1, dim2=2).movedim(-1, 0).movedim(1, -1)


def curve_of(scored: Features, counts: Tensor, values: Tensor) -> Curve:
    """The result for values [T, *B, K] where `counts` features were changed."""
    fractions = counts.to(values.dtype) / scored.scores.shape[-1]
    values = torch.where(known_order(scored.scores)[..., None], values, torch.nan)
    return Curve(fractions, scored.result(values), scored.result(torch.trapezoid(values, fractions, dim=-1)))


def _curve(
    f: Callable,
    params: Any,
    inputs: Any,
    attributions: Any,
    targets: Targets,
    baselines: Any,
    at: Sites | None,
    groups: Any,
    steps: int,
    chunk_size: int | None,
    *,
    order: str,
    remove: bool,
) -> Curve:
    """The curve from the inputs to the baselines, or where not `remove` the reverse."""
    require_positive("steps", steps)
    require_positive("chunk_size", chunk_size, optional=True)
    scored = features(f, params, inputs, attributions, targets, at, groups)
    without = replacements(scored.what, baselines)
    olds, news = (scored.what.values, without) if remove else (without, scored.what.values)
    total, count = scored.scores.shape[-1], len(scored.scores)
    steps = min(steps, total)
    # Integers, rounded half up: fractions of floats would round some halves down.
    counts = torch.tensor([(2 * k * total + steps) // (2 * steps) for k in range(steps + 1)], device=scored.scores.device)
    places = ranks(scored.scores, order)
    parts = []
    for chunk in chunks(len(counts) * count, chunk_size):
        runs = torch.arange(chunk.start, chunk.stop, device=counts.device)
        first = counts[runs // count].reshape(-1, *[1] * (places.ndim - 1))
        parts.append(scored.evaluate_with(places[runs % count] < first, news, olds))
    return curve_of(scored, counts, outputs_on_the_diagonal(torch.cat(parts), count))
