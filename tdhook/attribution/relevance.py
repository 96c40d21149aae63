"""What methods that propagate relevance share: the model with rules, and the relevance of tensors as a list."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.errors import InputError, RuleError
from ..core.explained import Explained, explained, target_gradients
from ..core.plan import absolute_inputs
from ..core.ruling import Ruled, plan_of, with_rules
from ..core.targets import Targets, check
from ..core.transforms import Sites, require_sites


def ruled(f: Any, rules: Any, method: str) -> Any:
    """`f` with rules, its own if `rules` is None.

    Raises:
        RuleError: there are none. ModelError, GradientError: as elsewhere. Warns for a model in train mode.
    """
    require_gradients(method)
    require_sites(f)
    warn_if_stochastic(f, method)
    if rules is not None:
        return with_rules(f, rules)
    if not isinstance(f, Ruled):
        raise RuleError(
            "rules is None, and f is not what tdhook.with_rules returned; give a preset such as "
            "tdhook.attribution.rules.epsilon_plus(), or put with_rules around the other transforms."
        )
    return f


def check_options(targets: Targets, start: str, chunk_size: int | None) -> None:
    """Raises `TargetError` or `InputError` for what cannot be meant."""
    require_positive("chunk_size", chunk_size, optional=True)
    check(targets)
    if start not in ("value", "one"):
        raise InputError(f"start is {start!r}; give 'value' (the relevance starts at F) or 'one'.")


def ready(g: Any, params: Any, inputs: Any) -> Any:
    """The model with its coefficients taken from a run before, if the result is to be differentiated."""
    leaves = pytree.tree_flatten((params, inputs))[0]
    tracked = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
    return g.differentiable(params, inputs) if tracked and isinstance(g, Ruled) else g


class Propagated(NamedTuple):
    """Relevance of tensors.

    Attributes:
        values: [T, *shape] for each of them.
        what: the tensors.
        chosen: the scalars F, [*B, T].
        plural: whether T belongs to the result.
    """

    values: list[Tensor]
    what: Explained
    chosen: Tensor
    plural: bool

    def structured(self) -> Any:
        """The relevance in the structure of what is explained."""
        return self.what.restructure(self.values if self.plural else [r[0] for r in self.values])


def propagated(
    g: Any, params: Any, inputs: Any, targets: Targets, at: Sites | None, start: str, chunk_size: int | None
) -> Propagated:
    """The relevance of the inputs, or of the values at sites, of a model with rules."""
    what = explained(g, params, inputs, at)
    plan = plan_of(g, params, inputs) if at is None else None
    as_they_are = frozenset() if plan is None else frozenset(absolute_inputs(plan))
    gradients, chosen, plural = target_gradients(what, targets, chunk_size)
    values = [r if i in as_they_are else r * value for i, (r, value) in enumerate(zip(gradients, what.values))]
    return Propagated([started(r, chosen, start) for r in values], what, chosen, plural)


def started(relevance: Tensor, chosen: Tensor, start: str) -> Tensor:
    """Relevance [T, *B, ...] that starts with F, or with 1 instead."""
    if start == "value":
        return relevance
    scale = chosen.movedim(-1, 0)  # [T, *B]
    return relevance / scale.reshape(*scale.shape, *[1] * (relevance.ndim - scale.ndim))
