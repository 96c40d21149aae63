"""Targets: which scalars of the output a method explains. The public names are in `tdhook.targets`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import structure
from .compat import is_compiling, is_wrapped
from .errors import TargetError

Targets = None | int | Sequence[int | Callable[[Any], Tensor]] | Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class Target:
    """A callable from the output to Tensor [B] or, where `plural`, [B, T]."""

    choose: Callable[[Tensor], Tensor]
    plural: bool
    key: int | str | None = None
    position: int | Tensor | None = None

    def __call__(self, output: Any) -> Tensor:
        return self.choose(scores(output, self.key, self.position))


def scores(output: Any, key: int | str | None = None, position: int | Tensor | None = None) -> Tensor:
    """The tensor [B, C] that a target chooses from.

    Args:
        output: of the model: Tensor [B, C], or [B, L, C] with `position`, or a structure of such with `key`.
        key: name or index in a structured output, such as `"logits"`.
        position: index along L, or Tensor [B] of one index per example.

    Raises:
        TargetError: there is no such key or position, or one is needed.
    """
    if key is not None:
        try:
            output = structure.get(output, key)
        except (LookupError, AttributeError):
            raise TargetError(f"key={key!r} is not in the output, which is {structure.describe(output)}.") from None
    if not isinstance(output, Tensor):
        keys = [k for k, _ in structure.entries(output)]
        hint = f"; pass key={keys[0]!r}, as in tdhook.targets.index(3, key={keys[0]!r})" if keys else ""
        raise TargetError(f"the output is {structure.describe(output)}, not a tensor{hint}.")
    if position is not None:
        output = _at_position(output, position)
    if output.ndim not in (1, 2):
        hint = "pass position=-1 for the last one" if output.ndim == 3 else "pass a function of the output"
        raise TargetError(f"targets choose from scores of shape [B, C], the output has shape {list(output.shape)}; {hint}.")
    return output


def _at_position(output: Tensor, position: int | Tensor) -> Tensor:
    if output.ndim < 2:
        raise TargetError(f"position={position!r} needs an output of shape [B, L, C], got {list(output.shape)}.")
    if isinstance(position, Tensor) and position.ndim == 1:
        if output.ndim != 3 or len(position) != len(output):
            raise TargetError(
                f"position has {len(position)} entries for an output of shape {list(output.shape)}; give one per example."
            )
        return output[torch.arange(len(output), device=output.device), position]
    length = output.shape[-2]
    if isinstance(position, int) and not -length <= position < length:
        raise TargetError(f"position={position} is out of range for {length} positions.")
    return output[..., position, :]


def _require_classes(name: str, classes: Sequence[int], count: int) -> None:
    for c in classes:
        if not -count <= c < count:
            raise TargetError(f"{name}={c} is out of range for an output with {count} classes.")


def _require_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TargetError(f"{name} is an int, got {structure.describe(value)}.")


def index(i: int, *, key: int | str | None = None, position: int | Tensor | None = None) -> Target:
    """One class for every example: output [B, C] -> [B]."""
    _require_int("index", i)

    def choose(out: Tensor) -> Tensor:
        _require_classes("index", (i,), out.shape[-1])
        return out[..., i]

    return Target(choose, False, key, position)


def indices(classes: Sequence[int], *, key: int | str | None = None, position: int | Tensor | None = None) -> Target:
    """Several classes for every example: output [B, C] -> [B, T]."""
    classes = tuple(classes)
    if not classes:
        raise TargetError("indices is empty; give at least one class.")
    for c in classes:
        _require_int("indices", c)

    def choose(out: Tensor) -> Tensor:
        _require_classes("indices", classes, out.shape[-1])
        return torch.stack([out[..., c] for c in classes], -1) if len(classes) < 32 else out[..., list(classes)]

    return Target(choose, True, key, position)


def per_example(classes: Tensor, *, key: int | str | None = None, position: int | Tensor | None = None) -> Target:
    """Classes of its own for each example: `classes` is an integer Tensor [B] or [B, T]; output [B, C] -> [B] or [B, T]."""
    integers = isinstance(classes, Tensor) and not (classes.dtype.is_floating_point or classes.dtype.is_complex)
    if not integers or classes.dtype is torch.bool or classes.ndim > 2:
        raise TargetError(f"per_example takes an integer tensor of shape [B] or [B, T], got {structure.describe(classes)}.")
    plural = classes.ndim == 2

    def choose(out: Tensor) -> Tensor:
        if classes.shape[: out.ndim - 1] != out.shape[:-1] or classes.ndim != out.ndim - 1 + plural:
            raise TargetError(f"per_example has shape {list(classes.shape)} for an output of shape {list(out.shape)}.")
        _require_values("per_example", classes, out.shape[-1])
        return out.gather(-1, classes.long()) if plural else out.gather(-1, classes[..., None].long())[..., 0]

    return Target(choose, plural, key, position)


def _require_values(name: str, classes: Tensor, count: int) -> None:
    """Range check of a tensor of classes, where its values can be looked at."""
    if is_compiling() or is_wrapped(classes):
        return
    wrong = classes[(classes < 0) | (classes >= count)]
    if len(wrong):
        raise TargetError(f"{name} holds class {int(wrong[0])}, which is out of range for an output with {count} classes.")


def logit_difference(
    a: int | Tensor, b: int | Tensor, *, key: int | str | None = None, position: int | Tensor | None = None
) -> Target:
    """Class `a` minus class `b`, each an int or an integer Tensor [B]: output [B, C] -> [B]."""
    first, second = (index(c) if isinstance(c, int) else per_example(c) for c in (a, b))
    return Target(lambda out: first.choose(out) - second.choose(out), False, key, position)


def top_k(k: int, *, key: int | str | None = None, position: int | Tensor | None = None) -> Target:
    """The k classes with the largest output, for each example its own: output [B, C] -> [B, k], largest first.

    They are those of the output at hand. Where a method runs the model on other inputs too (along a path, with features left
    out), fix the classes before: `per_example(f(params, inputs).topk(k).indices)`.
    """
    _require_int("top_k", k)

    def choose(out: Tensor) -> Tensor:
        if not 0 < k <= out.shape[-1]:
            raise TargetError(f"top_k={k} is out of range for an output with {out.shape[-1]} classes.")
        return out.gather(-1, out.detach().topk(k, dim=-1).indices)

    return Target(choose, True, key, position)


def every(*, key: int | str | None = None, position: int | Tensor | None = None) -> Target:
    """All classes: output [B, C] -> [B, C]."""
    return Target(lambda out: out, True, key, position)


def check(targets: Targets) -> None:
    """Raises `TargetError` for what can be no target, before anything runs."""
    if targets is None or callable(targets):
        return
    if isinstance(targets, Tensor):
        raise TargetError(
            "targets is a tensor, which could mean one class per example or the same classes for all; say "
            "tdhook.targets.per_example(tensor) or tensor.tolist()."
        )
    if isinstance(targets, Sequence) and not isinstance(targets, str):
        if not targets:
            raise TargetError("targets is empty; give at least one, or None for an output of one scalar per example.")
        for target in targets:
            if not callable(target):
                _require_int("an element of targets", target)
        return
    if not isinstance(targets, int) or isinstance(targets, bool):
        raise TargetError(
            f"targets is None, an int, a sequence or a function of the output, got {structure.describe(targets)}."
        )


def select(targets: Targets, output: Any) -> tuple[Tensor, bool]:
    """The target values as Tensor [*B, T], and whether there were several (then T is a dimension of the result)."""
    if targets is None:
        if not isinstance(output, Tensor) or output.ndim > 1:
            raise TargetError(
                "targets is None, which needs an output of one scalar per example, but the output is "
                f"{structure.describe(output)}; pass targets=..., such as a class index."
            )
        values, plural = output, False
    elif isinstance(targets, int):
        values, plural = index(targets)(output), False
    elif not callable(targets):
        if all(isinstance(t, int) for t in targets):
            values, plural = indices(targets)(output), True  # type: ignore[arg-type]
        else:
            parts = [select(t, output) for t in targets]
            if any(several for _, several in parts):
                raise TargetError("targets is a sequence with an element that gives several targets; give those one by one.")
            return torch.cat([v for v, _ in parts], -1), True
    else:
        values = targets(output)
        if not isinstance(values, Tensor) or values.ndim > 2:
            raise TargetError(f"targets returned {structure.describe(values)}; return a tensor of shape [B] or [B, T].")
        plural = targets.plural if isinstance(targets, Target) else values.ndim == 2
    if not values.is_floating_point():
        raise TargetError(f"the target values are {structure.describe(values)}; gradients need floating-point ones.")
    return (values, True) if plural else (values[..., None], False)


def count(targets: Targets) -> int | None:
    """How many targets there are, where that can be told without running the model."""
    if targets is None or isinstance(targets, int):
        return 1
    if not callable(targets):
        return len(targets)
    return 1 if isinstance(targets, Target) and not targets.plural else None
