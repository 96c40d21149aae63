"""AtP* and random subsets against hooks, explicit gradients and closed forms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from torch import nn
from torch.func import vmap

from tdhook import capture, functionalize, intervene, perturb
from tdhook.core import errors
from tdhook.latent.atp_star import atp_star
from tdhook.latent.attribution_patching import attribution_patching
from tdhook.latent.names import names
from tdhook.latent.subset_patching import subset_patching

from .families import model, named
from .hooks import values_of
from .pairs import exact_effects, metric, of

CLOSE = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-11)


# AtP* ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["query", "key"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_the_fix_is_the_change_of_the_pattern_times_its_gradient(name, kind):
    """Each query or key patched by a hook; the pattern that results is read from the model."""
    f, params, clean, corrupted, found = of(name)
    layouts = getattr(found, kind)
    got = atp_star(f, params, clean, corrupted, metric, names=found, sites=layouts, gradient_drop=False, chunk_size=5)
    layer = 1
    layout, pattern = layouts[layer], found.pattern[layer]
    net, path = model(name), layout.site.split(":")[0]
    there = values_of(net, clean, [path])[path]
    (base,) = capture(f, pattern)(params, corrupted)[1].values()
    shift = torch.zeros_like(base).requires_grad_()
    (slope,) = torch.autograd.grad(metric(perturb(f, pattern)(params, corrupted, {pattern: shift})).sum(), shift)
    for token, head in ((2, 0), (5, 1), (2, 1)):

        def write(value, token=token, head=head):
            features = layout.features()[head]
            value[:, token, features] = there[:, token, features]
            return value

        (changed,) = capture(intervene(f, {layout.site: write}), pattern)(params, corrupted)[1].values()
        CLOSE(got.effects[layer, token, head], ((changed - base) * slope).flatten(1).sum(1).detach())


def test_the_fix_sees_through_a_saturated_softmax():
    """A model that is linear in the last attention pattern: there the fix is exact, and the gradient sees little."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, bos_token_id=0, eos_token_id=0)
    net = transformers.GPT2Model._from_config(config, attn_implementation="eager").double().eval()
    net.ln_f = nn.Identity()
    with torch.no_grad():
        net.h[1].mlp.c_proj.weight.zero_()
        net.wte.weight.mul_(50)
        net.h[1].attn.c_attn.weight.mul_(100)
    f, params = functionalize(net, use_cache=False)
    found = names(f, params)
    clean, corrupted = torch.randint(30, (2, 5)), torch.randint(30, (2, 5))
    run = (f, params, clean, corrupted, lambda out: out.last_hidden_state[:, :, 3].sum(1))
    for layouts in (found.query[1], found.key[1]):
        options = {"sites": layouts, "axis": (1, 2)}
        exact = exact_effects(*run, **options)
        fixed = atp_star(*run, names=found, gradient_drop=False, **options).effects
        plain = attribution_patching(*run, **options).effects
        CLOSE(fixed, exact)
        assert (plain - exact).norm() > 0.5 * exact.norm() > 0


def test_dropping_gradients_equals_detached_layers():
    f, params, clean, corrupted, found = of("llama")
    sites = [*found.residual_pre, *found.mlp]
    got = atp_star(f, params, clean, corrupted, metric, names=found, sites=sites, axis=1)
    net = model("llama")
    _, a = capture(f, sites)(params, clean)
    _, b = capture(f, sites)(params, corrupted)
    total = torch.zeros(4, 6, 2).double()
    for layer in range(2):
        shifts, handles = {site: torch.zeros_like(b[site]).requires_grad_() for site in sites}, []

        def cut(module, args, output):
            return output.detach() if isinstance(output, torch.Tensor) else (output[0].detach(), *output[1:])

        for site, shift in shifts.items():
            module = net.get_submodule(site.split(":")[0])
            if site.endswith(":in"):
                handles.append(module.register_forward_pre_hook(lambda m, args, shift=shift: (args[0] + shift, *args[1:])))
            else:
                handles.append(module.register_forward_hook(lambda m, args, output, shift=shift: output + shift))
        for part in ("self_attn", "mlp"):
            handles.append(net.get_submodule(f"model.layers.{layer}.{part}").register_forward_hook(cut))
        slopes = torch.autograd.grad(metric(net(**corrupted)).sum(), list(shifts.values()), allow_unused=True)
        for handle in handles:
            handle.remove()
        for row, (site, slope) in enumerate(zip(sites, slopes)):
            if slope is not None:
                total[row] += ((a[site] - b[site]) * slope).sum(-1).T.abs()
    CLOSE(got.effects, total)  # L - 1 = 1
    assert (got.effects >= 0).all()


