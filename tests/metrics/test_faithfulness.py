"""Completeness, infidelity, curves and subsets: closed forms of linear models, captum, and plain loops."""

from __future__ import annotations

import math
from functools import partial

import captum.metrics
import pytest
import scipy.stats
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

from tdhook import functionalize, targets
from tdhook.core import errors
from tdhook.core.groups import Groups
from tdhook.metrics import (
    completeness,
    deletion,
    faithfulness_correlation,
    gaussian_noise,
    infidelity,
    insertion,
    pixel_flipping,
    sensitivity_n,
    square_removal,
)

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
NEAR = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(features=5, classes=3):
    torch.manual_seed(0)
    model = nn.Linear(features, classes).double()
    return *functionalize(model), model.weight.detach()


def mlp():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    return model, *functionalize(model)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


class Two(nn.Module):
    """Two inputs and a number that does not move."""

    def forward(self, a, b, scale):
        return torch.stack([(a.flatten(1).sum(-1) * b.square().sum(-1)), a.flatten(1).square().sum(-1)], -1) * scale[:, None]


# Completeness ----------------------------------------------------------------------------------------------------------


def test_weight_times_input_is_complete_and_half_of_it_lacks_half():
    f, params, w = linear()
    x, baseline = draw(4, 5), draw(5, seed=1)
    attributions = w[:, None] * (x - baseline)
    whole = completeness(f, params, x, attributions, targets=targets.every(), baselines=baseline)
    CLOSE(whole, torch.zeros(3, 4).double())
    half = completeness(f, params, x, attributions / 2, targets=targets.every(), baselines=baseline)
    CLOSE(half, -((x - baseline) @ w.T).T / 2)
    change = (x - baseline) @ w.T
    relative = completeness(f, params, x, attributions * 3, targets=[2, 1, 0], baselines=baseline, relative=True)
    CLOSE(relative[1], (2 * change / change.abs())[:, 1])


def test_completeness_at_sites():
    model, f, params = mlp()
    x = draw(3, 6)
    hidden = model[1](model[0](x)).detach()
    attributions = {"1": model[2].weight.detach()[2] * hidden}
    CLOSE(completeness(f, params, x, attributions, targets=2, at="1"), torch.zeros(3).double())
    start = {"1": 0.5}
    CLOSE(
        completeness(f, params, x, attributions, targets=2, at="1", baselines=start),
        0.5 * model[2].weight.detach()[2].sum().expand(3),
    )


def test_a_relative_delta_without_a_change_is_not_a_number():
    value = completeness(lambda p, x: x.sum(-1), {}, torch.zeros(2, 3), torch.tensor([[0.0] * 3, [1.0] * 3]), relative=True)
    assert value[0].isnan() and value[1].isinf()


# Infidelity ------------------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_linear_model_has_no_infidelity():
    f, params, w = linear()
    got = infidelity(f, params, draw(4, 5), w[:, None].expand(3, 4, 5), targets=targets.every(), generator=seeded())
    CLOSE(got.value, torch.zeros(3, 4).double())
    assert got.standard_error.shape == (3, 4)


def test_one_perturbation_that_removes_everything_gives_the_square_of_the_delta():
    """captum's IN1, for I = x - x'."""
    _, f, params = mlp()
    x, baseline, phi = draw(3, 6), draw(3, 6, seed=1), draw(2, 3, 6, seed=2)
    got = infidelity(f, params, x, phi, targets=[0, 2], perturbation=lambda x, _: x - baseline, samples=3)
    delta = completeness(f, params, x, phi * (x - baseline), targets=[0, 2], baselines=baseline)
    CLOSE(got.value, delta.square())
    CLOSE(got.standard_error, torch.zeros(2, 3).double())


def test_zero_attributions_of_a_linear_model_leave_the_variance_of_the_output():
    """E[(w . I)^2] = std^2 |w|^2; the estimate is within its own error of it."""
    f, params, w = linear()
    x = draw(2, 5)
    got = infidelity(
        f, params, x, 0 * x, targets=1, perturbation=gaussian_noise(0.3), samples=4000, chunk_size=500, generator=seeded()
    )
    expected = 0.09 * w[1].square().sum()
    assert ((got.value - expected).abs() < 4 * got.standard_error).all()
    # the square of a normal number has variance 2 sigma^4
    torch.testing.assert_close(got.standard_error, (2 * expected**2 / 4000).sqrt().expand(2), rtol=0.1, atol=0)


