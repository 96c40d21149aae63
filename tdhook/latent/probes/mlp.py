"""Probes with hidden layers, fitted by gradients for all sites and tasks at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict, tensorclass
from torch import Tensor

from ...core.checks import require_number, require_positive
from ...core.compat import is_compiling, is_wrapped
from ...core.errors import InputError
from ...core.randomness import integers, require_generator
from ...core.structure import describe
from .perceptron import ACTIVATIONS, Training, forward
from .problem import Problem, classification, regression


@tensorclass
class MLPProbe:
    """A perceptron with hidden layers, in the units of the activations, with batch size [*batch]: [*T] or [S, *T].

    Attributes:
        layers: TensorDict of `weight0` [*batch, H, D], `bias0` [*batch, H], `weight1` and so on.
        activation: the name of the function between layers.
        loss: Tensor [*batch], the mean loss of the training examples, without the penalty.
        epochs: Tensor [*batch], after how many epochs the parameters were taken.
        classes: Tensor [*batch, K], the labels; [*batch, 1, 2] for several labels for each example; None for regression.
    """

    layers: TensorDict
    activation: str
    loss: Tensor
    epochs: Tensor
    classes: Tensor | None = None

    def decision(self, x: Tensor) -> Tensor:
        """The scores of `x`; see `tdhook.latent.probes.decision`."""
        first = self.layers["weight0"]
        lead = first.shape[:-2]
        if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[-1] != first.shape[-1] or x.shape[:-2] != lead[: x.ndim - 2]:
            raise InputError(
                f"x is {describe(x)}, but the probe is of width {first.shape[-1]} and has the batch size {list(lead)}."
            )
        x = x.to(first.dtype).reshape(*x.shape[:-2], *(1 for _ in lead[x.ndim - 2 :]), *x.shape[-2:])
        scores = forward(self.layers, len(self.layers.keys()) // 2, ACTIVATIONS[_name(self.activation)], x)
        scores = scores.expand(*lead, *scores.shape[-2:])
        single = self.classes is None or (self.classes.ndim == len(lead) + 1 and self.classes.shape[-1] == 2)
        return scores[..., 0] if single else scores


def mlp(
    x: Any,
    y: Tensor,
    *,
    hidden: Sequence[int] = (64,),
    activation: str = "relu",
    multi_label: bool = False,
    weight_decay: float = 1e-3,
    learning_rate: float = 1e-2,
    epochs: int = 200,
    batch_size: int | None = None,
    validation: float = 0.0,
    patience: int = 10,
    standardize: bool = True,
    sample_weight: Tensor | None = None,
    classes: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    """A multilayer perceptron, fitted by Adam to every site and task.

        minimise  sum_i w_i loss(y_i, s(x_i)) / sum_i w_i + weight_decay / 2 * sum_l |W_l|^2
        s(x) = W_L a(... a(W_0 z + b_0) ...) + b_L,     z: x with mean 0 and variance 1 over the training examples

    The loss is the cross-entropy for labels, and half the squared error for floating-point y. All sites and tasks start from
    the same random numbers: each is fitted as if it were alone.

    Args:
        x: Tensor [N, D] or [S, N, D], or a mapping or TensorDict of tensors [N, D_site].
        y: labels, integer Tensor [*T, N]; or values, floating-point [*T, N]; or with `multi_label` zeros and ones [*T, N, K].
        hidden: the widths of the hidden layers; none for a linear probe.
        activation: `"relu"`, `"gelu"`, `"silu"` or `"tanh"`.
        multi_label: whether each example has K labels that are on or off.
        weight_decay: of the weights, on the standardised scale, in the objective.
        learning_rate: of Adam.
        epochs: passes over the examples.
        batch_size: examples in each step, drawn anew in every epoch; None for all.
        validation: the share of examples that is held out to stop early, when their loss has not become smaller for `patience`
            epochs; the best parameters are kept. 0: train all epochs on all examples.
        patience: in epochs.
        standardize: False leaves x, and the values y of a regression, in their own units.
        sample_weight: Tensor [N]; what an example of weight 0 holds has no effect. None for ones.
        classes: the labels, Tensor [K] or their number; None: those in y.
        generator: for the first parameters, the batches and the examples that are held out.
        chunk_size: how many sites times tasks are trained at once; None for all.

    Returns:
        `MLPProbe` with batch size [*T], or [S, *T] for stacked sites; a mapping or TensorDict of probes for one of sites. Its
        decisions are [*batch, N], or [*batch, N, K] for K > 2 classes or several labels, whose probabilities of off and on are
        [*batch, N, K, 2].

    Raises:
        InputError: examples that do not match, NaN, less than two classes, labels that are not 0 or 1 with `multi_label`, a bad
            option.

    Cost: `epochs` times N / batch_size passes through the perceptrons, vmapped over sites and tasks. It runs also under
        `torch.no_grad` and `torch.inference_mode`; under vmap with `randomness="same"`. It is not for torch.compile, which
        would unroll the epochs.

    Source: Conneau et al., "What You Can Cram into a Single Vector" (2018); Adam: Kingma and Ba (2015).

    Examples:
        >>> x = torch.randn(100, 2)
        >>> y = (x[:, 0] * x[:, 1] > 0).long()
        >>> probe = mlp(x, y, hidden=[16], generator=torch.Generator().manual_seed(0))
        >>> (tdhook.latent.probes.predict(probe, x) == y).float().mean() > 0.9
        tensor(True)
    """
    _require_options(hidden, activation, weight_decay, learning_rate, epochs, batch_size, validation, patience)
    require_generator(generator)
    labels: tuple[Tensor, ...] = ()
    if multi_label:
        problem, labels, outputs = _several_labels(x, y, sample_weight)
    elif isinstance(y, Tensor) and y.is_floating_point():
        problem, outputs = regression(x, y, sample_weight, least=2), 1
    else:
        problem = classification(x, y, sample_weight, classes)
        assert problem.classes is not None
        outputs = 1 if problem.classes.shape[-1] == 2 else problem.classes.shape[-1]
    seed = int(integers(0, 2**62, (), generator, torch.device("cpu")))
    training = Training(
        problem.weights,
        tuple(hidden),
        ACTIVATIONS[activation],
        outputs,
        problem.classes is not None or multi_label,
        weight_decay,
        learning_rate,
        epochs,
        batch_size,
        validation,
        patience,
        standardize,
        seed,
    )

    def build(classes: Tensor | None, batch_size: Any, loss: Tensor, epochs: Tensor, **layers: Tensor) -> MLPProbe:
        if multi_label:
            classes = torch.arange(2, device=loss.device).expand(*batch_size, 1, 2)
        return MLPProbe(TensorDict(layers, batch_size=batch_size), activation, loss, epochs, classes, batch_size=batch_size)  # type: ignore[call-arg]

    return problem.solve(training, *labels, chunk_size=chunk_size, build=build)


def _name(activation: Any) -> str:
    """The name in a probe; a stack of probes has a list of lists of it."""
    while not isinstance(activation, str):
        activation = activation[0]
    return activation


def _several_labels(x: Any, y: Any, sample_weight: Tensor | None) -> tuple[Problem, tuple[Tensor, ...], int]:
    """The problem of labels [*T, N, K] that are on or off: its y is the first of them; all [T, K, N]; and K."""
    if not isinstance(y, Tensor) or y.ndim < 2:
        raise InputError(f"y is {describe(y)}; with multi_label it is a tensor [*T, N, K] of zeros and ones.")
    problem = regression(x, y.mT.to(torch.float32), sample_weight, least=2)
    count = y.shape[-1]
    labels = problem.y.reshape(-1, count, y.shape[-2])
    if not is_compiling() and not is_wrapped(y) and not ((labels == 0) | (labels == 1)).all():
        raise InputError("y holds values other than 0 and 1; with multi_label each of the K labels is on or off.")
    return replace(problem, y=labels[:, 0], tasks=tuple(y.shape[:-2])), (labels,), count


def _require_options(
    hidden: Any,
    activation: Any,
    weight_decay: Any,
    learning_rate: Any,
    epochs: Any,
    batch_size: Any,
    validation: Any,
    patience: Any,
) -> None:
    if not isinstance(hidden, Sequence) or isinstance(hidden, str):
        raise InputError(f"hidden is {describe(hidden)}; give the widths of the hidden layers, [64] say.")
    for width in hidden:
        require_positive("an element of hidden", width)
    if activation not in ACTIVATIONS:
        raise InputError(f"activation is {describe(activation)}; choose {', '.join(map(repr, ACTIVATIONS))}.")
    require_number("weight_decay", weight_decay)
    require_number("learning_rate", learning_rate, strict=True)
    require_positive("epochs", epochs)
    require_positive("batch_size", batch_size, optional=True)
    require_positive("patience", patience)
    if not isinstance(validation, (int, float)) or not 0 <= validation < 1:
        raise InputError(f"validation is {describe(validation)}; it is a share of the examples, at least 0 and below 1.")
