"""Guided backpropagation: gradients that pass a ReLU only where they are positive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.derivatives import EditGradient
from ..core.errors import SiteError
from ..core.explained import explained, target_gradients
from ..core.functional import Execution, FunctionalModel
from ..core.sites import Site, Want
from ..core.targets import Targets, check
from ..core.transforms import Sites, require_sites, resolve


def guided_backpropagation(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    at: Sites | None = None,
    sites: Sites | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Guided backpropagation: the gradient with its negative part cut off at the output of every ReLU.

        the cotangent below a ReLU at z:  1[z > 0] relu(cotangent above)

    It makes sharp pictures, but depends on the target little: for some networks it reconstructs the input (Nie et al., 2018).

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        at: sites to explain instead of the inputs.
        sites: where to cut. None: every call of `relu` and `relu6`, in place or not, by a module or inside a function, and
            every `nn.ReLU6` (known by the name of its class). Give addresses or patterns for others, such as `"**/gelu@*"` or
            a `clamp` that is meant as a ReLU, which are cut alike; then only these are.
        chunk_size: how many targets are pulled back at once; None for all. It bounds memory and does not change the result.

    Returns:
        In the structure of `inputs` (None in place of what has no gradient), or a TensorDict keyed by site for `at`; with a
        leading dimension T for plural targets.

    Raises:
        SiteError: the model runs no ReLU (captum returns the gradient then, and that of a functional ReLU always); otherwise
            as `capture`. InputError, TargetError, GradientError (grad mode is off). Warns for a model in train mode.

    Cost: one forward and T vmapped backward passes. Compiled, it cannot be differentiated by `vmap(grad(...))` (torch 2.13).

    Source: Springenberg et al., "Striving for Simplicity: The All Convolutional Net" (2014).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False)))
        >>> params["1", "weight"] = torch.tensor([[3.0, -3.0]])
        >>> guided_backpropagation(f, params, torch.ones(1, 2), targets=0)
        tensor([[3., 0.]])
    """
    require_positive("chunk_size", chunk_size, optional=True)
    check(targets)
    require_gradients("guided_backpropagation")
    require_sites(f)
    warn_if_stochastic(f, "guided_backpropagation")
    what = explained(guided(f, sites), params, inputs, at)
    gradients, _, plural = target_gradients(what, targets, chunk_size)
    return what.restructure(gradients if plural else [g[0] for g in gradients])


def guided(f: Any, sites: Sites | None) -> FunctionalModel:
    """The model with cotangents rectified at sites, or at all ReLUs."""
    wants = _relus(f) if sites is None else resolve(f, sites)
    return (_Guided if sites is None else EditGradient)(f, wants, dict.fromkeys(wants, torch.relu))


class _Guided(EditGradient):
    """Edits at whichever ReLUs run. No trace is needed to find them, so that it compiles."""

    def _run(self, params: Any, inputs: Any, extra: tuple, execution: Execution) -> Any:
        handler, extra = self._handler(extra)
        output = self.inner._run(params, inputs, extra, execution.within(handler))
        if not handler.reached:
            raise SiteError(
                "guided_backpropagation found no relu or relu6 in the model, so it would return the gradient; name the "
                "activations to rectify, as in sites='**/gelu@*' (tdhook.trace lists the operations), or use the gradient."
            )
        return output


@torch.compiler.assume_constant_result
def _relus(f: FunctionalModel) -> tuple[Want, ...]:
    kinds = f.base.blueprint.kinds
    wants = f.tree.resolve(["**/relu@*", "**/relu6@*"])
    six = [path for path in f.tree.paths if kinds.get(str(Site(path)) if path else "") == "ReLU6"]
    # Its forward is a hardtanh, which elsewhere is no ReLU.
    hardtanh = [Want(Site(path, "hardtanh", "*"), "nn.ReLU6", False) for path in six]
    return (*wants, *hardtanh)
