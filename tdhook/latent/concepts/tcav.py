"""Testing with concept activation vectors: how sensitive the outputs are to concepts, and whether chance would do as much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tensordict import tensorclass
from torch import Tensor

from ...core.checks import require_gradients, require_positive, warn_if_stochastic
from ...core.compat import visible
from ...core.errors import InputError
from ...core.explained import explained_sites, target_gradients
from ...core.functional import FunctionalModel
from ...core.sites import Site
from ...core.structure import describe
from ...core.targets import Targets, check
from .directions import as_directions, checked_axis, rows_of


@tensorclass
class ConceptSensitivity:
    """How targets change along concept vectors. T is there for plural targets, K as in the vectors.

    Attributes:
        sensitivity: Tensor [T, *K, B], the directional derivative for each example.
        sign_count: Tensor [T, *K], the TCAV score: the fraction of the examples with a positive derivative.
        magnitude: Tensor [T, *K], the mean derivative over the examples.
    """

    sensitivity: Tensor
    sign_count: Tensor
    magnitude: Tensor


def tcav(
    f: FunctionalModel,
    params: Any,
    inputs: Any,
    site: str | Site,
    cavs: Any,
    *,
    targets: Targets = None,
    axis: int | None = None,
    classes: Tensor | None = None,
    chunk_size: int | None = None,
) -> ConceptSensitivity:
    """How targets change when the activations at a site move along concept vectors.

        S_k(x) = grad F(h(x)) . v_k          TCAV_k = |{x : S_k(x) > 0}| / |{x}|

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them: examples of the classes that are tested.
        site: an exact address, whose value is [B, *features].
        cavs: Tensor [*K, *features], `ConceptVectors`, or a fitted probe: any number of vectors, of any length.
        targets: which scalars F of the output; see `tdhook.targets`. None: the output is Tensor [B].
        axis: the axis of the value along which the vectors lie: 1 for vectors [*K, C] of pooled maps [B, C, H, W], -1 for
            vectors [*K, D] of tokens [B, L, D]. All positions then move together: the derivatives are summed over them.
        classes: integer Tensor [B], the class of each example: the scores of a target are then those of the examples of its
            class, as in the paper; `targets` is an int or a sequence of ints.
        chunk_size: how many targets are pulled back at once; None for all. It does not change the result.

    Returns:
        `ConceptSensitivity`: `sensitivity` [*K, B], `sign_count` [*K], `magnitude` [*K]; with a leading T for plural targets.

    Raises:
        InputError: vectors that do not fit the site, a class without examples, a bad option. TargetError, SiteError,
            GradientError (grad mode is off). Warns for a model in train mode.

    Cost: a forward pass, another from the site on, and T backward passes to the site, vmapped, whatever the number of vectors.

    Source: Kim et al., "Interpretability Beyond Feature Attribution: Quantitative Testing with Concept Activation Vectors"
    (2018).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(3, 2, bias=False)))
        >>> result = tcav(f, params, torch.randn(5, 3), "0", torch.eye(3), targets=[0, 1])
        >>> torch.allclose(result.magnitude, params["1", "weight"])
        True
        >>> torch.equal(result.sign_count, (params["1", "weight"] > 0).float())
        True
    """
    check(targets)
    require_positive("chunk_size", chunk_size, optional=True)
    vectors = as_directions("cavs", cavs)
    require_gradients("tcav")
    if not isinstance(site, (str, Site)):
        raise InputError(f"site is {describe(site)}; give one address.")
    _require_classes(classes, targets)
    warn_if_stochastic(f, "tcav")
    what = explained_sites(f, params, inputs, [site])
    value = what.values[0]
    rows, lead = rows_of("cavs", vectors, value, axis, str(site))
    batch = len(value)
    if classes is not None and len(classes) != batch:
        raise InputError(f"classes has {len(classes)} entries for {batch} examples; give one for each.")
    axis = checked_axis(axis, value, str(site))
    if axis == 0:
        raise InputError(f"axis=0 is that of the examples at {str(site)!r}; give the axis of the features.")
    shape = value.shape if axis is None else [batch, *(n if i == axis else 1 for i, n in enumerate(value.shape[1:], 1))]
    rows = rows.to(value)

    def along_vectors(shifts: Sequence[Tensor]) -> Any:
        return what.shifted([torch.einsum("kb,kd->bd", shifts[0], rows).reshape(shape)])

    # The gradient with respect to how far each example moves along each vector: the pullback itself forms the products.
    steps = replace(what, values=[value.new_zeros(len(rows), batch)], shifted=along_vectors)
    (sensitivity,), _, plural = target_gradients(steps, targets, chunk_size)
    counted = _counted(sensitivity, targets, classes)
    sums = ((part * counted).sum(-1) for part in ((sensitivity > 0).to(sensitivity.dtype), sensitivity))
    sign_count, magnitude = (each / counted.sum(-1) for each in sums)
    several = (len(sensitivity),) if plural else ()
    return ConceptSensitivity(  # type: ignore[call-arg]
        sensitivity=sensitivity.reshape((*several, *lead, batch)),
        sign_count=sign_count.reshape((*several, *lead)),
        magnitude=magnitude.reshape((*several, *lead)),
        batch_size=[],
    )


def _require_classes(classes: Any, targets: Targets) -> None:
    if classes is None:
        return
    if not isinstance(classes, Tensor) or classes.ndim != 1 or classes.dtype not in (torch.int64, torch.int32):
        raise InputError(f"classes is {describe(classes)}; give an integer tensor [B].")
    wanted = _class_targets(targets)
    if wanted is None or min(wanted) < 0:
        raise InputError(f"classes needs targets that are classes, counted from 0, got targets={targets!r}.")
    if visible(classes):
        missing = [c for c in wanted if not (classes == c).any()]
        if missing:
            raise InputError(f"classes has no example of class {missing[0]}, which targets asks for.")


def _class_targets(targets: Targets) -> list[int] | None:
    if isinstance(targets, int):
        return [targets]
    if targets is None or callable(targets) or not all(isinstance(t, int) for t in targets):
        return None
    return list(targets)  # type: ignore[arg-type]


def _counted(sensitivity: Tensor, targets: Targets, classes: Tensor | None) -> Tensor:
    """1 for the examples that count in the scores of each target, else 0: [T, 1, B]."""
    if classes is None:
        return torch.ones_like(sensitivity[:, :1])
    wanted = torch.tensor(_class_targets(targets), device=classes.device)
    return (classes == wanted[:, None])[:, None].to(sensitivity.dtype)
