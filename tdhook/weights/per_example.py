"""Per-example gradients of any module, by vmapped functional calls."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch.func import grad

from ..core.batching import vmap_or_loop
from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from .examples import Loss, count_examples, indices, loss_of_example, require_loss
from .moving import moving
from .selection import Select


def per_example_gradients(
    f: Any,
    params: Any,
    inputs: Any,
    loss: Loss,
    *,
    labels: Any = None,
    select: Select = None,
    chunk_size: int | None = None,
) -> TensorDict:
    """The gradient of the loss of every single example with respect to the parameters.

        g_b = d loss(f(params, x_b), y_b) / d params

    The model sees batches of one, so a loss that is a mean and one that is a sum over examples give the same.

    Args:
        f: function of `(params, inputs)`.
        params: its parameters.
        inputs: tensors [B, *shape], in any structure that `f` takes.
        loss: function of the output and the labels of one example, each with a first dimension of 1, to one number;
            of the output alone if `labels` is None.
        labels: tensors [B, *shape], in any structure.
        select: names or patterns (`select_parameters`); None for all parameters (no buffers).
        chunk_size: how many examples run at once; None for all. The result itself is as large as B copies of the parameters.

    Returns:
        TensorDict [B] with the nesting of the selected parameters: tensors [B, *shape].

    Raises:
        ParamsError: unknown parameters. InputError: tensors of different first dimensions.
        TargetError: a loss that is not one number. GradientError: grad mode is off. Warns for a model in train mode.

    Cost: B forward and B backward passes, vmapped. A model that vmap cannot take runs in a loop, with a warning.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2))
        >>> x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
        >>> gradients = per_example_gradients(f, params, x, torch.nn.functional.cross_entropy, labels=y)
        >>> gradients["weight"].shape
        torch.Size([5, 2, 3])
    """
    require_gradients("per_example_gradients")
    require_loss(loss)
    require_positive("chunk_size", chunk_size, optional=True)
    moved = moving(f, params, select)
    count = count_examples("inputs", inputs, labels)
    warn_if_stochastic(f, "per_example_gradients")
    gradient = grad(loss_of_example(f, moved, inputs, labels, loss))
    each = vmap_or_loop(lambda index: gradient(moved.values, index), indices(count, inputs), chunk_size)
    return moved.restructure(each, [count])
