"""Activation data: what a whole data set leaves at sites, in memory or on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from ..core.checks import require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.functional import FunctionalModel
from ..core.progress import Progress
from ..core.structure import describe
from ..core.transforms import Sites, require_sites
from .activation_store import OnDisk
from .pooling import Pool, pooled, require_pool, row_positions
from .rows import InMemory
from .streaming import Part, Positions, count_examples, head, numbered

EXAMPLE, POSITION = "example", "position"
Keep = Callable[[Any], Mapping[str, Tensor]]


def collect(
    f: FunctionalModel,
    params: Any,
    batches: Iterable[Any],
    sites: Sites,
    *,
    pool: Pool = None,
    axis: int | Sequence[int] = 1,
    positions: Positions = None,
    inputs_of: Callable[[Any], Any] | None = None,
    keep: Keep | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    path: str | os.PathLike | None = None,
    resume: bool = False,
    total: int | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> TensorDict:
    """The activations of a data set at sites, as one table of rows.

        row[site, n] = pool(value of example n at site)

    The data set is read once, in order; one batch is held at a time. The model runs without gradients, and only up to the last
    of the sites.

    Args:
        f: functional model.
        params: its parameters.
        batches: iterable of batches, such as `x.split(32)` or a `DataLoader`; a generator need not have a length. A batch is
            what `f` takes as inputs, or what `inputs_of` makes into that.
        sites: addresses; patterns stand for all modules that they match, in registration order. `":out"` is the output.
        pool: what is kept of a value [B, L, *features] with positions, such as tokens. None: the value as it is, of one shape
            in all batches. `"mean"` or `"max"` over the positions; `"last"`, or a number, for one position of each example;
            `"rows"`: each position is a row of its own. Or a function (value, mask) -> Tensor [B, *row].
        axis: the axis of the positions; several, such as (2, 3) for the places of an image [B, C, H, W], are flattened.
        positions: which positions count; others (padding) are not in the mean and make no row, and `"last"` and numbers count
            without them, so that padding on the left and on the right come to the same. A function of the batch that returns a
            mask [B, L], or the name of an entry of the inputs. None: `"attention_mask"` where the inputs have one, else all.
        inputs_of: a function of the batch, such as `lambda batch: batch[0]` for pairs of images and labels.
        keep: a function of the batch that returns further tensors [B, *shape] by name, such as labels, to keep next to the
            activations. Of a row that is a position it keeps what its example has.
        dtype: of what is kept; None for that of the values. It applies to floating-point values.
        device: where the rows are kept in memory; None for where they are computed.
        path: a folder to write to, instead of memory. It grows as the rows come; `open_activations` reads it, also from other
            processes and before it is complete.
        resume: whether to go on with what an interrupted run has written to `path`: the same batches are given again, those
            that are finished are passed over, and the result is bit for bit the same.
        total: the number of rows, where it is known: the memory or the space on disk is reserved at the start.
        chunk_size: how many examples of a batch run at once; None for all.
        progress: called as `progress(done, total)`, in batches; of batches without a length only the end is known.

    Returns:
        TensorDict [N] keyed by canonical site, with tensors [N, *row]; and by the names that `keep` gave. For `pool="rows"`
        also `"example"` and `"position"`, int64 [N]: where each row comes from, counted in the data set and in the example as
        it was given, with its padding. With `path` the tensors are memory-mapped.

    Raises:
        InputError: no batch, a batch without examples, unknown options, rows that differ in shape from batch to batch, a folder
            that holds something else than what is to be resumed. SiteError: as `stop_at`, a site without a dimension of
            examples or positions. Warns for a model in train mode.

    Cost: one forward pass up to the last site. Memory beyond the result: the values of `chunk_size` examples at the sites; in
    memory without `total`, one column more while it grows. A batch on disk outlives the end of the process, and after the last
    batch that of the machine. Not for `torch.compile` and `vmap`: it reads an iterable.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
        >>> rows = collect(f, params, torch.randn(10, 3).split(4), "*")
        >>> rows["0"].shape, rows["1"].shape
        (torch.Size([10, 2]), torch.Size([10, 2]))
        >>> words = collect(f, params, torch.randn(10, 5, 3).split(4), "0", pool="rows")
        >>> words["0"].shape, words["example"][:6]
        (torch.Size([50, 2]), tensor([0, 0, 0, 0, 0, 1]))
    """
    require_sites(f)
    require_pool(pool)
    axes = _axes(axis)
    for name, number in (("chunk_size", chunk_size), ("total", total)):
        require_positive(name, number, optional=True)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype is {describe(dtype)}; give a floating-point torch.dtype or None.")
    if keep is not None and not callable(keep):
        raise InputError(f"keep is {describe(keep)}; give a function of the batch that returns a mapping of tensors.")
    if path is None and resume:
        raise InputError("resume=True goes on with what is on disk; give path.")
    if path is not None and device is not None:
        raise InputError(f"device={device!r} has no meaning with path, which keeps the rows on disk; leave one of them out.")
    model = head("collect", f, sites, inputs_of, positions, chunk_size)
    bookkeeping = {EXAMPLE, POSITION} if pool == "rows" else set()
    taken = {*model.sites, *bookkeeping}
    if bookkeeping & set(model.sites):
        raise InputError("a site named 'example' or 'position' has the name of a column of pool='rows'; use another pool.")
    warn_if_stochastic(f, "collect")

    asked = {"sites": model.sites, "pool": _spelled(pool), "axis": list(axes), "dtype": _spelled(dtype)}
    store = InMemory(total, device) if path is None else OnDisk(path, asked, resume, total)
    there = store.batches
    seen = 0
    for number, batch in numbered(batches, progress):
        seen = number + 1
        if number < there - 1:
            continue
        inputs = model.inputs(batch)
        if isinstance(store, OnDisk) and number < there:
            store.require_same(inputs)
            continue
        count = count_examples(inputs)
        kept = {} if keep is None else _kept(keep(batch), count, taken)
        for part in model.run(params, batch):
            store.append(_rows(part, kept, store.examples, pool, axes, dtype))
        store.commit(inputs, count)
        del batch, inputs, kept, part  # or they are held while the next batch is made
    if seen < there:
        raise InputError(f"batches has {seen}, but path={str(path)!r} holds {there} already; give the same batches again.")
    return store.finish()


def _rows(
    part: Part, kept: dict[str, Tensor], before: int, pool: Pool, axes: Sequence[int], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The rows of some examples of a batch, by column; `before` examples came in earlier batches."""
    with torch.no_grad():
        rows = {site: _own(pooled(site, value, part.mask, pool, axes, dtype), dtype) for site, value in part.values.items()}
        kept = {name: column[part.examples] for name, column in kept.items()}
        if pool == "rows":
            site, value = next(iter(part.values.items()))
            example, position = row_positions(site, value, part.mask, axes)
            kept = {name: column[example.to(column.device)] for name, column in kept.items()}
            rows[EXAMPLE], rows[POSITION] = example + (before + part.examples.start), position
        return {**rows, **{name: column.detach().clone() for name, column in kept.items()}}


