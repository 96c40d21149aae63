"""Tiny transformers of many families with random weights, and what a reader of their code knows about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import tdhook
from tdhook.latent.names import Names, names

HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {**HIDDEN, "intermediate_size": 40, "vocab_size": 50}
GROUPED = {**SIZES, "num_key_value_heads": 2}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
POSITIONS = {"max_position_embeddings": 40}


@dataclass(frozen=True)
class Family:
    """How to make a model, and where a reader finds the parts of its second block."""

    model: str
    config: str
    options: dict = field(default_factory=dict)
    output: str = ""  # path of the output projection of attention in the second block
    norm: str = "pre"
    parallel: bool = False
    heads: tuple[int, int, int] = (4, 4, 8)  # query heads, key-value heads, size
    exact: bool = True  # attention is the output of the output projection, without norm or scale
    head: bool = True  # logits = final_norm @ unembedding + bias
    dtype: torch.dtype = torch.float64


def _llama_like(name: str, **changed: Any) -> Family:
    extra = changed.pop("config", {})
    told: dict[str, Any] = {"output": "model.layers.1.self_attn.o_proj", "heads": (4, 2, 8), **changed}
    config = told.pop("config_name", f"{name}Config")
    return Family(f"{name}ForCausalLM", config, {**GROUPED, **ENDS, **extra}, **told)


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 40, **ENDS},
        "transformer.h.1.attn.c_proj",
    ),
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 3,
            "vocab_size": 50,
            **POSITIONS,
            **ENDS,
        },
        "transformer.h.1.attn.attention.out_proj",
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZES, **ENDS}, "gpt_neox.layers.1.attention.dense", parallel=True
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        "GPTJConfig",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 50, **ENDS},
        "transformer.h.1.attn.out_proj",
        parallel=True,
    ),
    "llama": _llama_like("Llama"),
    "mistral": _llama_like("Mistral"),
    "qwen2": _llama_like("Qwen2"),
    "qwen3": _llama_like("Qwen3", config={"head_dim": 6}, heads=(4, 2, 6)),
    "gemma": _llama_like("Gemma", config={"head_dim": 6}, heads=(4, 2, 6)),
    "gemma2": _llama_like("Gemma2", config={"head_dim": 6}, heads=(4, 2, 6), norm="sandwich", exact=False, head=False),
    "phi": Family("PhiForCausalLM", "PhiConfig", {**SIZES, **ENDS}, "model.layers.1.self_attn.dense", parallel=True),
    "phi3": _llama_like("Phi3"),
    "falcon": Family(
        "FalconForCausalLM",
        "FalconConfig",
        {**HIDDEN, "vocab_size": 50, "new_decoder_architecture": True, "num_kv_heads": 2, **ENDS},
        "transformer.h.1.self_attention.dense",
        parallel=True,
        heads=(4, 2, 8),
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {**HIDDEN, "word_embed_proj_dim": 32, "ffn_dim": 40, "vocab_size": 50, **POSITIONS, **ENDS},
        "model.decoder.layers.1.self_attn.out_proj",
    ),
    "bloom": Family(
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, **ENDS},
        "transformer.h.1.self_attention.dense",
    ),
    "cohere": _llama_like("Cohere", parallel=True, head=False),
    "olmo2": _llama_like("Olmo2", norm="output", exact=False),
    "granite": _llama_like("Granite", config={"residual_multiplier": 0.5}, exact=False),
    "mixtral": _llama_like("Mixtral", config={"num_local_experts": 3}, dtype=torch.float32),
    "bert": Family(
        "BertForMaskedLM",
        "BertConfig",
        {**SIZES, **POSITIONS},
        "bert.encoder.layer.1.attention.output.dense",
        "post",
        head=False,
    ),
    "roberta": Family(
        "RobertaForMaskedLM",
        "RobertaConfig",
        {**SIZES, **POSITIONS, **ENDS},
        "roberta.encoder.layer.1.attention.output.dense",
        "post",
        head=False,
    ),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "vocab_size": 50, **POSITIONS},
        "distilbert.transformer.layer.1.attention.out_lin",
        "post",
        head=False,
    ),
    "albert": Family("AlbertForMaskedLM", "AlbertConfig", {**SIZES, **POSITIONS, "embedding_size": 16}, "", "post", head=False),
    "t5": Family(
        "T5EncoderModel",
        "T5Config",
        {"d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 50},
        "encoder.block.1.layer.0.SelfAttention.o",
        heads=(4, 4, 6),
        head=False,
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {**HIDDEN, "intermediate_size": 40, "image_size": 8, "patch_size": 4, "num_labels": 5},
        "",
        head=False,
    ),
}

FUSED = ("gpt2", "gpt_neox", "llama", "falcon", "bert", "t5")  # of those that have fused attention, enough


@cache
def model(name: str, attention: str = "eager") -> nn.Module:
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.options)
    made = getattr(transformers, family.model)._from_config(config, attn_implementation=attention).eval().to(family.dtype)
    with torch.no_grad():
        for parameter in made.parameters():  # the biases of a fresh model are 0, and the scales of its norms 1
            parameter += 0.2 * torch.randn_like(parameter)
    return made


def example(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)}
    return {"input_ids": torch.randint(3, 50, (2, 6), generator=generator)}


@cache
def named(name: str, attention: str = "eager") -> tuple[tdhook.FunctionalModel, Any, dict[str, Tensor], Names]:
    f, params = tdhook.functionalize(model(name, attention), **({"use_cache": False} if name not in ("t5", "vit") else {}))
    inputs = example(name)
    return f, params, inputs, names(f, params, inputs)


class PlainBlock(nn.Module):
    """A block without a linear module: raw weights, heads in the last of two axes, the stream written in place."""

    def __init__(self, width: int = 12, heads: int = 3):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Parameter(torch.randn(width, 3 * width) / 4)
        self.out = nn.Parameter(torch.randn(width, width) / 4)
        self.up, self.down = nn.Parameter(torch.randn(20, width) / 4), nn.Parameter(torch.randn(width, 20) / 4)
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        x = x.clone()
        q, k, v = (F.layer_norm(x, (width,)) @ self.qkv).view(batch, length, 3, width // self.heads, self.heads).unbind(2)
        scores = torch.einsum("bqdh,bkdh->bhqk", q, k) / 2
        z = torch.matmul(scores.softmax(-1), v.permute(0, 3, 1, 2)).transpose(1, 2).flatten(2)
        x += F.linear(z, self.out.T, self.shift)
        x += F.linear(F.gelu(F.linear(F.layer_norm(x, (width,)), self.up)), self.down)
        return x


def plain(width: int = 12, heads: int = 3) -> nn.Module:
    torch.manual_seed(0)
    parts = (
        nn.Embedding(30, width),
        PlainBlock(width, heads),
        PlainBlock(width, heads),
        nn.LayerNorm(width),
        nn.Linear(width, 30),
    )
    return nn.Sequential(*parts).double()
