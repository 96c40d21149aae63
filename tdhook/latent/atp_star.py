"""AtP*: attribution patching that sees through a saturated softmax and through effects that cancel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.batching import vmap_or_loop
from ..core.errors import InputError
from ..core.functional import FunctionalModel
from ..core.replay import Tape
from ..core.sites import Want
from .attribution_patching import (
    AttributionPatching,
    checked,
    contracted,
    difference,
    measure_largest,
    require_scores,
    site_gradients,
)
from .names import Names
from .names import names as find_names
from .patches import Axis, Indices, Metric, View, Where, as_tensor, at_place, same_grids, views, wants_of, writes
from .runs import two_runs


def atp_star(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    sites: Where,
    names: Names | None = None,
    query_key_fix: bool = True,
    gradient_drop: bool = True,
    positions: Indices = None,
    axis: Axis = (1, 2),
    direction: str = "denoise",
    exact: int = 0,
    chunk_size: int | None = None,
) -> AttributionPatching:
    """Attribution patching with the two corrections of AtP*.

        fix, for a query or key n:   effect[n] = < pattern(n <- source) - pattern(base),  d metric / d pattern >
        drop:                        effect[n] = 1 / (L - 1)  sum_l | effect of n with the gradient through layer l cut |

    The fix recomputes the attention pattern with the patched query or key: where the softmax is saturated, its derivative says
    nothing of a large change. The drop brings out effects that cancel: a direct one and one through a single layer. It
    returns magnitudes.

    Args:
        f: functional model, with attention patterns that can be reached (`attn_implementation="eager"`) for the fix.
        params: its parameters.
        clean: as for `attribution_patching`.
        corrupted: as for `attribution_patching`.
        metric: as for `attribution_patching`. The drop takes magnitudes of what it returns: give a metric [B] to have them
            for each example, as in the paper, which averages after that.
        sites: as for `attribution_patching`; the fix is made at `names.query` and `names.key`, other sites go without.
        names: standard names; None to find them, where a correction needs them.
        query_key_fix: whether to make the first correction.
        gradient_drop: whether to make the second.
        positions: as for `activation_patching`.
        axis: as there; (1, 2) for each head at each token of a `HeadLayout`, whose values are [B, L, heads, size].
        direction: as for `attribution_patching`. The paper has `"noise"`.
        exact: how many of the largest effects are measured by a patch each; with `gradient_drop` their magnitudes.
        chunk_size: how many recomputed patterns, and how many exact patches of one site, run at once; None for all.

    Returns:
        `AttributionPatching`; with `gradient_drop` the effects are not negative.

    Raises:
        InputError: as `attribution_patching`, and its other errors; `gradient_drop` for a model of one layer.
        SiteError: no attention pattern, or no layers, could be found.

    Cost: two forward passes, and one forward and backward pass, or with the drop L of them, of what comes after the first site.
    The fix runs the attention of its layer (not the rest) once for each place. It keeps a gradient at the pattern of each
    layer that has a query or key, with the drop L of them.

    Source: Kramar et al., "AtP*: An efficient and scalable method for localizing LLM behaviour to components" (2024).

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
        >>> f, params = tdhook.functionalize(model, use_cache=False)
        >>> from tdhook.latent.names import names
        >>> found = names(f, params)
        >>> run = (f, params, torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]]), lambda out: out.logits[:, -1, 5])
        >>> atp_star(*run, sites=found.query, names=found).effects.shape  # layers, tokens, heads, examples
        torch.Size([2, 3, 2, 1])
    """
    seen, axes = checked("atp_star", f, sites, clean, corrupted, metric, axis, direction, exact, chunk_size)
    drops: list[tuple[Want, ...]] = [()]
    patterns: dict[View, Want] = {}
    if gradient_drop or query_key_fix:
        names = find_names(f, params, clean) if names is None else names
        drops = _layers(f, names) if gradient_drop else drops
        patterns = _fixed(f, names, seen) if query_key_fix else patterns

    wants = tuple(dict.fromkeys((*wants_of(seen), *patterns.values(), *(want for drop in drops for want in drop))))
    runs = two_runs(f, params, clean, corrupted, metric, wants, direction)
    grids = same_grids(seen, runs.base.values, axes, positions)
    require_scores(runs, seen, axes, exact)
    ndim = runs.base_metric.ndim
    plain = [view for view in seen if view not in patterns]
    at = tuple(dict.fromkeys((*wants_of(plain), *patterns.values())))
    totals: dict[View, Tensor] = {}
    slopes: dict[Want, list[Tensor]] = {want: [] for want in patterns.values()}
    for drop in drops:
        gradients = site_gradients(runs.base, metric, at, after=dict.fromkeys(drop, torch.detach))
        for view, lists in zip(seen, grids):
            if view not in patterns:
                score = contracted(difference(runs, view) * view.of(gradients[view.want]), axes, lists, ndim)
                totals[view] = totals.get(view, 0) + (score.abs() if gradient_drop else score)
        for want, kept in slopes.items():
            kept.append(gradients[want])
    for view, lists in zip(seen, grids):
        if view in patterns:
            source = view.of(runs.source[view.want])
            score = _through_pattern(
                runs.base, view, source, patterns[view], slopes[patterns[view]], axes, lists, ndim, chunk_size
            )
            totals[view] = score.abs().sum(0) if gradient_drop else score[0]
    scale = 1 / (len(drops) - 1) if gradient_drop else 1.0
    effects = torch.stack([totals[view] * scale for view in seen])
    return measure_largest(runs, metric, seen, effects, axes, grids, exact, chunk_size, magnitude=gradient_drop)


def _layers(f: FunctionalModel, names: Names) -> list[tuple[Want, ...]]:
    """What each layer adds to the residual stream."""
    if names.layers < 2:
        raise InputError("gradient_drop averages over the other layers, and the model has one; take gradient_drop=False.")
    drops = []
    for parts in zip(names.attention, names.mlp, names.others):
        added = [site for site in (*parts[:2], *parts[2]) if site is not None]
        drops.append(wants_of(views(f, added, "names")))
    return drops


def _fixed(f: FunctionalModel, names: Names, seen: Sequence[View]) -> dict[View, Want]:
    """The attention pattern that each query and key feeds."""
    found = {}
    for view in seen:
        for layer in range(names.layers):
            if view.layout is not None and view.layout in (names.query[layer], names.key[layer]):
                (pattern,) = views(f, names.require("pattern", layer), "names")
                found[view] = pattern.want
    return found


def _through_pattern(
    base: Tape,
    view: View,
    source: Tensor,
    pattern: Want,
    slopes: list[Tensor],
    axes: tuple[int, ...],
    lists: Sequence[Sequence[int]],
    ndim: int,
    chunk_size: int | None,
) -> Tensor:
    """What a patched query or key changes in the pattern, times each of G gradients there: [G, *P, *M]."""
    stacked = torch.stack(slopes)

    def score(mask: Callable[[Tensor], Tensor] | None) -> Tensor:
        patched = base.resume_until(writes([(view, source, mask)]), (pattern,))[pattern]
        change = patched - base.values[pattern]
        return (stacked * change).flatten(1 + ndim).sum(-1)

    if not axes:
        return score(None)
    places = as_tensor(list(itertools.product(*lists)), source.device)
    scores = vmap_or_loop(lambda place: score(lambda part: at_place(part, axes, place)), places, chunk_size)
    return scores.unflatten(0, [len(each) for each in lists]).movedim(len(lists), 0)
