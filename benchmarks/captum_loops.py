"""Captum as its documentation says: one call per target. Where the targets are too many, a few are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .case import Competitor

EACH = "captum, one call per target"
EXTRAPOLATED = f"{EACH}, extrapolated"
REPEATED = "captum, inputs repeated per target"


def loop(explain: Callable[[int], Any], targets: Sequence[int]) -> Any:
    """The results of one call per target, stacked."""
    return torch.stack([explain(target) for target in targets])


def looped(choices: Mapping[str, Callable[[int], Any]], targets: Sequence[int], timed: int) -> Competitor:
    """A call of captum per target.

    Args:
        choices: the settings, each with the call for one target.
        targets: all of them.
        timed: how many are run at most. They are spread evenly, and the time is scaled to all; the name then says so.
    """
    if len(targets) <= timed:
        return Competitor(EACH, {name: partial(loop, explain, targets) for name, explain in choices.items()})
    some = [i * len(targets) // timed for i in range(timed)]
    return Competitor(
        EXTRAPOLATED,
        {name: partial(loop, explain, [targets[i] for i in some]) for name, explain in choices.items()},
        view=lambda result: result[some],
        scale=len(targets) / timed,
        note="NOT MEASURED WHOLE: the loop is timed on a few targets (`timed` in the JSON) and the time is scaled linearly; "
        "agreement is checked on these, and the peak memory is that of these",
    )


def repeated(choices: Mapping[str, Callable[[Tensor, Tensor], Tensor]], x: Tensor, targets: Sequence[int]) -> Competitor:
    """One call of captum in which the inputs are repeated, each time with another target.

    Args:
        choices: the settings, each with the call for inputs [T * B, ...] and as many targets.
        x: the inputs [B, ...].
        targets: T of them.
    """

    def run(explain: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        several = x.repeat(len(targets), *[1] * (x.ndim - 1))
        chosen = torch.tensor(targets).repeat_interleave(len(x))
        return explain(several, chosen).unflatten(0, (len(targets), len(x)))

    return Competitor(
        REPEATED,
        {name: partial(run, explain) for name, explain in choices.items()},
        note="not in captum's documentation: T copies of the inputs, each with its own target; T forward passes all the same",
    )
