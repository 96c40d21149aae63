"""Subspaces, interchange interventions, and patching of subspaces."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from tdhook import capture, functionalize, intervene
from tdhook.core import errors
from tdhook.latent.activation_patching import activation_patching
from tdhook.latent.subspaces import Subspace, interchange, projection, span

from .families import model, named
from .hooks import hooked, put, values_of

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
BASE, SOURCE = torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 20, 30]])


def directions(k, d=32, seed=0):
    return torch.randn(k, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def other(inputs):
    ids = inputs["input_ids"].clone()
    ids[:, 2] = (ids[:, 2] + 1) % 50
    return {"input_ids": ids}


def metric(output):
    return output.logits[:, -1, 3] - output.logits[:, -1, 5]


# Subspaces -------------------------------------------------------------------------------------------------------------


def test_a_span_does_not_depend_on_its_basis():
    rows = directions(4)
    a, b = span(rows), span(directions(4, 4, 1) @ rows)
    x = directions(5, seed=2)
    CLOSE(a.project(x), b.project(x))
    CLOSE(a.project(a.project(x)), a.project(x))
    CLOSE(a.project(x) @ a.complement.project(x).T, torch.zeros(5, 5).double(), atol=1e-9)
    CLOSE(a.project(rows), rows)
    assert a.complement.complement.project(x).equal(a.project(x))


def test_rotated_dimensions_are_a_span():
    """DAS: swapping the first k dimensions of rotated values, and rotating back."""
    rotation = torch.linalg.qr(directions(3, 3)).Q
    base, source = BASE.double(), SOURCE.double()
    rotated = base @ rotation
    rotated[:, :2] = (source @ rotation)[:, :2]
    CLOSE(span(rotation[:, :2].T).exchange(base, source), rotated @ rotation.T)


def test_an_oblique_projection():
    matrix = torch.tensor([[1.0, 0], [1.0, 0]]).double()
    space = projection(matrix)
    CLOSE(space.exchange(torch.zeros(2).double(), torch.tensor([3.0, 4]).double()), torch.tensor([7.0, 0]).double())
    CLOSE(space.complement.project(torch.tensor([3.0, 4]).double()), torch.tensor([-4.0, 4]).double())
    rows = directions(2, 5)
    x = directions(4, 5, 1)
    CLOSE(projection(rows.T @ torch.linalg.inv(rows @ rows.T) @ rows).project(x), span(rows).project(x))


def test_a_span_has_derivatives():
    """Moving along the span itself changes nothing."""
    rows, x, y = directions(2, 4), directions(1, 4, 1)[0], directions(1, 4, 2)[0]
    slope = grad(lambda r: span(r).exchange(x, y).square().sum() + span(r).exchange(x, y) @ y)(rows)
    assert slope.abs().max() > 1e-3
    CLOSE(slope @ rows.T, torch.zeros(2, 2).double(), atol=1e-8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: span([1.0]), "directions is a list"),
        (lambda: span(torch.ones(2, 2, 2)), "directions is a float32 tensor"),
        (lambda: span(torch.ones(3, 2)), "more directions than dimensions; they are the rows"),
        (lambda: span(torch.ones(2, 3)), "depend on each other"),
        (lambda: span(torch.zeros(3)), "depend on each other"),
        (lambda: span(torch.tensor([1.0, torch.nan])), "directions holds NaN"),
        (lambda: projection(torch.ones(2, 3)), "directions .K, D. go to span"),
        (lambda: projection(2 * torch.eye(2)), "matrix is no projection"),
    ],
)
def test_bad_subspaces(make, message):
    with pytest.raises(errors.InputError, match=message):
        make()


# Interchange -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_interchange_equals_a_hook(name):
    f, params, inputs, found = named(name)
    source = other(inputs)
    site, rows = found.mlp[0], directions(3)
    path = site.split(":")[0]
    there = values_of(model(name), source, [path])[path]
    projector = rows.T @ torch.linalg.inv(rows @ rows.T) @ rows

    def write(value):
        value[:, 2:4] = value[:, 2:4] + (there[:, 2:4] - value[:, 2:4]) @ projector
        return value

    got = interchange(f, params, inputs, source, subspaces={site: rows}, axis=1, positions=[2, 3])
    expected = hooked(model(name), inputs, {path: write})[0].logits
    CLOSE(got.logits, expected)
    assert (expected - f(params, inputs).logits).abs().max() > 1e-6


def test_full_space_is_patching_and_the_empty_one_changes_nothing():
    f, params, inputs, _ = named("gpt2")
    source, site = other(inputs), "transformer.h.0"
    patched = activation_patching(f, params, source, inputs, metric, sites=site, axis=None).patched[0]
    for space in (
        directions(32),
        torch.eye(32).double(),
        None,
        projection(torch.eye(32).double()),
        span(directions(0)).complement,
    ):
        CLOSE(metric(interchange(f, params, inputs, source, subspaces={site: space})), patched)
    nothing = interchange(f, params, inputs, source, subspaces={site: directions(0)})
    assert nothing.logits.equal(f(params, inputs).logits)
    whole = interchange(f, params, inputs, source, subspaces={site: span(directions(32)).complement})
    CLOSE(whole.logits, f(params, inputs).logits)


def test_a_subspace_and_its_complement_compose_to_the_whole():
    f, params, inputs, found = named("llama")
    source, space = other(inputs), span(directions(5))
    site = found.residual_post[0]
    # the two parts at one site: written one after the other, by an inner and an outer write
    value = capture(f, site)(params, source)[1][site]
    inner = intervene(f, {site: lambda there: space.exchange(there, value)})
    outer = intervene(inner, {site: lambda there: space.complement.exchange(there, value)})
    CLOSE(outer(params, inputs).logits, interchange(f, params, inputs, source, subspaces={site: None}).logits)


def test_each_site_has_a_source_of_its_own_and_sees_what_came_before():
    f, params, inputs, found = named("gpt2")
    a, b = other(inputs), {"input_ids": (inputs["input_ids"] + 7) % 50}
    heads, mlp = found.head_output[0], found.mlp[1]
    plane = directions(2)
    va = values_of(model("gpt2"), a, ["transformer.h.0.attn.c_proj:in"])["transformer.h.0.attn.c_proj:in"]
    vb = values_of(model("gpt2"), b, ["transformer.h.1.mlp"])["transformer.h.1.mlp"]
    edits = {
        "transformer.h.0.attn.c_proj:in": put(..., slice(None), new=va),
        "transformer.h.1.mlp": lambda there: span(plane).exchange(there, vb),
    }
    got = interchange(f, params, inputs, [a, b], subspaces={heads: None, mlp: plane})
    CLOSE(got.logits, hooked(model("gpt2"), inputs, edits)[0].logits)


def test_a_subspace_of_one_head():
    f, params, inputs, found = named("llama")
    source, rows = other(inputs), directions(2, 8)
    got = interchange(f, params, inputs, source, subspaces={found.head_output[1]: rows}, axis=-2, positions=[3])
    path = "model.layers.1.self_attn.o_proj:in"
    there = values_of(model("llama"), source, [path])[path][..., 24:]

    def write(value):
        value[..., 24:] = span(rows).exchange(value[..., 24:], there)
        return value

    CLOSE(got.logits, hooked(model("llama"), inputs, {path: write})[0].logits)


def test_patching_of_subspaces_is_interchange_place_by_place():
    f, params, inputs, found = named("gpt2")
    source, plane = other(inputs), directions(3)
    got = activation_patching(f, params, source, inputs, metric, sites=found.mlp, subspaces=plane)
    for layer, site in enumerate(found.mlp):
        for token in (1, 2, 5):
            one = interchange(f, params, inputs, source, subspaces={site: plane}, axis=1, positions=[token])
            CLOSE(got.patched[layer, token], metric(one))
    spaces = {found.mlp[0]: plane, found.mlp[1]: None}
    mixed = activation_patching(f, params, source, inputs, metric, sites=found.mlp, subspaces=spaces)
    CLOSE(mixed.patched[0], got.patched[0])
    CLOSE(mixed.patched[1], activation_patching(f, params, source, inputs, metric, sites=found.mlp[1]).patched[0])


def test_gradients_reach_the_basis():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double())
    base, source = BASE.double() / 10, SOURCE.double() / 10
    run = lambda rows: interchange(f, params, base, source, subspaces={"1": rows}).sum()  # noqa: E731
    assert torch.autograd.gradcheck(run, (directions(2, 3).requires_grad_(),))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"subspaces": {}}, errors.InputError, "give a mapping from sites to subspaces"),
        ({"subspaces": torch.eye(3)}, errors.InputError, "give a mapping from sites to subspaces"),
        ({"subspaces": {"0": torch.ones(1, 4)}}, errors.InputError, "the subspace has 4 dimensions, the last axis at '0'"),
        ({"source": torch.ones(1, 4)}, errors.InputError, "patching needs aligned inputs"),
        ({"source": [SOURCE, SOURCE]}, errors.InputError, "source is a list of 2 inputs for 1 sites"),
        ({"subspaces": {"7": None}}, errors.SiteError, "unknown site '7'"),
        ({"positions": [0]}, errors.InputError, "give axis too"),
    ],
)
def test_bad_input(arguments, error, message):
    f, params = functionalize(nn.Sequential(nn.Identity()))
    given = {"base": BASE, "source": SOURCE, "subspaces": {"0": None}, **arguments}
    with pytest.raises(error, match=message):
        interchange(f, params, given.pop("base"), given.pop("source"), **given)


def test_subspaces_without_a_site():
    f, params = functionalize(nn.Sequential(nn.Identity()))
    with pytest.raises(errors.SiteError, match="subspaces has no '0'"):
        activation_patching(f, params, SOURCE, BASE, torch.sum, sites="0", subspaces={"1": None})


def test_a_soft_mask_of_rotated_dimensions():
    """Boundless alignment search: b + R (m * (R^T s - R^T b)); all ones is the whole, all zeros nothing."""
    rotation = torch.linalg.qr(directions(3, 3)).Q
    base, source = BASE.double(), SOURCE.double()
    mask = torch.tensor([0.9, 0.5, 0.1]).double()
    soft = Subspace(rotation * mask, rotation.T)
    CLOSE(soft.exchange(base, source), ((1 - mask) * (base @ rotation) + mask * (source @ rotation)) @ rotation.T)
    CLOSE(Subspace(rotation * torch.ones(3), rotation.T).exchange(base, source), source)
    CLOSE(Subspace(rotation * torch.zeros(3), rotation.T).exchange(base, source), base)
    f, params = functionalize(nn.Sequential(nn.Identity()))
    CLOSE(interchange(f, params, base, source, subspaces={"0": soft}), soft.exchange(base, source))


def test_standardised_principal_components():
    """Standardise, exchange the first components, undo: an oblique projection."""
    data = directions(50, 4) * torch.tensor([1.0, 3, 9, 2]).double() + 5
    mean, std = data.mean(0), data.std(0)
    axes = torch.linalg.svd((data - mean) / std)[2][:2]
    base, source = directions(1, 4, 1), directions(1, 4, 2)
    a, b = ((x - mean) / std for x in (base, source))
    expected = (a + (b - a) @ axes.T @ axes) * std + mean
    space = projection((axes.T @ axes) * std / std[:, None])
    CLOSE(space.exchange(base, source), expected)


def test_half_precision_projections_are_checked():
    """The symptom: in bfloat16 anything passed for a projection, and integers raised a TypeError of torch."""
    basis = span(directions(3, 64).float()).write
    assert projection((basis.T @ basis).bfloat16()).read.dtype == torch.bfloat16
    for matrix in (2 * torch.eye(2).bfloat16(), 1.5 * torch.eye(2).half(), torch.eye(2) + 0.01):
        with pytest.raises(errors.InputError, match="matrix is no projection"):
            projection(matrix)
    with pytest.raises(errors.InputError, match="matrix is a int64 tensor"):
        projection(torch.eye(2).long())


def test_pairs_under_vmap_with_spaces_of_their_own():
    f, params, inputs, found = named("llama")
    source, site = other(inputs)["input_ids"], found.mlp[0]
    rows = torch.stack([directions(2, seed=1), directions(2, seed=2)])

    def run(a, b, r):
        got = interchange(f, params, {"input_ids": a[None]}, {"input_ids": b[None]}, subspaces={site: r}, axis=1, positions=[2])
        return got.logits[0]

    expected = [run(*each) for each in zip(inputs["input_ids"], source, rows)]
    CLOSE(vmap(run)(inputs["input_ids"], source, rows), torch.stack(expected))


def test_places_that_differ_between_examples():
    f, params, inputs, found = named("llama")
    source, rows = {"input_ids": (inputs["input_ids"] + 7) % 50}, directions(2)
    where = torch.zeros(2, 6, dtype=torch.bool)
    where[0, 1] = where[1, 4] = where[1, 5] = True
    got = interchange(f, params, inputs, source, subspaces={found.mlp[0]: rows}, positions=where).logits
    for example, places in enumerate(([1], [4, 5])):
        pair = [{"input_ids": each["input_ids"][example : example + 1]} for each in (inputs, source)]
        one = interchange(f, params, *pair, subspaces={found.mlp[0]: rows}, axis=1, positions=places).logits
        CLOSE(got[example], one[0])
    heads = interchange(f, params, inputs, source, subspaces={found.head_output[0]: None}, positions=where).logits
    plain = interchange(f, params, inputs, source, subspaces={found.head_output[0].site: None}, positions=where).logits
    CLOSE(heads, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": torch.ones(1, 2).bool()}, "positions is a bool tensor of shape .1, 2.; '0' holds"),
        ({"positions": torch.ones(1, 3).bool(), "axis": 1}, "which says itself where; leave out axis=1"),
    ],
)
def test_bad_places(options, message):
    f, params = functionalize(nn.Sequential(nn.Identity()))
    with pytest.raises(errors.InputError, match=message):
        interchange(f, params, BASE, SOURCE, subspaces={"0": None}, **options)


def test_subspaces_by_layout_name_the_addresses():
    """The symptom: a TypeError of difflib."""
    f, params, inputs, found = named("gpt2")
    layout = found.head_output[0]
    with pytest.raises(errors.SiteError, match=r"subspaces has no 'transformer.h.0.attn.c_proj:in'"):
        activation_patching(f, params, inputs, inputs, metric, sites=layout, axis=-2, subspaces={layout: directions(2, 8)})
