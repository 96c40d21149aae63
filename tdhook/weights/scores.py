"""Scores of weights: how much each one matters, as data for `prune`.

A score function returns a TensorDict with the paths, shapes and dtypes of the weights that it scores, so scores are added,
multiplied and averaged as TensorDicts are. A relevance or any other map from params to such a TensorDict is a score too.
`loss` is a pure function `(params, batch) -> Tensor []`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import repeat
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

from ..core.batching import chunks, vmap_or_loop
from ..core.checks import require_gradients, require_positive
from ..core.errors import InputError, ParamsError
from ..core.functional import FunctionalModel
from ..core.reading import capture
from ..core.sites import join_path
from ..core.structure import describe
from ..core.transforms import require_sites
from .selection import (
    Key,
    Select,
    flat,
    nest,
    parameter_name,
    replaced,
    require_params,
    require_same_structure,
    select_parameters,
)

Loss = Callable[[Any, Any], Tensor]

MATRICES = 2  # biases and scales have one dimension: by default they are not scored
LINEAR = ("Linear", "NonDynamicallyQuantizableLinear", "LazyLinear")
CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "LazyConv1d", "LazyConv2d", "LazyConv3d")
INPUTS_FIRST = ("Conv1D",)  # the linear layer of GPT-2 in transformers, whose weight is [in, out]


def magnitude(params: TensorDictBase, *, select: Select = None) -> TensorDict:
    """The size of each weight.

        s_i = |theta_i|

    Args:
        params: nested TensorDict.
        select: names or patterns of parameters or modules; None: all floating-point tensors of two dimensions or more.

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
    return nest({k: t.abs() for k, t in select_parameters(params, select, least_dims=MATRICES).items()}, params.batch_size)


def gradient_x_weight(loss: Loss, params: TensorDictBase, batch: Any, *, select: Select = None) -> TensorDict:
    """Gradient times weight: minus the change of the loss, to first order, when a weight is removed.

        s_i = theta_i dL/dtheta_i

    Args:
        loss: pure function (params, batch) -> Tensor [].
        params: nested TensorDict.
        batch: what `loss` takes.
        select: as for `magnitude`.

    Returns:
        TensorDict of signed scores; their sum over a unit is the score of the unit, whose absolute value ranks it (`taylor`
        takes the absolute value of each weight's).

    Raises:
        ParamsError: no such parameter. InputError: a loss that is no scalar. GradientError: grad mode is off.

    Cost: one forward and one backward pass.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference" (2017).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 1, bias=False))
        >>> scores = gradient_x_weight(lambda p, x: f(p, x).sum(), params, torch.ones(2, 3))
        >>> torch.allclose(scores["weight"], 2 * params["weight"])
        True
    """
    require_params("params", params, single=True)
    chosen = select_parameters(params, select, least_dims=MATRICES)
    require_gradients("gradient_x_weight")
    gradients = _gradients(loss, params, chosen)(batch)
    return nest({key: tensor * gradient for (key, tensor), gradient in zip(chosen.items(), gradients)})


def taylor(loss: Loss, params: TensorDictBase, batch: Any, *, squared: bool = False, select: Select = None) -> TensorDict:
    """How much the loss changes, to first order, when a weight is removed.

        s_i = |theta_i dL/dtheta_i|,  or its square

    Args:
        loss: pure function (params, batch) -> Tensor [].
        params: nested TensorDict.
        batch: what `loss` takes.
        squared: the squares, whose sum over a unit is another score of the unit.
        select: as for `magnitude`.

    Returns:
        TensorDict of the scores of the selected weights.

    Raises:
        ParamsError: no such parameter. InputError: a loss that is no scalar. GradientError: grad mode is off.

    Cost: one forward and one backward pass.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019), whose (g w)^2 is `squared`; Lee et al.,
    "SNIP" (2019), whose |g w| is the other, at initialisation.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 1, bias=False))
        >>> scores = taylor(lambda p, x: f(p, x).sum(), params, torch.ones(2, 3))
        >>> torch.allclose(scores["weight"], 2 * params["weight"].abs())
        True
    """
    products = gradient_x_weight(loss, params, batch, select=select)
    return nest({key: product.square() if squared else product.abs() for key, product in flat(products).items()})


def fisher(
    loss: Loss, params: TensorDictBase, batch: Any, *, select: Select = None, chunk_size: int | None = None
) -> TensorDict:
    """The diagonal of the empirical Fisher information: the mean square of per-example gradients.

        F_i = 1/B sum_b (dL_b/dtheta_i)^2

    Args:
        loss: pure function (params, batch) -> Tensor []; it gets batches of one example.
        params: nested TensorDict.
        batch: tensors [B, ...] in any structure that `loss` takes.
        select: as for `magnitude`.
        chunk_size: how many examples at once; their gradients are summed up and not kept. None for all.

    Returns:
        TensorDict of F for the selected weights; `optimal_brain_damage(params, F)` makes it the score of a removal.

    Raises:
        ParamsError: no such parameter. InputError: a loss that is no scalar, a batch without examples. GradientError: grad mode
            is off.

    Cost: B forward and B backward passes, vmapped; memory for `chunk_size` gradients.

    Source: Amari, "Natural Gradient Works Efficiently in Learning" (1998); for pruning Theis et al., "Faster gaze prediction
    with dense networks and Fisher pruning" (2018).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(2, 1, bias=False))
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
        >>> fisher(lambda p, batch: f(p, batch).sum(), params, x)["weight"]
        tensor([[5., 2.]])
    """
    require_params("params", params, single=True)
    require_positive("chunk_size", chunk_size, optional=True)
    chosen = select_parameters(params, select, least_dims=MATRICES)
    require_gradients("fisher")
    batch = _batched(batch)
    length = _length(batch)
    of_one = _gradients(loss, params, chosen)
    totals = [torch.zeros_like(tensor) for tensor in chosen.values()]
    for part in chunks(length, chunk_size):
        each = vmap_or_loop(lambda example: of_one(_alone(example)), _part(batch, part))
        totals = [total + gradients.square().sum(0) for total, gradients in zip(totals, each)]
    return nest({key: total / length for key, total in zip(chosen, totals)})


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


