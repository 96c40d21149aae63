"""Networks of other kinds than the MLP of the paper: a smooth MLP, a residual CNN and a vision transformer.

With `pixels=28` they take the images of MNIST and are trained on them for a moment: along the path of a network with random
weights F is almost a polynomial, and every quadrature is good.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tdhook

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
PENULTIMATE = "head:in[0]"  # the features that the last layer takes, in each of these


class SmoothMLP(nn.Module):
    """Linear layers of one width and a smooth activation: [B, *features] -> [B, classes]."""

    def __init__(self, features: int, classes: int, width: int = 256, height: int = 4, activation: Callable = nn.GELU):
        super().__init__()
        widths = [features, *[width] * height]
        self.flatten = nn.Flatten()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), activation()) for a, b in itertools.pairwise(widths)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.flatten(x)))


class Residual(nn.Module):
    """Two convolutions and a shortcut, with BatchNorm."""

    def __init__(self, before: int, after: int, activation: Callable):
        super().__init__()
        stride = after // before
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if stride > 1 else nn.Identity()
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation(self.norm1(self.conv1(x)))
        return self.activation(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ResNet20(nn.Module):
    """ResNet-20 for small images (He et al., 2015): [B, channels, H, W] -> [B, classes], 64 features before the head."""

    def __init__(self, channels: int, classes: int, activation: Callable = nn.GELU):
        super().__init__()
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.stem = nn.Sequential(nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), activation())
        self.blocks = nn.Sequential(*(Residual(a, b, activation) for a, b in itertools.pairwise(widths)))
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((-2, -1)))


class ViT(nn.Module):
    """The ViT of transformers, small: [B, channels, H, W] -> [B, classes]."""

    def __init__(self, channels: int, classes: int, pixels: int, patch: int = 4, width: int = 64, height: int = 6):
        super().__init__()
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=height,
            num_attention_heads=4,
            intermediate_size=4 * width,
            image_size=pixels,
            patch_size=patch,
            num_channels=channels,
        )
        self.body = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).last_hidden_state[:, 0])


class SmallCNN(nn.Sequential):
    """Three convolutions and two linear layers: [B, 1, 28, 28] -> [B, 10]. No layer but these has parameters."""

    def __init__(self):
        super().__init__()
        widths = [1, 32, 64, 128]
        for i, (before, after) in enumerate(itertools.pairwise(widths), 1):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, 3, padding=1))
            self.add_module(f"relu{i}", nn.ReLU())
            self.add_module(f"pool{i}", nn.MaxPool2d(2))
        self.flatten = nn.Flatten()
        self.linear1, self.relu4, self.linear2 = nn.Linear(128 * 9, 256), nn.ReLU(), nn.Linear(256, 10)


KINDS = ("MLP", "CNN", "ViT")
EPOCHS = {"MLP": 3, "CNN": 1, "ViT": 3}


def network(kind: str, classes: int, channels: int = 3, pixels: int = 32, activation: Callable = nn.GELU) -> nn.Module:
    """A network with torch's (or transformers') own initialisation, in evaluation mode."""
    torch.manual_seed(0)
    if kind == "MLP":
        return SmoothMLP(channels * pixels**2, classes, activation=activation).eval()
    if kind == "ViT":
        return ViT(channels, classes, pixels, 4 if pixels % 7 else 7).eval()
    model = ResNet20(channels, classes, activation)
    with torch.no_grad():  # running statistics that fit: with those of a fresh BatchNorm activations grow from block to block
        for _ in range(20):
            model(torch.randn(32, channels, pixels, pixels))
    return model.eval()


def small_cnn() -> nn.Module:
    """A small network of layers that every peer knows, with torch's own initialisation."""
    torch.manual_seed(0)
    return SmallCNN().eval()


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0, trained on ImageNet."""
    return _real_models().efficientnet()


def images(batch: int, channels: int = 3, pixels: int = 32) -> Tensor:
    """Normal noise [batch, channels, pixels, pixels]."""
    return torch.randn(batch, channels, pixels, pixels, generator=torch.Generator().manual_seed(1))


def _real_models() -> Any:
    if str(TUTORIALS) not in sys.path:
        sys.path.append(str(TUTORIALS))
    import real_models

    return real_models


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """MNIST's images [5000, 1, 28, 28] and labels [5000], in random order."""
    _, pictures, labels = _real_models().digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return pictures[order], labels[order]


@functools.cache
def trained(kind: str, activation: Callable = nn.GELU) -> nn.Module:
    """A network trained on handwritten digits, for a few seconds; its parameters need no gradients any more."""
    pictures, labels = digits()
    model = network(kind, 10, 1, 28, activation).train()
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(EPOCHS[kind]):
        for some, right in zip(pictures.split(100), labels.split(100)):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(some), right).backward()
            optimiser.step()
    return model.eval().requires_grad_(False)


def parts(shape: Sequence[int], rows: int, columns: int) -> Tensor:
    """Groups of pixels: an image [H, W] in rows times columns rectangles."""
    down = torch.arange(shape[0]) * rows // shape[0]
    right = torch.arange(shape[1]) * columns // shape[1]
    return down[:, None] * columns + right


@functools.cache
def functional(model: nn.Module) -> tuple[Any, Any]:
    """The model as a function, made once and not in every call that is timed; `calls` times the making."""
    return tdhook.functionalize(model)
