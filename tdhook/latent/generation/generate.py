"""Generation: a functional language model, with all that was done to it, run token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.checks import require_positive, warn_if_stochastic
from ...core.compat import visible
from ...core.errors import InputError
from ...core.functional import FunctionalModel
from ...core.progress import Progress
from ...core.structure import describe
from ..steering.positions import Where
from ..steering.prompts import accepted
from .outputs import cache_in, last_logits, require_numbers, unwrapped
from .placing import place
from .prompts import Prompt, positions_of_model, read_prompt
from .sampling import Sampling


class Generation(NamedTuple):
    """What was generated.

    Attributes:
        tokens: Tensor [B, L + N]: the prompt and N new tokens; after a stop token `pad`.
        log_probabilities: Tensor [B, N]: of each new token under the (steered) model, before what changes logits; 0 after
            a stop token.
        lengths: Tensor [B]: how many new tokens there are, the stop token included.
        captured: for a model that captures, the TensorDict of each step that was run; else empty. With a cache a step runs the
            new positions only, without one all.
    """

    tokens: Tensor
    log_probabilities: Tensor
    lengths: Tensor
    captured: tuple = ()


def generate(
    f: Any,
    params: Any,
    inputs: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    stop: int | Sequence[int] | None = None,
    pad: int | None = None,
    cache: bool | None = None,
    position_limit: int | None = None,
    key: int | str = "logits",
    progress: Progress | None = None,
) -> Generation:
    """Continues prompts, with whatever transforms the model has, at every step.

        token_{t+1} = choose(f(params, tokens_{0..t})[:, -1])

    Args:
        f: any pure function of (params, inputs) that returns logits [B, S, V], or something that holds them at `key`; a
            functional model, or a transform of one (`intervene`, `capture`, `with_rules`), where positions or a cache matter.
        params: its parameters.
        inputs: prompts: token ids [B, L], or a mapping with `input_ids`. Prompts of unequal length are padded on the left, with
            an `attention_mask`; positions of tokens are made from it where the model takes `position_ids` (a plain function
            cannot be asked: give them). `token_type_ids` go on with the type of the last token, other entries go
            along at each step. With `decoder_input_ids` (T5) these are continued.
        max_new_tokens: N.
        temperature: 0 takes the most probable token (greedy); above 0, tokens are drawn from softmax(logits / temperature).
        top_k: draw among the k most probable tokens.
        top_p: draw among the most probable tokens that together just reach this probability. After `top_k`.
        logits_processor: function of the tokens so far [B, L + t] (with padding) and the logits [B, V] to the logits to choose
            by, before temperature and filters, such as one of transformers against repetition; None: the logits as they are.
        generator: for drawing; the same state gives the same tokens. It draws B * V numbers at each step.
        stop: tokens that end a continuation; None: none does.
        pad: what follows a stop token; None: the (first) stop token.
        cache: True: run each position once, with the key-value cache of a transformers model; False: run the whole sequence at
            each step, which any model can; None: a cache where the model returns one.
        position_limit: how many positions the model has; None: what its `config` says. Give more to go beyond.
        key: where the logits are in a structured output.
        progress: called as `progress(done, total)`, in steps.

    Returns:
        `Generation`: tokens [B, L + N], log-probabilities, lengths, and what was captured.

    Interventions act at every step, on the positions that the step runs. Edits of `tdhook.latent.steering` know where these
    are: their positions are columns of `tokens`, whether there is a cache or not, so that `positions="last"` is the last token
    of the prompt at all steps, "generated" what comes after it, and an edit without positions acts on each new token too. What
    is to change from step to step is written with `by_step`. The last new token is not run, so that nothing is written or
    captured there. Other writes get values [B, 1, D] from step 1 on with a cache, and [B, L + t, D] without one: a function
    that treats all positions alike gives the same in both. In a plain function around an intervention, as a lambda or a vmap,
    edits cannot be told, so that there no cache is used unless asked for, and positions count in each run by itself; instead,
    vmap what calls `generate`.

    Every call of the model gets a cache of its own, so that nothing of the caller is changed. `torch.func.vmap` works over what
    edits hold, over parameters, and over prompts without a cache (a masked prompt has to be outside). Sampling under vmap needs
    `randomness="same"` or `"different"`. `torch.compile` cannot trace a `Generator`, and unrolls the loop without one.

    Raises:
        InputError: before anything is run, prompts that are no token ids, right padding, more tokens than positions, edits at
            positions that do not come, options that have no meaning; at a step, an output without logits, logits of NaN, or no
            cache where one was asked for.
            Warns for a model in train mode.

    Cost: with a cache one pass over the prompt and N - 1 passes over one position; without one N passes over L to L + N - 1.
        Bind `functionalize(model, logits_to_keep=1)` to save the unembedding of all positions but the last, and
        `use_cache=False` where no cache is used.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> f, params = tdhook.functionalize(GPT2LMHeadModel(config).eval())
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> result = generate(f, params, ids, max_new_tokens=4)
        >>> result.tokens.shape, result.log_probabilities.shape
        (torch.Size([1, 7]), torch.Size([1, 4]))
        >>> steered = tdhook.intervene(f, {"transformer.h.1": 0.0})
        >>> generate(steered, params, ids, max_new_tokens=4).log_probabilities.exp().allclose(torch.tensor(1 / 11))
        True
    """
    sampling = Sampling(temperature, top_k, top_p, generator)
    require_positive("max_new_tokens", max_new_tokens)
    if logits_processor is not None and not callable(logits_processor):
        raise InputError(
            f"logits_processor is {describe(logits_processor)}; give a function (tokens, logits) -> logits, or None."
        )
    stops, padding = _stops(stop, pad)
    prompt = read_prompt(f, inputs)
    total = prompt.length + max_new_tokens - 1  # the last token is not run
    _require_room(f, prompt.length, total, position_limit)
    _require_cache(f, cache, prompt)
    warn_if_stochastic(f, "generate")

    tokens, past, start = prompt.ids, None, 0
    batch = len(tokens)
    done = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    lengths = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
    logs: list[Tensor] = []
    captured: list[Any] = []
    for step in range(max_new_tokens):
        if progress is not None:
            progress(step, max_new_tokens)
        if stops is not None and visible(done) and done.all():
            break
        here = place(f, Where(start, tokens.shape[1], prompt.length, total))
        output, values = unwrapped(here(params, prompt.inputs(tokens, start, past)))
        if values is not None:
            captured.append(values)
        logits = last_logits(output, batch, key)
        chosen = sampling.choose(logits if logits_processor is None else _processed(logits_processor, tokens, logits))
        log = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        require_numbers(log, done, step)
        lengths = lengths + (~done).long()
        if stops is not None:
            chosen, log = torch.where(done, padding, chosen), torch.where(done, 0, log)
            done = done | (chosen[:, None] == stops.to(chosen.device)).any(-1)
        logs.append(log)
        if _uses_cache(f, cache, prompt):
            past = cache_in(output, cache)
        start = tokens.shape[1] if past is not None else 0
        tokens = torch.cat([tokens, chosen[:, None]], 1)
    missing = max_new_tokens - len(logs)
    if missing:
        tokens = torch.cat([tokens, tokens.new_full((batch, missing), padding)], 1)
        logs += [torch.zeros_like(logs[0])] * missing
    if progress is not None:
        progress(max_new_tokens, max_new_tokens)
    return Generation(tokens, torch.stack(logs, 1), lengths, tuple(captured))


def _stops(stop: Any, pad: Any) -> tuple[Tensor | None, int]:
    """The stop tokens, and what follows them."""
    given = [] if stop is None else [stop] if isinstance(stop, int) else stop
    valid = isinstance(given, Sequence) and all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in given)
    if not valid or (stop is not None and not given):
        raise InputError(f"stop is {describe(stop)}; give a token id, several, or None.")
    if pad is not None and (not isinstance(pad, int) or isinstance(pad, bool) or pad < 0):
        raise InputError(f"pad is {describe(pad)}; give a token id or None.")
    if not given:
        if pad is not None:
            raise InputError(f"pad={pad} follows a stop token, and stop is None; give stop, or leave pad out.")
        return None, 0
    return torch.tensor(given), given[0] if pad is None else pad


def _require_room(f: Any, length: int, total: int, limit: int | None) -> None:
    require_positive("position_limit", limit, optional=True)
    most = positions_of_model(f) if limit is None else limit
    if most is None or total <= most:
        return
    if length > most:
        raise InputError(f"a prompt of {length} tokens is too long for a model of {most} positions; give a shorter one.")
    raise InputError(
        f"{length} tokens of a prompt and {total + 1 - length} new ones are too many for a model of {most} positions; give "
        f"max_new_tokens={most + 1 - length} at most" + (", or position_limit to go beyond." if limit is None else ".")
    )


def _require_cache(f: Any, cache: Any, prompt: Prompt) -> None:
    if cache not in (None, True, False):
        raise InputError(f"cache is {describe(cache)}; give True, False or None.")
    if cache and isinstance(f, FunctionalModel):
        if f.base.constants.get("use_cache") is False:
            raise InputError("cache=True, but the model was made with use_cache=False; leave that out of functionalize.")
        if "past_key_values" not in accepted(f):
            raise InputError("cache=True, but the model takes no past_key_values; give cache=False.")
    if cache and prompt.name is None:
        raise InputError("cache=True, but a cache goes along by name; give the tokens by name too: {'input_ids': ids}.")


def _uses_cache(f: Any, cache: bool | None, prompt: Prompt) -> bool:
    """Whether to go on with a cache, if the model returns one. Of a plain function nobody knows what positions mean in it."""
    if cache is None:
        return prompt.name is not None and "past_key_values" in accepted(f)
    return cache


def _processed(processor: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, logits: Tensor) -> Tensor:
    """What a processor makes of the logits. It gets copies, for the case that it writes in place."""
    changed = processor(tokens.clone(), logits.clone())
    if not isinstance(changed, Tensor) or changed.shape != logits.shape or not changed.is_floating_point():
        raise InputError(f"logits_processor returned {describe(changed)} for {describe(logits)}; return logits [B, V].")
    return changed
