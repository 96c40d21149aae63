"""Models that the tests of perturbation methods share, and Shapley values by their definition over orders."""

from __future__ import annotations

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tdhook import functionalize

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)

X = torch.tensor([[20.0, 50.0, 30.0]]).double()
X2 = torch.tensor([[2.0, 10.0, 3.0]]).double()
BOTH = torch.cat([X2, X])
MASK = torch.tensor([[0, 0, 1]])
MASKS = torch.tensor([[0, 0, 1], [1, 1, 0]])


class MultiLayer(nn.Module):
    """x -> 1 x -> relu(sum(x) + b) -> sum, the model of captum's own tests."""

    def __init__(self):
        super().__init__()
        self.linear0 = nn.Linear(3, 3, bias=False)
        self.linear1 = nn.Linear(3, 4)
        self.linear2 = nn.Linear(4, 2)
        for weight in (self.linear1.weight, self.linear2.weight):
            nn.init.ones_(weight)
        self.linear0.weight = nn.Parameter(torch.eye(3))
        self.linear1.bias = nn.Parameter(torch.tensor([-10.0, 1, 1, 1]))
        self.linear2.bias = nn.Parameter(torch.tensor([-1.0, 1]))
        self.double()

    def forward(self, x):
        return self.linear2(F.relu(self.linear1(self.linear0(x))))


class TwoInputs(nn.Module):
    """Scores [B, 3] of inputs [B, 2, 2] and [B, 3] that interact."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(7, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, a, b):
        return self.last(self.first(torch.cat([a.flatten(-2), b], -1)).tanh())


def two_inputs(batch=3):
    torch.manual_seed(batch)
    return torch.randn(batch, 2, 2).double(), torch.randn(batch, 3).double()


def network(features=5, outputs=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def prepared(features=5, batch=3):
    f, params = functionalize(network(features))
    return f, params, torch.randn(batch, features).double()


def by_orders(function, x: Tensor, baseline: Tensor) -> Tensor:
    """Shapley values [..., F] of `function` from [..., F] to [...], over all orders of features."""
    count = x.shape[-1]
    orders = list(itertools.permutations(range(count)))
    total = torch.zeros_like(x)
    for order in orders:
        point = baseline.expand(x.shape).clone()
        before = function(point)
        for feature in order:
            point[..., feature] = x[..., feature]
            after = function(point)
            total[..., feature] += after - before
            before = after
    return total / len(orders)


def painted(scores, ids):
    """For every element the score of its group, from scores [*T, B, G] and one tensor of ids, or a tuple of them.

    The ids have a batch axis of 1 or B, as captum takes them.
    """
    if isinstance(ids, tuple):
        return tuple(painted(scores, each) for each in ids)
    own = ids.expand(scores.shape[-2], *ids.shape[1:])
    return torch.stack([scores[..., example, each] for example, each in enumerate(own)], scores.ndim - 2)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made meanwhile."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes():
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out
