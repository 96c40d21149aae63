"""Directions to steer with, from two sets of prompts or from two prompts."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from ...core.batching import chunks
from ...core.checks import require_positive, warn_if_stochastic
from ...core.compat import visible
from ...core.errors import InputError, SiteError
from ...core.functional import FunctionalModel
from ...core.reading import stop_at
from ...core.structure import describe, tensors
from ...core.transforms import Sites, expand
from ..concepts.directions import as_directions
from ..pooling import Pool, pooled, require_pool
from ..prompt_pairs import mask_of
from ..streaming import take_examples
from .directions import Fit, difference_of_means
from .prompts import with_position_ids, without_first


def steering_vectors(
    f: FunctionalModel,
    params: Any,
    positive: Any,
    negative: Any,
    *,
    sites: Sites,
    pool: Pool = "last",
    skip: int = 0,
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
        skip: how many positions at the start of each prompt do not count either, padding aside. 1 leaves out the first token,
            which in many models has activations so large that a mean over tokens tells little but the length of the prompt.
        fit: a function of activations (positive [N, D], negative [M, D]) -> Tensor [D], or what has one as `.direction`:
            `difference_of_means`, `principal_difference`, or `probe_direction(fit)`.
        chunk_size: how many prompts run at once; None for all. It does not change the result.

    Returns:
        TensorDict: for each site a Tensor [D] (whatever shape `fit` returns), all from one run over the prompts.

    Raises:
        InputError: inputs without examples, a prompt of no more than `skip` tokens, a pool that does not exist or that does not
            make rows [N, D] of what a site holds.
        SiteError: unknown sites, sites without a value for each example. Warns for a model in train mode.

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
    require_positive("skip", skip, least=0)
    if skip and pool is None:
        raise InputError(f"skip={skip} leaves positions out of a pool, and pool=None keeps them all; give a pool.")
    warn_if_stochastic(f, "steering_vectors")
    if not callable(fit):
        raise InputError(f"fit is {describe(fit)}; give a function of two sets of activations.")
    count, other = _count_prompts("positive", positive, skip), _count_prompts("negative", negative, skip)
    first = _activations(f, params, "positive", positive, count, addresses, pool, skip, chunk_size)
    second = _activations(f, params, "negative", negative, other, addresses, pool, skip, chunk_size)
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
        InputError: more than one prompt, or prompts of different lengths. SiteError: unknown sites, and sites without a row for
            each token.

    Cost: two forward passes, up to the last of the sites.

    Source: Turner et al., "Activation Addition: Steering Language Models Without Optimization" (2023).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)))
        >>> activation_addition(f, params, torch.tensor([[1, 2]]), torch.tensor([[1, 5]]), sites="0")["0"].shape
        torch.Size([2, 4])
    """
    addresses = expand(f, sites)
    shapes = [{tuple(tensor.shape) for _, tensor in tensors(inputs)} for inputs in (positive, negative)]
    if shapes[0] != shapes[1] or any(shape[:1] != (1,) for shape in shapes[0]):
        raise InputError(
            f"positive is {describe(positive)}, negative {describe(negative)}; give one prompt each, with the same number of "
            "tokens, [1, P]."
        )
    warn_if_stochastic(f, "activation_addition")
    read = [_values(f, params, inputs, addresses) for inputs in (positive, negative)]
    differences = {}
    for site in addresses:
        first, second = (values[site] for values in read)
        if first.ndim != 3 or len(first) != 1 or first.shape != second.shape:
            raise SiteError(f"site {site!r} holds {describe(first)}, and {describe(second)}; choose one of [1, P, D].")
        differences[site] = (first - second)[0]
    return TensorDict(differences, batch_size=[])


def _values(f: FunctionalModel, params: Any, inputs: Any, addresses: list[str]) -> TensorDict:
    return stop_at(f, addresses)(params, with_position_ids(f, inputs))


def _count_prompts(name: str, inputs: Any, skip: int) -> int:
    """How many prompts there are; raises `InputError` for none, and for one of which nothing is left."""
    sizes = {len(tensor) if tensor.ndim else -1 for _, tensor in tensors(inputs)}
    if len(sizes) != 1 or min(sizes) < 1:
        raise InputError(f"{name} is {describe(inputs)}; give tensors [N, ...] of the same number of prompts.")
    mask = mask_of(inputs)
    if mask is not None and visible(mask):
        _require_length(name, int(mask.sum(1).min()), skip)
    return sizes.pop()


def _require_length(name: str, length: int, skip: int) -> None:
    if length <= skip:
        raise InputError(f"{name} has a prompt of {length} tokens, padding aside; with skip={skip} each needs {skip + 1}.")


def _activations(
    f: FunctionalModel, params: Any, name: str, inputs: Any, count: int, addresses: list[str], pool: Pool, skip: int,
    chunk_size: int | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The rows [N, D] at each site."""
    rows: dict[str, list[Tensor]] = {site: [] for site in addresses}
    for part in chunks(count, chunk_size):
        some = take_examples(inputs, part, count)
        values = _values(f, params, some, addresses)
        for site in addresses:
            value = values[site]
            if value.ndim == 0 or len(value) != part.stop - part.start:
                raise SiteError(
                    f"site {site!r} holds {describe(value)} for {part.stop - part.start} prompts; choose another site."
                )
            if skip and value.ndim > 1:
                _require_length(name, value.shape[1], skip)
            row = pooled(site, value, without_first(mask_of(some), value, skip), pool, (1,))
            if row.ndim != 2:
                raise InputError(
                    f"pool={pool!r} makes {describe(row)} of {describe(value)} at {site!r}, and fits are to rows [N, D]; "
                    "give another pool or another site."
                )
            rows[site].append(row)
    return {site: torch.cat(parts) for site, parts in rows.items()}
