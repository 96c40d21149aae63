"""Worker for TransformerLens."""

from __future__ import annotations

import os

os.environ["TQDM_DISABLE"] = "1"  # its sweeps show progress bars; read when tqdm is imported, which torch does

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))

from transformer_lens import HookedTransformer, HookedTransformerConfig, patching
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from worker import neighbour, serve


def hooked(network: Any, **switches: bool) -> HookedTransformer:
    """The same weights, none of them folded, so that activations are those of the network."""
    shape = network.config
    config = HookedTransformerConfig(
        n_layers=shape.n_layer,
        d_model=shape.n_embd,
        n_heads=shape.n_head,
        d_head=shape.n_embd // shape.n_head,
        d_mlp=4 * shape.n_embd,
        n_ctx=shape.n_positions,
        d_vocab=shape.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=shape.layer_norm_epsilon,
        device="cpu",
        **switches,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(config)
    model.load_and_process_state_dict(
        convert_gpt2_weights(network, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval().requires_grad_(False)


def gpt2_cache(size: str, batch: int) -> Callable[[], list[Tensor]]:
    """All hook points; returns the logits, the first MLP's output and the last block's."""
    gpt2 = neighbour("gpt2")
    model, ids = hooked(gpt2.gpt2(size)), gpt2.hello(batch)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"

    @torch.no_grad()
    def run() -> list[Tensor]:
        logits, cache = model.run_with_cache(ids)
        return [logits, cache["blocks.0.hook_mlp_out"], cache[last]]

    return run


def patching_sweep(size: str, length: int, differing: int, part: list[list[int]]) -> Callable[[], Tensor]:
    """The metric after each patch (kind, layer, position), in the order of the kinds."""
    import pandas

    gpt2 = neighbour("gpt2")
    model = hooked(gpt2.gpt2(size, 0.1))
    clean, corrupted = gpt2.prompts(1, length, differing)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
    sweeps = (patching.get_act_patch_resid_pre, patching.get_act_patch_attn_out, patching.get_act_patch_mlp_out)
    tables = [
        pandas.DataFrame([row[1:] for row in part if row[0] == kind], columns=["layer", "pos"]) for kind in range(len(sweeps))
    ]

    @torch.no_grad()
    def run() -> Tensor:
        found = [
            sweep(
                model, corrupted, cache, lambda logits: gpt2.logit_difference(logits)[0], index_df=table, index_axis_names=None
            )
            for sweep, table in zip(sweeps, tables)
        ]
        return torch.cat(found)

    return run


def edge_attribution(size: str, batch: int, length: int, differing: int) -> Callable[[], Tensor]:
    """EAP by forward and backward hooks, the way its authors' code and EAP-IG's do it: Tensor [E], reader by reader."""
    gpt2 = neighbour("gpt2")
    model = hooked(gpt2.gpt2(size, 0.1), use_attn_result=True, use_split_qkv_input=True, use_hook_mlp_in=True)
    clean, corrupted = gpt2.prompts(batch, length, differing)
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    writers = 1 + layers * (heads + 1)
    # the number of the first writer, or of the writers before a reader
    writes = {"blocks.0.hook_resid_pre": 0}
    reads = {}
    for i in range(layers):
        before = 1 + i * (heads + 1)
        writes |= {f"blocks.{i}.attn.hook_result": before, f"blocks.{i}.hook_mlp_out": before + heads}
        reads |= {f"blocks.{i}.hook_{name}_input": before for name in "qkv"}
        reads[f"blocks.{i}.hook_mlp_in"] = before + heads
    reads[f"blocks.{layers - 1}.hook_resid_post"] = writers

    def run() -> Tensor:
        difference = torch.zeros(batch, length, writers, model.cfg.d_model)
        scores = {}

        def write(value: Tensor, hook: Any, sign: int) -> None:
            first = writes[hook.name]
            rows = value.detach() if value.ndim == 4 else value.detach()[:, :, None]
            difference[:, :, first : first + rows.shape[2]] += sign * rows

        def read(gradient: Tensor, hook: Any) -> None:
            rows = gradient if gradient.ndim == 4 else gradient[:, :, None]
            scores[hook.name] = torch.einsum("bsud,bsrd->ru", difference[:, :, : reads[hook.name]], rows)

        def leaf(value: Tensor, hook: Any) -> Tensor:
            return value.requires_grad_()

        with torch.no_grad(), model.hooks(fwd_hooks=[(name, partial(write, sign=1)) for name in writes]):
            model(corrupted)
        forward = [("hook_embed", leaf), *((name, partial(write, sign=-1)) for name in writes)]
        with model.hooks(fwd_hooks=forward, bwd_hooks=[(name, read) for name in reads]):
            gpt2.logit_difference(model(clean)).mean().backward()
        return torch.cat([scores[name].flatten() for name in reads])

    return run


if __name__ == "__main__":
    methods = {"gpt2_cache": gpt2_cache, "patching_sweep": patching_sweep, "edge_attribution": edge_attribution}
    serve(methods, ("transformer-lens", "torch", "transformers"))
