"""Batched axes: many cotangents through one pullback, and chunks that bound memory without changing results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from .compat import is_compiling
from .errors import TdhookWarning


def chunks(length: int, chunk_size: int | None) -> Iterator[slice]:
    """Slices that cover `range(length)` in order, each of at most `chunk_size`.

    Examples:
        >>> list(chunks(5, 2))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = length if chunk_size is None else min(chunk_size, length)
    for start in range(0, length, max(step, 1)):
        yield slice(start, min(start + step, length))


def vmap_or_loop(function: Callable, arguments: Any, chunk_size: int | None = None) -> Any:
    """`vmap(function)(arguments)`, or a loop with a warning where vmap cannot go.

    That is, in a model that writes batched values into a tensor of its own in place (`out[:, :4] = ...`), or updates the
    statistics of a BatchNorm.
    """
    vmapped = vmap(function, chunk_size=chunk_size, randomness="different")
    if is_compiling():
        return vmapped(arguments)
    try:
        return vmapped(arguments)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # An error of the function itself comes again, from the loop.
        leaves, spec = pytree.tree_flatten(arguments)
        results = [pytree.tree_flatten(function(pytree.tree_unflatten(each, spec))) for each in zip(*leaves)]
        reason = str(error).split(". ")[0]
        warnings.warn(f"vmap cannot run this model, so it ran once for each, in a loop: {reason}.", TdhookWarning, stacklevel=2)
        return pytree.tree_unflatten([torch.stack(parts) for parts in zip(*(each for each, _ in results))], results[0][1])


def pull_each(pull: Callable[[Tensor], Any], values: Tensor, weights: Tensor, chunk_size: int | None) -> Any:
    """Pulls back one cotangent per target.

    Args:
        pull: pullback of a function that returned `values`.
        values: Tensor [*lead, T].
        weights: Tensor that broadcasts to [*lead, 1]: the cotangent of target t is `weights` in column t and 0 elsewhere.
        chunk_size: how many targets at once.

    Returns:
        What `pull` returns, with a leading dimension T.
    """

    def pull_one(unit: Tensor) -> Any:
        return pull((weights * unit).expand(values.shape))

    units = torch.eye(values.shape[-1], device=values.device).to(values.dtype)  # torch 2.1 has no eye in bfloat16
    return vmap(pull_one, chunk_size=chunk_size)(units)
