"""Paths from baselines to inputs, or between the activations of the two at sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.baselines import replacement, replacements
from ..core.checks import flatten_as
from ..core.errors import InputError
from ..core.explained import Explained, explained, moving_leaves, placed
from ..core.forward_mode import push_forward
from ..core.reading import stop_at
from ..core.structure import describe
from ..core.transforms import Sites, exact_wants, require_sites, values_at

Curve = Callable[[Tensor, Tensor, Tensor], Tensor]


def straight(start: Tensor, end: Tensor, alpha: Tensor) -> Tensor:
    """The straight line.

        gamma(alpha) = start + alpha (end - start)

    Args:
        start: Tensor [*shape], the baseline.
        end: Tensor [*shape], the input.
        alpha: Tensor [] or one that broadcasts to [*shape], from 0 to 1.

    Returns:
        Tensor [*shape].

    Examples:
        >>> straight(torch.zeros(2), torch.ones(2), torch.tensor(0.25))
        tensor([0.2500, 0.2500])
    """
    return start + alpha * (end - start)


def gaussian_blur(max_sigma: float = 50.0, dims: Sequence[int] = (-2, -1)) -> Curve:
    """The path from a blurred image to the image, which needs no baseline: the scale of the blur shrinks with alpha.

        gamma(alpha) = G_s * end, with s = max_sigma (1 - alpha)

    Near the border the Gaussian weights are normalised over what lies inside, so a constant image stays constant.

    Args:
        max_sigma: standard deviation of the Gaussian at alpha = 0, in pixels.
        dims: axes to blur along; `(-1,)` for signals [B, C, L].

    Returns:
        A function for the argument `path` of `integrated_gradients`; it does not use `start`.

    Raises:
        InputError: `max_sigma` that is not positive.

    Source: Xu, Venugopalan, Sundararajan, "Attribution in Scale and Space" (2020).

    Examples:
        >>> blurred = gaussian_blur(2.0)(torch.zeros(1, 5, 5), torch.eye(5)[None], torch.tensor(0.0))
        >>> bool(blurred.max() < 0.3), blurred.shape
        (True, torch.Size([1, 5, 5]))
    """
    if not isinstance(max_sigma, (int, float)) or isinstance(max_sigma, bool) or not max_sigma > 0:
        raise InputError(f"max_sigma={max_sigma!r} is the standard deviation of a blur in pixels; give a positive number.")

    def curve(start: Tensor, end: Tensor, alpha: Tensor) -> Tensor:
        sigma = max_sigma * (1 - alpha)
        for dim in dims:
            places = torch.arange(end.shape[dim], dtype=end.dtype, device=end.device)
            # Below a hundredth of a pixel the kernel is the identity to rounding; a sigma of zero has no logarithm.
            exponents = (places - places[:, None]).square() / (-2 * sigma.clamp(min=0.01).square())
            end = (end.movedim(dim, -1) @ exponents.softmax(-1).mT).movedim(-1, dim)
        return end

    return curve


@dataclass(frozen=True)
class Path:
    """A path of several tensors that move together.

    Attributes:
        starts: the tensors at the beginning.
        explained: the tensors at the end, and the model as a function of them.
        curve: from a start, an end and alpha to the point in between.
    """

    starts: list[Tensor]
    explained: Explained
    curve: Curve = straight

    @property
    def ends(self) -> list[Tensor]:
        return self.explained.values

    def points(self, alpha: Tensor) -> list[Tensor]:
        """The tensors at alpha: Tensor [], or [*B] with one number for each example."""
        return [self.curve(a, b, _aligned(alpha, b)) for a, b in zip(self.starts, self.ends)]

    def velocities(self, alpha: Tensor) -> list[Tensor]:
        """The derivatives of the tensors with respect to alpha."""
        if self.curve is straight:
            return [end - start for start, end in zip(self.starts, self.ends)]
        return push_forward(self.points, (alpha,), (torch.ones_like(alpha),))[1]

    def ends_of_curve(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors at alpha = 0 and at alpha = 1."""
        if self.curve is straight:
            return self.starts, self.ends
        zero = torch.zeros((), dtype=self.ends[0].dtype, device=self.ends[0].device)
        return self.points(zero), self.points(zero + 1)


def _aligned(alpha: Tensor, end: Tensor) -> Tensor:
    return alpha.to(end.dtype).reshape(*alpha.shape, *[1] * (end.ndim - alpha.ndim)) if alpha.ndim else alpha.to(end.dtype)


def straight_path(f: Any, params: Any, inputs: Any, baselines: Any, at: Sites | None, curve: Curve = straight) -> Path:
    """The path of the inputs, or with `at` of the values at sites."""
    if not callable(curve):
        raise InputError(f"path is {describe(curve)}; give a function (start, end, alpha) -> point, such as `straight`.")
    if at is None:
        end = explained(f, params, inputs)
        return Path(replacements(end, baselines), end, curve)
    require_sites(f)
    names = [str(want.site) for want in exact_wants(f, at, "at")]
    base_inputs = None if _by_site(f, baselines, at) else _baseline_inputs(inputs, baselines)
    end = explained(f, params, inputs, at)
    if base_inputs is None:
        given = list(values_at(exact_wants(f, at, "at"), baselines, "baselines").values())
    else:
        head = stop_at(f, names)(params, base_inputs)
        given = [head[name] for name in names]
    starts = [replacement(value, e, f"baselines for {name!r}") for value, e, name in zip(given, end.values, names)]
    return Path(starts, end, curve)


def _by_site(f: Any, baselines: Any, at: Sites) -> bool:
    """Whether baselines are values at the sites rather than inputs."""
    if not isinstance(baselines, (Mapping, TensorDictBase)):
        return False
    wants = exact_wants(f, at, "at")
    return bool({str(k) for k in baselines.keys()} & ({w.request for w in wants} | {str(w.site) for w in wants}))


def _baseline_inputs(inputs: Any, baselines: Any) -> Any:
    """The inputs of the baseline run: a number fills what is floating-point, a structure is taken as it is."""
    leaves, spec = pytree.tree_flatten(inputs)
    if isinstance(baselines, (int, float)) and not isinstance(baselines, bool):
        moving = moving_leaves(leaves)
        if not moving:
            raise InputError(
                f"baselines={baselines!r} cannot stand for {describe(inputs)}; pass inputs of the same kind (other token ids), "
                "or {site: value} for the sites of at."
            )
        return pytree.tree_unflatten(placed(leaves, moving, [torch.full_like(leaves[i], baselines) for i in moving]), spec)
    given = flatten_as("baselines", baselines, inputs)
    for value, leaf in zip(given, leaves):
        if isinstance(leaf, Tensor) and (not isinstance(value, Tensor) or value.shape != leaf.shape):
            raise InputError(
                f"baselines holds {describe(value)} for {describe(leaf)}; give the shape of inputs, or {{site: value}} for at."
            )
    return baselines
