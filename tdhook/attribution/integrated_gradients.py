"""Integrated gradients, of inputs and of activations, for many targets at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from ..core.batching import chunks, pull_each, vmap_or_loop
from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.progress import Progress
from ..core.structure import describe
from ..core.targets import Targets, check, select
from ..core.transforms import Sites
from .paths import Path, straight_path
from .quadrature import quadrature_rule


def integrated_gradients(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    at: Sites | None = None,
    steps: int = 50,
    quadrature: str = "gauss_legendre",
    multiply_by_inputs: bool = True,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Integrated gradients along the straight line from baselines to inputs.

        attribution_i = (x_i - x'_i) * sum_s w_s dF/dx_i(x' + alpha_s (x - x'))

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them. All floating-point tensors move together; others are passed through.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        baselines: x': a number, or the structure of `inputs` with tensors that broadcast to the inputs' shapes. With `at` also
            a mapping from each site to the value (a tensor or a number) that it starts from.
        at: sites: integrate between the activations of baselines and inputs there, instead of the inputs. What lies before the
            sites is computed once.
        steps: number of path points.
        quadrature: `"gauss_legendre"`, `"riemann_left"`, `"riemann_right"`, `"midpoint"` or `"trapezoid"`.
        multiply_by_inputs: False leaves out the factor x - x'.
        chunk_size: how many copies of the model run at once (path points, times targets in the backward); None for all. It
            bounds memory and does not change the result; on a CPU a small one (4, say) is also the fastest for large models.
        progress: called as `progress(done, total)`, in path points, at the start and after every chunk.

    Returns:
        Attributions in the structure of `inputs` (None in place of what does not move), or a TensorDict keyed by site for `at`;
        each has the shape of what it explains, with a leading dimension T for plural targets.

    Raises:
        InputError: integer inputs without `at`, baselines that do not fit, a bad `steps`, `quadrature` or `chunk_size`.
        TargetError, SiteError, GradientError (grad mode is off). Warns for a model in train mode.

    Cost: `steps` forward passes, vmapped, whatever the number of targets; `steps * T` backward passes, vmapped. With `at` the
    forward passes start at the sites, after one whole pass for inputs and one for baselines.

    Source: Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks" (2017).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2, bias=False))
        >>> x = torch.randn(4, 3)
        >>> attributions = integrated_gradients(f, params, x, targets=[0, 1])
        >>> torch.allclose(attributions, params["weight"][:, None] * x, atol=1e-6)
        True
    """
    nodes, weights = quadrature_rule(quadrature, steps)
    require_positive("chunk_size", chunk_size, optional=True)
    check(targets)
    require_gradients("integrated_gradients")
    warn_if_stochastic(f, "integrated_gradients")
    path = straight_path(f, params, inputs, baselines, at)
    gradients, plural = _integrate(path, targets, nodes, weights, chunk_size, progress or _no_progress)
    if multiply_by_inputs:
        gradients = [g * (end - start) for g, start, end in zip(gradients, path.starts, path.ends)]
    return path.explained.restructure(gradients if plural else [g[0] for g in gradients])


def convergence_delta(
    f: Callable,
    params: Any,
    inputs: Any,
    attributions: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    at: Sites | None = None,
) -> Tensor:
    """How far attributions are from completeness.

        delta = sum_i attribution_i - (F(x) - F(x'))

    Args:
        f: the function that was explained.
        params: its parameters.
        inputs: as they were for the attributions; so are the following.
        attributions: what `integrated_gradients` returned, multiplied by inputs.
        targets: the scalars that were explained.
        baselines: where the path began.
        at: the sites, if it ran between sites.

    Returns:
        Tensor [B], or [T, B] for plural targets; zero for a complete attribution.

    Raises:
        InputError: attributions of another structure or shape than what they explain. Otherwise as `integrated_gradients`.

    Cost: two forward passes.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2))
        >>> x = torch.randn(4, 3)
        >>> attributions = integrated_gradients(f, params, x, targets=0)
        >>> convergence_delta(f, params, x, attributions, targets=0).abs().max() < 1e-5
        tensor(True)
    """
    check(targets)
    path = straight_path(f, params, inputs, baselines, at)
    after, plural = select(targets, path.explained.evaluate(path.ends))
    before, _ = select(targets, path.explained.evaluate(path.starts))
    difference = (after - before).movedim(-1, 0)  # [T, *B]
    given = path.explained.flatten("attributions", attributions)
    total = torch.zeros_like(difference)
    for attribution, end in zip(given, path.ends):
        expected = [*difference.shape[:1], *end.shape] if plural else list(end.shape)
        batched = end.shape[: difference.ndim - 1] == difference.shape[1:]
        if not isinstance(attribution, Tensor) or list(attribution.shape) != expected or not batched:
            raise InputError(f"attributions has {describe(attribution)} where shape {expected} is expected.")
        aligned = attribution if plural else attribution[None]
        total = total + aligned.reshape(*difference.shape, -1).sum(-1)
    return total - difference if plural else (total - difference)[0]


def _no_progress(done: int, total: int) -> None:
    """What is called where nobody asked for progress."""


def _integrate(
    path: Path,
    targets: Targets,
    nodes: tuple[float, ...],
    weights: tuple[float, ...],
    chunk_size: int | None,
    progress: Progress,
) -> tuple[list[Tensor], bool]:
    """The weighted sum of gradients along the path, each [T, *shape], and whether there are several targets."""
    totals: list[Tensor] = []
    plural = False
    progress(0, len(nodes))
    for chunk in chunks(len(nodes), chunk_size):
        at_once = None if chunk_size is None else max(1, chunk_size // len(nodes[chunk]))
        gradients, plural = _integrate_chunk(path, targets, nodes[chunk], weights[chunk], at_once)
        totals = [t + g for t, g in zip(totals, gradients)] if totals else gradients
        progress(chunk.stop, len(nodes))
    return totals, plural


def _integrate_chunk(
    path: Path, targets: Targets, nodes: tuple[float, ...], weights: tuple[float, ...], targets_at_once: int | None
) -> tuple[list[Tensor], bool]:
    """The same for some of the nodes, all at once. On its own, so that what autograd keeps is freed before the next chunk."""
    several = []

    def values(moved: list[Tensor]) -> Tensor:
        chosen, plural = select(targets, path.explained.evaluate(moved))
        several.append(plural)
        return chosen

    points = [_points(start, end, nodes) for start, end in zip(path.starts, path.ends)]

    def shifted(shifts: list[Tensor]) -> Tensor:
        # One shift for all path points: its gradient is already the sum over them.
        return vmap_or_loop(values, [point + shift for point, shift in zip(points, shifts)])

    chosen, pull, *_ = vjp(shifted, [torch.zeros_like(end) for end in path.ends])
    cotangent = torch.tensor(weights, dtype=chosen.dtype, device=chosen.device).reshape(-1, *[1] * (chosen.ndim - 1))
    (gradients,) = pull_each(pull, chosen, cotangent, targets_at_once)
    return list(gradients), several[0]


def _points(start: Tensor, end: Tensor, nodes: tuple[float, ...]) -> Tensor:
    """Path points [S, *shape]."""
    alphas = torch.tensor(nodes, dtype=end.dtype, device=end.device)
    return start + alphas.reshape(-1, *[1] * end.ndim) * (end - start)
