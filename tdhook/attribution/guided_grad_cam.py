"""Guided GradCAM: the detail of guided backpropagation where GradCAM points."""

from __future__ import annotations

from typing import Any

from ..core.checks import require_gradients, warn_if_stochastic
from ..core.errors import InputError, SiteError
from ..core.explained import explained_inputs, target_gradients
from ..core.functional import FunctionalModel
from ..core.structure import describe
from ..core.targets import Targets, check
from ..core.transforms import Sites, exact_wants, require_sites
from .activation_maps import mean_gradient, weighted_maps
from .guided_backpropagation import guided
from .maps import Reshape, check_options, map_size, resized


def guided_grad_cam(
    f: FunctionalModel,
    params: Any,
    inputs: Any,
    *,
    at: Sites,
    targets: Targets = None,
    reshape: Reshape | None = None,
    sites: Sites | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Guided GradCAM: guided backpropagation to the inputs times the GradCAM map of a site, up-sampled to them.

        attribution_ip = guided_ip up-sampled(map)_p

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them; floating-point tensors are images [B, channels, *spatial].
        at: the site of the map: one, of activations [B, C, *spatial].
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        reshape: as `grad_cam`.
        sites: as `guided_backpropagation`: where gradients are cut; None for all ReLUs.
        chunk_size: how many targets are pulled back at once; None for all. It bounds memory and does not change the result.

    Returns:
        In the structure of `inputs` (None in place of what has no gradient), with a leading dimension T for plural targets.
        The map is rectified, and up-sampled linearly; captum takes the nearest neighbour, and gives an empty tensor where the
        sizes do not fit.

    Raises:
        SiteError: several sites, or a model without a ReLU. InputError: inputs that have not the spatial axes of the map;
            otherwise as `grad_cam`.

    Cost: that of `grad_cam` and of `guided_backpropagation`.

    Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization" (2017).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 5))
        >>> f, params = tdhook.functionalize(model)
        >>> guided_grad_cam(f, params, torch.randn(2, 3, 6, 6), at="1", targets=[3, 0]).shape
        torch.Size([2, 2, 3, 6, 6])
    """
    check_options(None, reshape, chunk_size)
    check(targets)
    require_gradients("guided_grad_cam")
    require_sites(f)
    wants = exact_wants(f, at, "at")
    if len(wants) > 1:
        raise SiteError(f"guided_grad_cam takes one site, at has {len(wants)}; call it once for each.")
    warn_if_stochastic(f, "guided_grad_cam")
    site = str(wants[0].site)
    what = explained_inputs(guided(f, sites), params, inputs)
    maps = weighted_maps("guided_grad_cam", mean_gradient, f, params, inputs, at, targets, True, None, reshape, chunk_size)[
        site
    ]
    gradients, chosen, plural = target_gradients(what, targets, chunk_size)
    maps = maps if plural else maps[None]
    spatial = maps.ndim - chosen.ndim
    lead = chosen.ndim - 1
    results = []
    for gradient, value in zip(gradients, what.values):
        if value.ndim != lead + 1 + spatial:
            raise InputError(
                f"guided_grad_cam multiplies the map of {site!r}, with {spatial} spatial axes, into images "
                f"[B, channels, *spatial], but inputs has {describe(value)}; bind it, as in functionalize(model, name=value)."
            )
        size = map_size(tuple(value.shape[lead + 1 :]), inputs, lead, spatial, site)
        results.append(gradient * resized(maps, size).unsqueeze(-spatial - 1))
    return what.restructure(results if plural else [r[0] for r in results])