def test_both_corrections_together():
    f, params, clean, corrupted, found = of("gpt2")
    run = (f, params, clean, corrupted, metric)
    both = atp_star(*run, names=found, sites=found.query)
    fixed = atp_star(*run, names=found, sites=found.query, gradient_drop=False)
    # a query of the last layer has one path, cut in one of the two runs
    CLOSE(both.effects[1], fixed.effects[1].abs())
    some = atp_star(*run, names=found, sites=found.query, exact=3)
    exact = exact_effects(*run, sites=found.query, axis=(1, 2))
    CLOSE(some.effects[some.exact], exact[some.exact].abs())


def test_without_corrections_it_is_attribution_patching():
    f, params, clean, corrupted, found = of("bert")
    run = (f, params, clean, corrupted, metric)
    off = {"query_key_fix": False, "gradient_drop": False}
    CLOSE(atp_star(*run, sites=found.value, **off).effects, attribution_patching(*run, sites=found.value, axis=(1, 2)).effects)
    # values have no softmax behind them: the fix leaves them alone
    CLOSE(
        atp_star(*run, sites=found.value, names=found, gradient_drop=False).effects,
        atp_star(*run, sites=found.value, **off).effects,
    )


def test_the_fix_needs_a_pattern():
    f, params, inputs, found = named("gpt2", "sdpa")
    with pytest.raises(errors.SiteError, match="pattern of layer 0 was not found"):
        atp_star(f, params, inputs, inputs, metric, names=found, sites=found.query)


# Subsets ---------------------------------------------------------------------------------------------------------------


def linear():
    torch.manual_seed(0)
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Linear(4, 1, bias=False)).double())
    return f, params, torch.randn(3, 4).double(), torch.randn(3, 4).double(), lambda out: out[:, 0]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_contributions_in_a_linear_model_are_the_effects(direction):
    run = linear()
    generator = torch.Generator().manual_seed(0)
    options = {"sites": "0", "axis": 1, "direction": direction}
    got = subset_patching(*run, samples=500, generator=generator, **options)
    exact = exact_effects(*run, **options)
    assert ((got.contributions.value - exact).abs() < 4 * got.contributions.standard_error).all()
    assert got.contributions.standard_error.max() < 0.5 * exact.abs().max()
    CLOSE(got.effects.mean(0), exact.sum((0, 1)) / 2, rtol=0.2, atol=0.1)


