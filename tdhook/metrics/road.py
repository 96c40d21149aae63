"""ROAD: the output while pixels are replaced by what their neighbours suggest, in the order of their attribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from ..core.batching import chunks, vmap_or_loop
from ..core.checks import require_number, require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.explained import explained_inputs
from ..core.groups import Groups
from ..core.randomness import normal_like, require_generator
from ..core.structure import describe
from ..core.targets import Targets
from .curves import ORDERS, Curve, curve_of, outputs_on_the_diagonal, ranks
from .features import features
from .imputation import linear_imputation, require_solver


def road(
    f: Callable,
    params: Any,
    inputs: Any,
    attributions: Any,
    *,
    targets: Targets = None,
    percentiles: Sequence[float] = (10, 20, 30, 40, 50, 60, 70, 80, 90),
    order: str = "morf",
    noise: float = 0.01,
    solver: str = "auto",
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Curve:
    """Remove and debias: pixel flipping by noisy linear imputation, so that the shape of what is removed tells nothing.

        values_k = F(x with n_k pixels imputed from the others, plus noise * z), z ~ N(0, 1), n_k = round(p_k H W / 100)

    Args:
        f: pure function of (params, inputs).
        params: its parameters.
        inputs: as `f` takes them, with one floating-point tensor, of images [B, C, H, W] (or [C, H, W] inside a vmap).
        attributions: phi, in the structure of `inputs`, [B, C, H, W] or [B, 1, H, W], with a leading dimension T for plural
            targets. Pixels are ranked by their sum over channels.
        targets: the scalars F that were explained; see `tdhook.targets`. The paper measures the accuracy:
            `targets=lambda out: (out.argmax(-1) == labels).double()`, averaged over the examples.
        percentiles: how many percent of the pixels are imputed, increasing, each above 0 and below 100. At least one pixel of
            each image stays.
        order: `"morf"`: most relevant pixels first; `"lerf"`: least relevant first. Ties as in `pixel_flipping`.
        noise: standard deviation of the noise on imputed pixels, in units of the inputs; the same draw for all percentiles and
            targets.
        solver: as `linear_imputation`.
        chunk_size: how many copies of the model run at once (percentiles times targets); None for all. It bounds memory and
            does not change the result.
        generator: source of the noise. None: torch's global one.

    Returns:
        `Curve` whose first point is the unchanged input: `fractions` [K + 1] = n_k / (H W) for K percentiles, `values`
        [B, K + 1] (or [T, B, K + 1]) and `area` [B] (or [T, B]) from 0 to the last fraction. NaN for an attribution that ranks
        nothing. Half types give float32.

    Raises:
        InputError: inputs that are no images, attributions that do not fit, bad `percentiles`, `order`, `noise`, `solver`,
            `chunk_size` or `generator`. TargetError. Warns for a model in train mode.

    Cost: K * T + 1 forward passes, vmapped, and as many imputations of each image. Inside a vmap the draw needs its
    `randomness="different"` or `"same"`; a `generator` cannot be compiled with `fullgraph=True`, the global one can.

    pytorch-grad-cam returns the change of the output at one percentile (`values[..., k] - values[..., 0]` here), Quantus the
    accuracy for percentiles 1, 3 .. 99.

    Source: Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods" (2022).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)))
        >>> x = torch.randn(3, 1, 8, 8)
        >>> curve = road(f, params, x, x * params["1", "weight"][0].reshape(1, 8, 8), targets=0)
        >>> curve.values.shape, curve.area.shape
        (torch.Size([3, 10]), torch.Size([3]))
    """
    if order not in ORDERS:
        raise InputError(f"order is {describe(order)}; choose 'morf' (most relevant first) or 'lerf' (least relevant first).")
    _require_percentiles(percentiles)
    require_number("noise", noise)
    require_solver(solver)
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)
    warn_if_stochastic(f, "road")
    values = explained_inputs(f, params, inputs).values
    if len(values) != 1 or values[0].ndim not in (3, 4):
        held = ", ".join(map(describe, values))
        raise InputError(f"inputs holds {held}; road takes one floating-point tensor of images [B, C, H, W].")
    (image,) = values
    height, width = image.shape[-2:]
    pixels = height * width
    pixel_ids = torch.arange(pixels, device=image.device).reshape(height, width)
    scored = features(f, params, inputs, attributions, targets, groups=Groups([pixel_ids], pixels))
    if image.ndim - scored.outputs.ndim != 2:
        raise InputError(f"inputs holds {describe(image)}; road takes images [B, C, H, W].")

    added = noise * normal_like(image, generator) if noise else torch.zeros_like(image)
    removed_counts = [min(int(p * pixels / 100 + 0.5), pixels - 1) for p in percentiles]
    counts = torch.tensor([0, *removed_counts], device=image.device)
    places = ranks(scored.scores, order)
    parts = []
    for chunk in chunks(len(removed_counts) * len(places), chunk_size):
        runs = torch.arange(chunk.start, chunk.stop, device=image.device)
        first = counts[1 + runs // len(places)].reshape(-1, *[1] * (places.ndim - 1))
        removed = (places[runs % len(places)] < first).unflatten(-1, (height, width))  # [N, *B, H, W]
        imputed = linear_imputation(image.expand(len(runs), *image.shape), removed, solver=solver)
        imputed = imputed + torch.where(removed[..., None, :, :], added, 0)
        parts.append(vmap_or_loop(lambda moved: scored.evaluate([moved]), imputed))
    changed = outputs_on_the_diagonal(torch.cat(parts), len(places))
    return curve_of(scored, counts, torch.cat([scored.outputs[..., None], changed], -1))


def _require_percentiles(percentiles: Any) -> None:
    numbers = isinstance(percentiles, Sequence) and not isinstance(percentiles, str) and len(percentiles) > 0
    if not numbers or any(not isinstance(p, (int, float)) or not 0 < p < 100 for p in percentiles):
        raise InputError(f"percentiles is {describe(percentiles)}; give numbers above 0 and below 100.")
    if any(later <= earlier for earlier, later in pairwise(percentiles)):
        raise InputError(f"percentiles is {describe(percentiles)}; give them in increasing order.")
