"""Activation maps by principal components."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.checks import warn_if_stochastic
from ..core.errors import InputError
from ..core.explained import explained
from ..core.structure import describe
from ..core.targets import Targets
from ..core.transforms import Sites
from .activation_maps import weighted_maps
from .maps import Reshape, Size, as_channels, check_options, finished, map_size


def eigen_grad_cam(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    at: Sites,
    targets: Targets = None,
    relu: bool = True,
    size: Size = None,
    reshape: Reshape | None = None,
    chunk_size: int | None = None,
    center: bool = False,
) -> Any:
    """EigenGradCAM: the first principal component of gradient times activation.

        map = relu(s (G A)^T u)        u the first left singular vector of G A [C, P] over P positions

    The sign s makes the map agree (have a positive inner product) with that of `hires_cam`.

    Args: as `grad_cam`, and
        center: take the mean over positions from each channel first, as pytorch-grad-cam does.

    Returns, Raises: as `grad_cam`. Cost: as `grad_cam`, and T eigendecompositions of the smaller of P x P and C x C. Its
    own derivative needs singular values that are not zero twice.

    Source: Gildenblat, pytorch-grad-cam (2021), after `eigen_cam`.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 5))
        >>> f, params = tdhook.functionalize(model)
        >>> eigen_grad_cam(f, params, torch.randn(2, 1, 6, 6), at="1", targets=3)["1"].shape
        torch.Size([2, 4, 4])
    """
    warn_if_stochastic(f, "eigen_grad_cam")

    def weigh(activations: Tensor, gradients: Tensor) -> Tensor:
        return _first_component(gradients * activations, center)

    return weighted_maps("eigen_grad_cam", weigh, f, params, inputs, at, targets, relu, size, reshape, chunk_size)


def eigen_cam(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    at: Sites,
    relu: bool = True,
    size: Size = None,
    reshape: Reshape | None = None,
    center: bool = False,
) -> Any:
    """EigenCAM: the first principal component of the activations, whatever the target.

        map = relu(s A^T u)        u the first left singular vector of A [C, P] over P positions

    The sign s makes the map agree (have a positive inner product) with the mean of the channels. Of activations that are
    nowhere negative the map is nowhere negative, unless `center`. Of activations of both signs the first component is mostly
    their mean over space, which shows little: take a site after a ReLU, or `center=True`.

    Args: f, params, inputs, at, relu, size, reshape: as `grad_cam`; activations have a batch axis, the first one of inputs.
        center: take the mean over positions from each channel first, as pytorch-grad-cam does and the paper does not.

    Returns:
        TensorDict keyed by site, of maps [B, *spatial] (or [B, *size]).

    Raises: as `grad_cam`; there are no targets, and no gradients are needed.

    Cost: one forward pass, and an eigendecomposition per example of the smaller of P x P and C x C. Its own derivative needs
    singular values that are not zero twice.

    Source: Muhammad and Yeasin, "Eigen-CAM: Class Activation Map using Principal Components" (2020).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU()))
        >>> eigen_cam(f, params, torch.randn(2, 1, 6, 6), at="1")["1"].shape
        torch.Size([2, 4, 4])
    """
    warn_if_stochastic(f, "eigen_cam")
    check_options(size, reshape, None)
    what = explained(f, params, inputs, at)
    names = list(what.restructure(what.values).keys())
    lengths = {leaf.shape[0] for leaf in pytree.tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.ndim}
    maps = []
    for value, name in zip(what.values, names):
        given = value if reshape is None else reshape(value)
        if not isinstance(given, Tensor) or not given.ndim or given.shape[0] not in lengths:
            raise InputError(
                f"at has {name!r}, which gives {describe(given)}; its first axis is not the batch axis of inputs, "
                f"{describe(inputs)}; add one, as in inputs[None], or correct reshape."
            )
        activations = as_channels(value, reshape, given.shape[:1], name)
        sides = activations.shape[2:]
        into = map_size(size, inputs, 1, len(sides), name)
        component = _first_component(activations.flatten(2), center)
        maps.append(finished(component.reshape(-1, *sides), relu, into))
    return what.restructure(maps)


def _first_component(values: Tensor, center: bool) -> Tensor:
    """The first principal component over positions: [*B, C, P] -> [*B, P], with the sign of the sum over channels."""
    dtype = values.dtype
    if dtype in (torch.bfloat16, torch.float16):
        values = values.float()  # no eigenvalues in half precision
    if center:
        values = values - values.mean(-1, keepdim=True)
    # The Gram matrix on the shorter side has all non-zero singular values, and is small.
    if values.shape[-1] <= values.shape[-2]:
        squares, vectors = torch.linalg.eigh(values.mT @ values)
        component = squares[..., -1:].clamp(min=0).sqrt() * vectors[..., -1]
    else:
        _, vectors = torch.linalg.eigh(values @ values.mT)
        component = (vectors[..., -1, None] * values).sum(-2)
    agreement = (component * values.sum(-2)).sum(-1, keepdim=True)
    return torch.where(agreement < 0, -component, component).to(dtype)
