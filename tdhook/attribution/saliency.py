"""Plain gradients, and gradients times what they are taken at: of inputs and of activations, for many targets at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.explained import explained, target_gradients
from ..core.targets import Targets, check
from ..core.transforms import Sites


def saliency(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    at: Sites | None = None,
    absolute: bool = True,
    chunk_size: int | None = None,
) -> Any:
    """The gradient of targets with respect to inputs or activations, without its sign.

        attribution_i = |dF/dx_i|

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them. Gradients are those of all floating-point tensors; others are passed through.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        at: sites: the gradients are those of the activations there. Of two sites, one after the other, both have their total
            derivative: the earlier one acts through the later one too.
        absolute: False keeps the sign: the plain gradient.
        chunk_size: how many targets are pulled back at once; None for all. It does not change the result.

    Returns:
        Gradients in the structure of `inputs` (None in place of what is no floating-point tensor), or a TensorDict keyed by
        site for `at`; each has the shape of what it is the gradient of, with a leading dimension T for plural targets. The
        maximum over colour channels that the paper draws is `.amax(-3)` of it.

    Raises:
        InputError: integer inputs without `at`, a bad `chunk_size`. TargetError, SiteError, GradientError (grad mode is off).
            Warns for a model in train mode.

    Cost: one forward pass, whatever the number of targets, and T backward passes, vmapped, for all sites together. With `at`
    the forward runs once more, from the first site on.

    Source: Simonyan, Vedaldi, Zisserman, "Deep Inside Convolutional Networks" (2013).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2))
        >>> gradients = saliency(f, params, torch.randn(4, 3), targets=[0, 1])
        >>> torch.equal(gradients, params["weight"].abs()[:, None].expand(2, 4, 3))
        True
    """
    require_positive("chunk_size", chunk_size, optional=True)
    check(targets)
    require_gradients("saliency")
    warn_if_stochastic(f, "saliency")
    what = explained(f, params, inputs, at)
    gradients, _, plural = target_gradients(what, targets, chunk_size)
    results = [g.abs() for g in gradients] if absolute else gradients
    return what.restructure(results if plural else [r[0] for r in results])


def input_x_gradient(
    f: Callable,
    params: Any,
    inputs: Any,
    *,
    targets: Targets = None,
    at: Sites | None = None,
    chunk_size: int | None = None,
) -> Any:
    """The gradient of targets times the inputs, or with `at` times the activations (gradient x activation).

        attribution_i = x_i * dF/dx_i

    Args:
        f: pure function of (params, inputs); a functional model where `at` is used.
        params: its parameters.
        inputs: as `f` takes them. All floating-point tensors are explained; others are passed through.
        targets: which scalars F of the output to explain; see `tdhook.targets`. None: the output is Tensor [B].
        at: sites whose activations are explained instead of the inputs; as many as wanted, in one backward. Of two sites, one
            after the other, both have their total derivative.
        chunk_size: how many targets are pulled back at once; None for all. It does not change the result.

    Returns:
        Attributions in the structure of `inputs` (None in place of what is no floating-point tensor), or a TensorDict keyed by
        site for `at`; each has the shape of what it explains, with a leading dimension T for plural targets.

    Raises:
        InputError: integer inputs without `at`, a bad `chunk_size`. TargetError, SiteError, GradientError (grad mode is off).
            Warns for a model in train mode.

    Cost: as `saliency`.

    Source: Shrikumar et al., "Not Just a Black Box: Learning Important Features Through Propagating Activation Differences"
    (2016).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.ReLU()))
        >>> x = torch.randn(4, 3)
        >>> attributions = input_x_gradient(f, params, x, targets=1)
        >>> torch.allclose(attributions.sum(-1), f(params, x)[:, 1], atol=1e-6)
        True
    """
    require_positive("chunk_size", chunk_size, optional=True)
    check(targets)
    require_gradients("input_x_gradient")
    warn_if_stochastic(f, "input_x_gradient")
    what = explained(f, params, inputs, at)
    gradients, _, plural = target_gradients(what, targets, chunk_size)
    products = [g * value for g, value in zip(gradients, what.values)]
    return what.restructure(products if plural else [p[0] for p in products])
