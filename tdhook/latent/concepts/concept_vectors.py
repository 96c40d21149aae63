"""Concept vectors: the direction of a concept in a space of activations, learned from examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import tensorclass
from torch import Tensor

from ...core.batching import chunks
from ...core.checks import require_positive
from ...core.compat import visible
from ...core.errors import InputError
from ...core.structure import describe
from .directions import as_directions

Fit = Callable[[Tensor, Tensor], Any]


@tensorclass
class ConceptVectors:
    """Directions of concepts.

    Attributes:
        direction: Tensor [*K, *features], of unit length, pointing to the concept.
        accuracy: Tensor [*K]: on held-out examples; NaN where none were held out.
    """

    direction: Tensor
    accuracy: Tensor


def cav(
    concepts: Tensor | Sequence[Tensor],
    randoms: Tensor | Sequence[Tensor],
    *,
    fit: Fit | None = None,
    held_out: int | None = 3,
    chunk_size: int | None = None,
) -> ConceptVectors:
    """Concept activation vectors: for each concept and each random set, the normal of what separates them linearly.

        v = w / |w|,    w the weight of a linear probe of concept (1) against random (0)

    Args:
        concepts: activations [N, *features] of examples of a concept; or a sequence of such, K concepts.
        randoms: activations [M, *features] of random examples; or a sequence of such, R random sets.
        fit: a function (x [S, n, D], y [n]) -> probe with `.direction` [S, D], or the directions themselves, for S problems at
            once; y holds the integers 1 (concept) and 0. Any of `tdhook.latent.probes`; None: `logistic` with its defaults.
        held_out: every how many-th example of each set (the first of each such group) is kept for the accuracy; None: none.
        chunk_size: how many vectors are fitted at once; None for all. It does not change the result. Sets of unequal sizes are
            fitted one by one.

    Returns:
        `ConceptVectors`: `direction` [*features] and `accuracy` []; a sequence of concepts adds a dimension K to both, then a
        sequence of random sets a dimension R. The accuracy is that of the direction with the threshold half-way between the
        projected means of the fitted examples, averaged over the two sets, so that chance is 0.5 whatever their sizes.

    Raises:
        InputError: sets that are no floating-point tensors [N, *features] of the same features, with fewer than two examples,
            or with NaN; a bad option; a probe without direction.

    For maps [N, C, H, W] a vector is as large as the map. Pool them before, as in `cav(concept.mean((-2, -1)), ...)`, to get
    [C], and use it with `axis=1`. `cav(randoms[1:], randoms[0])` gives the vectors that significance is tested against.

    Cost: K * R fits, in one call of `fit`.

    Source: Kim et al., "Interpretability Beyond Feature Attribution: Quantitative Testing with Concept Activation Vectors"
    (2018).

    Examples:
        >>> concept, randoms = torch.randn(30, 4) + torch.tensor([5.0, 0, 0, 0]), torch.randn(3, 30, 4)
        >>> vectors = cav(concept, list(randoms), fit=torch.vmap(pattern_cav, in_dims=(0, None)))
        >>> vectors.direction.shape, (vectors.direction[:, 0] > 0.9).all()
        (torch.Size([3, 4]), tensor(True))
        >>> vectors.accuracy
        tensor([1., 1., 1.])
    """
    positives, several_concepts = _sets("concepts", concepts)
    negatives, several_randoms = _sets("randoms", randoms)
    first = positives[0]
    for name, each in [("concepts", positives), ("randoms", negatives)]:
        for one in each:
            if one.shape[1:] != first.shape[1:] or one.dtype != first.dtype:
                raise InputError(f"{name} has {describe(one)}, another set {describe(first)}; their features are the same.")
    require_positive("held_out", held_out, least=2, optional=True)
    require_positive("chunk_size", chunk_size, optional=True)
    chosen = fit or default_fit()

    pairs = [(p.flatten(1), n.flatten(1)) for p in positives for n in negatives]
    together = chunk_size if len({(len(p), len(n)) for p, n in pairs}) == 1 else 1
    parts = [_vectors(pairs[part], chosen, held_out) for part in chunks(len(pairs), together)]
    direction, accuracy = (torch.cat(each) for each in zip(*parts))
    lead = [len(positives)] * several_concepts + [len(negatives)] * several_randoms
    return ConceptVectors(  # type: ignore[call-arg]
        direction=direction.reshape(*lead, *first.shape[1:]), accuracy=accuracy.reshape(lead), batch_size=[]
    )


def pattern_cav(x: Tensor, t: Tensor) -> Tensor:
    """Pattern-based concept vectors: how the activations change with the concept, whatever else they vary with.

        a = cov(x, t) / var(t)

    Args:
        x: activations [N, *features].
        t: how much of the concept each example has: [N], or [*T, N] for several concepts; booleans, integers or floats. For
            classes: `torch.nn.functional.one_hot(labels).T`, each class against the others.

    Returns:
        Tensor [*T, *features], in units of activation per unit of t. For a binary t it is the difference of the two means. A
        probe's weight also turns against noise that helps to separate the classes; a pattern does not.

    Raises:
        InputError: shapes that do not fit, NaN, a t that does not vary.

    Cost: one matrix product.

    Source: Haufe et al., "On the interpretation of weight vectors of linear models in multivariate neuroimaging" (2014); Pahde
    et al., "Navigating Neural Space: Revisiting Concept Activation Vectors to Overcome Directional Divergence" (2022).

    Examples:
        >>> pattern_cav(torch.tensor([[1.0, 0], [3, 0], [0, 5], [0, 5]]), torch.tensor([1, 1, 0, 0]))
        tensor([ 2., -5.])
    """
    require_examples("x", x)
    if not isinstance(t, Tensor) or t.ndim == 0 or t.is_complex() or t.shape[-1] != len(x):
        raise InputError(f"t is {describe(t)} for {len(x)} examples in x; give a tensor [N], or [*T, N] for several concepts.")
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, labels = x.flatten(1).to(dtype), t.to(dtype)
    labels = labels - labels.mean(-1, keepdim=True)
    spread = labels.square().sum(-1, keepdim=True)
    if visible(spread) and not (spread > 0).all():
        raise InputError("t does not vary (or holds NaN); each concept needs examples with more and with less of it.")
    patterns = labels @ (rows - rows.mean(0)) / spread
    return patterns.reshape(*t.shape[:-1], *x.shape[1:]).to(x.dtype)


def require_examples(name: str, x: Any, least: int = 2) -> None:
    """Raises `InputError` unless `x` is a finite floating-point tensor [N, *features] with at least `least` rows."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or not x.shape[1:].numel():
        raise InputError(f"{name} is {describe(x)}; give floating-point activations [N, *features].")
    if len(x) < least:
        raise InputError(f"{name} has {len(x)} examples; give at least {least}.")
    if visible(x) and not x.isfinite().all():
        raise InputError(f"{name} holds NaN or infinity.")


