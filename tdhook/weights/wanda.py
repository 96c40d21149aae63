"""Wanda: weights times the norms of what they are multiplied with."""

from __future__ import annotations

from typing import Any

import torch
from einops import repeat
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from ..core.errors import ParamsError
from ..core.functional import Blueprint, FunctionalModel
from ..core.reading import capture
from ..core.sites import join_path
from ..core.transforms import require_sites
from .selection import MATRICES, Key, Select, flat, nest, parameter_name, require_params, select_parameters

INPUTS_FIRST = "Conv1D"  # the linear layer of GPT-2 in transformers, whose weight is [in, out]


def wanda(f: FunctionalModel, params: TensorDictBase, inputs: Any, *, select: Select = None) -> TensorDict:
    """Weight times the norm of what it is multiplied with.

        s_oi = |W_oi| ||x_i||_2,   the norm over all examples and positions

    It is made to be compared within one output: `prune(params, scores, amount, scope="output")`. The scores of several batches
    together are the root of the sum of their squares.

    Args:
        f: functional model.
        params: its parameters.
        inputs: as `f` takes them.
        select: weights of linear layers and convolutions; None: all of them. A convolution's x_i are the values of channel i.

    Returns:
        TensorDict of the scores of the selected weights.

    Raises:
        ParamsError: a parameter that is no such weight. SiteError: a layer that does not run.

    Cost: one forward pass, and memory for the inputs of all selected layers.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2024).

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Sequential(torch.nn.Linear(2, 1)))
        >>> scores = wanda(f, params, torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
        >>> torch.allclose(scores["0", "weight"], params["0", "weight"].abs() * torch.tensor([5.0, 1.0]))
        True
    """
    require_sites(f)
    require_params("params", params, single=True)
    multiplied = _multiplied(f.base.blueprint)
    tensors = flat(params)
    known = {key: tensors[key] for key, _ in multiplied if key in tensors}
    chosen = known if select is None else select_parameters(params, select, least_dims=MATRICES)
    for key in chosen:
        if key not in known:
            raise ParamsError(
                f"wanda multiplies weights of linear layers and convolutions with their inputs; {parameter_name(key)!r} is no "
                "such weight."
            )
    if not chosen:
        raise ParamsError("the model has no linear layer and no convolution, so there is nothing for wanda to score.")
    sites = {key: f"{join_path(key[:-1])}@*:in" for key in chosen}
    _, values = capture(f, list(sites.values()))(params, inputs)
    scores = {}
    for key, weight in chosen.items():
        path = join_path(key[:-1])
        calls = [value for site, value in values.items() if site.rpartition(":")[0].partition("@")[0] == path]
        scores[key] = weight.abs() * _input_norms(calls, weight, (key, True) in multiplied).to(weight.dtype)
    return nest(scores)


@torch.compiler.assume_constant_result
def _multiplied(blueprint: Blueprint) -> tuple[tuple[Key, bool], ...]:
    """The weights that linear layers and convolutions multiply with their inputs, and whether these are the first dimension."""
    found = []
    for path, module in blueprint.template.root.named_modules():
        inputs_first = blueprint.kinds.get(join_path(path.split(".")) if path else "") == INPUTS_FIRST
        if inputs_first or isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            found.append(((*path.split("."), "weight") if path else ("weight",), inputs_first))
    return tuple(found)


def _input_norms(calls: list[Tensor], weight: Tensor, inputs_first: bool) -> Tensor:
    """The norms of the inputs of a layer over all its calls, in a shape that broadcasts with its weight."""
    axis = -1 if weight.ndim == MATRICES else 1 - weight.ndim
    rows = [value.movedim(axis, 0).flatten(1) for value in calls]
    wide = torch.promote_types(weight.dtype, torch.float32)  # squares of float16 overflow
    norms = torch.stack([torch.linalg.vector_norm(row, dim=1, dtype=wide) for row in rows]).square().sum(0).sqrt()
    if inputs_first:
        return norms[:, None]
    groups = len(norms) // weight.shape[1]
    by_output = repeat(norms, "(group i) -> (group o) i", group=groups, o=weight.shape[0] // groups)
    return by_output.reshape(*by_output.shape, *[1] * (weight.ndim - MATRICES))