@pytest.mark.parametrize("normalize", [False, True])
def test_infidelity_equals_captum(normalize):
    model, f, params = mlp()
    x, phi, noise = draw(3, 6), draw(3, 6, seed=1), list(draw(7, 3, 6, seed=2))
    given = iter(noise)
    got = infidelity(f, params, x, phi, targets=1, perturbation=lambda x, _: next(given), samples=7, normalize=normalize)

    def perturb(repeated):
        i = torch.stack(noise, 1).reshape(21, 6)
        return i, repeated - i

    CLOSE(got.value, captum.metrics.infidelity(model, perturb, x, phi, target=1, n_perturb_samples=7, normalize=normalize))


def test_normalized_infidelity_does_not_depend_on_the_scale():
    _, f, params = mlp()
    x, phi = draw(3, 6), draw(3, 6, seed=1)
    options = {"targets": 1, "normalize": True, "samples": 20}
    one = infidelity(f, params, x, phi, generator=seeded(), **options)
    other = infidelity(f, params, x, -7 * phi, generator=seeded(), **options)
    CLOSE(one.value, other.value)
    CLOSE(one.standard_error, other.standard_error)
    assert infidelity(f, params, x, 0 * phi, **options).value.isnan().all()


def test_the_error_of_the_normalized_infidelity_is_that_of_repetition():
    _, f, params = mlp()
    x, phi, generator = draw(1, 6), draw(1, 6, seed=1), seeded()
    options = {"targets": 1, "normalize": True, "samples": 60, "perturbation": gaussian_noise(0.5), "generator": generator}
    runs = [infidelity(f, params, x, phi, **options) for _ in range(60)]
    spread = torch.stack([r.value for r in runs]).std(0)
    torch.testing.assert_close(torch.stack([r.standard_error for r in runs]).mean(0), spread, rtol=0.3, atol=0)


