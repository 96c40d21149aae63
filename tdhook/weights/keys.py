"""The keys of a linear module: what enters it, for one prompt and over a corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ..core.batching import chunks
from ..core.checks import require_positive, warn_if_stochastic
from ..core.errors import InputError, SiteError
from ..core.reading import stop_at
from ..core.sites import Site, Tree
from ..core.structure import describe
from ..core.transforms import require_sites

Position = int | Tensor | None


@dataclass(frozen=True)
class KeyStatistics:
    """Sum of the outer products of the keys of a linear map; statistics of two sets of data add up.

    Attributes:
        total: Tensor [D, D].
        count: Tensor [], how many keys.
    """

    total: Tensor
    count: Tensor

    @property
    def second_moment(self) -> Tensor:
        """`C = E[k k^T]`, Tensor [D, D]; not centred."""
        return self.total / self.count

    def __add__(self, other: KeyStatistics) -> KeyStatistics:
        return KeyStatistics(self.total + other.total, self.count + other.count)


def key_covariance(
    f: Any,
    params: Any,
    batches: Iterable[Any],
    site: str | Site,
    *,
    mask: Callable[[Any], Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
    chunk_size: int | None = None,
) -> KeyStatistics:
    """The second moment of the inputs of a linear module, streamed over batches.

        C = 1/N sum_n k_n k_n^T,  k_n: what enters the module, for all tokens of all batches

    Args:
        f: functional model.
        params: its parameters.
        batches: an iterable of inputs of `f`; one batch is `[inputs]`.
        site: address of the module, such as `"model.layers.5.mlp.down_proj"`.
        mask: function of the inputs to a Tensor [B, L] that is true for the tokens that count, to leave out padding.
        dtype: of the sum.
        chunk_size: how many keys are converted to `dtype` at once; None for all of a batch.

    Returns:
        `KeyStatistics`, whose `second_moment` is C. Those of several data sets add up.

    Raises:
        InputError: no batch, a mask of another shape. SiteError: as `stop_at`, an address that is no module.

    Cost: the part of the forward pass before the module for each batch, and D^2 operations for each token.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(2, 2)))
        >>> key_covariance(f, params, [torch.eye(2), torch.eye(2)], "0").second_moment
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    key_site, _, _ = ports(f, site)
    require_positive("chunk_size", chunk_size, optional=True)
    if isinstance(batches, (Tensor, Mapping, TensorDictBase, tuple)) or not isinstance(batches, Iterable):
        raise InputError(f"batches is {describe(batches)}; give a list or an iterator of inputs, [inputs] for one batch.")
    warn_if_stochastic(f, "key_covariance")
    head = stop_at(f, key_site)
    total: Any = None
    count: Any = 0
    for inputs in batches:
        keys = head(params, inputs).detach()
        keep = torch.ones(keys.shape[:-1], dtype=torch.bool, device=keys.device) if mask is None else mask(inputs).bool()
        if keep.shape != keys.shape[:-1]:
            raise InputError(
                f"mask returned {describe(keep)} for keys of shape {list(keys.shape)}; it has to be {list(keys.shape[:-1])}."
            )
        rows = (keys * keep[..., None]).flatten(0, -2)
        for part in chunks(len(rows), chunk_size):
            wide = rows[part].to(dtype)
            product = wide.mT @ wide
            total = product if total is None else total + product
        count = count + keep.sum()
    if total is None:
        raise InputError("batches is empty; give at least one batch of inputs.")
    return KeyStatistics(total, count)


def key_at(f: Any, params: Any, prompts: Any, site: str | Site, position: Position | Sequence[Position]) -> Tensor:
    """The mean input of a linear module at one position of several prompts.

        k = 1/N sum_n k_n[position_n]

    Args:
        f: functional model.
        params: its parameters.
        prompts: inputs of `f`, or a list of such for prompts of different length.
        site: address of the module.
        position: token index for all prompts, or Tensor [B]; None for a module whose input is [B, D]; for a list of prompts one
            of these, or a list of one for each.

    Returns:
        Tensor [D].

    Raises:
        InputError: positions that do not fit. SiteError: as `key_covariance`.

    Cost: the part of the forward pass before the module.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022), equation 3.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(2, 2)))
        >>> key_at(f, params, torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), "0", -1)
        tensor([3., 4.])
    """
    key_site, _, _ = ports(f, site)
    listed = with_positions("prompts", prompts, position)
    warn_if_stochastic(f, "key_at")
    head = stop_at(f, key_site)
    keys = [at_position(head(params, inputs), place) for inputs, place in listed]
    return torch.cat(keys).mean(0)


def ports(f: Any, site: str | Site) -> tuple[str, str, tuple[str, ...]]:
    """The sites of the input and of the output of a module, and its path; raises `SiteError` for what is no module."""
    require_sites(f)
    return _ports(f.tree, site)


@torch.compiler.assume_constant_result
def _ports(tree: Tree, site: str | Site) -> tuple[str, str, tuple[str, ...]]:
    wants = tree.resolve(site)
    address = wants[0].site
    if len(wants) > 1 or not wants[0].exact or address.op or address.port != "out" or address.keys:
        raise SiteError(f"site={str(site)!r} is not one module; give the address of a linear one, such as 'h.5.mlp.c_proj'.")
    return str(replace(address, port="in")), str(address), tuple(str(name) for name in address.path)


def with_positions(name: str, prompts: Any, position: Any) -> list[tuple[Any, Position]]:
    """Batches of prompts, each with its position."""
    if not isinstance(prompts, list):
        prompts, position = [prompts], [position]
    elif not isinstance(position, list):
        position = [position] * len(prompts)
    if not prompts or len(prompts) != len(position):
        raise InputError(f"{name} has {len(prompts)} batches for {len(position)} positions; give one position for each.")
    return list(zip(prompts, position))


def at_position(values: Tensor, position: Position) -> Tensor:
    """Values [B, L, D] at a position: [B, D]."""
    require_position(values, position)
    if position is None:
        return values
    if isinstance(position, Tensor):
        return values[torch.arange(len(values), device=values.device), position]
    return values[:, position]


def require_position(values: Tensor, position: Position) -> None:
    """Raises `InputError` unless a position fits values [B, L, D], or is None for values [B, D]."""
    shape = list(values.shape)
    if position is None:
        if values.ndim != 2:
            raise InputError(f"position is None for values of shape {shape}; give the index of a token.")
    elif values.ndim != 3:
        raise InputError(f"position={position!r} counts the tokens of [B, L, D], the module has {shape}; give None for [B, D].")
    elif isinstance(position, Tensor):
        if position.shape != values.shape[:1] or position.is_floating_point():
            raise InputError(f"position is {describe(position)} for values of shape {shape}; give one integer per prompt.")
    elif not isinstance(position, int) or not -shape[1] <= position < shape[1]:
        raise InputError(f"position={position!r} is out of range for values of shape {shape}.")
