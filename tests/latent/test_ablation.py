"""Ablation against plain hooks and closed forms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import vmap

from tdhook import functionalize
from tdhook.core import errors
from tdhook.latent.ablation import ablate, ablation_effects
from tdhook.latent.mean_activations import mean_activations

from .families import FAMILIES, model, named
from .hooks import hooked, put, values_of

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
EXACT = partial(torch.testing.assert_close, rtol=0, atol=0)


def metric(output):
    return output.logits[:, -1, 3] - output.logits[:, -1, 5]


def identity():
    return functionalize(nn.Sequential(nn.Identity()))


X = torch.tensor([[1.0, 2, 3], [10, 20, 30]])


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_every_head_of_every_layer_equals_a_hook(name):
    f, params, inputs, found = named(name)
    got = ablation_effects(f, params, inputs, metric, sites=found.head_output, axis=-2, chunk_size=3)
    second = FAMILIES[name].output
    paths = [second.replace(".1.", ".0."), second]
    size = FAMILIES[name].heads[2]
    for layer, path in enumerate(paths):
        for head in range(4):
            write = put(..., slice(size * head, size * (head + 1)), new=0.0)
            CLOSE(got.ablated[layer, head], metric(hooked(model(name), inputs, {f"{path}:in": write})[0]))
    CLOSE(got.intact, metric(hooked(model(name), inputs, {})[0]))
    CLOSE(got.effect, got.ablated - got.intact)
    assert not got.standard_error.any() and got.effect.abs().min() > 0


def test_heads_of_several_layers_at_once():
    f, params, inputs, found = named("llama")
    got = ablate(f, params, inputs, sites={found.head_output[0]: [1, 2], found.head_output[1]: [-1]}, axis=-2)
    first = put(..., slice(8, 24), new=0.0)
    last = put(..., slice(24, 32), new=0.0)
    path = FAMILIES["llama"].output
    expected, _ = hooked(model("llama"), inputs, {f"{path.replace('.1.', '.0.')}:in": first, f"{path}:in": last})
    CLOSE(got.logits, expected.logits)


def test_one_head_at_one_token():
    f, params, inputs, found = named("gpt2")
    got = ablation_effects(f, params, inputs, metric, sites=found.head_output[1], axis=(1, 2), positions=[[-1, 2], None])
    assert got.ablated.shape == (1, 2, 4, 2)
    expected, _ = hooked(model("gpt2"), inputs, {"transformer.h.1.attn.c_proj:in": put(slice(None), 5, slice(8, 16), new=0.0)})
    CLOSE(got.ablated[0, 0, 1], metric(expected))


def test_a_query_head_in_a_fused_projection_leaves_keys_and_values():
    f, params, inputs, found = named("gpt2")
    got = ablate(f, params, inputs, sites=found.query[0], axis=-2, positions=[2])
    expected, _ = hooked(model("gpt2"), inputs, {"transformer.h.0.attn.c_attn": put(..., slice(16, 24), new=0.0)})
    CLOSE(got.logits, expected.logits)


def test_neurons_and_numbers():
    f, params = identity()
    assert ablate(f, params, X, sites="0", axis=-1, positions=[1]).tolist() == [[1, 0, 3], [10, 0, 30]]
    assert ablate(f, params, X, sites="0", to=7, axis=0, positions=[0]).tolist() == [[7, 7, 7], [10, 20, 30]]
    assert ablate(f, params, X, sites="0", axis=(0, 1), positions=[[1], [0, 2]]).tolist() == [[1, 2, 3], [0, 20, 0]]
    got = ablation_effects(f, params, X, lambda out: out.sum(1), sites="0", axis=1)
    assert got.effect[0].T.tolist() == (-X).tolist()


# Means -----------------------------------------------------------------------------------------------------------------


def test_mean_ablation_is_the_closed_form_per_position_whatever_the_batches():
    f, params, inputs, _ = named("gpt2")
    ids = torch.randint(3, 50, (7, 6), generator=torch.Generator().manual_seed(3))
    batches = lambda sizes: [{"input_ids": part} for part in ids.split(sizes)]  # noqa: E731
    site = "transformer.h.0.mlp"
    expected = values_of(model("gpt2"), {"input_ids": ids}, [site])[site]
    for sizes, chunk_size in ((7, None), (2, None), (3, 2), (1, 1)):
        CLOSE(mean_activations(f, params, batches(sizes), site, chunk_size=chunk_size)[site], expected.mean(0))
        CLOSE(mean_activations(f, params, batches(sizes), site, pooled=True)[site], expected.mean((0, 1)))
    means = mean_activations(f, params, batches(2), site)
    got = ablate(f, params, inputs, sites=site, to=means, axis=1, positions=[0, 3])

    def write(value):
        value[:, [0, 3]] = expected.mean(0)[[0, 3]]
        return value

    CLOSE(got.logits, hooked(model("gpt2"), inputs, {site: write})[0].logits)


def test_means_by_head_and_pooled_means_at_any_length():
    f, params, inputs, found = named("llama")
    data = [{"input_ids": torch.randint(3, 50, (2, length))} for length in (4, 9)]
    site = found.head_output[1].site
    means = mean_activations(f, params, data, site, pooled=True)
    values = torch.cat([values_of(model("llama"), batch, [site])[site].flatten(0, 1) for batch in data])
    CLOSE(means[site], values.mean(0))
    CLOSE(mean_activations(f, params, data, found.head_output, pooled=True)[site], means[site])
    got = ablation_effects(f, params, inputs, metric, sites=found.head_output[1], to=means, axis=-2, positions=[3])
    expected, _ = hooked(model("llama"), inputs, {site: put(..., slice(24, 32), new=values.mean(0)[24:])})
    CLOSE(got.ablated[0, 0], metric(expected))


def test_padding_is_not_in_the_mean():
    f, params = functionalize(Masked())
    x = torch.tensor([[[1.0], [2], [float("nan")]], [[3.0], [float("nan")], [float("nan")]]])
    batch = {"x": x, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert mean_activations(f, params, [batch, batch], ":out", pooled=True)[":out"].item() == 4
    assert mean_activations(f, params, [batch], ":out")[":out"].flatten().tolist() == [4, 4, 0]


# Draws -----------------------------------------------------------------------------------------------------------------


def test_resampling_takes_another_example():
    f, params = identity()
    assert ablate(f, params, X, sites="0", to="resample").equal(X.flip(0))
    x = torch.arange(40.0)[:, None]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert (ablate(f, params, x, sites="0", to="resample", generator=generator) != x).all()


def test_resampling_from_a_reference_takes_one_example_at_all_sites():
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Identity()))
    reference = torch.arange(5.0)[:, None].expand(5, 3)
    seen = ablate(f, params, X, sites="1", to="resample", reference=reference, axis=1, positions=[0, 2])
    assert (seen[:, 0] == seen[:, 2]).all() and seen[:, 1].equal(X[:, 1]) and set(seen[:, 0].tolist()) <= set(range(5))
    one = ablate(f, params, X, sites=["0", "1"], to="resample", reference=reference[3:4])
    assert (one == 3).all()


class Masked(nn.Module):
    def forward(self, x, attention_mask):
        return x * 2


def test_padding_is_not_drawn_for_a_token():
    """The symptom: what stands at a padded position of one prompt went into the text of another."""
    f, params = functionalize(Masked())
    x, mask = torch.randn(2, 3, 1), torch.tensor([[1, 1, 1], [0, 1, 1]])
    inputs, whole = {"x": x, "attention_mask": mask}, {"x": x, "attention_mask": torch.ones_like(mask)}
    run = partial(ablate, f, params, sites=":out", to="resample")
    for given, reference in ((inputs, None), (inputs, whole), (whole, inputs)):
        with pytest.raises(errors.InputError, match=r"padded at different places, .* drawn at ':out' for a token of another"):
            run(given, reference=reference)
    got = run(inputs, axis=1, positions=[-1, 1])
    assert torch.equal(got, 2 * torch.cat([x[:, :1], x.flip(0)[:, 1:]], 1))
    assert torch.equal(run(whole), 2 * x.flip(0))


def test_the_mean_over_all_examples_is_the_limit_of_resampling():
    f, params = identity()
    reference = torch.tensor([[0.0, 0, 0], [1, 2, 4]])
    generator = torch.Generator().manual_seed(0)
    options = {"sites": "0", "to": "resample", "reference": reference, "axis": 1, "samples": 400, "generator": generator}
    got = ablation_effects(f, params, X, lambda out: out.sum(1), **options)
    exact = X.sum(1) - X.T + torch.tensor([[0.5], [1], [2]])
    assert ((got.ablated[0] - exact).abs() < 4 * got.standard_error[0]).all()
    torch.testing.assert_close(got.standard_error[0], torch.tensor([[0.5], [1], [2]]).expand(3, 2) / 20, rtol=0.02, atol=0)


def test_noise_has_the_scale_of_the_values():
    f, params = identity()
    x = 5 + 3 * torch.randn(100, 100)
    added = ablate(f, params, x, sites="0", to="noise", scale=2.0, generator=torch.Generator().manual_seed(0)) - x
    assert abs(added.std() / (2 * x.std()) - 1) < 0.03 and abs(added.mean()) < 0.3
    EXACT(ablate(f, params, x, sites="0", to="noise", scale=0.0), x)


@pytest.mark.parametrize("kind", ["resample", "noise"])
def test_draws_depend_on_the_generator_alone(kind):
    f, params, inputs, found = named("gpt2")

    def run(seed, chunk_size=None):
        generator = torch.Generator().manual_seed(seed)
        options = {"to": kind, "generator": generator, "samples": 2, "axis": -2, "chunk_size": chunk_size}
        return ablation_effects(f, params, inputs, metric, sites=found.head_output, **options)

    state = torch.get_rng_state()
    first = run(0)
    assert torch.equal(torch.get_rng_state(), state)
    EXACT(run(0).ablated, first.ablated)
    CLOSE(run(0, 1).ablated, first.ablated)
    if kind == "noise":
        assert not torch.equal(run(1).ablated, first.ablated)


def test_one_sample_has_no_standard_error():
    f, params = identity()
    got = ablation_effects(f, params, X, lambda out: out.sum(1), sites="0", to="noise")
    assert got.standard_error.isnan().all() and got.ablated.shape == (1, 2)


# Laws ------------------------------------------------------------------------------------------------------------------


def test_the_sweep_is_ablate_at_each_place():
    f, params, inputs, found = named("gpt2")
    means = mean_activations(f, params, [inputs], found.mlp)
    sweep = ablation_effects(f, params, inputs, metric, sites=found.mlp, to=means, axis=1)
    for layer, site in enumerate(found.mlp):
        for token in range(6):
            CLOSE(
                sweep.ablated[layer, token], metric(ablate(f, params, inputs, sites=site, to=means, axis=1, positions=[token]))
            )


def test_under_vmap_and_gradients():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    x = torch.randn(5, 1, 3).double()
    run = lambda x: ablation_effects(f, params, x, lambda out: out[:, 0], sites="1", axis=-1).ablated  # noqa: E731
    CLOSE(vmap(run)(x), torch.stack([run(each) for each in x]))
    weights = params["2", "weight"][0]
    slope = torch.func.grad(lambda x: ablate(f, params, x, sites="1", axis=-1, positions=[0])[:, 0].sum())(x[0])
    hidden = 1 - torch.tanh(x[0] @ params["0", "weight"].T + params["0", "bias"]).square()
    CLOSE(slope, (hidden * weights * torch.tensor([0.0, 1, 1, 1])) @ params["0", "weight"])


@pytest.mark.compile
def test_compiled():
    torch._dynamo.reset()
    f, params = functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    run = lambda x: ablation_effects(f, params, x, lambda out: out[:, 0], sites=["0", "1"], axis=-1).ablated  # noqa: E731
    x = torch.randn(5, 3).double()
    CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    f, params = functionalize(nn.Sequential(nn.Linear(3, 4), nn.ReLU()).to(dtype))
    x = torch.randn(1, 3).to(dtype)
    for to in ("zero", "noise", mean_activations(f, params, [x], "0")):
        got = ablation_effects(f, params, x, lambda out: out.sum(1), sites="0", to=to, axis=1)
        assert got.ablated.dtype == dtype and got.ablated.shape == (1, 4, 1)


def test_means_over_many_draws_are_taken_in_float32():
    """The symptom: in bfloat16 a mean over many samples stands still."""
    f, params = identity()
    x = torch.ones(1, 1).bfloat16()
    options = {"sites": "0", "to": "resample", "reference": torch.tensor([[0.0], [2]]).bfloat16(), "samples": 1000}
    generator = torch.Generator().manual_seed(0)
    got = ablation_effects(f, params, x, lambda out: out[:, 0], generator=generator, **options)
    assert abs(got.ablated.item() - 1) < 4 / 1000**0.5
    torch.testing.assert_close(got.standard_error.float(), torch.tensor([[1 / 1000**0.5]]), rtol=0.01, atol=0)


def test_nothing_of_the_caller_is_changed():
    f, params, inputs, found = named("bert")
    before = inputs["input_ids"].clone()
    module = model("bert")
    ablation_effects(f, params, inputs, metric, sites=found.mlp)
    assert inputs["input_ids"].equal(before) and not any(m._forward_hooks for m in module.modules())
    CLOSE(f(params, inputs).logits, hooked(module, inputs, {})[0].logits)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "nothing"}, errors.InputError, "to='nothing' is unknown; choose from zero, resample, noise"),
        ({"to": None}, errors.InputError, "to is None of type NoneType; give 'zero'"),
        ({"to": {"1": X}}, errors.SiteError, "to has no '0'"),
        ({"to": {"0": torch.ones(4)}}, errors.SiteError, r"shape \[4\] for '0'.*broadcasts"),
        ({"to": "zero", "reference": X}, errors.InputError, "reference is what to='resample' draws from"),
        ({"to": "resample", "reference": torch.ones(2, 5)}, errors.InputError, "examples of the same length"),
        ({"axis": 4}, errors.InputError, "axis=4 is out of range at '0'"),
        ({"axis": (0, 0)}, errors.InputError, r"axis=\(0, 0\) is no axis"),
        ({"axis": -1, "positions": [3]}, errors.InputError, "positions has 3, out of range for 3 positions"),
        ({"positions": [0]}, errors.InputError, r"positions=\[0\] count along an axis; give axis too"),
        ({"axis": (0, 1), "positions": [[0]]}, errors.InputError, "positions has 1 entries for 2 axes"),
        ({"axis": 1, "positions": []}, errors.InputError, "positions is empty"),
        ({"sites": []}, errors.SiteError, "sites is empty"),
        ({"sites": {}}, errors.SiteError, "sites is empty"),
        ({"sites": [None]}, errors.SiteError, "sites holds None: tdhook.latent.names did not find"),
        ({"sites": {"0": [0]}, "positions": [1], "axis": 1}, errors.InputError, "positions are given twice"),
        ({"sites": {"0": [0], "*": [1]}, "axis": 1}, errors.SiteError, "sites means '0' twice; give all positions of a site"),
        ({"sites": "9"}, errors.SiteError, "unknown site '9'"),
        ({"scale": -1.0}, errors.InputError, "scale is a number of at least 0"),
        ({"generator": 3}, errors.InputError, "generator is 3"),
    ],
)
def test_bad_input(options, error, message):
    f, params = identity()
    with pytest.raises(error, match=message):
        ablate(f, params, X, **{"sites": "0", **options})


def test_more_bad_input():
    f, params = identity()
    with pytest.raises(errors.InputError, match="has one example and no other to draw"):
        ablate(f, params, X[:1], sites="0", to="resample")
    with pytest.raises(errors.InputError, match="samples=3, but only 'resample' and 'noise' are random"):
        ablation_effects(f, params, X, lambda out: out.sum(), sites="0", samples=3)
    with pytest.raises(errors.SiteError, match="sites is a dict with '0'; give addresses alone"):
        ablation_effects(f, params, X, lambda out: out.sum(), sites={"0": [0]}, axis=1)
    with pytest.raises(errors.TargetError, match="metric returned"):
        ablation_effects(f, params, X, lambda out: out, sites="0")
    with pytest.raises(errors.InputError, match="pad the prompts to one length, or take pooled=True"):
        mean_activations(f, params, [torch.ones(1, 3), torch.ones(1, 4)], "0")
    with pytest.raises(errors.SiteError, match="which has no positions; take pooled=False"):
        mean_activations(f, params, [torch.ones(3)], "0", pooled=True)
    with pytest.raises(errors.InputError, match="batches is empty"):
        mean_activations(f, params, [], "0")
    g, p = functionalize(nn.Sequential(nn.Dropout(0.5)))
    with pytest.warns(errors.TdhookWarning, match="train mode"):
        ablate(g, p, X, sites="0")
