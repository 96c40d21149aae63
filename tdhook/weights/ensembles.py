"""Any method on several models at once: mean, variance, and how stable the ranking is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ..core.batching import vmap_or_loop
from ..core.checks import require_positive
from ..core.correlation import average_ranks
from ..core.errors import InputError
from ..core.structure import describe, tensors
from .selection import flat, nest, require_params, require_same_structure


class Ensemble(NamedTuple):
    """The results of a method on M models. All in the structure of one result.

    Attributes:
        values: tensors [M, *shape].
        mean: tensors [*shape].
        variance: tensors [*shape], unbiased.
        stability: tensors [*shape[:batch_dims]]: the mean Spearman correlation of two different models.
    """

    values: Any
    mean: Any
    variance: Any
    stability: Any


def ensemble(
    method: Callable[[Any], Any], stacked_params: Any, *, batch_dims: int = 0, chunk_size: int | None = None
) -> Ensemble:
    """A method on several models: mean, variance and rank stability of its results.

        mean = 1/M sum_m r_m;  variance = 1/(M-1) sum_m (r_m - mean)^2;  stability = mean_{m < n} spearman(r_m, r_n)

    Args:
        method: function of the parameters of one model to tensors, such as
            `lambda params: integrated_gradients(f, params, x, targets=3)`.
        stacked_params: TensorDict [M] of at least two models, `torch.stack([p1, p2])`; or a sequence of parameters.
        batch_dims: how many leading dimensions of a result count examples (or targets), which are ranked one by one. The others
            are ranked together.
        chunk_size: how many models run at once; None for all.

    Returns:
        `Ensemble` with `values`, `mean`, `variance` and `stability`. The stability is NaN where the result of a model is
        constant or holds a NaN.

    Raises:
        InputError: fewer than two models, results without the dimensions. ParamsError: models of different structure.

    Cost: the method M times, vmapped; a sort of the results.

    Source: Spearman, "The Proof and Measurement of Association between Two Things" (1904).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 1))
        >>> stacked = torch.stack([params, params * 2])
        >>> ensemble(lambda params: params["weight"][0], stacked).stability
        tensor(1.)
    """
    require_positive("chunk_size", chunk_size, optional=True)
    require_positive("batch_dims", batch_dims, least=0)
    if not callable(method):
        raise InputError(
            f"method is {describe(method)}; give a function of params, such as lambda params: saliency(f, params, x)."
        )
    values = vmap_or_loop(method, _stacked(stacked_params), chunk_size)
    for _, leaf in tensors(values):
        if not leaf.is_floating_point() or leaf.ndim <= batch_dims:
            raise InputError(
                f"method returned {describe(leaf)} for all models; give floating-point tensors of at least "
                f"{batch_dims} dimensions each."
            )
    return Ensemble(
        values,
        _each(lambda value: value.mean(0), values),
        _each(lambda value: value.var(0), values),
        _each(lambda value: _stability(value, batch_dims), values),
    )


def _stacked(params: Any) -> TensorDictBase:
    if not isinstance(params, TensorDictBase) and isinstance(params, Sequence) and params:
        for i, each in enumerate(params):
            require_params(f"stacked_params[{i}]", each, single=True)
            require_same_structure("stacked_params[0]", params[0], f"stacked_params[{i}]", each)
        params = torch.stack(list(params))
    require_params("stacked_params", params)
    if len(params.batch_size) != 1 or params.batch_size[0] < 2:
        raise InputError(
            f"stacked_params has batch size {list(params.batch_size)}; give at least two models, torch.stack([p1, p2])."
        )
    return params


def _each(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """A function of every tensor of a structure, whose TensorDicts lose their batch size: the dimensions may go."""
    if isinstance(values, TensorDictBase):
        return nest({key: function(value) for key, value in flat(values).items()})
    if isinstance(values, Mapping):
        return {key: _each(function, value) for key, value in values.items()}
    if isinstance(values, (tuple, list)):
        parts = [_each(function, value) for value in values]
        return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)
    return function(values)


def _stability(values: Tensor, batch_dims: int) -> Tensor:
    """The mean correlation of ranks of all pairs, in one pass: |sum_m z_m|^2 = M + 2 sum_{m<n} z_m . z_n for unit z."""
    count = len(values)
    # A result of no further dimension is one number, which has no ranking.
    ranks = average_ranks(values.reshape(*values.shape[: 1 + batch_dims], -1))
    centred = ranks - ranks.mean(-1, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    unit = centred / torch.where(norm > 0, norm, torch.nan)
    return (unit.sum(0).square().sum(-1) - count) / (count * (count - 1))
