"""Logistic regression probes, of two classes and more, for all sites and labels in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .frame import frame
from .minimisation import Minimisation, warn_unconverged
from .problem import classification


def logistic(
    x: Any,
    y: Tensor,
    *,
    penalty: str = "l2",
    strength: float = 1.0,
    classes: int | Tensor | None = None,
    standardize: bool = True,
    class_weight: str | Tensor | None = None,
    sample_weight: Tensor | None = None,
    fit_intercept: bool = True,
    solver: str = "auto",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Logistic regression: the direction along which a label can be read.

        L2: min over W, b of  sum_i w_i loss(W x_i + b, y_i) + strength / 2 |W|^2
        L1: min over W, b of  sum_i w_i loss(W x_i + b, y_i) + strength |W|_1
        loss(s, y) = log(1 + exp(s)) - y s for two classes (one row), logsumexp(s) - s_y for more (one row for each)

    This is `LogisticRegression(C=1 / strength)` of scikit-learn: the loss is a sum over examples, so that the same strength
    means less with more of them. The intercept b is not penalised. With `standardize` the penalty is on the weights of
    standardised activations, as in a pipeline after `StandardScaler`; the result is in the units of `x` all the same.

    Args:
        x: Tensor [N, D], [S, N, D] for stacked sites, or a mapping of tensors [N, D_site] with the same examples. A value that
            requires grad is detached: no gradient flows through a fit.
        y: integer Tensor [*T, N], labels; leading dimensions are tasks, which are fitted at once. All tasks have the same
            number of classes. Several binary labels of an example are several tasks of 0 and 1.
        penalty: `"l2"` or `"l1"`.
        strength: of the penalty; 0 for none.
        classes: the labels, as Tensor [K] or a number K for 0 to K - 1; None: those found in y, for each task. Has to be given
            under vmap and compilation.
        standardize: divide activations by their standard deviation.
        class_weight: None, Tensor [K] in the order of the classes, or `"balanced"`: N / (K N_class).
        sample_weight: Tensor [N]; None: 1 for each. Examples of weight 0 are absent, whatever they hold.
        fit_intercept: False: b = 0, and activations are not centred.
        solver: of L2: `"direct"` (Newton with the whole Hessian of every fit), `"conjugate"` (Newton with conjugate gradients
            in the principal axes that all tasks of a site share), or `"auto"`: direct for few unknowns, and in compiled code.
        tolerance: of the gradient for each example with coordinates of mean square 1; None: 1e-9 in float64, 1e-5 in float32.
        max_iterations: None: 50 Newton steps, or 10000 proximal steps for L1.
        chunk_size: how many fits (sites times tasks) run at once; None for all. It does not change the result.

    Returns:
        `LinearProbe` with batch size [*T], or [S, *T] for stacked sites, with `iterations` and `converged`; a mapping of them
        for a mapping. They are of the dtype of x, or float32 for half precision, which is also that of the computation.

    Raises:
        InputError: shapes that do not match, one class only, labels that are not among `classes`, NaN, a bad option; under
            compilation, L1. Warns for fits that did not converge.

    Cost: for each site one eigendecomposition of min(N, D) dimensions; for each fit about 10 Newton steps, each with 5 to 30
        pairs of products with x, which all tasks of a site share; several hundred to some thousand pairs for L1.

    Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (2016); Nocedal and Wright,
    "Numerical Optimization" (2006), 7.1; Beck and Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm" (2009).

    Examples:
        >>> x = {"early": torch.randn(100, 8), "late": torch.randn(100, 12)}
        >>> labels = torch.stack([x["late"][:, 0] > 0, x["early"].sum(1) > 0]).long()  # two labels of every example
        >>> probes = logistic(x, labels)
        >>> probes["late"].weight.shape, probes["late"].converged
        (torch.Size([2, 1, 12]), tensor([True, True]))
        >>> accuracy = (tdhook.latent.probes.predict(probes, x)["late"] == labels).float().mean(-1)
        >>> accuracy[0] > 0.9, accuracy[1] < 0.9
        (tensor(True), tensor(True))
    """
    minimisation = Minimisation(penalty, strength, fit_intercept, solver, tolerance, max_iterations)
    minimisation.require_valid()
    problem = classification(x, y, sample_weight, classes)
    weights = problem.example_weights(class_weight)

    def prepare(x: Tensor) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        return minimisation.prepare(frame(x, problem.weights, standardize=standardize, center=fit_intercept), problem)

    probes = problem.solve_shared(prepare, weights, chunk_size=chunk_size)
    warn_unconverged("logistic", probes)
    return probes
