"""A zoo of small models, each with inputs and with what it cannot do for reasons of its own."""

from __future__ import annotations

import types
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations


def call(model: nn.Module, inputs: Any, **constants: Any) -> Any:
    """What a person would write to call the model."""
    if isinstance(inputs, Tensor) or (isinstance(inputs, TensorDictBase) and isinstance(model, TensorDictModuleBase)):
        return model(inputs, **constants)
    if isinstance(inputs, tuple):
        return model(*inputs, **constants)
    assert isinstance(inputs, (Mapping, TensorDictBase))
    return model(**dict(inputs.items()), **constants)


class MLP(nn.Module):
    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)


class Residual(nn.Module):
    """Functional operations only: relu, add, softmax."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = x + F.relu(self.up(x))
        return h + F.softmax(self.down(h), dim=-1)


class InPlace(nn.Module):
    """Overwrites its inputs, its residual stream and the outputs of its children."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        h = self.up(x)
        h += x
        out = self.down(self.act(h))
        out.relu_()
        return out


class Attention(nn.Module):
    def __init__(self, width: int = 8, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.unembed.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.embed(tokens))


class Buffers(nn.Module):
    """A persistent and a non-persistent buffer, None as child, as parameter and as buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("shift", torch.tensor(0.5), persistent=False)
        self.register_buffer("cache", None)
        self.register_parameter("nothing", None)
        self.gap = None
        self.head = nn.Linear(3, 2, bias=False)
        self.head.norm = None
        self.register_module("empty", None)

    def forward(self, x: Tensor) -> Tensor:
        self.cache = x
        return self.head(x * self.scale + self.shift)


class OddKeys(nn.Module):
    """A child for each name that could confuse an address."""

    names = ("a b", "a:b", "a@1", "a/b", "a[0]", "a*", '"', "'", "a-b", "-1", "\\", "0:2", "ü", "**", " ", "in", "[-1]")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({name: nn.Linear(3, 3) for name in self.names})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x).tanh()
        return x


Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Record:
    score: Tensor
    note: str
    pair: Pair


class Structured(nn.Module):
    """Children that return a tuple, a namedtuple, a dict, a dataclass and a nest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.tuple, self.named, self.dict, self.record = (_Return(i) for i in range(4))

    def forward(self, x: Tensor) -> Any:
        h = self.linear(x)
        a, _, (b, _) = self.tuple(h)
        pair = self.named(a + b)
        found = self.dict(pair.left - pair.right)
        record = self.record(found["0"] + 2 * found["1"] + found["deep"][0]["odd ]key["])
        return {"record": record, "list": [record.score, 3], "none": None}


class _Return(nn.Module):
    def __init__(self, kind: int):
        super().__init__()
        self.kind = kind

    def forward(self, h: Tensor) -> Any:
        pair = Pair(h * 2, h.sin())
        if self.kind == 0:
            return h + 1, "text", (h - 1, None)
        if self.kind == 1:
            return pair
        if self.kind == 2:
            return {"1": h, "0": h * 3, "deep": [{"odd ]key[": h.cos()}, True]}
        return Record(h.sum(-1), "note", pair)


class Several(nn.Module):
    """Several inputs, optional ones, and arguments that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, a: Tensor, b: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, mode: str = "sum") -> Tensor:
        left, right = self.left(input=a), self.right(b)
        h = left + right if mode == "sum" else left * right
        return h * scale if mask is None else h * scale * mask


class OwnForward(nn.Module):
    """Instances whose `forward` is not that of their class: bound to it, bound to the parent, a partial, a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.bound, self.parental, self.closed = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.bound.forward = types.MethodType(lambda m, x: F.linear(x, m.weight) - 1, self.bound)
        self.parental.forward = self.double
        original = self.closed.forward
        self.closed.forward = lambda x: original(x) * 2

    def double(self, x: Tensor) -> Tensor:
        return F.linear(x, self.parental.weight) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.closed(self.parental(self.bound(x)))