def test_a_subset_is_patched_all_at_once():
    """Heads at tokens in two layers: the effect equals that of a write by hand; the mask of each subset is drawn again."""
    f, params, clean, corrupted, found = of("llama")
    options = {"axis": (2, 1), "positions": [[3, 0], [5, -4]], "samples": 3, "probability": 0.6}
    run = partial(subset_patching, f, params, clean, corrupted, metric, sites=found.head_output, **options)
    got = run(generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    sites = [layout.site for layout in found.head_output]
    _, there = capture(f, sites)(params, clean)
    base = metric(f(params, corrupted))
    for effect in got.effects:
        bits = torch.rand(2, 2, 2, generator=generator) < 0.6

        def write(value, site, bits):
            for i, head in enumerate((3, 0)):
                for j, token in enumerate((5, 2)):
                    if bits[i, j]:
                        features = slice(8 * head, 8 * head + 8)
                        value[:, token, features] = there[site][:, token, features]
            return value

        edits = {site: partial(write, site=site, bits=bits[layer]) for layer, site in enumerate(sites)}
        CLOSE(effect, metric(intervene(f, edits)(params, corrupted)) - base)
    chunked = run(generator=torch.Generator().manual_seed(0), chunk_size=1)
    CLOSE(chunked.effects, got.effects)


def test_a_node_that_was_missed_shows_among_the_others():
    """Two nodes cancel at the base, so that AtP sees neither: |x| at 0 has no derivative that tells."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.nodes = nn.Identity()

        def forward(self, x):
            x = self.nodes(x)
            return 3 * x[:, 0].square() + x[:, 1] + x[:, 2]

    f, params = functionalize(Hidden())
    run = (f, params, torch.ones(1, 3), torch.zeros(1, 3), lambda out: out)
    found = attribution_patching(*run, sites="nodes", axis=1, exact=2)
    assert found.effects[0, :, 0].tolist() == [0, 1, 1] and found.exact.tolist() == [[False, True, True]]
    rest = subset_patching(*run, sites="nodes", axis=1, exclude=found.exact, generator=torch.Generator().manual_seed(0))
    assert rest.contributions.value[0, 0] == 3 and rest.contributions.value[0, 1:].isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.0}, "puts every node into every subset"),
        ({"probability": 0.0}, "probability is a number above 0"),
        ({"samples": 1}, "samples is an integer of at least 2"),
        ({"exclude": torch.zeros(1, 3).bool()}, r"give a bool tensor of shape \[1, 4\]"),
        ({"generator": 0}, "generator is 0"),
    ],
)
def test_bad_subsets(options, message):
    with pytest.raises(errors.InputError, match=message):
        subset_patching(*linear(), **{"sites": "0", "axis": 1, **options})


def test_the_drop_needs_two_layers():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=30, bos_token_id=0, eos_token_id=0)
    f, params = functionalize(transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval())
    ids = torch.randint(30, (1, 4))
    with pytest.raises(errors.InputError, match="take gradient_drop=False"):
        atp_star(f, params, ids, ids, metric, names=names(f, params), sites="transformer.h.0.mlp", axis=1)


def test_without_corrections_no_names_are_needed():
    """The symptom: names of a transformer were looked for in any model."""
    f, params = functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double())
    run = (f, params, torch.randn(2, 3).double(), torch.randn(2, 3).double(), lambda out: out[:, 0])
    options = {"sites": "0", "axis": -1}
    got = atp_star(*run, query_key_fix=False, gradient_drop=False, **options)
    CLOSE(got.effects, attribution_patching(*run, **options).effects)


def test_a_patched_key_is_heard_by_its_group_and_by_later_tokens():
    """Grouped keys with rotary positions: the pattern by hand, from the scores of the model."""
    f, params, clean, corrupted, found = of("llama")
    layout, pattern = found.key[1], found.pattern[1]
    got = atp_star(f, params, clean, corrupted, metric, names=found, sites=found.key, gradient_drop=False)
    assert got.effects.shape == (2, 6, 2, 2)
    _, kept = capture(f, [pattern, layout.site])(params, corrupted)
    there = capture(f, layout.site)(params, clean)[1][layout.site]
    shift = torch.zeros_like(kept[pattern]).requires_grad_()
    (slope,) = torch.autograd.grad(metric(perturb(f, pattern)(params, corrupted, {pattern: shift})).sum(), shift)
    for token, head in ((2, 0), (4, 1)):
        new = layout.split(kept[layout.site]).clone()
        new[:, token, head] = layout.split(there)[:, token, head]
        g = intervene(f, {layout.site: layout.merge(kept[layout.site], new)})
        changed = capture(g, pattern)(params, corrupted)[1][pattern] - kept[pattern]
        changes = changed.abs().sum((0, 3))  # heads, queries
        assert (changes[[2 * head, 2 * head + 1], token:] > 1e-9).all()  # of a query at that token all weights share the sum
        assert not changes[:, :token].any() and not changes[[h for h in range(4) if h // 2 != head]].any()
        CLOSE(got.effects[1, token, head], (changed * slope).flatten(1).sum(1).detach())


def pairs_of(name):
    f, params, clean, corrupted, found = of(name)

    def run(a, b):
        sites = [found.query[0], found.query[1]]
        return atp_star(f, params, {"input_ids": a}, {"input_ids": b}, metric, names=found, sites=sites).effects

    return run, clean["input_ids"], corrupted["input_ids"]


def test_pairs_one_by_one_under_vmap():
    run, clean, corrupted = pairs_of("llama")
    together = vmap(lambda a, b: run(a[None], b[None])[..., 0], out_dims=-1)(clean, corrupted)
    CLOSE(together, run(clean, corrupted))


@pytest.mark.compile
def test_compiled():
    torch._dynamo.reset()
    run, clean, corrupted = pairs_of("llama")
    CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(clean, corrupted), run(clean, corrupted))


def test_contributions_in_half_precision():
    """The symptom: in bfloat16, where 301 is 302, they were off by more than their last digit."""
    f, params, clean, corrupted, first = linear()
    run = (f, params.bfloat16(), clean.bfloat16(), corrupted.bfloat16(), first)
    got = subset_patching(*run, sites="0", axis=1, samples=700, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    subsets = torch.stack([torch.rand(1, 4, generator=generator) for _ in range(700)]) < 0.5
    for node in range(4):
        inside = subsets[:, 0, node]
        a, b = got.effects[inside].double(), got.effects[~inside].double()
        expected = a.mean(0) - b.mean(0), (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        for one, other in zip(got.contributions, expected):
            torch.testing.assert_close(one[0, node], other.bfloat16(), rtol=2**-8, atol=1e-5)


def test_all_subsets_weigh_alike():
    """Contributions from the effects and the subsets themselves."""
    run = linear()
    got = subset_patching(*run, sites="0", axis=1, samples=50, probability=0.3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    subsets = torch.stack([torch.rand(1, 4, generator=generator) for _ in range(50)]) < 0.3
    for node in range(4):
        inside = subsets[:, 0, node]
        a, b = got.effects[inside], got.effects[~inside]
        CLOSE(got.contributions.value[0, node], a.mean(0) - b.mean(0))
        CLOSE(got.contributions.standard_error[0, node], (a.var(0) / len(a) + b.var(0) / len(b)).sqrt())


@pytest.mark.compile
def test_subsets_compiled():
    torch._dynamo.reset()
    f, params, clean, corrupted, first = linear()
    run = lambda a, b: subset_patching(f, params, a, b, first, sites="0", axis=1, samples=300)  # noqa: E731
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(clean, corrupted)
    exact = exact_effects(f, params, clean, corrupted, first, sites="0", axis=1)
    assert ((got.contributions.value - exact).abs() < 5 * got.contributions.standard_error).all()
