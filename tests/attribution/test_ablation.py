"""Feature ablation and permutation against captum, closed forms and loops."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from torch import nn

from tdhook import functionalize, targets
from tdhook.attribution.ablation import feature_ablation, feature_permutation
from tdhook.core import errors

from .games import BOTH, CLOSE, MASK, MASKS, MultiLayer, TwoInputs, X, painted, prepared, two_inputs

MODEL = MultiLayer()
F, PARAMS = functionalize(MODEL)


@pytest.mark.parametrize(
    ("x", "options", "expected"),
    [
        (X, {}, [[80, 200, 120]]),
        (X, {"groups": MASK}, [[280, 120]]),
        (X, {"groups": MASK, "baselines": 4.0}, [[248, 104]]),
        (BOTH, {}, [[8, 35, 12], [80, 200, 120]]),
        (BOTH, {"groups": MASKS}, [[41, 12], [120, 280]]),
    ],
)
def test_captums_numbers(x, options, expected):
    """Those of groups it paints over their elements."""
    CLOSE(feature_ablation(F, PARAMS, x, targets=0, **options), torch.tensor(expected, dtype=torch.float64))


def test_bools_by_a_function_that_converts():
    x = torch.tensor([[1.0, 0.0, 1.0]]).double()
    got = feature_ablation(lambda p, x: F(p, 10 * x.bool().double()), PARAMS, x, targets=0, groups=MASK)
    CLOSE(got, torch.tensor([[40.0, 40]]).double())


def test_a_function_of_the_whole_batch():
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    got = feature_ablation(lambda params, x: x[0], None, x, targets=targets.every(), groups=MASK)
    assert got.tolist() == [[1, 0], [2, 0], [0, 3]]
    alone = feature_ablation(lambda params, x: x[0].sum(), None, x)
    assert alone.tolist() == [[1, 2, 3], [0, 0, 0]]


@pytest.mark.parametrize("ids", [None, (torch.tensor([[[0, 1], [1, 2]]]), torch.tensor([[2, 0, 3]]))])
def test_several_inputs_equal_captum(ids):
    model, inputs = TwoInputs(), two_inputs()
    base = two_inputs(1)
    got = feature_ablation(*functionalize(model), inputs, targets=[0, 2], baselines=base, groups=ids)
    got = got if ids is None else painted(got, ids)
    for which, target in enumerate((0, 2)):
        peer = captum.attr.FeatureAblation(model).attribute(inputs, base, target, feature_mask=ids)
        for g, p in zip(got, peer):
            CLOSE(g[which], p)


def test_at_a_site_equals_captum():
    ids = torch.tensor([[0, 1, 1, 2]])
    run = lambda groups: feature_ablation(  # noqa: E731
        F, PARAMS, BOTH, targets=0, at="linear1", baselines={"linear1": 2.0}, groups=groups
    )
    peer = captum.attr.LayerFeatureAblation(MODEL, MODEL.linear1)
    CLOSE(run(None)["linear1"], peer.attribute(BOTH, 2.0, 0))
    CLOSE(painted(run({"linear1": ids}), ids), peer.attribute(BOTH, 2.0, 0, layer_mask=ids))


def test_a_feature_without_influence_scores_zero():
    got = feature_ablation(lambda params, x: x[:, 0] * x[:, 1], None, torch.randn(3, 4).double())
    assert got[:, 2:].abs().max() == 0 and got[:, :2].abs().min() > 0


def test_derivatives_pass_through():
    x = torch.randn(2, 3).double()
    jacobian = torch.func.jacrev(lambda x: feature_ablation(lambda p, x: x.square().sum(-1), None, x).sum())(x)
    CLOSE(jacobian, 2 * x)


# Permutation -----------------------------------------------------------------------------------------------------------


def test_a_batch_of_two_is_swapped_or_left():
    x = torch.tensor([[1.0, 10.0], [4.0, 30.0]]).double()
    got = feature_permutation(lambda params, x: x.sum(-1), None, x, samples=1, generator=torch.Generator().manual_seed(0))
    assert got.standard_error.isnan().all()
    for column, step in ((0, 3.0), (1, 20.0)):
        assert got.value[:, column].tolist() in ([-step, step], [0.0, 0.0])


def test_the_mean_over_permutations_of_a_linear_function():
    """E[x_pi] is the mean of the batch, so attributions are x minus it, times the weights."""
    f, params = functionalize(nn.Linear(3, 2).double())
    x = torch.randn(5, 3).double()
    got = feature_permutation(f, params, x, targets=[0, 1], samples=2000, generator=torch.Generator().manual_seed(1))
    expected = params["weight"][:, None] * (x - x.mean(0))
    assert ((got.value - expected).abs() < 5 * got.standard_error).all()
    spread = (params["weight"][:, None] * x.std(0, correction=0)).expand(2, 5, 3).abs() / 2000**0.5
    torch.testing.assert_close(got.standard_error, spread, rtol=0.1, atol=0)


def test_a_group_moves_together_in_all_tensors():
    """F = a - b with a = b: shuffled together nothing changes, apart it does."""
    x = torch.arange(4.0)[:, None].double()
    run = lambda *ids: feature_permutation(lambda p, x: (x[0] - x[1])[:, 0], None, (x, x), groups=ids)  # noqa: E731
    zero = torch.zeros(1, 1).long()
    assert run(zero, zero).value.abs().max() == 0
    assert run(zero, zero + 1).value.abs().max() > 0


def test_a_fixed_permutation_equals_captum():
    model, inputs = TwoInputs(), two_inputs(4)
    orders = torch.rand(7 * 4, generator=torch.Generator().manual_seed(3)).reshape(7, 4).argsort(-1)
    left = iter(orders)

    def shuffle(x, mask):
        return torch.where(mask, x[next(left)], x)

    peer = captum.attr.FeaturePermutation(model, perm_func=shuffle).attribute(inputs, 1)
    generator = torch.Generator().manual_seed(3)
    got = feature_permutation(*functionalize(model), inputs, targets=1, samples=1, generator=generator)
    for g, p in zip(got.value, peer):
        CLOSE(g, p)


def test_permutation_needs_several_examples():
    with pytest.raises(errors.InputError, match=r"shape \[1\]; .* at least two examples, for one use feature_ablation"):
        feature_permutation(F, PARAMS, X, targets=0)
    with pytest.raises(errors.InputError, match=r"shape \[\]; .* at least two examples"):
        feature_permutation(lambda params, x: x.sum(), None, X)


def test_tensors_without_the_batch_are_refused():
    f, params, x = prepared()
    with pytest.raises(errors.InputError, match=r"shape \[5\], but there are target values for 3 examples"):
        feature_ablation(lambda p, inputs: f(p, inputs[0] * inputs[1]), params, (x, x[0, :5]), targets=0)
