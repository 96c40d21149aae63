"""DeepLIFT, and its mean over a set of baselines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.batching import chunks, vmap_or_loop
from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.estimate import Estimate, Moments
from ..core.explained import Explained, explained, moving_leaves, placed, target_gradients
from ..core.randomness import integers, require_generator
from ..core.ruling import Ruled, with_rules
from ..core.targets import Targets, check
from ..core.transforms import Sites, exact_wants, require_sites
from .expected_gradients import BaselineSet, baseline_sets
from .paths import straight_path
from .rules.deep_lift import rescale
from .rules.reveal_cancel import reveal_cancel

_RULES = {"rescale": rescale(), "reveal_cancel": reveal_cancel()}


def deep_lift(
    f: Any,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    at: Sites | None = None,
    rule: Any = "rescale",
    multiply_by_inputs: bool = True,
    chunk_size: int | None = None,
) -> Any:
    """DeepLIFT: differences from a baseline, handed back through each operation in proportion.

        attribution_i = (x_i - x'_i) m_i,    sum_i attribution_i = F(x) - F(x')

    with multipliers m chained backwards: for a function of one number (f(x) - f(x')) / (x - x'), see
    `tdhook.attribution.rules.Rescale`. Operations are told apart by where they run, so functional activations, modules that
    are called twice, skip connections, products, attention and several inputs are exact too.

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them. All floating-point tensors move together; others are passed through.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B]. F has to be
            linear in the output.
        baselines: x': a number, or the structure of `inputs` with tensors that broadcast to the inputs' shapes. With `at` also
            a mapping from each site to a value.
        at: sites to explain instead of the inputs, between their values for baselines and inputs. The reference run then is
            that of the inputs with the values of the baselines at the sites, so the sum is exact for any sites (as in
            `integrated_gradients`); where everything passes the sites it is the run of the baselines.
        rule: `"rescale"`, `"reveal_cancel"` (see `tdhook.attribution.rules.RevealCancel`), or a table of rules.
        multiply_by_inputs: False gives the multipliers m.
        chunk_size: how many targets are pulled back at once; None for all. It bounds memory and does not change the result.

    Returns:
        In the structure of `inputs` (None in place of what does not move), or a TensorDict keyed by site for `at`; with a
        leading dimension T for plural targets.

    Raises:
        RuleError: an operation that the rule is not for. InputError, TargetError, SiteError: as elsewhere. GradientError: grad
            mode is off. Warns for a model in train mode.

    Cost: two forward passes and T vmapped backward passes, and for `at` two forward passes more; memory for what the operations
    that are not linear got and returned. With `rule="reveal_cancel"` it does not compile.

    Source: Shrikumar, Greenside, Kundaje, "Learning Important Features Through Propagating Activation Differences" (2017).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False)))
        >>> params["1", "weight"] = torch.tensor([[3.0, 2.0]])
        >>> deep_lift(f, params, torch.tensor([[2.0, 1.0]]), baselines=-1.0, targets=0)
        tensor([[6., 2.]])
    """
    g = _compared(f, rule, targets, chunk_size, "deep_lift")
    line = straight_path(f, params, inputs, baselines, at)
    results, plural = _attributions(g, params, inputs, line.starts, targets, at, multiply_by_inputs, chunk_size)
    return line.explained.restructure(results if plural else [r[0] for r in results])


def deep_lift_shap(
    f: Any,
    params: Any,
    inputs: Any,
    *,
    baselines: Any,
    targets: Targets = None,
    at: Sites | None = None,
    rule: Any = "rescale",
    samples: int | None = None,
    multiply_by_inputs: bool = True,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The mean of DeepLIFT over a set of baselines: an approximation of SHAP values.

        attribution_i = mean_b (x_i - b_i) m_i(x, b)

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them: Tensor [B, *features], or a structure of such.
        baselines: the set, in the structure of `inputs`: Tensor [N, *features], or [N, *shape of inputs]. With `at` also a
            mapping from each site to a set of values there. Each example is compared with each baseline, whatever else is in
            the batch.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        at: sites, as for `deep_lift`.
        rule: as for `deep_lift`.
        samples: how many baselines to draw, with replacement, for each example; None: every baseline once.
        multiply_by_inputs: False gives the mean multipliers.
        chunk_size: how many copies of the model run at once (baselines, times targets in the backward); None for all. It
            bounds memory and changes neither the draws nor the result.
        generator: source of the draws; None for the global one.

    Returns:
        `Estimate`: the mean and its standard error, for baselines that are a sample of many (NaN for a lone one). Both in the
        structure of `inputs` (None in place of what does not move), or TensorDicts keyed by site for `at`, with a leading
        dimension T for plural targets. The sum of the mean is F(x) less the mean of F over the baselines.

    Raises:
        InputError: baselines that are no set for the inputs, a bad `samples`, `chunk_size` or `generator`. Otherwise as
            `deep_lift`.

    Cost: 2 N forward passes and N T backward passes, vmapped; N is `samples` where baselines are drawn.

    Source: Lundberg and Lee, "A Unified Approach to Interpreting Model Predictions" (2017), section 4.2.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2, bias=False))
        >>> x, baselines = torch.randn(4, 3), torch.randn(10, 3)
        >>> value, error = deep_lift_shap(f, params, x, baselines=baselines, targets=0)
        >>> torch.allclose(value, params["weight"][0] * (x - baselines.mean(0)), atol=1e-5)
        True
    """
    require_positive("samples", samples, optional=True)
    require_generator(generator)
    g = _compared(f, rule, targets, chunk_size, "deep_lift_shap")
    what = explained(f, params, inputs, at)
    sets = baseline_sets(f, params, inputs, baselines, at, what)
    rows = _rows(sets, what, samples, generator)
    moments: list[Moments] = []
    several: list[bool] = []
    for chunk in chunks(len(rows), chunk_size):
        at_once = None if chunk_size is None else max(1, chunk_size // (chunk.stop - chunk.start))

        def one(row: Tensor) -> list[Tensor]:
            starts = [each.values[row].expand(end.shape) for each, end in zip(sets, what.values)]
            results, plural = _attributions(g, params, inputs, starts, targets, at, multiply_by_inputs, at_once)  # noqa: B023
            several.append(plural)
            return [r.to(torch.promote_types(r.dtype, torch.float32)) for r in results]

        parts = [Moments.of(found) for found in vmap_or_loop(one, rows[chunk])]
        moments = [total + part for total, part in zip(moments, parts)] if moments else parts

    def structured(results: list[Tensor]) -> Any:
        kept = [r.to(value.dtype) for r, value in zip(results, what.values)]
        return what.restructure(kept if several[0] else [r[0] for r in kept])

    return Estimate(structured([m.mean for m in moments]), structured([m.standard_error for m in moments]))


def _compared(f: Any, rule: Any, targets: Targets, chunk_size: int | None, method: str) -> Any:
    """The model with the rules."""
    require_positive("chunk_size", chunk_size, optional=True)
    check(targets)
    require_gradients(method)
    require_sites(f)
    warn_if_stochastic(f, method)
    if isinstance(rule, str) and rule not in _RULES:
        raise InputError(f"rule={rule!r} is unknown; choose from {', '.join(_RULES)}, or give a table of rules.")
    return with_rules(f, _RULES[rule] if isinstance(rule, str) else rule)


def _attributions(
    g: Ruled,
    params: Any,
    inputs: Any,
    starts: list[Tensor],
    targets: Targets,
    at: Sites | None,
    multiply: bool,
    chunk_size: int | None,
) -> tuple[list[Tensor], bool]:
    """The attributions [T, *shape] of each tensor that moves, and whether there are several targets."""
    if at is None:
        leaves, spec = pytree.tree_flatten(inputs)
        reference = pytree.tree_unflatten(placed(leaves, moving_leaves(leaves), starts), spec)
        compared = g.on_baseline(params, reference)
    else:
        compared = g.on_baseline(params, inputs, dict(zip(exact_wants(g, at, "at"), starts)))
    what = explained(compared, params, inputs, at)
    multipliers, _, plural = target_gradients(what, targets, chunk_size)
    if not multiply:
        return multipliers, plural
    return [m * (end - start) for m, end, start in zip(multipliers, what.values, starts)], plural


def _rows(sets: list[BaselineSet], what: Explained, samples: int | None, generator: torch.Generator | None) -> Tensor:
    """Which baselines are taken: [N] for all examples alike, or [S, B] for each its own, [S] for whole batches."""
    device, count = what.values[0].device, len(sets[0].values)
    if samples is None:
        return torch.arange(count, device=device)
    shape = (samples,) if sets[0].whole else (samples, len(what.values[0]))
    return integers(0, count, shape, generator, device)
