"""LIME: a linear model of the target, fitted around the input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.batching import chunks
from ..core.checks import require_positive, warn_if_stochastic
from ..core.errors import InputError
from ..core.estimate import Estimate
from ..core.progress import Progress
from ..core.randomness import require_generator, uniform_rows
from ..core.structure import describe
from ..core.targets import Targets, check
from ..core.transforms import Sites
from .coalitions import game, tracked
from .paths import straight_path
from .regression import ROWS, least_squares

Kernel = str | Callable[[Tensor], Tensor]


def lime(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    baselines: Any = 0.0,
    groups: Any = None,
    at: Sites | None = None,
    samples: int = 1000,
    kernel: Kernel = "cosine",
    kernel_width: float | None = None,
    ridge: float = 1.0,
    regressor: Any = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """The coefficients of a linear model of the target, fitted to what it does when random groups of features are switched off.

        minimise over a, attribution: sum_s w_s (v(z_s) - a - z_s . attribution)^2 + ridge |attribution|^2
        w_s = exp(-d(z_s)^2 / (2 kernel_width^2)),   z_s of fair coins,   v(z) = F(x where z is 1, x' elsewhere)

    with the distance from the unchanged input, where all of the G groups are on, `d = 1 - sqrt(sum(z) / G)` for the kernel
    `"cosine"` and `d = sqrt(G - sum(z))` for `"euclidean"`.

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them. Floating-point tensors are explained, others are passed through.
        targets: as for `feature_ablation`.
        baselines: as for `feature_ablation`.
        groups: as for `feature_ablation`.
        at: sites: explain activations there instead of the inputs.
        samples: how many masks, drawn once for all examples and targets; at least 2. Several times G are needed.
        kernel: `"cosine"`, `"euclidean"`, or a function of the masks, bool Tensor [n, G], to weights [n] that are not negative.
        kernel_width: of the two named kernels; None for 0.25 (cosine) or 0.75 sqrt(G) (euclidean), as the paper's package.
        ridge: penalty on the coefficients, the intercept a is free; 0 for plain least squares. It shrinks the result where
            the sum of the weights is not much larger.
        regressor: a regressor with `fit(masks, values, sample_weight=weights)` and then `coef_`, such as those of scikit-learn
            (`sklearn.linear_model.Lasso(alpha=0.01)`), instead of the ridge regression. A copy of it is fitted for every
            example and target, in float64 on the CPU; this neither compiles nor runs under `vmap` and gives no derivatives.
        generator: source of the masks; None for the global one, as it has to be inside of `torch.compile`. Under `vmap`
            give `randomness="same"` or `"different"`.
        chunk_size: how many copies of the batch run at once; None for all.
        progress: called as `progress(done, total)`, in masks.

    Returns:
        `Estimate` of the attributions, its value and standard error as the result of `feature_ablation`: in the structure of
        `inputs`, or with `groups` a Tensor [B, G] or [T, B, G] each. The standard error is that of weighted least squares
        over masks drawn anew, consistent for residuals of any variance (HC2); it does not count how far `ridge` shrinks the
        result. It is NaN where the masks do not determine the coefficients, and for a `regressor`.

    Raises:
        InputError: an unknown kernel, a width or ridge that does not fit, a regressor without `fit`; otherwise as
            `feature_ablation`.

    Cost: samples + 1 forward passes, vmapped, whatever the number of targets. Memory as for `kernel_shap`.

    Source: Ribeiro, Singh, Guestrin, "'Why Should I Trust You?': Explaining the Predictions of Any Classifier" (2016).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2))
        >>> x = torch.ones(1, 3)
        >>> estimate = lime(f, params, x, targets=0, ridge=0)
        >>> torch.allclose(estimate.value, params["weight"][0] * x, atol=1e-5)
        True
    """
    require_positive("samples", samples, least=2)
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)
    _require(kernel, kernel_width, ridge, regressor)
    check(targets)
    warn_if_stochastic(f, "lime")
    path = straight_path(f, params, inputs, baselines, at)
    played = game(path.explained, path.starts, targets, groups)
    drawn = [
        uniform_rows(part.stop - part.start, played.groups.count, generator, played.device) < 0.5
        for part in chunks(samples, ROWS)
    ]
    present = torch.cat(drawn)
    weights = _weights(present, kernel, kernel_width)
    values = [played.play(present[part]).double() for part in tracked(samples, chunk_size, progress)]
    outcomes = torch.cat(values).flatten(1)
    if regressor is None:
        fitted, errors = _ridge(present, weights, outcomes, ridge)
    else:
        fitted = _each_fitted(regressor, present, weights, outcomes)
        errors = torch.full_like(fitted, torch.nan)
    shape = (*played.whole.shape, played.groups.count)
    return Estimate(played.result(fitted.reshape(shape)), played.result(errors.reshape(shape)))


def _require(kernel: Kernel, kernel_width: float | None, ridge: float, regressor: Any) -> None:
    if not callable(kernel) and kernel not in ("cosine", "euclidean"):
        raise InputError(f"kernel={kernel!r} is unknown; choose 'cosine', 'euclidean' or a function of the masks.")
    if kernel_width is not None and (not isinstance(kernel_width, (int, float)) or not kernel_width > 0):
        raise InputError(f"kernel_width={kernel_width!r}; give a number above 0 or None.")
    if not isinstance(ridge, (int, float)) or not ridge >= 0:
        raise InputError(f"ridge={ridge!r}; give a number of at least 0.")
    if regressor is not None and (not hasattr(regressor, "fit") or isinstance(regressor, type)):
        raise InputError(f"regressor is {describe(regressor)}; give an instance with fit and coef_, Lasso(alpha=0.01) say.")


def _weights(present: Tensor, kernel: Kernel, kernel_width: float | None) -> Tensor:
    """Weights [n] of masks [n, G], in float64."""
    if callable(kernel):
        weights = kernel(present)
        if not isinstance(weights, Tensor) or weights.shape != present.shape[:1]:
            raise InputError(f"kernel returned {describe(weights)}; return one weight for each of the {len(present)} masks.")
        return weights.double()
    count = present.shape[-1]
    absent = count - present.sum(-1).double()
    squared, width = ((1 - (1 - absent / count).sqrt()).square(), 0.25) if kernel == "cosine" else (absent, 0.75 * count**0.5)
    return (-squared / (2 * (kernel_width or width) ** 2)).exp()


def _ridge(present: Tensor, weights: Tensor, outcomes: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Coefficients and standard errors [K, G]; centred, so that the intercept drops out."""
    shares = weights / weights.sum()
    penalty = ridge * torch.eye(present.shape[-1], dtype=torch.float64, device=present.device)
    center = sum((shares[part] @ present[part].double() for part in chunks(len(present), ROWS)), torch.zeros_like(penalty[0]))
    return least_squares(present, center, weights, outcomes - shares @ outcomes, penalty)


def _each_fitted(regressor: Any, present: Tensor, weights: Tensor, outcomes: Tensor) -> Tensor:
    """The coefficients [K, G] of one fit for each column of the outcomes."""
    design, sample_weight = present.double().cpu().numpy(), weights.cpu().numpy()
    rows = []
    for column in outcomes.detach().mT.cpu().numpy():
        fitted = copy.deepcopy(regressor)
        fitted.fit(design, column, sample_weight=sample_weight)
        rows.append(torch.as_tensor(fitted.coef_, dtype=torch.float64).reshape(-1))
    return torch.stack(rows).to(outcomes.device)