def test_squares_lie_inside_and_are_the_same_in_all_channels():
    images = draw(50, 3, 6, 7) + 10
    removed = square_removal(2, baseline=1.0)(images, seeded())
    inside = removed != 0
    assert (inside.sum((1, 2, 3)) == 12).all() and (inside.all(1) == inside.any(1)).all()
    CLOSE(images - removed, torch.where(inside, 1.0, images))
    places = inside[:, 0].flatten(1).float().argmax(-1)
    assert set((places // 7).tolist()) == set(range(5)) and set((places % 7).tolist()) == set(range(6))


def test_several_inputs_share_one_prediction():
    """Each attribution goes with the perturbation of its own tensor."""
    f, params = functionalize(Two())
    a, b, scale = draw(3, 2, 2), draw(3, 4, seed=1), torch.tensor([1, 2, 3])
    move = {"a": draw(3, 2, 2, seed=2), "b": draw(3, 4, seed=3), "scale": None}
    phi = {"b": draw(3, 4, seed=4), "a": draw(3, 2, 2, seed=5), "scale": None}
    inputs = {"a": a, "b": b, "scale": scale}
    got = infidelity(f, params, inputs, phi, targets=0, perturbation=lambda x, _: move, samples=1)
    moved = {"a": a - move["a"], "b": b - move["b"], "scale": scale}
    predicted = (phi["a"] * move["a"]).sum((1, 2)) + (phi["b"] * move["b"]).sum(1)
    CLOSE(got.value, (predicted - (f(params, inputs) - f(params, moved))[:, 0]).square())
    assert got.standard_error.isnan().all()
    packed = TensorDict(inputs, [3])
    again = infidelity(
        f, params, packed, TensorDict({"a": phi["a"], "b": phi["b"]}, [3]), targets=0, samples=2, perturbation=lambda x, _: move
    )
    CLOSE(again.value, got.value)


# Curves ----------------------------------------------------------------------------------------------------------------


def test_curves_of_a_linear_model():
    """w = 4, 1, 2: what is removed in which order can be read off."""

    def f(params, x):
        return x @ torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64)

    x = torch.ones(2, 3).double()
    phi = torch.tensor([[4.0, 1.0, 2.0], [1.0, 4.0, 2.0]]).double()
    morf = pixel_flipping(f, {}, x, phi)
    CLOSE(morf.fractions, torch.tensor([0, 1, 2, 3]).double() / 3)
    CLOSE(morf.values, torch.tensor([[7, 3, 1, 0], [7, 6, 4, 0]]).double())
    CLOSE(morf.area, torch.tensor([7.5, 13.5]).double() / 3)
    CLOSE(morf.aopc, torch.tensor([(4 + 6 + 7) / 4, (1 + 3 + 7) / 4]).double())
    lerf = pixel_flipping(f, {}, x, phi, order="lerf")
    CLOSE(lerf.values[0], torch.tensor([7, 6, 4, 0]).double())
    CLOSE(deletion(f, {}, x, phi).values, morf.values)
    CLOSE(insertion(f, {}, x, phi).values, torch.tensor([[0, 4, 6, 7], [0, 1, 3, 7]]).double())
    CLOSE(pixel_flipping(f, {}, x, phi, baselines=-1.0).values[0], torch.tensor([7, -1, -5, -7]).double())


def test_steps_are_spread_over_the_features():
    def f(params, x):
        return x.sum(-1)

    x = torch.ones(1, 10).double()
    curve = deletion(f, {}, x, draw(1, 10), steps=4)
    CLOSE(curve.fractions, torch.tensor([0, 3, 5, 8, 10]).double() / 10)  # 2.5 and 7.5 features are rounded up
    CLOSE(curve.values, 10 * (1 - curve.fractions)[None])
    CLOSE(curve.area, torch.tensor([5.0]).double())  # a straight line, whatever the steps
    assert deletion(f, {}, x, draw(1, 10), steps=99).values.shape == (1, 11)


def flipped(model, x, phi, target, steps):
    """One example and one step at a time."""
    rows = []
    for example, scores in zip(x, phi):
        order = sorted(range(scores.numel()), key=lambda i: -scores.flatten()[i])
        row = []
        for k in range(steps + 1):
            changed = example.clone().flatten()
            changed[order[: math.floor(k * len(order) / steps + 0.5)]] = 0.25
            row.append(model(changed.reshape(1, *example.shape))[0, target])
        rows.append(torch.stack(row))
    return torch.stack(rows).detach()


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
def test_each_target_has_an_order_of_its_own(chunk_size):
    model, f, params = mlp()
    x, phi = draw(3, 6), draw(2, 3, 6, seed=1)
    got = pixel_flipping(f, params, x, phi, targets=[3, 0], baselines=0.25, steps=4, chunk_size=chunk_size)
    assert got.values.shape == (2, 3, 5) and got.area.shape == (2, 3)
    for t, target in enumerate((3, 0)):
        CLOSE(got.values[t], flipped(model, x, phi[t], target, 4))
    single = pixel_flipping(f, params, x, phi[1], targets=0, baselines=0.25, steps=4, chunk_size=chunk_size)
    CLOSE(single.values, got.values[1])


def test_a_map_over_pixels_removes_whole_pixels():
    def f(params, x):
        return x[:, 0].sum((1, 2)) + 10 * x[:, 1].sum((1, 2))

    x = torch.ones(1, 2, 1, 3).double()
    by_pixel = deletion(f, {}, x, torch.tensor([3.0, 1.0, 2.0]).double().reshape(1, 1, 1, 3), steps=3)
    CLOSE(by_pixel.values, torch.tensor([[33.0, 22.0, 11.0, 0.0]]).double())
    by_channel = deletion(f, {}, x, torch.tensor([1.0, 2.0]).double().reshape(1, 2, 1, 1))
    CLOSE(by_channel.values, torch.tensor([[33.0, 3.0, 0.0]]).double())
    assert deletion(f, {}, x, draw(1, 2, 1, 3)).values.shape == (1, 7)


def test_groups_are_ranked_by_their_sum():
    def f(params, x):
        return x @ torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)

    phi, ids = torch.tensor([[2.0, 3.0, 2.0]]).double(), torch.tensor([[0, 1, 0]])
    for groups in (ids, Groups([ids], 2)):
        got = deletion(f, {}, torch.ones(1, 3).double(), phi, groups=groups)
        CLOSE(got.values, torch.tensor([[111.0, 10.0, 0.0]]).double())


def test_tokens_are_removed_at_the_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2)).double()
    f, params = functionalize(model)
    ids = torch.tensor([[1, 5, 2], [7, 7, 0]])
    phi = torch.tensor([[[1.0], [3.0], [2.0]], [[3.0], [1.0], [2.0]]]).double()
    got = deletion(f, params, ids, {"0": phi}, targets=1, at="0")
    embedded = model[0](ids).detach()
    embedded[0, 1] = embedded[1, 0] = 0
    CLOSE(got.values[:, 1], model[2](embedded.flatten(1))[:, 1].detach())
    CLOSE(got.values[:, 3], model[2].bias[1].detach().expand(2))


