"""Randomisation: whether an attribution depends on what the model learned, and on the class it explains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.batching import chunks, vmap_or_loop
from ..core.checks import require_positive
from ..core.compat import is_compiling, is_wrapped
from ..core.correlation import Similarity, similarity_function
from ..core.errors import InputError, TargetError
from ..core.estimate import Estimate, Moments
from ..core.randomness import require_generator, uniform_like
from ..core.structure import describe
from ..core.targets import Target
from .features import flat_scores
from .reinitialisation import Initialise, variants


class Randomisation(NamedTuple):
    """How similar attributions are to the original after layers were re-initialised.

    Attributes:
        layers: names, in the order in which they were re-initialised.
        similarity: Tensor [N, B], or [N, T, B] for plural targets.
    """

    layers: tuple[str, ...]
    similarity: Tensor


def model_parameter_randomisation(
    f: Callable,
    params: Any,
    inputs: Any,
    method: Callable,
    *,
    order: str = "top_down",
    layers: Sequence[str] | None = None,
    initialise: str | Initialise = "normal",
    similarity: str | Similarity = "spearman",
    absolute: bool = False,
    batch_dims: int = 1,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Randomisation:
    """The similarity of an attribution to that of the same model with layers re-initialised (MPRT).

        similarity_n = s(phi(params), phi(params with layers 1 .. n re-initialised))
        independent: only with layer n re-initialised

    Args:
        f: the model, passed to `method`.
        params: its parameters: a TensorDict as of `functionalize`, or a mapping (nested, or with names such as "0.weight").
        inputs: passed to `method`.
        method: function of (f, params, inputs) to attributions: `functools.partial(saliency, targets=3)`. It may return any
            structure of tensors (None is left out), which are compared as one.
        order: `"top_down"`: cascading from the last layer to the first; `"bottom_up"`: from the first to the last;
            `"independent"`: one at a time, first to last. All three see the same new values.
        layers: names of modules, lowest first; that of a block stands for all layers inside. None: all that hold parameters, in
            the order of `params`, which is that of registration: give them where the model runs in another.
        initialise: `"normal"`: normal numbers of the mean and standard deviation of each tensor; `"permutation"`: its own
            numbers in random order; or a function of (name, tensor, generator) to a new tensor. Each tensor is drawn once;
            with the two named ones a constant tensor (biases of zero) stays. Buffers of a functional model are not
            re-initialised, nor is anything named running_mean or running_var.
        similarity: `"spearman"`, `"pearson"`, or a function of two tensors [*lead, D] to [*lead].
        absolute: compare |phi|, as the paper does as well: it finds what a flip of all signs hides.
        batch_dims: how many of the first dimensions of the attributions count examples: 1 for [B, ...], 2 for plural targets
            [T, B, ...], 0 inside a vmap.
        chunk_size: how many copies of the model run at once; None for all. It bounds memory (with 1 there is one copy of the
            new values and no stack) and does not change the result.
        generator: source of the new values. None: torch's global one.

    Returns:
        `Randomisation` with `layers`, in the order of re-initialisation, and `similarity` [N, B] (or [N, T, B]). 1 means that
        the attribution ignores the layer. NaN where an attribution is constant. Half types give float32.

    Raises:
        InputError: params without floating-point tensors, layers that are unknown or overlap, attributions that do not fit
            `batch_dims`, or a bad option. What `method` raises.

    Cost: N + 1 calls of `method`, vmapped over stacked parameters, of which only those that differ are stacked. Inside a vmap
    the draws need its `randomness="different"` or `"same"`; a `generator` cannot be compiled with `fullgraph=True`, the
    global one can.

    Quantus copies the model and calls `reset_parameters` of each layer, which initialises as at the start of training; it
    normalises the attributions and takes their absolute value unless told.

    Source: Adebayo et al., "Sanity Checks for Saliency Maps" (2018).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)))
        >>> result = model_parameter_randomisation(f, params, torch.randn(3, 5), lambda f, params, x: x)  # ignores the model
        >>> result.layers
        ('2', '0')
        >>> torch.allclose(result.similarity, torch.ones(2, 3))
        True
    """
    compare = _prepared(method, similarity, absolute, chunk_size, generator)
    original = flat_scores("what method returned", method(f, params, inputs), batch_dims)
    randomised = variants(f, params, layers, order, initialise, generator)
    rows = []
    for chunk in chunks(len(randomised.layers), chunk_size):
        moving, assemble = randomised.stacked(chunk)

        def similar(values: list[Tensor], assemble: Callable = assemble) -> Tensor:
            found = method(f, assemble(values), inputs)
            return compare(original, flat_scores("what method returned", found, batch_dims))

        # A single variant has nothing to stack.
        rows.append(vmap_or_loop(similar, moving) if moving else similar([])[None])
    return Randomisation(randomised.layers, torch.cat(rows))


def random_logit(
    f: Callable,
    params: Any,
    inputs: Any,
    method: Callable,
    *,
    targets: int | Tensor,
    samples: int = 1,
    similarity: str | Similarity = "spearman",
    absolute: bool = False,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The similarity of the attribution of a class to that of another class, drawn at random.

        1/n sum_s s(phi(target), phi(class_s)), class_s uniform among the others

    Args:
        f: the model, passed to `method`; its output is Tensor [B, C], or [C] inside a vmap.
        params: its parameters.
        inputs: passed to `method`.
        method: function of (f, params, inputs, *, targets) to attributions, that takes plural targets, as those of
            `tdhook.attribution` do.
        targets: the class that is explained: an int, or an integer Tensor [B] of one per example.
        samples: number n of other classes, drawn independently for each example; they may come again.
        similarity: as `model_parameter_randomisation`.
        absolute: compare |phi|.
        generator: source of the draws. None: torch's global one.

    Returns:
        `Estimate` with `value` and `standard_error` Tensor [B]; the error is NaN for one sample. NaN where an attribution is
        constant. 1 means that the attribution does not depend on the class.

    Raises:
        InputError: a bad option, a method that returns something else than attributions [1 + n, B, ...]. TargetError: targets
            out of range, an output with a single class or of another shape. What `method` raises.

    Cost: one forward pass, and one call of `method` for 1 + n targets. Inside a vmap the draws need its
    `randomness="different"` or `"same"`; a `generator` cannot be compiled with `fullgraph=True`, the global one can.

    Quantus draws one class and normalises the attributions; its similarity is SSIM.

    Source: Sixt, Granz, Landgraf, "When Explanations Lie: Why Many Modified BP Attributions Fail" (2020).

    Examples:
        >>> def gradient(f, params, x, targets):
        ...     return torch.func.jacrev(lambda x: targets(f(params, x)).sum(0))(x)
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     params["weight"][1] = -params["weight"][0]
        >>> torch.allclose(random_logit(f, params, torch.randn(4, 3), gradient, targets=0).value, -torch.ones(4))
        True
    """
    compare = _prepared(method, similarity, absolute, None, generator)
    require_positive("samples", samples)
    _require_classes(targets)
    output = f(params, inputs)
    if not isinstance(output, Tensor) or output.ndim not in (1, 2) or output.shape[-1] < 2:
        raise TargetError(f"the output is {describe(output)}; random_logit needs scores [B, C] of at least two classes.")
    classes = _classes_of(targets, output)  # [*B]
    count = output.shape[-1]
    like = torch.zeros(classes.shape, dtype=torch.float64, device=output.device)
    drawn = torch.stack([(uniform_like(like, generator) * (count - 1)).long() for _ in range(samples)], -1)
    # The classes from the target on move up by one, so that the target is left out.
    others = drawn + (drawn >= classes[..., None])
    chosen = torch.cat([classes[..., None], others], -1)  # [*B, 1 + n]
    found = method(f, params, inputs, targets=Target(lambda out: out.gather(-1, chosen), True))
    scores = flat_scores("what method returned", found, output.ndim)  # [1 + n, *B, D]
    if scores.shape[:-1] != (1 + samples, *output.shape[:-1]):
        raise InputError(
            f"method returned attributions with leading dimensions {list(scores.shape[:-1])} where "
            f"{[1 + samples, *output.shape[:-1]]} are expected: one for each of {1 + samples} targets."
        )
    moments = Moments.of(compare(scores[:1], scores[1:]))
    return Estimate(moments.mean, moments.standard_error)


