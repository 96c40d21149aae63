"""The weight lens: what weights say in tokens, and which stand out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from ..core.batching import chunks
from ..core.checks import require_positive
from ..core.errors import InputError
from ..core.structure import describe
from .selection import Select, flat, nest, parameter_name, require_params, select_parameters


class Tokens(NamedTuple):
    """The tokens nearest to vectors.

    Attributes:
        scores: Tensor [*N, K], largest first.
        tokens: integer Tensor [*N, K].
    """

    scores: Tensor
    tokens: Tensor


def top_tokens(
    vectors: Tensor,
    vocabulary: Tensor,
    k: int = 10,
    *,
    scale: Tensor | None = None,
    center: bool = False,
    largest: bool = True,
    chunk_size: int | None = 256,
) -> Tokens:
    """The tokens that vectors of the residual stream promote (unembedding) or respond to (embedding).

        scores = (vectors * scale) vocabulary^T

    The output vectors of the neurons of an MLP are the columns of its output weight: `down_proj.weight.mT` [F, D]; what a
    neuron reads are the rows of its input weight: `gate_proj.weight` [F, D], with the embedding as the vocabulary.

    Args:
        vectors: Tensor [*N, D].
        vocabulary: Tensor [V, D], the unembedding or embedding matrix.
        k: how many tokens for each vector.
        scale: Tensor [D], the weight of the final norm.
        center: subtract the mean token of the vocabulary, which no softmax sees.
        largest: False for the tokens that are suppressed most, most negative first.
        chunk_size: how many vectors are projected at once; None for all.

    Returns:
        `Tokens` with `scores` and `tokens` [*N, k].

    Raises:
        InputError: widths that differ, more tokens than there are.

    Cost: N V D operations. Memory: `chunk_size V` numbers.

    Source: Geva et al., "Transformer Feed-Forward Layers Build Predictions by Promoting Concepts in the Vocabulary Space"
    (2022); Dar et al., "Analyzing Transformers in Embedding Space" (2023).

    Examples:
        >>> top_tokens(torch.tensor([[0.0, 2.0]]), torch.eye(2), k=1)
        Tokens(scores=tensor([[2.]]), tokens=tensor([[1]]))
    """
    require_positive("k", k)
    require_positive("chunk_size", chunk_size, optional=True)
    _require_widths(vectors, vocabulary, scale)
    if k > len(vocabulary):
        raise InputError(f"k={k} is more than the {len(vocabulary)} tokens of the vocabulary.")
    matrix = vocabulary - vocabulary.mean(0) if center else vocabulary
    rows = vectors.reshape(-1, vectors.shape[-1])
    rows = rows if scale is None else rows * scale
    found = [(rows[part] @ matrix.mT).topk(k, dim=-1, largest=largest) for part in chunks(len(rows), chunk_size)]
    lead = vectors.shape[:-1]
    scores, tokens = (torch.cat([each[i] for each in found]) for i in (0, 1))
    return Tokens(scores.reshape(*lead, k), tokens.reshape(*lead, k))


def z_scores(params: Any, select: Select = None) -> TensorDict:
    """How many standard deviations each weight is from the mean of its tensor.

        z = (w - mean(w)) / std(w)

    Args:
        params: nested TensorDict.
        select: names or patterns; None for all floating-point tensors with two dimensions or more.

    Returns:
        TensorDict of the selected parameters; 0 where all weights of a tensor are equal.

    Raises:
        ParamsError: unknown names.

    Examples:
        >>> _, params = tdhook.functionalize(torch.nn.Linear(4, 4))
        >>> z = z_scores(params)["weight"]
        >>> z.mean().abs() < 1e-6, round(z.std(correction=0).item(), 3)
        (tensor(True), 1.0)
    """
    require_params("params", params, single=True)
    chosen = select_parameters(params, select, least_dims=2 if select is None else 0)
    return nest({key: _standardised(weight) for key, weight in chosen.items()})


class Outliers(NamedTuple):
    """Weights far from the mean of their tensor, the farthest first.

    Attributes:
        places: integer Tensor [K, dims], where in the tensor.
        value: Tensor [K].
        z: Tensor [K], signed.
    """

    places: Tensor
    value: Tensor
    z: Tensor


def outliers(params: Any, select: Select = None, *, threshold: float = 6.0) -> dict[str, Outliers]:
    """The weights whose z-score exceeds a threshold, in each tensor.

        |w - mean(w)| > threshold std(w)

    Args:
        params: nested TensorDict.
        select: as in `z_scores`.
        threshold: in standard deviations.

    Returns:
        From name to `Outliers`, for the tensors that have any. Their number depends on values, so this neither compiles nor
        vmaps; `z_scores` does.

    Raises:
        ParamsError: unknown names. InputError: a threshold that is not positive.

    Source: Dettmers et al., "LLM.int8()" (2022), for the threshold, there of activations.

    Examples:
        >>> _, params = tdhook.functionalize(torch.nn.Linear(10, 10))
        >>> params = params.apply(lambda w: torch.zeros_like(w).index_put((torch.tensor([3]),), torch.tensor(5.0)))
        >>> outliers(params, "bias", threshold=2.5)["bias"].places
        tensor([[3]])
    """
    if not isinstance(threshold, (int, float)) or not threshold > 0:
        raise InputError(f"threshold is {describe(threshold)}; give a positive number of standard deviations.")
    found: dict[str, Outliers] = {}
    for key, z in flat(z_scores(params, select)).items():
        places = (z.abs() > threshold).nonzero()
        if len(places):
            here = tuple(places.unbind(1))
            order = z[here].abs().argsort(descending=True)
            found[parameter_name(key)] = Outliers(places[order], params[key][here][order], z[here][order])
    return found


def _standardised(weight: Tensor) -> Tensor:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    centred = wide - wide.mean()
    deviation = centred.square().mean().sqrt()
    return centred / torch.where(deviation > 0, deviation, 1)


def _require_widths(vectors: Tensor, vocabulary: Tensor, scale: Tensor | None) -> None:
    if vocabulary.ndim != 2 or vectors.ndim < 1 or vectors.shape[-1] != vocabulary.shape[1]:
        raise InputError(
            f"vectors is {describe(vectors)} and vocabulary {describe(vocabulary)}; the last dimension of both is the residual "
            "stream. An output weight [D, F] is transposed first: weight.mT."
        )
    if scale is not None and scale.shape != vocabulary.shape[1:]:
        raise InputError(f"scale is {describe(scale)}; give the {vocabulary.shape[1]} weights of the final norm.")
