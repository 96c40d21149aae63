"""A data set as a stream: batches go through the head of a model one after the other, and nothing of them is kept."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ..core.batching import chunks
from ..core.errors import InputError, SiteError
from ..core.functional import FunctionalModel
from ..core.progress import Progress
from ..core.reading import StopAt
from ..core.structure import describe, tensors
from ..core.transforms import Sites, exact_wants, expand

MASK = "attention_mask"
Positions = str | Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class Part:
    """What some examples of one batch left behind.

    Attributes:
        values: Tensor [B, *shape] by site.
        mask: bool Tensor [B, *positions], which positions count; None for all.
        examples: which of the batch these are.
    """

    values: dict[str, Tensor]
    mask: Tensor | None
    examples: slice


@dataclass(frozen=True)
class Head:
    """The part of a model up to the last of several sites, and how a batch is handed to it.

    Attributes:
        wants: the sites, resolved.
        inputs_of: from a batch of the data set to inputs as the model takes them; None where it is that already.
        positions: see `collect`.
        chunk_size: how many examples run at once.
    """

    f: FunctionalModel
    wants: tuple
    inputs_of: Callable[[Any], Any] | None
    positions: Positions
    chunk_size: int | None

    @property
    def sites(self) -> list[str]:
        return [str(want.site) for want in self.wants]

    def inputs(self, batch: Any) -> Any:
        return batch if self.inputs_of is None else self.inputs_of(batch)

    def run(self, params: Any, batch: Any) -> Iterator[Part]:
        """The values of a batch, `chunk_size` examples at a time."""
        inputs = self.inputs(batch)
        count = count_examples(inputs)
        mask = _mask(self.positions, batch, inputs, count)
        for examples in chunks(count, self.chunk_size):
            some = inputs if examples == slice(0, count) else take_examples(inputs, examples, count)
            yield Part(
                self._values(params, some, examples.stop - examples.start), None if mask is None else mask[examples], examples
            )

    def _values(self, params: Any, inputs: Any, count: int) -> dict[str, Tensor]:
        # Not around the `yield`: between two parts the caller's own code runs, in the caller's own grad mode.
        with torch.no_grad():
            values = StopAt(self.f, self.wants, False)(params, inputs)
        for site, value in values.items():
            if value.ndim == 0 or len(value) != count:
                raise SiteError(
                    f"site {site!r} holds {describe(value)}, whose first dimension is not that of the {count} examples in "
                    "the batch; choose a site where each example has its own value."
                )
        # taken out, since a TensorDict 0.8 is part of a cycle, which would keep them until the garbage collector comes
        return {site: values.pop(site) for site in list(values.keys())}


def head(
    method: str,
    f: FunctionalModel,
    sites: Sites,
    inputs_of: Callable[[Any], Any] | None,
    positions: Positions,
    chunk_size: int | None,
) -> Head:
    """The head of a model; patterns stand for the modules that they match. Raises `SiteError` for what means several values."""
    for name, value in (("inputs_of", inputs_of), ("positions", None if isinstance(positions, str) else positions)):
        if value is not None and not callable(value):
            raise InputError(f"{name} is {describe(value)}; give a function of the batch.")
    return Head(f, exact_wants(f, expand(f, sites), method), inputs_of, positions, chunk_size)


def numbered(batches: Iterable[Any], progress: Progress | None) -> Iterator[tuple[int, Any]]:
    """The batches, counted from 0; reports how many are done. Raises `InputError` where there are none."""
    if isinstance(batches, (Tensor, TensorDictBase, Mapping, str)) or not hasattr(batches, "__iter__"):
        raise InputError(f"batches is {describe(batches)}; give an iterable of batches, such as x.split(32) or a DataLoader.")
    total = _length(batches)
    done = 0
    for batch in batches:
        if progress is not None:
            progress(done, done + 1 if total is None else total)  # without a length: there is at least this one
        yield done, batch
        del batch  # or it is held while the next one is made
        done += 1
    if not done:
        raise InputError("batches is empty; give at least one batch (a generator can be used only once).")
    if progress is not None:
        progress(done, done)


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader of a data set without a length
        return None


def count_examples(inputs: Any) -> int:
    """The first dimension of the first tensor that has one."""
    sizes = [len(tensor) for _, tensor in tensors(inputs) if tensor.ndim]
    if not sizes or not sizes[0]:
        raise InputError(f"a batch holds {describe(inputs)}, with no example in it; give tensors [B, *features] with B > 0.")
    return sizes[0]


def take_examples(inputs: Any, examples: slice, count: int) -> Any:
    """Some of the `count` examples. What has another first dimension belongs to all of them and is passed whole."""
    if isinstance(inputs, Tensor):
        return inputs[examples] if inputs.ndim and len(inputs) == count else inputs
    if isinstance(inputs, TensorDictBase):
        return inputs[examples] if inputs.batch_size else inputs.apply(lambda t: take_examples(t, examples, count))
    if isinstance(inputs, Mapping):
        return {name: take_examples(value, examples, count) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        parts = [take_examples(value, examples, count) for value in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    return inputs


def _mask(positions: Positions, batch: Any, inputs: Any, count: int) -> Tensor | None:
    """Which positions of a batch count."""
    mask: Any
    if callable(positions):
        mask = positions(batch)
    else:
        name = MASK if positions is None else positions
        named = isinstance(inputs, (Mapping, TensorDictBase)) and name in inputs.keys()
        if not named and positions is not None:
            raise InputError(f"positions={positions!r} names no entry of the inputs, which are {describe(inputs)}.")
        mask = inputs[name] if named else None
        if positions is None and mask is not None and mask.ndim != 2:
            return None  # a mask of pairs of positions, made by the caller
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.ndim < 2 or len(mask) != count:
        raise InputError(
            f"positions gives {describe(mask)} for {count} examples; give a bool or 0/1 tensor [B, L], true where a position "
            "counts."
        )
    mask = mask != 0
    if not mask.flatten(1).any(1).all():
        raise InputError("positions leaves an example without any position; leave out empty examples.")
    return mask


def fingerprint(inputs: Any) -> int:
    """A checksum of inputs, by which a resumed run knows that it is given the same batches again."""
    found = 0
    for keys, tensor in tensors(inputs):
        found = zlib.crc32(repr((keys, tuple(tensor.shape), tensor.dtype)).encode(), found)
        found = zlib.crc32(as_bytes(tensor), found)
    return found


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in the order of its elements; no copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
