"""Which tokens every generated token comes from: one matrix for each example, from one teacher-forced pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ..core.checks import require_positive
from ..core.compat import is_compiling, is_wrapped
from ..core.errors import InputError, SiteError, TdhookWarning
from ..core.functional import FunctionalModel
from ..core.structure import describe
from ..core.transforms import exact_wants, require_sites
from ..core.twin import argument_names
from .saliency import input_x_gradient
from .token_targets import QUANTITIES, TokenTarget, entropy, next_tokens

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda attributions: attributions.sum(-1),
    "norm": lambda attributions: torch.linalg.vector_norm(attributions, dim=-1),
    "absolute_sum": lambda attributions: attributions.abs().sum(-1),
}


def sequence_attribution(
    f: Any,
    params: Any,
    inputs: Any,
    *,
    at: Any,
    start: int,
    method: Callable = input_x_gradient,
    quantity: str | TokenTarget = "logit",
    against: Tensor | None = None,
    reduce: str | Callable[[Tensor], Tensor] = "sum",
    ids: Tensor | None = None,
    key: int | str = "logits",
    chunk_size: int | None = None,
) -> Tensor:
    """The attribution of every generated token to the tokens before it, earlier generated ones included.

        A[b, g, l] = reduce_d method(F_g)[b, l, d]      F_g: the quantity of token start + g, d: the axis of the embedding

    The model runs once over prompt and continuation, and each target is pulled back through that one run: a causal model
    computes for each token what it would compute if the text ended there.

    Args:
        f: functional model of a causal language model: ids [B, L] -> logits [B, L, V].
        params: its parameters.
        inputs: as `f` takes them: ids, a tuple that begins with them, or a mapping with `input_ids` and, for texts of several
            lengths, an `attention_mask` [B, L] that is 0 for padding.
        at: the site of the embedding, `"model.embed_tokens"` say, or another that holds [B, L, D].
        start: position of the first generated token, from 1 to L - 1; the same for all examples, as with padding on the left.
        method: a function with the signature of the library's methods: `saliency`,
            `functools.partial(integrated_gradients, baselines=other_ids, steps=20)`. With one group for each token,
            `partial(feature_ablation, baselines={site: 0.0}, groups={site: torch.arange(L)[:, None]})`, there is nothing left
            for `reduce` to do.
        quantity: what of each generated token is explained: `"logit"`, `"probability"`, `"log_probability"`, `"entropy"`, or
            a target with G columns, such as `kl_divergence(reference_logits, start)`.
        against: integer Tensor [B, G] or [G]: explain this token instead of that, see `next_tokens`.
        reduce: over the embedding axis: `"sum"` (keeps the sign, and completeness), `"norm"` (of length 2), `"absolute_sum"`,
            or a function [G, B, L, D] -> [G, B, L].
        ids: integer Tensor [B, L], where the inputs do not show which tensor they are.
        key: where the logits are in a structured output. An output that is a tensor is taken as it is.
        chunk_size: how many generated tokens (or what the method counts) are pulled back at once; None leaves it to the method.
            It does not change the result.

    Returns:
        Tensor [B, G, L] with G = L - start: row g for token `start + g`, column l for the token at l. In a causal model no
        prediction depends on the token itself or on later ones: columns from `start + g` on are exact zeros of the gradient.
        They are not written, so that a model that looks ahead shows it. Rows and columns of padding are 0.

    Raises:
        InputError: no ids, a mask of another shape than ids, a bad option, a method that returns anything but one tensor
            [G, B, L, D]. ModelError, SiteError, TargetError, GradientError as the method and `next_tokens`. Warns where padding
            comes before the text and the model takes no `position_ids`.

    Padding does not change what is computed for real tokens. Positions would: where it comes before the text, `position_ids`
    that count the tokens of the mask are added to the inputs of a model that takes them, as generation does. Give them yourself
    for a model that counts otherwise, or together with baselines in the structure of the inputs.

    Cost: that of the method for G targets; for `input_x_gradient` one forward pass, another from the site on, and G backward
        passes, vmapped. A loop over tokens takes G of each.

    inseq takes the norm and divides each row by its sum: `scores / scores.sum(-1, keepdim=True)` with `reduce="norm"`; its
    quantity is the probability.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)))
        >>> ids = torch.tensor([[3, 1, 4, 1]])
        >>> scores = sequence_attribution(f, params, ids, at="0", start=2)
        >>> scores != 0                                   # this model sees the last token only
        tensor([[[False,  True, False, False],
                 [False, False,  True, False]]])
        >>> torch.allclose(scores.sum(-1)[0, 0], f(params, ids)[0, 1, 4])
        True
    """
    require_sites(f)
    if len(wants := exact_wants(f, at, "at")) != 1:
        raise SiteError(f"at means {len(wants)} sites; give the one of the embedding.")
    if not callable(method):
        raise InputError(f"method is {describe(method)}; give an attribution function such as tdhook.attribution.saliency.")
    if not callable(reduce) and not (isinstance(reduce, str) and reduce in REDUCTIONS):
        raise InputError(f"reduce={reduce!r} is unknown; choose one of {', '.join(map(repr, REDUCTIONS))} or give a function.")
    require_positive("chunk_size", chunk_size, optional=True)
    tokens = _ids(inputs) if ids is None else ids
    targets = _targets(tokens, start, quantity, against, key)
    real = _real(inputs, tokens)
    if real is not None:
        inputs = _with_positions(f, inputs, real)
    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    attributions = _one_tensor(method(f, params, inputs, targets=targets, at=at, **options))
    shape = (tokens.shape[-1] - start, *tokens.shape)
    if attributions.shape == shape:  # of groups, one for each token
        scores = attributions
    elif attributions.shape[:-1] == shape:
        scores = reduce(attributions) if callable(reduce) else REDUCTIONS[reduce](attributions)
    else:
        raise InputError(
            f"method returned {describe(attributions)} where shape {[*shape, 'D']} is expected; at has to hold one vector for "
            "each token, and quantity one value for each generated token."
        )
    if not isinstance(scores, Tensor) or scores.shape != shape:
        raise InputError(f"reduce returned {describe(scores)} where a tensor of shape {list(shape)} is expected.")
    scores = scores.movedim(0, -2)
    if real is None:
        return scores
    return torch.where(real[..., start:, None] & real[..., None, :], scores, torch.zeros_like(scores))


def _targets(ids: Any, start: int, quantity: Any, against: Tensor | None, key: int | str) -> TokenTarget:
    named = isinstance(quantity, str) and quantity in QUANTITIES
    by_token = next_tokens(ids, start, quantity=quantity if named else "logit", against=against, key=key)
    if named:
        return by_token
    if against is not None:
        raise InputError(f"against has no meaning with quantity={describe(quantity)}; leave one of them out.")
    if quantity == "entropy":
        return entropy(start, key=key)
    if not callable(quantity):
        known = ", ".join(map(repr, [*QUANTITIES, "entropy"]))
        raise InputError(f"quantity={quantity!r} is unknown; choose one of {known} or give a target with G columns.")
    return quantity


def _ids(inputs: Any) -> Any:
    if isinstance(inputs, (Mapping, TensorDictBase)):
        if "input_ids" in inputs.keys():
            return inputs["input_ids"]
    elif isinstance(inputs, tuple) and inputs:
        return inputs[0]
    elif isinstance(inputs, Tensor):
        return inputs
    raise InputError(f"inputs is {describe(inputs)}, which does not show where the token ids are; pass them as ids=.")


def _real(inputs: Any, ids: Tensor) -> Tensor | None:
    """Which tokens are no padding, Tensor [B, L] of bool; None where there is no mask."""
    mask = inputs.get("attention_mask", None) if isinstance(inputs, (Mapping, TensorDictBase)) else None
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise InputError(
            f"attention_mask is {describe(mask)} for ids of shape {list(ids.shape)}; give one number for each, 0 for padding."
        )
    return mask != 0


def _with_positions(f: FunctionalModel, inputs: Any, real: Tensor) -> Any:
    """The inputs with positions that begin at the first real token, where that is not the first column."""
    if inputs.get("position_ids", None) is not None or "position_ids" in f.base.constants:
        return inputs
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    if not is_compiling() and not is_wrapped(real):
        columns = torch.arange(real.shape[-1], device=real.device)
        if not bool(((positions != columns) & real).any()):
            return inputs
    if not _takes_positions(f):
        warnings.warn(
            "sequence_attribution: inputs have padding before the text, and the model takes no position_ids; unless it counts "
            "positions by the mask, its output depends on the padding. Pad behind the text.",
            TdhookWarning,
            stacklevel=3,
        )
        return inputs
    if isinstance(inputs, TensorDictBase):
        return inputs.copy().set("position_ids", positions)
    return {**inputs, "position_ids": positions}


@torch.compiler.assume_constant_result
def _takes_positions(f: FunctionalModel) -> bool:
    model: Any = type(f.base.blueprint.template.root)
    return "position_ids" in argument_names(model)


def _one_tensor(result: Any) -> Tensor:
    if isinstance(result, (Mapping, TensorDictBase)) and len(result.keys()) == 1:
        result = next(iter(result.values()))
    if not isinstance(result, Tensor):
        raise InputError(
            f"method returned {describe(result)} where a TensorDict with one site is expected; choose it: "
            "method=lambda *args, **options: method(*args, **options).attributions, say."
        )
    return result
