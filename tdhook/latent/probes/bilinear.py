"""Bilinear probes of pairs of layers: what can be read from two activations together, with a rank of your choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase, tensorclass
from torch import Tensor

from ...core.checks import require_number, require_positive
from ...core.errors import InputError
from ...core.randomness import integers, require_generator
from ...core.structure import describe
from .forms import Training, bilinear_scores
from .problem import classification, regression


@tensorclass
class BilinearProbe:
    """A bilinear function of two activations, in their own units, with batch size [*batch]: [*T] or [S, *T].

    Attributes:
        left: Tensor [*batch, C, R, D1]; one C for two classes and regression.
        right: Tensor [*batch, C, R, D2]; of a full matrix, where R = D1, `left` is that matrix transposed and `right` None.
        bias: Tensor [*batch, C].
        first_mean, second_mean: Tensor [*batch, D1] and [*batch, D2], which are taken from the activations.
        loss: Tensor [*batch], the mean loss of the examples, without the penalty.
        gradient: Tensor [*batch], the largest component of the gradient of the objective at the end; 0 for the closed form.
        classes: Tensor [*batch, K], the labels; None for regression.
    """

    left: Tensor
    right: Tensor | None
    bias: Tensor
    first_mean: Tensor
    second_mean: Tensor
    loss: Tensor
    gradient: Tensor
    classes: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The matrices W: Tensor [*batch, C, D1, D2]."""
        return self.left.mT if self.right is None else self.left.mT @ self.right

    def decision(self, x: tuple[Tensor, Tensor]) -> Tensor:
        """The scores of pairs `x` of tensors [N, D1] and [N, D2] (or [S, N, D1] and [S, N, D2] for probes of S pairs)."""
        first, second = _pair(x)
        batch = self.bias.shape[:-1]
        widths = self.first_mean.shape[-1], self.second_mean.shape[-1]
        if (first.shape[-1], second.shape[-1]) != widths or first.shape[:-2] != batch[: first.ndim - 2]:
            raise InputError(
                f"x is {describe(first)} and {describe(second)}, but the probe is of widths {widths[0]} and {widths[1]} and "
                f"has the batch size {list(batch)}."
            )

        def centred(values: Tensor, mean: Tensor) -> Tensor:
            lead = values.shape[:-2]
            values = values.to(mean.dtype).reshape(*lead, *(1 for _ in batch[len(lead) :]), *values.shape[-2:])
            return values - mean[..., None, :]

        first, second = centred(first, self.first_mean), centred(second, self.second_mean)
        scores = bilinear_scores(first[..., None, :, :], second[..., None, :, :], self.left, self.right) + self.bias[..., None]
        return scores[..., 0, :] if scores.shape[-2] == 1 else scores.mT


