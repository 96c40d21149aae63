"""Points whose dimension is known."""

import math

import torch


def cube(count, dimension, features, dtype=torch.float32):
    """A flat cube, turned in a space of more dimensions."""
    return torch.rand(count, dimension, dtype=dtype) @ rotation(features, dtype)[:dimension]


def sphere(count, dimension, features, dtype=torch.float32):
    points = torch.randn(count, dimension + 1, dtype=dtype)
    return points / points.norm(dim=1, keepdim=True) @ rotation(features, dtype)[: dimension + 1]


def torus(count, dimension, dtype=torch.float32):
    """A flat cube without borders: `dimension` circles."""
    angles = 2 * math.pi * torch.rand(count, dimension, dtype=dtype)
    return torch.cat([angles.cos(), angles.sin()], 1)


def swiss_roll(count):
    along = (torch.rand(count) * 3 + 1.5) * math.pi
    return torch.stack([along * along.cos(), 21 * torch.rand(count), along * along.sin()], 1)


def rotation(features, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))[0].to(dtype)
