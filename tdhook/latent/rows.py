"""A table of rows that grows batch by batch; here in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from ..core.errors import InputError
from ..core.structure import describe


class Rows:
    """What all tables of rows share: a check that what is appended fits what is there.

    Attributes:
        rows, batches, examples: how many are there.
        kinds: dtype and shape of a row, by column.
    """

    def __init__(self, total: int | None):
        self.total = total
        self.rows = self.batches = self.examples = 0
        self.kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}

    def admit(self, rows: Mapping[str, Tensor]) -> int:
        """How many rows these are."""
        counts = {name: len(column) for name, column in rows.items()}
        count = next(iter(counts.values()))
        if self.kinds and set(self.kinds) != set(rows):
            name = sorted(set(self.kinds) ^ set(rows))[0]
            raise InputError(f"keep gives {name!r} for some batches and not for others; give the same names for each.")
        for name, column in rows.items():
            if counts[name] != count:
                raise InputError(
                    f"{next(iter(counts))!r} gives {count} rows and {name!r} {counts[name]}; collect what has other "
                    "positions in another call."
                )
            kind = (column.dtype, tuple(column.shape[1:]))
            if self.kinds.setdefault(name, kind) != kind:
                dtype, shape = self.kinds[name]
                raise InputError(
                    f"{name!r} gives rows like {describe(column[:1])}, where those before were {dtype_name(dtype)} of shape "
                    f"{[1, *shape]}; bring all batches to one shape, or pool them."
                )
        if self.total is not None and self.rows + count > self.total:
            raise InputError(f"total={self.total} is less than the rows that there are; leave it out, or give their number.")
        return count


class InMemory(Rows):
    """Keeps rows as tensors that grow by doubling. (A list of all parts, joined at the end, leaves holes in the heap that are
    as large as the result.)

    Args:
        total: how many rows there will be: then nothing has to grow.
        device: where they are kept; None for where they come from.
    """

    def __init__(self, total: int | None, device: torch.device | str | None):
        super().__init__(total)
        self.device = device
        self.columns: dict[str, Tensor] = {}

    def append(self, rows: Mapping[str, Tensor]) -> None:
        end = self.rows + self.admit(rows)
        for name, column in rows.items():
            kept = self.columns.get(name)
            if kept is None or len(kept) < end:
                size = self.total or max(end, 0 if kept is None else 2 * len(kept))
                grown = column.new_empty(size, *column.shape[1:], device=self.device or column.device)
                if kept is not None:
                    grown[: self.rows] = kept[: self.rows]
                kept = self.columns[name] = grown
            kept[self.rows : end] = column
        self.rows = end

    def commit(self, inputs: Any, examples: int) -> None:
        """Ends a batch."""
        self.batches += 1
        self.examples += examples

    def finish(self) -> TensorDict:
        exact = {}
        for name in list(self.columns):
            column = self.columns.pop(name)
            exact[name] = column if len(column) == self.rows else column[: self.rows].clone()
        return TensorDict(exact, batch_size=[self.rows])


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
