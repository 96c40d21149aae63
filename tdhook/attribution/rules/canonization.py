"""Canonization: the same function with parameters that suit propagation rules, as pure maps of `params`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from ...core.errors import InputError, ParamsError, RuleError
from ...core.functional import Execution, FunctionalModel
from ...core.scope import Observer
from ...core.sites import Site
from ...core.structure import describe, tensors
from ...core.tracing import run_abstract_or_real
from ...core.transforms import exact_wants, require_sites

_BatchNorm = nn.modules.batchnorm._BatchNorm
_Conv = nn.modules.conv._ConvNd
_Transposed = nn.modules.conv._ConvTransposeNd

Pair = tuple[str, str]


def merge_batch_norm(
    f: FunctionalModel, params: TensorDictBase, inputs: Any = None, *, pairs: Sequence[Pair] | None = None
) -> TensorDictBase:
    """Batch norms merged into the linear layers and convolutions next to them; the function stays the same.

        s = gamma / sqrt(var + eps),  t = beta - mean s;      before it:  W' = s W,  b' = s b + t
                                                              after it:   W' = W s,  b' = b + W t

    A merged batch norm becomes the identity: weight 1, bias 0, mean 0, variance 1 - eps. A layer without a bias has no place
    for the shift, as `params` cannot get a new entry: its batch norm keeps t as its bias, and is a shift. Zennit gives such a
    layer a bias instead; with rules under which biases matter (z+, alpha-beta, gamma, not epsilon), that is another relevance.
    Make the layers with `bias=True` (and zeros) before `functionalize` to get it.

    Args:
        f: functional model.
        params: its parameters; not changed.
        inputs: an input, to find by data flow which layer feeds which; only shapes matter.
        pairs: which to merge instead, in the order in which they run: `[("conv1", "bn1"), ("bn2", "fc")]`. For a linear layer
            the axis of the batch norm has to be that of its output, [B, C].

    Returns:
        TensorDict like `params`.

    Raises:
        InputError: neither or both of `inputs` and `pairs`; a pair that is none; nothing to merge. RuleError: a pair that
            cannot be merged exactly: a batch norm before zero padding or before a transposed convolution, a layer after a batch
            norm without a bias for the shift, batch statistics (train mode). SiteError: an unknown module.

    Cost: no pass; for `inputs` a run on fake tensors.

    Source: Guillemot et al., "Breaking Batch Normalization for better explainability of Deep Neural Networks through Layer-wise
    Relevance Propagation" (2020).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2, eps=0.5)).eval()
        >>> f, params = tdhook.functionalize(model)
        >>> merged = merge_batch_norm(f, params, torch.ones(1, 3))
        >>> merged["1", "running_var"], torch.allclose(f(merged, torch.ones(1, 3)), f(params, torch.ones(1, 3)))
        (tensor([0.5000, 0.5000]), True)
    """
    require_sites(f)
    _require(params)
    if (inputs is None) == (pairs is None):
        raise InputError("give either inputs, to find batch norms by data flow, or pairs of modules.")
    if pairs is None:
        pairs = batch_norm_pairs(f, params, inputs)
        if not pairs:
            raise InputError("no batch norm can be merged into a linear layer or convolution beside it; nothing would change.")
    merged = params.clone(recurse=False)
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"pairs holds {describe(pair)}; give pairs of module paths, such as ('conv1', 'bn1').")
        first, second = pair
        one, other = _module(f, first), _module(f, second)
        if (obstacle := _obstacle(one, other)) is not None:
            raise RuleError(f"{first!r} and {second!r} cannot be merged: {obstacle}.")
        if isinstance(other.module, _BatchNorm):
            _into_layer_before(merged, one, other)
        else:
            _into_layer_after(merged, other, one)
    return merged


def batch_norm_pairs(f: FunctionalModel, params: TensorDictBase, inputs: Any) -> list[Pair]:
    """Which batch norms can be merged exactly into a layer that feeds them, and nothing else, or is fed by them alone.

    Args:
        f: functional model.
        params: its parameters.
        inputs: an input; only shapes matter.

    Returns:
        Pairs of module paths in the order in which they run, for `merge_batch_norm`. Layers that are called twice are left out.

    Cost: a run on fake tensors.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU()).eval()
        >>> batch_norm_pairs(*tdhook.functionalize(model), torch.ones(1, 1, 4, 4))
        [('0', '1')]
    """
    require_sites(f)

    def run(params: Any, inputs: Any) -> _Flow:
        flow = _Flow()
        flow.returned = [id(t) for _, t in tensors(f._run(params, inputs, (), Execution(observer=flow)))]
        return flow

    flow, _ = run_abstract_or_real(f, run, params, inputs)
    modules = {path: module for path in flow.order if (module := _module(f, path).module) is not None}
    pairs: list[Pair] = []
    taken: set[str] = set()
    for into in (True, False):  # into the layer before, where there is one
        for path, module in modules.items():
            if not isinstance(module, _BatchNorm) or path in taken:
                continue
            partner = flow.feeding(path) if into else flow.fed(path)
            if partner is None or partner in taken or not isinstance(modules.get(partner), (nn.Linear, _Conv)):
                continue
            pair = (partner, path) if into else (path, partner)
            flat = not isinstance(modules[partner], nn.Linear) or flow.dimensions[path] == 2
            if flat and _obstacle(_module(f, pair[0]), _module(f, pair[1])) is None:
                pairs.append(pair)
                taken |= {path, partner}
    return sorted(pairs, key=lambda pair: flow.order.index(pair[0]))


def zero_bias(params: TensorDictBase, f: FunctionalModel | None = None) -> TensorDictBase:
    """All biases set to zero: another function, in which they absorb no relevance.

    Args:
        params: nested TensorDict; not changed.
        f: the functional model, so that its buffers are left alone.

    Returns:
        TensorDict like `params`. A bias is a floating-point tensor called `bias`, `bias_*` or `*_bias`. Merge batch norms
        first: the mean that they take off is a bias, too.

    Raises:
        ParamsError: params that are no TensorDict, or have no bias.

    Cost: no pass.

    Examples:
        >>> f, params = tdhook.functionalize(torch.nn.Linear(3, 2))
        >>> zero_bias(params)["bias"]
        tensor([0., 0.])
    """
    _require(params)
    buffers = {key for key, owners in f.base.blueprint.tensor_names.items() if owners[0][1] == "_buffers"} if f else set()
    zeroed, found = params.clone(recurse=False), False
    for key, value in params.items(True, True):
        path = key if isinstance(key, tuple) else (key,)
        name = path[-1]
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and path not in buffers
            and (name.startswith("bias") or name.endswith("bias"))
        ):
            zeroed.set(path, torch.zeros_like(value))
            found = True
    if not found:
        raise ParamsError("params has no bias; nothing would change.")
    return zeroed


@dataclass(frozen=True)
class _Found:
    """A module: its address, its class and options, where its tensors are in `params`, and whether others use them."""

    path: str
    module: Any
    names: dict[str, tuple[str, ...]]
    shared: bool


class _Flow(Observer):
    """Which module makes and which modules and operations use each tensor."""

    operations = True

    def __init__(self) -> None:
        self.order: list[str] = []
        self.calls: dict[str, int] = {}
        self.read: dict[str, int] = {}
        self.made: dict[str, int] = {}
        self.maker: dict[int, str] = {}
        self.users: dict[int, dict[str, None]] = {}
        self.dimensions: dict[str, int] = {}
        self.returned: list[int] = []
        self.keep: list[Any] = []  # an id that is freed would be given to another

    def enter(self, path: str, call: int, args: tuple, kwargs: dict) -> None:
        self.order += [] if path in self.calls else [path]
        self.calls[path] = self.calls.get(path, 0) + 1
        found = [t for _, t in tensors((args, kwargs))]
        self.keep += found
        if found:
            self.read[path], self.dimensions[path] = id(found[0]), found[0].ndim

    def leave(self, path: str, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        if isinstance(output, Tensor):
            self.keep.append(output)
            self.made[path] = id(output)
            self.maker.setdefault(id(output), path)

    def operation(self, path: str, op: str, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        for _, tensor in tensors((args, kwargs)):
            self.keep.append(tensor)
            self.users.setdefault(id(tensor), {})[path] = None

    def feeding(self, path: str) -> str | None:
        """The module whose result only this one uses."""
        tensor = self.read.get(path)
        maker = None if tensor is None else self.maker.get(tensor)
        return maker if maker is not None and self._only(tensor, path) and self.calls[maker] == self.calls[path] == 1 else None

    def fed(self, path: str) -> str | None:
        """The only module that uses what this one returns."""
        tensor = self.made.get(path)
        users = list(self.users.get(tensor, ())) if tensor is not None else []
        once = len(users) == 1 and self._only(tensor, users[0]) and self.calls[users[0]] == self.calls[path] == 1
        return users[0] if once and self.read.get(users[0]) == tensor else None

    def _only(self, tensor: int | None, path: str) -> bool:
        return tensor is not None and list(self.users.get(tensor, ())) == [path] and tensor not in self.returned


def _require(params: Any) -> None:
    if not isinstance(params, TensorDictBase):
        raise ParamsError(f"params is a TensorDict as tdhook.functionalize returns it, got {describe(params)}.")


def _module(f: FunctionalModel, site: str) -> _Found:
    if not isinstance(site, str):
        raise InputError(f"pairs holds {describe(site)}; give pairs of module paths, such as ('conv1', 'bn1').")
    address = exact_wants(f, site, "pairs")[0].site if site else Site()
    module: Any = f.base.blueprint.template.root
    keys = tuple(map(str, address.path))
    names, shared = {}, False
    for key, owners in f.base.blueprint.tensor_names.items():
        for path, _, name in owners:
            if tuple(path) == keys:
                names[name] = key
                shared = shared or len(owners) > 1
    return _Found(site, module.get_submodule(".".join(keys)), names, shared)


def _obstacle(first: _Found, second: _Found) -> str | None:
    """Why two modules cannot be merged exactly."""
    norm, layer = (second, first) if isinstance(second.module, _BatchNorm) else (first, second)
    bn, linear = norm.module, layer.module
    if not isinstance(bn, _BatchNorm) or not isinstance(linear, (nn.Linear, _Conv)):
        return "one has to be a batch norm and the other a linear layer or convolution"
    if bn.training or "running_mean" not in norm.names:
        return f"{norm.path!r} normalises with the statistics of the batch; call model.eval() first"
    shared = next((each for each in (norm, layer) if each.shared), None)
    if shared is not None:
        return f"the parameters of {shared.path!r} are used elsewhere, too"
    has_bias = "bias" in layer.names
    if norm is second:
        count = linear.out_features if isinstance(linear, nn.Linear) else linear.out_channels
        if not has_bias and not bn.affine:
            return "neither has a bias to take the shift"
    else:
        count = linear.in_features if isinstance(linear, nn.Linear) else linear.in_channels
        if not has_bias:
            return f"{layer.path!r} has no bias to take the shift"
        if isinstance(linear, _Transposed):
            return f"{layer.path!r} is transposed: its border would get another shift"
        if isinstance(linear, _Conv) and linear.padding_mode == "zeros" and _pads(linear):
            return f"{layer.path!r} pads with zeros, which would become {norm.path!r} of zeros"
    return None if count == bn.num_features else f"{norm.path!r} has {bn.num_features} features for {count}"


def _pads(conv: Any) -> bool:
    if isinstance(conv.padding, str):
        return conv.padding == "same" and any(size > 1 for size in conv.kernel_size)
    return any(amount > 0 for amount in conv.padding)


def _scale_and_shift(params: TensorDictBase, norm: _Found) -> tuple[Tensor, Tensor]:
    """The affine map of each channel that a batch norm is, in the precision of its statistics."""
    mean, variance = params[norm.names["running_mean"]], params[norm.names["running_var"]]
    scale = (variance + norm.module.eps).rsqrt()
    if "weight" in norm.names:
        scale = scale * params[norm.names["weight"]]
    shift = -mean * scale
    return scale, shift + params[norm.names["bias"]] if "bias" in norm.names else shift


def _become_identity(params: TensorDictBase, norm: _Found, shift: Tensor | None = None) -> None:
    values = {"running_mean": 0.0, "running_var": 1 - norm.module.eps, "weight": 1.0, "bias": 0.0}
    for name, value in values.items():
        if name in norm.names:
            params.set(norm.names[name], torch.full_like(params[norm.names[name]], value))
    if shift is not None:
        params.set(norm.names["bias"], shift.to(params[norm.names["bias"]]))


def _into_layer_before(params: TensorDictBase, layer: _Found, norm: _Found) -> None:
    scale, shift = _scale_and_shift(params, norm)
    weight = params[layer.names["weight"]]
    if isinstance(layer.module, _Transposed):  # [in, out / groups, *kernel]
        groups = layer.module.groups
        by_group = weight.unflatten(0, (groups, -1)) * _aligned(scale.unflatten(0, (groups, 1, -1)), weight.ndim + 1)
        params.set(layer.names["weight"], by_group.flatten(0, 1).to(weight))
    else:
        params.set(layer.names["weight"], (weight * _aligned(scale, weight.ndim)).to(weight))
    if "bias" in layer.names:
        bias = params[layer.names["bias"]]
        params.set(layer.names["bias"], (bias * scale + shift).to(bias))
        _become_identity(params, norm)
    else:
        _become_identity(params, norm, shift)


def _into_layer_after(params: TensorDictBase, layer: _Found, norm: _Found) -> None:
    scale, shift = _scale_and_shift(params, norm)
    weight, bias = params[layer.names["weight"]], params[layer.names["bias"]]  # [out, in / groups, *kernel]
    groups = getattr(layer.module, "groups", 1)
    by_group = weight.unflatten(0, (groups, -1))
    scales, shifts = (_aligned(value.unflatten(0, (groups, 1, -1)), by_group.ndim) for value in (scale, shift))
    summed = (by_group * shifts).flatten(2).sum(-1).flatten()
    params.set(layer.names["weight"], (by_group * scales).flatten(0, 1).to(weight))
    params.set(layer.names["bias"], (bias + summed).to(bias))
    _become_identity(params, norm)


def _aligned(value: Tensor, ndim: int) -> Tensor:
    return value.reshape(*value.shape, *[1] * (ndim - value.ndim))
