"""Scores of weights: how much each one matters, as data for `prune`.

A score function returns a TensorDict with the paths, shapes and dtypes of the weights that it scores, so scores are added,
multiplied and averaged as TensorDicts are. A relevance or any other map from params to such a TensorDict is a score too.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.func import grad

from ..core.batching import chunks, vmap_or_loop
from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from .examples import Loss, count_examples, indices, loss_of_example, measured, require_loss
from .moving import Moving
from .selection import MATRICES, Key, Select, flat, nest, require_params, require_same_structure, select_parameters


def magnitude(params: TensorDictBase, *, select: Select = None) -> TensorDict:
    """The size of each weight.

        s_i = |theta_i|

    Args:
        params: nested TensorDict.
        select: names or patterns of parameters, or of modules for all their parameters, biases among them; None: all
            floating-point tensors of two dimensions or more. `params` does not tell buffers from parameters: name the weights
            of a model that has tables of two dimensions among its buffers.

    Returns:
        TensorDict of the scores of the selected weights.

    Raises:
        ParamsError: no such parameter.

    Cost: no pass.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015).

    Examples:
        >>> _, params = tdhook.functionalize(torch.nn.Linear(3, 2))
        >>> torch.equal(magnitude(params)["weight"], params["weight"].abs())
        True
    """
    require_params("params", params)
    return nest({k: t.abs() for k, t in _scored(params, select).items()}, params.batch_size)


def gradient_x_weight(
    f: Any, params: TensorDictBase, inputs: Any, loss: Loss, *, labels: Any = None, select: Select = None
) -> TensorDict:
    """Gradient times weight: minus the change of the loss, to first order, when a weight is removed.

        s_i = theta_i dL/dtheta_i

    Args:
        f: pure function of (params, inputs).
        params: its parameters.
        inputs: a batch, as `f` takes it.
        loss: function of the output and the labels to one number; of the output alone if `labels` is None.
        labels: tensors in any structure.
        select: as for `magnitude`.

    Returns:
        TensorDict of signed scores; their sum over a unit is the score of the unit, whose absolute value ranks it (`taylor`
        takes the absolute value of each weight's).

    Raises:
        ParamsError: no such parameter. InputError: a loss that is no function. TargetError: one that does not return one
            number. GradientError: grad mode is off. Warns for a model in train mode.

    Cost: one forward and one backward pass.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference" (2017).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 1, bias=False))
        >>> scores = gradient_x_weight(f, params, torch.ones(2, 3), torch.sum)
        >>> torch.allclose(scores["weight"], 2 * params["weight"])
        True
    """
    require_params("params", params, single=True)
    require_loss(loss)
    moved = Moving(params, _scored(params, select))
    require_gradients("gradient_x_weight")
    warn_if_stochastic(f, "gradient_x_weight")

    def loss_of_batch(values: list[Tensor]) -> Tensor:
        return measured(loss, f(moved.put(values), inputs), labels)

    gradients = grad(loss_of_batch)(moved.values)
    return moved.restructure([value * gradient for value, gradient in zip(moved.values, gradients)])


def taylor(
    f: Any,
    params: TensorDictBase,
    inputs: Any,
    loss: Loss,
    *,
    labels: Any = None,
    squared: bool = False,
    select: Select = None,
) -> TensorDict:
    """How much the loss changes, to first order, when a weight is removed.

        s_i = |theta_i dL/dtheta_i|,  or its square

    Args:
        f: pure function of (params, inputs).
        params: its parameters.
        inputs: a batch, as `f` takes it.
        loss: function of the output and the labels to one number; of the output alone if `labels` is None.
        labels: tensors in any structure.
        squared: the squares, whose sum over a unit is another score of the unit.
        select: as for `magnitude`.

    Returns:
        TensorDict of the scores of the selected weights.

    A weight into a unit that is off, or saturated, for the whole batch has the gradient 0 and goes first, though the unit may
    turn on without it: give a batch that uses the whole model, or compare with `magnitude`.

    Raises:
        ParamsError: no such parameter. InputError: a loss that is no function. TargetError: one that does not return one
            number. GradientError: grad mode is off. Warns for a model in train mode.

    Cost: one forward and one backward pass.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019), whose (g w)^2 is `squared`; Lee et al.,
    "SNIP" (2019), whose |g w| is the other, at initialisation.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 1, bias=False))
        >>> scores = taylor(f, params, torch.ones(2, 3), torch.sum)
        >>> torch.allclose(scores["weight"], 2 * params["weight"].abs())
        True
    """
    products = gradient_x_weight(f, params, inputs, loss, labels=labels, select=select)
    return nest({key: product.square() if squared else product.abs() for key, product in flat(products).items()})


def fisher(
    f: Any,
    params: TensorDictBase,
    inputs: Any,
    loss: Loss,
    *,
    labels: Any = None,
    select: Select = None,
    chunk_size: int | None = None,
) -> TensorDict:
    """The diagonal of the empirical Fisher information: the mean square of per-example gradients.

        F_i = 1/B sum_b (dL_b/dtheta_i)^2

    Args:
        f: pure function of (params, inputs).
        params: its parameters.
        inputs: tensors [B, ...] in any structure that `f` takes.
        loss: function of the output and the labels of one example, each with a first dimension of 1, to one number; of the
            output alone if `labels` is None. The negative log-likelihood, for what is called Fisher information.
        labels: tensors [B, ...] in any structure.
        select: as for `magnitude`.
        chunk_size: how many examples at once; their gradients are summed up and not kept. None for all.

    Returns:
        TensorDict of F for the selected weights; `optimal_brain_damage(params, F)` makes it the score of a removal.

    Raises:
        ParamsError: no such parameter. InputError: tensors of different first dimensions. TargetError: a loss that does not
            return one number. GradientError: grad mode is off. Warns for a model in train mode.

    Cost: B forward and B backward passes, vmapped; memory for `chunk_size` gradients.

    Source: Amari, "Natural Gradient Works Efficiently in Learning" (1998); for pruning Theis et al., "Faster gaze prediction
    with dense networks and Fisher pruning" (2018).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(2, 1, bias=False))
        >>> fisher(f, params, torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.sum)["weight"]
        tensor([[5., 2.]])
    """
    require_params("params", params, single=True)
    require_loss(loss)
    require_positive("chunk_size", chunk_size, optional=True)
    moved = Moving(params, _scored(params, select))
    count = count_examples("inputs", inputs, labels)
    require_gradients("fisher")
    warn_if_stochastic(f, "fisher")
    gradient = grad(loss_of_example(f, moved, inputs, labels, loss))
    totals = [torch.zeros_like(value) for value in moved.values]
    for part in chunks(count, chunk_size):
        each = vmap_or_loop(lambda index: gradient(moved.values, index), indices(count, inputs, part))
        totals = [total + gradients.square().sum(0) for total, gradients in zip(totals, each)]
    return moved.restructure([total / count for total in totals])


def optimal_brain_damage(params: TensorDictBase, curvature: TensorDictBase) -> TensorDict:
    """How much the loss grows, to second order, when a weight is removed at a minimum.

        s_i = 1/2 h_i theta_i^2

    Args:
        params: nested TensorDict.
        curvature: h, the diagonal of a Hessian or of the Fisher information, for some of the weights.

    Returns:
        TensorDict of scores, with the paths of `curvature`.

    Raises:
        ParamsError: a curvature that does not fit the parameters.

    Cost: no pass.

    Source: LeCun, Denker, Solla, "Optimal Brain Damage" (1990).

    Examples:
        >>> params = tdhook.functionalize(torch.nn.Linear(3, 2))[1]
        >>> scores = optimal_brain_damage(params, torch.ones_like(params))
        >>> torch.allclose(scores["weight"], params["weight"] ** 2 / 2)
        True
    """
    require_params("params", params)
    require_params("curvature", curvature)
    tensors, diagonal = flat(params), flat(curvature)
    shared = {key: tensor for key, tensor in tensors.items() if key in diagonal}
    require_same_structure("curvature", curvature, "params", nest(shared))
    return nest({key: h * tensors[key].square() / 2 for key, h in diagonal.items()}, params.batch_size)


def _scored(params: TensorDictBase, select: Select) -> dict[Key, Tensor]:
    return select_parameters(params, select, least_dims=MATRICES if select is None else 0)
