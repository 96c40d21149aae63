"""The mean of the activations of a data set, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from ..core.checks import require_positive, warn_if_stochastic
from ..core.errors import InputError, SiteError
from ..core.functional import FunctionalModel
from ..core.progress import Progress
from ..core.structure import describe
from .patches import Where, views
from .streaming import Positions, head, numbered


def mean_activations(
    f: FunctionalModel,
    params: Any,
    batches: Iterable[Any],
    sites: Where,
    *,
    pooled: bool = False,
    positions: Positions = None,
    inputs_of: Callable[[Any], Any] | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> TensorDict:
    """The mean value at sites over a data set, for mean ablation.

        mean[s, l] = mean_n a_s(x_n)[l]          or, pooled,          mean[s] = mean_{n, l} a_s(x_n)[l]

    Neither the order of the examples nor how they are batched matters.

    Args:
        f: functional model.
        params: its parameters.
        batches: iterable of batches, each what `f` takes as inputs, or what `inputs_of` makes into that.
        sites: addresses; patterns stand for all modules that they match, a `HeadLayout` for the site at which it has heads.
            Values are [B, *shape], with positions [B, L, *shape].
        pooled: whether the mean is over the positions (axis 1) too, which may then differ in number from batch to batch.
        positions: which positions count, as for `collect`; None: `"attention_mask"` where the inputs have one, else all. A
            position that never counts has the mean 0. Positions are columns: in prompts of different length, padded on the
            left say, a column is now this word, now that one, so that `pooled` means more.
        inputs_of: a function of the batch.
        chunk_size: how many examples of a batch run at once; None for all.
        progress: called as `progress(done, total)`, in batches.

    Returns:
        TensorDict keyed by canonical site: Tensor [*shape] of one example, or without the axis of positions if `pooled`.

    Raises:
        InputError: no batch, examples of different shape without `pooled`.
        SiteError: as `capture`, a site without positions if `pooled`. Warns for a model in train mode.

    Cost: one forward pass up to the last site, without gradients. Not for `torch.compile` and `vmap`: it reads an iterable.

    Source: Wang et al., "Interpretability in the Wild" (2022): means per position.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Identity())
        >>> mean_activations(f, params, [torch.tensor([[1.0, 2]]), torch.tensor([[3.0, 6]])], ":out")[":out"]
        tensor([2., 4.])
    """
    require_positive("chunk_size", chunk_size, optional=True)
    addresses = [str(view.want.site) for view in views(f, sites)]
    model = head("mean_activations", f, list(dict.fromkeys(addresses)), inputs_of, positions, chunk_size)
    warn_if_stochastic(f, "mean_activations")
    means: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for _, batch in numbered(batches, progress):
        for part in model.run(params, batch):
            for site, value in part.values.items():
                exact = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
                dtypes[site] = value.dtype
                total, count = _summed(site, exact.detach(), part.mask, pooled)
                if site in means and means[site].shape != total.shape:
                    raise InputError(
                        f"site {site!r} held a value of shape {list(means[site].shape)}, now {list(total.shape)}; pad the "
                        "prompts to one length, or take pooled=True."
                    )
                # a running mean, since a sum of many values loses digits
                counts[site] = counts.get(site, torch.zeros_like(count)) + count
                before = means.get(site, torch.zeros_like(total))
                means[site] = before + (total - count * before) / counts[site].clamp(min=1)
    return TensorDict({site: mean.to(dtypes[site]) for site, mean in means.items()}, batch_size=[])


def _summed(site: str, value: Tensor, mask: Tensor | None, pooled: bool) -> tuple[Tensor, Tensor]:
    """The sum over the examples of a part, and how many values it has: a tensor that broadcasts to the sum."""
    if not value.is_floating_point():
        raise SiteError(f"site {site!r} holds {describe(value)}; give a site of floating-point values.")
    if pooled and value.ndim < 2:
        raise SiteError(f"site {site!r} holds {describe(value)}, which has no positions; take pooled=False.")
    if mask is None or value.ndim < 2 or value.shape[1 : mask.ndim] != mask.shape[1:]:
        if mask is not None and pooled:
            raise SiteError(f"site {site!r} holds {describe(value)}, the mask of positions is {describe(mask)}.")
        dims = (0, 1) if pooled else (0,)
        number = value.shape[0] * (value.shape[1] if pooled else 1)
        return value.sum(dims), torch.tensor(float(number), dtype=value.dtype, device=value.device)
    weights = mask.to(value).reshape(*mask.shape, *[1] * (value.ndim - mask.ndim))
    if pooled:
        return torch.where(weights > 0, value, 0).sum((0, 1)), weights.sum()
    return torch.where(weights > 0, value, 0).sum(0), weights.sum(0)
