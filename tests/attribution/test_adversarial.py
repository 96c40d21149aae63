"""FGSM and PGD against captum, closed forms and their own constraints."""

from __future__ import annotations

from functools import partial

import captum.robust
import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

from tdhook import functionalize, targets
from tdhook.attribution.adversarial import cross_entropy, fgsm, pgd
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
CAPTUM_WARNS = pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
METHODS = {"fgsm": partial(fgsm, epsilon=0.1), "pgd": partial(pgd, radius=0.1), "l2": partial(pgd, radius=0.1, norm="l2")}


def classifier(softmax=True):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), *([nn.Softmax(-1)] if softmax else [])]
    return nn.Sequential(*layers).double()


def data(*shape, seed=1):
    torch.manual_seed(seed)
    return torch.randn(*shape).double()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bm(_, x):
    """captum's BasicModel."""
    return 1 - F.relu(1 - x)


def bm2(_, inputs):
    """captum's BasicModel2."""
    return F.relu(F.relu(inputs[0]) - 1 - F.relu(inputs[1]))


# captum's numbers ------------------------------------------------------------------------------------------------------


def test_one_step_away_from_a_class():
    """captum's FG1. The logarithm of a negative value is NaN, its gradient is not."""
    got = fgsm(bm, {}, torch.tensor([[2.0, -9.0, 9.0, 1.0, -3.0]]), epsilon=0.1, targets=1)
    torch.testing.assert_close(got, torch.tensor([[2.0, -8.9, 9.0, 1.0, -3.0]]))