def bilinear(
    x: Any,
    y: Tensor,
    *,
    rank: int | None = None,
    strength: float = 1.0,
    standardize: bool = True,
    sample_weight: Tensor | None = None,
    classes: int | Tensor | None = None,
    steps: int = 500,
    tolerance: float = 1e-6,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    """A bilinear function of two activations, such as those of two layers, fitted to every pair and task.

        s_c(x1, x2) = (x1 - m1)' W_c (x2 - m2) + b_c,    W_c = sum_r u_cr v_cr' for a rank
        minimise  sum_i w_i loss(y_i, s(x_i)) + strength / 2 * |W|^2,    or  strength / 2 * (|u|^2 + |v|^2)

    The loss is the cross-entropy for labels, and half the squared error for floating-point y: then a full W is a ridge
    regression on all products of coordinates, and solved in closed form. A full W of labels is a convex problem; a rank makes
    it one with local minima, which starts from random numbers that all pairs and tasks share.

    Args:
        x: a pair (x1, x2) of tensors [N, D1] and [N, D2], or [S, N, D1] and [S, N, D2] for S pairs; or a mapping of pairs.
        y: labels, integer Tensor [*T, N]; or values, floating-point [*T, N].
        rank: R, the rank of W_c, whatever the number of classes; None for a full matrix.
        strength: of the penalty, on the standardised scale; above 0.
        standardize: False leaves activations and values as they are, with m = 0.
        sample_weight: Tensor [N]; what an example of weight 0 holds has no effect. None for ones.
        classes: the labels, Tensor [K] or their number; None: those in y.
        steps: at most so many steps of L-BFGS.
        tolerance: of the gradient of the objective for each example, at which it ends.
        generator: for the start of a fit with a rank.
        chunk_size: how many pairs times tasks are fitted at once; None for all.

    Returns:
        `BilinearProbe` with batch size [*T], or [S, *T] for stacked pairs; a mapping of them for a mapping.

    Raises:
        InputError: what are no pairs of the same examples, NaN, less than two classes, a bad option.

    Cost: `steps` evaluations of the objective and some for its line search, vmapped over pairs and tasks; closed form: one
        system of min(N, D1 D2) unknowns for each pair. It runs also under `torch.no_grad` and `torch.inference_mode`; with a
        rank, under vmap with `randomness="same"`. It is not for torch.compile, which would unroll the steps.

    Source: Pirsiavash, Ramanan, Fowlkes, "Bilinear Classifiers for Visual Recognition" (2009); L-BFGS: Liu and Nocedal (1989).

    Examples:
        >>> a, b = torch.randn(200, 3), torch.randn(200, 4)
        >>> probe = bilinear((a, b), (a[:, 0] * b[:, 1] > 0).long(), rank=1)
        >>> probe.weight.shape, probe.weight[0].abs().argmax()
        (torch.Size([1, 3, 4]), tensor(1))
    """
    require_positive("rank", rank, optional=True)
    require_number("strength", strength, strict=True)
    require_positive("steps", steps)
    require_number("tolerance", tolerance)
    require_generator(generator)
    floating = isinstance(y, Tensor) and y.is_floating_point()
    seed = 0 if rank is None else int(integers(0, 2**62, (), generator, torch.device("cpu")))

    def fit(joined: Any, split: int) -> Any:
        problem = regression(joined, y, sample_weight, 2) if floating else classification(joined, y, sample_weight, classes)
        count = 1 if problem.classes is None or problem.classes.shape[-1] == 2 else problem.classes.shape[-1]
        training = Training(problem.weights, split, count, rank, floating, strength, standardize, steps, tolerance, seed)
        return problem.solve(training, chunk_size=chunk_size, build=_probe)

    if isinstance(x, (Mapping, TensorDictBase)):
        return _of_mapping(x, fit)
    first, second = _pair(x)
    return fit(torch.cat([first, second], -1), first.shape[-1])


def _probe(classes: Tensor | None, batch_size: Any, right: Tensor | None = None, **fields: Tensor) -> BilinearProbe:
    return BilinearProbe(right=right, classes=classes, batch_size=batch_size, **fields)  # type: ignore[call-arg]


def _pair(x: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(x, (tuple, list)) or len(x) != 2 or not all(isinstance(v, Tensor) and v.ndim in (2, 3) for v in x):
        raise InputError(f"x is {describe(x)}; give a pair of tensors [N, D1] and [N, D2], or [S, N, D1] and [S, N, D2].")
    first, second = x
    if first.shape[:-1] != second.shape[:-1]:
        raise InputError(f"the pair in x is {describe(first)} and {describe(second)}; all but the last dimension are the same.")
    return first, second


def _of_mapping(x: Any, fit: Callable[[Any, int], Any]) -> dict[Any, Any]:
    """The probe of every pair; those of equal widths are fitted at once."""
    by_widths: dict[tuple[int, int], dict[Any, Tensor]] = {}
    for name in x.keys():
        first, second = _pair(x[name])
        group = by_widths.setdefault((first.shape[-1], second.shape[-1]), {})
        group[name] = torch.cat([first, second], -1)
    found: dict[Any, Any] = {}
    for (width, _), joined in by_widths.items():
        found |= fit(joined, width)
    return {name: found[name] for name in x.keys()}
