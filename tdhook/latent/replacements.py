"""What takes the place of an ablated value: a number, a mean, the value of another example, or noise on top of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ..core.checks import require_number
from ..core.compat import visible
from ..core.errors import InputError, SiteError, did_you_mean
from ..core.functional import FunctionalModel
from ..core.randomness import integers, normal_like, require_generator
from ..core.reading import Capture
from ..core.sites import Want
from ..core.structure import describe
from .patches import Source, View, wants_of
from .prompt_pairs import mask_of
from .streaming import count_examples

KINDS = ("zero", "resample", "noise")
To = str | float | Mapping[Any, Any] | TensorDictBase
Draw = Callable[[], dict[View, Source]]
Grids = Mapping[View, Sequence[Sequence[int]]]


def require_replacement(inputs: Any, seen: Sequence[View], to: Any, reference: Any, scale: Any, generator: Any) -> None:
    """What can be said of the arguments before anything runs."""
    require_generator(generator)
    require_number("scale", scale)
    if isinstance(to, (Mapping, TensorDictBase)):
        known = list(to.keys())
        for view in seen:
            if view.name not in known:
                raise SiteError(f"to has no {view.name!r}." + did_you_mean(view.name, map(str, known)))
    elif isinstance(to, str):
        if to not in KINDS:
            raise InputError(
                f"to={to!r} is unknown; choose from {', '.join(KINDS)}, a number, or means by site (mean_activations)."
            )
    elif not isinstance(to, (int, float)) or isinstance(to, bool):
        raise InputError(f"to is {describe(to)}; give {', '.join(map(repr, KINDS))}, a number, or means by site.")
    if reference is not None and not _resamples(to):
        raise InputError("reference is what to='resample' draws from; leave it out, or take to='resample'.")
    if reference is None and _resamples(to) and count_examples(inputs) < 2:
        raise InputError("to='resample' has one example and no other to draw; give reference=inputs to draw from.")


def is_random(to: To) -> bool:
    return isinstance(to, str) and to != "zero"


def _resamples(to: To) -> bool:
    return isinstance(to, str) and to == "resample"


def replacements(
    f: FunctionalModel,
    params: Any,
    inputs: Any,
    values: Mapping[Want, Tensor],
    grids: Grids,
    axes: tuple[int, ...],
    *,
    to: To,
    reference: Any,
    scale: float,
    generator: torch.Generator | None,
) -> Draw:
    """What makes a draw: for each view a tensor, or a function of what is there; the same each time where nothing is random.

    Args:
        values: the values of the run on `inputs`.
        grids: for each view the indices along `axes` that are ablated.

    Cost: one forward pass for a reference.
    """
    if not _resamples(to):
        return lambda: {view: _replacement(view, values[view.want], to, scale, generator) for view in grids}
    count = size = count_examples(inputs)
    pool = values
    if reference is not None:
        size = count_examples(reference)
        _, found = Capture(f, wants_of(tuple(grids)))(params, reference)
        pool = {view.want: found[view.name] for view in grids}
        _require_like(pool, values)
    for view in grids:
        if pool[view.want].ndim == 0 or len(pool[view.want]) != size:
            raise SiteError(
                f"site {view.name!r} holds {describe(pool[view.want])}, whose first dimension is not that of the {size} "
                "examples; choose a site where each example has its own value."
            )
    _require_padded_alike(inputs, reference, values, grids, axes)

    def draw() -> dict[View, Source]:
        device = next(iter(pool.values())).device
        if reference is None:  # an example is never replaced by itself
            shift = integers(1, size, (count,), generator, device)
            rows = (torch.arange(count, device=device) + shift) % size
        else:
            rows = integers(0, size, (count,), generator, device)
        return {view: view.of(pool[view.want][rows]) for view in grids}

    return draw


def _replacement(view: View, value: Tensor, to: To, scale: float, generator: torch.Generator | None) -> Source:
    part = view.of(value)
    if isinstance(to, (Mapping, TensorDictBase)):
        mean = to[view.name]
        try:
            return view.of(mean.to(value).expand_as(value))
        except (RuntimeError, AttributeError):
            raise SiteError(
                f"to has {describe(mean)} for {view.name!r}, which holds {describe(value)}; give a tensor that broadcasts "
                "to it (means per position need prompts of the same length; mean_activations(pooled=True) does not)."
            ) from None
    if to == "noise":
        noise = normal_like(part, generator)
        return lambda there: there + scale * there.std() * noise
    return torch.full_like(part, 0.0 if to == "zero" else float(to))


def _require_like(pool: Mapping[Want, Tensor], values: Mapping[Want, Tensor]) -> None:
    for want, value in pool.items():
        if value.shape[1:] != values[want].shape[1:]:
            raise InputError(
                f"reference gives {describe(value)} at {str(want.site)!r}, inputs {describe(values[want])}; give examples of "
                "the same length."
            )


def _require_padded_alike(
    inputs: Any, reference: Any, values: Mapping[Want, Tensor], grids: Grids, axes: tuple[int, ...]
) -> None:
    """Raises `InputError` where padding of one example could be drawn for a token of another."""
    masks = [mask_of(given) for given in (inputs, reference)]
    known = [mask for mask in masks if mask is not None]
    if not known or not visible(*known):
        return
    if reference is not None and len(known) < 2:
        known.append(torch.ones_like(known[0][:1]))
    if known[0].shape[1] != known[-1].shape[1]:
        return
    rows = torch.cat(known)
    alike = (rows == rows[:1]).all(0)
    for view, lists in grids.items():
        part = view.of(values[view.want])
        if part.ndim < 3 or part.shape[1] != len(alike):
            continue  # no positions there
        along = {axis % part.ndim: chosen for axis, chosen in zip(axes, lists)}
        if not alike[along[1] if 1 in along else slice(None)].all():
            raise InputError(
                f"the examples are padded at different places, so that padding of one would be drawn at {view.name!r} for a "
                "token of another; give prompts of one length, or positions (axis=1) that are tokens in all of them."
            )
