"""Fitted probes: what a linear probe is, and what every probe can be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, tensorclass
from torch import Tensor

from ...core.errors import InputError
from ...core.structure import describe


@tensorclass
class LinearProbe:
    """An affine function of activations, in their own units, with batch size [*batch]: [*T], or [S, *T] for stacked sites.

    Attributes:
        weight: Tensor [*batch, C, D]; one row for two classes (the score of the second one) and for regression.
        bias: Tensor [*batch, C].
        classes: Tensor [*batch, K], the labels in the order of the rows, K = 2 for one row; None for regression.
        penalty: Tensor [*batch], of `ridge`: the penalty used or chosen.
        loo_errors: Tensor [*batch, L], of `ridge` with L candidates: the mean squared leave-one-out error of each.
        iterations: Tensor [*batch], of `logistic`.
        converged: Tensor [*batch], of `logistic`: whether the gradient is within the tolerance.
        selected: Tensor [*batch, k], of `sparse`: the coordinates that are used, best first.
    """

    weight: Tensor
    bias: Tensor
    classes: Tensor | None = None
    penalty: Tensor | None = None
    loo_errors: Tensor | None = None
    iterations: Tensor | None = None
    converged: Tensor | None = None
    selected: Tensor | None = None

    def decision(self, x: Tensor) -> Tensor:
        """The scores of `x`; see `tdhook.latent.probes.decision`."""
        batch, (rows, width) = self.weight.shape[:-2], self.weight.shape[-2:]
        lead = _leading(x, batch, width)
        weight = self.weight.reshape(*batch[:lead], -1, width)
        scores = torch.matmul(weight, x.to(weight.dtype).mT)
        scores = scores.reshape(*batch, rows, x.shape[-2]) + self.bias[..., None]
        return scores[..., 0, :] if rows == 1 else scores.mT

    @property
    def direction(self) -> Tensor:
        """The rows of `weight` with unit norm (zero where the row is zero): Tensor [*batch, D], or [*batch, C, D] for C > 2."""
        norm = self.weight.norm(dim=-1, keepdim=True)
        unit = self.weight / torch.where(norm > 0, norm, 1)
        return unit[..., 0, :] if unit.shape[-2] == 1 else unit


def decision(probe: Any, x: Any) -> Any:
    """The scores that a probe gives to examples.

        scores = weight x + bias        (of a linear probe)

    Args:
        probe: a probe, or a mapping of probes by site as a fit of several sites returns it. Any object with a method
            `decision(x)` is one; `predict` needs its `classes` too.
        x: Tensor [N, D], [S, N, D] for probes of stacked sites, or a mapping of tensors with the sites of the probes.

    Returns:
        Tensor [*batch, N] for two classes (positive: the second one) and regression, else [*batch, N, C]. A mapping of these
        for a mapping.

    Raises:
        InputError: sites or shapes other than those of the fit.

    Cost: one matrix product for each site.

    Examples:
        >>> x, y = torch.tensor([[0.0], [1.0], [3.0], [4.0]]), torch.tensor([0, 0, 1, 1])
        >>> probe = tdhook.latent.probes.mean_difference(x, y)
        >>> tdhook.latent.probes.decision(probe, x)
        tensor([-2., -1.,  1.,  2.])
    """
    return _each(probe, x, lambda one, values: one.decision(values))


def predict(probe: Any, x: Any) -> Any:
    """The label of every example, or its value for regression.

    Args:
        probe: as of `decision`.
        x: as of `decision`.

    Returns:
        Tensor [*batch, N] of labels as they were given to the fit, or of values; a mapping of these for a mapping.

    Raises:
        InputError: as `decision`.

    Cost: as `decision`.

    Examples:
        >>> x, y = torch.tensor([[0.0], [1.0], [3.0], [4.0]]), torch.tensor([7, 7, 5, 5])
        >>> probe = tdhook.latent.probes.mean_difference(x, y)
        >>> tdhook.latent.probes.predict(probe, x)
        tensor([7, 7, 5, 5])
    """
    return _each(probe, x, _predict)


def predict_probability(probe: Any, x: Any) -> Any:
    """The probability of every class: the logistic function or the softmax of the scores.

    Those of `logistic`, `sparse` and `lda` are what the fit models; those of `mean_difference` are not calibrated.

    Args:
        probe: as of `decision`.
        x: as of `decision`.

    Returns:
        Tensor [*batch, N, K] for K classes in the order of `probe.classes`; a mapping of these for a mapping.

    Raises:
        InputError: as `decision`, and for a regression.

    Cost: as `decision`.

    Examples:
        >>> x, y = torch.tensor([[0.0], [1.0], [3.0], [4.0]]), torch.tensor([0, 0, 1, 1])
        >>> probe = tdhook.latent.probes.mean_difference(x, y)
        >>> tdhook.latent.probes.predict_probability(probe, torch.tensor([[2.0]]))
        tensor([[0.5000, 0.5000]])
    """
    return _each(probe, x, _probability)


def _predict(probe: Any, x: Any) -> Tensor:
    scores = probe.decision(x)
    if probe.classes is None:
        return scores
    chosen = (scores > 0).long() if probe.classes.shape[-1] == 2 else scores.argmax(-1)
    classes = probe.classes
    return classes.expand(*chosen.shape[:-1], classes.shape[-1]).gather(-1, chosen)


def _probability(probe: Any, x: Any) -> Tensor:
    if probe.classes is None:
        raise InputError("the probe is a regression, which has no probabilities; fit a classifier.")
    scores = probe.decision(x)
    if probe.classes.shape[-1] == 2:
        return torch.stack([torch.sigmoid(-scores), torch.sigmoid(scores)], -1)
    return scores.softmax(-1)


def _each(probe: Any, x: Any, ask: Callable[[Any, Any], Tensor]) -> Any:
    """The answer of the probe, or of the probe of every site."""
    if not isinstance(probe, (Mapping, TensorDictBase)):
        if not hasattr(probe, "decision"):
            raise InputError(f"probe is {describe(probe)}; give what a fit returned.")
        return ask(probe, x)
    if not isinstance(x, (Mapping, TensorDictBase)):
        raise InputError(f"probe is a mapping of sites, so x has to be one too, got {describe(x)}.")
    keys = sites_of(probe)
    known = set(sites_of(x))
    missing = [key for key in keys if key not in known]
    if missing:
        raise InputError(f"x has no values for the site {missing[0]!r} of the probe; it has {describe(x)}.")
    answers = {key: ask(probe[key], x[key]) for key in keys}
    return collected(answers, probe, probe.batch_size if isinstance(probe, TensorDictBase) else ())


def sites_of(values: Any) -> list[Any]:
    """The keys of a mapping or a TensorDict (tuples for nested ones), in its own order."""
    if not isinstance(values, TensorDictBase):
        return list(values.keys())
    keys: list[Any] = []
    for key, value in values.items():
        if isinstance(value, TensorDictBase):
            keys += [(key, *(inner if isinstance(inner, tuple) else (inner,))) for inner in sites_of(value)]
        else:
            keys.append(key)
    return keys


def collected(results: Mapping[Any, Any], like: Any, batch_size: Any) -> Any:
    """Results by site: a TensorDict for a TensorDict, else a dict."""
    if not isinstance(like, TensorDictBase):
        return dict(results)
    collection = TensorDict({}, batch_size=batch_size)
    for key, result in results.items():
        collection.set(key, result)
    return collection


def _leading(x: Any, batch: Any, width: int) -> int:
    """How many dimensions of `batch` the examples [*lead, N, D] have themselves."""
    if not isinstance(x, Tensor) or x.ndim < 2:
        raise InputError(f"x has to be a tensor [N, {width}], got {describe(x)}.")
    lead = x.ndim - 2
    if x.shape[-1] != width or x.shape[:-2] != batch[:lead]:
        raise InputError(f"x is {describe(x)}, but the probe is of width {width} and has the batch size {list(batch)}.")
    return lead
