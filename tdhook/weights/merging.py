"""Merging of models: TIES and DARE for task vectors, spherical interpolation for params."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from ..core.compat import is_compiling, is_wrapped
from ..core.errors import InputError
from ..core.structure import describe
from .pruning import prune
from .selection import Key, flat, nest, replaced, require_params, require_same_structure

Number = float | Tensor


def ties(vectors: Sequence[TensorDictBase], density: Number = 0.2, *, scope: str = "global") -> TensorDict:
    """Merges task vectors without the interference of small and of opposed changes (TIES: trim, elect sign, merge).

        tau_t := the largest |tau_t|, a share `density` of them, others 0
        gamma  = sign(sum_t tau_t)
        tau    = mean of the tau_t with sign(tau_t) = gamma;   0 where there is none

    Args:
        vectors: task vectors of the same structure.
        density: the share of each vector that is kept, a float from 0 to 1 or a tensor [] of one.
        scope: trim over each whole vector (`"global"`, as published) or within each of its tensors (`"tensor"`).

    Returns:
        A task vector, for `add_task_vectors`. Where the trimmed changes cancel exactly no sign is elected, and the result is 0.

    Raises:
        InputError: a density out of range, no vector. ParamsError: vectors of different structure.

    Cost: one sort of each vector.

    Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (2023).

    Examples:
        >>> from tensordict import TensorDict
        >>> a = TensorDict(w=torch.tensor([4.0, 0.1, 1.0]))
        >>> b = TensorDict(w=torch.tensor([2.0, 0.2, -3.0]))
        >>> ties([a, b], density=2 / 3)["w"]
        tensor([ 3.,  0., -3.])
    """
    given = _vectors(vectors)
    _require_share("density", density, 1.0)
    _require_scope(scope)
    trimmed = [flat(_trimmed(vector, density, scope)) for vector in given]
    merged = {}
    for key, tensor in flat(given[0]).items():
        stack = torch.stack([vector[key] for vector in trimmed])
        elected = stack.sum(0).sign()
        agrees = (stack.sign() == elected) & (elected != 0)
        total = torch.where(agrees, stack, 0).sum(0)
        merged[key] = (total / agrees.sum(0).clamp(min=1)).to(tensor.dtype)
    return nest(merged)


def _trimmed(vector: TensorDictBase, density: Number, scope: str) -> TensorDict:
    sizes = nest({key: tensor.abs() for key, tensor in flat(vector).items()})
    return prune(vector, sizes, 1 - density, scope=scope).params


def dare(vector: TensorDictBase, drop: Number, *, generator: torch.Generator | None = None) -> TensorDict:
    """Drops changes of a task vector at random and rescales the others, so that its expectation stays (DARE).

        tau_i := m_i tau_i / (1 - drop),     m_i ~ Bernoulli(1 - drop)

    Args:
        vector: a task vector.
        drop: the probability that a change is dropped, from 0 to below 1, a number or a tensor []. The draws do not depend on
            it, so of two probabilities the larger one drops what the smaller one drops, and more.
        generator: of the random numbers; None: the global one. Under vmap pass `randomness="same"`;
            torch does not compile with a generator.

    Returns:
        A task vector, sparse, for `add_task_vectors` or `ties`.

    Raises:
        InputError: a probability out of range.

    Cost: one random number for each change.

    Source: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch" (2024).

    Examples:
        >>> from tensordict import TensorDict
        >>> vector = TensorDict(w=torch.ones(4))
        >>> dare(vector, 0.5, generator=torch.Generator().manual_seed(0))["w"]
        tensor([0., 2., 0., 0.])
    """
    require_params("vector", vector)
    _require_share("drop", drop, 1.0, open_end=True)
    sparse: dict[Key, Tensor] = {}
    for key, tensor in flat(vector).items():
        if not tensor.is_floating_point():
            continue
        device = tensor.device if generator is None else generator.device
        # float32 also for half precision, whose coarse numbers would change the probability
        uniform = torch.rand(tensor.shape, generator=generator, device=device).to(tensor.device)
        sparse[key] = torch.where(uniform >= drop, tensor / (1 - drop), 0).to(tensor.dtype)
    return nest(sparse, vector.batch_size)


def slerp(a: TensorDictBase, b: TensorDictBase, t: Number, *, scope: str = "tensor") -> TensorDict:
    """Interpolates between two models along a great circle.

        sin((1 - t) Omega) / sin(Omega) a + sin(t Omega) / sin(Omega) b,     cos(Omega) = <a, b> / (|a| |b|)

    Args:
        a: see `b`.
        b: params, or task vectors, of the same structure.
        t: 0 for `a`, 1 for `b`: a number or a tensor [].
        scope: one angle for each tensor (`"tensor"`), or one for all together (`"global"`).

    Returns:
        As `a`; what is not floating-point is that of `a`. Where a and b are parallel, opposite, or zero the circle is not
        defined (nearly so: not resolved) and the result is (1 - t) a + t b.

    Raises:
        InputError: an unknown scope, a t that is no number. ParamsError: different structure.

    Cost: three scalar products.

    Source: Shoemake, "Animating Rotation with Quaternion Curves" (1985).

    Examples:
        >>> from tensordict import TensorDict
        >>> a, b = TensorDict(w=torch.tensor([1.0, 0.0])), TensorDict(w=torch.tensor([0.0, 1.0]))
        >>> slerp(a, b, 0.5)["w"]
        tensor([0.7071, 0.7071])
    """
    require_params("a", a, single=True)
    require_params("b", b, single=True)
    _require_scope(scope)
    if isinstance(t, bool) or not (isinstance(t, (int, float)) or (isinstance(t, Tensor) and t.ndim == 0)):
        raise InputError(f"t is a number or a tensor [], got {describe(t)}; for several use torch.func.vmap.")
    require_same_structure("a", a, "b", b)
    other = flat(b)
    pairs = {key: (tensor, other[key]) for key, tensor in flat(a).items() if tensor.is_floating_point()}
    groups = [[key] for key in pairs] if scope == "tensor" else [list(pairs)]
    between = {}
    for keys in groups:
        first, second = _weights([pairs[key] for key in keys], t)
        for key in keys:
            x, y = pairs[key]
            between[key] = (first * x + second * y).to(x.dtype)
    return replaced(a, between)


def _weights(pairs: Sequence[tuple[Tensor, Tensor]], t: Number) -> tuple[Tensor, Tensor]:
    """The factors of both ends, from the angle between them."""
    dtype = torch.promote_types(pairs[0][0].dtype, torch.float32)
    x = torch.cat([x.to(dtype).reshape(-1) for x, _ in pairs])
    y = torch.cat([y.to(dtype).reshape(-1) for _, y in pairs])
    x_norm, y_norm = torch.linalg.vector_norm(x), torch.linalg.vector_norm(y)
    tiny = torch.finfo(dtype).tiny
    x, y = x / x_norm.clamp(min=tiny), y / y_norm.clamp(min=tiny)
    # half-angle form: arccos(<x, y>) loses half the digits where x and y are nearly parallel
    angle = 2 * torch.atan2(torch.linalg.vector_norm(x - y), torch.linalg.vector_norm(x + y))
    sine = angle.sin()
    straight = (sine < torch.finfo(dtype).eps * 8) | (x_norm == 0) | (y_norm == 0)
    safe = torch.where(straight, 1, sine)
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / safe)
    second = torch.where(straight, t, (t * angle).sin() / safe)
    return first, second


def _vectors(vectors: Sequence[TensorDictBase]) -> list[TensorDictBase]:
    if isinstance(vectors, TensorDictBase) or not isinstance(vectors, Sequence) or not vectors:
        raise InputError(f"vectors is a sequence of task vectors, at least one, got {describe(vectors)}.")
    for number, vector in enumerate(vectors):
        require_params(f"vectors[{number}]", vector, single=True)
        require_same_structure("vectors[0]", vectors[0], f"vectors[{number}]", vector)
    return list(vectors)


def _require_scope(scope: str) -> None:
    if scope not in ("tensor", "global"):
        raise InputError(f"scope={scope!r} is unknown; choose 'tensor' or 'global'.")


def _require_share(name: str, value: Number, end: float, open_end: bool = False) -> None:
    """Raises `InputError` unless a number, or a tensor [] that can be looked at, is from 0 to `end`."""
    allowed = f"a float from 0 to {'below ' if open_end else ''}{end:g} or a tensor [] of one"
    if isinstance(value, Tensor):
        if value.ndim or not value.is_floating_point():
            raise InputError(f"{name} is {allowed}, got {describe(value)}.")
        if is_compiling() or is_wrapped(value):
            return
        value = value.item()
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= end or (open_end and value == end):
        raise InputError(f"{name} is {allowed}, got {value!r}.")
