"""Activation maps without gradients: channels weighted by what the output does when they mask the input, or are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from ..core.batching import vmap_or_loop
from ..core.checks import warn_if_stochastic
from ..core.errors import InputError
from ..core.explained import explained
from ..core.structure import describe
from ..core.targets import Targets, check, select
from ..core.transforms import Sites
from .maps import Reshape, Size, as_channels, check_options, finished, map_size, resized
from .paths import Path, straight_path


def score_cam(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    at: Sites,
    targets: Targets = None,
    baselines: Any = 0.0,
    relu: bool = True,
    size: Size = None,
    reshape: Reshape | None = None,
    chunk_size: int | None = None,
) -> Any:
    """ScoreCAM: each channel weighted by the score of the input that it lets through as a mask.

        map = relu(sum_c w_c A_c)        w = softmax over c of F(x' + H_c (x - x'))
        H_c = A_c up-sampled to the input and moved to [0, 1]; 0 where A_c is constant

    The paper subtracts F(x') from the scores, which the softmax over channels takes out again.

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them. Every floating-point tensor [B, channels, *spatial] with as many spatial axes as the
            activations is masked; others are passed through.
        at: sites of activations [B, C, *spatial].
        targets: which scalars F of the output to explain; see `tdhook.targets`. As in the paper no softmax over classes is
            taken; for one pass `targets=lambda out: out.softmax(-1)[:, c]`.
        baselines: x': a number, or the structure of `inputs` with tensors that broadcast to the inputs' shapes.
        relu: as `grad_cam`.
        size: as `grad_cam`.
        reshape: as `grad_cam`.
        chunk_size: how many channels run at once; None for all. It bounds memory and does not change the result.

    Returns:
        TensorDict keyed by site, of maps [B, *spatial] (or [B, *size]), with a leading dimension T for plural targets.

    Raises:
        InputError: inputs that no map can mask, baselines that do not fit; otherwise as `grad_cam`. No gradients are needed.

    Cost: C forward passes per site, vmapped, and two more, whatever the number of targets.

    Source: Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks" (2020).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 5))
        >>> f, params = tdhook.functionalize(model)
        >>> score_cam(f, params, torch.randn(2, 1, 6, 6), at="1", targets=[3, 0], chunk_size=2)["1"].shape
        torch.Size([2, 2, 4, 4])
    """
    warn_if_stochastic(f, "score_cam")
    check_options(size, reshape, chunk_size)
    check(targets)
    path = straight_path(f, params, inputs, baselines, None)
    what = explained(f, params, inputs, at)
    whole, plural = select(targets, path.explained.evaluate(path.ends))
    batch = whole.shape[:-1]
    names = list(what.restructure(what.values).keys())
    every = [as_channels(value, reshape, batch, name) for value, name in zip(what.values, names)]
    sides = [activations.shape[len(batch) + 1 :] for activations in every]
    sizes = [map_size(size, inputs, len(batch), len(s), name) for s, name in zip(sides, names)]
    places = [_masked_inputs(path, inputs, len(batch), len(s), name) for s, name in zip(sides, names)]
    maps = []
    for activations, masked, spatial, into in zip(every, places, sides, sizes):

        def score(channel: Tensor, masked: list[int] = masked, spatial: int = len(spatial)) -> Tensor:
            return select(targets, path.explained.evaluate(_let_through(path, channel, masked, spatial)))[0]

        scores = vmap_or_loop(score, activations.movedim(len(batch), 0), chunk_size)
        maps.append(finished(_weighted(scores.softmax(0), activations, len(batch)), relu, into))
    return what.restructure(maps if plural else [m[0] for m in maps])


def ablation_cam(
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
    """AblationCAM: each channel weighted by the part of the score that is lost without it.

        map = relu(sum_c w_c A_c)        w_c = (F - F with A_c = 0) / |F|

    The paper divides by F. That is the same for a positive score; for a negative one it would turn the map over. |F| is a
    common factor of the map of an example, kept from being zero by the machine epsilon.

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them.
        at: sites of activations [B, C, *spatial]. At each of several, the channels are zeroed there alone.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        relu: as `grad_cam`.
        size: as `grad_cam`.
        reshape: as `grad_cam`. What it leaves out (a class token) is not zeroed.
        chunk_size: how many channels run at once; None for all. It bounds memory and does not change the result.

    Returns:
        TensorDict keyed by site, of maps [B, *spatial] (or [B, *size]), with a leading dimension T for plural targets.

    Raises:
        InputError: as `grad_cam`; no gradients are needed.

    Cost: one forward pass (of several sites: and one for each), and per site C + 1 passes, vmapped, of what comes after it,
    whatever the number of targets.

    Source: Desai and Ramaswamy, "Ablation-CAM: Visual Explanations for Deep Convolutional Network via Gradient-free
    Localization" (2020).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 5))
        >>> f, params = tdhook.functionalize(model)
        >>> ablation_cam(f, params, torch.randn(2, 1, 6, 6), at="1", targets=3, chunk_size=2)["1"].shape
        torch.Size([2, 4, 4])
    """
    warn_if_stochastic(f, "ablation_cam")
    check_options(size, reshape, chunk_size)
    check(targets)
    what = explained(f, params, inputs, at)
    names = list(what.restructure(what.values).keys())
    maps = []
    plural = False
    for name in names:
        # On its own: with all sites written at once, what is zeroed at one would not reach a later one.
        here = what if len(names) == 1 else explained(f, params, inputs, name)
        value = here.values[0]
        whole, plural = select(targets, here.evaluate([value]))
        batch = whole.shape[:-1]
        activations = as_channels(value, reshape, batch, name)
        spatial = activations.shape[len(batch) + 1 :]
        into = map_size(size, inputs, len(batch), len(spatial), name)
        scores = _without_each(here.evaluate, value, targets, activations, reshape, len(batch), chunk_size)
        weights = (whole - scores) / whole.abs().clamp(min=torch.finfo(whole.dtype).eps)
        maps.append(finished(_weighted(weights, activations, len(batch)), relu, into))
    return what.restructure(maps if plural else [m[0] for m in maps])


def _without_each(
    evaluate: Callable,
    value: Tensor,
    targets: Targets,
    activations: Tensor,
    reshape: Reshape | None,
    lead: int,
    chunk_size: int | None,
) -> Tensor:
    """The target values without each channel in turn: [C, *B, T]."""
    channels = torch.arange(activations.shape[lead], device=value.device)
    shaped = channels.reshape(-1, *[1] * (activations.ndim - lead - 1))

    def score(channel: Tensor) -> Tensor:
        removed = torch.where(shaped == channel, activations, 0)
        if reshape is not None:
            # Back to the layout of the site: the transpose of moving numbers moves them back.
            _, pull, *_ = vjp(reshape, value)
            (removed,) = pull(removed)
        return select(targets, evaluate([value - removed]))[0]

    return vmap_or_loop(score, channels, chunk_size)


def _masked_inputs(path: Path, inputs: Any, lead: int, spatial: int, site: str) -> list[int]:
    """Which of the tensors that move are images for a mask with `spatial` axes."""
    found = [i for i, end in enumerate(path.ends) if end.ndim == lead + 1 + spatial]
    if not found:
        raise InputError(
            f"score_cam masks inputs [B, channels, *spatial] by the activations of {site!r}, with {spatial} spatial axes, but "
            f"inputs is {describe(inputs)}; take another site, or ablation_cam."
        )
    return found


def _let_through(path: Path, channel: Tensor, masked: list[int], spatial: int) -> list[Tensor]:
    """The inputs that one channel [*B, *spatial] lets through."""
    moved = list(path.ends)
    axes = tuple(range(-spatial, 0))
    for i in masked:
        start, end = path.starts[i], path.ends[i]
        mask = resized(channel, tuple(end.shape[-spatial:]))
        mask = mask - mask.amin(axes, keepdim=True)
        top = mask.amax(axes, keepdim=True)
        mask = mask / torch.where(top == 0, 1, top)
        moved[i] = start + mask.unsqueeze(-spatial - 1).to(end.dtype) * (end - start)
    return moved


def _weighted(weights: Tensor, activations: Tensor, lead: int) -> Tensor:
    """Channels [*B, C, *spatial] summed with weights [C, *B, T]: maps [T, *B, *spatial]."""
    flat = activations.movedim(lead, 0).flatten(lead + 1)
    maps = torch.einsum("c...t,c...p->t...p", weights.to(activations.dtype), flat)
    return maps.reshape(*maps.shape[:-1], *activations.shape[lead + 1 :])
