"""Directions to steer with, from activations of two sets of examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.structure import describe
from ..concepts.directions import as_directions

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
        A `fit` for `steering_vectors`: (positive [N, D], negative [M, D]) -> Tensor [D]. Linear probes give directions
        of unit length: a strength is then in units of activation.

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
        if positive.ndim != 2:
            raise InputError(f"positive is {describe(positive)}; a probe is fitted to [N, D].")
        labels = torch.arange(len(positive) + len(negative), device=positive.device) < len(positive)
        found = as_directions("what fit returned", fit(torch.cat([positive, negative]), labels.long()))
        return found[0] if found.ndim == 2 and len(found) == 1 else found

    return direction


def _require_sets(positive: Any, negative: Any) -> None:
    for name, each in (("positive", positive), ("negative", negative)):
        if not isinstance(each, Tensor) or not each.is_floating_point() or each.ndim < 2 or not each.shape[-2]:
            raise InputError(f"{name} is {describe(each)}; give floating-point activations [N, D].")
    if positive.shape[-1] != negative.shape[-1] or positive.shape[:-2] != negative.shape[:-2]:
        raise InputError(f"positive has shape {list(positive.shape)}, negative {list(negative.shape)}; their features differ.")
