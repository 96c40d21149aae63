"""Control tasks and permutation tests: what they find where the answer is known."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tdhook.core.errors import InputError
from tdhook.latent.probes import least_squares, logistic, mean_difference
from tdhook.latent.probes.controls import permutation_test, selectivity
from tdhook.latent.probes.estimators import scikit
from tdhook.latent.probes.mlp import mlp
from tdhook.latent.probes.validation import cross_validate

CLOSE = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6, check_dtype=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def embedded(types=60, each=6, d=20):
    """Examples of types with an embedding of their own, and a label that is linear in it."""
    type_of = torch.arange(types).repeat(each)
    table = torch.randn(types, d).double()
    return table[type_of] + 0.01 * torch.randn(types * each, d).double(), (table[:, 0] > 0).long()[type_of], type_of


# Selectivity -----------------------------------------------------------------------------------------------------------


def test_a_probe_that_memorises_is_not_selective():
    from sklearn.neighbors import KNeighborsClassifier

    x, y, types = embedded()
    memory = selectivity(scikit(KNeighborsClassifier(1)), x, y, types, controls=2, generator=seeded())
    assert memory.control.value == 1 and memory.value.value == 0
    linear = selectivity(logistic, x, y, types, controls=4, generator=seeded())
    assert linear.task.value > 0.9 and linear.value.value > 0.1


def test_where_every_example_has_its_own_type_the_control_is_at_chance():
    x, y, _ = embedded(types=200, each=1, d=3)
    found = selectivity(logistic, x, y, torch.arange(200), controls=10, generator=seeded())
    assert abs(found.control.value - 0.5) < 0.06 and found.task.value > 0.9


def test_the_difference_is_taken_fold_by_fold():
    x, y, types = embedded()
    found = selectivity(logistic, x, y, types, generator=seeded())
    CLOSE(found.value.value, found.task.value - found.control.value)
    expected = cross_validate(logistic, x, y, generator=seeded())
    CLOSE(found.task.value, expected.mean.value)
    CLOSE(found.task.standard_error, expected.mean.standard_error)


def test_sites_and_tasks_of_selectivity():
    x, y, types = embedded(each=3)
    several = {"a": torch.stack([x, -x])[0], "b": torch.randn_like(x)[:, :4]}
    labels = torch.stack([y, 1 - y])
    found = selectivity(logistic, several, labels, types, generator=seeded())
    assert found["a"].value.value.shape == (2,) and found["a"].value.value[0] > found["b"].value.value[0]
    stacked = selectivity(logistic, torch.stack([x, -x]), labels, types, generator=seeded())
    assert stacked.value.value.shape == (2, 2)
    CLOSE(stacked.task.value[0], found["a"].task.value)
    values = selectivity(least_squares, x, x[:, 0], types, generator=seeded())
    assert values.task.value > 0.99 and values.value.value > 0.1


# Permutation test ------------------------------------------------------------------------------------------------------


def test_p_values_of_something_and_of_nothing():
    x = torch.randn(2, 60, 3).double()
    y = torch.stack([(x[0, :, 0] > 0).long(), torch.randint(2, (60,))])
    found = permutation_test(mean_difference, x, y, permutations=99, generator=seeded())
    assert found.p_value.shape == (2, 2) and found.permuted.shape == (99, 2, 2)
    assert found.p_value[0, 0] == 0.01
    assert (found.p_value.flatten()[1:] > 0.05).all()
    as_good = (found.permuted >= found.score - 1e-6).sum(0)
    CLOSE(found.p_value, (1 + as_good) / 100)
    assert abs(found.permuted[:, 0, 0].mean() - 0.5) < 0.03


def test_p_values_are_uniform_under_the_null():
    x = torch.randn(60, 2).double()
    y = torch.randn(200, 60).double()
    p = permutation_test(least_squares, x, y, permutations=39, folds=3, generator=seeded()).p_value
    for level in (0.1, 0.3, 0.5):
        assert abs((p <= level).double().mean() - level) < 0.1


def test_a_loss_is_good_where_it_is_small():
    x = torch.randn(40, 2).double()
    y = (x[:, 0] > 0).long()
    assert permutation_test(logistic, x, y, score="log_loss", permutations=19, generator=seeded()).p_value == 0.05


def test_labels_are_exchanged_within_groups_only():
    """All that y has to do with x is the group."""
    group = torch.arange(60) % 2
    x = torch.randn(60, 2).double() + 3 * group[:, None]
    y = ((torch.rand(60) < 0.2).long() + group) % 2
    free = permutation_test(logistic, x, y, permutations=49, generator=seeded())
    bound = permutation_test(logistic, x, y, permutations=49, within=group, generator=seeded())
    assert free.p_value == 0.02 and bound.p_value > 0.1


def test_the_score_is_that_of_cross_validation():
    x, y = torch.randn(40, 3), torch.randint(3, (40,))
    found = permutation_test(logistic, x, y, permutations=3, generator=seeded())
    CLOSE(found.score, cross_validate(logistic, x, y, generator=seeded()).mean.value)


@pytest.mark.parametrize(
    "fit", [logistic, partial(mlp, hidden=[3], epochs=4, batch_size=10, generator=torch.Generator())], ids=["logistic", "mlp"]
)
def test_chunks_of_permutations_change_nothing(fit):
    x, y = torch.randn(2, 30, 3), torch.randint(2, (30,))
    found = []
    for chunk_size in (1, 4, None):
        if isinstance(fit, partial):
            fit.keywords["generator"].manual_seed(0)
        found.append(
            permutation_test(fit, x, y, permutations=7, folds=3, score="log_loss", chunk_size=chunk_size, generator=seeded())
        )
    for other in found[1:]:
        CLOSE(tuple(other), tuple(found[0]))


def test_randomness_is_that_of_the_generator():
    x, y = torch.randn(30, 3), torch.randint(2, (30,))
    state = torch.get_rng_state()
    a, b = (permutation_test(mean_difference, x, y, permutations=5, generator=seeded(), score="auroc") for _ in range(2))
    CLOSE(tuple(a), tuple(b))
    a, b = (selectivity(mean_difference, x, y, torch.arange(30), generator=seeded(3)) for _ in range(2))
    CLOSE(a.control.value, b.control.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input():
    x, y = torch.randn(12, 2), torch.tensor([0, 1] * 6)
    with pytest.raises(InputError, match="permutations is an integer of at least 1"):
        permutation_test(logistic, x, y, permutations=0)
    with pytest.raises(InputError, match=r"within is a int64 tensor of shape \[3\]"):
        permutation_test(logistic, x, y, within=torch.arange(3))
    with pytest.raises(InputError, match="no two examples can be exchanged"):
        permutation_test(logistic, x, y, within=torch.arange(12))
    with pytest.raises(InputError, match="no two examples can be exchanged"):
        permutation_test(logistic, x, y, folds=12)
    with pytest.raises(InputError, match="types is a int64 tensor of shape"):
        selectivity(logistic, x, y, torch.arange(3))
    with pytest.raises(InputError, match="types has 1 types, too few"):
        selectivity(logistic, x, y, torch.zeros(12).long())
    with pytest.raises(InputError, match="controls is an integer of at least 1"):
        selectivity(logistic, x, y, y, controls=0)
    with pytest.raises(InputError, match="NaN"):
        permutation_test(logistic, x * torch.nan, y)
    with pytest.raises(InputError, match="y has one class only"):
        selectivity(logistic, x, 0 * y, y)
