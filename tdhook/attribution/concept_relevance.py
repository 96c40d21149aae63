"""Concept relevance propagation: the relevance that flows through given units inside the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.func import vmap

from ..core.errors import InputError
from ..core.structure import describe
from ..core.targets import Targets
from ..core.transforms import Sites, exact_wants
from ..core.units import through, unit_mask, unit_sets
from ..core.writing import intervene
from .relevance import Propagated, check_options, propagated, ready, ruled


def concept_relevance(
    f: Any,
    params: Any,
    inputs: Any,
    *,
    conditions: Mapping[str, Any],
    rules: Any = None,
    targets: Targets = None,
    axis: int | Mapping[str, int | None] | None = None,
    at: Sites | None = None,
    start: str = "value",
    chunk_size: int | None = None,
) -> Any:
    """Relevance of the inputs that flows through chosen units: one map for each of K concepts.

        at a site:  relevance passes the units of concept k, and stops elsewhere

    The sum over all units of a site that everything passes is the relevance without a condition. Which units matter is the
    relevance at the site itself: `lrp(..., at="features.3")["features.3"].sum((-2, -1)).topk(5)`; the examples that show what
    a unit stands for are those with the largest of that over a data set (relevance maximisation), not those that activate it
    most.

    Args:
        f: functional model, with rules or without.
        params: its parameters.
        inputs: as `f` takes them.
        conditions: for each site K concepts: K units (`[4, 7]`), K sets of units (`[[1, 2], [3]]`), an integer tensor [K] or
            [K, U], or boolean masks [K, C], or [K, *features] of an example. With several sites concept k passes the k-th
            units of each, one after the other.
        rules: as for `lrp`.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        axis: of the units at the sites, or a mapping from site to axis: 1 for the channels of [B, C, H, W], -1 for the features
            of tokens [B, L, D]. None where the value is [B, C].
        at: sites to explain instead of the inputs, before those of the conditions.
        start: the relevance that F starts with: `"value"` for F itself, `"one"` for 1.
        chunk_size: how many copies of the model run at once (concepts, times targets in the backward); None for all. It
            bounds memory and does not change the result.

    Returns:
        In the structure of `inputs` (None in place of what has no gradient), or a TensorDict keyed by site for `at`: with
        leading dimensions K, and T for plural targets. What passes the sites by, as a residual stream does a branch, is in
        every map: choose sites that everything passes. Directions instead of units: `lrp` of
        `tdhook.latent.through_direction(f, ...)`.

    Raises:
        InputError: conditions that are no units, of different K or out of range; an axis that is missing. SiteError: a pattern
        or an unknown site. RuleError, TargetError, GradientError: as `lrp`. Warns for a model in train mode.

    Cost: K forward passes from the first site on and K T backward passes, vmapped.

    Source: Achtibat et al., "From attribution maps to human-understandable explanations through Concept Relevance Propagation"
    (2023).

    Examples:
        >>> from tdhook.attribution.lrp import lrp
        >>> from tdhook.attribution.rules import epsilon_plus
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)))
        >>> x, rules = torch.ones(5, 3), epsilon_plus()
        >>> by_unit = concept_relevance(f, params, x, conditions={"1": range(4)}, rules=rules, targets=0)
        >>> by_unit.shape, torch.allclose(by_unit.sum(0), lrp(f, params, x, rules=rules, targets=0))
        (torch.Size([4, 5, 3]), True)
    """
    g = ruled(f, rules, "concept_relevance")
    check_options(targets, start, chunk_size)
    names, sets, axes = _conditions(g, conditions, axis)
    g = ready(g, params, inputs)
    count = len(sets[0])
    width = count if chunk_size is None else min(count, chunk_size)
    targets_at_once = None if chunk_size is None else max(1, chunk_size // width)
    found: list[Propagated] = []

    def one(units: list[Tensor]) -> list[Tensor]:
        def restricted(name: str, chosen: Tensor, where: int | None, known: Tensor) -> Any:
            return lambda value: through(value, unit_mask(chosen, value, where, name, known))

        each = zip(names, units, axes, sets)
        writes = {name: restricted(name, chosen, where, known) for name, chosen, where, known in each}
        result = propagated(intervene(g, writes), params, inputs, targets, at, start, targets_at_once)
        found.append(result)
        return result.values if result.plural else [r[0] for r in result.values]

    values = vmap(one, chunk_size=chunk_size)(sets)
    return found[0].what.restructure(values)


def _conditions(g: Any, conditions: Any, axis: Any) -> tuple[list[str], list[Tensor], list[int | None]]:
    """The sites, for each the K sets of units, and the axis of the units."""
    if not isinstance(conditions, Mapping) or not conditions:
        raise InputError(f"conditions is {describe(conditions)}; give a mapping from sites to K units each.")
    requests = list(conditions)
    names = [str(want.site) for request in requests for want in exact_wants(g, request, "conditions")]
    sets = [unit_sets(f"conditions[{request!r}]", conditions[request]) for request in requests]
    lengths = [len(each) for each in sets]
    if len(set(lengths)) > 1:
        raise InputError(f"conditions has {', '.join(map(str, lengths))} concepts at its sites; give the same number at each.")
    if isinstance(axis, Mapping):
        unknown = [site for site in axis if site not in requests]
        if unknown:
            raise InputError(f"axis has {unknown[0]!r}, which is no site of conditions.")
        return names, sets, [axis.get(request) for request in requests]
    return names, sets, [axis] * len(names)
