"""Activations on disk: a folder with one plain file of rows for each column.

A folder holds `0.rows`, `1.rows`, ... (the rows of a column one after the other, in the byte order of the machine) and
`activations.json`, which says what they are and how many rows are finished. Rows are appended to all files first; then the
record is replaced by a new one, in one step. So a reader never sees a row that is not finished, and a run that was interrupted
goes on after the last batch that was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from ..core.errors import InputError
from .rows import Rows, dtype_name
from .streaming import as_bytes, fingerprint

RECORD = "activations.json"
FORMAT = 1


def open_activations(path: str | os.PathLike) -> TensorDict:
    """What `collect` has written to a folder so far, as a memory-mapped TensorDict.

    Other processes may read while the collection goes on; each call shows the batches that are finished by then.

    Args:
        path: the folder that was given to `collect`.

    Returns:
        TensorDict [N] of tensors [N, *row], mapped privately: only what is looked at is read from disk, and what is written
        into a tensor stays in this process.

    Raises:
        InputError: there is no collection in the folder, or its files are damaged.

    Cost: opens the files and reads no row.

    Examples:
        >>> import tempfile
        >>> from tdhook.latent.collection import collect
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = collect(f, params, torch.randn(10, 3).split(4), ":out", path=folder)
        ...     open_activations(folder)[":out"].shape
        torch.Size([10, 2])
    """
    folder = Path(path)
    record = _read_record(folder)
    if record is None:
        raise InputError(
            f"path={str(path)!r} holds no activations (yet): there is no {RECORD}; collect(..., path=...) writes it."
        )
    rows = record["rows"]
    columns = {}
    for name, column in record["columns"].items():
        dtype, shape = getattr(torch, column["dtype"]), (rows, *column["shape"])
        numel = torch.Size(shape).numel()
        file = folder / column["file"]
        _require_length(file, numel * dtype.itemsize)
        # shared=False maps copy-on-write, and needs no permission to write
        flat = torch.from_file(str(file), shared=False, size=numel, dtype=dtype) if numel else torch.empty(0, dtype=dtype)
        columns[name] = flat.reshape(shape)
    return TensorDict(columns, batch_size=[rows])


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{folder / RECORD} is damaged; delete the folder and collect again.") from error
    if record.get("format") != FORMAT:
        raise InputError(f"{folder / RECORD} has format {record.get('format')!r}; this version of tdhook reads {FORMAT}.")
    return record


def _require_length(file: Path, length: int) -> None:
    size = file.stat().st_size if file.exists() else 0
    if size < length:
        raise InputError(f"{file} is damaged: it has {size} bytes of {length}; delete the folder and collect again.")


class OnDisk(Rows):
    """Appends rows to the files of a folder.

    Args:
        path: the folder.
        asked: what was asked for, as JSON can hold it: to be the same when a collection is resumed.
        resume: whether to go on with what is there.
        total: how many rows there will be: the space is reserved at once.
    """

    def __init__(self, path: str | os.PathLike, asked: dict[str, Any], resume: bool, total: int | None):
        super().__init__(total)
        self.folder = Path(path)
        self.record = self._open(asked, resume)
        self.rows, self.batches, self.examples = (self.record[key] for key in ("rows", "batches", "examples"))
        for name, column in self.record["columns"].items():
            dtype = getattr(torch, column["dtype"])
            self.kinds[name] = (dtype, tuple(column["shape"]))
            file = self.folder / column["file"]
            _require_length(file, self.rows * _row_bytes(self.kinds[name]))
            os.truncate(file, self.rows * _row_bytes(self.kinds[name]))  # a batch that was interrupted
        self._reserve(self.record["columns"])

    def _open(self, asked: dict[str, Any], resume: bool) -> dict[str, Any]:
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"path={str(self.folder)!r} is a file; give a folder.")
        record = _read_record(self.folder)
        if record is None:
            there = self.folder.iterdir() if self.folder.exists() else ()
            if foreign := [file.name for file in there if file.suffix not in (".rows", ".tmp")]:
                raise InputError(
                    f"path={str(self.folder)!r} holds other files ({foreign[0]}); give a folder that is new or empty."
                )
            return {"format": FORMAT, "asked": asked, "columns": {}, "rows": 0, "examples": 0, "batches": 0}
        if not resume:
            raise InputError(
                f"path={str(self.folder)!r} holds {record['rows']} rows already; resume=True goes on after them, "
                "open_activations(path) reads them; else give another folder."
            )
        for name, value in asked.items():
            if record["asked"].get(name) != value:
                raise InputError(
                    f"{name}={value!r} is not what path={str(self.folder)!r} was begun with, {record['asked'].get(name)!r}; "
                    "resume with the same arguments, or give another folder."
                )
        return record

    def require_same(self, inputs: Any) -> None:
        """Raises `InputError` unless these are the inputs of the last batch that is there."""
        if fingerprint(inputs) != self.record["last_checksum"]:
            raise InputError(
                f"batch {self.batches - 1} is not what it was when path={str(self.folder)!r} was written; to resume, give the "
                "same batches in the same order (no shuffling), or another folder."
            )

    def append(self, rows: Mapping[str, Tensor]) -> None:
        count = self.admit(rows)
        columns = self.record["columns"]
        if not columns:
            self.folder.mkdir(parents=True, exist_ok=True)
            for number, (name, (dtype, shape)) in enumerate(self.kinds.items()):
                columns[name] = {"file": f"{number}.rows", "dtype": dtype_name(dtype), "shape": list(shape)}
                (self.folder / columns[name]["file"]).write_bytes(b"")
            self._reserve(columns)
        for name, column in rows.items():
            # opened for each batch: a process may hold fewer files open than a model has sites
            with (self.folder / columns[name]["file"]).open("r+b", buffering=0) as file:
                file.seek(self.rows * _row_bytes(self.kinds[name]))
                _write_all(file, as_bytes(column))
        self.rows += count

    def commit(self, inputs: Any, examples: int) -> None:
        """Ends a batch: makes its rows visible."""
        self.batches += 1
        self.examples += examples
        self.record.update(rows=self.rows, batches=self.batches, examples=self.examples, last_checksum=fingerprint(inputs))
        self._write_record()

    def finish(self) -> TensorDict:
        for name, column in self.record["columns"].items():
            with (self.folder / column["file"]).open("r+b") as file:
                file.truncate(self.rows * _row_bytes(self.kinds[name]))
                os.fsync(file.fileno())
        self._write_record(lasting=True)
        return open_activations(self.folder)

    def _reserve(self, columns: dict[str, Any]) -> None:
        if self.total is None:
            return
        for name, column in columns.items():
            with (self.folder / column["file"]).open("r+b") as file:
                size = self.total * _row_bytes(self.kinds[name])
                if hasattr(os, "posix_fallocate") and size:
                    os.posix_fallocate(file.fileno(), 0, size)  # fails now, not after hours, if the disk is too small

    def _write_record(self, lasting: bool = False) -> None:
        new = self.folder / f"{RECORD}.tmp"
        with new.open("w", encoding="utf-8") as file:
            json.dump(self.record, file)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(new, self.folder / RECORD)


def _row_bytes(kind: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = kind
    return dtype.itemsize * torch.Size(shape).numel()


def _write_all(file: Any, data: memoryview) -> None:
    """An unbuffered write may take a part only (2 GiB at most on Linux)."""
    done = 0
    while done < len(data):
        done += file.write(data[done:])
