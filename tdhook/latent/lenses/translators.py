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
        """The stream of all layers, Tensor [L, B, S, D], translated."""
        shift = self.bias.reshape(len(self.bias), *[1] * (stream.ndim - 2), -1)
        return stream + torch.einsum("l...i,lij->l...j", stream, self.weight) + shift


def identity_translators(names: Names, like: Tensor) -> Translators:
    """Translators that change nothing, which makes a tuned lens the logit lens; of the type and device of `like`."""
    weight = like.new_zeros(names.layers, names.width, names.width)
    return Translators(weight=weight, bias=like.new_zeros(names.layers, names.width), batch_size=[])  # type: ignore[call-arg]


def fit_translators(
    f: FunctionalModel, params: Any, batches: Iterable[Any], *, names: Names | None = None, ridge: float = 1e-3
) -> Translators:
    """Translators in closed form: those that predict the last residual best.

        W_l, b_l = argmin  mean |residual_post_L - (h + h W + b)|^2 + ridge v_l |W|^2,    v_l the mean variance of a feature

    Args:
        f: functional model.
        params: its parameters.
        batches: inputs as `f` takes them; seen once, and every position of them counts.
        names: standard names; None to find them with the first batch.
        ridge: relative to the variance of the stream, so that its scale does not matter.

    Returns:
        `Translators`, of the type of the stream; the last layer's is 0.

    Raises:
        InputError: no batch, a ridge that is negative.

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
    found, like = names, None
    moments: list[Tensor] | None = None
    for inputs in batches:
        found = named(f, params, inputs, found)
        _, values = read(f, params, inputs, found.residual_post)
        like = values[-1]
        wide = torch.stack([value.reshape(-1, found.width) for value in values]).double()
        gap = wide[-1] - wide
        count = wide.new_tensor(wide.shape[1])
        new = [count, wide.sum(1), gap.sum(1), wide.mT @ wide, wide.mT @ gap]
        moments = new if moments is None else [a + b for a, b in zip(moments, new)]
    if moments is None or like is None:
        raise InputError("batches is empty; give at least one batch of inputs.")
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
        chunk_size: how many layers go through the unembedding at once.
        report: called after each step with its number from 1 and the losses before it, Tensor [L].

    Returns:
        `Translators`.

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
    found, now, first, second, step = names, start, None, None, 0
    for step, inputs in enumerate(batches, start=1):
        found = named(f, params, inputs, found)
        output, values = read(f, params, inputs, found.residual_post)
        stream = torch.stack([value.reshape(values[-1].shape) for value in values]).detach()
        now = identity_translators(found, stream) if now is None else now
        expected = logits_of(found, output).detach().log_softmax(-1)
        said = _said(found, tail(f, params, inputs, found))
        pair = (now.weight, now.bias)
        loss = partial(_divergences, said=said, expected=expected, stream=stream, chunk_size=chunk_size)
        gradient, (_, losses) = grad_and_value(loss, has_aux=True)(pair)
        first = [0.1 * g + 0.9 * (0 if first is None else first[i]) for i, g in enumerate(gradient)]
        second = [0.001 * g * g + 0.999 * (0 if second is None else second[i]) for i, g in enumerate(gradient)]
        moved = [
            value - learning_rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            for value, m, v in zip(pair, first, second)
        ]
        now = Translators(weight=moved[0], bias=moved[1], batch_size=[])  # type: ignore[call-arg]
        if report is not None:
            report(step, losses.detach())
    if now is None or not step:
        raise InputError("batches is empty; give at least one batch of inputs.")
    return now


def _said(found: Names, finish: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """From a last residual to the log probabilities."""
    return lambda value: logits_of(found, finish(value)).log_softmax(-1)


def _divergences(
    pair: tuple[Tensor, Tensor],
    said: Callable[[Tensor], Tensor],
    expected: Tensor,
    stream: Tensor,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """The sum over layers of the mean divergence, and those of each layer."""
    translated = Translators(weight=pair[0], bias=pair[1], batch_size=[]).translate(stream)  # type: ignore[call-arg]

    def of_layer(value: Tensor) -> Tensor:
        return (expected.exp() * (expected - said(value))).sum(-1).mean()

    losses = vmap_or_loop(of_layer, translated, chunk_size)
    return losses.sum(), losses
