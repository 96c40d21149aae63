"""Targets of language models: one for each generated token, all read from the logits of one teacher-forced pass.

In a pass over a prompt and its continuation, the logits at position p - 1 predict the token at position p. With `start` the
position of the first generated token of L, there are G = L - start targets, and target g belongs to token `start + g`. They
are plural targets for any method: the result has one leading dimension G.

    method(f, params, ids, at="model.embed_tokens", targets=next_tokens(ids, start))

Examples:
    >>> logits = torch.tensor([[[0.0, 0.0], [3.0, 1.0], [5.0, 9.0]]])    # of three tokens of a vocabulary of two
    >>> next_tokens(torch.tensor([[0, 1, 0]]), 1)(logits)
    tensor([[0., 3.]])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import structure
from ..core.checks import require_positive
from ..core.compat import is_compiling, is_wrapped
from ..core.errors import InputError, TargetError
from ..core.targets import Target

QUANTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "logit": lambda logits: logits,
    "probability": lambda logits: logits.softmax(-1),
    "log_probability": lambda logits: logits.log_softmax(-1),
}


@dataclass(frozen=True, eq=False)
class TokenTarget(Target):
    """A callable from the output, which holds logits [B, L, V], to Tensor [B, G]."""

    def __call__(self, output: Any) -> Tensor:
        return self.choose(_logits(output, self.key))


def next_tokens(
    ids: Tensor,
    start: int,
    *,
    quantity: str = "logit",
    key: int | str = "logits",
    against: Tensor | None = None,
) -> TokenTarget:
    """How much the model expects each token from `start` on, given the tokens before it.

        F_g = q_{p-1}[ids_p]                        p = start + g
        F_g = q_{p-1}[ids_p] - q_{p-1}[against_g]   this token instead of that

    Args:
        ids: integer Tensor [B, L] (or [L] for an output [L, V]): the tokens that the model is run on.
        start: position of the first token to explain, from 1 to L - 1. With padding on the left it is the same for all.
        quantity: q: `"logit"`, `"probability"` or `"log_probability"`, of a softmax in at least float32.
        key: where the logits are in a structured output. An output that is a tensor is taken as it is.
        against: integer Tensor [B, G] or [G]: for every explained token another one that might have stood there. The
            difference of log-probabilities is that of logits.

    Returns:
        A target: output with logits [B, L, V] -> [B, G].

    Raises:
        InputError: ids or `against` that are no integers or of a wrong shape, `start` out of range, an unknown quantity.
            TargetError, when called: no such key, logits of another shape than ids (of the last position only, say), a token
            outside of the vocabulary.

    Cost: none beside that of the method. Pulling back G targets at once holds G tensors of the logits' shape.

    Examples:
        >>> logits = torch.tensor([[0.0, 0.0], [3.0, 1.0], [5.0, 9.0]])
        >>> ids = torch.tensor([0, 1, 0])
        >>> next_tokens(ids, 2, against=torch.tensor([1]))(logits)
        tensor([2.])
        >>> next_tokens(ids, 1, quantity="probability")(logits)
        tensor([0.5000, 0.8808])
    """
    if not isinstance(quantity, str) or quantity not in QUANTITIES:
        raise InputError(f"quantity={quantity!r} is unknown; choose one of {', '.join(map(repr, QUANTITIES))}.")
    _require_ids("ids", ids)
    _require_start(start, ids.shape[-1])
    tokens = ids[..., start:]
    if against is not None:
        _require_ids("against", against)
        if against.shape != tokens.shape and against.shape != tokens.shape[-1:]:
            raise InputError(
                f"against has shape {list(against.shape)} for the tokens {start} to {ids.shape[-1] - 1} of ids; give shape "
                f"{list(tokens.shape)} or {list(tokens.shape[-1:])}."
            )
        # here and not in the target, since a transform would hide the values of what is made inside it
        against = against.expand(tokens.shape)

    def choose(logits: Tensor) -> Tensor:
        if logits.shape[:-1] != ids.shape:
            raise TargetError(
                f"the logits have shape {list(logits.shape)} for ids of shape {list(ids.shape)}; the model has to return "
                "logits for every token that it is run on (in transformers logits_to_keep=0)."
            )
        values = QUANTITIES[quantity](_predicting(logits, start))
        chosen = _picked("ids", values, tokens)
        return chosen if against is None else chosen - _picked("against", values, against)

    return TokenTarget(choose, True, key)


def entropy(start: int, *, key: int | str = "logits") -> TokenTarget:
    """How uncertain the model is about each token from `start` on, given the tokens before it, in nats.

        F_g = -sum_v P_{p-1}(v) log P_{p-1}(v)      p = start + g

    Args:
        start: position of the first token whose distribution is explained, from 1 to L - 1.
        key: where the logits are in a structured output. An output that is a tensor is taken as it is.

    Returns:
        A target: output with logits [B, L, V] -> [B, G]. The output has to hold the logits of all L tokens: which ones they
        are cannot be told from them.

    Raises:
        InputError: `start` below 1. TargetError, when called: no such key, fewer than `start + 1` positions.

    Examples:
        >>> entropy(1)(torch.zeros(2, 4, 8))[0]                             # log 8
        tensor([2.0794, 2.0794, 2.0794])
    """
    require_positive("start", start)

    def choose(logits: Tensor) -> Tensor:
        log_p = _predicting(logits, start).log_softmax(-1)
        # A token that is ruled out by a logit of -inf adds nothing, where 0 * inf would be NaN.
        return -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(-1)

    return TokenTarget(choose, True, key)


def kl_divergence(reference_logits: Tensor, start: int, *, key: int | str = "logits") -> TokenTarget:
    """How far the model's distribution of each token from `start` on is from that of another run, in nats.

        F_g = KL(R_g || P_{p-1}) = sum_v R_g(v) (log R_g(v) - log P_{p-1}(v))       p = start + g

    Its gradient vanishes where both agree, so the reference comes from another context or another model. inseq's measure is
    KL(P || R), with the run that is explained first.

    Args:
        reference_logits: Tensor [B, L', V] (or one that broadcasts to it), the logits of a run that ends with the same G
            tokens; what is before them may be of another length. They are detached.
        start: position of the first token whose distribution is explained, from 1 to L - 1.
        key: where the logits are in a structured output. An output that is a tensor is taken as it is.

    Returns:
        A target: output with logits [B, L, V] -> [B, G].

    Raises:
        InputError: `start` below 1, reference logits that are no floating-point tensor [..., L', V]. TargetError, when called:
            no such key, fewer than `start + 1` positions, reference logits that are too short or of another shape.

    Examples:
        >>> logits = torch.randn(1, 5, 8)
        >>> kl_divergence(logits, 3)(logits).abs() < 1e-6
        tensor([[True, True]])
    """
    require_positive("start", start)
    if not isinstance(reference_logits, Tensor) or not reference_logits.is_floating_point() or reference_logits.ndim < 2:
        raise InputError(f"reference_logits is {structure.describe(reference_logits)}; give logits of shape [B, L, V].")
    reference = reference_logits.detach()

    def choose(logits: Tensor) -> Tensor:
        log_p = _predicting(logits, start).log_softmax(-1)
        count, vocabulary = log_p.shape[-2:]
        if reference.shape[-2] <= count or reference.shape[-1] != vocabulary:
            raise TargetError(
                f"reference_logits has shape {list(reference.shape)}; for {count} explained tokens of a vocabulary of "
                f"{vocabulary} give the logits of at least {count + 1} positions, which end with the same tokens."
            )
        log_r = _at_least_float32(reference[..., -count - 1 : -1, :]).log_softmax(-1).to(log_p.dtype)
        try:
            log_r = log_r.expand(log_p.shape)
        except RuntimeError:
            raise TargetError(
                f"reference_logits has shape {list(reference.shape)}, which does not fit logits of shape {list(logits.shape)}."
            ) from None
        # What the reference rules out adds nothing, whatever the model says of it.
        return (log_r.exp() * (log_r - log_p).masked_fill(log_r.isneginf(), 0.0)).sum(-1)

    return TokenTarget(choose, True, key)


def _logits(output: Any, key: int | str | None) -> Tensor:
    if not isinstance(output, Tensor) and key is not None:
        try:
            output = structure.get(output, key)
        except (LookupError, AttributeError):
            raise TargetError(f"key={key!r} is not in the output, which is {structure.describe(output)}.") from None
    if not isinstance(output, Tensor) or output.ndim not in (2, 3):
        raise TargetError(f"the targets need logits of shape [B, L, V], the output holds {structure.describe(output)}.")
    return output


def _predicting(logits: Tensor, start: int) -> Tensor:
    """The logits [B, G, V] that predict the tokens from `start` on."""
    length = logits.shape[-2]
    if start >= length:
        raise TargetError(
            f"start={start} is out of range for the logits of {length} positions; the model has to return logits for every "
            "token that it is run on (in transformers logits_to_keep=0)."
        )
    return _at_least_float32(logits[..., start - 1 : length - 1, :])


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _picked(name: str, values: Tensor, tokens: Tensor) -> Tensor:
    """The entries [B, G] of values [B, G, V] that belong to tokens [B, G]."""
    if not is_compiling() and not is_wrapped(tokens):
        wrong = tokens[(tokens < 0) | (tokens >= values.shape[-1])]
        if len(wrong):
            raise TargetError(f"{name} holds token {int(wrong[0])}, which is out of range for {values.shape[-1]} logits.")
    return values.gather(-1, tokens[..., None].long())[..., 0]


def _require_ids(name: str, ids: Any) -> None:
    integers = isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.is_complex()) and ids.dtype is not torch.bool
    if not integers or ids.ndim not in (1, 2):
        raise InputError(f"{name} is {structure.describe(ids)}; give token ids, an integer tensor of shape [B, L].")


def _require_start(start: Any, length: int) -> None:
    require_positive("start", start)
    if start >= length:
        raise InputError(f"start={start} is out of range for {length} tokens; it is the position of one that follows another.")
