"""Which minimiser a logistic regression uses, and in which coordinates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ...core.checks import require_number, require_positive
from ...core.compat import is_compiling, is_wrapped
from ...core.errors import InputError, TdhookWarning
from .frame import Frame
from .newton import Minimum, newton
from .probe import sites_of
from .problem import Problem
from .proximal import proximal
from .softmax import Softmax
from .spectrum import spectrum

PENALTIES = ("l2", "l1")
SOLVERS = ("auto", "direct", "conjugate")
DIRECT = 64  # unknowns up to which the Hessian of every fit costs less than products with it


Minimise = Callable[[Tensor, Tensor], tuple[Tensor, Minimum]]  # of truth [T, C, N] and weights [T, N]; weight [S, T, C, D]


@dataclass(frozen=True)
class Minimisation:
    """The options of `logistic` that say what is minimised and how."""

    penalty: str = "l2"
    strength: float = 1.0
    fit_intercept: bool = True
    solver: str = "auto"
    tolerance: float | None = None
    max_iterations: int | None = None

    def require_valid(self) -> None:
        """Raises `InputError` for an option that means nothing."""
        if self.penalty not in PENALTIES:
            raise InputError(f"penalty={self.penalty!r} is unknown; choose from {', '.join(PENALTIES)}.")
        if self.solver not in SOLVERS:
            raise InputError(f"solver={self.solver!r} is unknown; choose from {', '.join(SOLVERS)}.")
        require_number("strength", self.strength)
        if self.tolerance is not None:
            require_number("tolerance", self.tolerance, strict=True)
        require_positive("max_iterations", self.max_iterations, optional=True)
        if self.penalty == "l1" and self.solver != "auto":
            raise InputError(f"solver={self.solver!r} is of penalty='l2'; leave it out with 'l1'.")
        if is_compiling() and (self.penalty == "l1" or self.solver == "conjugate"):
            raise InputError(
                "penalty='l1' and solver='conjugate' take as many steps as the values need, which compiled code cannot; "
                "use penalty='l2' with solver='direct'."
            )

    def prepare(self, framed: Frame, problem: Problem) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        """The minimiser for framed activations [S, N, D]: what all tasks share is computed here.

        It is a function of class numbers y [T, N] and weights [T, N] to the fields of the probes.
        """
        minimise = (self._quadratic if self.penalty == "l2" else self._absolute)(framed, problem.weights)
        assert problem.classes is not None
        count = problem.classes.shape[-1]
        dtype = framed.x.dtype

        def fields(y: Tensor, weights: Tensor) -> dict[str, Tensor]:
            rows = torch.arange(1 if count == 2 else 0, count, device=y.device)
            weight, found = minimise((y[:, None] == rows[:, None]).to(dtype), weights.to(dtype))
            bias = found.theta[..., -1] if self.fit_intercept else torch.zeros_like(weight[..., 0])
            return {**framed.unit(weight, bias), "iterations": found.iterations, "converged": found.converged}

        return fields

    def _quadratic(self, framed: Frame, examples: Tensor) -> Minimise:
        """In principal axes, where the penalty is the same and the Hessian nearly diagonal."""
        dtype = framed.x.dtype
        axes, squares = spectrum(framed.x, examples)
        axes, squares = axes.to(dtype), (squares / examples.sum()).to(dtype)
        width = axes.shape[-1]
        penalties = self._extended(torch.full_like(squares[0], self.strength), 0.0)
        z, squares = self._extended(framed.x @ axes, 1.0), self._extended(squares, 1.0)

        def minimise(truth: Tensor, weights: Tensor) -> tuple[Tensor, Minimum]:
            few = truth.shape[1] * z.shape[-1] <= DIRECT
            found = newton(
                Softmax(z, truth, weights, penalties),
                squares,
                tolerance=self._tolerance(dtype),
                max_iterations=50 if self.max_iterations is None else self.max_iterations,
                direct=self.solver == "direct" or (self.solver == "auto" and (few or is_compiling())),
            )
            return found.theta[..., :width] @ axes[:, None].mT, found

        return minimise

    def _absolute(self, framed: Frame, examples: Tensor) -> Minimise:
        """In the coordinates of the frame, each divided by its root mean square."""
        dtype = framed.x.dtype
        size = torch.einsum("n,snd->sd", (examples / examples.sum()).to(dtype), framed.x.square()).sqrt()
        size = torch.where(size > 0, size, 1)
        scaled = framed.x / size[:, None]
        z, penalties = self._extended(scaled, 1.0), self._extended(self.strength / size, 0.0)
        largest = torch.maximum(spectrum(scaled, examples).squares.amax(-1), examples.sum()).to(dtype)

        def minimise(truth: Tensor, weights: Tensor) -> tuple[Tensor, Minimum]:
            # The Hessian of the loss of one example is at most 1/4 (two classes) or 1/2 times x x^T (Boehning, 1992).
            ratio = torch.where(examples > 0, weights / torch.where(examples > 0, examples, 1), 0).amax(-1)
            found = proximal(
                Softmax(z, truth, weights, torch.zeros_like(penalties[0])),
                (0.25 if truth.shape[1] == 1 else 0.5) * 1.001 * largest[:, None] * ratio,
                penalties,
                tolerance=self._tolerance(dtype),
                max_iterations=10_000 if self.max_iterations is None else self.max_iterations,
            )
            return found.theta[..., : size.shape[-1]] / size[:, None, None], found

        return minimise

    def _extended(self, values: Tensor, last: float) -> Tensor:
        """Values of all coordinates [..., P], and that of the intercept, if there is one."""
        return torch.cat([values, torch.full_like(values[..., :1], last)], -1) if self.fit_intercept else values

    def _tolerance(self, dtype: torch.dtype) -> float:
        return self.tolerance if self.tolerance is not None else 1e-9 if dtype == torch.float64 else 1e-5


def warn_unconverged(method: str, probes: Any) -> None:
    """Warns of fits that did not converge, where values can be looked at."""
    each = [probes[key] for key in sites_of(probes)] if isinstance(probes, (Mapping, TensorDictBase)) else [probes]
    if is_compiling() or is_wrapped(each[0].converged):
        return
    count = sum(probe.converged.numel() for probe in each)
    missed = sum(int((~probe.converged).sum()) for probe in each)
    if missed:
        warnings.warn(
            f"{method}: {missed} of {count} fits did not converge; raise max_iterations, or strength where classes are "
            "separable.",
            TdhookWarning,
            stacklevel=3,
        )
