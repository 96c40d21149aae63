"""Estimators of scikit-learn as probes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.compat import is_compiling, is_wrapped
from ...core.errors import InputError
from ...core.structure import describe
from .probe import sites_of
from .problem import Problem, classification, regression


@dataclass(frozen=True)
class EstimatorProbe:
    """Fitted estimators, one for each site and task.

    Attributes:
        estimators: in the order of `batch_size`, the last dimension fastest.
        batch_size: [*T], or [S, *T] for stacked sites.
        classes: Tensor [*batch, K], the labels; the estimators know them as 0 to K - 1. None for regression.
    """

    estimators: Sequence[Any]
    batch_size: tuple[int, ...]
    classes: Tensor | None = None

    def decision(self, x: Tensor) -> Tensor:
        """The scores of `x`: log odds or log probabilities where the estimators have probabilities, else their decisions."""
        stacked = isinstance(x, Tensor) and x.ndim == 3
        if not isinstance(x, Tensor) or x.ndim not in (2, 3) or (stacked and x.shape[:1] != self.batch_size[:1]):
            raise InputError(f"x is {describe(x)}, but the probe has the batch size {list(self.batch_size)}.")
        tasks = len(self.estimators) // len(x) if stacked else len(self.estimators)
        values = [_array(site) for site in (x if stacked else x[None])]
        scores = [self._scores(estimator, values[i // tasks]) for i, estimator in enumerate(self.estimators)]
        dtype = torch.promote_types(x.dtype, torch.float32)
        found = torch.stack([torch.as_tensor(score, dtype=dtype) for score in scores]).to(x.device)
        return found.reshape(*self.batch_size, *found.shape[1:])

    def _scores(self, estimator: Any, x: Any) -> Any:
        if self.classes is None:
            return estimator.predict(x)
        if hasattr(estimator, "predict_proba"):
            logs = torch.as_tensor(estimator.predict_proba(x)).log()
            return logs[:, 1] - logs[:, 0] if logs.shape[1] == 2 else logs
        if hasattr(estimator, "decision_function"):
            return estimator.decision_function(x)
        # Nothing but labels: all other classes are out of the question.
        count = self.classes.shape[-1]
        certain = torch.nn.functional.one_hot(torch.as_tensor(estimator.predict(x)).long(), count).double().log()
        return certain[:, 1] - certain[:, 0] if count == 2 else certain


@dataclass(frozen=True)
class EstimatorFit:
    """A fit that clones an estimator for each site and task; see `scikit`."""

    estimator: Any
    classifies: bool
    vmaps: ClassVar[bool] = False

    def __call__(self, x: Any, y: Tensor, *, sample_weight: Tensor | None = None, classes: int | Tensor | None = None) -> Any:
        if is_compiling() or any(isinstance(given, Tensor) and is_wrapped(given) for given in (x, y, sample_weight)):
            raise InputError("an estimator of scikit-learn does not run under vmap or compilation; call its fit in a loop.")
        problem = classification(x, y, sample_weight, classes) if self.classifies else regression(x, y, sample_weight)
        sites: dict[int, Tensor] = {}
        for places, values in problem.groups:
            sites |= dict(zip(places, values))
        found = {i: [self._fitted(problem, site, labels) for labels in problem.y] for i, site in sorted(sites.items())}
        labels = None if problem.classes is None else problem.classes.reshape(*problem.tasks, -1)
        if problem.stacked:
            batch = (len(found), *problem.tasks)
            expanded = None if labels is None else labels.expand(*batch, -1)
            return EstimatorProbe([e for each in found.values() for e in each], batch, expanded)
        probes = {i: EstimatorProbe(each, problem.tasks, labels) for i, each in found.items()}
        if isinstance(x, Tensor):
            return probes[0]
        return {site: probes[i] for i, site in enumerate(sites_of(x))}

    def _fitted(self, problem: Problem, x: Tensor, y: Tensor) -> Any:
        from sklearn.base import clone

        present = problem.weights > 0
        weights, options = problem.weights[present], {}
        if not (weights == 1).all():
            if "sample_weight" not in inspect.signature(self.estimator.fit).parameters:
                name = type(self.estimator).__name__
                raise InputError(f"sample_weight has other numbers than 0 and 1, and the fit of {name} takes no weights.")
            options["sample_weight"] = _array(weights)
        return clone(self.estimator).fit(_array(x[present]), _array(y[present]), **options)


def scikit(estimator: Any) -> EstimatorFit:
    """A fit of probes by an estimator of scikit-learn, with the interface of all fits. Needs the extra `sklearn`.

    The estimator is cloned for each site and task, and fitted to the examples whose weight is not 0, in a loop. Everything that
    is asked of a probe follows from its scores: log probabilities where there are any, so that `predict_probability` gives
    the estimator's own.

    Args:
        estimator: a classifier or regressor, or a pipeline that ends in one; it is left as it is.

    Returns:
        A function fit(x, y, *, sample_weight=None, classes=None) -> `EstimatorProbe` with batch size [*T] or [S, *T]; for a
        mapping of sites a dict of them.

    Raises:
        InputError: what is no estimator; when fitting, what `logistic` or `ridge` raise, weights other than 0 and 1 where the
            estimator takes none, and vmap or compilation. ImportError: scikit-learn is not installed.

    Cost: S T fits of the estimator, one after the other on the CPU.

    Examples:
        >>> from sklearn.neighbors import KNeighborsClassifier
        >>> x = torch.tensor([[0.0], [1.0], [5.0], [6.0]])
        >>> probe = scikit(KNeighborsClassifier(1))(x, torch.tensor([3, 3, 8, 8]))
        >>> tdhook.latent.probes.predict(probe, torch.tensor([[0.4], [5.7]]))
        tensor([3, 8])
    """
    try:
        from sklearn.base import is_classifier
    except ImportError as error:
        raise ImportError("scikit needs scikit-learn; install it with: pip install 'tdhook[sklearn]'") from error
    if isinstance(estimator, type) or not hasattr(estimator, "fit") or not hasattr(estimator, "predict"):
        raise InputError(f"estimator is {describe(estimator)}; give an instance with fit and predict, SVC() say.")
    return EstimatorFit(estimator, is_classifier(estimator))


def _array(values: Tensor) -> Any:
    if values.is_floating_point():
        values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.detach().cpu().numpy()