def wanda(f: FunctionalModel, params: TensorDictBase, inputs: Any, *, select: Select = None) -> TensorDict:
    """Weight times the norm of what it is multiplied with.

        s_oi = |W_oi| ||x_i||_2,   the norm over all examples and positions

    It is made to be compared within one output: `prune(params, scores, amount, scope="output")`. The scores of several batches
    together are the root of the sum of their squares.

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them.
        select: weights of linear layers and convolutions; None: all of them. A convolution's x_i are the values of channel i.

    Returns:
        TensorDict of the scores of the selected weights.

    Raises:
        ParamsError: a parameter that is no such weight. SiteError: a layer that does not run.

    Cost: one forward pass, and memory for the inputs of all selected layers.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2024).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(2, 1)))
        >>> scores = wanda(f, params, torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
        >>> torch.allclose(scores["0", "weight"], params["0", "weight"].abs() * torch.tensor([5.0, 1.0]))
        True
    """
    require_sites(f)
    require_params("params", params, single=True)
    kinds = f.base.blueprint.kinds
    known = {
        key: tensor
        for key, tensor in flat(params).items()
        if key[-1] == "weight" and kinds.get(join_path(key[:-1])) in (*LINEAR, *CONVOLUTIONS, *INPUTS_FIRST)
    }
    chosen = known if select is None else select_parameters(params, select, least_dims=MATRICES)
    for key in chosen:
        if key not in known:
            raise ParamsError(
                f"wanda multiplies weights of linear layers and convolutions with their inputs; {parameter_name(key)!r} is a "
                f"parameter of a {kinds.get(join_path(key[:-1]), 'module that the model does not have')}."
            )
    if not chosen:
        raise ParamsError("the model has no linear layer and no convolution, so there is nothing for wanda to score.")
    sites = {key: f"{join_path(key[:-1])}@*:in" for key in chosen}
    _, values = capture(f, list(sites.values()))(params, inputs)
    scores = {}
    for key, weight in chosen.items():
        path = join_path(key[:-1])
        calls = [value for site, value in values.items() if site.rpartition(":")[0].partition("@")[0] == path]
        scores[key] = weight.abs() * _input_norms(calls, weight, kinds[path]).to(weight.dtype)
    return nest(scores)


def _input_norms(calls: list[Tensor], weight: Tensor, kind: str) -> Tensor:
    """The norms of the inputs of a layer over all its calls, in a shape that broadcasts with its weight."""
    axis = -1 if weight.ndim == MATRICES else 1 - weight.ndim
    rows = [value.movedim(axis, 0).flatten(1) for value in calls]
    norms = torch.stack([torch.linalg.vector_norm(row, dim=1) for row in rows]).square().sum(0).sqrt()
    if kind in INPUTS_FIRST:
        return norms[:, None]
    groups = len(norms) // weight.shape[1]
    by_output = repeat(norms, "(group i) -> (group o) i", group=groups, o=weight.shape[0] // groups)
    return by_output.reshape(*by_output.shape, *[1] * (weight.ndim - MATRICES))


def _gradients(loss: Loss, params: TensorDictBase, chosen: dict[Key, Tensor]) -> Callable[[Any], list[Tensor]]:
    """The gradients of the loss of a batch with respect to the chosen parameters."""

    def of_chosen(tensors: list[Tensor], batch: Any) -> Tensor:
        value = loss(replaced(params, dict(zip(chosen, tensors))), batch)
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            raise InputError(f"loss returned {describe(value)}; return a floating-point tensor of shape [].")
        return value

    return lambda batch: grad(of_chosen)([tensor.detach() for tensor in chosen.values()], batch)


def _batched(batch: Any) -> Any:
    """A batch whose examples vmap can take apart: a TensorDict has to say that its first dimension is one."""
    if isinstance(batch, TensorDictBase) and not batch.batch_dims:
        return batch.clone(recurse=False).auto_batch_size_(1)
    return batch


def _length(batch: Any) -> int:
    leaves = pytree.tree_flatten(batch)[0]
    lengths = {leaf.shape[0] if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in leaves}
    if len(lengths) != 1 or None in lengths or 0 in lengths:
        raise InputError(f"batch is {describe(batch)}; give tensors that share a first dimension of at least one example.")
    return next(iter(lengths))


def _part(batch: Any, part: slice) -> Any:
    return batch[part] if isinstance(batch, TensorDictBase) else pytree.tree_map(lambda leaf: leaf[part], batch)


def _alone(example: Any) -> Any:
    """A batch of one example."""
    return example.unsqueeze(0) if isinstance(example, TensorDictBase) else pytree.tree_map(lambda t: t[None], example)
