"""Completeness: whether an attribution adds up to what it explains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core.baselines import replacements
from ..core.checks import warn_if_stochastic
from ..core.targets import Targets
from ..core.transforms import Sites
from .features import features


def completeness(
    f: Callable,
    params: Any,
    inputs: Any,
    attributions: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    at: Sites | None = None,
    relative: bool = False,
) -> Tensor:
    """How far attributions are from adding up to the change of the output.

        delta = sum_i phi_i - (F(x) - F(x'))
        relative: delta / |F(x) - F(x')|

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them.
        attributions: phi, in the structure of `inputs` (or keyed by site), with a leading dimension T for plural targets. They
            may have size 1 where several elements got one score.
        targets: the scalars F that were explained; see `tdhook.targets`.
        baselines: x': a number, or the structure of `inputs` (keyed by site for `at`) with tensors that broadcast.
        at: sites, if the attributions are those of activations. Baselines are then values at the sites.
        relative: divide by the change of the output.

    Returns:
        Tensor [B], or [T, B] for plural targets, signed; 0 for a complete attribution. Where the output does not change, the
        relative delta is NaN for attributions that sum to 0, and infinite for others. Half types give float32.

    Raises:
        InputError: attributions or baselines that do not fit. TargetError, SiteError. Warns for a model in train mode.

    Cost: two forward passes.

    Quantus' Completeness compares the two sides with `==` after normalising the attributions, which is hardly ever true.

    Source: Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks" (2017).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2))
        >>> x = torch.randn(4, 3)
        >>> attributions = params["weight"][:, None] * x
        >>> completeness(f, params, x, attributions, targets=[0, 1]).abs().max() < 1e-5
        tensor(True)
    """
    warn_if_stochastic(f, "completeness")
    scored = features(f, params, inputs, attributions, targets, at)
    change = scored.outputs - scored.evaluate(replacements(scored.what, baselines))
    delta = scored.scores.sum(-1) - change
    return scored.result(delta / change.abs() if relative else delta)
