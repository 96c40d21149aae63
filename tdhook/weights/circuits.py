"""Large matrices in factors: the circuits of attention heads between tokens, without a vocabulary squared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..core.batching import chunks
from ..core.checks import require_positive
from ..core.errors import InputError
from ..core.structure import describe


class Entries(NamedTuple):
    """Entries of a matrix.

    Attributes:
        values: Tensor [*lead, K], largest first.
        rows: see `columns`.
        columns: integer Tensors [*lead, K].
    """

    values: Tensor
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Factored:
    """A matrix of low rank, as the product of two factors that is never formed.

    Attributes:
        left: Tensor [*lead, A, R].
        right: Tensor [*lead, R, B].
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.left.shape[:-1], self.right.shape[-1])

    def dense(self) -> Tensor:
        """The matrix itself, Tensor [*lead, A, B]."""
        return self.left @ self.right

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Single entries: integer Tensors [K] give Tensor [*lead, K]."""
        return (self.left[..., rows, :] * self.right.mT[..., columns, :]).sum(-1)

    def diagonal(self) -> Tensor:
        """The diagonal of a square matrix: what a token does for itself. Tensor [*lead, A]."""
        if self.left.shape[-2] != self.right.shape[-1]:
            raise InputError(f"a matrix of shape {list(self.shape)} is not square; it has no copying scores.")
        return (self.left * self.right.mT).sum(-1)

    def singular_values(self) -> Tensor:
        """Tensor [*lead, R], largest first: those of the small product of the triangular parts of both factors."""
        left = torch.linalg.qr(self.left).R
        right = torch.linalg.qr(self.right.mT).R
        return torch.linalg.svdvals(left @ right.mT)

    def top(self, k: int, *, largest: bool = True, chunk_size: int | None = 1024) -> Entries:
        """The k largest (or smallest) entries of the whole matrix.

        Args:
            k: how many.
            largest: False for the smallest, most negative first.
            chunk_size: how many rows are formed at once; None for all.

        Raises:
            InputError: more entries than there are.

        Cost: `A R B` operations. Memory: `chunk_size B` numbers for each matrix.
        """
        require_positive("k", k)
        require_positive("chunk_size", chunk_size, optional=True)
        height, width = self.shape[-2:]
        if k > height * width:
            raise InputError(f"k={k} is more than the {height * width} entries of the matrix.")
        values = places = None
        for part in chunks(height, chunk_size):
            block = (self.left[..., part, :] @ self.right).flatten(-2)
            found = block.topk(min(k, block.shape[-1]), dim=-1, largest=largest)
            where = found.indices + part.start * width
            values = found.values if values is None else torch.cat([values, found.values], -1)
            places = where if places is None else torch.cat([places, where], -1)
            kept = values.topk(min(k, values.shape[-1]), dim=-1, largest=largest)
            values, places = kept.values, places.gather(-1, kept.indices)
        assert values is not None and places is not None
        return Entries(values, places // width, places % width)


def ov_circuit(
    value: Tensor,
    output: Tensor,
    *,
    heads: int,
    kv_heads: int | None = None,
    embedding: Tensor | None = None,
    unembedding: Tensor | None = None,
) -> Factored:
    """What each head writes about a token that it attends to.

        OV_h = U O_h V_g(h) E^T,  entry [i, j]: how much attending to token j raises the logit of token i

    Norms between embedding, head and unembedding are left out: fold their scales into `embedding` and `unembedding`, or into
    the weights. Biases, which do not depend on the token, are left out too.

    Args:
        value: Tensor [kv_heads * d, D], of `nn.Linear`; `weight.mT` for `Conv1D`.
        output: Tensor [D', heads * d].
        heads: query heads H.
        kv_heads: key-value heads, each shared by `heads / kv_heads` query heads in a row; None for as many as query heads.
        embedding: E, Tensor [V, D]; None for the residual stream itself.
        unembedding: U, Tensor [V', D']; None for the residual stream itself.

    Returns:
        `Factored` with matrices [H, V', V] of rank d.

    Raises:
        InputError: heads that do not divide the weights, matrices that do not fit.

    Cost: H V d D operations for each of the two factors.

    Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021); for grouped heads Ainslie et al.,
    "GQA: Training Generalized Multi-Query Transformer Models" (2023).

    Examples:
        >>> value, output = torch.randn(4, 6), torch.randn(6, 8)
        >>> circuit = ov_circuit(value, output, heads=4, kv_heads=2, embedding=torch.randn(10, 6))
        >>> circuit.shape
        (4, 6, 10)
    """
    groups = _heads("value", value, heads, kv_heads)
    if output.ndim != 2 or output.shape[1] != heads * groups.shape[1]:
        raise InputError(
            f"output is {describe(output)} for {heads} heads of {groups.shape[1]} numbers; give [D, {heads * groups.shape[1]}]."
        )
    left = rearrange(output, "o (h d) -> h o d", h=heads)
    return Factored(_read("unembedding", unembedding, left), _read("embedding", embedding, groups.mT).mT)


def qk_circuit(
    query: Tensor,
    key: Tensor,
    *,
    heads: int,
    kv_heads: int | None = None,
    embedding: Tensor | None = None,
    key_embedding: Tensor | None = None,
    scale: float | None = None,
) -> Factored:
    """How much each head attends from a token to a token, before the softmax.

        QK_h = scale E Q_h^T K_g(h) E^T,  entry [i, j]: the score of key token j for query token i

    Norms, biases and rotary positions are left out: it is the score of two tokens at the same place.

    Args:
        query: Tensor [heads * d, D], of `nn.Linear`; `weight.mT` for `Conv1D`.
        key: Tensor [kv_heads * d, D].
        heads: as in `ov_circuit`.
        kv_heads: as in `ov_circuit`.
        embedding: of the query tokens, Tensor [V, D]; None for the residual stream itself.
        key_embedding: of the key tokens; None for the same.
        scale: None for `1 / sqrt(d)`.

    Returns:
        `Factored` with matrices [H, V, V'] of rank d.

    Raises:
        InputError: heads that do not divide the weights, matrices that do not fit.

    Cost: H V d D operations for each of the two factors.

    Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).

    Examples:
        >>> circuit = qk_circuit(torch.randn(8, 6), torch.randn(4, 6), heads=4, kv_heads=2)
        >>> circuit.shape
        (4, 6, 6)
    """
    queries = _heads("query", query, heads, heads)
    keys = _heads("key", key, heads, kv_heads)
    if queries.shape != keys.shape:
        raise InputError(f"query is {describe(query)} and key {describe(key)}; their heads have the same size and width.")
    factor = queries.shape[1] ** -0.5 if scale is None else scale
    left = _read("embedding", embedding, queries.mT) * factor
    right = _read("key_embedding", embedding if key_embedding is None else key_embedding, keys.mT)
    return Factored(left, right.mT)


def _heads(name: str, weight: Tensor, heads: int, kv_heads: int | None) -> Tensor:
    """The weights of each query head, Tensor [H, d, D]: grouped ones are repeated."""
    require_positive("heads", heads)
    require_positive("kv_heads", kv_heads, optional=True)
    own = heads if kv_heads is None else kv_heads
    if heads % own:
        raise InputError(f"kv_heads={own} does not divide heads={heads}; each is shared by the same number of query heads.")
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[0] % own:
        raise InputError(f"{name} is {describe(weight)}; give a matrix whose rows are those of {own} heads.")
    return rearrange(weight, "(g d) i -> g d i", g=own).repeat_interleave(heads // own, 0)


def _read(name: str, tokens: Tensor | None, weight: Tensor) -> Tensor:
    """Tokens [V, D] times weights [H, D, d]."""
    if tokens is None:
        return weight
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.shape[1] != weight.shape[1]:
        raise InputError(
            f"{name} is {describe(tokens)} for a residual stream of {weight.shape[1]}; give [V, {weight.shape[1]}]."
        )
    return tokens @ weight
