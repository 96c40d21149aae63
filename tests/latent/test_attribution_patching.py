"""Attribution patching, along lines and with AtP*, against exact patching, explicit gradients and plain hooks."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import vmap

from tdhook import capture, functionalize, perturb
from tdhook.attribution.rules.presets import relp, relp_ah
from tdhook.core import errors
from tdhook.core.ruling import with_rules
from tdhook.latent.atp_star import atp_star
from tdhook.latent.attribution_patching import attribution_patching
from tdhook.latent.integrated_gradient_patching import integrated_gradient_patching

from .families import model, named
from .hooks import values_of
from .pairs import exact_effects, metric, of, pair

CLOSE = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-11)


# Attribution patching ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_is_the_difference_times_the_retained_gradient(name, direction):
    f, params, clean, corrupted, found = of(name)
    sites = [*found.residual_post, *found.mlp]
    got = attribution_patching(f, params, clean, corrupted, metric, sites=sites, direction=direction)
    source, base = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    paths = [site.split(":")[0] for site in sites]
    net = model(name)
    there, kept, handles = values_of(net, source, paths), {}, []
    for path in paths:

        def keep(module, args, output, path=path):
            kept[path] = output if isinstance(output, torch.Tensor) else output[0]
            kept[path].retain_grad()

        handles.append(net.get_submodule(path).register_forward_hook(keep))
    metric(net(**base)).sum().backward()
    for handle in handles:
        handle.remove()
    for row, path in zip(got.effects, paths):
        CLOSE(row, ((there[path] - kept[path]) * kept[path].grad).sum(-1).T.detach())
    net.zero_grad(set_to_none=True)
    assert not got.exact.any() and got.effects.shape == (len(sites), 6, 2)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_equals_exact_patching_of_a_linear_model(direction):
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    f, params = functionalize(module)
    clean, corrupted = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 3).double()
    first = lambda out: out[:, 0, 0] - 2 * out[:, 3, 1]  # noqa: E731
    run = (f, params, clean, corrupted, first)
    for axis in (1, -1, (1, 2), None):
        # sites of one width
        options = {"sites": ["0", "1"], "axis": axis, "direction": direction}
        CLOSE(attribution_patching(*run, **options).effects, exact_effects(*run, **options))
        CLOSE(integrated_gradient_patching(*run, steps=1, **options).effects, exact_effects(*run, **options))


def test_the_error_is_quadratic():
    """Half the difference, a quarter of the error."""
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double())
    corrupted, step = torch.randn(1, 4).double(), torch.randn(1, 4).double()
    errors_ = []
    for size in (2e-3, 1e-3):
        run = (f, params, corrupted + size * step, corrupted, lambda out: out[:, 0])
        options = {"sites": "0", "axis": None}
        errors_.append((attribution_patching(*run, **options).effects - exact_effects(*run, **options)).abs().item())
    assert errors_[0] > 1e-9 and abs(errors_[0] / errors_[1] - 4) < 0.05


def test_heads_neurons_and_positions():
    f, params, clean, corrupted, found = of("llama")
    run = partial(attribution_patching, f, params, clean, corrupted, metric)
    both = run(sites=found.head_output, axis=(1, 2)).effects
    assert both.shape == (2, 6, 4, 2)
    CLOSE(run(sites=found.head_output, axis=-2).effects, both.sum(1))
    CLOSE(run(sites=found.head_output, axis=1, positions=[-1, 2]).effects, both.sum(2)[:, [5, 2]])
    plain = run(sites=[layout.site for layout in found.head_output], axis=-1).effects
    CLOSE(plain.unflatten(1, (4, 8)).sum(2), both.sum(1))
    CLOSE(run(sites=found.head_output, axis=None).effects, both.sum((1, 2)))
    assert run(sites=found.key, axis=-2).effects.shape == (2, 2, 2)


def test_a_metric_of_one_number_sums_over_examples():
    f, params, clean, corrupted, found = of("gpt2")
    run = partial(attribution_patching, f, params, clean, corrupted, sites=found.mlp)
    CLOSE(run(lambda out: metric(out).mean()).effects, run(metric).effects.mean(-1))
    assert run(lambda out: metric(out).mean(), axis=(0, 1)).effects.shape == (2, 2, 6)


def test_one_backward_for_all_sites_and_the_largest_measured():
    f, params, clean, corrupted, found = of("gpt2")
    run = (f, params, clean, corrupted, metric)
    options = {"sites": [*found.residual_pre, *found.mlp], "axis": 1}
    plain, some = attribution_patching(*run, **options), attribution_patching(*run, exact=5, chunk_size=2, **options)
    exact = exact_effects(*run, **options)
    assert some.exact.sum() == 5
    CLOSE(some.effects[some.exact], exact[some.exact])
    CLOSE(some.effects[~some.exact], plain.effects[~some.exact])
    sizes = plain.effects.abs().mean(-1)
    assert sizes[some.exact].min() >= sizes[~some.exact].max()
    CLOSE(attribution_patching(*run, exact=1000, **options).effects, exact)
    whole = attribution_patching(*run, exact=2, sites=found.mlp, axis=None)
    CLOSE(whole.effects, exact_effects(*run, sites=found.mlp, axis=None))
    CLOSE(some.clean, metric(f(params, clean)))
    CLOSE(some.corrupted, metric(f(params, corrupted)))


def test_equal_runs_have_no_effect():
    f, params, clean, _, found = of("llama")
    got = attribution_patching(f, params, clean, clean, metric, sites=found.residual_post)
    assert not got.effects.any()


# RelP ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("rules", [relp, relp_ah])
def test_with_rules_it_is_the_difference_times_the_ruled_gradient(name, rules):
    f, params, clean, corrupted, found = of(name)
    g = with_rules(f, rules())
    sites = [*found.residual_post, *found.mlp]
    got = attribution_patching(g, params, clean, corrupted, metric, sites=sites)
    _, there = capture(f, sites)(params, clean)
    _, here = capture(f, sites)(params, corrupted)
    shifts = {site: torch.zeros_like(here[site]).requires_grad_() for site in sites}
    slopes = torch.autograd.grad(metric(perturb(g, sites)(params, corrupted, shifts)).sum(), list(shifts.values()))
    for row, site, slope in zip(got.effects, sites, slopes):
        CLOSE(row, ((there[site] - here[site]) * slope).sum(-1).T)
    plain = attribution_patching(f, params, clean, corrupted, metric, sites=sites)
    assert (got.effects - plain.effects).abs().max() > 1e-6
    CLOSE(got.clean, plain.clean)
    some = attribution_patching(g, params, clean, corrupted, metric, sites=sites, exact=3)
    exact = exact_effects(f, params, clean, corrupted, metric, sites=sites)
    CLOSE(some.effects[some.exact], exact[some.exact])


def test_the_identity_rule_by_hand():
    """With a(x) x / x in place of a'(x): the effect of unit i is (x_i' - x_i) w_i relu-like quotients."""
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.GELU(), nn.Linear(3, 1, bias=False)).double())
    clean, corrupted = torch.tensor([[1.0, -2, 0.5]]).double(), torch.tensor([[-1.0, 3, 2]]).double()
    got = attribution_patching(with_rules(f, relp()), params, clean, corrupted, torch.sum, sites="0", axis=1)
    quotient = nn.functional.gelu(corrupted) / corrupted
    torch.testing.assert_close(got.effects, (clean - corrupted) * quotient * params["2", "weight"], rtol=1e-5, atol=1e-6)


# Along lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_effects_of_a_site_sum_to_that_of_patching_all_of_it(name, direction):
    f, params, clean, corrupted, found = of(name)
    run = (f, params, clean, corrupted, metric)
    sites = [*found.mlp, found.residual_post[0]]
    got = integrated_gradient_patching(*run, sites=sites, steps=24, direction=direction, chunk_size=7)
    whole = exact_effects(*run, sites=sites, axis=None, direction=direction)
    torch.testing.assert_close(got.effects.sum(1), whole, rtol=1e-6, atol=1e-9)
    CLOSE(got.effects, integrated_gradient_patching(*run, sites=sites, steps=24, direction=direction).effects)
    heads = integrated_gradient_patching(*run, sites=found.query[1], steps=24, axis=-2, direction=direction)
    queries = exact_effects(*run, sites=found.query[1], axis=None, direction=direction)
    torch.testing.assert_close(heads.effects.sum(1), queries, rtol=1e-6, atol=1e-9)


def test_quadratures_against_a_loop():
    f, params, clean, corrupted, found = of("gpt2")
    site, (x, y) = found.mlp[0], (pair(named("gpt2")[2]))
    for quadrature, nodes in (("riemann_left", (0, 0.25, 0.5, 0.75)), ("riemann_right", (0.25, 0.5, 0.75, 1))):
        got = integrated_gradient_patching(
            f, params, clean, corrupted, metric, sites=site, steps=4, quadrature=quadrature, chunk_size=3
        )
        a, b = (values_of(model("gpt2"), each, [site])[site] for each in (x, y))
        slope = torch.zeros_like(a)
        for node in nodes:
            point = (b + node * (a - b)).requires_grad_()
            handle = model("gpt2").get_submodule(site).register_forward_hook(lambda m, i, o, point=point: point)
            slope = slope + torch.autograd.grad(metric(model("gpt2")(**y)).sum(), point)[0] / 4
            handle.remove()
        CLOSE(got.effects[0], ((a - b) * slope).sum(-1).T)


def test_along_the_embedding_all_sites_at_once():
    f, params, clean, corrupted, found = of("llama")
    embedding = "model.embed_tokens"
    sites = [embedding, *found.mlp]
    got = integrated_gradient_patching(
        f, params, clean, corrupted, metric, sites=sites, along=embedding, steps=3, quadrature="midpoint", chunk_size=2
    )
    net = model("llama")
    paths = [site.split(":")[0] for site in sites]
    a, b = values_of(net, clean, paths), values_of(net, corrupted, paths)
    slopes = {path: torch.zeros_like(a[path]) for path in paths}
    for node in (1 / 6, 1 / 2, 5 / 6):
        kept, handles = {}, []
        point = b[paths[0]] + node * (a[paths[0]] - b[paths[0]])
        for path in paths:

            def keep(module, args, output, path=path, point=point, kept=kept):
                kept[path] = point.requires_grad_() if path == paths[0] else output
                return kept[path]

            handles.append(net.get_submodule(path).register_forward_hook(keep))
        gradients = torch.autograd.grad(metric(net(**corrupted)).sum(), [kept[path] for path in paths])
        for handle in handles:
            handle.remove()
        slopes = {path: slopes[path] + gradient / 3 for path, gradient in zip(paths, gradients)}
    for row, path in zip(got.effects, paths):
        CLOSE(row, ((a[path] - b[path]) * slopes[path]).sum(-1).T)


def test_one_left_point_is_attribution_patching():
    f, params, clean, corrupted, found = of("bert")
    run = (f, params, clean, corrupted, metric)
    expected = attribution_patching(*run, sites=found.mlp).effects
    for along in (None, found.embedding):
        options = {"sites": found.mlp, "steps": 1, "quadrature": "riemann_left", "along": along}
        CLOSE(integrated_gradient_patching(*run, **options).effects, expected)


# Transforms and bad input ------------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    f, params = functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    return f, params, torch.randn(5, 3).double(), torch.randn(5, 3).double()


METHODS = [attribution_patching, integrated_gradient_patching]


@pytest.mark.parametrize("method", METHODS)
def test_under_vmap_and_gradients(method):
    f, params, clean, corrupted = small()
    run = lambda a, b: method(f, params, a, b, lambda out: out[..., 0], sites=["0", "2"], axis=-1).effects  # noqa: E731
    CLOSE(vmap(run)(clean, corrupted), run(clean, corrupted).movedim(-1, 0))
    assert torch.autograd.gradcheck(lambda a: run(a, corrupted[:1]).sum(), (clean[:1].requires_grad_(),))


@pytest.mark.compile
@pytest.mark.parametrize("method", METHODS)
def test_compiled(method):
    torch._dynamo.reset()
    f, params, clean, corrupted = small()
    run = lambda a, b: method(f, params, a, b, lambda out: out[:, 0], sites=["0", "2"], axis=-1).effects  # noqa: E731
    CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(clean, corrupted), run(clean, corrupted))


@pytest.mark.parametrize("method", [*METHODS, partial(atp_star, query_key_fix=False, gradient_drop=False, names=object())])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sites": "9"}, errors.SiteError, "unknown site '9'"),
        ({"axis": 0}, errors.InputError, "axis=0 is that of the examples"),
        ({"axis": 5}, errors.InputError, "axis=5 is out of range"),
        ({"positions": [8]}, errors.InputError, "positions has 8, out of range"),
        ({"direction": "both"}, errors.InputError, "direction='both' is unknown"),
        ({"exact": -1}, errors.InputError, "exact is an integer of at least 0, got -1"),
        ({"corrupted": torch.ones(5, 2).double()}, errors.InputError, "patching needs aligned inputs"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size is an integer"),
        ({"metric": lambda out: out}, errors.TargetError, "metric returned"),
    ],
)
def test_bad_input(method, options, error, message):
    f, params, clean, corrupted = small()
    given = {"clean": clean, "corrupted": corrupted, "metric": lambda out: out[:, 0], "sites": "0", "axis": 1, **options}
    with pytest.raises(error, match=message):
        method(f, params, **given)


def test_more_bad_input():
    f, params, clean, corrupted = small()
    run = partial(integrated_gradient_patching, f, params, clean, corrupted, lambda out: out[:, 0], sites="2", axis=1)
    with pytest.raises(errors.InputError, match="quadrature='simpson' is unknown"):
        run(quadrature="simpson")
    with pytest.raises(errors.SiteError, match="along takes exact sites"):
        run(along="*")
    with torch.no_grad(), pytest.raises(errors.GradientError, match="integrated_gradient_patching needs gradients"):
        run()


def test_the_points_of_eap_ig_and_of_sparse_feature_circuits():
    """EAP-IG, nodes: k / m from the corrupted embedding, k = 1 .. m; edges: k = 0 .. m - 1; both score what corrupting does."""
    f, params, clean, corrupted, _ = of("llama")
    net, embedding, site = model("llama"), "model.embed_tokens", "model.layers.0.mlp"
    a, b = (values_of(net, each, [embedding, site]) for each in (clean, corrupted))
    for quadrature, ks in (("riemann_left", (1, 2, 3)), ("riemann_right", (0, 1, 2))):
        slope = torch.zeros_like(a[site])
        for k in ks:
            kept = []
            point = b[embedding] + k / 3 * (a[embedding] - b[embedding])
            handles = [
                net.get_submodule(embedding).register_forward_hook(lambda m, i, o, point=point: point),
                net.get_submodule(site).register_forward_hook(lambda m, i, o, kept=kept: kept.append(o) or o),
            ]
            slope = slope + torch.autograd.grad(metric(net(**clean)).sum(), kept)[0] / 3
            for handle in handles:
                handle.remove()
        got = integrated_gradient_patching(
            f, params, clean, corrupted, metric, sites=site, along=embedding, direction="noise", steps=3, quadrature=quadrature
        )
        CLOSE(got.effects[0], ((b[site] - a[site]) * slope).sum(-1).T)


def test_along_a_site_that_is_not_before_the_others():
    """The symptom: the line overwrote what came before, and the sites there got no gradient and effects of zero."""
    f, params, clean, corrupted, found = of("gpt2")
    run = partial(integrated_gradient_patching, f, params, clean, corrupted, metric)
    with pytest.raises(errors.SiteError, match=r"along='transformer.h.1' is reached after 'transformer.h.0.mlp'"):
        run(sites=found.mlp, along="transformer.h.1")
    with pytest.raises(errors.InputError, match=r"along='transformer.wte:in' holds a int64 tensor"):
        run(sites=found.mlp, along="transformer.wte:in")
    with pytest.raises(errors.SiteError, match="along is one site, got 2"):
        run(sites=found.mlp, along=["transformer.wte", "transformer.h.0"])
    # written in another way it is the same site
    CLOSE(
        run(sites="transformer.h.0", along="transformer.h[0]:out", steps=3).effects,
        run(sites="transformer.h.0", steps=3).effects,
    )


def test_a_shared_module_by_its_second_name():
    """The symptom: the line was written over the shift at which the gradient is taken."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b, self.last = self.a, nn.Linear(3, 1)

        def forward(self, x):
            return self.last(self.a(x).tanh())[:, 0]

    f, params = functionalize(Shared().double())
    clean, corrupted = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    run = partial(integrated_gradient_patching, f, params, clean, corrupted, lambda out: out, axis=-1, sites="a")
    CLOSE(run(along="b").effects, run().effects)
    assert run().effects.abs().min() > 1e-8


