"""Sensitivities to concepts against closed forms and captum; significance against SciPy."""

from __future__ import annotations

from functools import partial

import captum.concept
import pytest
import scipy.special
import scipy.stats
import torch
from captum.concept._utils.classifier import Classifier
from torch import Tensor, nn
from torch.func import vmap

from tdhook import functionalize, intervene, stop_at, targets
from tdhook.core.errors import GradientError, InputError, SiteError, TargetError
from tdhook.latent.concepts import cav, student_t, tcav, tcav_significance

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def mean_difference(x: Tensor, y: Tensor) -> Tensor:
    return x[:, y == 1].mean(1) - x[:, y == 0].mean(1)


def mlp():
    torch.manual_seed(0)
    return functionalize(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double())


def cnn():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    return functionalize(nn.Sequential(*layers).double())


# Sensitivities ---------------------------------------------------------------------------------------------------------


def test_a_linear_head_has_the_products_of_weights_and_vectors():
    f, params = functionalize(nn.Sequential(nn.Tanh(), nn.Linear(5, 3)).double())
    vectors = torch.randn(2, 4, 5).double()
    got = tcav(f, params, torch.randn(7, 5).double(), "0", vectors, targets=targets.every())
    products = torch.einsum("td,krd->tkr", params["1", "weight"], vectors)
    CLOSE(got.sensitivity, products[..., None].expand(3, 2, 4, 7))
    CLOSE(got.magnitude, products)
    assert torch.equal(got.sign_count, (products > 0).double())


def test_sensitivities_are_directional_derivatives():
    f, params = mlp()
    x, vectors, step = torch.randn(5, 4).double(), torch.randn(3, 6).double(), 1e-6
    got = tcav(f, params, x, "1", vectors, targets=[0, 2])
    for k, v in enumerate(vectors):
        moves = [lambda value, move=s * v: value + move for s in (step, -step)]
        ahead, behind = (intervene(f, {"1": move})(params, x)[:, [0, 2]] for move in moves)
        torch.testing.assert_close(got.sensitivity[:, k], (ahead - behind).T / (2 * step), rtol=1e-6, atol=1e-8)
    CLOSE(got.magnitude, got.sensitivity.mean(-1))
    CLOSE(got.sign_count, (got.sensitivity > 0).double().mean(-1))


def test_pooled_vectors_move_all_positions():
    f, params = cnn()
    x, vectors = torch.randn(5, 1, 6, 6).double(), torch.randn(3, 4).double()
    everywhere = vectors[:, :, None, None].expand(3, 4, 4, 4)
    got = tcav(f, params, x, "1", vectors, targets=[0, 1], axis=1)
    CLOSE(got.sensitivity, tcav(f, params, x, "1", everywhere, targets=[0, 1]).sensitivity)
    CLOSE(got.sensitivity, tcav(f, params, x, "1", vectors, targets=[0, 1], axis=-3).sensitivity)


def test_vectors_of_tokens():
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(6, 2)).double())
    v = torch.randn(3).double()
    got = tcav(f, params, torch.randn(4, 2, 3).double(), "0", v, targets=1, axis=-1)
    CLOSE(got.magnitude, (params["2", "weight"][1].reshape(2, 3) @ v).sum())


def test_dimensions_of_targets_and_vectors():
    f, params = mlp()
    x, v = torch.randn(2, 4).double(), torch.randn(6).double()
    assert tcav(f, params, x, "1", v, targets=0).sensitivity.shape == (2,)
    assert tcav(f, params, x, "1", v, targets=[0]).sensitivity.shape == (1, 2)
    assert tcav(f, params, x, "1", v.expand(5, 6), targets=0).sign_count.shape == (5,)
    assert tcav(f, params, x[:1], "1", v.expand(5, 1, 6), targets=[0, 1]).sensitivity.shape == (2, 5, 1, 1)


def test_scores_of_the_examples_of_a_class():
    f, params = mlp()
    x, v, classes = torch.randn(6, 4).double(), torch.randn(2, 6).double(), torch.tensor([0, 2, 0, 2, 2, 1])
    got = tcav(f, params, x, "1", v, targets=[2, 0], classes=classes)
    for t, c in enumerate([2, 0]):
        alone = tcav(f, params, x[classes == c], "1", v, targets=c)
        CLOSE(got.sign_count[t], alone.sign_count)
        CLOSE(got.magnitude[t], alone.magnitude)
    assert got.sensitivity.shape == (2, 2, 6)


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_chunks_change_nothing(chunk_size):
    f, params = mlp()
    x, v = torch.randn(5, 4).double(), torch.randn(2, 6).double()
    whole, got = (tcav(f, params, x, "1", v, targets=[0, 1, 2], chunk_size=c) for c in (None, chunk_size))
    CLOSE(got.sensitivity, whole.sensitivity)


