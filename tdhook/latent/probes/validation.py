"""Cross-validation of any fit, with all folds in one vmapped call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from ...core.batching import chunks
from ...core.checks import require_positive
from ...core.errors import InputError
from ...core.estimate import Estimate, Moments
from ...core.randomness import require_generator
from ...core.structure import describe, tensors
from .folds import fold_numbers, require_trainable
from .probe import decision, predict, predict_probability, sites_of
from .problem import classification, regression
from .scoring import Score, score_function

Fit = Callable[..., Any]
ASK = {"predict": predict, "decision": decision, "probability": predict_probability}


class CrossValidation(NamedTuple):
    """Scores on examples that the probes were not fitted to.

    Attributes:
        scores: Tensor [F, *S, *T], of every fold.
        mean: `Estimate` of Tensor [*S, *T]: the mean over folds. Its standard error takes folds as independent, which they are
            not quite: their training examples overlap.
        predictions: Tensor [*S, *T, N]: for each example that of the probe of its fold.
        folds: Tensor [N], the fold of every example.
    """

    scores: Tensor
    mean: Estimate
    predictions: Tensor
    folds: Tensor


def cross_validate(
    fit: Fit,
    x: Any,
    y: Tensor,
    *,
    folds: int | Tensor = 5,
    stratified: bool | None = None,
    groups: Tensor | None = None,
    score: str | Score | Callable[..., Tensor] | None = None,
    multi_label: bool = False,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    """How well a fit predicts examples that it has not seen.

        scores_f = score(y_i, prediction of fit(examples outside of fold f) for x_i;  i in fold f)

    Examples of a fold get weight 0 in its fit, which takes everything from the others: also the mean and the scale of a
    standardisation. So the folds are one vmapped fit.

    Args:
        fit: a fit such as `logistic`, with its options bound: `functools.partial(logistic, strength=0.1)`. Any function of
            (x, y, sample_weight=) that returns probes will do. Where vmap cannot go, the folds run one after the other.
        x: as `fit` takes it, N examples.
        y: labels or values, Tensor [*T, N].
        folds: how many; or the fold of every example, integer Tensor [N].
        stratified: whether every fold has its share of each class; None: for labels, without groups.
        groups: integer Tensor [N]: examples of one group (a document, a subject) are in one fold.
        score: `"accuracy"`, `"balanced_accuracy"`, `"auroc"` (of decisions), `"log_loss"` or `"r2"`, a `Score`, or a
            function of (predicted [*S, *T, N], y [*T, N], sample_weight=) to [*S, *T]. None: accuracy of labels, r2 of values.
            Labels come to it as numbers 0 to K - 1.
        multi_label: whether y is [*T, N, K], as `mlp(multi_label=True)` takes it; scores are then [F, *S, *T, K].
        generator: for the folds. A generator bound in `fit` is set back for every fold: all start from the same numbers.
        chunk_size: how many folds are fitted at once; None for all. Bind it in `fit` to bound sites times tasks.

    Returns:
        `CrossValidation`; for a mapping of sites, or of pairs, a dict of them.

    Raises:
        InputError: NaN, fewer examples or groups than folds, a fold that leaves a class without examples, an unknown score.

    Cost: F fits, and F predictions of all examples. It is not for torch.compile, as it looks for the classes.

    Source: Stone, "Cross-Validatory Choice and Assessment of Statistical Predictions" (1974).

    Examples:
        >>> x = {"early": torch.randn(60, 4), "late": torch.randn(60, 4)}
        >>> y = (x["late"][:, 0] > 0).long()
        >>> found = cross_validate(tdhook.latent.probes.mean_difference, x, y, folds=3)
        >>> found["late"].scores.shape, found["late"].mean.value > found["early"].mean.value
        (torch.Size([3]), tensor(True))
    """
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)
    work, codes = prepared(fit, x, y, folds, stratified, groups, score, multi_label, generator, chunk_size)
    own = work.fold == work.numbers[:, None]
    found = {}
    for site, (predicted, scores) in work(codes).items():
        at_own = own.reshape(len(own), *(1,) * (predicted.ndim - 2 - multi_label), -1, *(1,) * multi_label)
        predicted = torch.where(at_own, predicted, 0).sum(0)
        if work.labels is not None:
            labels = work.labels.reshape(*y.shape[:-1], 1, -1).expand(*predicted.shape, -1)
            predicted = labels.gather(-1, predicted[..., None])[..., 0]
        found[site] = CrossValidation(scores, mean_over_folds(scores), predicted, work.fold)
    return found.get(None, found)


@dataclass(frozen=True)
class Folds:
    """A fit to the examples outside of every fold, and its score on those inside: a function of labelings of the examples.

    Attributes:
        fit: with its options bound.
        x: its examples.
        fold: Tensor [N], the fold of every example.
        score: the score.
        labels: Tensor [T, K], what the numbers 0 to K - 1 in y stand for; None where y holds values, or is on or off.
        multi_label: whether y is [*T, N, K].
        chunk_size: how many folds are fitted at once.
        start: the state of a generator that is bound in the fit: every fold and labeling starts from it.
    """

    fit: Fit
    x: Any
    fold: Tensor
    score: Score
    labels: Tensor | None = None
    multi_label: bool = False
    chunk_size: int | None = None
    start: Tensor | None = None

    @property
    def numbers(self) -> Tensor:
        """The numbers of the folds, Tensor [F]."""
        return torch.arange(int(self.fold.max()) + 1, device=self.fold.device)

    def __call__(self, y: Tensor) -> dict[Any, tuple[Tensor, Tensor]]:
        """By site (None for a single probe): predictions [F, *S, *T, N], and scores [F, *S, *T]."""
        tested = self.fold == self.numbers[:, None]
        kinds = {"predict", self.score.of}

        def one(weights: Tensor) -> dict[str, dict[Any, Tensor]]:
            probe = self.fit(self.x, y, sample_weight=weights, **self._classes())
            return {kind: _by_site(ASK[kind](probe, self.x)) for kind in kinds}

        answers = self._each_fold(one, (~tested).to(torch.get_default_dtype()))
        if self.labels is not None and any(each.is_floating_point() for each in answers["predict"].values()):
            raise InputError("fit predicts floating-point values, but y holds integer labels; give y.float() to a regression.")
        return {
            site: (predicted, self._scores(answers[self.score.of][site], y, tested))
            for site, predicted in answers["predict"].items()
        }

    def _classes(self) -> dict[str, int]:
        """The number of classes, for a fit that takes it: under vmap it cannot look for them."""
        if self.labels is None or "classes" not in inspect.signature(self.fit).parameters:
            return {}
        return {"classes": self.labels.shape[-1]}

    def _each_fold(self, one: Callable[[Tensor], Any], weights: Tensor) -> dict[str, dict[Any, Tensor]]:
        def again(run: Callable[[], Any]) -> Any:
            if self.start is not None:
                self.fit.keywords["generator"].set_state(self.start)  # type: ignore[attr-defined]
            return run()

        vmaps = getattr(self.fit, "vmaps", True)
        found: list[Any] = []
        for part in chunks(len(weights), self.chunk_size if vmaps else 1):
            answer = None
            if vmaps:
                try:
                    answer = again(lambda part=part: vmap(one, randomness="same")(weights[part]))  # type: ignore[misc]
                except torch.cuda.OutOfMemoryError:
                    raise
                except (RuntimeError, InputError):
                    vmaps = False  # an error of the fit itself comes again, from the loop
            if answer is not None:
                found.append(answer)
                continue
            for own in weights[part]:
                found.append(again(lambda own=own: pytree.tree_map(lambda t: t[None], one(own))))  # type: ignore[misc]
        return {
            kind: {site: torch.cat([each[kind][site] for each in found]) for site in sites} for kind, sites in found[0].items()
        }

    def _scores(self, answers: Tensor, y: Tensor, tested: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if self.multi_label:  # each label is a task
            y, answers = y.mT, answers.movedim(-3, -2) if self.score.of == "probability" else answers.mT
        if self.score.of == "decision":
            options["per_class"] = self.labels is not None and self.labels.shape[-1] > 2
        elif self.score.of == "probability":
            options["per_class"] = True
        dtype = answers.dtype if answers.is_floating_point() else torch.get_default_dtype()
        every = zip(answers, tested.to(dtype))
        return torch.stack([self.score.function(answer, y, sample_weight=weights, **options) for answer, weights in every])


def prepared(
    fit: Fit,
    x: Any,
    y: Tensor,
    folds: int | Tensor,
    stratified: bool | None,
    groups: Tensor | None,
    score: Any,
    multi_label: bool,
    generator: torch.Generator | None,
    chunk_size: int | None,
) -> tuple[Folds, Tensor]:
    """The folds, and y as the fit gets it: labels are numbered 0 to K - 1. Everything is checked."""
    if not callable(fit):
        raise InputError(f"fit is {describe(fit)}; give a function of (x, y, sample_weight=), such as logistic.")
    if not isinstance(y, Tensor) or y.ndim < 1 + multi_label:
        raise InputError(f"y is {describe(y)}; give a tensor {'[*T, N, K]' if multi_label else '[*T, N]'}.")
    chosen = score_function(score, y.long() if multi_label else y)
    rows, labels, codes = (y.mT if multi_label else y), None, y
    bound = fit.keywords if isinstance(fit, functools.partial) else {}
    for part in _parts(x):
        if multi_label or y.is_floating_point():
            regression(part, rows.to(torch.float32) if multi_label else y)
        else:
            problem = classification(part, y, None, bound.get("classes"))
            labels, codes = problem.classes, problem.y.reshape(y.shape)
    fold = fold_numbers(rows, folds, stratified=stratified, groups=groups, generator=generator)
    if labels is not None:
        require_trainable(codes.reshape(-1, len(fold)), labels, fold, chosen.every_class)
    drawn = bound.get("generator")
    start = drawn.get_state() if isinstance(drawn, torch.Generator) else None
    return Folds(fit, x, fold, chosen, labels, multi_label, chunk_size, start), codes


def mean_over_folds(scores: Tensor) -> Estimate:
    """The mean over the first dimension."""
    moments = Moments.of(scores)
    return Estimate(moments.mean, moments.standard_error)


def _by_site(answers: Any) -> dict[Any, Tensor]:
    if isinstance(answers, (Mapping, TensorDictBase)):
        return {site: answers[site] for site in sites_of(answers)}
    return {None: answers}


def _parts(x: Any) -> list[Any]:
    """What a fit looks at, as tensors [N, D] or [S, N, D]: also those of pairs."""
    found = [value for _, value in tensors(x)]
    if not found:
        raise InputError(f"x is {describe(x)}; give a tensor [N, D] or [S, N, D], a mapping of them, or pairs.")
    return found