class Holder(nn.Module):
    """Holds bound methods and children a second time, in containers that are not ModuleLists."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.steps = [self.a, (self.b, {"again": self.a})]
        self.method = self.b.forward
        self.weights = [self.a.weight]

    def forward(self, x: Tensor) -> Tensor:
        h = self.steps[1][1]["again"](self.steps[1][0](self.steps[0](x)))
        return self.method(h) @ self.weights[0]


class Hidden(nn.Module):
    """Reaches a child through a module that is no child of its own, and has another child that nobody knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.parts = [nn.Sequential(self.linear, nn.Tanh()), nn.BatchNorm1d(3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[1](self.parts[0](x))


class Stateful(nn.Module):
    """Writes attributes of every kind in forward: a model as it should not be, but often is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("late", None)
        self.history: list = []
        self.table = {"calls": 0, "nested": [0]}
        self.plain = torch.zeros(3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.table["calls"] += 1
        self.table["nested"][0] += 1
        self.history.append(self.table["calls"])
        self.count += 1
        self.plain += 1
        self.late = self.count if self.late is None else self.late + 1
        self.fresh = getattr(self, "fresh", 0) + 1
        total = self.calls + len(self.history) + self.table["nested"][0] + self.fresh
        return self.linear(x) * total + self.count + self.plain + self.late


class TransformsInside(nn.Module):
    """Uses vmap and grad on its own children."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.each = nn.Linear(3, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        force = torch.func.grad(lambda x: self.energy(x).square().sum())(x)
        return force + torch.func.vmap(self.each)(x)


@dataclass(frozen=True)
class Case:
    """A model with inputs.

    Attributes:
        make: builds the module and its inputs.
        fused: the module itself takes a fused path in eval mode, equal only to float precision.
        batched: the inputs have a batch axis 0 of length 4 that vmap may map over one by one; else the reason why not.
        compiles: True, or the reason why Dynamo cannot trace it.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    fused: bool = False
    batched: bool | str = True
    compiles: bool | str = True
    pickles: bool | str = True

    def __call__(self) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        return self.make()

    def __repr__(self) -> str:
        return self.name


def _cnn() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3), nn.Flatten(-3), nn.LazyLinear(2)
    )
    model(torch.zeros(1, 2, 8, 8))
    return model, torch.randn(4, 2, 8, 8)


def _reused() -> tuple[nn.Module, Tensor]:
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(3, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2), relu), torch.randn(4, 3)


def _encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval(), torch.randn(4, 5, 8)


def _mha() -> tuple[nn.Module, tuple]:
    x = torch.randn(4, 5, 8)
    return nn.MultiheadAttention(8, 2, batch_first=True).eval(), (x, x, x)


def _batchnorm(train: bool) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    model[1].running_mean.normal_()
    return model.train(train), torch.randn(4, 3)


def _normed(norm: Callable) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(4, 3)


def _tensordict_module() -> tuple[nn.Module, TensorDict]:
    model = TensorDictModule(nn.Linear(3, 2), in_keys=["x"], out_keys=[("y", "z")])
    return model, TensorDict({"x": torch.randn(4, 3), "other": torch.ones(4)}, [4])


def _tensordict_sequential() -> tuple[nn.Module, TensorDict]:
    model = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 4), in_keys=["x"], out_keys=["h"]),
        TensorDictModule(nn.ReLU(), in_keys=["h"], out_keys=["h"]),
        TensorDictModule(nn.Linear(4, 2), in_keys=["h"], out_keys=["y"]),
    )
    return model, TensorDict({"x": torch.randn(4, 3)}, [4])


def _probabilistic() -> tuple[nn.Module, TensorDict]:
    model = ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(3, 2), in_keys=["x"], out_keys=["loc"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc"],
            out_keys=["y"],
            distribution_class=torch.distributions.Normal,
            distribution_kwargs={"scale": 1.0, "validate_args": False},
            default_interaction_type="mean",
        ),
    )
    return model, TensorDict({"x": torch.randn(4, 3)}, [4])


def _dtype(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype), torch.randn(4, 3, dtype=dtype)


def _compiled() -> tuple[nn.Module, Tensor]:
    model = MLP(3, 4, 2)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    model.layers[1].compile(backend="eager")
    return torch.compile(model, backend="eager"), torch.randn(4, 3)


def _hooked() -> tuple[nn.Module, Tensor]:
    model = MLP(3, 4, 2)
    model.layers[0].register_forward_hook(_double)
    model.register_forward_pre_hook(_negate)
    return model, torch.randn(4, 3)


def _double(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output * 2


def _negate(module: nn.Module, args: tuple) -> tuple:
    return tuple(-a for a in args)


def _tokens() -> dict[str, Tensor]:
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[1:, -2:] = 0
    return {"input_ids": torch.randint(0, 30, (4, 6)), "attention_mask": mask}


def _gpt2() -> tuple[nn.Module, dict]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=30, n_positions=12, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval(), _tokens()


def _llama() -> tuple[nn.Module, dict]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=12,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), _tokens()


def _bert() -> tuple[nn.Module, dict]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=12, attn_implementation="eager",
    )  # fmt: skip
    return BertForSequenceClassification(config).eval(), _tokens()


def _vit() -> tuple[nn.Module, dict]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4
    )
    return ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(4, 3, 8, 8)}


_RNN = "Dynamo does not trace RNNs (torch._dynamo.config.allow_rnn)"
_NO_RULE = "torch has no batching rule for RNNs"
_WHOLE = "the model needs its batch axis"

plain = [
    Case("mlp", lambda: (MLP(3, 4, 4, 2), torch.randn(4, 3))),
    Case("cnn", _cnn),
    Case("reused", _reused),
    Case("residual", lambda: (Residual(), torch.randn(4, 4))),
    Case("in_place", lambda: (InPlace(), torch.randn(4, 4))),
    Case("attention", lambda: (Attention(), torch.randn(4, 5, 8))),
    Case("tied", lambda: (Tied(), torch.randint(0, 7, (4, 5)))),
    Case("lstm", lambda: (nn.LSTM(3, 4, 2, batch_first=True), torch.randn(4, 5, 3)), batched=_NO_RULE, compiles=_RNN),
    Case(
        "gru",
        lambda: (nn.GRU(3, 4, bidirectional=True, batch_first=True), torch.randn(4, 5, 3)),
        batched=_NO_RULE,
        compiles=_RNN,
    ),
    Case("mha", _mha),
    Case("encoder", _encoder, fused=True),
    Case("batchnorm_train", lambda: _batchnorm(True), batched=_WHOLE),
    Case("batchnorm_eval", lambda: _batchnorm(False), batched=_WHOLE),
    Case("buffers", lambda: (Buffers(), torch.randn(4, 3))),
    Case("odd_keys", lambda: (OddKeys(), torch.randn(4, 3))),
    Case("structured", lambda: (Structured(), torch.randn(4, 3))),
    Case("several", lambda: (Several(), {"b": torch.randn(4, 2), "a": torch.randn(4, 3)})),
    Case("own_forward", lambda: (OwnForward(), torch.randn(4, 3)), pickles="it holds a lambda"),
    Case("holder", lambda: (Holder(), torch.randn(4, 3))),
    Case("hidden", lambda: (Hidden(), torch.randn(4, 3)), batched=_WHOLE),
    Case("stateful", lambda: (Stateful(), torch.randn(4, 3))),
    Case("hooked", _hooked),
    Case("compiled", _compiled),
    Case("complex64", lambda: _dtype(torch.complex64)),
    Case("bfloat16", lambda: _dtype(torch.bfloat16)),
    Case("float64", lambda: _dtype(torch.float64)),
]
normed = [
    Case("old_weight_norm", lambda: _normed(nn.utils.weight_norm)),
    Case("old_spectral_norm", lambda: _normed(nn.utils.spectral_norm)),
    Case("weight_norm", lambda: _normed(parametrizations.weight_norm), pickles="torch does not pickle parametrizations"),
    Case(
        "spectral_norm",
        lambda: _normed(parametrizations.spectral_norm),
        pickles="torch does not pickle parametrizations",
    ),
]
tensordicts = [
    Case("tensordict_module", _tensordict_module),
    Case("tensordict_sequential", _tensordict_sequential),
    Case("probabilistic", _probabilistic),
]
transformers = [
    Case("gpt2", _gpt2, batched=_WHOLE),
    Case("llama", _llama, batched=_WHOLE),
    Case("bert", _bert, batched=_WHOLE),
    Case("vit", _vit, batched=_WHOLE),
]
everything = [*plain, *normed, *tensordicts, *transformers]


def named(*names: str) -> list[Case]:
    """The cases with these names."""
    table = {case.name: case for case in everything}
    return [table[name] for name in names]
