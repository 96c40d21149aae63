"""Integrated gradients, of inputs and of activations, for many targets at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.compat import is_compiling, is_wrapped
from ..core.errors import InputError
from ..core.explained import explained
from ..core.groups import Groups, feature_groups
from ..core.progress import Progress
from ..core.quadrature import quadrature_rule
from ..core.reading import stop_at
from ..core.structure import describe
from ..core.targets import Targets, check, count
from ..core.transforms import Sites, edits_backward
from .adaptive import Search, sampler
from .bottleneck import narrow_site
from .line_integrals import Integrand, Nodes, integrate_forward, integrate_in_reverse, integrate_through, no_progress
from .paths import Curve, straight, straight_path

ATTEMPTS = 3
MODES = ("auto", "reverse", "forward")


class PathIntegral(NamedTuple):
    """Integrated gradients with adaptive nodes.

    Attributes:
        attributions: in the structure of what is explained.
        error: Tensor [B] or [T, B]: |sum_i attribution_i - (F(x) - F(x'))|, measured on the result. Where the examples share a
            tensor that moves, only the sum over them is known: [] or [T].
        converged: of the same shape: whether the error is within the tolerance, or within what rounding leaves of F.
        steps: Tensor [B]: the number of path points at which gradients were taken; [] where the examples share them.
    """

    attributions: Any
    error: Tensor
    converged: Tensor
    steps: Tensor


def integrated_gradients(
    f: Any,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    at: Sites | None = None,
    path: Curve = straight,
    steps: int | Literal["auto"] = 50,
    quadrature: str = "gauss_legendre",
    tolerance: float = 1e-3,
    max_steps: int = 500,
    groups: Any = None,
    through: str | None = None,
    mode: str = "auto",
    multiply_by_inputs: bool = True,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Integrated gradients along a path from baselines to inputs.

        attribution_i = integral over alpha from 0 to 1 of dF/dx_i(gamma(alpha)) gamma_i'(alpha)
                      = (x_i - x'_i) * sum_s w_s dF/dx_i(x' + alpha_s (x - x'))        on the straight path

    Args:
        f: pure function of (params, inputs); a functional model where `at` or `through` is used.
        params: its parameters.
        inputs: as `f` takes them. All floating-point tensors move together; others are passed through.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        baselines: x': a number, or the structure of `inputs` with tensors that broadcast to the inputs' shapes. With `at` also
            a mapping from each site to the value (a tensor or a number) that it starts from.
        at: sites: integrate between the activations of baselines and inputs there, instead of the inputs. What lies before the
            sites is computed once.
        path: gamma: a function (start, end, alpha) -> point, such as `straight` or `gaussian_blur()`.
        steps: number of path points; or `"auto"`: as many as `tolerance` needs, where each example needs them. F is sampled
            along the path first; gradients are taken at the nodes of the result only.
        quadrature: for a number of steps: `"gauss_legendre"`, `"riemann_left"`, `"riemann_right"`, `"midpoint"` or
            `"trapezoid"`.
        tolerance: for `steps="auto"`: the largest error of completeness, relative to |F(x) - F(x')|, for every target.
        max_steps: for `steps="auto"`: the largest number of path points for an example; the search before may take four times
            as many values of F.
        groups: features whose attributions are summed: integer tensors in the structure of what is explained, or a `Groups`.
        through: a site that every path from the tensors that move to the targets passes, and that has fewer coordinates H than
            there are targets: the penultimate features, the last hidden state. H cotangents are pulled back instead of T.
        mode: `"reverse"`: one backward pass for each target. `"forward"`: one forward-mode pass for each group of features (or
            coordinate, without groups), for all targets. `"auto"`: the one with fewer passes, reverse where equal, and where
            `edit_gradient` gave the model another backward, which forward mode does not see.
        multiply_by_inputs: False leaves out the velocity gamma' (x - x' on the straight path).
        chunk_size: how many copies of the model run at once (path points, times targets in the backward); None for all. It
            bounds memory and does not change the result; on a CPU a small one is also the fastest for large models (4 in
            reverse mode, 1 in forward mode).
        progress: called as `progress(done, total)`, in path points, at the start and after every chunk.

    Returns:
        Attributions in the structure of `inputs` (None in place of what does not move), or a TensorDict keyed by site for `at`;
        each has the shape of what it explains, with a leading dimension T for plural targets. With `groups` one Tensor [B, G]
        or [T, B, G]. With `steps="auto"` a `PathIntegral`: the attributions, the error reached, whether it is within the
        tolerance, and the number of steps.

    Raises:
        InputError: integer inputs without `at`, baselines that do not fit, a bad option, a `through` that something passes by,
            `steps="auto"` under vmap or compilation (where no step can depend on a value).
            TargetError, SiteError, GradientError (grad mode is off). Warns for a model in train mode.

    Cost: `steps` forward passes, vmapped, whatever the number of targets; then `steps * T` backward passes, or `steps * G`
        forward-mode passes, or `steps * H` of both through a site, vmapped. With `at` the forward passes start at the sites,
        after one whole pass for inputs and one for baselines. `steps="auto"` adds one forward pass for every sample of the
        search, 17 to 33 for a smooth function, and starts again, with more samples, where the result misses the tolerance.

    Source: Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks" (2017).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2, bias=False))
        >>> x = torch.randn(4, 3)
        >>> attributions = integrated_gradients(f, params, x, targets=[0, 1])
        >>> torch.allclose(attributions, params["weight"][:, None] * x, atol=1e-6)
        True
        >>> result = integrated_gradients(f, params, x, targets=[0, 1], steps="auto")
        >>> result.converged.all(), result.steps
        (tensor(True), tensor([1, 1, 1, 1]))
    """
    check(targets)
    _require_options(steps, tolerance, max_steps, mode, groups, through, multiply_by_inputs)
    require_positive("chunk_size", chunk_size, optional=True)
    rule = None if steps == "auto" else quadrature_rule(quadrature, steps)
    require_gradients("integrated_gradients")
    warn_if_stochastic(f, "integrated_gradients")
    line = straight_path(f, params, inputs, baselines, at, path)
    what = Integrand(line, targets, multiply_by_inputs)
    if groups is not None:
        what = replace(what, groups=feature_groups(groups, line.explained, what.batched()))
    integrate = _integrator(f, params, inputs, at, what, through, mode, chunk_size, progress or no_progress)
    if rule is None:
        return _adaptive(what, integrate, tolerance, max_steps, chunk_size)
    return _structured(what, integrate(Nodes.of(*rule, line.ends[0])))


def convergence_delta(
    f: Callable,
    params: Any,
    inputs: Any,
    attributions: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    at: Sites | None = None,
    path: Curve = straight,
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
        path: the path, if it was not straight.

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
    line = straight_path(f, params, inputs, baselines, at, path)
    what = Integrand(line, targets, True)
    before, after = what.ends()
    difference = after - before
    plural = what.several[0]
    given = line.explained.flatten("attributions", attributions)
    for attribution, end in zip(given, line.ends):
        expected = [*difference.shape[:1], *end.shape] if plural else list(end.shape)
        batched = end.shape[: difference.ndim - 1] == difference.shape[1:]
        if not isinstance(attribution, Tensor) or list(attribution.shape) != expected or not batched:
            raise InputError(f"attributions has {describe(attribution)} where shape {expected} is expected.")
    delta = _summed(given if plural else [g[None] for g in given], difference) - difference
    return delta if plural else delta[0]


def _summed(results: Sequence[Tensor], difference: Tensor) -> Tensor:
    """The sum over features [T, *B] of attributions [T, *shape]."""
    total = torch.zeros_like(difference)
    for result in results:
        total = total + result.reshape(*difference.shape, -1).sum(-1)
    return total


def _require_options(
    steps: Any, tolerance: Any, max_steps: Any, mode: str, groups: Any, through: str | None, multiply: bool
) -> None:
    if mode not in MODES:
        raise InputError(f"mode={mode!r} is unknown; choose from {', '.join(MODES)}.")
    if through is not None and mode != "auto":
        raise InputError(f"mode={mode!r} has no meaning with through={through!r}; leave one of them out.")
    if isinstance(steps, str) and steps != "auto":
        raise InputError(f"steps={steps!r} is unknown; give a number of path points or 'auto'.")
    if steps == "auto":
        require_positive("max_steps", max_steps, least=9)
        if not isinstance(tolerance, float) or not 0 < tolerance < 1:
            raise InputError(f"tolerance={tolerance!r} is relative to F(x) - F(x'); give a float between 0 and 1.")
        if not multiply:
            raise InputError(
                "steps='auto' measures completeness, which multiply_by_inputs=False gives up; give a number of steps."
            )
        if is_compiling():
            raise InputError("steps='auto' chooses nodes by value, which compiled code cannot; give a number of steps.")
    if groups is not None and not multiply:
        raise InputError("groups sums attributions, and multiply_by_inputs=False gives gradients; leave one of them out.")


def _pushed(what: Integrand, mode: str) -> Groups | None:
    """The groups of features to push forward one by one, or None for reverse mode."""
    known = count(what.targets)
    least = what.groups.count if what.groups else sum(end.shape[1:].numel() for end in what.path.ends)
    if mode == "reverse" or (mode == "auto" and known is not None and known <= least):
        return None
    groups = what.groups or feature_groups(None, what.path.explained, what.batched())
    if mode == "forward":
        return groups
    return groups if groups.count < (known or what.scores_at_end().shape[-1]) else None


def _integrator(
    f: Any,
    params: Any,
    inputs: Any,
    at: Sites | None,
    what: Integrand,
    through: str | None,
    mode: str,
    chunk_size: int | None,
    progress: Progress,
) -> Callable[[Nodes], list[Tensor]]:
    """The cheapest way to integrate, as a function of the nodes."""
    if through is not None:
        head = explained(stop_at(f, through), params, inputs, at)
        tail = narrow_site(f, params, inputs, at, through, what.chosen)
        return lambda nodes: integrate_through(what, head, tail, nodes, chunk_size, progress)
    pushed = _pushed(what, "reverse" if mode == "auto" and edits_backward(f) else mode)
    if pushed is None:
        return lambda nodes: integrate_in_reverse(what, nodes, chunk_size, progress)

    def forward(nodes: Nodes) -> list[Tensor]:
        by_group = integrate_forward(what, pushed, nodes, chunk_size, progress)
        return [by_group] if what.groups else pushed.spread(by_group)

    return forward


def _structured(what: Integrand, results: list[Tensor]) -> Any:
    """Results [T, *shape] in the structure of what is explained; [T, *B, G] as it is."""
    singled = results if what.several[0] else [result[0] for result in results]
    return singled[0] if what.groups else what.path.explained.restructure(singled)


def _adaptive(
    what: Integrand, integrate: Callable[[Nodes], list[Tensor]], tolerance: float, max_steps: int, chunk_size: int | None
) -> PathIntegral:
    end = what.path.ends[0]
    if is_wrapped(end):
        raise InputError("steps='auto' chooses nodes by value, which vmap and grad cannot; give a number of steps.")
    with torch.no_grad():
        before, after = what.ends()
    batch = tuple(after.shape[1:])
    if any(e.shape[: len(batch)] != batch for e in what.path.ends):
        # A tensor that all examples share: they share the nodes, and completeness holds for their sum.
        batch, before, after = (), before.sum(1), after.sum(1)
    difference = after - before
    dtype = torch.promote_types(end.dtype, torch.float32)
    eps = torch.finfo(difference.dtype).eps
    allowed = tolerance * difference.abs() + 32 * eps * torch.maximum(before.abs(), after.abs())
    sample = sampler(lambda alpha: what.scores(what.path.points(alpha)), batch, dtype, end.device, chunk_size)
    search = Search(sample, batch[0] if batch else 1, max_steps, 32 * eps)
    missed: list[int] = []
    for _ in range(ATTEMPTS):
        if missed:  # the samples of the search do not show an error that is there
            search.look_closer(missed)
        nodes = Nodes.padded(search.nodes(tolerance), batch, end)
        results = integrate(nodes)
        error = (_summed(results, difference) - difference).abs()
        converged = error <= allowed
        each = converged.all(0).tolist() if batch else [bool(converged.all())]
        missed = [e for e, good in enumerate(each) if not good and search.used[e] < 2 * max_steps]
        if not missed:
            break
    plural = what.several[0]
    steps = (nodes.weights != 0).sum(0)
    return PathIntegral(_structured(what, results), error if plural else error[0], converged if plural else converged[0], steps)