def test_under_vmap_over_vectors():
    f, params = mlp()
    x, v = torch.randn(5, 4).double(), torch.randn(3, 6).double()
    got = vmap(lambda each: tcav(f, params, x, "1", each, targets=[0, 1]).sensitivity)(v)
    CLOSE(got, tcav(f, params, x, "1", v, targets=[0, 1]).sensitivity.transpose(0, 1))


@pytest.mark.compile
def test_compiled():
    f, params = cnn()
    x, v = torch.randn(5, 1, 6, 6).double(), torch.randn(3, 4).double()

    def run(x, v):
        result = tcav(f, params, x, "1", v, targets=[0, 1], axis=1)
        return result.sensitivity, result.sign_count

    got = torch.compile(run, backend="aot_eager", fullgraph=True)(x, v)
    for a, b in zip(got, run(x, v)):
        CLOSE(a, b)


def test_low_precision():
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Linear(4, 2)).bfloat16())
    got = tcav(f, params, torch.randn(3, 4).bfloat16(), "0", torch.randn(2, 4), targets=0)
    assert got.sensitivity.dtype == torch.bfloat16


def test_a_planted_concept_counts_for_its_class_only():
    """The concept is a large x_0, which counts for class 0 and not for class 1."""

    class Planted(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = nn.Identity()

        def forward(self, x):
            h = self.hidden(x)
            return torch.stack([h[:, 0] ** 3 + h[:, 1] ** 2, h[:, 1] ** 2], 1)

    f, params = functionalize(Planted())
    concept = torch.randn(60, 4) + torch.tensor([6.0, 0, 0, 0])
    randoms = list(torch.randn(12, 60, 4))
    vectors, chance = cav(concept, randoms[1:], fit=mean_difference), cav(randoms[1:], randoms[0], fit=mean_difference)
    x = torch.randn(200, 4)
    scores, by_chance = (tcav(f, params, x, "hidden", v, targets=[0, 1]).sign_count for v in (vectors, chance))
    p = tcav_significance(scores, by_chance).corrected
    assert p[0] < 0.01 < p[1]
    assert scores[0].mean() > 0.9


# captum ----------------------------------------------------------------------------------------------------------------


class MeanDifference(Classifier):
    """A classifier for captum that fits the difference of means."""

    def __init__(self):
        super().__init__()

    def train_and_eval(self, dataloader, test_split_ratio=0.33, **_):
        x, y = (torch.cat(parts) for parts in zip(*dataloader))
        self.names = sorted(y.unique().tolist())
        v = x[y == self.names[0]].mean(0) - x[y == self.names[1]].mean(0)
        self.vectors = torch.stack([v, -v])
        return {"accs": torch.tensor(1.0)}

    def weights(self):
        return self.vectors

    def classes(self):
        return self.names


def test_against_captum(tmp_path):
    f, params = mlp()
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model.load_state_dict({k: v.float() for k, v in params.flatten_keys(".").items()})
    f, params = functionalize(model)
    sets = [torch.randn(20, 4) + i for i in range(3)]
    concepts = [captum.concept.Concept(i, f"c{i}", [s]) for i, s in enumerate(sets)]
    method = captum.concept.TCAV(model, ["1"], classifier=MeanDifference(), save_path=str(tmp_path))
    x = torch.randn(15, 4)
    theirs = method.interpret(x, [[concepts[0], concepts[1]], [concepts[0], concepts[2]]], target=1)

    acts = [stop_at(f, "1")(params, s) for s in sets]
    ours = tcav(f, params, x, "1", torch.stack([mean_difference_of(acts[0], a) for a in acts[1:]]), targets=1)
    for i, key in enumerate(["0-1", "0-2"]):
        torch.testing.assert_close(ours.sign_count[i], theirs[key]["1"]["sign_count"][0])
        torch.testing.assert_close(ours.magnitude[i], theirs[key]["1"]["magnitude"][0])


def mean_difference_of(a: Tensor, b: Tensor) -> Tensor:
    return a.mean(0) - b.mean(0)


# Significance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal_variances", [False, True])
def test_two_samples_against_scipy(equal_variances):
    a, b = torch.rand(3, 4, 8).double() + 0.2, torch.rand(3, 1, 13).double() * 2
    got = tcav_significance(a, b, equal_variances=equal_variances)
    theirs = scipy.stats.ttest_ind(a.numpy(), b.expand(3, 4, 13).numpy(), axis=-1, equal_var=equal_variances)
    CLOSE(got.statistic, torch.from_numpy(theirs.statistic))
    CLOSE(got.p_value, torch.from_numpy(theirs.pvalue))
    CLOSE(got.degrees, torch.tensor(theirs.df.tolist(), dtype=torch.float64).expand(3, 4))
    CLOSE(got.corrected, (12 * got.p_value).clamp(max=1))


def test_one_sample_against_scipy():
    a = torch.rand(5, 9)
    got = tcav_significance(a, null=0.4, comparisons=1)
    theirs = scipy.stats.ttest_1samp(a.double().numpy(), 0.4, axis=-1)
    CLOSE(got.p_value, torch.from_numpy(theirs.pvalue))
    assert torch.equal(got.corrected, got.p_value)


def test_one_hypothesis():
    got = tcav_significance(torch.tensor([0.9, 0.8, 1.0]))
    assert got.p_value.shape == () and torch.equal(got.corrected, got.p_value)


def test_scores_that_do_not_vary():
    got = tcav_significance(torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.1, 0.1]]), torch.full((4,), 0.1))
    assert got.p_value.tolist() == [0, 1] and got.statistic.tolist() == [torch.inf, 0]
    assert tcav_significance(torch.full((3,), 0.5)).p_value == 1


