"""What the operations of torch are, as far as rules need to know: their group, and which argument is what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CONVOLUTIONS = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"}
)
ACTIVATIONS = words(
    "relu relu6 leaky_relu rrelu prelu elu selu celu gelu silu mish hardswish hardtanh hardsigmoid hardshrink softshrink "
    "tanhshrink softplus softsign sigmoid expit logsigmoid log_sigmoid tanh threshold clamp clamp_min clamp_max clip"
)
NORMALIZATIONS = frozenset({"layer_norm", "rms_norm", "group_norm", "instance_norm", "local_response_norm", "normalize"})
ATTENTION = frozenset({"scaled_dot_product_attention"})
MAXIMA = words(
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max amax maximum "
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices fractional_max_pool2d min amin minimum topk "
    "sort median kthvalue cummax cummin"
)
AVERAGES = words(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean sum cumsum trace "
    "nanmean nansum interpolate upsample pixel_shuffle"
)
SUMS = frozenset({"add", "sub", "rsub", "neg", "addcmul", "lerp", "index_add", "scatter_add"})
# Linear in what moves: a permutation, a selection or a copy.
SHAPES = words(
    "adjoint alias as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to cat chunk clone "
    "column_stack concat concatenate contiguous copy detach diag diagonal diff double dropout dropout1d dropout2d "
    "dropout3d alpha_dropout feature_dropout dsplit dstack expand expand_as fill flatten flip fliplr flipud float fold "
    "gather getitem half bfloat16 hsplit hstack identity index index_copy index_fill index_put index_select item "
    "masked_fill masked_scatter masked_select moveaxis movedim mT narrow pad permute positive ravel repeat "
    "repeat_interleave requires_grad reshape roll rot90 scatter select setitem slice_scatter split squeeze stack swapaxes "
    "swapdims t take take_along_dim tensor_split tile to transpose tril triu type type_as unbind unflatten unfold "
    "unsqueeze unsafe_chunk unsafe_split view view_as vsplit where zeros_like ones_like full_like empty_like new_zeros "
    "new_ones new_full new_empty new_tensor cpu cuda pin_memory resolve_conj resolve_neg cosine_embedding data nan_to_num "
    "broadcast_shapes unsafe_view real imag"
)
_BILINEAR = frozenset(
    {
        "matmul",
        "rmatmul",
        "mm",
        "bmm",
        "mv",
        "dot",
        "vdot",
        "vecdot",
        "inner",
        "outer",
        "einsum",
        "tensordot",
        "bilinear",
        "_grouped_mm",
    }
)
_FUSED_BILINEAR = frozenset({"addmm", "addmv", "baddbmm", "addbmm"})
_PRODUCTS = frozenset({"mul", "div", "rdiv", "prod", "square"})
_SOFTMAX = frozenset({"softmax", "log_softmax", "softmin", "logsumexp", "gumbel_softmax"})

GROUPS: Mapping[str, str] = {
    "linear": "affine maps: linear layers, and matrix products with only one operand that depends on the input",
    "convolution": "convolutions, transposed ones too",
    "matmul": "matrix products of which both operands depend on the input",
    "product": "elementwise products of operands that depend on the input",
    "activation": "elementwise functions, and modules without parameters that consist of elementwise operations",
    "normalization": "layer, RMS, group and instance norms",
    "batch_norm": "batch norms",
    "softmax": "softmax and its logarithm",
    "attention": "fused attention",
    "maximum": "maxima: pooling, elementwise, along an axis",
    "average": "sums and averages along axes: pooling",
    "sum": "additions and subtractions of tensors",
    "scale": "products with something that does not depend on the input",
    "shape": "selections, copies and other rearrangements",
    "embedding": "look-up tables",
    "function": "everything else",
}
# The plain gradient of these, times the input, is the relevance that the 0-rule gives; it conserves.
LINEAR_GROUPS = frozenset({"linear", "convolution", "average", "sum", "scale", "shape", "batch_norm", "embedding"})

# Where the operands of an affine map stand, by position and by name.
_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("input", "mat1", "mat2"),
    "addmv": ("input", "mat", "vec"),
    "baddbmm": ("input", "batch1", "batch2"),
    "addbmm": ("input", "batch1", "batch2"),
    "bilinear": ("input1", "input2", "weight", "bias"),
    **dict.fromkeys(CONVOLUTIONS, ("input", "weight", "bias")),
}
_ELEMENTWISE = (
    ACTIVATIONS
    | _PRODUCTS
    | SUMS
    | words(
        "pow exp expm1 log log1p log2 log10 sqrt rsqrt erf erfc sin cos tan asin acos atan sinh cosh abs sign reciprocal "
        "float_power where floor ceil round exp2 sigmoid tanh rpow xlogy"
    )
)

Position = int | str


def group_of(name: str, active: tuple[Position, ...], args: tuple, kwargs: Mapping[str, Any]) -> str:
    """The group of an operation whose operands at `active` depend on the input."""
    if name in CONVOLUTIONS or name == "linear" or name in _BILINEAR or name in _FUSED_BILINEAR:
        moving = [p for p in active if p != bias_position(name, args, kwargs)]
        if not moving:
            return "sum"  # only the bias depends on the input
        if len(moving) > 1 or _moving_in(args[1:] if name == "einsum" else ()) > 1:
            return "matmul"
        return "convolution" if name in CONVOLUTIONS else "linear"
    if name == "pow" and active == (0,) and isinstance(exponent := (*args, *kwargs.values())[-1], int) and exponent > 1:
        return "product"
    if name in _PRODUCTS:
        if name in ("div", "rdiv") and (1 if name == "div" else 0) in active:
            return "function"  # in a denominator nothing can be shared out: its relevance is minus that of the numerator
        return "product" if len(active) > 1 or name in ("square", "prod") else "scale"
    for group, names in (
        ("activation", ACTIVATIONS),
        ("normalization", NORMALIZATIONS),
        ("softmax", _SOFTMAX),
        ("attention", ATTENTION),
        ("maximum", MAXIMA),
        ("average", AVERAGES),
        ("sum", SUMS),
        ("shape", SHAPES),
        ("embedding", frozenset({"embedding", "embedding_bag"})),
        ("batch_norm", frozenset({"batch_norm"})),
    ):
        if name in names:
            return group
    return "function"


def _moving_in(operands: tuple) -> int:
    """How many tensors that depend on the input are in the lists among the operands of an einsum."""
    lists = (given for given in operands if isinstance(given, (list, tuple)))
    return sum(t.requires_grad for given in lists for t in given if isinstance(t, torch.Tensor))


def plain_name(name: str) -> str:
    """The name of an operation without the namespace: `torch.linalg.vector_norm` calls itself `linalg_vector_norm`.

    Examples:
        >>> plain_name("linalg_vector_norm"), plain_name("special_expit"), plain_name("linear")
        ('vector_norm', 'expit', 'linear')
    """
    return name.removeprefix("linalg_").removeprefix("special_")


_PLACES = (torch, torch.Tensor, torch.nn.functional, torch.linalg, torch.special, torch.fft)


def known_operations() -> frozenset[str]:
    """Every name that a rule may be given for: what the groups list, and the functions and methods of torch."""
    listed = CONVOLUTIONS | NORMALIZATIONS | MAXIMA | AVERAGES | SHAPES | _BILINEAR | _FUSED_BILINEAR | _SOFTMAX | _ELEMENTWISE
    return listed | ATTENTION | {"module"} | {name for place in _PLACES for name in dir(place)}


def is_elementwise(name: str) -> bool:
    """Whether each element of the result depends on the elements of the operands at the same place alone."""
    return name in _ELEMENTWISE or name in ("clone", "to", "float", "type_as", "contiguous", "detach")


def bias_position(name: str, args: tuple, kwargs: Mapping[str, Any]) -> Position | None:
    """Where an affine map has its bias, if it has one."""
    names = _ARGUMENTS.get(name)
    if names is None:
        return None
    if name in _FUSED_BILINEAR:
        return 0 if args else "input"
    place = names.index("bias")
    return place if len(args) > place else "bias" if kwargs.get("bias") is not None else None


def weight_position(name: str, active: Position, args: tuple, kwargs: Mapping[str, Any]) -> Position | None:
    """Where an affine map in the operand at `active` has its weight; None for an einsum of more than two."""
    if name in _ARGUMENTS and name not in _FUSED_BILINEAR and name != "bilinear":
        weight: Position = 1 if len(args) > 1 else "weight"
        # Where a network makes the weights and the other factor is fixed, the two change places.
        return weight if active != weight else 0 if args else "input"
    bias = bias_position(name, args, kwargs)
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    factors = [p for p, value in given.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    others = [p for p in factors if p not in (active, bias)]
    return others[0] if len(others) == 1 else None
