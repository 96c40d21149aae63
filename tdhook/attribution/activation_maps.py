"""Class activation maps: where the channels at a site speak for a target (GradCAM and its kin).

| function | map, with A [C, *spatial] at the site and G = dF/dA |
|---|---|
| `grad_cam` | channels weighted by the mean of G over space |
| `grad_cam_plus_plus` | channels weighted by a sum of relu(G), position by position |
| `hires_cam` | sum of G A over channels |
| `x_grad_cam` | channels weighted by the mean of G over space, weighted by A |
| `layer_cam` | sum of relu(G) A over channels |
| `eigen_cam`, `eigen_grad_cam` | the first principal component of A, or of G A |

Maps are not normalised. To compare maps by eye, as pytorch-grad-cam does, move each to [0, 1]:

    maps = maps - maps.amin((-2, -1), keepdim=True)
    maps = maps / maps.amax((-2, -1), keepdim=True).clamp(min=1e-7)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from ..core.batching import pull_each
from ..core.checks import require_gradients, warn_if_stochastic
from ..core.explained import explained
from ..core.targets import Targets, check, select
from ..core.transforms import Sites
from .maps import Reshape, Size, as_channels, check_options, finished, map_size


def grad_cam(
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
) -> Any:
    """GradCAM: the channels at a site, each weighted by how much the target grows with it on average.

        map_p = relu(sum_c w_c A_cp)        w_c = mean_p dF/dA_cp

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them.
        at: sites of activations [B, C, *spatial], of one to three spatial axes: convolutional blocks, usually the last one.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        relu: cut off what speaks against the target, as in the paper. Captum's default is `relu=False`.
        size: `"inputs"` up-samples the maps to the spatial size of the inputs, numbers such as `(224, 224)` to that size;
            linear along each axis (captum: nearest neighbour). After the ReLU.
        reshape: function from the value at a site to [B, C, *spatial], for tokens: `token_grid()`. One for all sites; it may
            move and leave out numbers. Without it, tokens [B, N, D] would be read as N channels.
        chunk_size: how many targets are pulled back at once; None for all. It bounds memory and does not change the result.

    Returns:
        TensorDict keyed by site, of maps [B, *spatial] (or [B, *size]), with a leading dimension T for plural targets.

    Raises:
        InputError: a site without spatial axes, a `size` or `reshape` that does not fit, a bad `chunk_size`.
            TargetError, SiteError, GradientError (grad mode is off). Warns for a model in train mode.

    Cost: one forward pass, a second one from the first site on, and T vmapped backward passes to the sites, however many.

    Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization" (2017).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
        >>> f, params = tdhook.functionalize(model)
        >>> x = torch.randn(2, 3, 8, 8)
        >>> grad_cam(f, params, x, at="0", targets=3)["0"].shape
        torch.Size([2, 6, 6])
        >>> grad_cam(f, params, x, at="0", targets=[3, 1, 0], size="inputs")["0"].shape
        torch.Size([3, 2, 8, 8])
    """
    warn_if_stochastic(f, "grad_cam")
    return weighted_maps("grad_cam", mean_gradient, f, params, inputs, at, targets, relu, size, reshape, chunk_size)


def grad_cam_plus_plus(
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
) -> Any:
    """GradCAM++: positions share the weight of a channel, so that small and repeated objects count as much as large ones.

        map_p = relu(sum_c w_c A_cp)        w_c = sum_q alpha_cq relu(G_cq)
        alpha_cq = G_cq^2 / (2 G_cq^2 + G_cq^3 sum_r A_cr) = 1 / (2 + G_cq sum_r A_cr)

    with G = dF/dA. This is the paper's closed form for the score exp(F), whose second and third derivatives are powers of G
    where F is piecewise linear in A; its factor exp(F), common to all channels of an example, is left out. The reduced
    fraction needs no constant against division by zero: the 1e-6 of pytorch-grad-cam makes weights of gradients below 1e-3
    vanish. It may turn over where A has negative values; take a site after a ReLU.

    Args, Returns, Raises, Cost: as `grad_cam`.

    Source: Chattopadhay et al., "Grad-CAM++: Generalized Gradient-based Visual Explanations for Deep Convolutional Networks"
    (2018).

    Examples:
        >>> conv = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(conv, torch.nn.Flatten(), torch.nn.Linear(64, 5)))
        >>> grad_cam_plus_plus(f, params, torch.randn(2, 1, 6, 6), at="0", targets=3)["0"].shape
        torch.Size([2, 4, 4])
    """
    warn_if_stochastic(f, "grad_cam_plus_plus")
    return weighted_maps(
        "grad_cam_plus_plus", _grad_cam_plus_plus, f, params, inputs, at, targets, relu, size, reshape, chunk_size
    )


def hires_cam(
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
) -> Any:
    """HiResCAM: gradient times activation, so that no position is credited with the gradient of another.

        map_p = relu(sum_c dF/dA_cp A_cp)

    With `relu=False` and a head that is linear (without a bias) after the site, a map sums to F.

    Args, Returns, Raises, Cost: as `grad_cam`.

    Source: Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks"
    (2020).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(24, 5, bias=False))
        >>> f, params = tdhook.functionalize(model)
        >>> x = torch.randn(2, 2, 8)
        >>> maps = hires_cam(f, params, x, at="0", targets=3, relu=False)["0"]
        >>> torch.allclose(maps.sum(-1), f(params, x)[:, 3], atol=1e-5)
        True
    """
    warn_if_stochastic(f, "hires_cam")
    return weighted_maps("hires_cam", _hires_cam, f, params, inputs, at, targets, relu, size, reshape, chunk_size)


def x_grad_cam(
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
) -> Any:
    """XGradCAM: GradCAM whose average of the gradient weighs positions by their activation.

        map_p = relu(sum_c w_c A_cp)        w_c = sum_q dF/dA_cq A_cq / sum_q A_cq

    A channel whose activations sum to zero (a dead one) has weight zero. With `relu=False` a map has the sum of that of
    `hires_cam`. Where A has both signs its sum can come close to zero and the weight grows; take a site after a ReLU.

    Args, Returns, Raises, Cost: as `grad_cam`.

    Source: Fu et al., "Axiom-based Grad-CAM: Towards Accurate Visualization and Explanation of CNNs" (2020).

    Examples:
        >>> conv = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(conv, torch.nn.Flatten(), torch.nn.Linear(64, 5)))
        >>> x = torch.randn(2, 1, 6, 6)
        >>> maps = [cam(f, params, x, at="0", targets=3, relu=False)["0"] for cam in (x_grad_cam, hires_cam)]
        >>> torch.allclose(maps[0].sum((-2, -1)), maps[1].sum((-2, -1)), atol=1e-5)
        True
    """
    warn_if_stochastic(f, "x_grad_cam")
    return weighted_maps("x_grad_cam", _x_grad_cam, f, params, inputs, at, targets, relu, size, reshape, chunk_size)


def layer_cam(
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
) -> Any:
    """LayerCAM: activations weighted by the positive part of their own gradient; made for early layers too.

        map_p = relu(sum_c relu(dF/dA_cp) A_cp)

    Args, Returns, Raises, Cost: as `grad_cam`.

    Source: Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization" (2021).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 5))
        >>> f, params = tdhook.functionalize(model)
        >>> maps = layer_cam(f, params, torch.randn(2, 1, 6, 6), at=["0", "1"], targets=3)
        >>> maps["1"].shape
        torch.Size([2, 4, 4])
    """
    warn_if_stochastic(f, "layer_cam")
    return weighted_maps("layer_cam", _layer_cam, f, params, inputs, at, targets, relu, size, reshape, chunk_size)


def weighted_maps(
    method: str,
    weigh: Callable[[Tensor, Tensor], Tensor],
    f: Callable,
    params: Any,
    inputs: Any,
    at: Sites,
    targets: Targets,
    relu: bool,
    size: Size,
    reshape: Reshape | None,
    chunk_size: int | None,
) -> Any:
    """The maps that `weigh` makes of activations and gradients [*B, C, P], as one of shape [*B, P]."""
    check_options(size, reshape, chunk_size)
    check(targets)
    require_gradients(method)
    what = explained(f, params, inputs, at)
    several = []

    def values(shifts: list[Tensor]) -> Tensor:
        chosen, plural = select(targets, what.shifted(shifts))
        several.append(plural)
        return chosen

    chosen, pull, *_ = vjp(values, [torch.zeros_like(value) for value in what.values])
    batch = chosen.shape[:-1]
    names = list(what.restructure(what.values).keys())
    activations = [as_channels(value, reshape, batch, name) for value, name in zip(what.values, names)]
    spatial = [a.shape[len(batch) + 1 :] for a in activations]
    sizes = [map_size(size, inputs, len(batch), len(sides), name) for sides, name in zip(spatial, names)]

    def pulled(cotangent: Tensor) -> list[Tensor]:
        # Down to maps within the chunk: a thousand targets have a thousand maps, but never a thousand gradients at once.
        (gradients,) = pull(cotangent)
        maps = []
        for activation, gradient, sides, name, into in zip(activations, gradients, spatial, names, sizes):
            aligned = as_channels(gradient, reshape, batch, name)
            weighed = weigh(activation.flatten(len(batch) + 1), aligned.flatten(len(batch) + 1))
            maps.append(finished(weighed.reshape(*batch, *sides), relu, into))
        return maps

    results = pull_each(pulled, chosen, torch.ones_like(chosen[..., :1]), chunk_size)
    return what.restructure(results if several[0] else [r[0] for r in results])


def mean_gradient(activations: Tensor, gradients: Tensor) -> Tensor:
    """The channels [*B, C, P] weighted by the mean of their gradients."""
    return (gradients.mean(-1, keepdim=True) * activations).sum(-2)


def _grad_cam_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    rest = 2 + gradients * activations.sum(-1, keepdim=True)
    alphas = torch.where(rest == 0, 0, 1 / torch.where(rest == 0, 1, rest))
    return ((alphas * gradients.relu()).sum(-1, keepdim=True) * activations).sum(-2)


def _hires_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    return (gradients * activations).sum(-2)


def _x_grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    total = activations.sum(-1, keepdim=True)
    weighted = (gradients * activations).sum(-1, keepdim=True)
    weights = torch.where(total == 0, 0, weighted / torch.where(total == 0, 1, total))
    return (weights * activations).sum(-2)


def _layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    return (gradients.relu() * activations).sum(-2)
