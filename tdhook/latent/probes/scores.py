"""How good predictions are: scores over the examples, the last axis, for any number of probes at once.

Every score takes weights of the examples. An example of weight 0 counts as absent, whatever is predicted for it, so that the
scores of all folds of a cross-validation are one batched call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.checks import require_positive
from ...core.compat import is_compiling, is_wrapped
from ...core.errors import InputError
from ...core.structure import describe


def accuracy(predicted: Tensor, y: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
    """The share of examples whose label is predicted.

        accuracy = sum_i w_i [predicted_i = y_i] / sum_i w_i

    Args:
        predicted: labels, Tensor [*P, N].
        y: true labels, Tensor [*T, N], which broadcasts to `predicted`.
        sample_weight: Tensor [N], or of a shape that broadcasts; None for ones.

    Returns:
        Tensor [*B], the leading dimensions broadcast; NaN where all weights are 0.

    Raises:
        InputError: shapes that do not fit.

    Examples:
        >>> accuracy(torch.tensor([[0, 1, 1], [0, 0, 0]]), torch.tensor([0, 1, 0]))
        tensor([0.6667, 0.6667])
    """
    require_aligned("predicted", predicted, y, sample_weight)
    return _mean(predicted == y, sample_weight)


def balanced_accuracy(
    predicted: Tensor, y: Tensor, *, classes: int | None = None, sample_weight: Tensor | None = None
) -> Tensor:
    """The mean over classes of the share of its examples that are predicted: 1 / C at chance, however rare a class is.

        balanced_accuracy = mean over classes c of  sum_i w_i [y_i = c] [predicted_i = c] / sum_i w_i [y_i = c]

    Args:
        predicted: labels, Tensor [*P, N].
        y: true labels 0 .. C - 1, integer Tensor [*T, N], which broadcasts to `predicted`.
        classes: their number C; None for the largest label plus one, which vmap and compiled code cannot look at.
        sample_weight: Tensor [N], or of a shape that broadcasts; None for ones.

    Returns:
        Tensor [*B]. Classes without examples are left out of the mean.

    Raises:
        InputError: shapes that do not fit, labels that are no integers, unknown `classes` under vmap.

    Examples:
        >>> balanced_accuracy(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
        tensor(0.5000)
    """
    require_aligned("predicted", predicted, y, sample_weight)
    mine = _one_hot(y, _class_count(y, classes))
    weight = weights_of(y, sample_weight)[..., None, :]
    of_class = torch.where(mine, weight, 0).sum(-1)
    found = torch.where(mine & (predicted == y)[..., None, :], weight, 0).sum(-1)
    return _mean_of_defined(found / of_class, of_class > 0)


def auroc(scores: Tensor, y: Tensor, *, per_class: bool | None = None, sample_weight: Tensor | None = None) -> Tensor:
    """The area under the ROC curve: how likely a positive example has a larger score than a negative one.

        auroc = sum_{i: y_i = 1} sum_{j: y_j = 0} w_i w_j ([s_i > s_j] + [s_i = s_j] / 2) / sum_{i, j} w_i w_j

    For several classes it is the mean over classes of the area of one class against the rest.

    Args:
        scores: decisions or probabilities, Tensor [*P, N] for labels 0 and 1, or [*P, N, C] of one score for each class.
        y: true labels, integer Tensor [*T, N].
        per_class: whether the last axis of `scores` are classes; None where the shapes tell.
        sample_weight: Tensor [N], or of a shape that broadcasts; None for ones.

    Returns:
        Tensor [*B]; NaN where one of two classes has no example. Of several classes those without examples are left out.

    Raises:
        InputError: shapes that do not fit or do not tell where the classes are, labels beyond the classes.

    Cost: two sorts, O(N log N).

    Source: Hanley and McNeil, "The Meaning and Use of the Area under a Receiver Operating Characteristic Curve" (1982).

    Examples:
        >>> auroc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
        tensor(0.8750)
    """
    if not has_classes(scores, y, per_class):
        require_aligned("scores", scores, y, sample_weight)
        require_labels(y, 2)
        return _area(scores, y == 1, weights_of(scores, sample_weight))[0]
    count = scores.shape[-1]
    require_aligned("scores", scores[..., 0], y, sample_weight)
    require_labels(y, count)
    scores = scores.movedim(-1, -2)
    area, defined = _area(scores, _one_hot(y, count), weights_of(scores, sample_weight)[..., None, :])
    return _mean_of_defined(area, defined)


def r2(predicted: Tensor, y: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
    """The coefficient of determination: 1 for perfect predictions, 0 for those of the mean, below that for worse ones.

        r2 = 1 - sum_i w_i (y_i - predicted_i)^2 / sum_i w_i (y_i - mean_w y)^2

    Args:
        predicted: Tensor [*P, N].
        y: true values, Tensor [*T, N], which broadcasts to `predicted`.
        sample_weight: Tensor [N], or of a shape that broadcasts; None for ones.

    Returns:
        Tensor [*B]; NaN where y is constant.

    Raises:
        InputError: shapes that do not fit.

    Examples:
        >>> r2(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor(0.5000)
    """
    require_aligned("predicted", predicted, y, sample_weight)
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    error = _mean((predicted - y).square(), sample_weight)
    mean = _mean(y, sample_weight)[..., None]
    spread = _mean((y - mean).square(), sample_weight)
    constant = spread <= (8 * torch.finfo(y.dtype).eps * mean[..., 0]).square()
    return torch.where(constant, torch.nan, 1 - error / spread)


def log_loss(probability: Tensor, y: Tensor, *, per_class: bool | None = None, sample_weight: Tensor | None = None) -> Tensor:
    """The mean negative logarithm of the probability given to the true label, in nats.

        log_loss = -sum_i w_i log p_i(y_i) / sum_i w_i

    Args:
        probability: Tensor [*P, N] of label 1, or [*P, N, C] of every label.
        y: true labels, integer Tensor [*T, N].
        per_class: whether the last axis of `probability` are classes; None where the shapes tell.
        sample_weight: Tensor [N], or of a shape that broadcasts; None for ones.

    Returns:
        Tensor [*B]. Probabilities below the dtype's rounding count as that: the loss is finite.

    Raises:
        InputError: shapes that do not fit or do not tell where the classes are, labels beyond the classes.

    Examples:
        >>> log_loss(torch.tensor([0.5, 0.5]), torch.tensor([0, 1]))
        tensor(0.6931)
    """
    given = of_each_class("probability", probability, y, per_class, sample_weight)
    true = _at_label(given, y)
    return -_mean(true.clamp(min=torch.finfo(true.dtype).eps).log(), sample_weight)


def _area(scores: Tensor, positive: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The area under the ROC curve, and where there is one."""
    scores, positive, weight = torch.broadcast_tensors(scores, positive, weight)
    mine, others = torch.where(positive, weight, 0), torch.where(positive, 0, weight)
    both = mine.sum(-1) * others.sum(-1)

    def below(flipped: bool) -> Tensor:
        s, m, o = (v.flip(-1) if flipped else v for v in (scores, mine, others))
        places = s.sort(dim=-1, stable=True).indices
        m, o = m.gather(-1, places), o.gather(-1, places)
        return (m * o.cumsum(-1)).sum(-1)

    # Among equal scores the first order counts the negatives that stand before a positive, the second those after it.
    area = (below(False) + below(True)) / 2 / both
    undefined = (both == 0) | (scores.isnan() & (weight > 0)).any(-1)
    return torch.where(undefined, torch.nan, area), both > 0


def _mean(values: Tensor, sample_weight: Tensor | None) -> Tensor:
    weight = weights_of(values, sample_weight)
    # What is absent may be anything, also NaN.
    return torch.where(weight > 0, weight * values, 0).sum(-1) / weight.sum(-1)


def _mean_of_defined(values: Tensor, defined: Tensor) -> Tensor:
    """The mean over the last axis of what is defined."""
    return torch.where(defined, values, 0).sum(-1) / defined.sum(-1)


def weights_of(like: Tensor, sample_weight: Tensor | None) -> Tensor:
    """Weights that broadcast to [*, N], in floating point."""
    if sample_weight is None:
        dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.get_default_dtype()
        return torch.ones(like.shape[-1], dtype=dtype, device=like.device)
    return sample_weight.to(torch.promote_types(sample_weight.dtype, torch.float32))


def _one_hot(y: Tensor, count: int) -> Tensor:
    """Where the label is each class: bool Tensor [*T, C, N]."""
    return y[..., None, :] == torch.arange(count, device=y.device)[:, None]


def _at_label(values: Tensor, y: Tensor) -> Tensor:
    """values [*P, N, C] at the label of each example: [*B, N]."""
    shape = torch.broadcast_shapes(values.shape[:-1], y.shape)
    return values.expand(*shape, values.shape[-1]).gather(-1, y.long().expand(shape)[..., None])[..., 0]


def of_each_class(name: str, values: Tensor, y: Tensor, per_class: bool | None, sample_weight: Tensor | None) -> Tensor:
    """Probabilities [*P, N, C] of every class, in at least float32."""
    values = values.to(torch.promote_types(values.dtype, torch.float32)) if isinstance(values, Tensor) else values
    if not has_classes(values, y, per_class):
        require_aligned(name, values, y, sample_weight)
        values = torch.stack([1 - values, values], -1)
    else:
        require_aligned(name, values[..., 0], y, sample_weight)
    require_labels(y, values.shape[-1])
    return values


def has_classes(values: Tensor, y: Tensor, per_class: bool | None) -> bool:
    """Whether values are [*P, N, C], not [*P, N]."""
    for name, value in (("scores", values), ("y", y)):
        if not isinstance(value, Tensor) or value.ndim < 1:
            raise InputError(f"{name} is {describe(value)}; give a tensor of a number for each example.")
    if per_class is not None:
        return per_class
    count = y.shape[-1]
    last, second = values.shape[-1] == count, values.ndim > 1 and values.shape[-2] == count
    if last and second:
        raise InputError(
            f"the last two axes of {describe(values)} have the length of y, {count}; say per_class=True if the last one are "
            "classes, or per_class=False."
        )
    return second


def _class_count(y: Tensor, classes: int | None) -> int:
    require_positive("classes", classes, optional=True)
    if classes is None and (is_compiling() or is_wrapped(y)):
        raise InputError("classes=None needs the values of y, which vmap and compiled code hide; say how many there are.")
    require_labels(y, classes)
    return int(y.max()) + 1 if classes is None else classes


def require_labels(y: Tensor, classes: int | None) -> None:
    if y.is_floating_point() or y.is_complex():
        raise InputError(f"y is {describe(y)}; it holds integer labels, y.long() say.")
    if is_compiling() or is_wrapped(y) or y.dtype is torch.bool:
        return
    wrong = y[(y < 0) | (y >= classes)] if classes is not None else y[y < 0]
    if len(wrong):
        allowed = "from 0 up" if classes is None else f"from 0 to {classes - 1}"
        raise InputError(f"y holds the label {int(wrong[0])}; labels are {allowed}.")


def require_aligned(name: str, values: Tensor, y: Tensor, sample_weight: Tensor | None) -> None:
    for what, value in ((name, values), ("y", y)):
        if not isinstance(value, Tensor) or value.ndim < 1:
            raise InputError(f"{what} is {describe(value)}; give a tensor of a number for each example.")
    shapes = [values.shape, y.shape]
    if sample_weight is not None:
        if not isinstance(sample_weight, Tensor) or sample_weight.ndim < 1:
            raise InputError(
                f"sample_weight is {describe(sample_weight)}; give a tensor of a weight for each example, or None."
            )
        shapes.append(sample_weight.shape)
    try:
        fits = {shape[-1] for shape in shapes} == {y.shape[-1]} and y.shape[-1] > 0
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        fits = False
    if not fits:
        weights = f" and sample_weight {list(sample_weight.shape)}" if sample_weight is not None else ""
        raise InputError(
            f"{name} has shape {list(values.shape)}, y {list(y.shape)}{weights}; they have the same examples, at least one, in "
            "the last axis, and leading dimensions that broadcast."
        )