def test_features_of_several_inputs_are_ranked_together():
    f, params = functionalize(Two())
    a, b, scale = torch.ones(2, 2, 1).double(), torch.ones(2, 1).double(), torch.tensor([1, 2])
    phi = (torch.tensor([5.0, 1.0]).double().reshape(1, 2, 1).expand(2, 2, 1), torch.full((2, 1), 3.0).double(), None)
    got = deletion(f, params, (a, b, scale), phi, targets=0)
    CLOSE(got.values, torch.tensor([[2.0, 1.0, 0.0, 0.0], [4.0, 2.0, 0.0, 0.0]]).double())


def test_ties_go_by_index_and_an_order_of_nothing_is_not_a_number():
    def f(params, x):
        return x @ torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)

    x = torch.ones(4, 3).double()
    phi = torch.tensor([[2.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1.0, math.nan, 2.0], [2.0, 1.0, 1.0]]).double()
    morf, lerf = (pixel_flipping(f, {}, x, phi, order=order) for order in ("morf", "lerf"))
    CLOSE(morf.values[0], torch.tensor([111.0, 110.0, 100.0, 0.0]).double())
    CLOSE(lerf.values[3], torch.tensor([111.0, 101.0, 1.0, 0.0]).double())
    for curve in (morf, lerf):
        assert curve.values[1:3].isnan().all() and curve.area[1:3].isnan().all() and not curve.values[3].isnan().any()
    one = deletion(lambda params, x: x, {}, torch.ones(2).double(), torch.zeros(2).double())
    CLOSE(one.values, torch.tensor([[1.0, 0.0]] * 2).double())


# Subsets ---------------------------------------------------------------------------------------------------------------


def test_a_linear_model_has_correlation_one():
    f, params, w = linear(8)
    x, baseline = draw(4, 8), draw(4, 8, seed=1)
    phi = w[:, None] * (x - baseline)
    options = {"targets": targets.every(), "baselines": baseline, "samples": 20}
    got = sensitivity_n(f, params, x, phi, n=[1, 4, 7], generator=seeded(), **options)
    NEAR(got, torch.ones(3, 4, 3).double())
    CLOSE(sensitivity_n(f, params, x, phi, n=4, **options), torch.ones(3, 4).double())
    NEAR(faithfulness_correlation(f, params, x, -2 * phi, subset_size=3, **options), -torch.ones(3, 4).double())
    NEAR(
        faithfulness_correlation(f, params, x, phi, subset_size=3, similarity="spearman", **options), torch.ones(3, 4).double()
    )


def test_all_subsets_of_one_feature_equal_scipy():
    """With many draws of single features each feature comes equally often, up to chance."""
    model, f, params = mlp()
    x, phi = draw(2, 6), draw(2, 6, seed=1)
    got = sensitivity_n(f, params, x, phi, n=1, targets=0, samples=6000, generator=seeded())
    for i in range(2):
        drops = [(model(x[i]) - model(x[i] * (torch.arange(6) != k)))[0].item() for k in range(6)]
        assert abs(got[i].item() - scipy.stats.pearsonr(phi[i].numpy(), drops).statistic) < 0.05


def test_subsets_have_n_features_and_differ_among_examples():
    seen = []

    def f(params, x):
        seen.append(x)
        return x.sum(-1)

    sensitivity_n(vmapless(f), {}, torch.ones(3, 9), draw(3, 9).float(), n=4, samples=50, chunk_size=1, generator=seeded())
    kept = torch.stack(seen[1:])
    assert ((kept == 0).sum(-1) == 4).all() and len(seen) == 51
    assert (kept[:, 0] != kept[:, 1]).any()
    rates = (kept == 0).double().mean((0, 1))
    assert ((rates - 4 / 9).abs() < 0.15).all()


