"""Layer-wise relevance propagation, for any model and any table of rules."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.errors import InputError, RuleError
from ..core.explained import explained, target_gradients
from ..core.planning import absolute_inputs
from ..core.ruling import Ruled, plan_of, with_rules
from ..core.targets import Targets, check
from ..core.transforms import Sites, require_sites


def lrp(
    f: Any,
    params: Any,
    inputs: Any,
    *,
    rules: Any = None,
    targets: Targets = None,
    at: Sites | None = None,
    start: str = "value",
    chunk_size: int | None = None,
) -> Any:
    """Relevance of inputs, or of the values at sites, for scalars of the output.

        R_i = x_i * dF/dx_i  of the model with rules;    sum_i R_i + what is absorbed = F

    Args:
        f: functional model, with rules or without.
        params: its parameters.
        inputs: as `f` takes them.
        rules: a preset of `tdhook.attribution.rules` or a table (see `tdhook.with_rules`); None for those that `f` has.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        at: sites to explain instead of the inputs.
        start: the relevance that F starts with: `"value"` for F itself, `"one"` for 1.
        chunk_size: how many targets are pulled back at once; None for all. It bounds memory and does not change the result.

    Returns:
        In the structure of `inputs` (None in place of what has no gradient), or a TensorDict keyed by site for `at`; with a
        leading dimension T for plural targets. It can be differentiated: then a second run gives the coefficients.

    Raises:
        RuleError: as `with_rules`; an input that a rule such as the z-box reads, and another operation too. InputError,
        TargetError, SiteError: as elsewhere. GradientError: grad mode is off. Warns for a model in train mode.

    Cost: one forward with rules and T vmapped backward passes; the first call with new shapes adds a run on fake tensors.

    Source: Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation"
    (2015); Montavon et al., "Layer-Wise Relevance Propagation: An Overview" (2019).

    Examples:
        >>> from tdhook.attribution.rules import Epsilon
        >>> f, params = tdhook.functionalize(torch.nn.Linear(2, 1, bias=False))
        >>> params["weight"] = torch.tensor([[3.0, 1.0]])
        >>> lrp(f, params, torch.tensor([[1.0, 2.0]]), rules={"linear": Epsilon(0.0)}, targets=0)
        tensor([[3., 2.]])
    """
    g = _ruled(f, rules, "lrp")
    _check(targets, start, chunk_size)
    what = explained(_ready(g, params, inputs), params, inputs, at)
    as_they_are = _absolute(g, params, inputs) if at is None else frozenset()
    gradients, chosen, plural = target_gradients(what, targets, chunk_size)
    relevance = [_relevance(r, x, i in as_they_are) for i, (r, x) in enumerate(zip(gradients, what.values))]
    relevance = [_started(r, chosen, start) for r in relevance]
    return what.restructure(relevance if plural else [r[0] for r in relevance])


def _ruled(f: Any, rules: Any, method: str) -> Any:
    require_gradients(method)
    require_sites(f)
    warn_if_stochastic(f, method)
    if rules is not None:
        return with_rules(f, rules)
    if not isinstance(f, Ruled):
        raise RuleError("rules is None, and f has none; give a preset such as tdhook.attribution.rules.epsilon_plus().")
    return f


def _check(targets: Targets, start: str, chunk_size: int | None) -> None:
    require_positive("chunk_size", chunk_size, optional=True)
    check(targets)
    if start not in ("value", "one"):
        raise InputError(f"start is {start!r}; give 'value' (the relevance starts at F) or 'one'.")


def _ready(g: Any, params: Any, inputs: Any) -> Any:
    """The model with its coefficients taken from a run before, if the result is to be differentiated."""
    leaves = pytree.tree_flatten((params, inputs))[0]
    tracked = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
    return g.differentiable(params, inputs) if tracked and isinstance(g, Ruled) else g


def _absolute(g: Any, params: Any, inputs: Any) -> frozenset[int]:
    """Which inputs get the relevance itself as their gradient."""
    plan = plan_of(g, params, inputs)
    return frozenset() if plan is None else frozenset(absolute_inputs(plan))


def _relevance(gradient: Tensor, value: Tensor, absolute: bool) -> Tensor:
    return gradient if absolute else gradient * value


def _started(relevance: Tensor, chosen: Tensor, start: str) -> Tensor:
    if start == "value":
        return relevance
    scale = chosen.movedim(-1, 0)  # [T, *B]
    return relevance / scale.reshape(*scale.shape, *[1] * (relevance.ndim - scale.ndim))
