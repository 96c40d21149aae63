"""The loss of logistic regression, for two classes and for more, over sites and tasks at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """Weighted log-loss with a quadratic penalty.

        L(theta) = sum_i w_i (logsumexp(theta x_i) - theta_{y_i} x_i) + 1/2 sum_j penalty_j |theta_j|^2

    Two classes have one row theta; the logit of the first class is 0.

    Attributes:
        x: Tensor [S, N, P].
        truth: Tensor [T, C, N], 1 at the row of the class of each example (C = 1 for two classes).
        weights: Tensor [T, N].
        penalties: Tensor [P].
    """

    x: Tensor
    truth: Tensor
    weights: Tensor
    penalties: Tensor

    def to(self, dtype: torch.dtype) -> Softmax:
        """The same loss in another precision."""
        return Softmax(*(values.to(dtype) for values in (self.x, self.truth, self.weights, self.penalties)))

    def margins(self, theta: Tensor) -> Tensor:
        """theta x [S, T, C, N] of theta [S, T, C, P]."""
        return (theta.flatten(1, 2) @ self.x.mT).unflatten(1, theta.shape[1:3])

    def back(self, values: Tensor) -> Tensor:
        """The transpose of `margins`."""
        return (values.flatten(1, 2) @ self.x).unflatten(1, values.shape[1:3])

    def probabilities(self, margins: Tensor) -> Tensor:
        """Tensor [S, T, C, N]."""
        return margins.sigmoid() if margins.shape[2] == 1 else margins.softmax(2)

    def loss(self, theta: Tensor, margins: Tensor) -> Tensor:
        """Tensor [S, T]."""
        total = torch.nn.functional.softplus(margins[:, :, 0]) if margins.shape[2] == 1 else margins.logsumexp(2)
        data = (self.weights * (total - (self.truth * margins).sum(2))).sum(-1)
        return data + 0.5 * (self.penalties * theta.square()).sum((-1, -2))

    def gradient(self, theta: Tensor, probabilities: Tensor) -> Tensor:
        """Tensor [S, T, C, P]."""
        return self.back((probabilities - self.truth) * self.weights[:, None]) + self.penalties * theta

    def curved(self, direction: Tensor, probabilities: Tensor) -> Tensor:
        """The Hessian times a direction [S, T, C, P]."""
        pushed = probabilities * self.margins(direction)
        pushed = pushed - probabilities * pushed.sum(2, keepdim=True)
        return self.back(pushed * self.weights[:, None]) + self.penalties * direction

    def hessian(self, probabilities: Tensor) -> Tensor:
        """Tensor [S, T, C P, C P]."""
        rows, width = probabilities.shape[2], self.x.shape[-1]
        eye = torch.eye(rows, dtype=self.x.dtype, device=self.x.device)
        same = eye[:, :, None] * probabilities[:, :, :, None] - probabilities[:, :, :, None] * probabilities[:, :, None]
        weighted = (same * self.weights[:, None, None])[..., None] * self.x[:, None, None, None]
        blocks = weighted.mT @ self.x[:, None, None, None]
        whole = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return whole + torch.diag_embed(self.penalties.repeat(rows)).reshape(rows * width, rows * width)
