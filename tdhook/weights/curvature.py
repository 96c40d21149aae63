"""Curvature of a loss in the parameters: Hessian-, Gauss-Newton- and Fisher-vector products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tensordict import TensorDict
from torch import Tensor
from torch.func import grad, vjp, vmap

from ..core.batching import chunks, vmap_or_loop
from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.errors import InputError, TargetError
from ..core.forward_mode import push_forward
from ..core.structure import describe
from .examples import Loss, count_examples, example, indices, loss_of_example, measured, output_of_example, require_loss
from .moving import Moving, moving
from .selection import Select

Product = Callable[[Sequence[Tensor]], list[Tensor]]
CURVATURES = ("hessian", "gauss_newton")


def hessian_vector_product(
    f: Any,
    params: Any,
    inputs: Any,
    loss: Loss,
    vector: Any,
    *,
    labels: Any = None,
    select: Select = None,
    chunk_size: int | None = None,
) -> TensorDict:
    """The Hessian of the mean loss times a vector, without the Hessian.

        H v = d/de grad L(params + e v),  L = 1/B sum_b loss(f(params, x_b), y_b)

    Args:
        f: function of `(params, inputs)`.
        params: its parameters.
        inputs: tensors [B, *shape], in any structure that `f` takes.
        loss: of one example, as in `per_example_gradients`.
        vector: TensorDict like the selected parameters, without buffers; `vmap` for several.
        labels: tensors [B, *shape], in any structure.
        select: names or patterns (`select_parameters`); None for all parameters, without the buffers of a functional model.
        chunk_size: how many examples run at once; None for all.

    Returns:
        TensorDict like the selected parameters.

    Raises:
        InputError: a vector of another structure; otherwise as `per_example_gradients`.

    Cost: one forward and one backward pass and their derivatives along the vector, about four passes. Fused attention runs in
    its plain form.

    Source: Pearlmutter, "Fast Exact Multiplication by the Hessian" (1994).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(2, 1, bias=False))
        >>> v = params.apply(torch.ones_like)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> hessian_vector_product(f, params, x, lambda out: out.square().sum() / 2, v)["weight"]
        tensor([[3., 6.]])
    """
    return _product("hessian_vector_product", f, params, inputs, loss, vector, labels, select, "hessian", chunk_size)


def gauss_newton_vector_product(
    f: Any,
    params: Any,
    inputs: Any,
    loss: Loss,
    vector: Any,
    *,
    labels: Any = None,
    select: Select = None,
    chunk_size: int | None = None,
) -> TensorDict:
    """The generalised Gauss-Newton matrix of the mean loss times a vector.

        G v = 1/B sum_b J_b^T (d^2 loss / d output^2) J_b v,  J_b = d f(params, x_b) / d params

    It is the Hessian without the curvature of the model, and positive semidefinite where the loss is convex in the output.

    Args:
        f: as in `hessian_vector_product`; its output is a structure of floating-point tensors.
        params: as in `hessian_vector_product`.
        inputs: as in `hessian_vector_product`.
        loss: as in `hessian_vector_product`.
        vector: as in `hessian_vector_product`.
        labels: as in `hessian_vector_product`.
        select: as in `hessian_vector_product`.
        chunk_size: as in `hessian_vector_product`.

    Returns:
        TensorDict like the selected parameters.

    Raises:
        InputError: as `hessian_vector_product`.

    Cost: two forward passes, one derivative of a forward along the vector, one backward pass.

    Source: Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent" (2002).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(2, 1, bias=False))
        >>> v = params.apply(torch.ones_like)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> gauss_newton_vector_product(f, params, x, lambda out: out.square().sum() / 2, v)["weight"]
        tensor([[3., 6.]])
    """
    method = "gauss_newton_vector_product"
    return _product(method, f, params, inputs, loss, vector, labels, select, "gauss_newton", chunk_size)


def fisher_vector_product(
    f: Any,
    params: Any,
    inputs: Any,
    vector: Any,
    *,
    logits: Callable[[Any], Tensor] | None = None,
    select: Select = None,
    chunk_size: int | None = None,
) -> TensorDict:
    """The Fisher information of a classifier times a vector.

        F v = 1/B sum_b J_b^T (diag p_b - p_b p_b^T) J_b v,  p_b = softmax(logits_b)

    The labels are those that the model itself expects; the Fisher information of the labels at hand (the "empirical" one) is
    another matrix. Logits [1, L, C] are L independent labels, whose informations add up.

    Args:
        f: as in `hessian_vector_product`.
        params: as in `hessian_vector_product`.
        inputs: as in `hessian_vector_product`.
        vector: as in `hessian_vector_product`.
        select: as in `hessian_vector_product`.
        chunk_size: as in `hessian_vector_product`.
        logits: function of the output to the logits [1, *L, C]; None where they are the output.

    Returns:
        TensorDict like the selected parameters.

    Raises:
        InputError: as `hessian_vector_product`. TargetError: an output that is no tensor of logits.

    Cost: as `gauss_newton_vector_product`.

    Source: Martens, "New Insights and Perspectives on the Natural Gradient Method" (2020).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(1, 2, bias=False))
        >>> params = params.apply(torch.zeros_like)
        >>> v = params.apply(lambda weight: torch.tensor([[1.0], [0.0]]))
        >>> fisher_vector_product(f, params, torch.ones(1, 1), v)["weight"]
        tensor([[ 0.2500],
                [-0.2500]])
    """

    def log_normaliser(output: Any) -> Tensor:
        # The Hessian of log sum exp is diag p - p p^T: that of the cross-entropy for any label.
        scores = output if logits is None else logits(output)
        if not isinstance(scores, Tensor) or scores.ndim < 2:
            raise TargetError(f"the logits of one example are {describe(scores)}; give logits=<function of the output>.")
        return scores.logsumexp(-1).sum()

    method = "fisher_vector_product"
    return _product(method, f, params, inputs, log_normaliser, vector, None, select, "gauss_newton", chunk_size)


def curvature_product(
    f: Any, moved: Moving, inputs: Any, labels: Any, loss: Loss, curvature: str, chunk_size: int | None
) -> Product:
    """The product with a curvature of the mean loss, as a function of tensors like the moving parameters."""
    if curvature not in CURVATURES:
        raise InputError(f"curvature={curvature!r} is unknown; choose from {', '.join(CURVATURES)}.")
    count = count_examples("inputs", inputs, labels)
    of_chunk = _hessian if curvature == "hessian" else _gauss_newton

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        total: list[Any] = [0] * len(vector)
        for part in chunks(count, chunk_size):
            added = of_chunk(f, moved, inputs, labels, loss, indices(count, inputs, part), list(vector))
            total = [t + a / count for t, a in zip(total, added)]
        return total

    return product


def _hessian(f: Any, moved: Moving, inputs: Any, labels: Any, loss: Loss, part: Tensor, vector: list[Tensor]) -> list[Tensor]:
    one = loss_of_example(f, moved, inputs, labels, loss)

    def total(values: list[Tensor]) -> Tensor:
        return vmap_or_loop(lambda index: one(values, index), part).sum()

    return push_forward(grad(total), (moved.values,), (vector,))[1]


def _gauss_newton(
    f: Any, moved: Moving, inputs: Any, labels: Any, loss: Loss, part: Tensor, vector: list[Tensor]
) -> list[Tensor]:
    one = output_of_example(f, moved, inputs)

    def outputs(values: list[Tensor]) -> Any:
        return vmap_or_loop(lambda index: one(values, index), part)

    def total(output: Any) -> Tensor:
        return vmap(lambda out, index: measured(loss, out, example(labels, index)))(output, part).sum()

    output, pull, *_ = vjp(outputs, moved.values)
    pushed = push_forward(outputs, (moved.values,), (vector,))[1]
    return pull(push_forward(grad(total), (output,), (pushed,))[1])[0]


def _product(
    method: str,
    f: Any,
    params: Any,
    inputs: Any,
    loss: Loss,
    vector: Any,
    labels: Any,
    select: Select,
    curvature: str,
    chunk_size: int | None,
) -> TensorDict:
    require_gradients(method)
    require_loss(loss)
    require_positive("chunk_size", chunk_size, optional=True)
    moved = moving(f, params, select)
    product = curvature_product(f, moved, inputs, labels, loss, curvature, chunk_size)
    given = moved.flatten("vector", vector)
    warn_if_stochastic(f, method)
    return moved.restructure(product(given))
