"""Layer-wise relevance propagation, for any model and any table of rules."""

from __future__ import annotations

from typing import Any

from ..core.targets import Targets
from ..core.transforms import Sites, exact_wants
from .absorbed import Ledger, absorbed_relevance
from .relevance import check_options, propagated, ready, ruled


def lrp(
    f: Any,
    params: Any,
    inputs: Any,
    *,
    rules: Any = None,
    targets: Targets = None,
    at: Sites | None = None,
    start: str = "value",
    absorbed: bool = False,
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
        absorbed: also tell which operation takes up how much relevance.
        chunk_size: how many targets (with `absorbed` also: pairs of a target and an example) are pulled back at once; None
            for all. It bounds memory and does not change the result.

    Returns:
        In the structure of `inputs` (None in place of what has no gradient), or a TensorDict keyed by site for `at`; with a
        leading dimension T for plural targets. It can be differentiated: then a second run gives the coefficients.

        With `absorbed` a `Ledger(relevance, absorbed)`. `absorbed` is a TensorDict from the address of each operation to a
        Tensor [B] ([T, B]): biases, class tokens and position embeddings at the operation that adds or joins them, norms,
        softmax, products and other functions that a rule does not conserve, the epsilon of rules. For every example the sum of
        its relevance and of all that is absorbed is F, if the rules are linear in the relevance (all but guided
        backpropagation and deconvnets) and examples do not see each other. With `at` only what lies after the sites counts;
        relevance that passes them by, to the inputs, is in neither part, and neither is what a write (`tdhook.intervene`) in
        `f` cuts off.

    Raises:
        RuleError: as `with_rules`; an input that a rule such as the z-box reads, and another operation too. InputError,
        TargetError, SiteError: as elsewhere. GradientError: grad mode is off. Warns for a model in train mode.

    Cost: one forward with rules and T vmapped backward passes; the first call with new shapes adds a run on fake tensors.
    `absorbed` adds a forward and B T backward passes.

    Source: Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation"
    (2015); Montavon et al., "Layer-Wise Relevance Propagation: An Overview" (2019).

    Examples:
        >>> from tdhook.attribution.rules import Epsilon
        >>> f, params = tdhook.functionalize(torch.nn.Linear(2, 1))
        >>> params["weight"], params["bias"] = torch.tensor([[3.0, 1.0]]), torch.tensor([4.0])
        >>> result = lrp(f, params, torch.tensor([[1.0, 2.0]]), rules={"linear": Epsilon(0.0)}, targets=0, absorbed=True)
        >>> result.relevance, result.absorbed["/linear"]
        (tensor([[3., 2.]]), tensor([4.]))
    """
    g = ruled(f, rules, "lrp")
    check_options(targets, start, chunk_size)
    g = ready(g, params, inputs)
    result = propagated(g, params, inputs, targets, at, start, chunk_size)
    if not absorbed:
        return result.structured()
    values = result.what.values
    cut = {} if at is None else dict(zip(exact_wants(g, at, "at"), values))
    taken = absorbed_relevance(g, params, inputs, targets, cut, start, chunk_size, values[0])
    return Ledger(result.structured(), taken)
