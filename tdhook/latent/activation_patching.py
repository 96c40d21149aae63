"""Activation patching: how much of a behaviour is restored, or destroyed, by the activations of another input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import tensorclass
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.batching import vmap_or_loop
from ..core.checks import require_positive, warn_if_stochastic
from ..core.compat import is_compiling, is_wrapped
from ..core.errors import InputError, SiteError, TargetError
from ..core.functional import FunctionalModel
from ..core.progress import Progress
from ..core.reading import Capture
from ..core.replay import Tape
from ..core.sites import Tree, Want
from ..core.structure import describe
from ..core.transforms import Sites, require_sites

DIRECTIONS = ("denoise", "noise")


@tensorclass
class Patching:
    """The metric of every patch, and of the two runs.

    Attributes:
        patched: Tensor [S, P, *M] for S sites, P positions and a metric of shape M ([] or [B]); [S, *M] for whole sites.
        clean, corrupted: Tensor [*M], the metric of the unpatched runs.
    """

    patched: Tensor
    clean: Tensor
    corrupted: Tensor

    @property
    def normalized(self) -> Tensor:
        """`(patched - corrupted) / (clean - corrupted)`: 0 is the corrupted run, 1 the clean one."""
        return (self.patched - self.corrupted) / (self.clean - self.corrupted)


def activation_patching(
    f: FunctionalModel,
    params: Any,
    clean: Any,
    corrupted: Any,
    metric: Callable[[Any], Tensor],
    *,
    sites: Sites,
    positions: Sequence[int] | None = None,
    axis: int | None = 1,
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
        clean, corrupted: two inputs of the same structure and shapes.
        metric: function of the output to a tensor [] or [B].
        sites: addresses; patterns stand for all modules that they match, in registration order (`tdhook.expand` lists them).
        positions: indices along `axis` to patch one by one; None for all.
        axis: axis of the values at the sites that `positions` count: 1 for the tokens of [B, L, D]. The heads of an attention
            operation [B, H, L, D] are `axis=1` too. None patches the whole value at once.
        direction: `"denoise"` or `"noise"`.
        chunk_size: how many patches of one site run at once; None for all. It bounds memory and does not change the result.
        progress: called as `progress(done, total)` at the start and after every site; see `tdhook.tqdm_progress`.

    Returns:
        `Patching` with `patched`, `clean`, `corrupted`, and `normalized`.

    Raises:
        InputError: inputs that do not align, an unknown direction, positions or axis out of range. SiteError: as `capture`.
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
    require_sites(f)
    if direction not in DIRECTIONS:
        raise InputError(
            f"direction={direction!r} is unknown; choose 'denoise' (clean into corrupted) or 'noise' (the reverse)."
        )
    require_positive("chunk_size", chunk_size, optional=True)
    _require_aligned(clean, corrupted)
    warn_if_stochastic(f, "activation_patching")
    wants = _one_value_each(f.tree, sites)

    source_inputs, base_inputs = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    source_output, source = Capture(f, wants)(params, source_inputs)
    source_metric = _measured(metric, source_output)
    base = Tape(f, params, base_inputs, wants)
    base_metric = _measured(metric, base.output)
    places = [_places(want, base.values[want], positions, axis) for want in wants]
    if len({len(p) for p in places}) > 1:
        raise InputError(
            "positions=None needs the same length along axis at all sites; give positions, or call once per group."
        )

    if progress is not None:
        progress(0, len(wants))
    rows = []
    for done, (want, place) in enumerate(zip(wants, places), start=1):
        rows.append(_patch_site(base, metric, base_metric, want, source[str(want.site)], place, axis, chunk_size))
        if progress is not None:
            progress(done, len(wants))
    clean_metric, corrupted_metric = (source_metric, base_metric) if direction == "denoise" else (base_metric, source_metric)
    patched = torch.stack(rows)
    return Patching(patched=patched, clean=clean_metric, corrupted=corrupted_metric, batch_size=[])  # type: ignore[call-arg]


@torch.compiler.assume_constant_result
def _one_value_each(tree: Tree, sites: Sites) -> tuple[Want, ...]:
    """The sites resolved, where patterns over modules stand for all that they match."""
    wants = tuple(Want(want.site, str(want.site), exact=True) for want in tree.resolve(sites))
    for want in wants:
        if want.site.op == "*" or want.site.call == "*":
            raise SiteError(f"sites has {want.request!r}, which stands for several values; list them, as tdhook.trace does.")
    return wants


def _require_aligned(clean: Any, corrupted: Any) -> None:
    first, second = pytree.tree_flatten(clean)[0], pytree.tree_flatten(corrupted)[0]
    if len(first) != len(second):
        raise InputError(
            f"clean is {describe(clean)} but corrupted is {describe(corrupted)}; give inputs of the same structure."
        )
    for a, b in zip(first, second):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape != b.shape or a.dtype != b.dtype):
            raise InputError(
                f"clean holds {describe(a)} but corrupted {describe(b)}; patching needs aligned inputs, token by token, so "
                "choose prompts of the same length."
            )


def _measured(metric: Callable[[Any], Tensor], output: Any) -> Tensor:
    value = metric(output)
    if not isinstance(value, Tensor) or value.ndim > 1 or not value.is_floating_point():
        raise TargetError(f"metric returned {describe(value)}; return a floating-point tensor of shape [] or [B].")
    return value


def _places(want: Want, value: Tensor, positions: Sequence[int] | None, axis: int | None) -> list[int]:
    """The positions to patch at a site, counted from 0."""
    if axis is None:
        if positions is not None:
            raise InputError(f"positions={positions!r} count along an axis; give axis too.")
        return [0]
    if not -value.ndim <= axis < value.ndim:
        raise InputError(f"axis={axis} is out of range at {str(want.site)!r}, which holds {describe(value)}.")
    length = value.shape[axis]
    if positions is None:
        return list(range(length))
    if not len(positions):
        raise InputError("positions is empty; give at least one, or None for all.")
    for position in positions:
        if not -length <= position < length:
            raise InputError(f"positions has {position}, out of range for {length} positions at {str(want.site)!r}.")
    return [position % length for position in positions]


def _patch_site(
    base: Tape,
    metric: Callable[[Any], Tensor],
    base_metric: Tensor,
    want: Want,
    source: Tensor,
    places: list[int],
    axis: int | None,
    chunk_size: int | None,
) -> Tensor:
    """The metric of each patch at one site: [P, *M], or [*M] for the whole site."""
    if axis is None:
        return metric(base.resume({want: source}))
    indices = torch.arange(source.shape[axis], device=source.device)
    indices = indices.reshape(-1, *[1] * (source.ndim - 1 - axis % source.ndim))

    def patched(place: Tensor) -> Tensor:
        return metric(base.resume({want: lambda value: torch.where(indices == place, source, value)}))

    run = _that_change_something(base.values[want], source, places, axis)
    if not run:
        return base_metric.expand(len(places), *base_metric.shape)
    at = torch.tensor([places[i] for i in run], device=source.device)
    values = vmap_or_loop(patched, at, chunk_size)
    if len(run) == len(places):
        return values
    everything = base_metric.expand(len(places), *base_metric.shape).clone()
    everything[torch.tensor(run)] = values
    return everything


def _that_change_something(value: Tensor, source: Tensor, places: list[int], axis: int) -> list[int]:
    """Which patches differ from what is there. All of them where values cannot be looked at or carry derivatives."""
    if is_compiling() or any(t.requires_grad or t.is_meta or is_wrapped(t) for t in (value, source)):
        return list(range(len(places)))
    differs = (value != source).movedim(axis, 0).flatten(1).any(1).tolist()
    return [i for i, place in enumerate(places) if differs[place]]
