"""Deconvnets: the backward pass of a network with ReLUs applied to what flows back."""

from __future__ import annotations

from typing import Any

from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.explained import explained, target_gradients
from ..core.rules import Operation, Rules, on
from ..core.ruling import with_rules
from ..core.targets import Targets, check
from ..core.transforms import Sites, require_sites
from .rules.elementwise import Deconv


def deconvnet(
    f: Any,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    at: Sites | None = None,
    sites: str | None = None,
    chunk_size: int | None = None,
) -> Any:
    """The gradient with the derivative of each ReLU replaced by a ReLU of what flows back.

        the cotangent below a ReLU:  relu(cotangent above),  whatever its operand

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        at: sites to explain instead of the inputs.
        sites: where. None: every call of `relu`, `relu6` and `nn.ReLU6`. A pattern of modules or operations for others, such
            as `"**/gelu@*"`.
        chunk_size: how many targets are pulled back at once; None for all. It bounds memory and does not change the result.

    Returns:
        In the structure of `inputs` (None in place of what has no gradient), or a TensorDict keyed by site for `at`; with a
        leading dimension T for plural targets.

    Raises:
        RuleError: there is no such operation. InputError, TargetError, SiteError: as elsewhere. GradientError: grad mode is
            off. Warns for a model in train mode.

    Cost: one forward and T vmapped backward passes.

    Source: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks" (2014).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False)))
        >>> params["1", "weight"] = torch.tensor([[3.0, -3.0]])
        >>> deconvnet(f, params, -torch.ones(1, 2), targets=0)
        tensor([[3., 0.]])
    """
    require_positive("chunk_size", chunk_size, optional=True)
    check(targets)
    require_gradients("deconvnet")
    require_sites(f)
    warn_if_stochastic(f, "deconvnet")
    what = explained(with_rules(f, _RELUS if sites is None else {sites: Deconv()}), params, inputs, at)
    gradients, _, plural = target_gradients(what, targets, chunk_size)
    return what.restructure(gradients if plural else [g[0] for g in gradients])


def _is_relu6(operation: Operation) -> bool:
    given = dict(zip(("input", "min_val", "max_val"), operation.args)) | dict(operation.kwargs)
    return given.get("min_val") == 0 and given.get("max_val") == 6


_RELUS = Rules((on(("relu", "relu6"), Deconv()), on("hardtanh", Deconv(), where=_is_relu6)))