def test_significance_under_vmap():
    a, b = torch.rand(3, 8), torch.rand(5)
    CLOSE(vmap(lambda each: tcav_significance(each, b).p_value)(a), tcav_significance(a, b).p_value)


def test_the_t_distribution_against_scipy():
    t = torch.cat([torch.zeros(1), torch.logspace(-6, 6, 61)]).double()[:, None]
    n = torch.tensor([0.5, 1, 2, 3.7, 10, 99, 1e4, 1e6]).double()
    ours = student_t.two_sided(-t.expand(62, 8), n.expand(62, 8))
    theirs = torch.from_numpy(2 * scipy.stats.t.sf(t.numpy(), n.numpy()))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-14)


def test_the_incomplete_beta_function_against_scipy():
    a, b = (torch.rand(500).double() * 50 + 0.1 for _ in range(2))
    x = torch.rand(500).double()
    theirs = torch.from_numpy(scipy.special.betainc(a.numpy(), b.numpy(), x.numpy()))
    torch.testing.assert_close(student_t.incomplete_beta(a, b, x, 1 - x), theirs, rtol=1e-9, atol=1e-14)


# Bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "cavs", "options", "error", "message"),
    [
        ("1", torch.randn(5), {}, InputError, r"cavs has shape \[5\], but '1' holds .*features of an example are \[6\]"),
        ("1", torch.randn(5), {"axis": 1}, InputError, r"cavs has shape \[5\].*along axis 1 there are 6"),
        ("1", torch.randn(6), {"axis": 2}, InputError, "axis=2 is out of range at '1'"),
        ("1", torch.zeros(6), {}, InputError, "cavs is zero"),
        ("1", torch.full((6,), torch.nan), {}, InputError, "cavs holds NaN"),
        ("1", torch.ones(6).long(), {}, InputError, "cavs is .*give a floating-point tensor"),
        (["1", "2"], torch.randn(6), {}, InputError, "site is .*; give one address"),
        ("*", torch.randn(6), {}, SiteError, "pattern"),
        ("9", torch.randn(6), {}, SiteError, "9"),
        ("1", torch.randn(6), {"targets": 7}, TargetError, "index=7 is out of range"),
        ("1", torch.randn(6), {"chunk_size": 0}, InputError, "chunk_size is an integer"),
        ("1", torch.randn(6), {"classes": torch.zeros(5)}, InputError, "classes is .*give an integer tensor"),
        ("1", torch.randn(6), {"classes": torch.zeros(4).long()}, InputError, "classes has 4 entries for 5 examples"),
        ("1", torch.randn(6), {"classes": torch.ones(5).long()}, InputError, "classes has no example of class 0"),
        (
            "1",
            torch.randn(6),
            {"classes": torch.ones(5).long(), "targets": targets.every()},
            InputError,
            "classes needs targets that are classes",
        ),
    ],
)
def test_bad_input(site, cavs, options, error, message):
    f, params = mlp()
    with pytest.raises(error, match=message):
        tcav(f, params, torch.randn(5, 4).double(), site, cavs, **{"targets": 0, **options})


def test_the_axis_of_the_batch_is_no_axis_of_vectors():
    f, params = mlp()
    with pytest.raises(InputError, match="axis=0"):
        tcav(f, params, torch.randn(5, 4).double(), "1", torch.randn(5), targets=0, axis=0)


def test_without_gradients():
    f, params = mlp()
    with torch.no_grad(), pytest.raises(GradientError, match="tcav needs gradients"):
        tcav(f, params, torch.randn(5, 4).double(), "1", torch.randn(6), targets=0)


@pytest.mark.parametrize(
    ("scores", "random_scores", "message"),
    [
        (torch.rand(3, 1), None, "scores has 1 runs in its last dimension; a test needs at least two"),
        (torch.tensor([torch.nan, 1]), None, "scores holds NaN"),
        (torch.tensor([0, 1]), None, "scores is .*give a floating-point tensor"),
        (torch.rand(3, 4), torch.rand(2, 4), "random_scores is .*does not broadcast"),
        (torch.rand(3, 4), torch.rand(1), "random_scores has 1 runs"),
    ],
)
def test_bad_input_of_significance(scores, random_scores, message):
    with pytest.raises(InputError, match=message):
        tcav_significance(scores, random_scores)
    with pytest.raises(InputError, match="comparisons"):
        tcav_significance(torch.rand(3), comparisons=0)
