"""What an edit did: does the model say the new fact, does it in other words, and does it leave the rest alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import InputError
from .answers import Logits, log_probability, reading


class Preference(NamedTuple):
    """How the model ranks the target against the original, over all prompts.

    Attributes:
        success: Tensor [], fraction of prompts with p(target) > p(original).
        margin: Tensor [], mean of p(target) - p(original).
        top: Tensor [], fraction of prompts whose most likely class is the target.
    """

    success: Tensor
    margin: Tensor
    top: Tensor


class Specificity(NamedTuple):
    """What happened to prompts that an edit is not about, over all of them.

    Attributes:
        success: Tensor [], fraction of prompts with p(original) > p(target) after the edit.
        agreement: Tensor [], fraction of prompts whose most likely class is the same before and after.
        divergence: Tensor [], mean KL(before || after) in nats.
    """

    success: Tensor
    agreement: Tensor
    divergence: Tensor


class EditEvaluation(NamedTuple):
    """`efficacy` on the prompts of the edit, `paraphrase` (generalisation) and `specificity`, None where not asked for."""

    efficacy: Preference
    paraphrase: Preference | None
    specificity: Specificity | None


def efficacy(f: Any, params: Any, prompts: Any, *, target: int, original: int, logits: Logits | None = None) -> Preference:
    """How much a model prefers a target to the original answer; on paraphrases this is the paraphrase score.

        success = mean_n [p(target | prompt_n) > p(original | prompt_n)]

    Args:
        f: function of `(params, inputs)`.
        params: its parameters, edited or not.
        prompts: inputs of `f`, or a list of such.
        target: see `original`.
        original: classes (first tokens of the answers).
        logits: function of the output to Tensor [B, C], such as `lambda out: out.logits[:, -1]`; None where the output is
            logits.

    Returns:
        `Preference` with `success`, `margin` and `top`.

    Raises:
        InputError: no prompts. TargetError: classes out of range.

    Cost: a forward pass.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022), section 3.4.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Identity())
        >>> efficacy(f, params, torch.tensor([[0.0, 2.0], [1.0, 0.0]]), target=1, original=0).success
        tensor(0.5000)
    """
    scores = _all_logits(f, params, "prompts", prompts, logits)
    new, old = (log_probability(scores, c).exp() for c in (target, original))
    says = scores.argmax(-1) == target % scores.shape[-1]
    return Preference((new > old).to(new.dtype).mean(), (new - old).mean(), says.to(new.dtype).mean())


def specificity(
    f: Any, before: Any, after: Any, prompts: Any, *, target: int, original: int, logits: Logits | None = None
) -> Specificity:
    """How little an edit changed the answers to prompts that it is not about.

        success = mean_n [p(original | prompt_n) > p(target | prompt_n)], divergence = mean_n KL(before || after)

    Args:
        f: function of `(params, inputs)`.
        before: see `after`.
        after: its parameters.
        prompts: of neighbours of the subject, for which `original` holds; inputs of `f`, or a list of such.
        target: as in `efficacy`.
        original: as in `efficacy`.
        logits: as in `efficacy`.

    Returns:
        `Specificity` with `success`, `agreement` and `divergence`.

    Raises:
        InputError: as `efficacy`.

    Cost: two forward passes.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022), section 3.4.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Identity())
        >>> specificity(f, params, params, torch.tensor([[2.0, 0.0]]), target=1, original=0)
        Specificity(success=tensor(1.), agreement=tensor(1.), divergence=tensor(0.))
    """
    first, second = (_all_logits(f, p, "prompts", prompts, logits) for p in (before, after))
    new, old = (log_probability(second, c) for c in (target, original))
    same = first.argmax(-1) == second.argmax(-1)
    was, now = first.log_softmax(-1), second.log_softmax(-1)
    divergence = (was.exp() * (was - now)).sum(-1).mean()
    return Specificity((old > new).to(new.dtype).mean(), same.to(new.dtype).mean(), divergence)


def evaluate_edit(
    f: Any,
    before: Any,
    after: Any,
    prompts: Any,
    *,
    target: int,
    original: int,
    paraphrases: Any = None,
    neighbours: Any = None,
    logits: Logits | None = None,
) -> EditEvaluation:
    """Efficacy, paraphrase (generalisation) and specificity of an edit.

    Args:
        f: function of `(params, inputs)`.
        before: see `after`.
        after: its parameters.
        prompts: of the edit; inputs of `f`, or a list of such.
        target: as in `efficacy`.
        original: as in `efficacy`.
        logits: as in `efficacy`.
        paraphrases: the same fact in other words; None leaves it out.
        neighbours: other subjects, for which `original` holds; None leaves it out.

    Returns:
        `EditEvaluation`.

    Raises:
        InputError: as `efficacy`.

    Cost: a forward pass for prompts and paraphrases, two for neighbours.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022), section 3.4.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Identity())
        >>> evaluate_edit(f, params, params, torch.tensor([[0.0, 2.0]]), target=1, original=0).efficacy.top
        tensor(1.)
    """
    options: Any = {"target": target, "original": original, "logits": logits}
    return EditEvaluation(
        efficacy(f, after, prompts, **options),
        None if paraphrases is None else efficacy(f, after, paraphrases, **options),
        None if neighbours is None else specificity(f, before, after, neighbours, **options),
    )


def _all_logits(f: Any, params: Any, name: str, prompts: Any, logits: Logits | None) -> Tensor:
    """Tensor [N, C] of the prompts of all batches."""
    batches = prompts if isinstance(prompts, list) else [prompts]
    if not batches:
        raise InputError(f"{name} is empty; give at least one prompt.")
    read = reading(logits)
    return torch.cat([read(f(params, inputs)) for inputs in batches])
