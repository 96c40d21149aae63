"""AttnLRP, CP-LRP and RelP of a Llama against its plain gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import tdhook
from tdhook.attribution import lrp, rules

from .case import Case, Competitor, Goal, Options
from .lrp import PLAIN, _nothing, _unlike

TITLE = "AttnLRP of a Llama"
INTRODUCTION = """\
A Llama of eight blocks of width 256 (random weights, fused attention), the relevance of the embeddings of its tokens for
the logit of one next token, and of ten. `plain gradient` is autograd's gradient times the embedding: a bound, and another
number. LXT 2.1, which patches classes of transformers, cannot be imported with the version here (transformers 5); with
transformers 4.53 its numbers are these."""

SITE = "model.embed_tokens"
PRESETS = {"AttnLRP": rules.attn_lrp, "CP-LRP": rules.cp_lrp, "RelP": rules.relp}


def cases(options: Options) -> Iterator[Case]:
    for name in list(PRESETS)[: 1 if options.quick else 3]:
        for count, length in [(1, 16)] if options.quick else [(1, 16), (1, 256), (10, 64)]:
            yield Case(
                f"{name}, {count} token{'s' * (count > 1)} of {length}",
                {"preset": name, "targets": count, "length": length},
                partial(_competitors, name, count, length),
                claims={"CP-LRP without epsilon adds up to the logit": _conserves},
                goals=(Goal("ours", PLAIN, 1 / 1.5),) if count == 1 and length == 256 else (),
                memory=not options.quick and length == 256,
                seconds=4 if options.quick else 20,
            )


@cache
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_attention_heads=8, num_key_value_heads=4, **sizes)).eval()


def _competitors(name: str, count: int, length: int) -> list[Competitor]:
    # torch's vmap calls the backward of the fused attention kernel once per target and says so
    warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
    model, ids, targets = llama(), tokens(length), list(range(count))
    f, params = tdhook.functionalize(model, use_cache=False, logits_to_keep=1)
    chunk_sizes = (None, 1) if count > 1 else (None,)
    choices = {}
    for c in chunk_sizes:
        choices[f"at the embedding, chunk_size={c}"] = partial(_ours, f, params, ids, PRESETS[name](), targets, c)
        choices[f"embeddings as input, chunk_size={c}"] = partial(_of_embeddings, f, params, ids, PRESETS[name](), targets, c)
    return [
        Competitor("ours", choices),
        Competitor(PLAIN, {"": _unlike(_plain(model, ids, targets))}, view=_nothing, note="another number; a bound"),
    ]


def tokens(length: int) -> Tensor:
    """[1, length]"""
    return torch.randint(4096, (1, length), generator=torch.Generator().manual_seed(1))


def _ours(f: Any, params: Any, ids: Tensor, table: Any, targets: list[int], chunk_size: int | None) -> Tensor:
    """[T, 1, length, width]"""
    some = tdhook.targets.indices(targets, key="logits", position=-1)
    return lrp(f, params, ids, rules=table, targets=some, at=SITE, chunk_size=chunk_size)[SITE]


def _of_embeddings(f: Any, params: Any, ids: Tensor, table: Any, targets: list[int], chunk_size: int | None) -> Tensor:
    """The same, one forward pass less: an input needs no run that finds its value."""
    some = tdhook.targets.indices(targets, key="logits", position=-1)
    inputs = {"inputs_embeds": params["model", "embed_tokens", "weight"][ids]}
    return lrp(f, params, inputs, rules=table, targets=some, chunk_size=chunk_size)["inputs_embeds"]


def _plain(model: nn.Module, ids: Tensor, targets: list[int]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits[0, -1]
        rows = [torch.autograd.grad(logits[t], embedded, retain_graph=t != targets[-1])[0] * embedded for t in targets]
        return torch.stack(rows)

    return run


def _conserves() -> bool:
    f, params = tdhook.functionalize(llama(), use_cache=False, logits_to_keep=1)
    ids = tokens(16)
    total = _ours(f, params, ids, rules.cp_lrp(0.0), [3], None).sum()
    return bool((total / f(params, ids).logits[0, -1, 3] - 1).abs() < 1e-4)
