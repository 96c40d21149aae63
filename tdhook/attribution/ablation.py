"""Feature ablation and feature permutation: what the model loses without a group of features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.checks import require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.estimate import Estimate, Moments
from ..core.explained import explained
from ..core.progress import Progress
from ..core.randomness import require_generator, uniform_rows
from ..core.targets import Targets, check
from ..core.transforms import Sites
from .coalitions import Game, game, tracked
from .paths import straight_path


def feature_ablation(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    groups: Any = None,
    at: Sites | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """The change of each target when one group of features is replaced by its baseline.

        attribution_g = F(x) - F(x with x'_g in place of x_g)

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them. Floating-point tensors are ablated, others are passed through; to ablate integers or bools
            give floats and an f that converts them, `lambda params, x: f(params, x.long())`.
        targets: which scalars F of the output to explain; see `tdhook.targets`. A scalar for the whole batch is explained too;
            the first axis is then one of the features.
        baselines: x': a number, or the structure of `inputs` with tensors that broadcast to the inputs' shapes. With `at` also
            a mapping from each site to a value.
        groups: integer tensors in the structure of `inputs` (keyed by site for `at`) that broadcast to their shapes, with or
            without the batch axis; elements of equal id are replaced together, also in different tensors. None: every element
            of an example is a feature of its own. Inside of `torch.compile` and `vmap` give `Groups(ids, count)`.
        at: sites: ablate activations there instead of the inputs. Only what comes after the sites runs again. Of two sites, one
            after the other, the later one keeps its value when the earlier is ablated.
        chunk_size: how many copies of the batch run at once; None for all, one per group: give a chunk size for images.
        progress: called as `progress(done, total)`, in groups, at the start and after every chunk.

    Returns:
        Attributions in the structure of `inputs` (None in place of what is passed through), or a TensorDict keyed by site for
        `at`; each has the shape of what it explains, with a leading dimension T for plural targets. With `groups` one Tensor
        [B, G] or [T, B, G], of all explained tensors together: `scores[..., ids]` paints them on one whose ids have no batch
        axis. Where the target is a scalar for the whole batch there is no B.

    Raises:
        InputError: baselines, groups or a `chunk_size` that do not fit. TargetError, SiteError. Warns for a model in train
            mode.

    Cost: G + 1 forward passes for G groups, vmapped, whatever the number of targets.

    Source: Zeiler, Fergus, "Visualizing and Understanding Convolutional Networks" (2014).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2, bias=False))
        >>> x = torch.randn(4, 3)
        >>> each = feature_ablation(f, params, x, targets=0)
        >>> torch.allclose(each, params["weight"][0] * x, atol=1e-6)
        True
        >>> both = feature_ablation(f, params, x, targets=0, groups=torch.tensor([0, 0, 1]))
        >>> torch.allclose(both, torch.stack([each[:, :2].sum(-1), each[:, 2]], -1), atol=1e-6)
        True
    """
    require_positive("chunk_size", chunk_size, optional=True)
    check(targets)
    warn_if_stochastic(f, "feature_ablation")
    path = straight_path(f, params, inputs, baselines, at)
    played = game(path.explained, path.starts, targets, groups)
    rows = torch.arange(played.groups.count, device=played.device)
    parts = tracked(len(rows), chunk_size, progress)
    without = [played.each(lambda g: played.keep(played.groups.without(g)), rows[part]) for part in parts]
    return played.result((played.whole - torch.cat(without)).movedim(0, -1))


def feature_permutation(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    groups: Any = None,
    at: Sites | None = None,
    samples: int = 10,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """The mean change of each target when one group of features is shuffled among the examples of the batch.

        attribution_g = E_pi [F(x) - F(x with x_g of example pi(b) in example b)]

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them, a batch of at least two examples.
        targets: as for `feature_ablation`, one scalar per example.
        groups: as for `feature_ablation`; a group in several tensors moves together.
        at: sites: shuffle activations there instead of the inputs.
        samples: how many permutations of the batch for each group.
        generator: source of the permutations; None for the global one, as it has to be inside of `torch.compile`. Under `vmap`
            give `randomness="same"` or `"different"`.
        chunk_size: how many copies of the batch run at once; None for all groups.
        progress: called as `progress(done, total)`, in permutations.

    Returns:
        `Estimate` of the attributions over the permutations of this batch, its value and standard error as the result of
        `feature_ablation`. The standard error is NaN for a single permutation.

    Raises:
        InputError: a batch of one example, no batch; otherwise as `feature_ablation`.

    Cost: samples * G + 1 forward passes for G groups, vmapped.

    Source: Fisher, Rudin, Dominici, "All Models are Wrong, but Many are Useful" (2019), here for single examples.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2, bias=False))
        >>> x = torch.randn(4, 3)
        >>> estimate = feature_permutation(f, params, x, targets=[0, 1])
        >>> estimate.value.shape
        torch.Size([2, 4, 3])
    """
    require_positive("samples", samples)
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)
    check(targets)
    warn_if_stochastic(f, "feature_permutation")
    played = game(explained(f, params, inputs, at), [], targets, groups)
    if played.whole.ndim < 2 or len(played.whole) < 2:
        raise InputError(
            f"inputs is a batch with target values of shape {list(played.whole.shape[:-1])}; feature_permutation shuffles "
            "features among at least two examples, for one use feature_ablation."
        )
    moments = None
    for _ in tracked(samples, 1, progress):
        drawn = Moments.of(_shuffled(played, generator, chunk_size)[None])
        moments = drawn if moments is None else moments + drawn
    assert moments is not None
    return Estimate(played.result(moments.mean), played.result(moments.standard_error))


def _shuffled(played: Game, generator: torch.Generator | None, chunk_size: int | None) -> Tensor:
    """The changes [B, T, G] for one permutation of each group."""
    count, batch = played.groups.count, len(played.whole)
    order = uniform_rows(1, count * batch, generator, played.device).reshape(count, batch).argsort(-1)
    rows = torch.arange(count, device=played.device)

    def move(row: Tensor, examples: Tensor) -> list[Tensor]:
        masks = played.groups.without(row)
        return [torch.where(mask, value, value[examples]) for mask, value in zip(masks, played.what.values)]

    parts = [played.each(move, rows[part], order[part]) for part in tracked(count, chunk_size, None)]
    return (played.whole - torch.cat(parts)).movedim(0, -1)
