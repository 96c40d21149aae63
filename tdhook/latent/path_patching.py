"""Path patching: what senders tell receivers directly, all other nodes held at what they were."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.compat import is_compiling
from ..core.errors import InputError, SiteError
from ..core.functional import FunctionalModel
from ..core.progress import Progress
from ..core.reading import Capture
from ..core.replay import Tape
from ..core.scope import module_path
from ..core.structure import describe
from ..core.tail import surrounds
from .activation_patching import Patching
from .patches import (
    Axis,
    Indices,
    Mask,
    Metric,
    View,
    Where,
    as_axes,
    at_each_place,
    at_indices,
    grid,
    measured,
    same_grids,
    views,
    wants_of,
    writes,
)
from .runs import check_runs

Stage = list[tuple[View, Mask | None]]


def path_patching(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    senders: Where,
    receivers: Where | Mapping[Any, Any],
    frozen: Where,
    through: Sequence[Where | Mapping[Any, Any]] = (),
    axis: Axis = None,
    positions: Indices = None,
    receiver_axis: Axis = None,
    direction: str = "denoise",
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Patching:
    """The metric when receivers read what one sender of the other run would tell them, along chosen paths only.

        r             = a_receivers(f(base; do(sender <- source run), do(frozen nodes <- base run)))
        patched[s, p] = metric(f(base; do(receivers <- r)))

    With `through`, the first line is taken once for each stage of the path: from the sender to the first stage, from there to
    the next, and so on to the receivers, with the frozen nodes held each time. What is not frozen (the residual stream, norms)
    passes everything on. The last run is free.

    Args:
        f: functional model.
        params: its parameters.
        clean: one input.
        corrupted: the other one, of the same structure and shapes.
        metric: function of the output to a tensor [] or [B].
        senders: where paths begin, each site and place by itself; as `sites` of `activation_patching`.
        receivers: where they end, all at once: addresses, such as the inputs of attention (`"h.9.attn:in"`), queries
            (`names.query[9]`), the last residual or `":out"` for the effect on the output that is direct. A mapping gives
            each the indices along `receiver_axis` that receive: `{names.query[9]: [6, 9]}`.
        frozen: the nodes that pass nothing on, such as `[*names.attention, *names.mlp]`; with heads as senders
            `[*names.head_output, *names.mlp]`, since what is held is deaf to a sender inside it. Wang et al. hold the heads
            alone, `names.head_output`, so that MLPs belong to the direct path. Senders and receivers may be among them: of a
            sender the rest is held, a receiver is read before it is held.
        through: stages between, each like `receivers`, by what they send: `["h.5.mlp"]`. A path through one input of a node
            names that input and the node: `[{names.query[5]: [2]}, {names.head_output[5]: [2]}]`, with `receiver_axis=-2`.
        axis: axis of the values at the senders that `positions` count: -2 for heads at a `HeadLayout`; several for all
            combinations; None for whole values.
        positions: indices along `axis`; None for all. For several axes a sequence with one such for each.
        receiver_axis: axis, or axes, that the indices of receivers and stages count.
        direction: `"denoise"`: the sender of the clean run in the corrupted one. `"noise"`: the reverse, as in the papers.
        chunk_size: how many places of one sender run at once; None for all. It does not change the result.
        progress: called as `progress(done, total)` at the start and after every sender.

    Returns:
        `Patching`: `patched` is [S, P, *M], or [S, *M] for whole senders.

    Raises:
        InputError: as `activation_patching`; indices without `receiver_axis`; `through` that is no list of stages.
        SiteError: as `capture`; no receiver; a node that is held around a sender, but not around any of its receivers, so that
            nothing that is sent could leave it.

    Cost: two forward passes, and for each sender one vmapped pass over its places: for each stage and the receivers a run from
    the first write to the last value that is read, then one of what comes after the first receiver.

    Source: Wang et al., "Interpretability in the Wild" (2022), appendix B; Goldowsky-Dill et al., "Localizing Model Behavior
    with Path Patching" (2023).

    Examples:
        >>> class Two(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        ...     def forward(self, x):
        ...         h = x + self.a(x)
        ...         return h + self.b(h)
        >>> f, params = tdhook.functionalize(Two())
        >>> clean, corrupted = torch.ones(1, 1), torch.zeros(1, 1)
        >>> result = path_patching(
        ...     f, params, clean, corrupted, torch.sum, senders="a", receivers="b:in", frozen=["a", "b"]
        ... )
        >>> torch.allclose(result.patched[0] - result.corrupted, (params["b", "weight"] * params["a", "weight"])[0, 0])
        True
    """
    seen, axes, receiver_axes = views(f, senders, "senders"), as_axes(axis), as_axes(receiver_axis, "receiver_axis")
    held = views(f, frozen, "frozen") if not _empty(frozen) else ()
    if not isinstance(through, (list, tuple)):
        raise InputError(f"through is {describe(through)}; give a list of stages, such as ['h.5.mlp'].")
    stages = [*(_stage(f, stage, "through") for stage in through), _stage(f, receivers, "receivers")]
    for stage in stages:
        if not receiver_axes and any(indices is not None for _, indices in stage):
            raise InputError("receivers have indices, which count along an axis; give receiver_axis too.")
    if not is_compiling():  # Dynamo cannot compare the sites
        for sending, reading in zip([[(view, None) for view in seen], *stages], stages):
            _require_heard(held, sending, reading)
    check_runs("path_patching", f, clean, corrupted, metric, direction, chunk_size)

    source_inputs, base_inputs = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    output, source = Capture(f, wants_of(seen))(params, source_inputs)
    source_metric = measured(metric, output)
    base = Tape(f, params, base_inputs, wants_of(seen, held, *([view for view, _ in stage] for stage in stages)))
    base_metric = measured(metric, base.output)
    grids = same_grids(seen, base.values, axes, positions)
    hops: list[Stage] = [[(v, _mask(v, base, receiver_axes, indices)) for v, indices in stage] for stage in stages]

    if progress is not None:
        progress(0, len(seen))
    rows = []
    for done, (view, lists) in enumerate(zip(seen, grids), start=1):
        sent = view.of(source[view.name])

        def patched(mask: Mask | None, view: View = view, sent: Tensor = sent) -> Tensor:
            return metric(_along(base, [(view, sent, mask)], hops, held))

        values = at_each_place(base, patched, base_metric, [(view, sent)], axes, list(itertools.product(*lists)), chunk_size)
        rows.append(values.unflatten(0, [len(each) for each in lists]) if axes else values[0])
        if progress is not None:
            progress(done, len(seen))
    clean_metric, corrupted_metric = (source_metric, base_metric) if direction == "denoise" else (base_metric, source_metric)
    return Patching(  # type: ignore[call-arg]
        patched=torch.stack(rows), clean=clean_metric, corrupted=corrupted_metric, batch_size=[]
    )


def _along(base: Tape, patches: list[Any], hops: Sequence[Stage], held: Sequence[View]) -> Any:
    """The output after the patches have gone from stage to stage."""
    for stage in hops:
        first = min(base.time_of(view.want) for view, *_ in patches)
        # A node that is over before the first write cannot change, so it need not be held, and is replayed.
        frozen = [(view, view.of(base.values[view.want]), None) for view in held if base.time_of(view.want) >= first]
        values = base.resume_until(writes([*frozen, *patches]), wants_of([view for view, _ in stage]))
        patches = [(view, view.of(values[view.want]), mask) for view, mask in stage]
    return base.resume(writes(patches))


def _stage(f: FunctionalModel, given: Any, name: str) -> list[tuple[View, Any]]:
    if not isinstance(given, Mapping):
        return [(view, None) for view in views(f, given, name)]
    if not given:
        raise SiteError(f"{name} is empty: no site was given; give at least one.")
    return [(view, indices) for where, indices in given.items() for view in views(f, where, name)]


def _empty(sites: Any) -> bool:
    return isinstance(sites, (tuple, list)) and not sites


def _require_heard(held: Sequence[View], sending: Sequence[tuple[View, Any]], reading: Sequence[tuple[View, Any]]) -> None:
    """Raises `SiteError` where a node is held around a sender, and no receiver lies inside: the sender would change nothing."""
    for node in held:
        path = module_path(node.want.site)
        if node.want.site.op is not None or node.want.site.port != "out":
            continue
        if any(view.want == node.want or surrounds(path, (view.want,)) for view, _ in reading):
            continue
        for view, _ in sending:
            if view.want != node.want and surrounds(path, (view.want,)):
                raise SiteError(
                    f"frozen holds {node.name!r}, inside of which {view.name!r} sends, so that nothing would leave it; hold "
                    "values like the sender's instead: for heads [*names.head_output, *names.mlp]."
                )


def _mask(view: View, base: Tape, axes: tuple[int, ...], indices: Any) -> Mask | None:
    if not axes or indices is None:
        return None
    lists = grid(view, base.values[view.want], axes, indices, "receivers")
    return lambda part: at_indices(part, axes, lists)
