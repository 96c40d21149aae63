"""Integrated gradients, of inputs and of activations, for many targets at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.func import vjp

from ..core.batching import chunks, pull_each, vmap_or_loop
from ..core.checks import flatten_as, require_gradients, require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.reading import stop_at
from ..core.replay import Tape
from ..core.structure import describe, pytree
from ..core.targets import Targets, check, select
from ..core.transforms import Sites, exact_wants, require_sites, values_at
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
) -> Any:
    """Integrated gradients along the straight line from baselines to inputs.

        attribution_i = (x_i - x'_i) * sum_s w_s dF/dx_i(x' + alpha_s (x - x'))

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them. All floating-point tensors move together; others are passed through.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        baselines: x': a number, or the structure of `inputs` with tensors that broadcast to the inputs' shapes. With `at` also a
            mapping from each site to the value (a tensor or a number) that it starts from.
        at: sites: integrate between the activations of baselines and inputs there, instead of the inputs. What lies before the
            sites is computed once.
        steps: number of path points.
        quadrature: `"gauss_legendre"`, `"riemann_left"`, `"riemann_right"`, `"midpoint"` or `"trapezoid"`.
        multiply_by_inputs: False leaves out the factor x - x'.
        chunk_size: how many copies of the model run at once (path points, times targets in the backward); None for all. It bounds
            memory and does not change the result.

    Returns:
        Attributions in the structure of `inputs` (None in place of what does not move), or a TensorDict keyed by site for `at`;
        each has the shape of what it explains, with a leading dimension T for plural targets.

    Raises:
        InputError: integer inputs without `at`, baselines that do not fit, a bad `steps`, `quadrature` or `chunk_size`.
        TargetError, SiteError, GradientError (grad mode is off). Warns for a model in train mode.

    Cost: `steps` forward passes, vmapped, whatever the number of targets; `steps * T` backward passes, vmapped. With `at` the
    forward passes start at the sites, after one whole pass for inputs and one for baselines.

    Source: Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks" (2017).

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
    path = _input_path(f, params, inputs, baselines) if at is None else _site_path(f, params, inputs, baselines, at)
    gradients, plural = _integrate(path, targets, nodes, weights, chunk_size)
    if multiply_by_inputs:
        gradients = [g * (end - start) for g, start, end in zip(gradients, path.starts, path.ends)]
    return path.restructure(gradients if plural else [g[0] for g in gradients])


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
        f, params, inputs, targets, baselines, at: as they were for the attributions.
        attributions: what `integrated_gradients` returned, multiplied by inputs.

    Returns:
        Tensor [B], or [T, B] for plural targets; zero for a complete attribution.

    Raises:
        InputError: attributions of another structure or shape than what they explain. Otherwise as `integrated_gradients`.

    Cost: two forward passes.

    >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2))
    >>> x = torch.randn(4, 3)
    >>> attributions = integrated_gradients(f, params, x, targets=0)
    >>> convergence_delta(f, params, x, attributions, targets=0).abs().max() < 1e-5
    tensor(True)
    """
    check(targets)
    path = _input_path(f, params, inputs, baselines) if at is None else _site_path(f, params, inputs, baselines, at)
    after, plural = select(targets, path.evaluate(path.ends))
    before, _ = select(targets, path.evaluate(path.starts))
    difference = (after - before).movedim(-1, 0)  # [T, *B]
    given = path.flatten(attributions)
    total = torch.zeros_like(difference)
    for attribution, end in zip(given, path.ends):
        expected = [*difference.shape[:1], *end.shape] if plural else list(end.shape)
        batched = end.shape[: difference.ndim - 1] == difference.shape[1:]
        if not isinstance(attribution, Tensor) or list(attribution.shape) != expected or not batched:
            raise InputError(f"attributions has {describe(attribution)} where shape {expected} is expected.")
        aligned = attribution if plural else attribution[None]
        total = total + aligned.reshape(*difference.shape, -1).sum(-1)
    return total - difference if plural else (total - difference)[0]


@dataclass(frozen=True)
class _Path:
    """A straight line of several tensors that move together, and the model as a function of them."""

    starts: list[Tensor]
    ends: list[Tensor]
    evaluate: Callable[[list[Tensor]], Any]
    restructure: Callable[[list[Tensor]], Any]
    flatten: Callable[[Any], list[Any]]


def _integrate(
    path: _Path, targets: Targets, nodes: tuple[float, ...], weights: tuple[float, ...], chunk_size: int | None
) -> tuple[list[Tensor], bool]:
    """The weighted sum of gradients along the path, each [T, *shape], and whether there are several targets."""
    several = []

    def values(moved: list[Tensor]) -> Tensor:
        chosen, plural = select(targets, path.evaluate(moved))
        several.append(plural)
        return chosen

    totals: list[Tensor] = []
    for chunk in chunks(len(nodes), chunk_size):
        points = [_points(start, end, nodes[chunk]) for start, end in zip(path.starts, path.ends)]

        def shifted(shifts: list[Tensor], points: list[Tensor] = points) -> Tensor:
            # One shift for all path points: its gradient is already the sum over them.
            return vmap_or_loop(values, [point + shift for point, shift in zip(points, shifts)])

        chosen, pull = vjp(shifted, [torch.zeros_like(end) for end in path.ends])
        cotangent = torch.tensor(weights[chunk], dtype=chosen.dtype, device=chosen.device)
        cotangent = cotangent.reshape(-1, *[1] * (chosen.ndim - 1))
        at_once = None if chunk_size is None else max(1, chunk_size // len(nodes[chunk]))
        (gradients,) = pull_each(pull, chosen, cotangent, at_once)
        totals = [t + g for t, g in zip(totals, gradients)] if totals else list(gradients)
    return totals, several[0]


def _points(start: Tensor, end: Tensor, nodes: tuple[float, ...]) -> Tensor:
    """Path points [S, *shape]."""
    alphas = torch.tensor(nodes, dtype=end.dtype, device=end.device)
    return start + alphas.reshape(-1, *[1] * end.ndim) * (end - start)


def _input_path(f: Callable, params: Any, inputs: Any, baselines: Any) -> _Path:
    leaves, spec = pytree.tree_flatten(inputs)
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not moving:
        raise InputError(
            f"inputs is {describe(inputs)}, which has no floating-point tensor to attribute to; for token ids pass "
            "at=<site of the embedding>."
        )
    ends = [leaves[i] for i in moving]
    starts = _baselines(baselines, inputs, leaves, moving)

    def evaluate(moved: list[Tensor]) -> Any:
        return f(params, pytree.tree_unflatten(_placed(leaves, moving, moved), spec))

    def restructure(results: list[Tensor]) -> Any:
        if isinstance(inputs, Tensor):
            return results[0]
        if isinstance(inputs, TensorDictBase):
            lead = results[0].shape[: results[0].ndim - ends[0].ndim]
            names = [k for k, v in inputs.items(True, True) if v.is_floating_point()]
            return TensorDict(dict(zip(names, results)), batch_size=[*lead, *inputs.batch_size])
        return pytree.tree_unflatten(_placed([None] * len(leaves), moving, results), spec)

    def flatten(attributions: Any) -> list[Any]:
        if isinstance(inputs, TensorDictBase):
            if not isinstance(attributions, TensorDictBase):
                raise InputError(f"attributions is {describe(attributions)}; give a TensorDict, as inputs is one.")
            return [attributions.get(k) for k, v in inputs.items(True, True) if v.is_floating_point()]
        given = flatten_as("attributions", attributions, inputs)
        return [given[i] for i in moving]

    return _Path(starts, ends, evaluate, restructure, flatten)


def _placed(leaves: list[Any], places: list[int], values: list[Any]) -> list[Any]:
    placed = list(leaves)
    for place, value in zip(places, values):
        placed[place] = value
    return placed


def _baselines(baselines: Any, inputs: Any, leaves: list[Any], moving: list[int]) -> list[Tensor]:
    """One start for each moving leaf of the inputs."""
    if isinstance(baselines, (int, float)) and not isinstance(baselines, bool):
        return [torch.full_like(leaves[i], baselines) for i in moving]
    given = flatten_as("baselines", baselines, inputs)
    return [_start(given[i], leaves[i], "baselines") for i in moving]


def _start(value: Any, end: Tensor, name: str) -> Tensor:
    """A baseline in the shape of what it is the baseline of."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full_like(end, value)
    if not isinstance(value, Tensor):
        raise InputError(f"{name} holds {describe(value)}; give a number or a tensor.")
    if value.dtype != end.dtype or value.device != end.device:
        raise InputError(f"{name} holds {describe(value)} on {value.device} for {describe(end)} on {end.device}; use .to(inputs).")
    try:
        return value.expand(end.shape)
    except RuntimeError:
        raise InputError(f"{name} holds {describe(value)}, which does not broadcast to {list(end.shape)}.") from None