def test_in_half_precision_many_steps_add_up():
    """The symptom: in bfloat16 a running sum stopped growing, so that the result depended on chunk_size: 0.25 for 0.41."""
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Linear(3, 1, bias=False)).bfloat16())
    clean, corrupted = torch.ones(2, 3).bfloat16(), torch.zeros(2, 3).bfloat16()
    run = (f, params, clean, corrupted, lambda out: out[:, 0])
    plain = attribution_patching(*run, sites="0", axis=-1).effects
    for quadrature in ("riemann_left", "gauss_legendre"):
        got = integrated_gradient_patching(*run, sites="0", axis=-1, steps=500, quadrature=quadrature, chunk_size=1)
        assert got.effects.dtype == torch.bfloat16
        torch.testing.assert_close(got.effects, plain, rtol=4e-3, atol=0)


def test_values_that_have_no_row_for_each_example():
    """The symptom: the rows of tokens were taken for examples."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.last = nn.Flatten(0, 1), nn.Linear(3, 1)

        def forward(self, x):
            return self.last(self.flat(x)).view(x.shape[:2]).sum(1)

    f, params = functionalize(Tokens())
    run = (f, params, torch.ones(2, 5, 3), torch.zeros(2, 5, 3))
    for method in METHODS:
        with pytest.raises(errors.SiteError, match="which is not one row for each of 2 examples"):
            method(*run, lambda out: out, sites="flat", axis=-1)
        assert method(*run, lambda out: out.sum(), sites="flat", axis=0).effects.shape == (1, 10)


def test_a_site_of_integers():
    f, params, clean, corrupted, _ = of("gpt2")
    for method in METHODS:
        with pytest.raises(errors.InputError, match=r"sites has 'transformer.wte:in', which holds a int64 tensor"):
            method(f, params, clean, corrupted, metric, sites="transformer.wte:in")


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_cannot_be_seen_under_vmap(method):
    f, params, clean, corrupted = small()
    run = lambda a, b: method(f, params, a, b, lambda out: out[..., 0], sites="0", axis=-1, exact=1).effects  # noqa: E731
    with pytest.raises(errors.InputError, match="under vmap and compilation give exact=0"):
        vmap(run)(clean, corrupted)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_left_padding_does_not_matter(name):
    _, _, clean, corrupted, found = of(name)
    f, params = functionalize(copy.deepcopy(model(name)).float(), use_cache=False)  # Llama takes its softmax in float32
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    padded = [{**each, "attention_mask": mask, "position_ids": position_ids} for each in (clean, corrupted)]
    cut = [{"input_ids": each["input_ids"][:1, 2:]} for each in (clean, corrupted)]
    for method in (attribution_patching, integrated_gradient_patching, atp_star):
        options = {"sites": found.query, "axis": (1, 2), **({"names": found} if method is atp_star else {})}
        both, one = method(f, params, *padded, metric, **options), method(f, params, *cut, metric, **options)
        torch.testing.assert_close(both.effects[:, 2:, :, :1], one.effects, rtol=1e-3, atol=1e-5)
        assert one.effects.abs().max() > 1e-3 and both.effects[:, :2, :, 0].abs().max() < 1e-6