def _prepared(method: Any, similarity: str | Similarity, absolute: bool, chunk_size: int | None, generator: Any) -> Similarity:
    """The comparison of two attributions; bad options raise."""
    if not callable(method):
        raise InputError(f"method is {describe(method)}; give a function of (f, params, inputs).")
    require_positive("chunk_size", chunk_size, optional=True)
    require_generator(generator)
    function = similarity_function(similarity)
    return (lambda a, b: function(a.abs(), b.abs())) if absolute else function


def _require_classes(targets: Any) -> None:
    if isinstance(targets, Tensor):
        if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.dtype is torch.bool or targets.ndim > 1:
            raise TargetError(f"targets is {describe(targets)}; give an int or an integer tensor [B].")
    elif not isinstance(targets, int) or isinstance(targets, bool):
        raise TargetError(f"targets is {describe(targets)}; give an int or an integer tensor [B].")


def _classes_of(targets: int | Tensor, output: Tensor) -> Tensor:
    """The class of each example, counted from 0."""
    count = output.shape[-1]
    if isinstance(targets, int):
        if not -count <= targets < count:
            raise TargetError(f"targets={targets} is out of range for an output with {count} classes.")
        return torch.full(output.shape[:-1], targets % count, device=output.device)
    if targets.shape != output.shape[:-1]:
        raise TargetError(f"targets has shape {list(targets.shape)} for an output of shape {list(output.shape)}.")
    if not (is_compiling() or is_wrapped(targets)):
        wrong = targets[(targets < 0) | (targets >= count)]
        if len(wrong.reshape(-1)):
            raise TargetError(f"targets holds class {int(wrong.reshape(-1)[0])}, out of range for {count} classes.")
    return targets.long()
