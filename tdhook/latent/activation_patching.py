"""Activation patching: how much of a behaviour is restored, or destroyed, by the activations of another input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import tensorclass
from torch import Tensor

from ..core.compat import visible
from ..core.errors import InputError
from ..core.functional import FunctionalModel
from ..core.progress import Progress
from .patches import Axis, Indices, Where, as_axes, same_grids, sweep, views, wants_of
from .runs import check_runs, two_runs
from .subspaces import Subspace, subspace_at


@tensorclass
class Patching:
    """The metric of every patch, and of the two runs.

    Attributes:
        patched: Tensor [S, P, *M] for S sites, P positions and a metric of shape M ([] or [B]); [S, *M] for whole sites,
            [S, P, Q, *M] for two axes.
        clean, corrupted: Tensor [*M], the metric of the unpatched runs.
    """

    patched: Tensor
    clean: Tensor
    corrupted: Tensor

    @property
    def normalized(self) -> Tensor:
        """`(patched - corrupted) / (clean - corrupted)`: 0 is the corrupted run, 1 the clean one.

        Raises `InputError` where the two runs have the same metric, so that there is nothing to restore.
        """
        return restored(self.patched, self.clean, self.corrupted)

    @property
    def ratio_of_means(self) -> Tensor:
        """`normalized` of the means over the examples of a metric [B]: [S, P].

            sum_b (patched_b - corrupted_b) / sum_b (clean_b - corrupted_b)

        No example counts for more because its two runs are nearly alike, as it would in the mean of `normalized`. Raises
        `InputError` where the means of the two runs are the same.
        """
        if self.clean.ndim == 0:
            return self.normalized
        return restored(self.patched.mean(-1), self.clean.mean(), self.corrupted.mean())


def restored(patched: Tensor, clean: Tensor, corrupted: Tensor) -> Tensor:
    """`(patched - corrupted) / (clean - corrupted)`; raises `InputError` where that would divide by zero."""
    gap = clean - corrupted
    if visible(gap) and bool((gap == 0).any()):
        where = "" if gap.ndim == 0 else f" of example {int((gap == 0).nonzero()[0])}"
        raise InputError(
            f"the clean and the corrupted run{where} have the same metric, so that no fraction of the difference can be given; "
            "choose inputs or a metric that tell them apart, or look at the metric as it is."
        )
    return (patched - corrupted) / gap


def activation_patching(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    metric: Callable[[Any], Tensor],
    *,
    sites: Where,
    positions: Indices = None,
    axis: Axis = 1,
    subspaces: Subspace | Tensor | Mapping[str, Subspace | Tensor] | None = None,
    direction: str = "denoise",
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Patching:
    """The metric after each single patch: one site, one position, taken from the other run.

        denoise: patched[s, p] = metric(f(corrupted; do(a_s[p] = a_s[p] of the clean run)))
        noise:   patched[s, p] = metric(f(clean; do(a_s[p] = a_s[p] of the corrupted run)))

    Args:
        f: functional model.
        params: its parameters.
        clean: one input.
        corrupted: the other one, of the same structure and shapes.
        metric: function of the output to a tensor [] or [B].
        sites: addresses; patterns stand for all modules that they match, in registration order (`tdhook.expand` lists them).
            A `HeadLayout` of `tdhook.latent.names`, such as `names.head_output[3]`, stands for the heads at its site, as a
            value [..., heads, size]: `sites=names.head_output, axis=-2` patches every head of every layer.
        positions: indices along `axis` to patch one by one; None for all. For several axes a sequence with one such for each.
        axis: axis of the values at the sites that `positions` count: 1 for the tokens of [B, L, D], -1 for neurons. The heads
            of an attention operation [B, H, L, D] are `axis=1` too. Several, such as (1, 2), for all combinations: one head at
            one token. None patches the whole value at once.
        subspaces: what of the last axis is patched: a `Subspace`, or directions [K, D] that span one; for all sites or by site.
            None for all of it.
        direction: `"denoise"` or `"noise"`.
        chunk_size: how many patches of one site run at once; None for all. It bounds memory and does not change the result.
        progress: called as `progress(done, total)` at the start and after every site; see `tdhook.tqdm_progress`.

    Returns:
        `Patching` with `patched`, `clean`, `corrupted`, `normalized` and `ratio_of_means`.

    Raises:
        InputError: inputs that do not align (token by token, padding too), an unknown direction, positions or axis out of
            range, a subspace of another size. SiteError: as `capture`.
        TargetError: a metric of another shape. Warns for a model in train mode.

    Cost: two forward passes, and for each site one vmapped pass over its positions that runs only what lies after the site: for
    L layers about L/2 layers per patch. A patch that would write what is already there (tokens before the first difference in a
    causal model) is not run, except where derivatives, vmap or compilation are at work. A model that vmap cannot take (one that
    writes into a tensor of its own in place, say) runs once per patch, with a warning. For a language model and a metric of the
    last position, `functionalize(model, use_cache=False, logits_to_keep=1)` saves the unembedding of the others.

    Source: Vig et al., "Investigating Gender Bias in Language Models Using Causal Mediation Analysis" (2020); Meng et al.,
    "Locating and Editing Factual Associations in GPT" (2022); for the directions Heimersheim and Nanda, "How to use and
    interpret activation patching" (2024).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten(), torch.nn.Linear(3, 1, bias=False))
        >>> f, params = tdhook.functionalize(model)
        >>> result = activation_patching(f, params, torch.ones(1, 3), torch.zeros(1, 3), lambda out: out.sum(), sites="0")
        >>> torch.allclose(result.patched[0], params["2", "weight"][0])
        True
    """
    seen, axes = views(f, sites), as_axes(axis)
    check_runs("activation_patching", f, clean, corrupted, metric, direction, chunk_size)
    runs = two_runs(f, params, clean, corrupted, metric, wants_of(seen), direction)
    grids = same_grids(seen, runs.base.values, axes, positions)
    sources = []
    for view in seen:
        source, there = view.of(runs.source[view.want]), view.of(runs.base.values[view.want])
        space = subspace_at(subspaces, view.name, there)
        sources.append(source if space is None else space.exchange(there, source))

    if progress is not None:
        progress(0, len(seen))
    rows = []
    for done, (view, source, lists) in enumerate(zip(seen, sources, grids), start=1):
        rows.append(sweep(runs.base, metric, runs.base_metric, [(view, source)], axes, lists, chunk_size))
        if progress is not None:
            progress(done, len(seen))
    return Patching(  # type: ignore[call-arg]
        patched=torch.stack(rows), clean=runs.clean_metric, corrupted=runs.corrupted_metric, batch_size=[]
    )