def vmapless(f):
    """A model whose values can be looked at under vmap."""

    class Peek(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(x):
            return f(None, x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def vmap(info, in_dims, x):
            return torch.stack([f(None, each) for each in x.movedim(in_dims[0], 0)]), 0

    return lambda params, x: Peek.apply(x)


def test_what_does_not_vary_has_no_correlation():
    f, params, w = linear()
    x = draw(2, 5)
    phi = w[0] * x
    assert sensitivity_n(f, params, x, phi, n=5, targets=0).isnan().all()
    assert sensitivity_n(f, params, x, 0 * phi, n=2, targets=0).isnan().all()
    assert sensitivity_n(lambda params, x: 0 * x.sum(-1) + 0.1, params, x, phi, n=2).isnan().all()


# For all ---------------------------------------------------------------------------------------------------------------

METRICS = {
    "completeness": completeness,
    "infidelity": partial(infidelity, samples=7),
    "normalized": partial(infidelity, samples=7, normalize=True),
    "deletion": partial(deletion, steps=4),
    "insertion": insertion,
    "pixel_flipping": partial(pixel_flipping, order="lerf"),
    "sensitivity_n": partial(sensitivity_n, n=[2, 3], samples=7),
    "faithfulness_correlation": partial(faithfulness_correlation, subset_size=2, samples=7),
}
RANDOM = ("infidelity", "normalized", "sensitivity_n", "faithfulness_correlation")
CHUNKED = [name for name in METRICS if name != "completeness"]


def tensors(result):
    return [r for r in (result if isinstance(result, tuple) else (result,)) if isinstance(r, torch.Tensor)]


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_change_nothing(name):
    _, f, params = mlp()
    x, phi = draw(3, 6), draw(2, 3, 6, seed=1)
    results = []
    for chunk_size in (None, 1, 3, 1000):
        options = {"generator": seeded()} if name in RANDOM else {}
        results.append(tensors(METRICS[name](f, params, x, phi, targets=[1, 3], chunk_size=chunk_size, **options)))
    for result in results[1:]:
        for value, expected in zip(result, results[0]):
            NEAR(value, expected)


@pytest.mark.parametrize("name", METRICS)
def test_under_vmap_over_examples(name):
    _, f, params = mlp()
    x, phi = draw(3, 6), draw(3, 2, 6, seed=1)

    def each(x, phi):
        return tuple(tensors(METRICS[name](f, params, x, phi, targets=[1, 3])))

    got = vmap(each, randomness="different")(x, phi)
    whole = tensors(METRICS[name](f, params, x, phi.movedim(1, 0), targets=[1, 3]))
    for value, expected in zip(got, whole):
        if value.ndim == expected.ndim and expected.ndim > 1:
            assert value.shape == expected.movedim(1, 0).shape
            if name not in RANDOM:
                CLOSE(value, expected.movedim(1, 0))


@pytest.mark.compile
@pytest.mark.parametrize("name", ["completeness", "normalized", "deletion", "sensitivity_n"])
def test_compiled(name):
    torch.compiler.reset()
    _, f, params = mlp()
    x, phi = draw(3, 6), draw(2, 3, 6, seed=1)

    def run(x, phi):
        return tuple(tensors(METRICS[name](f, params, x, phi, targets=[1, 3])))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        got = compiled(x, phi)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = run(x, phi)
    for value, other in zip(got, expected):
        NEAR(value, other)


@pytest.mark.parametrize("name", METRICS)
def test_nothing_of_the_caller_is_changed(name):
    _, f, params = mlp()
    x, phi = draw(3, 6), draw(3, 6, seed=1)
    copies, state = [x.clone(), phi.clone(), params.clone()], torch.get_rng_state()
    options = {"generator": seeded()} if name in RANDOM else {}
    METRICS[name](f, params, x, phi, targets=1, **options)
    assert torch.equal(x, copies[0]) and torch.equal(phi, copies[1]) and (params == copies[2]).all()
    assert torch.equal(torch.get_rng_state(), state) and not x.requires_grad


@pytest.mark.parametrize("name", RANDOM)
def test_the_generator_decides(name):
    _, f, params = mlp()
    x, phi = draw(3, 6), draw(3, 6, seed=1)
    first, again, other = (tensors(METRICS[name](f, params, x, phi, targets=1, generator=seeded(s)))[0] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name", METRICS)
def test_half_precision_gives_float32(name):
    _, f, params = mlp()
    x, phi = draw(1, 6).bfloat16(), draw(1, 6, seed=1).bfloat16()
    result = tensors(METRICS[name](f, params.bfloat16(), x, phi, targets=1))
    assert all(r.dtype == torch.float32 for r in result) and result[-1].isfinite().all()


X = torch.ones(3, 6).double()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("phi", "options", "error", "message"),
    [
        (X[:, :5], {}, errors.InputError, r"attributions holds a float64 tensor of shape \[3, 5\] for .* \[3, 6\]"),
        (X[:2], {}, errors.InputError, r"attributions holds .* \[2, 6\] for .* \[3, 6\]"),
        (X[:1], {}, errors.InputError, r"attributions holds .* \[1, 6\] where shape \[3, 6\] is expected"),
        (X.long(), {}, errors.InputError, "attributions holds a int64 tensor"),
        (X[None], {}, errors.InputError, r"\[1, 3, 6\] where shape \[3, 6\] is expected"),
        (X, {"targets": [0, 1]}, errors.InputError, r"\[3, 6\] where shape \[2, 3, 6\] is expected"),
        (None, {}, errors.InputError, "attributions holds None"),
        ((X, X), {}, errors.InputError, "attributions holds a tuple"),
        (X, {"targets": []}, errors.TargetError, "targets is empty"),
        (X, {"targets": 4}, errors.TargetError, "index=4 is out of range"),
        (X, {"at": "9"}, errors.SiteError, "no module '9'"),
    ],
)
def test_attributions_that_do_not_fit(name, phi, options, error, message):
    _, f, params = mlp()
    with pytest.raises(error, match=message):
        METRICS[name](f, params, X, phi, **{"targets": 0, **options})


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        (infidelity, {"samples": 0}, "samples is an integer of at least 1, got 0"),
        (infidelity, {"chunk_size": 0}, "chunk_size is an integer of at least 1 or None, got 0"),
        (infidelity, {"generator": 3}, "generator is 3"),
        (infidelity, {"perturbation": 0.1}, "perturbation is 0.1"),
        (infidelity, {"perturbation": lambda x, g: x[0]}, r"perturbation returned a float64 tensor of shape \[6\]"),
        (infidelity, {"perturbation": square_removal(2)}, r"square_removal\(2\) takes images"),
        (deletion, {"steps": 0}, "steps is an integer of at least 1, got 0"),
        (deletion, {"chunk_size": 1.5}, "chunk_size is an integer"),
        (insertion, {"baselines": torch.ones(7).double()}, r"baselines holds .* does not broadcast to \[3, 6\]"),
        (insertion, {"baselines": "blur"}, "baselines holds 'blur'"),
        (insertion, {"baselines": X.float()}, "baselines holds a float32 .* for a float64"),
        (insertion, {"groups": torch.ones(6)}, "groups holds a float32 tensor"),
        (pixel_flipping, {"order": "random"}, "order is 'random' of type str; choose 'morf'"),
        (sensitivity_n, {"n": 0}, "n is an integer of at least 1, got 0"),
        (sensitivity_n, {"n": []}, r"n is an integer or a sequence of some, got \[\]"),
        (sensitivity_n, {"n": [2, 7]}, "n=7 is more than the 6 features"),
        (sensitivity_n, {"n": 2, "samples": 1}, "samples is an integer of at least 2, got 1"),
        (faithfulness_correlation, {"subset_size": 7}, "subset_size=7 is more than the 6 features"),
        (faithfulness_correlation, {"subset_size": 2, "similarity": "kendall"}, "similarity is 'kendall'"),
    ],
)
def test_bad_options(metric, options, message):
    _, f, params = mlp()
    with pytest.raises(errors.InputError, match=message):
        metric(f, params, X, X, targets=0, **options)


def test_more_bad_options():
    _, f, params = mlp()
    with pytest.raises(errors.InputError, match="infidelity needs one for every element"):
        infidelity(f, params, X, X[:, :1], targets=0)
    for std in (0, -1.0, "1", math.inf):
        with pytest.raises(errors.InputError, match="std is a number above 0"):
            gaussian_noise(std)
    with pytest.raises(errors.InputError, match="size is an integer of at least 1"):
        square_removal(0)
    with pytest.raises(errors.InputError, match=r"groups holds ids that cannot be read inside"):
        vmap(lambda x: deletion(f, params, x, x, targets=0, groups=(0 * x).long()).area)(X)


def test_a_model_in_train_mode_is_named():
    f, params = functionalize(nn.Sequential(nn.Linear(6, 4), nn.Dropout()).double())
    with pytest.warns(errors.TdhookWarning, match="deletion: the model is in train mode"):
        deletion(f, params, X, X, targets=0)