def _sets(name: str, given: Any) -> tuple[list[Tensor], bool]:
    """The sets of examples, and whether there was a sequence of them."""
    several = isinstance(given, (list, tuple))
    if several and not given:
        raise InputError(f"{name} is empty; give at least one set of activations.")
    sets = list(given) if several else [given]
    for each in sets:
        require_examples(name, each)
    return sets, several


def _vectors(pairs: Sequence[tuple[Tensor, Tensor]], fit: Fit, held_out: int | None) -> tuple[Tensor, Tensor]:
    """Unit directions [S, D] and their held-out accuracies [S], of S pairs of sets of equal sizes."""
    (concept, unseen), (random, unseen_random) = (_split(torch.stack(each), held_out) for each in zip(*pairs))
    x = torch.cat([concept, random], 1)
    y = (torch.arange(x.shape[1], device=x.device) < concept.shape[1]).long()
    direction = as_directions("what fit returned", fit(x, y))
    if direction.shape != (len(x), x.shape[2]):
        raise InputError(
            f"fit returned directions of shape {list(direction.shape)} for x {list(x.shape)}; return [S, D]. "
            "torch.vmap(fit, in_dims=(0, None)) makes that of a function of x [n, D]."
        )
    unit = torch.nn.functional.normalize(direction, dim=-1).to(x.dtype)
    if held_out is None:
        return unit, torch.full_like(unit[:, 0], torch.nan)
    projected = (torch.einsum("snd,sd->sn", part, unit) for part in (concept, random, unseen, unseen_random))
    positive, negative, unseen, unseen_random = projected
    threshold = (positive.mean(1, keepdim=True) + negative.mean(1, keepdim=True)) / 2
    right = [(part > threshold).to(x.dtype).mean(1) for part in (unseen, unseen_random)]
    return unit, (right[0] + 1 - right[1]) / 2


def _split(rows: Tensor, held_out: int | None) -> tuple[Tensor, Tensor]:
    """The examples [S, n, D] to fit, and those to hold out."""
    if held_out is None:
        return rows, rows[:, :0]
    numbers = range(rows.shape[1])
    return rows[:, [i for i in numbers if i % held_out]], rows[:, [i for i in numbers if i % held_out == 0]]


def default_fit() -> Fit:
    """The logistic probe of the house."""
    from ..probes.logistic import logistic  # only here: what has a fit of its own does not need the probes

    return logistic