def _kept(kept: Any, count: int, taken: set[str]) -> dict[str, Tensor]:
    """What `keep` returned for a batch; raises `InputError` for other things than a tensor [B, *shape] by a free name."""
    if not hasattr(kept, "items"):
        raise InputError(f"keep returned {describe(kept)}; return a mapping from names to tensors.")
    for name, column in kept.items():
        if name in taken:
            raise InputError(f"keep gives {name!r}, which is the name of a site or of a column of rows; choose another name.")
        if not isinstance(column, Tensor) or column.ndim == 0 or len(column) != count:
            raise InputError(f"keep gives {describe(column)} as {name!r} for {count} examples; give a tensor [B, *shape].")
    return dict(kept.items())


def _own(rows: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Rows in the dtype asked for that hold no larger tensor alive."""
    rows = rows.to(dtype) if dtype is not None and rows.is_floating_point() else rows
    used = rows.numel() * rows.element_size()
    return rows.clone(memory_format=torch.contiguous_format) if rows.untyped_storage().nbytes() > used else rows.contiguous()


def _axes(axis: int | Sequence[int]) -> tuple[int, ...]:
    axes = (axis,) if isinstance(axis, int) else tuple(axis) if isinstance(axis, (tuple, list)) else ()
    if not axes or len(set(axes)) < len(axes) or not all(isinstance(a, int) and not isinstance(a, bool) for a in axes):
        raise InputError(f"axis={axis!r} is no axis; give a number, or several different ones.")
    return axes


def _spelled(value: Any) -> str | int | None:
    """What a record on disk can compare; of a function only that it is one."""
    return value if value is None or isinstance(value, (str, int)) else "a function" if callable(value) else str(value)
