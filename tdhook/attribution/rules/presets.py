"""Tables of rules under the names that the field gives them. `{...} + preset()` puts lines of one's own first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...core.rules import Operation, Rule, Rules, on
from .affine import AlphaBeta, Epsilon, Gamma, ZPlus
from .elementwise import (
    Attention,
    BetaSmooth,
    Deconv,
    FrozenGate,
    FrozenPattern,
    Gradient,
    Guided,
    Identity,
    Pass,
    Stop,
    Uniform,
)
from .first_layer import Flat, ZBox
from .normalization import FrozenScale

# What norms are when they are written out: the scale is the result of one of these.
_SCALES = ("rsqrt", "sqrt", "std", "norm", "vector_norm")


def _convolutional(convolution: Rule, linear: Rule, first: Sequence[Any] = ()) -> Rules:
    """Rules of one kind for convolutions and of another for linear layers; everything else passes on."""
    return Rules(
        (
            *first,
            on("convolution", convolution),
            on("linear", linear),
            on(("activation", "batch_norm"), Pass()),
            on("maximum", Gradient()),
        )
    )


def epsilon_plus(epsilon: float = 1e-6) -> Rules:
    """z+ for convolutions, epsilon for linear layers.

    Source: Kohlbrenner et al., "Towards Best Practice in Explaining Neural Network Decisions with LRP" (2020).
    """
    return _convolutional(ZPlus(), Epsilon(epsilon))


def epsilon_plus_flat(epsilon: float = 1e-6) -> Rules:
    """`epsilon_plus` with the flat rule for the first layer that runs."""
    return _convolutional(ZPlus(), Epsilon(epsilon), [_first(Flat())])


def epsilon_alpha2_beta1(epsilon: float = 1e-6) -> Rules:
    """alpha = 2, beta = 1 for convolutions, epsilon for linear layers.

    Source: Kohlbrenner et al. (2020).
    """
    return _convolutional(AlphaBeta(2.0, 1.0), Epsilon(epsilon))


def epsilon_alpha2_beta1_flat(epsilon: float = 1e-6) -> Rules:
    """`epsilon_alpha2_beta1` with the flat rule for the first layer that runs."""
    return _convolutional(AlphaBeta(2.0, 1.0), Epsilon(epsilon), [_first(Flat())])


def epsilon_gamma_box(
    low: float | Sequence[float] | Tensor, high: float | Sequence[float] | Tensor, *, epsilon: float = 1e-6, gamma: float = 0.25
) -> Rules:
    """gamma for convolutions, epsilon for linear layers, z-box for the first convolution that runs.

    Source: Anders et al., "Software for Dataset-wide XAI: From Local Explanations to Global Insights with Zennit, CoRelAy, and
    ViRelAy" (2021).
    """
    return _convolutional(Gamma(gamma), Epsilon(epsilon), [on("convolution", ZBox(low=low, high=high), first=True)])


def _first(rule: Rule) -> Any:
    return on(("convolution", "linear"), rule, first=True)


def excitation_backprop() -> Rules:
    """z+ for convolutions and linear layers.

    Source: Zhang et al., "Top-down Neural Attention by Excitation Backprop" (2016).
    """
    return Rules((on(("convolution", "linear"), ZPlus()),))


def guided_backprop() -> Rules:
    """Guided ReLUs, gradients elsewhere."""
    return Rules((on(("relu", "relu6"), Guided()),))


def deconvnet() -> Rules:
    """The ReLUs of a deconvnet, gradients elsewhere."""
    return Rules((on(("relu", "relu6"), Deconv()),))


def beta_smooth(beta: float = 10.0) -> Rules:
    """ReLUs with the derivatives of a softplus, gradients elsewhere."""
    return Rules((on("relu", BetaSmooth(beta)),))


def _is_root(operation: Operation) -> bool:
    exponent = (*operation.args, *operation.kwargs.values())[-1]
    return isinstance(exponent, float) and abs(exponent) == 0.5


def _transformer(*lines: Any) -> Rules:
    return Rules(
        (
            *lines,
            on("normalization", FrozenScale()),
            on(_SCALES, Stop()),
            on("pow", Stop(), where=_is_root),
            on("activation", Identity()),
            on("maximum", Gradient()),
        )
    )


def attn_lrp(epsilon: float = 1e-6) -> Rules:
    """AttnLRP: products shared evenly, softmax by its Taylor expansion (which is its gradient), norms with a frozen scale.

    Source: Achtibat et al., "AttnLRP" (2024).
    """
    return _transformer(
        on(("linear", "convolution"), Epsilon(epsilon)),
        on("softmax", Gradient()),
        on("attention", Attention()),
        on(("matmul", "product"), Uniform()),
    )


def cp_lrp(epsilon: float = 1e-6) -> Rules:
    """CP-LRP: attention patterns and gates are constants, norms have a frozen scale.

    Source: Ali et al., "XAI for Transformers" (2022); the gates as in Achtibat et al. (2024).
    """
    return _transformer(
        on(("linear", "convolution"), Epsilon(epsilon)),
        on("softmax", Stop()),
        on("attention", FrozenPattern()),
        on("product", FrozenGate()),
        on("matmul", Uniform()),
    )


def relp() -> Rules:
    """RelP: norms with a frozen scale, activations by the identity rule, gates by the half rule; the gradient elsewhere.

    Source: Rezaei Jafari et al., "RelP" (2025).
    """
    return _transformer(
        on(("softmax", "attention", "matmul", "linear", "convolution"), Gradient()),
        on("product", Uniform()),
    )


def relp_ah() -> Rules:
    """RelP with frozen attention patterns (AH-rule).

    Source: Rezaei Jafari et al. (2025); Ali et al. (2022).
    """
    return Rules((on("softmax", Stop()), on("attention", FrozenPattern()))) + relp()
