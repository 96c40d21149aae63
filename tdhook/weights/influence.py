"""The influence of training examples, traced over checkpoints: TracIn and self-influence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.func import grad

from ..core.batching import chunks, vmap_or_loop
from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.structure import describe
from .examples import Loss, count_examples, indices, loss_of_example, pair, require_loss
from .moving import Moving, moving
from .selection import Select, require_params, require_same_structure
from .sketch import count_sketch, wide

Gradient = Callable[[Tensor], list[Tensor]]


def tracin(
    f: Any,
    checkpoints: Any,
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    loss: Loss,
    *,
    learning_rates: float | Sequence[float] | Tensor = 1.0,
    select: Select = None,
    projection: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """How much training on each example lowered the loss of each test example.

        influence[m, n] = sum_c eta_c  grad loss(z_m; params_c) . grad loss(z_n; params_c)

    A positive number is a helpful training example (a proponent), a negative one a harmful one (an opponent).

    With `projection=k`, every gradient is hashed into k numbers as soon as it is there: coordinate i is added, with a random
    sign, to a random one of k buckets (a count sketch). The inner products stay unbiased, with a variance of at most
    `2 |g|^2 |h|^2 / k`, and the cost of a projection does not depend on k.

    Args:
        f: function of `(params, inputs)`.
        checkpoints: a sequence of parameters, or parameters stacked to a TensorDict [C].
        train: pair of inputs and labels, tensors [N, *shape]; labels None for `loss(output)`.
        test: pair of inputs and labels, tensors [M, *shape].
        loss: as in `per_example_gradients`.
        learning_rates: eta, a number or one for each checkpoint: of the steps that a checkpoint stands for.
        select: names or patterns (`select_parameters`); None for all. The last layer alone is TracIn-Last.
        projection: k, or None for exact inner products.
        generator: of the hash; None for the global one. Compiled code takes none.
        chunk_size: how many examples, of either set, run at once; None for all.

    Returns:
        Tensor [M, N].

    Raises:
        InputError: no checkpoint, learning rates of another number, data that is no pair. ParamsError: checkpoints of different
            structure. Otherwise as `per_example_gradients`.

    Cost: for each checkpoint M forward and backward passes, and N for each chunk of test examples (N in all, with a
    projection). Memory: gradients of two chunks; with a projection of one chunk, and (M + N) k numbers.

    Source: Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent" (2020), TracInCP; for the
    projection Charikar, Chen, Farach-Colton, "Finding Frequent Items in Data Streams" (2002).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 1, bias=False))
        >>> x = torch.eye(3)
        >>> tracin(f, [params], (x, None), (x[:1], None), lambda out: out.sum())
        tensor([[1., 0., 0.]])
    """
    listed, rates = _checked("tracin", f, checkpoints, loss, learning_rates, chunk_size)
    (inputs, labels), (test_inputs, test_labels) = pair("train", train), pair("test", test)
    count = count_examples("train", inputs, labels)
    tests = count_examples("test", test_inputs, test_labels)
    hashed = count_sketch(moving(f, listed[0], select).values, projection, generator)
    total: Any = 0
    for params, rate in zip(listed, rates):
        moved = moving(f, params, select)
        gradient = gradient_of_example(f, moved, inputs, labels, loss)
        test_gradient = gradient_of_example(f, moved, test_inputs, test_labels, loss)
        if hashed is None:
            rows = []
            for part in chunks(tests, chunk_size):
                vectors = vmap_or_loop(test_gradient, indices(tests, test_inputs, part), chunk_size)
                rows.append(products(vectors, gradient, indices(count, inputs), chunk_size))
            scores = torch.cat(rows)
        else:
            right = vmap_or_loop(lambda i, g=gradient: hashed(g(i)), indices(count, inputs), chunk_size)
            left = vmap_or_loop(lambda i, g=test_gradient: hashed(g(i)), indices(tests, test_inputs), chunk_size)
            scores = left @ right.mT
        total = total + rate * scores
    return total


def self_influence(
    f: Any,
    checkpoints: Any,
    train: tuple[Any, Any],
    loss: Loss,
    *,
    learning_rates: float | Sequence[float] | Tensor = 1.0,
    select: Select = None,
    chunk_size: int | None = None,
) -> Tensor:
    """How much training on each example lowered its own loss: large for rare and for mislabelled examples.

        influence[n] = sum_c eta_c |grad loss(z_n; params_c)|^2

    Args:
        f: as in `tracin`.
        checkpoints: as in `tracin`.
        train: as in `tracin`.
        loss: as in `tracin`.
        learning_rates: as in `tracin`.
        select: as in `tracin`.
        chunk_size: as in `tracin`.

    Returns:
        Tensor [N], the diagonal of `tracin` of a set with itself.

    Raises:
        InputError: as `tracin`.

    Cost: N forward and backward passes for each checkpoint. Memory: the gradients of one chunk.

    Source: Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent" (2020).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(2, 1, bias=False))
        >>> self_influence(f, [params], (torch.tensor([[3.0, 4.0]]), None), lambda out: out.sum())
        tensor([25.])
    """
    listed, rates = _checked("self_influence", f, checkpoints, loss, learning_rates, chunk_size)
    inputs, labels = pair("train", train)
    count = count_examples("train", inputs, labels)
    total: Any = 0
    for params, rate in zip(listed, rates):
        gradient = gradient_of_example(f, moving(f, params, select), inputs, labels, loss)

        def square(index: Tensor, gradient: Gradient = gradient) -> Tensor:
            return torch.stack([g.square().sum() for g in gradient(index)]).sum()

        total = total + rate * vmap_or_loop(square, indices(count, inputs), chunk_size)
    return total


def gradient_of_example(f: Any, moved: Moving, inputs: Any, labels: Any, loss: Loss) -> Gradient:
    """From the index of an example to the gradient of its loss."""
    gradient = grad(loss_of_example(f, moved, inputs, labels, loss))
    return lambda index: gradient(moved.values, index)


def products(vectors: Sequence[Tensor], gradient: Gradient, examples: Tensor, chunk_size: int | None) -> Tensor:
    """Inner products [m, N] of m vectors with the gradients of all examples, which are not kept."""
    flat = [vector.flatten(1).to(wide(vector)) for vector in vectors]

    def against(index: Tensor) -> Tensor:
        parts = [left @ g.flatten().to(left.dtype) for left, g in zip(flat, gradient(index))]
        return torch.stack(parts).sum(0)

    return vmap_or_loop(against, examples, chunk_size).mT


def _checked(
    method: str, f: Any, checkpoints: Any, loss: Any, learning_rates: Any, chunk_size: int | None
) -> tuple[list[Any], list[Any]]:
    """The checkpoints as a list, and one learning rate for each."""
    require_gradients(method)
    require_loss(loss)
    require_positive("chunk_size", chunk_size, optional=True)
    if isinstance(checkpoints, TensorDictBase):
        if len(checkpoints.batch_size) != 1:
            raise InputError(
                f"checkpoints is a TensorDict of batch size {list(checkpoints.batch_size)}; stack them with "
                "torch.stack([params, ...]), or put one into a list."
            )
        listed = list(checkpoints.unbind(0))
    elif isinstance(checkpoints, Mapping) or not isinstance(checkpoints, Sequence):
        raise InputError(f"checkpoints is {describe(checkpoints)}; give a list of params, or a stack of them.")
    else:
        listed = list(checkpoints)
    if not listed:
        raise InputError("checkpoints is empty; give the params of at least one.")
    for i, params in enumerate(listed):
        require_params(f"checkpoints[{i}]", params)
        require_same_structure("checkpoints[0]", listed[0], f"checkpoints[{i}]", params)
    if isinstance(learning_rates, (int, float)) or (isinstance(learning_rates, Tensor) and learning_rates.ndim == 0):
        rates: list[Any] = [learning_rates] * len(listed)
    elif isinstance(learning_rates, (Sequence, Tensor)) and not isinstance(learning_rates, str):
        rates = list(learning_rates)
    else:
        raise InputError(f"learning_rates is {describe(learning_rates)}; give a number, or one for each checkpoint.")
    if len(rates) != len(listed):
        raise InputError(
            f"learning_rates has {len(rates)} numbers for {len(listed)} checkpoints; give one each, or one number."
        )
    warn_if_stochastic(f, method)
    return listed, rates
