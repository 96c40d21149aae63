"""Where heads lie in the last axis of a value, and the weights of a linear map whichever way they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...core.errors import InputError
from ...core.structure import describe


@dataclass(frozen=True)
class HeadLayout:
    """Heads in the last axis of the value at a site: head h holds the features `starts[h] + step * arange(size)`.

    Attributes:
        site: address of the value, Tensor [..., width]; a fused projection holds queries, keys and values at one site.
        starts: the first feature of each head.
        size: features of one head.
        step: between the features of one head; 1 in all known models.
    """

    site: str
    starts: tuple[int, ...]
    size: int
    step: int = 1

    @property
    def heads(self) -> int:
        return len(self.starts)

    @property
    def stop(self) -> int:
        """One more than the last feature that belongs to a head."""
        return max(self.starts) + self.step * (self.size - 1) + 1

    @property
    def contiguous(self) -> bool:
        """Whether the heads lie one after the other without gaps."""
        return self.step == 1 and all(b - a == self.size for a, b in zip(self.starts, self.starts[1:]))

    def features(self, device: Any = None) -> Tensor:
        """The features of each head, integer Tensor [heads, size]."""
        return torch.tensor(self.starts, device=device)[:, None] + self.step * torch.arange(self.size, device=device)

    def split(self, value: Tensor) -> Tensor:
        """The heads of a value: Tensor [..., width] gives [..., heads, size].

        Raises `InputError` for a value that is too narrow.
        """
        if value.ndim == 0 or value.shape[-1] < self.stop:
            raise InputError(f"value is {describe(value)}; at {self.site!r} heads reach up to feature {self.stop - 1}.")
        if self.contiguous:
            part = value[..., self.starts[0] : self.stop]
            return rearrange(part, "... (h d) -> ... h d", h=self.heads)
        return value[..., self.features(value.device)]

    def merge(self, value: Tensor, heads: Tensor) -> Tensor:
        """`value` [..., width] with `heads` [..., heads, size] in it, which broadcast; the reverse of `split`.

        Raises `InputError` for shapes that do not fit.
        """
        if heads.shape[-2:] != (self.heads, self.size):
            raise InputError(f"heads is {describe(heads)}; {self.site!r} holds [..., {self.heads}, {self.size}].")
        if value.ndim == 0 or value.shape[-1] < self.stop:
            raise InputError(f"value is {describe(value)}; at {self.site!r} heads reach up to feature {self.stop - 1}.")
        flat = heads.flatten(-2)
        try:
            shape = torch.broadcast_shapes(flat.shape[:-1], value.shape[:-1])
        except RuntimeError:
            raise InputError(f"heads is {describe(heads)}, which does not broadcast to value, {describe(value)}.") from None
        if self.contiguous and self.stop - self.starts[0] == value.shape[-1]:
            return flat.to(value.dtype).expand(*shape, -1)
        place = torch.full((value.shape[-1],), -1, device=value.device)
        place = place.scatter(0, self.features(value.device).flatten(), torch.arange(flat.shape[-1], device=value.device))
        return torch.where(place >= 0, flat[..., place.clamp(min=0)].to(value.dtype), value)


@dataclass(frozen=True)
class Projection:
    """A linear map `x W + b` of the model.

    Attributes:
        site: address of what it returns, or for `unembedding` of the logits.
        input: address of what it reads.
        weight: name of W in `params`.
        bias: name of b, or None.
        transposed: whether W is stored as [out, in], as `nn.Linear` does, and not as [in, out], as `Conv1D` does.
    """

    site: str
    input: str
    weight: str
    bias: str | None
    transposed: bool

    def matrix(self, params: Any) -> Tensor:
        """W, Tensor [in, out]."""
        weight = params[tuple(self.weight.split("."))]
        return weight.mT if self.transposed else weight

    def offset(self, params: Any) -> Tensor | None:
        """b, Tensor [out], or None."""
        return None if self.bias is None else params[tuple(self.bias.split("."))]


@dataclass(frozen=True)
class Norm:
    """Where a norm computes its scale, so that it can be held fixed.

    Attributes:
        operation: site of the operation that normalises: `layer_norm`, `rms_norm`, or the root (`rsqrt`, say) of a norm that is
            written out.
    """

    operation: str

    @property
    def kind(self) -> str:
        """The name of the operation."""
        return self.operation.rpartition("/")[2].partition("@")[0]

    @property
    def written_out(self) -> bool:
        """Whether several operations make up the norm."""
        return self.kind not in ("layer_norm", "rms_norm")
