"""Random subsets of features: whether the sum of their attributions goes with what removing them does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.baselines import replacements
from ..core.batching import chunks
from ..core.checks import require_positive, warn_if_stochastic
from ..core.correlation import Similarity, pearson, similarity_function
from ..core.errors import InputError
from ..core.randomness import require_generator, stacked, uniform_like
from ..core.structure import describe
from ..core.targets import Targets
from ..core.transforms import Sites
from .features import Features, features


def sensitivity_n(
    f: Callable,
    params: Any,
    inputs: Any,
    attributions: Any,
    *,
    n: int | Sequence[int],
    targets: Targets = None,
    baselines: Any = 0.0,
    samples: int = 100,
    at: Sites | None = None,
    groups: Any = None,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The correlation between the attribution of random subsets of n features and the drop of the output without them.

        corr_S [sum_{i in S} phi_i, F(x) - F(x with S from x')] over random S of size n

    Args:
        f: as `pixel_flipping`.
        params: as `pixel_flipping`.
        inputs: as `pixel_flipping`.
        attributions: as `pixel_flipping`.
        targets: as `pixel_flipping`.
        baselines: as `pixel_flipping`.
        at: as `pixel_flipping`.
        groups: as `pixel_flipping`.
        n: size of the subsets, or several of them (the paper takes sizes from 1 to 0.8 D, evenly on a logarithmic scale).
        samples: number of subsets of each size, drawn without replacement for each example on its own; all targets see the
            same. Subsets may come again.
        chunk_size: how many subsets run at once; None for all. It bounds memory and does not change the result.
        generator: source of the draws. None: torch's global one.

    Returns:
        Tensor [B], or [T, B] for plural targets, with a last dimension N for N sizes; 1 is best. NaN where the sums or the
        drops are all equal, as they are for n = D or an attribution of zeros. Half types give float32.

    Raises:
        InputError: attributions, baselines or groups that do not fit, `n` that is no number of features, fewer than 2 samples,
            a bad `chunk_size` or `generator`. TargetError, SiteError. Warns for a model in train mode.

    Cost: `samples` * N + 1 forward passes, vmapped. Inside a vmap the draws need its `randomness="different"` or `"same"`; a
    `generator` cannot be compiled with `fullgraph=True`, the global one can.

    Quantus' SensitivityN reveals features in order of their attribution instead of drawing subsets, and correlates across
    examples and steps.

    Source: Ancona et al., "Towards better understanding of gradient-based attribution methods for deep neural networks" (2018).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(5, 1))
        >>> x = torch.randn(4, 5)
        >>> correlation = sensitivity_n(f, params, x, params["weight"] * x, n=2, targets=0)
        >>> torch.allclose(correlation, torch.ones(4))
        True
    """
    sizes = [n] if isinstance(n, int) else n
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
        raise InputError(f"n is an integer or a sequence of some, got {describe(n)}.")
    _require_options("n", sizes, samples, chunk_size, generator)
    warn_if_stochastic(f, "sensitivity_n")
    scored = features(f, params, inputs, attributions, targets, at, groups)
    news = replacements(scored.what, baselines)
    _require_sizes("n", sizes, scored)
    values = [_correlation(scored, news, size, samples, pearson, chunk_size, generator) for size in sizes]
    return scored.result(values[0] if isinstance(n, int) else torch.stack(values, -1))


def faithfulness_correlation(
    f: Callable,
    params: Any,
    inputs: Any,
    attributions: Any,
    *,
    subset_size: int,
    targets: Targets = None,
    baselines: Any = 0.0,
    samples: int = 100,
    similarity: str | Similarity = "pearson",
    at: Sites | None = None,
    groups: Any = None,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sensitivity-n under the name and with the choices of another paper: a fixed size of subsets, any correlation.

        corr_S [sum_{i in S} phi_i, F(x) - F(x with S from x')] over random S, |S| = subset_size

    Args:
        f: as `pixel_flipping`.
        params: as `pixel_flipping`.
        inputs: as `pixel_flipping`.
        attributions: as `pixel_flipping`.
        targets: as `pixel_flipping`.
        baselines: as `pixel_flipping`. The paper's are the mean of the training data.
        at: as `pixel_flipping`.
        groups: as `pixel_flipping`.
        subset_size: number of features in each subset.
        samples: as `sensitivity_n`.
        chunk_size: as `sensitivity_n`.
        generator: as `sensitivity_n`.
        similarity: `"pearson"` (the paper's), `"spearman"`, or a function of two tensors [*lead, S] to [*lead].

    Returns:
        Tensor [B], or [T, B] for plural targets; 1 is best. NaN where the sums or the drops are all equal.

    Raises:
        InputError: as `sensitivity_n`, or an unknown `similarity`. TargetError, SiteError.

    Cost: `samples` + 1 forward passes, vmapped.

    Quantus' FaithfulnessCorrelation has subsets of 224 features and black baselines unless told, normalises the attributions
    (which changes no correlation) and takes their absolute value where asked (which does).

    Source: Bhatt, Weller, Moura, "Evaluating and Aggregating Feature-based Model Explanations" (2020).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(5, 1))
        >>> x = torch.randn(4, 5)
        >>> correlation = faithfulness_correlation(f, params, x, -params["weight"] * x, subset_size=2, targets=0)
        >>> torch.allclose(correlation, -torch.ones(4))
        True
    """
    _require_options("subset_size", [subset_size], samples, chunk_size, generator)
    correlate = similarity_function(similarity)
    warn_if_stochastic(f, "faithfulness_correlation")
    scored = features(f, params, inputs, attributions, targets, at, groups)
    news = replacements(scored.what, baselines)
    _require_sizes("subset_size", [subset_size], scored)
    return scored.result(_correlation(scored, news, subset_size, samples, correlate, chunk_size, generator))


def _require_options(name: str, sizes: Sequence[int], samples: int, chunk_size: int | None, generator: Any) -> None:
    for size in sizes:
        require_positive(name, size)
    require_positive("samples", samples, least=2)
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)


def _require_sizes(name: str, sizes: Sequence[int], scored: Features) -> None:
    for size in sizes:
        if size > scored.scores.shape[-1]:
            raise InputError(f"{name}={size} is more than the {scored.scores.shape[-1]} features that attributions scores.")


def _correlation(
    scored: Features,
    news: list[Tensor],
    size: int,
    samples: int,
    correlate: Similarity,
    chunk_size: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The correlation over subsets of one size, [T, *B]."""
    sums, drops = [], []
    for chunk in chunks(samples, chunk_size):
        (drawn,) = stacked(lambda: [uniform_like(scored.scores[0], generator)], chunk.stop - chunk.start)  # [S, *B, D]
        chosen = drawn.topk(size, dim=-1).indices
        masks = torch.zeros_like(drawn, dtype=torch.bool).scatter(-1, chosen, True)
        drops.append(scored.outputs - scored.evaluate_with(masks, news))
        sums.append(torch.where(masks[:, None], scored.scores, 0).sum(-1))
    return correlate(torch.cat(sums).movedim(0, -1), torch.cat(drops).movedim(0, -1))
