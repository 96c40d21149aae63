"""Direct logit attribution: the part of a logit that each component of the residual stream contributes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from ...core import targets as core_targets
from ...core.batching import pull_each
from ...core.checks import require_gradients, require_positive
from ...core.functional import FunctionalModel
from ...core.targets import Targets
from ..names import Names
from .decomposition import _sites, components_of
from .stream import frozen_tail, named, read, require_sum


class LogitAttribution(NamedTuple):
    """The parts of a target.

    Attributes:
        components: Tensor [C, B], or [T, C, B] for several targets; `component_labels` names them.
        bias: Tensor [B] or [T, B], what no component contributes: biases of final norm and unembedding.
    """

    components: Tensor
    bias: Tensor


def direct_logit_attribution(
    f: FunctionalModel,
    params: Any,
    inputs: Any,
    *,
    targets: Targets,
    names: Names | None = None,
    heads: bool = False,
    chunk_size: int | None = None,
) -> LogitAttribution:
    """How much each component of the residual stream adds to a logit, directly.

        logit = sum_c  < component_c, w >  +  bias,    w = gradient of the logit at the last residual

    taken with the scale of the final norm held fixed. The norm is then affine, so that the parts sum to the target exactly.
    What a nonlinearity after the norm (the cap of Gemma 2, the head of a masked language model) or in a target (a probability)
    leaves over is in `bias`.

    Args:
        f: functional model whose stream is a sum (`names.norm` is not `"post"`).
        params: its parameters.
        inputs: as `f` takes them, B examples.
        targets: what to explain, of the output of `f`: `tdhook.targets.logit_difference(a, b, key="logits", position=-1)`.
        names: standard names; None to find them.
        heads: attention by heads, as in `residual_decomposition`.
        chunk_size: how many targets at once.

    Returns:
        `LogitAttribution`; plural targets add a leading dimension.

    Raises:
        SiteError: as `residual_decomposition`; no norm before the unembedding. TargetError: a target that does not fit.
        GradientError: grad mode is off.

    Cost: one forward pass, and a forward and T backward passes through what follows the last block.

    Source: Elhage et al. (2021); Wang et al., "Interpretability in the Wild" (2023), section 3.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> f, params = tdhook.functionalize(GPT2LMHeadModel(config).eval(), use_cache=False)
        >>> ids = {"input_ids": torch.tensor([[1, 2, 3]])}
        >>> target = tdhook.targets.index(5, key="logits", position=-1)
        >>> parts = direct_logit_attribution(f, params, ids, targets=target)
        >>> torch.allclose(parts.components.sum(0) + parts.bias, f(params, ids).logits[:, -1, 5])
        True
    """
    core_targets.check(targets)
    require_positive("chunk_size", chunk_size, optional=True)
    require_gradients("direct_logit_attribution")
    found = named(f, params, inputs, names)
    require_sum(found, "direct_logit_attribution")
    sites = _sites(found, heads)
    _, values = read(f, params, inputs, sites)
    components = components_of(params, found, dict(zip(sites, values)), heads, None)
    final = values[sites.index(found.residual_post[-1])]
    finish = frozen_tail(f, params, inputs, found)
    plural = False

    def chosen(value: Tensor) -> Tensor:
        nonlocal plural
        scalars, plural = core_targets.select(targets, finish(value))
        return scalars

    scalars, pull = vjp(chosen, final)[:2]
    directions = pull_each(lambda weights: pull(weights)[0], scalars, scalars.new_ones(1), chunk_size)
    parts = torch.einsum("cbn,tbn->tcb", components.flatten(2), directions.flatten(2))
    bias = scalars.movedim(-1, 0) - parts.sum(1)
    return LogitAttribution(parts, bias) if plural else LogitAttribution(parts[0], bias[0])