def test_one_step_of_two_inputs():
    """captum's FG2."""
    inputs = (torch.tensor([[4.0, -1.0], [3.0, 10.0]]), torch.tensor([[2.0, -5.0], [-2.0, 1.0]]))
    a, b = fgsm(bm2, {}, inputs, epsilon=0.25, targets=0)
    torch.testing.assert_close(a, torch.tensor([[3.75, -1.0], [2.75, 10.0]]))
    torch.testing.assert_close(b, torch.tensor([[2.25, -5.0], [-2.0, 1.0]]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_stay_in_the_ball(norm):
    """captum's PG1: two steps of 0.1 within 0.25, three within 0.2."""
    got = pgd(bm, {}, torch.tensor([[2.0, -9.0, 9.0, 1.0, -3.0]]), radius=0.25, step_size=0.1, steps=2, targets=4, norm=norm)
    torch.testing.assert_close(got, torch.tensor([[2.0, -9.0, 9.0, 1.0, -2.8]]))
    options = {"radius": 0.2, "step_size": 0.1, "steps": 3, "targets": 2, "targeted": True, "norm": norm}
    torch.testing.assert_close(pgd(bm, {}, torch.tensor([[9.0, 10, -6, -1]]), **options), torch.tensor([[9.0, 10, -6.2, -1]]))


# captum ----------------------------------------------------------------------------------------------------------------


@CAPTUM_WARNS
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("bounds", [None, (-1.0, 0.5)])
def test_fgsm_equals_captum(targeted, bounds):
    model = classifier()
    f, params = functionalize(model)
    x = data(3, 6) if bounds is None else data(3, 6).clamp(*bounds)
    got = fgsm(f, params, x, epsilon=0.3, targets=[0, 2], targeted=targeted, bounds=bounds)
    low, high = bounds or (float("-inf"), float("inf"))
    reference = captum.robust.FGSM(model, lower_bound=low, upper_bound=high)
    for row, target in zip(got, (0, 2)):
        CLOSE(row, reference.perturb(x, 0.3, target, targeted=targeted))


@CAPTUM_WARNS
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_equals_captum(norm, targeted):
    """captum takes sign steps in both balls. Its renormalisation to the border is off by 1e-7."""
    model = classifier()
    f, params = functionalize(model)
    x, mask = data(3, 6), torch.tensor([1, 1, 0, 1, 0, 1])
    options = {"radius": 0.4, "step_size": 0.1, "targeted": targeted}
    got = pgd(f, params, x, targets=[0, 2], steps=7, norm=norm, update="sign", mask=mask, bounds=(-1.5, 1.5), **options)
    reference = captum.robust.PGD(model, lower_bound=-1.5, upper_bound=1.5)
    for row, target in zip(got, (0, 2)):
        expected = reference.perturb(
            x, step_num=7, target=target, norm={"linf": "Linf", "l2": "L2"}[norm], mask=mask.expand(3, 6), **options
        )
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-7)


# Closed forms ----------------------------------------------------------------------------------------------------------


@CAPTUM_WARNS
def test_small_gradients_count():
    """captum leaves out what is below 1e-6, so that a rescaled loss has another attack."""
    x = torch.zeros(1, 2).double()
    got = fgsm(lambda _, x: 1 + 1e-9 * x[:, 0] - x[:, 1], {}, x, epsilon=0.5, targets=None)
    CLOSE(got, torch.tensor([[-0.5, 0.5]]).double())
    assert captum.robust.FGSM(lambda x: 1 + 1e-9 * x[:, 0] - x[:, 1]).perturb(x, 0.5, None)[0, 0] == 0


def test_in_the_l2_ball_a_linear_loss_ends_where_its_gradient_points():
    weight = torch.tensor([3.0, 0.0, -4.0]).double()
    x = data(2, 3)
    got = pgd(lambda w, x: x @ w, weight, x, radius=2.0, norm="l2", loss=lambda out: out)
    CLOSE(got, x + 2 * weight / 5)


def test_the_l2_ball_is_that_of_all_tensors_of_an_example():
    a, b = data(2, 3), data(2, 2)
    got = pgd(lambda _, i: 3 * i[0][:, 0] + 4 * i[1][:, 1], {}, (a, b, 7), radius=1.0, norm="l2", loss=lambda out: out)
    assert got[2] == 7
    CLOSE(got[0] - a, torch.tensor([[0.6, 0.0, 0.0]], dtype=torch.float64).expand(2, 3))
    CLOSE(got[1] - b, torch.tensor([[0.0, 0.8]], dtype=torch.float64).expand(2, 2))


def test_the_default_step_reaches_the_border():
    got = pgd(lambda _, x: x.sum(-1), {}, torch.zeros(1, 3), radius=0.5, loss=lambda out: out)
    torch.testing.assert_close(got, torch.full((1, 3), 0.5))


def test_cross_entropy_of_logits_is_the_loss_of_their_probabilities():
    x = data(3, 6)
    (f, params), (g, logits) = functionalize(classifier()), functionalize(classifier(softmax=False))
    run = partial(pgd, radius=0.3, targets=[1, 3], steps=4)
    CLOSE(run(f, params, x), run(g, logits, x, loss=cross_entropy), rtol=1e-8)


def test_a_probability_of_zero_of_another_class_harms_nobody():
    """The symptom: 0 * inf in the pullback of the logarithm made NaN of every gradient."""
    f = lambda _, x: torch.stack([x[:, 0] + 1, 0 * x[:, 0]], -1)  # noqa: E731
    x = torch.zeros(1, 1)
    got = fgsm(f, {}, x, epsilon=0.5, targets=[0, 0])
    assert got.flatten().tolist() == [-0.5, -0.5]
    assert fgsm(f, {}, x, epsilon=0.5, targets=[0, 1])[0].item() == -0.5


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_loss_goes_where_it_should(name, targeted):
    f, params = functionalize(classifier())
    x = data(5, 6)
    got = METHODS[name](f, params, x, targets=targets.every(), targeted=targeted)
    before, after = f(params, x).T, torch.stack([f(params, row)[:, c] for c, row in enumerate(got)])
    assert ((after > before) if targeted else (after < before)).all()


# Constraints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ball_bounds_and_mask_hold(norm, random_start):
    f, params = functionalize(classifier())
    x = data(40, 6).clamp(-1, 1)
    mask = torch.tensor([True, False, True, True, True, False])
    options = {"targets": 0, "norm": norm, "random_start": random_start, "generator": seeded()}
    got = pgd(f, params, x, radius=0.7, bounds=(-1.0, torch.full((6,), 1.0).double()), mask=mask, steps=3, **options)
    change = got - x
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert size.max() <= 0.7 + 1e-12 and got.abs().max() <= 1 and (change[:, ~mask] == 0).all()
    assert (change[:, mask] != 0).any(1).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball_evenly(norm):
    """Without steps of any size what is left is the start."""
    x = torch.zeros(4000, 2).double()
    run = partial(pgd, lambda _, x: x.sum(-1), {}, x, radius=2.0, norm=norm, steps=1, step_size=0.0, random_start=True)
    got = run(loss=lambda out: out, generator=seeded())
    size = (got.abs().amax(1) if norm == "linf" else got.norm(dim=1)) / 2
    # the part within half of the radius is a quarter, in two dimensions
    assert size.max() <= 1 and abs((size < 0.5).double().mean() - 0.25) < 0.03 and got.mean(0).abs().max() < 0.1


def test_a_generator_reproduces_and_leaves_the_global_one_alone():
    f, params = functionalize(classifier())
    run = partial(pgd, f, params, data(3, 6), radius=0.3, targets=[0, 1], random_start=True, steps=2)
    state = torch.get_rng_state()
    first, again, other = (run(generator=seeded(i)) for i in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(torch.get_rng_state(), state)
    CLOSE(run(generator=seeded(), chunk_size=1), first)


# Composition -----------------------------------------------------------------------------------------------------------


def test_structures_keep_what_does_not_move():
    model = lambda _, i: (i["a"] * i["b"]).softmax(-1)  # noqa: E731
    inputs = {"a": data(3, 4), "b": data(3, 4, seed=2), "n": torch.arange(3)}
    run = partial(pgd, model, {}, radius=0.2, steps=3)
    single, several = run(inputs, targets=1), run(inputs, targets=[0, 1])
    assert torch.equal(single["n"], inputs["n"]) and torch.equal(several["n"], inputs["n"])
    CLOSE(several["a"][1], single["a"])
    packed = TensorDict(inputs, [3])
    one, many = run(packed, targets=1), run(packed, targets=[0, 1])
    assert one.batch_size == (3,) and many.batch_size == (2, 3) and many["n"].shape == (2, 3)
    CLOSE(one["b"], single["b"])
    CLOSE(many[1]["b"], single["b"])
    assert torch.equal(packed["a"], inputs["a"])
    masked = run(inputs, targets=1, mask={"a": None, "b": torch.tensor(0), "n": None})
    assert torch.equal(masked["b"], inputs["b"]) and not torch.equal(masked["a"], inputs["a"])


def test_a_nested_and_locked_tensordict_stays_as_it_is():
    inner = TensorDict({"x": data(3, 4)}, [3])
    inputs = TensorDict({"inner": inner, "n": torch.arange(3)}, [3]).lock_()
    run = partial(pgd, lambda _, i: i["inner", "x"].softmax(-1), {}, inputs, radius=0.1)
    before = inputs["inner", "x"].clone()
    one, many = run(targets=1), run(targets=[0, 1])
    assert inputs.is_locked and torch.equal(inputs["inner", "x"], before)
    CLOSE(many[1]["inner", "x"], one["inner", "x"])
    assert not torch.equal(one["inner", "x"], before) and torch.equal(one["n"], inputs["n"])


def test_at_a_site_is_the_attack_on_the_tail():
    model = classifier()
    f, params = functionalize(model)
    x = data(2, 6)
    got = pgd(f, params, x, radius=0.3, targets=[0, 1], at="1")
    assert list(got.keys()) == ["1"]
    hidden = model[:2](x).detach()
    CLOSE(got["1"], pgd(lambda _, h: model[2:](h), {}, hidden, radius=0.3, targets=[0, 1]))


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("name", METHODS)
def test_chunks_change_nothing_and_vmap_is_the_loop(name, chunk_size):
    f, params = functionalize(classifier())
    x = data(3, 6)
    run = partial(METHODS[name], f, params, targets=targets.every())
    CLOSE(run(x, chunk_size=chunk_size), run(x))
    CLOSE(vmap(run)(x), run(x).transpose(0, 1))


@pytest.mark.compile
@pytest.mark.parametrize("options", [{}, {"random_start": True, "norm": "l2"}])
def test_compiled_equals_eager(options):
    torch._dynamo.reset()
    f, params = functionalize(classifier())
    run = partial(pgd, radius=0.1, targets=[0, 1], steps=3, bounds=(-1.0, 1.0), **options)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        x = data(3, 6, seed=seed)
        torch.manual_seed(0)
        got = compiled(f, params, x)
        torch.manual_seed(0)
        CLOSE(got, run(f, params, x))


@pytest.mark.parametrize("name", METHODS)
def test_the_dtype_is_kept_and_nothing_of_the_caller_is_changed(name):
    f, params = functionalize(classifier().to(torch.bfloat16))
    x = data(1, 6).to(torch.bfloat16)
    before = x.clone()
    got = METHODS[name](f, params, x, targets=0)
    assert got.dtype == x.dtype and torch.equal(x, before) and got.data_ptr() != x.data_ptr()


# Errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"radius": -1.0}, errors.InputError, "radius is a number of at least 0, got -1.0"),
        ({"radius": float("inf")}, errors.InputError, "radius is a number"),
        ({"norm": "l1"}, errors.InputError, "norm='l1' is unknown; choose 'linf' or 'l2'"),
        ({"steps": 0}, errors.InputError, "steps is an integer of at least 1"),
        ({"step_size": "big"}, errors.InputError, "step_size is a number of at least 0, got 'big'"),
        ({"update": "adam"}, errors.InputError, "update='adam' is unknown; choose from gradient, sign, normalized"),
        ({"generator": 3}, errors.InputError, "generator is 3"),
        ({"random_start": 1}, errors.InputError, "random_start is a bool"),
        ({"targeted": "yes"}, errors.InputError, "targeted is a bool"),
        ({"loss": "nll"}, errors.InputError, "loss is a function of the output, such as cross_entropy"),
        ({"bounds": 1.0}, errors.InputError, r"bounds is a pair \(lowest, highest\)"),
        ({"bounds": (1.0, 0.0)}, errors.InputError, "lowest above its highest"),
        ({"mask": torch.ones(9)}, errors.InputError, r"mask holds .* shape \[9\], which does not broadcast"),
        ({"mask": 1.0}, errors.InputError, "mask holds 1.0"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None"),
        ({"targets": 9}, errors.TargetError, "index=9 is out of range"),
        ({"targets": []}, errors.TargetError, "targets is empty"),
        ({"targets": lambda out: out.mean(0)[:2]}, errors.InputError, "the first dimension of what moves counts the examples"),
        ({"at": "9"}, errors.SiteError, "the model has no module '9'"),
    ],
)
def test_bad_input(options, error, message):
    f, params = functionalize(classifier())
    with pytest.raises(error, match=message):
        pgd(f, params, data(3, 6), **{"radius": 0.1, "targets": 0, **options})


def test_what_is_needed():
    f, params = functionalize(classifier())
    with pytest.raises(errors.InputError, match="epsilon is a number of at least 0, got None"):
        fgsm(f, params, data(3, 6), epsilon=None, targets=0)
    with pytest.raises(errors.InputError, match="no floating-point tensor"):
        fgsm(f, params, torch.ones(3, 6).long(), epsilon=0.1, targets=0)
    with torch.no_grad(), pytest.raises(errors.GradientError, match="fgsm needs gradients"):
        fgsm(f, params, data(3, 6), epsilon=0.1, targets=0)