def _site_path(f: Any, params: Any, inputs: Any, baselines: Any, at: Sites) -> _Path:
    require_sites(f)
    wants = exact_wants(f, at, "at")
    names = [str(want.site) for want in wants]
    by_site = isinstance(baselines, (Mapping, TensorDictBase)) and bool(
        {str(k) for k in baselines.keys()} & ({w.request for w in wants} | set(names))
    )
    base_inputs = None if by_site else _baseline_inputs(inputs, baselines)
    tape = Tape(f, params, inputs, wants)
    ends = [tape.values[want] for want in wants]
    if by_site:
        values = list(values_at(wants, baselines, "baselines").values())
    else:
        head = stop_at(f, names)(params, base_inputs)
        values = [head[name] for name in names]
    starts = [_start(value, end, f"baselines for {name!r}") for value, end, name in zip(values, ends, names)]
    for end, name in zip(ends, names):
        if not end.is_floating_point():
            raise InputError(f"at has {name!r}, which holds {describe(end)}; integrate at a floating-point site.")

    def evaluate(moved: list[Tensor]) -> Any:
        return tape.resume(dict(zip(wants, moved)))

    def restructure(results: list[Tensor]) -> TensorDict:
        return TensorDict(dict(zip(names, results)), batch_size=[])

    def flatten(attributions: Any) -> list[Any]:
        if not isinstance(attributions, (Mapping, TensorDictBase)) or set(attributions.keys()) != set(names):
            raise InputError(f"attributions is {describe(attributions)}; it is keyed by the sites of at, {', '.join(names)}.")
        return [attributions[name] for name in names]

    return _Path(starts, ends, evaluate, restructure, flatten)


def _baseline_inputs(inputs: Any, baselines: Any) -> Any:
    """The inputs of the baseline run: a number fills what is floating-point, a structure is taken as it is."""
    leaves, spec = pytree.tree_flatten(inputs)
    if isinstance(baselines, (int, float)) and not isinstance(baselines, bool):
        moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not moving:
            raise InputError(
                f"baselines={baselines!r} cannot stand for {describe(inputs)}; pass inputs of the same kind (other token ids), or "
                "{site: value} for the sites of at."
            )
        return pytree.tree_unflatten(_placed(leaves, moving, [torch.full_like(leaves[i], baselines) for i in moving]), spec)
    given = flatten_as("baselines", baselines, inputs)
    for value, leaf in zip(given, leaves):
        if isinstance(leaf, Tensor) and (not isinstance(value, Tensor) or value.shape != leaf.shape):
            raise InputError(f"baselines holds {describe(value)} for {describe(leaf)}; give the shape of inputs, or {{site: value}} for at.")
    return baselines
