"""Iterative nullspace projection: what every one of a series of probes uses is removed."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.checks import require_positive
from ...core.errors import InputError
from ...core.structure import describe
from .concept_vectors import Fit, default_fit, require_examples
from .directions import as_directions
from .erasure import Eraser, project_out


def iterative_nullspace_projection(x: Tensor, y: Tensor, *, rounds: int, fit: Fit | None = None) -> Eraser:
    """The orthogonal projection on the common nullspace of probes, each fitted to what those before left.

        x_0 = x,    w_i = fit(x_i, y),    x_{i+1} = x - the part of (x - mean) in the span of w_0 ... w_i

    Args:
        x: activations [N, D].
        y: labels [N], as `fit` takes them.
        rounds: how many probes.
        fit: function (x, y) -> probe with `.direction` [D] or [K, D], or the direction itself. None: the logistic probe of
            `tdhook.latent.probes` with its defaults.

    Returns:
        `Eraser` about the mean of x, whose rank grows with the rounds.

    Raises:
        InputError: shapes that do not fit, NaN, a bad number of rounds.

    `leace` erases at once, in closed form, and changes x less; here the probe may be any. A probe at chance still has a
    direction, which then goes too: with the difference of means, one round is all there is to do.

    Cost: `rounds` fits.

    Source: Ravfogel et al., "Null It Out: Guarding Protected Attributes by Iterative Nullspace Projection" (2020).

    Examples:
        >>> z = torch.arange(100) % 2
        >>> x = torch.randn(100, 5) + 3.0 * z[:, None]
        >>> iterative_nullspace_projection(x, z, rounds=2).rank
        tensor(2)
    """
    require_examples("x", x)
    require_positive("rounds", rounds)
    if x.ndim != 2 or not isinstance(y, Tensor) or y.shape[-1:] != x.shape[:1]:
        raise InputError(f"y is {describe(y)} for x, {describe(x)}; give x [N, D] and a label for each row.")
    chosen = fit or default_fit()
    center = x.mean(0)
    found: list[Tensor] = []
    eraser = None
    for _ in range(rounds):
        left = x if eraser is None else eraser(x)
        found.append(torch.atleast_2d(as_directions("what fit returned", chosen(left, y), nonzero=False)).to(x.dtype))
        eraser = project_out(torch.cat(found), center=center)
    assert eraser is not None
    return eraser
