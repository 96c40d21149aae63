"""ROME: a fact of a language model rewritten by a rank-one edit of one linear module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.func import grad_and_value

from ..core.checks import require_gradients, require_positive, warn_if_stochastic
from ..core.errors import InputError, ParamsError
from ..core.explained import explained
from ..core.sites import Site
from ..core.structure import describe
from .answers import Logits, log_probability, reading
from .keys import KeyStatistics, Position, at_position, key_at, ports, require_position, with_positions
from .rank_one import rank_one_update
from .selection import flat, parameter_name, replaced, require_params


class ValueSearch(NamedTuple):
    """The value that makes a model say the target.

    Attributes:
        value: Tensor [O], the mean output of the module at the position, plus `delta`.
        delta: Tensor [O].
        losses: Tensor [steps], before each step.
    """

    value: Tensor
    delta: Tensor
    losses: Tensor


def optimize_value(
    f: Any,
    params: Any,
    prompts: Any,
    *,
    site: str | Site,
    position: Position | Sequence[Position],
    target: int | Tensor,
    logits: Logits | None = None,
    preserve: Any = None,
    preserve_position: Position | Sequence[Position] = -1,
    steps: int = 25,
    learning_rate: float = 0.5,
    kl_factor: float = 0.0625,
    norm_factor: float = 0.5,
    norm_limit: float = 4.0,
) -> ValueSearch:
    """The output of a module at one position that makes the model say the target, found by gradient descent.

        loss(d) = - mean_n log p(target | prompt_n, d) + kl_factor KL(p(preserve) || p(preserve, d)) + norm_factor |d|^2 / |v|^2

    where d is added to the output of the module at the position, and v is the mean output there. Adam moves d in units of
    the root mean square of v, so that the learning rate does not depend on the model; after each step d is scaled back to a
    norm of at most `norm_limit |v|`.

    Args:
        f: functional model.
        params: its parameters.
        prompts: inputs of `f`, or a list of such for prompts of different length: the plain prompt, and the prompt after
            several prefixes.
        site: address of the module.
        position: of the last token of the subject, as for `key_at`.
        target: class, or a Tensor of classes that broadcasts to the logits without their last dimension.
        logits: function of the output to Tensor [B, C], such as `lambda out: out.logits[:, -1]`, or [B, L, C] for a target of
            several tokens; None where they are the output.
        preserve: prompts, as `prompts`, whose prediction stays ("{subject} is a"); None for none.
        preserve_position: where d is added in these.
        steps: see `learning_rate`.
        learning_rate: of Adam.
        kl_factor: see `norm_limit`.
        norm_factor: see `norm_limit`.
        norm_limit: see above.

    Returns:
        `ValueSearch` with `value` and `delta` [O], and `losses`.

    Raises:
        InputError: positions that do not fit. TargetError: a target out of range. SiteError: as `key_at`. GradientError: grad
            mode is off. Warns for a model in train mode.

    Cost: one forward pass, then for each step forward and backward passes over what comes after the module.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022), equation 4. Theirs penalises |d| / |v|^2
    and moves d in absolute units.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh()))
        >>> search = optimize_value(f, params, torch.ones(1, 2), site="0", position=None, target=2)
        >>> bool(search.losses[-1] < search.losses[0])
        True
    """
    require_gradients("optimize_value")
    require_positive("steps", steps)
    _, value_site, _ = ports(f, site)
    given = with_positions("prompts", prompts, position)
    kept = [] if preserve is None else with_positions("preserve", preserve, preserve_position)
    warn_if_stochastic(f, "optimize_value")
    read = reading(logits)
    runs = [_shifted(f, params, inputs, value_site, place) for inputs, place in given]
    mean = torch.cat([values for values, _ in runs]).detach().mean(0)
    count = sum(len(values) for values, _ in runs)
    quiet = [_shifted(f, params, inputs, value_site, place)[1] for inputs, place in kept]
    before = [read(run(torch.zeros_like(mean))).detach().log_softmax(-1) for run in quiet]
    scale = mean.square().mean().sqrt()

    def loss(shift: Tensor) -> Tensor:
        delta = scale * shift
        # A batch of prompts is weighted by how many it holds.
        said = [(log_probability(read(run(delta)), target) / count).sum() for _, run in runs]
        total = norm_factor * shift.square().mean() - torch.stack(said).sum()
        for run, old in zip(quiet, before):
            new = read(run(delta)).log_softmax(-1)
            total = total + kl_factor / len(quiet) * (old.exp() * (old - new)).sum(-1).mean()
        return total

    shift = first = second = torch.zeros_like(mean)
    losses = []
    for step in range(1, steps + 1):
        slope, current = grad_and_value(loss)(shift)
        losses.append(current)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope.square()
        shift = shift - learning_rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        size = shift.square().mean().sqrt()
        shift = shift * (norm_limit / size.clamp(min=norm_limit))
    delta = scale * shift
    return ValueSearch(mean + delta, delta, torch.stack(losses))


def rome(
    f: Any,
    params: Any,
    prompts: Any,
    *,
    site: str | Site,
    position: Position | Sequence[Position],
    target: int | Tensor,
    statistics: KeyStatistics | Tensor,
    logits: Logits | None = None,
    transposed: bool | None = None,
    damping: float = 0.0,
    **search: Any,
) -> TensorDict:
    """Parameters with one association rewritten: the subject of the prompts now leads to the target.

        k = key_at(prompts);  v = optimize_value(prompts, target);  W' = rank_one_update(W, k, v, C)

    Args:
        f: functional model.
        params: its parameters.
        prompts: as in `optimize_value`.
        position: as in `optimize_value`.
        target: as in `optimize_value`.
        logits: as in `optimize_value`.
        site: address of a linear module with parameters `weight` and, if any, `bias`: the output projection of an MLP of the
            middle layers.
        statistics: of the inputs of the module, from `key_covariance`; or their second moment, Tensor [D, D]; `torch.eye(D)`
            gives the update of the least norm.
        transposed: whether the weight is stored as [D, O], as by `Conv1D`; None tells by the shape.
        damping: as in `rank_one_update`.
        **search: further options of `optimize_value`.

    Returns:
        `params` with a new weight; everything else is shared.

    Raises:
        InputError: no statistics, statistics of another site, a square weight without `transposed`. ParamsError: the module has
            no weight matrix. Otherwise as the three functions.

    Cost: that of `optimize_value`, and a Cholesky decomposition.

    Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Softmax(-1)))
        >>> x = torch.ones(1, 2)
        >>> edited = rome(f, params, x, site="0", position=None, target=2, statistics=torch.eye(2))
        >>> bool(f(edited, x)[0, 2] > f(params, x)[0, 2])
        True
    """
    require_params("params", params, single=True)
    _, _, path = ports(f, site)
    weight, bias = (flat(params).get((*path, name)) for name in ("weight", "bias"))
    if weight is None or weight.ndim != 2:
        raise ParamsError(f"site={str(site)!r} has no parameter {parameter_name((*path, 'weight'))!r} that is a matrix.")
    if transposed is None and weight.shape[0] == weight.shape[1]:
        raise InputError(
            f"transposed is None, but the weight at {str(site)!r} is square; say False for nn.Linear, True for Conv1D."
        )
    covariance = _second_moment(statistics)
    if len(covariance) not in weight.shape:
        raise InputError(
            f"statistics are those of {len(covariance)} numbers, the weight at {str(site)!r} is {describe(weight)}; compute "
            "them with key_covariance at this site."
        )
    stored = weight.shape[0] == len(covariance) if transposed is None else transposed
    key = key_at(f, params, prompts, site, position)
    found = optimize_value(f, params, prompts, site=site, position=position, target=target, logits=logits, **search)
    new = rank_one_update(weight, key, found.value, covariance, bias=bias, transposed=stored, damping=damping)
    return replaced(params, {(*path, "weight"): new})


def _second_moment(statistics: Any) -> Tensor:
    if isinstance(statistics, KeyStatistics):
        return statistics.second_moment
    if not isinstance(statistics, Tensor) or statistics.ndim != 2 or statistics.shape[0] != statistics.shape[1]:
        raise InputError(
            f"statistics is {describe(statistics)}; give what key_covariance returns, or a second moment [D, D] of the keys."
        )
    return statistics


def _shifted(f: Any, params: Any, inputs: Any, site: str, position: Position) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The values [B, O] at a position, and the output as a function of what is added to them."""
    what = explained(f, params, inputs, at=[site])
    (values,) = what.values
    require_position(values, position)

    def run(delta: Tensor) -> Any:
        if position is None:
            return what.shifted([delta.expand(values.shape)])
        tokens = torch.arange(values.shape[1], device=values.device)
        place = position if isinstance(position, Tensor) else torch.full_like(tokens[:1], position)
        here = tokens == (place % values.shape[1])[:, None]
        return what.shifted([(here[..., None] * delta).expand(values.shape)])

    return at_position(values, position), run
