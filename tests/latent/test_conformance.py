"""What interventions mean: against transformers written out by hand, plain hooks, and numbers worked out on paper."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdhook import capture, functionalize, intervene, perturb, targets
from tdhook.core.errors import InputError
from tdhook.latent import (
    HeadLayout,
    Names,
    ablate,
    ablation_effects,
    activation_patching,
    atp_star,
    attribution_patching,
    causal_trace,
    generate,
    integrated_gradient_patching,
    interchange,
    lenses,
    patch_pairs,
    path_patching,
    steering,
    subset_patching,
)
from tdhook.latent.circuits import (
    Circuit,
    EdgeGraph,
    Reader,
    Writer,
    acdc,
    eap,
    eap_ig,
    edge_patching,
    evaluate,
    faithfulness,
    kl_divergence_from,
    mask_edges,
    writer_values,
)

from ..core.plain import unchanged
from .circuits.cases import case, difference, micro
from .families import example, model, named
from .hooks import hooked, values_of

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
SINGLE = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)  # the norms and the softmax of Llama are in single precision

# Two models, written out: `tap(name, value)` sees each value of a name and returns what the model goes on with ----------

Tap = Callable[[str, Tensor], Tensor]


def gpt2(net: Any, ids: Tensor, tap: Tap) -> Tensor:
    def norm(x: Tensor, of: Any) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + of.eps).sqrt() * of.weight + of.bias

    def linear(x: Tensor, of: Any) -> Tensor:
        return x @ of.weight + of.bias

    body = net.transformer
    x = tap("embedding", body.wte.weight[ids] + body.wpe.weight[: ids.shape[1]])
    for layer, block in enumerate(body.h):
        x = tap(f"residual_pre {layer}", x)
        fused = linear(tap(f"attention_norm {layer}", norm(x, block.ln_1)), block.attn.c_attn)
        parts = fused.unflatten(-1, (3, net.config.n_head, -1)).unbind(-3)
        query, key, value = (tap(f"{kind} {layer}", part) for kind, part in zip(("query", "key", "value"), parts))
        z = attend(layer, query, key, value, tap)
        x = tap(f"residual_mid {layer}", x + tap(f"attention {layer}", linear(z.flatten(-2), block.attn.c_proj)))
        up = linear(tap(f"mlp_norm {layer}", norm(x, block.ln_2)), block.mlp.c_fc)
        hidden = tap(f"neurons {layer}", F.gelu(up, approximate="tanh"))
        x = tap(f"residual_post {layer}", x + tap(f"mlp {layer}", linear(hidden, block.mlp.c_proj)))
    return tap("logits", tap("final_norm", norm(x, body.ln_f)) @ body.wte.weight.T)


def llama(net: Any, ids: Tensor, tap: Tap) -> Tensor:
    body, config = net.model, net.config
    size = config.hidden_size // config.num_attention_heads
    frequency = 1 / 10000.0 ** (torch.arange(0, size, 2).float() / size)
    angle = (torch.arange(ids.shape[1])[:, None] * frequency).repeat(1, 2)[:, None]
    cos, sin = angle.cos().double(), angle.sin().double()

    def norm(x: Tensor, of: Any) -> Tensor:
        single = x.float()
        return of.weight * (single * (single.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()).to(x.dtype)

    def rotated(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    x = tap("embedding", body.embed_tokens.weight[ids])
    for layer, block in enumerate(body.layers):
        x, own = tap(f"residual_pre {layer}", x), block.self_attn
        h = tap(f"attention_norm {layer}", norm(x, block.input_layernorm))
        matrices = {"query": own.q_proj.weight, "key": own.k_proj.weight, "value": own.v_proj.weight}
        query, key, value = (tap(f"{kind} {layer}", (h @ w.T).unflatten(-1, (-1, size))) for kind, w in matrices.items())
        z = attend(layer, rotated(query), rotated(key), value, tap)
        x = tap(f"residual_mid {layer}", x + tap(f"attention {layer}", z.flatten(-2) @ own.o_proj.weight.T))
        h = tap(f"mlp_norm {layer}", norm(x, block.post_attention_layernorm))
        h = F.silu(h @ block.mlp.gate_proj.weight.T) * (h @ block.mlp.up_proj.weight.T)
        h = tap(f"neurons {layer}", h) @ block.mlp.down_proj.weight.T
        x = tap(f"residual_post {layer}", x + tap(f"mlp {layer}", h))
    return tap("logits", tap("final_norm", norm(x, body.norm)) @ net.lm_head.weight.T)


def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, tap: Tap) -> Tensor:
    key, value = (part.repeat_interleave(query.shape[2] // part.shape[2], 2) for part in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    pattern = tap(f"pattern {layer}", scores.masked_fill(future, -torch.inf).softmax(-1))
    return tap(f"head_output {layer}", torch.einsum("bhqk,bkhd->bqhd", pattern, value))


WRITTEN_OUT = {"gpt2": gpt2, "llama": llama}
STREAMS = (
    "residual_pre", "attention_norm", "query", "key", "value", "pattern", "head_output", "attention",
    "residual_mid", "mlp_norm", "neurons", "mlp", "residual_post",
)  # fmt: skip


def written_out(name: str, inputs: dict[str, Tensor], edits: dict[str, Callable] | None = None) -> tuple[Tensor, dict]:
    """The logits, and every value before its edit."""
    seen: dict[str, Tensor] = {}

    def tap(stream: str, value: Tensor) -> Tensor:
        seen[stream] = value
        return (edits or {}).get(stream, lambda v: v)(value)

    with torch.no_grad():
        return WRITTEN_OUT[name](model(name), inputs["input_ids"], tap), seen


def entries(found: Names) -> dict[str, Any]:
    """An address or a layout for each name of the written out models."""
    table = {name: getattr(found, name) for name in ("embedding", "final_norm", "logits")}
    return table | {f"{name} {layer}": entry for name in STREAMS for layer, entry in enumerate(getattr(found, name))}


def site_of(entry: Any) -> str:
    return entry.site if isinstance(entry, HeadLayout) else entry


def pair_of(name: str) -> tuple[Any, Any, dict, dict, Names]:
    f, params, inputs, found = named(name)
    ids = inputs["input_ids"]
    return f, params, {"input_ids": ids}, {"input_ids": torch.cat([ids[:, :2], ids[:, 2:3] % 40 + 5, ids[:, 3:]], 1)}, found


# Reading and writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_every_named_value_is_that_of_the_written_out_model(name: str) -> None:
    f, params, inputs, found = named(name)
    logits, expected = written_out(name, inputs)
    table = entries(found)
    assert table.keys() == expected.keys()
    output, values = capture(f, list(dict.fromkeys(map(site_of, table.values()))))(params, inputs)
    SINGLE(output.logits, logits)
    for stream, entry in table.items():
        value = values[site_of(entry)]
        SINGLE(entry.split(value) if isinstance(entry, HeadLayout) else value, expected[stream])
    assert torch.equal(intervene(f, values)(params, inputs).logits, output.logits)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_every_named_value_is_written_where_the_written_out_model_takes_it_from(name: str) -> None:
    f, params, inputs, found = named(name)
    edit = lambda value: 0.5 * value + 0.1  # noqa: E731
    for stream, entry in entries(found).items():

        def write(value: Tensor, entry: Any = entry) -> Tensor:
            return entry.merge(value, edit(entry.split(value))) if isinstance(entry, HeadLayout) else edit(value)

        logits, _ = written_out(name, inputs, {stream: edit})
        SINGLE(intervene(f, {site_of(entry): write})(params, inputs).logits, logits)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_what_is_read_at_a_module_is_bit_for_bit_what_a_plain_hook_sees(name: str) -> None:
    net, inputs, handles = model(name), example(name), []
    f, params = functionalize(net)
    calls: dict[str, list[Tensor]] = {}
    for path, module in net.named_modules():

        def keep(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            if isinstance(output, Tensor):
                calls.setdefault(path, []).append(output.clone())

        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        net(**inputs)
    for handle in handles:
        handle.remove()
    seen = {
        path if len(each) == 1 else f"{path}@{call}": value for path, each in calls.items() for call, value in enumerate(each)
    }
    values = capture(f, list(seen))(params, inputs)[1]
    assert len(seen) > 20 and all(torch.equal(values[site], value) for site, value in seen.items())


def test_a_capture_keeps_one_tensor_and_two_hundred_leave_nothing_behind() -> None:
    f, params, inputs, _ = named("gpt2")
    read = capture(f, "transformer.h.0.mlp")
    sweep = partial(activation_patching, f, params, inputs, {"input_ids": inputs["input_ids"].flip(0)}, difference)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    read(params, inputs), sweep(sites="transformer.h.1.mlp", positions=[2])
    alive(), gc.freeze()  # what other tests left behind does not count, nor whether it goes meanwhile
    try:
        before = alive()
        _, values = read(params, inputs)
        del _
        assert alive() == before + 1 and len(list(values.keys())) == 1
        for _ in range(200):
            _, values = read(params, inputs)
        del _
        assert alive() == before + 1
        for _ in range(5):
            sweep(sites="transformer.h.1.mlp", positions=[2])
        assert alive() == before + 1
    finally:
        gc.unfreeze()


# Nothing is changed ----------------------------------------------------------------------------------------------------


class Surprise(Exception):
    pass


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


D = torch.randn(32, dtype=torch.float64, generator=seeded())
INTERVENTIONS: dict[str, Callable] = {
    "ablate": lambda p, n, g: p[4](ablate(*p[:3], sites=n.mlp, to="noise", generator=seeded())),
    "ablation_effects": lambda p, n, g: ablation_effects(*p[:3], p[4], sites=n.head_output, axis=-2),
    "activation_patching": lambda p, n, g: activation_patching(*p, sites=n.residual_post),
    "patch_pairs": lambda p, n, g: patch_pairs(*p[:2], [p[2:4], p[2:4]], p[4], sites=n.mlp),
    "interchange": lambda p, n, g: p[4](interchange(*p[:4], subspaces={n.mlp[0]: D})),
    "path_patching": lambda p, n, g: path_patching(*p, senders=n.mlp[0], receivers=n.query[1], frozen=n.mlp),
    "causal_trace": lambda p, n, g: causal_trace(
        *p[:3], p[4], embedding=n.embedding, subject=[1], sites=n.mlp, samples=2, generator=seeded()
    ),
    "attribution_patching": lambda p, n, g: attribution_patching(*p, sites=n.head_output, axis=-2, exact=2),
    "integrated_gradient_patching": lambda p, n, g: integrated_gradient_patching(*p, sites=n.mlp, steps=2),
    "atp_star": lambda p, n, g: atp_star(*p, sites=n.query, names=n),
    "subset_patching": lambda p, n, g: subset_patching(*p, sites=n.mlp, samples=3, generator=seeded()),
    "eap": lambda p, n, g: eap(*p, graph=g),
    "eap_ig": lambda p, n, g: eap_ig(*p, graph=g, steps=2),
    "edge_patching": lambda p, n, g: edge_patching(*p, graph=g, edges=[("mlp 0", "logits")]),
    "acdc": lambda p, n, g: acdc(*p, graph=g, threshold=0.1),
    "faithfulness": lambda p, n, g: faithfulness(*p[:4], Circuit.of(g, [("mlp 0", "logits")]), p[4]),
    "logit_lens": lambda p, n, g: p[4](lenses.logit_lens(*p[:3], names=n)[0]),
    "direct_logit_attribution": lambda p, n, g: lenses.direct_logit_attribution(*p[:3], targets=p[4], names=n),
    "steering_vectors": lambda p, n, g: steering.steering_vectors(*p[:4], sites=list(n.residual_post)),
    "generate": lambda p, n, g: generate(
        intervene(p[0], {n.residual_post[0]: steering.add(D)}), *p[1:3], max_new_tokens=2, temperature=1.0, generator=seeded()
    ),
}


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_model_inputs_and_random_state_are_as_before_also_when_the_metric_raises(name: str) -> None:
    f, params, clean, corrupted, found = pair_of("gpt2")
    graph = case("gpt2", heads=False).graph
    calls: list[int] = []

    def metric(output: Any, wrong: int) -> Tensor:
        calls.append(1)
        if len(calls) == wrong:
            raise Surprise
        return difference(output)

    with unchanged(model("gpt2"), params, clean, corrupted):
        for wrong in (0, 1, 2):
            calls.clear()
            with suppress(Surprise):
                INTERVENTIONS[name]((f, params, clean, corrupted, partial(metric, wrong=wrong)), found, graph)
            assert name in ("steering_vectors", "generate") or calls


# Patching --------------------------------------------------------------------------------------------------------------

TOKENS, FEW = [-1, 2], [1, 0]
GRIDS = [
    ("residual_pre", (1,), [TOKENS]),
    *((kind, (1, 2), [TOKENS, FEW]) for kind in ("query", "key", "value", "head_output", "neurons")),
    *(("pattern", axes, [FEW, TOKENS, TOKENS][: len(axes)]) for axes in ((1,), (1, 2), (1, 2, 3))),
]


@pytest.mark.parametrize(("stream", "axes", "chosen"), GRIDS)
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_each_patch_of_a_grid_is_a_run_of_the_written_out_model(name: str, stream: str, axes: tuple, chosen: list) -> None:
    *pair, found = pair_of(name)
    asked = (axes, chosen) if len(axes) > 1 else (axes[0], chosen[0])
    options = dict(zip(("axis", "positions"), asked), sites=getattr(found, stream))
    run = partial(activation_patching, *pair, difference, **options)
    got, (clean, corrupted) = run(), pair[2:]
    _, there = written_out(name, clean)
    assert got.patched.shape == (2, *[2] * len(axes), 2)
    for layer, places in itertools.product(range(2), itertools.product(range(2), repeat=len(axes))):
        index: list[Any] = [slice(None)] * 4
        for axis, indices, place in zip(axes, chosen, places):
            index[axis] = indices[place]
        at = f"{stream} {layer}"

        def put(value: Tensor, at: str = at, index: list = index) -> Tensor:
            value = value.clone()
            here = tuple(index[: value.ndim])
            value[here] = there[at][here]
            return value

        SINGLE(got.patched[(layer, *places)], difference(written_out(name, corrupted, {at: put})[0]))
    assert (got.patched - got.corrupted).abs().max() > 1e-4
    CLOSE(run(chunk_size=1).patched, got.patched)


def test_two_runs_in_one_batch_that_read_from_each_other_are_a_patch() -> None:
    f, params, clean, corrupted, found = pair_of("llama")
    together = {"input_ids": torch.cat([corrupted["input_ids"], clean["input_ids"]])}
    site = found.residual_post[0]

    def across(value: Tensor) -> Tensor:
        value[:2, 2] = value[2:, 2]
        return value

    patched = activation_patching(f, params, clean, corrupted, difference, sites=site, positions=[2]).patched[0, 0]
    SINGLE(difference(intervene(f, {site: across})(params, together))[:2], patched)
    assert torch.equal(interchange(f, params, clean, clean, subspaces={site: None}).logits, f(params, clean).logits)
    zeros, _ = written_out("llama", clean, {"mlp 1": torch.zeros_like})
    SINGLE(ablate(f, params, clean, sites=found.mlp[1]).logits, zeros)


def test_exchanging_dimensions_of_the_identity_is_a_plain_swap_of_features() -> None:
    f, params, clean, corrupted, _ = pair_of("gpt2")
    site = "transformer.h.0.mlp"
    there = values_of(model("gpt2"), corrupted, [site])[site]
    swap = lambda value: torch.cat([there[..., :5], value[..., 5:]], -1)  # noqa: E731
    got = interchange(f, params, clean, corrupted, subspaces={site: torch.eye(32, dtype=torch.float64)[:5]})
    CLOSE(got.logits, hooked(model("gpt2"), clean, {site: swap})[0].logits)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_left_padded_batch_is_each_prompt_alone_at_every_site_and_patch(name: str) -> None:
    # In float64 transformers makes NaN of padding, where it computes the softmax in float32.
    f, params = functionalize(copy.deepcopy(model(name)).float(), use_cache=False)
    *_, clean, corrupted, found = pair_of(name)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    sites = [*found.residual_post, *found.attention, *found.mlp, *(heads.site for heads in found.head_output)]
    padded = {**clean, **more}, {**corrupted, **more}
    values = capture(f, sites)(params, padded[0])[1]
    patched = activation_patching(f, params, *padded, difference, sites=found.residual_post).patched
    for row, start in enumerate((2, 0)):
        alone = [{"input_ids": each["input_ids"][row : row + 1, start:]} for each in (clean, corrupted)]
        for site, value in capture(f, sites)(params, alone[0])[1].items():
            SINGLE(values[site][row, start:], value[0])
        sweep = activation_patching(f, params, *alone, difference, sites=found.residual_post)
        SINGLE(patched[:, start:, row], sweep.patched[..., 0])
        assert (sweep.patched - sweep.corrupted).abs().max() > 1e-4


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_causal_tracing_is_one_batch_of_a_clean_row_and_noisy_ones_as_in_rome(name: str) -> None:
    f, params, inputs, found = named(name)
    ids, subject = inputs["input_ids"][:1], [1, 2]
    embedding = {"gpt2": "transformer.wte", "llama": "model.embed_tokens"}[name]
    probability = lambda output: output.logits[:, -1].softmax(-1)[:, 7]  # noqa: E731
    traced = causal_trace(
        f, params, {"input_ids": ids}, probability, embedding=embedding, subject=subject, sites=found.residual_post,
        noise=2.0, sigma=0.5, samples=3, generator=seeded(),
    )  # fmt: skip
    source = seeded()
    noise = torch.stack([torch.randn(1, 6, 32, dtype=torch.float64, generator=source)[0] for _ in range(3)])

    def noisy(value: Tensor) -> Tensor:
        value[1:, subject] += noise[:, subject]  # 2 times 0.5
        return value

    def restored(value: Tensor, token: int) -> Tensor:
        value[1:, token] = value[0, token]
        return value

    batch = {"input_ids": ids.expand(4, -1)}
    for layer, site in enumerate(found.residual_post):
        for token in range(6):
            edits = {embedding: noisy, site.partition(":")[0]: partial(restored, token=token)}
            rows = probability(hooked(model(name), batch, edits)[0])
            SINGLE(traced.restored.value[layer, token], rows[1:].mean(0, keepdim=True))
    rows = probability(hooked(model(name), batch, {embedding: noisy})[0])
    SINGLE(traced.corrupted.value, rows[1:].mean(0, keepdim=True))
    SINGLE(traced.clean, rows[:1])


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_steering_from_a_position_on_leaves_earlier_logits_bit_for_bit(name: str) -> None:
    f, params, inputs, found = named(name)
    site = found.residual_post[0]
    before = f(params, inputs).logits
    after = intervene(f, {site: steering.add(D, 5.0, positions=slice(3, None))})(params, inputs).logits
    assert torch.equal(after[:, :3], before[:, :3]) and (after[:, 3:] != before[:, 3:]).any(-1).all()
    assert torch.equal(intervene(f, {site: steering.add(D, 0.0)})(params, inputs).logits, before)
    back = intervene(intervene(f, {site: steering.add(D, 5.0)}), {site: steering.add(D, -5.0)})
    SINGLE(back(params, inputs).logits, before)


# Dictionaries, and models made linear, by plain writes -----------------------------------------------------------------


def test_a_dictionary_with_its_error_changes_nothing_and_the_error_has_no_gradient() -> None:
    f, params, inputs, _ = named("gpt2")
    site = "transformer.h.0.mlp"
    encode, decode = torch.randn(32, 64).double(), torch.randn(64, 32).double()
    features = lambda x: (x @ encode).relu()  # noqa: E731

    def splice(x: Tensor, kept: Any = 1.0) -> Tensor:
        return (features(x) * kept) @ decode + (x - features(x) @ decode).detach()

    x = capture(f, site)(params, inputs)[1][site]
    CLOSE(intervene(f, {site: splice})(params, inputs).logits, f(params, inputs).logits)
    without = intervene(f, {site: partial(splice, kept=torch.arange(64) != 5)})
    CLOSE(capture(without, site)(params, inputs)[1][site], x - features(x)[..., 5:6] * decode[5])

    weight = torch.randn_like(x)
    spliced = capture(intervene(perturb(f, site), {site: splice}), site)
    slope = torch.func.grad(lambda d: (spliced(params, inputs, {site: d})[1][site] * weight).sum())(torch.zeros_like(x))
    CLOSE(slope, (weight @ decode.T * (x @ encode > 0)) @ encode.T)


def test_with_every_nonlinearity_held_the_gradient_knows_no_tokens_and_effects_add_up() -> None:
    f, params, clean, _, found = pair_of("llama")
    blocks = [f"model.layers.{layer}.{part}" for layer in range(2) for part in ("input_layernorm", "post_attention_layernorm")]
    gates = [f"model.layers.{layer}.mlp.act_fn" for layer in range(2)]
    held = [*found.pattern, *gates, *(f"{norm}/rsqrt" for norm in (*blocks, "model.norm"))]
    site = found.embedding
    zeros = torch.zeros(2, 6, 32, dtype=torch.float64)

    def run(g: Any, inputs: dict, delta: Tensor) -> Tensor:
        return difference(perturb(g, site)(params, inputs, {site: delta}))

    def slope(g: Any, inputs: dict) -> Tensor:
        return torch.func.grad(lambda delta: run(g, inputs, delta).sum())(zeros)

    affine = intervene(f, capture(f, held)(params, clean)[1])
    other = {"input_ids": (clean["input_ids"] * 7 + 3) % 50}
    SINGLE(slope(affine, other), slope(affine, clean))
    assert slope(affine, clean).abs().max() > 1e-2 and (slope(f, other) - slope(f, clean)).abs().max() > 1e-2
    first, second = torch.randn(2, 2, 6, 32, dtype=torch.float64)
    base = run(affine, clean, zeros)
    parts = run(affine, clean, first) - base + run(affine, clean, second) - base
    SINGLE(run(affine, clean, first + second) - base, parts, atol=1e-4)


# Lenses ----------------------------------------------------------------------------------------------------------------


def test_a_lens_scales_each_layer_by_itself_and_attribution_by_the_last() -> None:
    """They differ by the quotient of the scales, and agree at the last layer."""
    f, params, inputs, found = named("llama")
    lens = lenses.logit_lens(f, params, inputs, names=found, positions=[-1])[:, :, 0, 7]
    parts = lenses.direct_logit_attribution(f, params, inputs, targets=targets.index(7, key="logits", position=-1), names=found)
    labels = lenses.component_labels(found)
    early = [labels.index(label) for label in ("embedding", "attention 0", "mlp 0")]
    cached = torch.stack([parts.components[early].sum(0), parts.components.sum(0)]) + parts.bias
    _, seen = written_out("llama", inputs)
    eps = model("llama").config.rms_norm_eps
    scale = torch.stack([(seen[f"residual_post {layer}"][:, -1].square().mean(-1) + eps).sqrt() for layer in range(2)])
    SINGLE(lens * scale, cached * scale[1])
    SINGLE(lens[1], cached[1])
    assert (lens[0] - cached[0]).abs().min() > 1e-2


# Edges -----------------------------------------------------------------------------------------------------------------


def test_edge_attribution_is_the_difference_at_the_writer_times_the_gradient_that_a_hook_keeps_at_the_reader() -> None:
    c, net = case("gpt2", heads=False), model("gpt2")
    writers = {"embedding": "transformer.drop"}
    readers = {}
    for layer in range(2):
        block = f"transformer.h.{layer}"
        writers |= {f"attention {layer}": f"{block}.attn", f"mlp {layer}": f"{block}.mlp"}
        readers |= {f"attention {layer}": f"{block}.ln_1", f"mlp {layer}": f"{block}.ln_2"}
    readers["logits"] = "transformer.ln_f"
    before, after = (values_of(net, inputs, list(writers.values())) for inputs in (c.clean, c.corrupted))
    kept, handles = {}, []
    for reader, path in readers.items():

        def split(module: nn.Module, args: tuple, reader: str = reader) -> tuple:
            kept[reader] = args[0].clone()  # only this reader sees the copy
            return (kept[reader],)

        handles.append(net.get_submodule(path).register_forward_pre_hook(split))
    gradients = dict(zip(readers, torch.autograd.grad(difference(net(**c.clean)).mean(), list(kept.values()))))
    for handle in handles:
        handle.remove()
    scores = eap(*c.ends, difference, graph=c.graph)
    for score, (writer, reader) in zip(scores, c.graph.edges, strict=True):
        path = writers[writer]
        CLOSE(score, ((after[path] - before[path]) * gradients[reader]).sum())


def test_all_edges_of_the_micro_model_at_once_by_hand() -> None:
    f, params, graph = micro()
    clean, corrupted = torch.ones(1, 1, 2), -torch.ones(1, 1, 2)
    # -2 * what the writer writes * the gain from the reader to the output
    expected = {
        ("in", "in 0.0"): [-10, -28], ("in", "in 0.1"): [-30, -56],
        ("in", "in 1.0"): [-2, -4], ("0.0", "in 1.0"): [-2, -8], ("0.1", "in 1.0"): [-6, -16],
        ("in", "in 1.1"): [-6, -8], ("0.0", "in 1.1"): [-6, -16], ("0.1", "in 1.1"): [-18, -32],
        ("in", "out"): [-2, -2], ("0.0", "out"): [-2, -4], ("0.1", "out"): [-6, -8],
        ("1.0", "out"): [-10, -28], ("1.1", "out"): [-30, -56],
    }  # fmt: skip
    g, values = mask_edges(f, graph), writer_values(f, params, corrupted, graph)
    found = torch.func.vmap(lambda mask: g(params, clean, values, mask)[0, 0])(torch.eye(13)) - torch.tensor([25.0, 49.0])
    assert dict(zip(graph.edges, found.tolist(), strict=True)) == expected
    for column in range(2):
        metric = lambda out, column=column: out[:, -1, column]  # noqa: E731
        assert edge_patching(f, params, clean, corrupted, metric, graph=graph).tolist() == found[:, column].tolist()


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_path_that_nothing_lies_on_is_an_edge_of_the_written_out_model(name: str) -> None:
    c, found = case(name), named(name)[3]
    got = path_patching(
        *c.ends, difference, senders=found.head_output[0], axis=-2, receivers={found.query[1]: [2]}, receiver_axis=-2,
        frozen=[*found.head_output, *found.mlp], direction="noise",
    )  # fmt: skip
    edges = c.graph.index([(f"head 0.{head}", "query 1.2") for head in range(4)])
    masks = torch.zeros(4, len(c.graph), dtype=torch.float64).scatter(1, edges[:, None], 1)
    SINGLE(got.patched[0], torch.stack([difference(c.oracle(mask)) for mask in masks]))
    effects = edge_patching(*c.ends, difference, graph=c.graph, edges=edges, per_example=True)
    SINGLE(got.patched[0] - got.clean, effects.T)
    assert effects.abs().max() > 1e-4


def test_quadratures_of_the_peers_by_hand() -> None:
    """The metric x^2 from 3 (clean) to 1 (corrupted) has the slopes 6, 4 and 2 at 3, 2 and 1; an edge carries -2."""
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Identity()))
    graph = EdgeGraph.of([Writer("x", "0"), Reader("y", "1:in")])
    ends = (f, params, torch.tensor([[3.0]]), torch.tensor([[1.0]]), lambda out: out[:, 0].square())
    ig = partial(eap_ig, *ends, graph=graph, path="mask", steps=2)
    nodes = partial(integrated_gradient_patching, *ends, sites="0", direction="noise", steps=2)
    hanna, marks, auto_circuit = -2 * (2 + 4) / 2, -2 * (6 + 4) / 2, -2 * (6 + 4 + 2)
    assert ig(quadrature="riemann_right").item() == hanna
    assert nodes(quadrature="riemann_right").effects.item() == hanna
    assert nodes(quadrature="riemann_left").effects.item() == marks
    # auto-circuit sums S + 1 points, without weights: S times those without the clean end, and that end
    assert (2 * ig(quadrature="riemann_right") + eap(*ends, graph=graph)).item() == auto_circuit


def test_the_whole_graph_keeps_the_distribution_whatever_ablates() -> None:
    c = case("llama")
    loss = kl_divergence_from(c.f(c.params, c.clean), key="logits")
    every = Circuit(c.graph, torch.ones(len(c.graph), dtype=torch.bool))
    for corrupted, ablation in ((c.corrupted, None), (None, 0.0)):
        found = evaluate(c.f, c.params, c.clean, corrupted, every, loss, ablation=ablation)
        assert found.value.abs().max() < 1e-6 < 1e-2 < found.ablated.min()


@pytest.mark.parametrize("method", [activation_patching, attribution_patching, integrated_gradient_patching])
def test_a_metric_is_a_function(method) -> None:
    f, params, inputs, _ = named("gpt2")
    with pytest.raises(InputError, match="metric is 3 of type int; give a function of the output"):
        method(f, params, inputs, inputs, 3, sites="transformer.h.1.mlp")
