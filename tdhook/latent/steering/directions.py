"""Directions to steer with: from activations of two sets of examples, or from two sets of prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils import _pytree as pytree

from ...core.batching import chunks
from ...core.checks import require_positive, warn_if_stochastic
from ...core.errors import InputError
from ...core.functional import FunctionalModel
from ...core.reading import stop_at
from ...core.structure import describe
from ...core.transforms import Sites, expand
from ..concepts.directions import as_directions
from ..pooling import Pool, pooled, require_pool
from .prompts import mask_of, with_position_ids

Fit = Callable[[Tensor, Tensor], Any]


def difference_of_means(positive: Tensor, negative: Tensor) -> Tensor:
    """The difference of the means of two sets of activations; of pairs, the mean of the differences.

        d = mean(positive) - mean(negative)

    Args:
        positive: Tensor [*L, N, D].
        negative: Tensor [*L, M, D].

    Returns:
        Tensor [*L, D], in the units of the activations: `add(d)` takes the mean of the one to that of the other.

    Raises:
        InputError: tensors that are not floating-point, of other shapes, or empty.

    Source: Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition" (2023).

    Examples:
        >>> difference_of_means(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
        tensor([ 2., -5.])
    """
    _require_sets(positive, negative)
    dtype = torch.promote_types(positive.dtype, torch.float32)
    return (positive.to(dtype).mean(-2) - negative.to(dtype).mean(-2)).to(positive.dtype)


def principal_difference(positive: Tensor, negative: Tensor) -> Tensor:
    """The first principal component of the differences of pairs, which points to the positive ones on average.

        d = argmax over |u| = 1 of sum_n <u, positive_n - negative_n>^2,    <d, mean difference> >= 0

    The differences are not centred. (RepE centres differences whose signs were drawn at random, which is the same on average;
    with equal signs centring would take the mean difference away, the very thing that is sought.)

    Args:
        positive: Tensor [*L, N, D].
        negative: Tensor [*L, N, D], pairs in the same order.

    Returns:
        Tensor [*L, D], of unit length.

    Raises:
        InputError: tensors that are not floating-point, or not of the same shape.

    Cost: a singular value decomposition of [N, D].

    Source: Zou et al., "Representation Engineering: A Top-Down Approach to AI Transparency" (2023).

    Examples:
        >>> positive = torch.tensor([[3.0, 0.1], [2.0, -0.1], [4.0, 0.0]])
        >>> principal_difference(positive, torch.zeros(3, 2)).round(decimals=1)
        tensor([1., 0.])
    """
    _require_sets(positive, negative)
    if positive.shape != negative.shape:
        raise InputError(
            f"positive has shape {list(positive.shape)}, negative {list(negative.shape)}; principal_difference takes pairs."
        )
    dtype = torch.promote_types(positive.dtype, torch.float32)
    differences = positive.to(dtype) - negative.to(dtype)
    direction = torch.linalg.svd(differences, full_matrices=False).Vh[..., 0, :]
    along = (direction * differences.mean(-2)).sum(-1, keepdim=True)
    return torch.where(along < 0, -direction, direction).to(positive.dtype)


def probe_direction(fit: Callable[[Tensor, Tensor], Any]) -> Fit:
    """The direction of a probe, as a function of two sets of activations.

    Args:
        fit: (x [N, D], labels [N], 1 for positive) -> probe with `.direction` [D], or the direction itself: any of
            `tdhook.latent.probes`.

    Returns:
        A `fit` for `steering_vectors`: (positive [N, D], negative [M, D]) -> Tensor [D].

    Examples:
        >>> from tdhook.latent.probes import ridge
        >>> positive, negative = torch.randn(20, 3) + torch.tensor([2.0, 0.0, 0.0]), torch.randn(20, 3)
        >>> probe_direction(ridge)(positive, negative).argmax()
        tensor(0)
    """
    if not callable(fit):
        raise InputError(f"fit is {describe(fit)}; give a function (x, labels) -> probe.")

    def direction(positive: Tensor, negative: Tensor) -> Tensor:
        _require_sets(positive, negative)
        labels = torch.arange(len(positive) + len(negative), device=positive.device) < len(positive)
        found = as_directions("what fit returned", fit(torch.cat([positive, negative]), labels.long()))
        return found[0] if found.ndim == 2 and len(found) == 1 else found

    return direction


def steering_vectors(
    f: FunctionalModel,
    params: Any,
    positive: Any,
    negative: Any,
    *,
    sites: Sites,
    pool: Pool = "last",
    fit: Fit = difference_of_means,
    chunk_size: int | None = None,
) -> TensorDict:
    """A direction at each of some sites, from two sets of prompts.

        d_s = fit(pool(a_s(positive)), pool(a_s(negative)))

    Args:
        f: functional model.
        params: its parameters.
        positive: prompts as `f` takes them, N examples: token ids [N, S], or a mapping with `input_ids` and `attention_mask`.
        negative: M others, which may be longer or shorter. For pairs, in the same order.
        sites: where; patterns stand for all modules that they match. The values are Tensor [N, S, D].
        pool: which position is read: `"last"`, an integer, `"mean"`, or a function; as in `collect`. Positions that
            `attention_mask` leaves out are not counted, so that padding does not matter.
        fit: a function of activations (positive [N, D], negative [M, D]) -> Tensor [D], or what has one as `.direction`:
            `difference_of_means`, `principal_difference`, or `probe_direction(fit)`.
        chunk_size: how many prompts run at once; None for all. It does not change the result.

    Returns:
        TensorDict: for each site a Tensor [D] (whatever shape `fit` returns), all from one run over the prompts.

    Raises:
        InputError: inputs without examples, a pool that does not exist.
        SiteError: unknown sites. Warns for a model in train mode.

    Cost: a forward pass over each set, up to the last of the sites; one fit for each site.

    Source: Rimsky et al. (2023) for the difference of means at the last position; Zou et al. (2023); Li et al.,
    "Inference-Time Intervention" (2023) for probes.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)))
        >>> vectors = steering_vectors(f, params, torch.tensor([[1, 2], [3, 2]]), torch.tensor([[1, 5], [3, 5]]), sites="0")
        >>> torch.allclose(vectors["0"], params["0", "weight"][2] - params["0", "weight"][5])
        True
    """
    addresses = expand(f, sites)
    require_pool(pool)
    require_positive("chunk_size", chunk_size, optional=True)
    warn_if_stochastic(f, "steering_vectors")
    if not callable(fit):
        raise InputError(f"fit is {describe(fit)}; give a function of two sets of activations.")
    first = _activations(f, params, "positive", positive, addresses, pool, chunk_size)
    second = _activations(f, params, "negative", negative, addresses, pool, chunk_size)
    fitted = {site: fit(first[site], second[site]) for site in addresses}
    return TensorDict({site: as_directions("what fit returned", d, nonzero=False) for site, d in fitted.items()}, batch_size=[])


def activation_addition(f: FunctionalModel, params: Any, positive: Any, negative: Any, *, sites: Sites) -> TensorDict:
    """The difference of the activations of two prompts at each of their positions.

        d_s[p] = a_s(positive)[p] - a_s(negative)[p]

    Args:
        f: functional model.
        params: its parameters.
        positive: one prompt, as `f` takes it: token ids [1, P], or a mapping.
        negative: another one with the same number of tokens; pad the shorter one, with spaces say.
        sites: where; patterns stand for all modules that they match.

    Returns:
        TensorDict: for each site a Tensor [P, D]. `add(d, strength, positions=slice(0, P))` adds them to the first tokens of
        a prompt, as the paper does.

    Raises:
        InputError: more than one prompt, or prompts of different lengths. SiteError: unknown sites.

    Cost: two forward passes, up to the last of the sites.

    Source: Turner et al., "Activation Addition: Steering Language Models Without Optimization" (2023).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)))
        >>> activation_addition(f, params, torch.tensor([[1, 2]]), torch.tensor([[1, 5]]), sites="0")["0"].shape
        torch.Size([2, 4])
    """
    addresses = expand(f, sites)
    warn_if_stochastic(f, "activation_addition")
    read = [_values(f, params, inputs, addresses) for inputs in (positive, negative)]
    differences = {}
    for site in addresses:
        first, second = (values[site] for values in read)
        if first.shape != second.shape or first.shape[0] != 1 or first.ndim != 3:
            raise InputError(
                f"at {site!r} positive gives {describe(first)}, negative {describe(second)}; give one prompt each, with the "
                "same number of tokens, [1, P]."
            )
        differences[site] = (first - second)[0]
    return TensorDict(differences, batch_size=[])


def _require_sets(positive: Any, negative: Any) -> None:
    for name, each in (("positive", positive), ("negative", negative)):
        if not isinstance(each, Tensor) or not each.is_floating_point() or each.ndim < 2 or not each.shape[-2]:
            raise InputError(f"{name} is {describe(each)}; give floating-point activations [N, D].")
    if positive.shape[-1] != negative.shape[-1] or positive.shape[:-2] != negative.shape[:-2]:
        raise InputError(f"positive has shape {list(positive.shape)}, negative {list(negative.shape)}; their features differ.")


def _values(f: FunctionalModel, params: Any, inputs: Any, addresses: list[str]) -> TensorDict:
    return stop_at(f, addresses)(params, with_position_ids(f, inputs))


def _activations(
    f: FunctionalModel, params: Any, name: str, inputs: Any, addresses: list[str], pool: Pool, chunk_size: int | None
) -> dict[str, Tensor]:
    """The rows [N, *row] at each site."""
    leaves, spec = pytree.tree_flatten(inputs)
    sizes = {len(leaf) if leaf.ndim else -1 for leaf in leaves if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or min(sizes) < 1:
        raise InputError(f"{name} is {describe(inputs)}; give tensors [N, ...] of the same number of prompts.")
    rows: dict[str, list[Tensor]] = {site: [] for site in addresses}
    for part in chunks(sizes.pop(), chunk_size):
        some = pytree.tree_unflatten([leaf[part] if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        values = _values(f, params, some, addresses)
        mask = mask_of(some)
        for site in addresses:
            rows[site].append(pooled(site, values[site], mask, pool, (1,)))
    return {site: torch.cat(parts) for site, parts in rows.items()}
