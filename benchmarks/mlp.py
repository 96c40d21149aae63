"""The network of the paper's benchmark. Also loaded by the workers of other environments, so it imports torch only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """`height` times Linear(width, width) and the same ReLU: [B, width] -> [B, width]."""

    def __init__(self, width: int, height: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(height)])
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.activation(layer(x))
        return x


def mlp(width: int, batch: int, height: int = 10, targets: Sequence[int] = ()) -> tuple[MLP, Tensor]:
    """The network with torch's own initialisation, and normal inputs [batch, width].

    As it comes, about half of the output units are zero for every input, and attributions to them agree because nothing
    is left of them. So the units of the last layer are renamed: the most active ones become the targets.
    """
    torch.manual_seed(0)
    while True:
        model = MLP(width, height)
        inputs = torch.randn(batch, width)
        with torch.no_grad():
            activity = (model(inputs[:64]) > 0).float().mean(0)
            order = activity.argsort(descending=True, stable=True)
            if activity[order[1]] > 0.5:  # two units are alive
                _rename(model.layers[-1], order, targets)
                return model, inputs


def _rename(layer: nn.Linear, order: Tensor, targets: Sequence[int]) -> None:
    """Gives the first units of `order` the places `targets`, and the others the remaining places."""
    places = [*targets, *(i for i in range(len(order)) if i not in targets)]
    layer.weight[places], layer.bias[places] = layer.weight[order], layer.bias[order]
