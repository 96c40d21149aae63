"""What a linear probe says of examples, and the forms in which it may be asked."""

import pytest
import torch
from tensordict import TensorDict

from tdhook.core import errors
from tdhook.latent.probes.logistic import logistic
from tdhook.latent.probes.probe import LinearProbe, decision, predict, predict_probability
from tdhook.latent.probes.ridge import ridge

from .data import activations, labels, values


def probe(*batch, rows=1, width=3, classes=None):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(*batch, rows, width, generator=g, dtype=torch.float64)
    known = None if classes is None else torch.tensor(classes).expand(*batch, -1)
    return LinearProbe(weight, torch.randn(*batch, rows, generator=g, dtype=torch.float64), known, batch_size=batch)


def test_scores_are_affine():
    one, x = probe(classes=[0, 1]), activations(5, 3)
    assert torch.allclose(decision(one, x), x @ one.weight[0] + one.bias[0])
    many = probe(2, 4, rows=3, classes=[0, 1, 2])
    scores = decision(many, x)
    assert scores.shape == (2, 4, 5, 3)
    assert torch.allclose(scores[1, 2, 3], many.weight[1, 2] @ x[3] + many.bias[1, 2])


def test_stacked_sites_have_examples_of_their_own():
    many, x = probe(2, 4, classes=[0, 1]), torch.stack([activations(5, 3), activations(5, 3, seed=1)])
    assert torch.equal(decision(many, x)[1], decision(many[1], x[1]))


def test_labels_are_those_of_the_caller():
    one, x = probe(classes=[7, -2]), activations(20, 3)
    assert torch.equal(predict(one, x), torch.where(decision(one, x) > 0, -2, 7))
    three = probe(2, rows=3, classes=[5, 1, 9])
    assert torch.equal(predict(three, x), torch.tensor([5, 1, 9])[decision(three, x).argmax(-1)])
    value = probe()
    assert torch.equal(predict(value, x), decision(value, x))


def test_probabilities_follow_the_order_of_the_classes():
    one, x = probe(4, classes=[3, 1]), activations(20, 3)
    p = predict_probability(one, x)
    assert p.shape == (4, 20, 2) and torch.allclose(p.sum(-1), torch.ones(4, 20, dtype=p.dtype))
    assert torch.allclose((p[..., 1] / p[..., 0]).log(), decision(one, x))
    three = probe(rows=3, classes=[5, 1, 9])
    assert torch.allclose(predict_probability(three, x), decision(three, x).softmax(-1))


def test_directions_have_unit_norm():
    many = probe(2, 3, classes=[0, 1])
    assert many.direction.shape == (2, 3, 3)
    assert torch.allclose(many.direction * many.weight.norm(dim=-1), many.weight[..., 0, :])
    assert probe(2, rows=4, classes=[0, 1, 2, 3]).direction.shape == (2, 4, 3)
    zero = LinearProbe(torch.zeros(1, 3), torch.zeros(1), batch_size=[])
    assert torch.equal(zero.direction, torch.zeros(3))


def test_probes_stack_index_and_save(tmp_path):
    both = torch.stack([probe(3, classes=[0, 1]), probe(3, classes=[0, 1])])
    assert both.batch_size == (2, 3) and both[0, 1].weight.shape == (1, 3)
    both.memmap(tmp_path / "probes")
    assert torch.equal(LinearProbe.load_memmap(tmp_path / "probes").weight, both.weight)


def test_a_mapping_has_one_probe_for_each_site_in_the_callers_order():
    x = {3: activations(d=4), "b": activations(d=6, seed=1), "a": activations(d=4, seed=2)}
    y = labels(x["b"], tasks=2)
    probes = logistic(x, y)
    assert list(probes) == [3, "b", "a"] and type(probes) is dict
    for key in x:
        alone = logistic(x[key], y)
        assert torch.allclose(probes[key].weight, alone.weight, rtol=1e-7)
        assert torch.equal(predict(probes, x)[key], predict(alone, x[key]))


def test_a_tensordict_gives_a_tensordict():
    inner = TensorDict({"mlp": activations(d=4), "attn": activations(d=5)}, batch_size=[80])
    x = TensorDict({"h": inner, "embed": activations(d=4, seed=1)}, batch_size=[80])
    y = values(x["embed"], tasks=3)
    probes = ridge(x, y)
    assert probes.batch_size == (3,) and list(probes.keys(True, True, is_leaf=lambda c: c is LinearProbe))
    assert torch.allclose(probes["h", "attn"].weight, ridge(x["h", "attn"], y).weight)
    scores = decision(probes, x)
    assert scores["h", "mlp"].shape == (3, 80)
    assert torch.equal(scores["embed"], decision(probes["embed"], x["embed"]))


def test_another_kind_of_probe_needs_decision_and_classes():
    class Constant:
        classes = torch.tensor([4, 8])

        def decision(self, x):
            return x.new_ones(len(x))

    assert predict(Constant(), torch.zeros(3, 2)).tolist() == [8, 8, 8]


@pytest.mark.parametrize(
    ("given", "x", "message"),
    [
        (probe(), torch.zeros(4, 5), r"shape \[4, 5\], but the probe is of width 3"),
        (probe(2), torch.zeros(3, 4, 3), r"batch size \[2\]"),
        (probe(), torch.zeros(3), r"x has to be a tensor \[N, 3\]"),
        ({"a": probe()}, torch.zeros(4, 3), "probe is a mapping of sites, so x has to be one too"),
        ({"a": probe()}, {"b": torch.zeros(4, 3)}, "no values for the site 'a'"),
        (3, torch.zeros(4, 3), "probe is 3 of type int; give what a fit returned"),
    ],
)
def test_bad_questions(given, x, message):
    with pytest.raises(errors.InputError, match=message):
        decision(given, x)


def test_a_regression_has_no_probabilities():
    with pytest.raises(errors.InputError, match="the probe is a regression"):
        predict_probability(probe(), torch.zeros(4, 3))
