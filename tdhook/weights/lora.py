"""Low-rank updates of weights (LoRA): made, merged, taken from the difference of two models.

`lora` is a TensorDict that holds, at the path of each weight W [out, in, ...], `down` [rank, in, ...] and `up` [out, rank]. The
update of a convolution is that of its matrix [out, in * kernel].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import einsum, rearrange
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ..core.checks import require_positive
from ..core.compat import is_compiling, is_wrapped
from ..core.errors import InputError, ParamsError
from ..core.structure import describe
from .selection import (
    MATRICES,
    Key,
    Select,
    by_parameter,
    flat,
    nest,
    parameter_name,
    replaced,
    require_params,
    require_same_structure,
    select_parameters,
)

Rank = int | Mapping[str, int]


def lora_init(
    params: TensorDictBase, rank: Rank, *, select: Select = None, generator: torch.Generator | None = None
) -> TensorDict:
    """A low-rank update to start training from, which changes nothing yet.

        W' = W + scale * up @ down,     down_ij ~ U(-1/sqrt(in), 1/sqrt(in)),  up = 0

    Args:
        params: nested TensorDict.
        rank: of every update; or a mapping from names or patterns to ranks, which then selects too.
        select: names or patterns of weights; None: all floating-point tensors of two dimensions or more.
        generator: of the random numbers; None: the global one. torch does not compile with a generator.

    Returns:
        TensorDict with `down` and `up` at the path of each selected weight, in its dtype, on its device.

    Raises:
        InputError: a rank larger than a weight has. ParamsError: no such parameter.

    Cost: no pass.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2022); the distribution is that of their code.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(4, 3))
        >>> lora = lora_init(params, 2)
        >>> lora["weight", "down"].shape, lora["weight", "up"].shape
        (torch.Size([2, 4]), torch.Size([3, 2]))
        >>> torch.equal(lora_merge(params, lora)["weight"], params["weight"])
        True
    """
    require_params("params", params, single=True)
    lora: dict[Key, Tensor] = {}
    for key, (weight, r) in _ranked(params, rank, select).items():
        bound = weight[0].numel() ** -0.5
        device = weight.device if generator is None else generator.device
        uniform = torch.rand(r, *weight.shape[1:], generator=generator, device=device)
        lora[(*key, "down")] = ((2 * uniform - 1) * bound).to(weight)
        lora[(*key, "up")] = weight.new_zeros(len(weight), r)
    return nest(lora)


def lora_merge(params: TensorDictBase, lora: TensorDictBase, scale: float | Tensor = 1.0) -> TensorDict:
    """Weights with their low-rank updates added.

        W' = W + scale * up @ down

    It is a pure map, so nothing has to be unmerged: `f(lora_merge(params, lora), x)` is the adapted model, its gradient with
    respect to `lora` trains it, and `params` is still there.

    Args:
        params: nested TensorDict.
        lora: as `lora_init` returns it.
        scale: factor of the update (peft's `lora_alpha / r`), a number or a tensor [].

    Returns:
        Params of the same dtypes; what has no update is shared with `params`.

    Raises:
        ParamsError: an update of a parameter that is not there, or that does not fit its shape.

    Cost: one product of `up` and `down` for each weight.

    Source: Hu et al. (2022).

    Examples:
        >>> _, params = tdhook.functionalize(torch.nn.Linear(2, 2, bias=False))
        >>> lora = lora_init(params, 1)
        >>> lora["weight", "up"] = torch.ones(2, 1)
        >>> change = lora_merge(params, lora)["weight"] - params["weight"]
        >>> torch.allclose(change, lora["weight", "down"].expand(2, 2), atol=1e-6)
        True
    """
    require_params("params", params)
    require_params("lora", lora)
    tensors = flat(params)
    merged = {}
    for key, (down, up) in _pairs(lora).items():
        if key not in tensors:
            raise ParamsError(f"lora updates {parameter_name(key)!r}, which params has not.")
        weight = tensors[key]
        if up.ndim != MATRICES or (up.shape[0], *down.shape[1:]) != weight.shape or up.shape[1] != len(down):
            raise ParamsError(
                f"lora at {parameter_name(key)!r} has up {list(up.shape)} and down {list(down.shape)}, which do not fit "
                f"{describe(weight)}."
            )
        update = einsum(up, down.flatten(1), "out rank, rank rest -> out rest")
        merged[key] = weight + (scale * update).reshape(weight.shape).to(weight.dtype)
    return replaced(params, merged)


def lora_unmerge(params: TensorDictBase, lora: TensorDictBase, scale: float | Tensor = 1.0) -> TensorDict:
    """Weights with their low-rank updates taken away; the reverse of `lora_merge`, up to rounding.

        W = W' - scale * up @ down

    Args:
        params: merged params.
        lora: what was merged.
        scale: as it was merged.

    Returns:
        Params without the update. Where the params from before the merge are at hand, take those: they are exact.

    Raises:
        ParamsError: as `lora_merge`.

    Cost: as `lora_merge`.

    Source: Hu et al. (2022).

    Examples:
        >>> _, params = tdhook.functionalize(torch.nn.Linear(3, 3))
        >>> lora = lora_init(params, 1)
        >>> torch.allclose(lora_unmerge(lora_merge(params, lora), lora)["weight"], params["weight"])
        True
    """
    return lora_merge(params, lora, -scale)


def lora_from_difference(finetuned: TensorDictBase, base: TensorDictBase, rank: Rank, *, select: Select = None) -> TensorDict:
    """The best low-rank update from one model to another.

        finetuned - base = U S V',     up = U_r sqrt(S_r),  down = sqrt(S_r) V_r'

    `lora_merge(base, lora)` is the nearest to `finetuned`, in the Frobenius norm, of this rank.

    Args:
        finetuned: see `base`.
        base: params of the same structure.
        rank: of every update; or a mapping from names or patterns to ranks, such as `energy_ranks` finds.
        select: as for `lora_init`. What is not selected (biases, by default) is left as it is in `base`.

    Returns:
        TensorDict as `lora_init` returns it. Half precision is decomposed in float32.

    Raises:
        InputError: a rank larger than a weight has. ParamsError: params of different structure, no such parameter.

    Cost: one singular value decomposition for each weight.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank" (1936).

    Examples:
        >>> _, base = tdhook.functionalize(torch.nn.Linear(4, 3))
        >>> _, finetuned = tdhook.functionalize(torch.nn.Linear(4, 3))
        >>> lora = lora_from_difference(finetuned, base, rank=3)
        >>> torch.allclose(lora_merge(base, lora)["weight"], finetuned["weight"], atol=1e-5)
        True
    """
    require_params("finetuned", finetuned, single=True)
    require_params("base", base, single=True)
    require_same_structure("finetuned", finetuned, "base", base)
    start = flat(base)
    lora: dict[Key, Tensor] = {}
    for key, (weight, r) in _ranked(finetuned, rank, select).items():
        u, s, v = torch.linalg.svd(_matrix(weight, start[key]), full_matrices=False)
        root = s[:r].sqrt()
        lora[(*key, "down")] = (root[:, None] * v[:r]).reshape(r, *weight.shape[1:]).to(weight.dtype)
        lora[(*key, "up")] = (u[:, :r] * root).to(weight.dtype)
    return nest(lora)


def energy_ranks(
    finetuned: TensorDictBase, base: TensorDictBase, energy: float = 0.9, *, select: Select = None
) -> dict[str, int]:
    """The smallest ranks that keep a share of each difference.

        r = min { r : sum_{i <= r} S_i^2 >= energy * sum_i S_i^2 }

    Args:
        finetuned: see `base`.
        base: params of the same structure.
        energy: share of the squared Frobenius norm, above 0 and at most 1.
        select: as for `lora_init`.

    Returns:
        The rank of each selected weight under its name, at least 1: `lora_from_difference(finetuned, base, ranks)`.

    Raises:
        InputError: an energy out of range; under vmap or compilation, where no shape can depend on a value. ParamsError: params
            of different structure, no such parameter.

    Cost: the singular values of each difference.

    Source: Eckart and Young (1936).

    Examples:
        >>> _, base = tdhook.functionalize(torch.nn.Linear(2, 2, bias=False))
        >>> finetuned = base.clone()
        >>> finetuned["weight"] = base["weight"] + torch.diag(torch.tensor([3.0, 1.0]))
        >>> energy_ranks(finetuned, base, 0.85), energy_ranks(finetuned, base, 0.95)
        ({'weight': 1}, {'weight': 2})
    """
    require_params("finetuned", finetuned, single=True)
    require_params("base", base, single=True)
    if not isinstance(energy, (int, float)) or isinstance(energy, bool) or not 0 < energy <= 1:
        raise InputError(f"energy={energy!r} is a share of the squared norm, above 0 and at most 1.")
    require_same_structure("finetuned", finetuned, "base", base)
    start = flat(base)
    ranks = {}
    for key, weight in select_parameters(finetuned, select, least_dims=MATRICES).items():
        if is_compiling() or is_wrapped(weight) or is_wrapped(start[key]):
            raise InputError("energy_ranks chooses shapes by value, which vmap, grad and compiled code cannot; give a rank.")
        squares = torch.linalg.svdvals(_matrix(weight, start[key])).double().square()
        short = squares.cumsum(0) < energy * squares.sum() * (1 - 1e-12)  # the sums round, and energy=1 is reached
        ranks[parameter_name(key)] = min(int(short.sum()) + 1, len(squares))
    return ranks


def _matrix(weight: Tensor, start: Tensor) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return rearrange(weight.to(dtype) - start.to(dtype), "out ... -> out (...)")


def _ranked(params: TensorDictBase, rank: Any, select: Select) -> dict[Key, tuple[Tensor, int]]:
    """The selected weights with their ranks."""
    if isinstance(rank, Mapping):
        named = by_parameter(params, rank, "rank")
        chosen = select_parameters(params, select, least_dims=MATRICES)
        table = {key: (chosen[key], named[key]) for key in chosen if key in named}
        if not table:
            raise ParamsError("rank names no weight of two dimensions or more that select names too.")
    else:
        table = {key: (tensor, rank) for key, tensor in select_parameters(params, select, least_dims=MATRICES).items()}
    for key, (weight, r) in table.items():
        require_positive("rank", r)
        largest = min(len(weight), weight[0].numel())
        if r > largest:
            raise InputError(f"rank={r} is more than {parameter_name(key)!r} can have: {largest}, for {describe(weight)}.")
    return table


def _pairs(lora: TensorDictBase) -> dict[Key, tuple[Tensor, Tensor]]:
    parts = flat(lora)
    keys = dict.fromkeys(key[:-1] for key in parts)
    if not keys or any({k[-1] for k in parts if k[:-1] == key} != {"down", "up"} for key in keys):
        names = ", ".join(repr(parameter_name(key)) for key in parts) or "nothing"
        raise ParamsError(f"lora holds 'down' and 'up' at the path of each weight, as lora_init makes it; it has {names}.")
    return {key: (parts[(*key, "down")], parts[(*key, "up")]) for key in keys}
