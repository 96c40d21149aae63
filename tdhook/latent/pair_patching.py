"""Activation patching over a data set of prompt pairs: means and standard errors, read as a stream, that can be resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import require_positive, warn_if_stochastic
from ..core.errors import InputError, TargetError
from ..core.estimate import Estimate, Moments
from ..core.functional import FunctionalModel
from ..core.progress import Progress
from ..core.structure import describe
from .activation_patching import activation_patching, restored
from .patches import Axis, Indices, Where, as_axes, require_metric, views
from .prompt_pairs import require_aligned
from .runs import require_direction, wide
from .streaming import fingerprint, numbered
from .subspaces import Subspace

FORMAT = 1


class PairPatching(NamedTuple):
    """Means over pairs with their standard errors, in float32 at least.

    Attributes:
        patched: `Estimate` of [S, P], as `Patching.patched` without its last dimension, or of its normalised form.
        clean: `Estimate` of [], the metric of the clean run.
        corrupted: `Estimate` of [], that of the corrupted run.
        pairs: how many there were.
    """

    patched: Estimate
    clean: Estimate
    corrupted: Estimate
    pairs: int


def patch_pairs(
    f: FunctionalModel,
    params: Any,
    pairs: Iterable[Sequence[Any]],
    metric: Callable[..., Tensor],
    *,
    sites: Where,
    positions: Indices = None,
    axis: Axis = 1,
    subspaces: Subspace | Tensor | Mapping[str, Subspace | Tensor] | None = None,
    direction: str = "denoise",
    normalize: bool = False,
    path: str | os.PathLike | None = None,
    resume: bool = False,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> PairPatching:
    """`activation_patching` for each of many pairs: the mean over the pairs, and its standard error.

        mean_n patched_n[s, p]        or, normalised,        mean_n (patched_n[s, p] - corrupted_n) / (clean_n - corrupted_n)

    Args:
        f: functional model.
        params: its parameters.
        pairs: iterable of batches `(clean, corrupted)` or `(clean, corrupted, answers)` of B aligned prompts each. Batches may
            differ in length if `positions` or `axis` say what to compare, such as `positions=[-2, -1]`.
        metric: function of the output, and of `answers` where these are given, to a tensor [B], one number for each pair.
        sites: as for `activation_patching`.
        positions: as for `activation_patching`.
        axis: as for `activation_patching`.
        subspaces: as for `activation_patching`.
        direction: as for `activation_patching`.
        normalize: whether each pair is scaled to 0 for its corrupted run and 1 for its clean one. A pair whose runs are nearly
            alike then weighs much; the ratio of the means without `normalize` has no such trouble:
            `(patched.value - corrupted.value) / (clean.value - corrupted.value)`.
        path: a file that is written after every batch.
        resume: whether to go on from what `path` holds: the same batches are given again, with the same `params` and `metric`,
            those that are finished are passed over, and the result is the same bit for bit.
        chunk_size: as for `activation_patching`.
        progress: called as `progress(done, total)`, in batches; of an iterable without a length only the end is known.

    Returns:
        `PairPatching`.

    Raises:
        InputError: no pair, pairs that do not align, `normalize` with a pair whose runs have the same metric, a file that holds
        something else than what is to be resumed. TargetError: a metric that is not [B]. SiteError: as `capture`.

    Cost: that of `activation_patching` for each batch, without gradients; memory for one batch. Not for `torch.compile` and
    `vmap`: it reads an iterable.

    Source: Wang et al., "Interpretability in the Wild" (2022); Heimersheim and Nanda, "How to use and interpret activation
    patching" (2024).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity()))
        >>> pairs = [(torch.tensor([[1.0, 0]]), torch.zeros(1, 2)), (torch.tensor([[3.0, 4]]), torch.zeros(1, 2))]
        >>> result = patch_pairs(f, params, pairs, lambda out: out.sum(1), sites="0")
        >>> result.patched.value, result.patched.standard_error
        (tensor([[2., 2.]]), tensor([[1., 2.]]))
    """
    seen = views(f, sites)
    as_axes(axis)
    require_direction(direction)
    require_positive("chunk_size", chunk_size, optional=True)
    require_metric(metric)
    if path is None and resume:
        raise InputError("resume=True goes on with what is on disk; give path.")
    warn_if_stochastic(f, "patch_pairs")
    asked = {
        "sites": [str(view) for view in seen],
        "positions": str(positions),
        "axis": str(axis),
        "direction": direction,
        "normalize": normalize,
        "subspaces": _told(subspaces),
    }
    state = _State(path, asked, resume)
    count = 0
    for number, pair in numbered(pairs, progress):
        count = number + 1
        clean, corrupted, measure = _unpacked(pair, metric, number)
        if number < state.batches:
            if number == state.batches - 1:
                state.require_same(pair)
            continue
        with torch.no_grad():
            got = activation_patching(
                f,
                params,
                clean,
                corrupted,
                measure,
                sites=sites,
                positions=positions,
                axis=axis,
                subspaces=subspaces,
                direction=direction,
                chunk_size=chunk_size,
            )
            patched = restored(got.patched, got.clean, got.corrupted) if normalize else got.patched
            samples = {"patched": patched.movedim(-1, 0), "clean": got.clean, "corrupted": got.corrupted}
        state.add({name: Moments.of(wide(sample)) for name, sample in samples.items()}, pair)
    if count < state.batches:
        raise InputError(f"pairs has {count} batches, but path={str(path)!r} holds {state.batches}; give the same ones again.")
    estimates = {name: Estimate(each.mean, each.standard_error) for name, each in state.moments.items()}
    return PairPatching(**estimates, pairs=state.moments["clean"].count)


def _unpacked(pair: Any, metric: Callable[..., Tensor], number: int) -> tuple[Any, Any, Callable[[Any], Tensor]]:
    if not isinstance(pair, (tuple, list)) or len(pair) not in (2, 3):
        raise InputError(
            f"batch {number} of pairs is {describe(pair)}; give (clean, corrupted) or (clean, corrupted, answers)."
        )
    clean, corrupted, *answers = pair
    require_aligned(clean, corrupted)
    return clean, corrupted, partial(_one_for_each, metric, answers, number)


def _one_for_each(metric: Callable[..., Tensor], answers: Sequence[Any], number: int, output: Any) -> Tensor:
    value = metric(output, *answers)
    if not isinstance(value, Tensor) or value.ndim != 1:
        raise TargetError(
            f"metric returned {describe(value)} for batch {number}; return one number for each pair, a tensor [B], so that the "
            "standard error can be told."
        )
    return value


def _told(subspaces: Any) -> str | None:
    """What a file remembers of the subspaces."""
    if subspaces is None:
        return None
    given = subspaces if isinstance(subspaces, Mapping) else {"": subspaces}
    parts = {
        site: (s.read, s.write, torch.tensor(s.complemented)) if isinstance(s, Subspace) else s for site, s in given.items()
    }
    return f"checksum {fingerprint(parts):08x}"


class _State:
    """Moments so far, in memory and, with a path, in a file that is replaced in one step."""

    def __init__(self, path: str | os.PathLike | None, asked: dict[str, Any], resume: bool):
        self.path = None if path is None else Path(path)
        self.asked = asked
        self.moments: dict[str, Moments] = {}
        self.batches, self.checksum = 0, 0
        if self.path is None or not self.path.exists():
            return
        if not resume:
            raise InputError(f"path={str(path)!r} exists; resume=True goes on from it, else give another file.")
        try:
            record = torch.load(self.path, weights_only=True)
            held = record["format"], record["asked"], record["moments"], record["batches"], record["checksum"]
        except Exception as error:
            raise InputError(f"path={str(path)!r} is damaged or was not written by patch_pairs; give another file.") from error
        if held[0] != FORMAT:
            raise InputError(f"path={str(path)!r} has format {held[0]!r}; this version of tdhook reads {FORMAT}.")
        for name, value in asked.items():
            if held[1].get(name) != value:
                raise InputError(
                    f"{name}={value!r} is not what path={str(path)!r} was begun with, {held[1].get(name)!r}; resume with the "
                    "same arguments, or give another file."
                )
        self.moments = {name: Moments(*parts) for name, parts in held[2].items()}
        self.batches, self.checksum = held[3], held[4]

    def require_same(self, inputs: Any) -> None:
        if fingerprint(inputs) != self.checksum:
            raise InputError(
                f"batch {self.batches - 1} is not what it was when path={str(self.path)!r} was written; to resume, give the "
                "same batches in the same order (no shuffling), or another file."
            )

    def add(self, moments: dict[str, Moments], inputs: Any) -> None:
        for name, new in moments.items():
            old = self.moments.get(name)
            if old is not None and old.mean.shape != new.mean.shape:
                raise InputError(
                    f"batch {self.batches} gives {name} of shape {list(new.mean.shape)}, those before {list(old.mean.shape)}; "
                    "for prompts of different length give positions, such as [-2, -1], or another axis."
                )
            self.moments[name] = new if old is None else old + new
        self.batches += 1
        if self.path is None:
            return
        self.checksum = fingerprint(inputs)
        record = {
            "format": FORMAT,
            "asked": self.asked,
            "batches": self.batches,
            "checksum": self.checksum,
            "moments": {name: (m.count, m.mean, m.squares) for name, m in self.moments.items()},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_name(self.path.name + ".tmp")
        torch.save(record, written)
        os.replace(written, self.path)
