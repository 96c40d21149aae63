"""Targets: which scalars of the output a method explains.

A method's `targets` is None (the output is already one scalar per example), an int (one class), a sequence (several targets,
which add one leading dimension T to the result), or a callable from the output to Tensor [B] or, for several targets, [B, T].
The functions here make such callables; each can pick a `key` of a structured output and a `position` of a sequence.

Examples:
    >>> import torch
    >>> logits = torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 3.0]])
    >>> logit_difference(0, 1)(logits)
    tensor([-4.,  4.])
    >>> top_k(2)(logits)
    tensor([[5., 2.],
            [4., 3.]])
"""

from .core.targets import Target, Targets, every, index, indices, logit_difference, per_example, scores, top_k

__all__ = [
    "Target",
    "Targets",
    "every",
    "index",
    "indices",
    "logit_difference",
    "per_example",
    "scores",
    "top_k",
]
