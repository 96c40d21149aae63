"""The examples that activate a unit most, found in one pass over a data set with constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import require_positive, warn_if_stochastic
from ..core.errors import InputError, SiteError
from ..core.functional import FunctionalModel
from ..core.progress import Progress
from ..core.sites import Site
from ..core.structure import describe
from ..core.transforms import Sites, require_sites, resolve
from .pooling import over_positions
from .streaming import Part, Positions, count_examples, head, numbered

REDUCTIONS = ("max", "min", "mean")
Reduce = str | Callable[[Tensor, Tensor | None], Tensor] | None


class TopActivating(NamedTuple):
    """The k examples with the largest (or smallest) activation, for each unit, the most extreme first.

    Attributes:
        values: Tensor [U, k].
        examples: int64 [U, k], counted in the data set.
        positions: int64 [U, k, A]: where in the example, along each of the A axes of positions: [token], or [row, column]. A is
            0 where the whole example is measured (no such axis, a mean, a function).
        units: int64 [U]: which units these are.
    """

    values: Tensor
    examples: Tensor
    positions: Tensor
    units: Tensor


def top_activating(
    f: FunctionalModel,
    params: Any,
    batches: Iterable[Any],
    sites: Sites,
    *,
    k: int = 10,
    units: Sequence[int] | None = None,
    unit_axis: int = -1,
    reduce: Reduce = "max",
    largest: bool = True,
    positions: Positions = None,
    inputs_of: Callable[[Any], Any] | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> TopActivating | dict[str, TopActivating]:
    """The examples of a data set on which each unit is most active, and where.

        values[u, 1..k] = the k largest of { reduce over p of a(x_n)[p, u] : n }

    Args:
        f: functional model.
        params: its parameters.
        batches: iterable of batches; see `collect`.
        sites: an address, or several (or a pattern), which are then found in the same pass.
        k: how many examples for each unit.
        units: indices of the units; None for all.
        unit_axis: the axis of the value at the site that counts units: -1 for the features of [B, D] and [B, L, D], 1 for the
            channels of [B, C, H, W] and the heads of [B, heads, L, D]. All others but the first are axes of positions.
        reduce: how an example is measured: its `"max"`, `"min"` or `"mean"` over positions; a function (value [B, P, U], mask
            [B, P] or None) -> Tensor [B, U]; or None: each position competes for itself.
        largest: False gives the k smallest; the mirror image of the default is `reduce="min", largest=False`.
        positions: which positions count, as in `collect`: a mask of the first axes of positions, [B, L].
        inputs_of: a function of the batch, as in `collect`.
        chunk_size: how many examples of a batch run at once; None for all.
        progress: called as `progress(done, total)`, in batches.

    Returns:
        `TopActivating` for an address; a dictionary of them by canonical site for several. Of equal values the one that comes
        first in the data set (and in the example) wins. Fewer than k where there are fewer candidates.

    Raises:
        InputError: no batch, unknown options, a unit out of range, NaN at the site. SiteError: as `stop_at`; a value without
            the axis. Warns for a model in train mode.

    Cost: one forward pass up to the last site, and one sort of k + B values for each unit and batch. Memory: the values of
    `chunk_size` examples, and k numbers for each unit. Not for `torch.compile` and `vmap`: it reads an iterable.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Flatten()))
        >>> x = torch.tensor([[1.0, 5.0], [3.0, 2.0], [2.0, 4.0]])
        >>> top = top_activating(f, params, x.split(2), "0", k=2)
        >>> top.values, top.examples
        (tensor([[3., 2.], [5., 4.]]), tensor([[1, 2], [0, 2]]))
    """
    require_sites(f)
    for name, number in (("k", k), ("chunk_size", chunk_size)):
        require_positive(name, number, optional=name != "k")
    if not (reduce is None or callable(reduce) or reduce in REDUCTIONS):
        raise InputError(f"reduce={reduce!r} is unknown; choose from {', '.join(REDUCTIONS)}, or give a function or None.")
    if not isinstance(unit_axis, int) or isinstance(unit_axis, bool) or unit_axis == 0:
        raise InputError(f"unit_axis={unit_axis!r} is no axis of units; axis 0 counts examples.")
    if units is not None and (not len(units) or not all(isinstance(u, int) and not isinstance(u, bool) for u in units)):
        raise InputError(f"units={units!r} names no unit; give a sequence of indices, or None for all.")
    model = head("top_activating", f, sites, inputs_of, positions, chunk_size)
    warn_if_stochastic(f, "top_activating")

    ranking = _Ranking(k, units, unit_axis, reduce, largest)
    best: dict[str, TopActivating] = {}
    before = 0
    for _, batch in numbered(batches, progress):
        count = count_examples(model.inputs(batch))
        for part in model.run(params, batch):
            for site in model.sites:
                best[site] = ranking.merged(best.get(site), site, part, before + part.examples.start)
            del part
        before += count
        del batch
    one = isinstance(sites, (str, Site)) and resolve(f, sites)[0].exact
    return best[model.sites[0]] if one else best


@dataclass(frozen=True)
class _Ranking:
    k: int
    units: Sequence[int] | None
    unit_axis: int
    reduce: Reduce
    largest: bool

    @torch.no_grad()
    def merged(self, best: TopActivating | None, site: str, part: Part, first: int) -> TopActivating:
        """The best of those before and of some more examples, the first of which has number `first`."""
        value, shape, units = self._units_last(site, part.values[site])
        mask = self._mask(site, part.mask, value, shape)
        values, example, place = self._candidates(value, mask)
        if values.isnan().any():
            raise InputError(f"site {site!r} holds NaN in or near example {first}, which has no rank.")
        examples = (first + example)[:, None].expand_as(values)
        positions = _unravelled(place, shape) if place is not None else values.new_zeros(*values.shape, 0, dtype=torch.int64)
        if best is not None:
            if best.values.shape[0] != values.shape[1] or best.positions.shape[-1] != positions.shape[-1]:
                raise InputError(
                    f"site {site!r} gives {values.shape[1]} units where earlier batches gave {len(best.units)}, or has another "
                    "number of axes."
                )
            values = torch.cat([best.values.T, values])
            examples = torch.cat([best.examples.T, examples])
            positions = torch.cat([best.positions.transpose(0, 1), positions])
        # stable: of equal values those that came first stay in front
        values, order = values.sort(dim=0, descending=self.largest, stable=True)
        values, order = values[: self.k], order[: self.k]
        return TopActivating(
            values=values.T.contiguous(),
            examples=examples.gather(0, order).T.contiguous(),
            positions=positions.gather(0, order[..., None].expand(*order.shape, positions.shape[-1]))
            .transpose(0, 1)
            .contiguous(),
            units=units,
        )

    def _units_last(self, site: str, value: Tensor) -> tuple[Tensor, tuple[int, ...], Tensor]:
        """The value as [B, P, U], at least in float32; the axes that P stands for; and the units."""
        if not -value.ndim < self.unit_axis < value.ndim or value.is_complex():
            raise SiteError(
                f"site {site!r} holds {describe(value)}, where axis {self.unit_axis} does not count real units; give unit_axis."
            )
        value = value.movedim(self.unit_axis, -1)
        units = torch.arange(value.shape[-1], device=value.device)
        if self.units is not None:
            wrong = [u for u in self.units if not -len(units) <= u < len(units)]
            if wrong:
                raise InputError(f"units has {wrong[0]}, out of range for the {len(units)} units at {site!r}.")
            units = units[list(self.units)]
            value = value[..., units]
        shape = tuple(value.shape[1:-1])
        if 0 in value.shape[1:]:
            raise SiteError(f"site {site!r} holds {describe(value)}, which has no position or no unit.")
        flat = value.reshape(len(value), -1, value.shape[-1])
        return flat.to(torch.promote_types(flat.dtype, torch.float32)), shape, units

    def _mask(self, site: str, mask: Tensor | None, value: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """[B, P]: a mask of the first axes of positions holds for all of the others."""
        if mask is None or not shape:
            return None
        if tuple(mask.shape[1:]) != shape[: mask.ndim - 1]:
            raise SiteError(
                f"site {site!r} has positions {list(shape)} for each example where the mask is {describe(mask)}; give "
                "positions=..., a function of the batch that returns the mask for this site."
            )
        mask = mask.to(value.device).reshape(*mask.shape, *[1] * (len(shape) + 1 - mask.ndim))
        return mask.expand(len(value), *shape).reshape(len(value), -1)

    def _candidates(self, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What competes, in order: values [R, U], their examples [R], and their flat positions [R, U], where they have one."""
        number = torch.arange(len(value), device=value.device)
        if callable(self.reduce):
            scores = self.reduce(value, mask)
            expected = (value.shape[0], value.shape[2])
            if not isinstance(scores, Tensor) or scores.shape != expected:
                raise InputError(f"reduce returned {describe(scores)}; return a tensor [B, U], here {list(expected)}.")
            return scores, number, None
        at = None if mask is None else over_positions(mask, value)
        if self.reduce == "mean":
            return (value.mean(1) if at is None else torch.where(at, value, 0).sum(1) / at.sum(1)), number, None
        if self.reduce is None:
            kept = torch.ones_like(value[..., 0], dtype=torch.bool) if mask is None else mask
            example, place = kept.nonzero(as_tuple=True)
            return value[kept], example, place[:, None].expand(-1, value.shape[-1])
        bottom = self.reduce == "min"
        value = value if at is None else torch.where(at, value, torch.inf if bottom else -torch.inf)
        scores, place = value.min(1) if bottom else value.max(1)
        return scores, number, place


def _unravelled(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[..., A]: the index along each axis of what is flattened."""
    places = []
    for size in reversed(shape):
        places.append(flat % size)
        flat = flat // size
    return torch.stack(places[::-1], -1) if places else flat.new_zeros(*flat.shape, 0)
