"""Translators: affine maps that bring the stream of a layer to what the last layer would make of it (the tuned lens)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from tensordict import tensorclass
from torch import Tensor
from torch.func import grad_and_value

from ...core.batching import vmap_or_loop
from ...core.checks import require_number, require_positive
from ...core.errors import InputError
from ...core.functional import FunctionalModel
from ..names import Names
from ..pooling import fitting_mask
from ..streaming import Positions, _mask, numbered
from .stream import logits_of, named, read, tail


@tensorclass
class Translators:
    """One affine map `h + h W_l + b_l` for each layer.

    Attributes:
        weight: W, Tensor [L, D, D].
        bias: b, Tensor [L, D].
    """

    weight: Tensor
    bias: Tensor

    def translate(self, stream: Tensor) -> Tensor:
        """The stream of all layers, Tensor [L, B, S, D], translated; computed in the wider of the two types."""
        shift = self.bias.reshape(len(self.bias), *[1] * (stream.ndim - 2), -1)
        wide = stream.to(torch.promote_types(stream.dtype, self.weight.dtype))
        return (wide + torch.einsum("l...i,lij->l...j", wide, self.weight.to(wide.dtype)) + shift).to(stream.dtype)


def identity_translators(names: Names, like: Tensor) -> Translators:
    """Translators that change nothing, which makes a tuned lens the logit lens; of the type and device of `like`."""
    weight = like.new_zeros(names.layers, names.width, names.width)
    return Translators(weight=weight, bias=like.new_zeros(names.layers, names.width), batch_size=[])  # type: ignore[call-arg]


def fit_translators(
    f: FunctionalModel,
    params: Any,
    batches: Iterable[Any],
    *,
    names: Names | None = None,
    ridge: float = 1e-3,
    positions: Positions = None,
) -> Translators:
    """Translators in closed form: those that predict the last residual best.

        W_l, b_l = argmin  mean |residual_post_L - (h + h W + b)|^2 + ridge v_l |W|^2,    v_l the mean variance of a feature

    Args:
        f: functional model.
        params: its parameters.
        batches: inputs as `f` takes them; seen once.
        names: standard names; None to find them with the first batch.
        ridge: relative to the variance of the stream, so that its scale does not matter.
        positions: which positions count, as for `collect`; None: `"attention_mask"` where the inputs have one, else all.

    Returns:
        `Translators`, of the type of the stream; the last layer's is 0.

    Raises:
        InputError: no batch; a ridge that is negative, or 0 with no more positions than features.

    Cost: one forward pass for each batch, L D^2 operations for each position, and L solutions of D equations. Memory: 2 L D^2
    numbers in double precision.

    Source: Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens" (2023), who minimise the KL
    divergence of the logits (`train_translators`); Din et al., "Jump to Conclusions" (2023), for the closed form.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> f, params = tdhook.functionalize(GPT2LMHeadModel(config).eval(), use_cache=False)
        >>> batches = [{"input_ids": torch.randint(0, 11, (4, 9))} for _ in range(3)]
        >>> fit_translators(f, params, batches).weight.shape
        torch.Size([2, 8, 8])
    """
    require_number("ridge", ridge)
    found, like, rows = names, None, 0
    moments: list[Tensor] | None = None
    for _, inputs in numbered(batches, None):
        found = named(f, params, inputs, found)
        _, values = read(f, params, inputs, found.residual_post)
        like = values[-1]
        wide = torch.stack([value.reshape(-1, found.width) for value in values]).double()
        mask = _counted(inputs, found, like, positions)
        wide = wide if mask is None else wide[:, mask.flatten()]
        rows += wide.shape[1]
        gap = wide[-1] - wide
        count = wide.new_tensor(wide.shape[1])
        new = [count, wide.sum(1), gap.sum(1), wide.mT @ wide, wide.mT @ gap]
        moments = new if moments is None else [a + b for a, b in zip(moments, new)]
    assert moments is not None and like is not None  # `numbered` raises where there is no batch
    if ridge == 0 and rows <= like.shape[-1]:
        raise InputError(f"ridge is 0, and {rows} positions do not determine {like.shape[-1]} features; give a ridge or more.")
    count, total, total_gap, square, cross = moments
    mean, mean_gap = total / count, total_gap / count
    covariance = square / count - mean[:, :, None] * mean[:, None]
    crossed = cross / count - mean[:, :, None] * mean_gap[:, None]
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    weight = torch.linalg.solve(covariance + ridge * variance[:, None, None] * eye, crossed)
    bias = mean_gap - torch.einsum("li,lij->lj", mean, weight)
    return Translators(weight=weight.to(like), bias=bias.to(like), batch_size=[])  # type: ignore[call-arg]


def train_translators(
    f: FunctionalModel,
    params: Any,
    batches: Iterable[Any],
    *,
    names: Names | None = None,
    start: Translators | None = None,
    learning_rate: float = 1e-3,
    positions: Positions = None,
    chunk_size: int | None = None,
    report: Callable[[int, Tensor], None] | None = None,
) -> Translators:
    """Translators by gradient descent on what the lens says: one step of Adam for each batch.

        loss = sum_l  mean_positions  KL(softmax(logits) || softmax(lens_l))

    Args:
        f: functional model.
        params: its parameters, which stay as they are.
        batches: inputs as `f` takes them, one for each step.
        names: standard names; None to find them with the first batch.
        start: where to start; None for `identity_translators`, the logit lens.
        learning_rate: of Adam.
        positions: which positions count, as for `fit_translators`.
        chunk_size: how many layers go through the unembedding at once.
        report: called after each step with its number from 1 and the losses before it, Tensor [L].

    Returns:
        `Translators`, of the type of the stream; the last layer's is as in `start`.

    Raises:
        InputError: no batch, a learning rate that is not positive.

    Cost: for each batch one forward pass, L through what follows the last block, and their backward.

    Source: Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens" (2023); they use SGD with
    momentum.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> f, params = tdhook.functionalize(GPT2LMHeadModel(config).eval(), use_cache=False)
        >>> batches = [{"input_ids": torch.randint(0, 11, (4, 9))} for _ in range(3)]
        >>> train_translators(f, params, batches).bias.shape
        torch.Size([2, 8])
    """
    require_number("learning_rate", learning_rate, strict=True)
    require_positive("chunk_size", chunk_size, optional=True)
    found, first, second = names, None, None
    pair: tuple[Tensor, ...] | None = None
    like: Tensor | None = None
    for step, inputs in numbered(batches, None):
        found = named(f, params, inputs, found)
        output, values = read(f, params, inputs, found.residual_post)
        like = values[-1].detach()
        stream = torch.stack([value.reshape(like.shape) for value in values]).detach()
        exact = torch.promote_types(like.dtype, torch.float32)  # small steps would be lost in half precision
        if pair is None:
            begin = identity_translators(found, like) if start is None else start
            pair = (begin.weight.to(exact), begin.bias.to(exact))
        expected = logits_of(found, output).detach().to(exact).log_softmax(-1)
        mask = _counted(inputs, found, like, positions)
        mask = None if mask is None or mask.shape != expected.shape[:-1] else mask
        loss = partial(
            _divergences,
            logits=_logits(found, tail(f, params, inputs, found)),
            expected=expected,
            stream=stream,
            mask=mask,
            chunk_size=chunk_size,
        )
        gradient, (_, losses) = grad_and_value(loss, has_aux=True)(pair)
        # What the last layer says is the output: its gradient is rounding, which Adam would blow up.
        gradient = [torch.cat([g[:-1], torch.zeros_like(g[-1:])]) for g in gradient]
        first = [0.1 * g + 0.9 * (0 if first is None else first[i]) for i, g in enumerate(gradient)]
        second = [0.001 * g * g + 0.999 * (0 if second is None else second[i]) for i, g in enumerate(gradient)]
        pair = tuple(
            value - learning_rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            for value, m, v in zip(pair, first, second)
        )
        if report is not None:
            report(step + 1, losses.detach())
    assert pair is not None and like is not None  # `numbered` raises where there is no batch
    return Translators(weight=pair[0].to(like), bias=pair[1].to(like), batch_size=[])  # type: ignore[call-arg]


def _counted(inputs: Any, found: Names, value: Tensor, positions: Positions) -> Tensor | None:
    """Which positions of the stream count, bool Tensor [B, S]; None for all."""
    return fitting_mask(found.residual_post[-1], value, _mask(positions, inputs, inputs, len(value)))


def _logits(found: Names, finish: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """From a last residual to the logits."""
    return lambda value: logits_of(found, finish(value))


def _divergences(
    pair: tuple[Tensor, Tensor],
    logits: Callable[[Tensor], Tensor],
    expected: Tensor,
    stream: Tensor,
    mask: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """The sum over layers of the mean divergence, and those of each layer."""
    translated = Translators(weight=pair[0], bias=pair[1], batch_size=[]).translate(stream)  # type: ignore[call-arg]

    def of_layer(value: Tensor) -> Tensor:
        parts = (expected.exp() * (expected - logits(value).to(expected.dtype).log_softmax(-1))).sum(-1)
        return parts.mean() if mask is None else (parts * mask).sum() / mask.sum()

    losses = vmap_or_loop(of_layer, translated, chunk_size)
    return losses.sum(), losses
