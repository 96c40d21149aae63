"""Propagation rules: other backward passes for operations (`tdhook.with_rules`), and tables of them."""

from ...core.rules import Affine, Entry, Operation, Rule, Rules, on
from .affine import AlphaBeta, Epsilon, Gamma, ZPlus
from .canonization import batch_norm_pairs, merge_batch_norm, zero_bias
from .deep_lift import Rescale, rescale
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
from .first_layer import Flat, WSquare, ZBox
from .normalization import FrozenScale
from .presets import (
    attn_lrp,
    beta_smooth,
    cp_lrp,
    deconvnet,
    epsilon_alpha2_beta1,
    epsilon_alpha2_beta1_flat,
    epsilon_gamma_box,
    epsilon_plus,
    epsilon_plus_flat,
    excitation_backprop,
    guided_backprop,
    relp,
    relp_ah,
)
from .report import Report, explain
from .reveal_cancel import RevealCancel, reveal_cancel

__all__ = [
    "Affine",
    "AlphaBeta",
    "Attention",
    "BetaSmooth",
    "Deconv",
    "Entry",
    "Epsilon",
    "Flat",
    "FrozenGate",
    "FrozenPattern",
    "FrozenScale",
    "Gamma",
    "Gradient",
    "Guided",
    "Identity",
    "Operation",
    "Pass",
    "Report",
    "Rescale",
    "RevealCancel",
    "Rule",
    "Rules",
    "Stop",
    "Uniform",
    "WSquare",
    "ZBox",
    "ZPlus",
    "attn_lrp",
    "batch_norm_pairs",
    "beta_smooth",
    "cp_lrp",
    "deconvnet",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_gamma_box",
    "epsilon_plus",
    "epsilon_plus_flat",
    "excitation_backprop",
    "explain",
    "guided_backprop",
    "merge_batch_norm",
    "on",
    "relp",
    "relp_ah",
    "rescale",
    "reveal_cancel",
    "zero_bias",
]
