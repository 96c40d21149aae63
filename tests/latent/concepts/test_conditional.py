"""Attribution through units and directions: the same values, and a derivative that passes what was chosen only."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import grad, jvp, vmap

from tdhook import capture, edit_gradient, functionalize
from tdhook.attribution.activation_maps import grad_cam
from tdhook.attribution.integrated_gradients import integrated_gradients
from tdhook.attribution.saliency import input_x_gradient, saliency
from tdhook.core.errors import InputError, ModelError, SiteError
from tdhook.latent.concepts import ConceptVectors, tcav, through_direction, through_units

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
signed = partial(saliency, absolute=False)


def mlp(hidden: int = 5):
    torch.manual_seed(0)
    layers = nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 4), nn.Tanh(), nn.Linear(4, 2)
    return functionalize(nn.Sequential(*layers).double())


def cnn():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    return functionalize(nn.Sequential(*layers).double())


@pytest.fixture
def x():
    return torch.randn(7, 3).double()


def jacobian_at(f, params, x, site, target):
    """dF/dh [B, H] at the site and dh/dx [B, H, 3] before it."""
    after = signed(f, params, x, targets=target, at=site)[site]
    before = vmap(torch.func.jacrev(lambda one: capture(f, site)(params, one[None])[1][site][0]))(x)
    return after, before


# Closed forms ----------------------------------------------------------------------------------------------------------


def test_through_units_is_the_chain_rule_with_a_mask(x):
    f, params = mlp()
    after, before = jacobian_at(f, params, x, "1", 0)
    got = signed(through_units(f, "1", [3, 1]), params, x, targets=0)
    CLOSE(got, torch.einsum("bh,bhi->bi", after[:, [1, 3]], before[:, [1, 3]]))


def test_through_a_direction_is_the_chain_rule_with_a_projection(x):
    f, params = mlp()
    v = torch.randn(5).double()
    after, before = jacobian_at(f, params, x, "1", 1)
    got = signed(through_direction(f, "1", v), params, x, targets=1)
    CLOSE(got, torch.einsum("bh,h,k,bki->bi", after, v, v, before) / v.square().sum())


def test_through_a_direction_is_the_sensitivity_times_the_gradient_of_the_concept(x):
    f, params = mlp()
    v = nn.functional.normalize(torch.randn(5).double(), dim=0)
    sensitivity = tcav(f, params, x, "1", v, targets=0).sensitivity
    concept = grad(lambda x: (capture(f, "1")(params, x)[1]["1"] @ v).sum())(x)
    CLOSE(signed(through_direction(f, "1", v), params, x, targets=0), sensitivity[:, None] * concept)


def test_the_span_of_several_directions(x):
    f, params = mlp()
    rows = torch.randn(2, 5).double()
    basis = torch.linalg.qr(rows.T).Q
    after, before = jacobian_at(f, params, x, "1", 0)
    expected = torch.einsum("bh,hr,kr,bki->bi", after, basis, basis, before)
    for directions in (rows, torch.cat([rows, rows.sum(0, keepdim=True)])):
        CLOSE(signed(through_direction(f, "1", directions), params, x, targets=0), expected)


def test_a_unit_vector_is_a_unit(x):
    f, params = mlp()
    a, b = through_units(f, "1", 2), through_direction(f, "1", 3 * torch.eye(5)[2].double())
    CLOSE(signed(a, params, x, targets=0), signed(b, params, x, targets=0))


def test_all_units_are_the_model(x):
    f, params = mlp()
    CLOSE(signed(through_units(f, "1", range(5)), params, x, targets=0), signed(f, params, x, targets=0))
    CLOSE(signed(through_direction(f, "1", torch.eye(5).double()), params, x, targets=0), signed(f, params, x, targets=0))


def test_values_are_the_same_bit_for_bit(x):
    f, params = mlp()
    for g in (through_units(f, "1", 0), through_direction(f, "1", torch.randn(5).double())):
        assert torch.equal(g(params, x), f(params, x))
    f, params = functionalize(nn.Sequential(nn.Identity()))
    masked = torch.tensor([[1.0, -torch.inf]])
    assert torch.equal(through_direction(f, "0", torch.ones(2))(params, masked), masked)


@pytest.mark.parametrize("units", [1, -4, [1], (1,), torch.tensor(1), torch.tensor([1, 1]), torch.arange(5) == 1])
def test_spellings_of_units(units, x):
    f, params = mlp()
    expected = signed(edit_gradient(f, {"1": lambda g: g * torch.eye(5)[1].double()}), params, x, targets=0)
    CLOSE(signed(through_units(f, "1", units), params, x, targets=0), expected)


def test_channels_and_pooled_directions():
    f, params = cnn()
    x = torch.randn(2, 1, 6, 6).double()
    v = torch.eye(4)[2].double()
    expected = signed(edit_gradient(f, {"1": lambda g: g * v[:, None, None]}), params, x, targets=[0, 2])
    for g in (through_units(f, "1", 2, axis=1), through_units(f, "1", 2, axis=-3), through_direction(f, "1", v, axis=1)):
        CLOSE(signed(g, params, x, targets=[0, 2]), expected)
    whole = v[:, None, None] * torch.ones(4, 4, 4).double()
    after = signed(f, params, x, targets=0, at="1")["1"]
    along = (after * whole).sum((1, 2, 3)) / 4  # the direction of a whole map is one number for all positions
    concept = grad(lambda x: (capture(f, "1")(params, x)[1]["1"] * whole).sum() / 4)(x)
    CLOSE(signed(through_direction(f, "1", whole), params, x, targets=0), along[:, None, None, None] * concept)


def test_concept_vectors_are_directions(x):
    f, params = mlp()
    v = ConceptVectors(direction=torch.randn(5).double(), accuracy=torch.tensor(1.0), batch_size=[])
    CLOSE(
        signed(through_direction(f, "1", v), params, x, targets=0),
        signed(through_direction(f, "1", v.direction), params, x, targets=0),
    )


# With the methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [signed, input_x_gradient, integrated_gradients])
def test_units_share_the_attribution_among_them(method, x):
    f, params = mlp()
    whole = method(f, params, x, targets=[0, 1])
    parts = [method(through_units(f, "1", u), params, x, targets=[0, 1]) for u in range(5)]
    assert whole.shape == (2, 7, 3)
    CLOSE(sum(parts), whole)


@pytest.mark.parametrize("method", [signed, input_x_gradient, integrated_gradients])
def test_many_concepts_in_one_vmapped_call(method, x):
    f, params = mlp()
    directions = torch.randn(4, 5).double()
    by_unit = vmap(lambda u: method(through_units(f, "1", u), params, x, targets=[0, 1]))(torch.arange(5))
    by_set = vmap(lambda m: method(through_units(f, "1", m), params, x, targets=0))(torch.eye(5) > 0)
    by_direction = vmap(lambda v: method(through_direction(f, "1", v), params, x, targets=0))(directions)
    for u in range(5):
        CLOSE(by_unit[u], method(through_units(f, "1", u), params, x, targets=[0, 1]))
    CLOSE(by_set, by_unit[:, 0])
    for k, v in enumerate(directions):
        CLOSE(by_direction[k], method(through_direction(f, "1", v), params, x, targets=0))


def test_at_a_site_before_the_condition_and_at_the_condition(x):
    f, params = mlp()
    g = through_units(f, "3", 1)
    before = input_x_gradient(g, params, x, targets=0, at=["0", "1"])
    mask = torch.eye(4)[1].double()
    expected = input_x_gradient(edit_gradient(f, {"3": lambda c: c * mask}), params, x, targets=0, at=["0", "1"])
    for site in ("0", "1"):
        CLOSE(before[site], expected[site])
    CLOSE(signed(g, params, x, targets=0, at="3")["3"], signed(f, params, x, targets=0, at="3")["3"])


def test_conditions_at_several_sites(x):
    f, params = mlp()
    got = signed(through_units(through_units(f, "1", [0, 2]), "3", 1), params, x, targets=0)
    masks = {"1": torch.tensor([1.0, 0, 1, 0, 0]).double(), "3": torch.eye(4)[1].double()}
    edits = {site: (lambda c, m=mask: c * m) for site, mask in masks.items()}
    CLOSE(got, signed(edit_gradient(f, edits), params, x, targets=0))


def test_forward_mode_agrees_with_reverse_mode(x):
    f, params = mlp()
    g = through_direction(through_units(f, "1", [0, 2]), "3", torch.randn(4).double())
    reverse, forward = (integrated_gradients(g, params, x, targets=[0, 1], mode=m) for m in ("reverse", "forward"))
    CLOSE(forward, reverse)
    tangent = torch.randn_like(x)
    _, pushed = jvp(lambda x: g(params, x)[:, 0], (x,), (tangent,))
    CLOSE(pushed, (signed(g, params, x, targets=0) * tangent).sum(1))


def test_grad_cam_before_the_site():
    f, params = cnn()
    x = torch.randn(2, 1, 6, 6).double()
    maps = [grad_cam(through_units(f, "3", c, axis=1), params, x, at="1", targets=0, relu=False) for c in range(2)]
    whole = grad_cam(f, params, x, at="1", targets=0, relu=False)
    CLOSE(maps[0] + maps[1], whole)


def test_a_path_that_passes_the_site_by_keeps_its_gradient():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return x + self.branch(x)

    f, params = functionalize(Residual())
    got = signed(through_units(f, "branch", 0), params, torch.randn(1, 3), targets=1)
    torch.testing.assert_close(got, torch.tensor([[0.0, 1, 0]]))


def test_several_inputs_and_a_tensordict():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)
            self.join = nn.Tanh()

        def forward(self, x, y):
            return self.join(self.a(x) * self.b(y))

    f, params = functionalize(Two().double())
    inputs = TensorDict({"x": torch.randn(1, 3).double(), "y": torch.randn(1, 2).double()}, batch_size=[1])
    got = signed(through_units(f, "a", 1), params, inputs, targets=[0, 1])
    assert not got["x"][0].any() and got["x"][1].any()
    CLOSE(got["y"], signed(f, params, inputs, targets=[0, 1])["y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    f, params = mlp()
    x, v = torch.randn(3, 3), torch.randn(5)
    exact = signed(through_direction(f, "1", v.double()), params, x.double(), targets=0)
    got = signed(through_direction(f, "1", v), params.to(dtype), x.to(dtype), targets=0)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=0.1, atol=0.02)


def test_under_vmap_over_examples(x):
    f, params = mlp()
    g = through_direction(through_units(f, "1", 1, axis=-1), "3", torch.ones(4).double(), axis=-1)
    CLOSE(vmap(grad(lambda one: g(params, one)[0]))(x), signed(g, params, x, targets=0))


@pytest.mark.compile
def test_compiled(x):
    f, params = mlp()

    def run(x, units, v):
        first = vmap(lambda u: signed(through_units(f, "1", u), params, x, targets=[0, 1]))(units)
        return first, signed(through_direction(f, "1", v), params, x, targets=0)

    arguments = x, torch.arange(2), torch.randn(5).double()
    for a, b in zip(torch.compile(run, backend="aot_eager", fullgraph=True)(*arguments), run(*arguments)):
        CLOSE(a, b)


def test_nothing_of_the_caller_is_changed(x):
    f, params = mlp()
    v, kept = torch.randn(5).double(), x.clone()
    before = v.clone()
    signed(through_direction(f, "1", v), params, x, targets=0)
    assert torch.equal(v, before) and torch.equal(x, kept) and not x.requires_grad and not v.requires_grad


# Bad input -------------------------------------------------------------------------------------------------------------


def run(g):
    return g(mlp()[1], torch.randn(2, 3).double())


@pytest.mark.parametrize(
    ("units", "axis", "message"),
    [
        (5, None, r"the units \[5\] are out of range for 5 units at '1'"),
        ([0, -6], None, r"the units \[0, -6\] are out of range"),
        (torch.ones(4) > 0, None, r"the units at '1' are a mask of shape \[4\]"),
        (1.5, None, r"units is 1.5.*; give an index"),
        ([], None, r"units is .*; give an index"),
        (True, None, r"units is True.*; give an index"),
        (torch.ones(5), None, r"units is .*; give an index"),
        (torch.ones(2, 2).long(), None, r"units is .*; give an index"),
        (0, 2, "axis=2 is out of range at '1'"),
    ],
)
def test_bad_units(units, axis, message):
    f, _ = mlp()
    with pytest.raises(InputError, match=message):
        run(through_units(f, "1", units, axis=axis))


def test_maps_need_an_axis():
    f, params = cnn()
    with pytest.raises(InputError, match=r"'1' holds .*; give axis=1 for channels or axis=-1 for token features"):
        through_units(f, "1", 0)(params, torch.randn(1, 1, 6, 6).double())


@pytest.mark.parametrize(
    ("direction", "axis", "message"),
    [
        (torch.zeros(5), None, "direction is zero"),
        (torch.randn(4), None, r"direction has shape \[4\], but '1' holds .*features of an example are \[5\]"),
        (torch.randn(4), 1, r"direction has shape \[4\].*along axis 1 there are 5"),
        (torch.randn(2, 2, 5), None, r"direction has shape \[2, 2, 5\] at '1'; give one, or K"),
        ("north", None, "direction is .*; give a floating-point tensor"),
    ],
)
def test_bad_directions(direction, axis, message):
    f, _ = mlp()
    with pytest.raises(InputError, match=message):
        run(through_direction(f, "1", direction, axis=axis))


def test_bad_sites():
    f, _ = mlp()
    with pytest.raises(SiteError, match="pattern"):
        through_units(f, "*", 0)
    with pytest.raises(SiteError, match="9"):
        through_direction(f, "9", torch.ones(5))
    with pytest.raises(InputError, match=r"site is .*; give one address, and nest the calls"):
        through_units(f, ["1", "3"], 0)
    with pytest.raises(ModelError, match="has no sites"):
        through_units(lambda p, x: x, "1", 0)
