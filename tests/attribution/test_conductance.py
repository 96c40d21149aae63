"""Internal influence, layer and neuron conductance, and methods that explain a unit, against closed forms and captum."""

from __future__ import annotations

from functools import partial

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn
from torch.func import vmap

import tdhook
from tdhook import functionalize, targets
from tdhook.attribution.conductance import internal_influence, layer_conductance
from tdhook.attribution.integrated_gradients import integrated_gradients
from tdhook.attribution.neuron_conductance import neuron_conductance
from tdhook.attribution.saliency import saliency
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
CAPTUM = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-8)  # it casts its weights to float32
METHODS = {
    "influence": partial(internal_influence, at="1"),
    "layer": partial(layer_conductance, at="1"),
    "neuron": partial(neuron_conductance, through={"1": 2}),
}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


class ML(nn.Module):
    """captum's BasicModel_MultiLayer."""

    def __init__(self):
        super().__init__()
        self.linear0, self.linear1, self.linear2 = nn.Linear(3, 3, bias=False), nn.Linear(3, 4), nn.Linear(4, 2)
        self.relu = nn.ReLU()
        weights = (torch.eye(3), torch.ones(4, 3), torch.ones(2, 4))
        for layer, weight in zip((self.linear0, self.linear1, self.linear2), weights):
            layer.weight = nn.Parameter(weight)
        self.linear1.bias = nn.Parameter(torch.tensor([-10.0, 1, 1, 1]))
        self.linear2.bias = nn.Parameter(torch.tensor([-1.0, 1]))
        self.double()

    def forward(self, x):
        return self.linear2(self.relu(self.linear1(self.linear0(x))))


class MI(nn.Module):
    """captum's BasicModel_MultiLayer_MultiInput."""

    def __init__(self):
        super().__init__()
        self.model = ML()

    def forward(self, a, b, c, scale: int):
        return self.model(scale * (a + b + c))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 5)).double()


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.Flatten(-3), nn.Linear(27, 4)).double()


def data(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape).double(), torch.randn(*shape).double()


X100 = tensor([0.0, 100.0, 0.0])


# captum's numbers ------------------------------------------------------------------------------------------------------


def test_internal_influence_of_a_layer():
    """captum's II1; the kink at alpha = 0.1 lies between two cells of ten."""
    f, params = functionalize(ML())
    got = internal_influence(f, params, X100, at="linear0", targets=0, steps=10, quadrature="midpoint")
    CLOSE(got["linear0"], tensor([3.9, 3.9, 3.9]))


def test_layer_conductance_of_a_layer():
    """captum's LC1."""
    f, params = functionalize(ML())
    got = layer_conductance(f, params, X100, at=["linear1", "linear0"], targets=0, steps=10, quadrature="midpoint")
    assert list(got.keys()) == ["linear1", "linear0"]
    CLOSE(got["linear1"], tensor([90.0, 100, 100, 100]))
    CLOSE(got["linear0"], tensor([0.0, 390, 0]))


def test_neuron_conductance_of_a_unit():
    """captum's NC1."""
    f, params = functionalize(ML())
    got = neuron_conductance(f, params, X100, through={"linear1": 0}, targets=0, steps=10, quadrature="midpoint")
    CLOSE(got, tensor([0.0, 90, 0]))


def test_integrated_gradients_of_a_unit():
    """captum's NI1 and NI2: `stop_at` makes a unit the output. The exact 3.96667 where captum has an error of quadrature."""
    f, params = functionalize(ML())
    run = partial(integrated_gradients, steps=300, quadrature="midpoint", targets=0)
    unit = tdhook.stop_at(f, "linear2")
    CLOSE(run(unit, params, X100), tensor([0.0, 390, 0]), rtol=1e-9)
    CLOSE(run(unit, params, tensor([100.0] * 3), multiply_by_inputs=False), tensor([119 / 30] * 3), rtol=1e-9)
    relu = tdhook.stop_at(f, "relu")
    CLOSE(run(relu, params, tensor([0.0, 6, 14])), tensor([0.0, 3, 7]), rtol=1e-9)


def test_the_gradient_of_a_unit_over_several_inputs():
    """captum's NG1."""
    f, params = functionalize(MI(), scale=3)
    inputs = (X100, X100.clone(), X100.clone())
    for got in saliency(tdhook.stop_at(f, "model.linear2"), params, inputs, targets=0, absolute=False):
        CLOSE(got, tensor([12.0, 12, 12]))


def test_a_layer_with_two_outputs():
    """captum's LI1."""

    class Twice(nn.Module):
        def forward(self, a, b):
            return F.relu(a), F.relu(b)

    class Multi(ML):
        def __init__(self):
            super().__init__()
            self.multi_relu = Twice()

        def forward(self, x):
            h = self.linear1(self.linear0(x))
            return self.linear2(sum(self.multi_relu(h, h)))

    f, params = functionalize(Multi())
    sites = ["multi_relu:out[0]", "multi_relu:out[1]"]
    for got in integrated_gradients(f, params, X100, targets=0, at=sites, steps=1).values():
        CLOSE(got, tensor([90.0, 100, 100, 100]))


# captum ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_internal_influence_equals_captum(layer, batch):
    model = mlp()
    f, params = functionalize(model)
    x, baseline = data(batch, 6)
    got = internal_influence(f, params, x, at=str(layer), targets=[0, 3], baselines=baseline)[str(layer)]
    for row, target in zip(got, (0, 3)):
        CAPTUM(row, captum.attr.InternalInfluence(model, model[layer]).attribute(x, baseline, target=target))


@pytest.mark.parametrize("layer", [0, 1])
def test_layer_conductance_is_the_limit_of_captums(layer):
    """Its differences between path points have an error of order 1 / steps: twice the steps, half the distance."""
    model = cnn()
    f, params = functionalize(model)
    x, baseline = data(2, 2, 5, 5)
    got = layer_conductance(f, params, x, at=str(layer), targets=[0, 3], baselines=baseline)[str(layer)]
    reference = captum.attr.LayerConductance(model, model[layer])
    off = []
    for steps in (200, 400):
        values = [reference.attribute(x, baseline, target=t, n_steps=steps, method="riemann_left").detach() for t in (0, 3)]
        off.append((got - torch.stack(values)).abs().max())
    assert off[1] < 2e-3 and 1.8 < off[0] / off[1] < 2.2


@pytest.mark.parametrize("unit", [2, (2,), (slice(2, 3),)])
def test_neuron_conductance_equals_captum(unit):
    model = mlp()
    f, params = functionalize(model)
    x, baseline = data(3, 6)
    got = neuron_conductance(f, params, x, through={"1": unit}, targets=[0, 3], baselines=baseline)
    reference = captum.attr.NeuronConductance(model, model[1])
    for row, target in zip(got, (0, 3)):
        CAPTUM(row, reference.attribute(x, unit, baseline, target=target, method="gausslegendre"))


def test_of_several_units_is_the_sum_of_theirs():
    """captum multiplies the sum of dF/dA by the sum of dA/dx for a slice, which also pairs different units."""
    model = mlp()
    f, params = functionalize(model)
    x, baseline = data(3, 6)
    got = neuron_conductance(f, params, x, through={"1": slice(1, 3)}, targets=0, baselines=baseline)
    each = partial(captum.attr.NeuronConductance(model, model[1]).attribute, x, baselines=baseline, target=0)
    CAPTUM(got, sum(each(neuron_selector=j, method="gausslegendre") for j in (1, 2)))
    assert (got - each(neuron_selector=(slice(1, 3),), method="gausslegendre")).abs().max() > 0.01


def test_a_unit_of_feature_maps_equals_captum():
    model = cnn()
    f, params = functionalize(model)
    x, baseline = data(2, 2, 5, 5)
    got = neuron_conductance(f, params, x, through={"0": (1, 2, 0)}, targets=3, baselines=baseline)
    reference = captum.attr.NeuronConductance(model, model[0])
    CAPTUM(got, reference.attribute(x, (1, 2, 0), baseline, target=3, method="gausslegendre"))


# Laws ------------------------------------------------------------------------------------------------------------------


def test_layer_conductance_is_complete_at_every_layer_that_cuts_the_graph():
    f, params = functionalize(mlp())
    x, baseline = data(3, 6)
    got = layer_conductance(f, params, x, at=["0", "1", "2", "3", "4:in"], targets=targets.every(), baselines=baseline)
    for value in got.values():
        CLOSE(value.sum(-1).T, f(params, x) - f(params, baseline), rtol=1e-9)


def test_layer_conductance_at_the_input_is_integrated_gradients():
    f, params = functionalize(mlp())
    x, baseline = data(3, 6)
    options = {"targets": [1, 2], "baselines": baseline}
    CLOSE(layer_conductance(f, params, x, at="0:in", **options)["0:in"], integrated_gradients(f, params, x, **options))


def test_neuron_conductances_of_a_layer_add_up():
    """Over the units to integrated gradients; over the inputs to layer conductance."""
    f, params = functionalize(mlp())
    x, baseline = data(3, 6)
    options = {"targets": [1, 2], "baselines": baseline}
    run = partial(neuron_conductance, f, params, x, **options)
    each = torch.stack([run(through={"1": j}) for j in range(8)])
    CLOSE(each.sum(0), integrated_gradients(f, params, x, **options))
    CLOSE(each.sum(-1).movedim(0, -1), layer_conductance(f, params, x, at="1", **options)["1"])
    CLOSE(run(through={"1": slice(None)}), each.sum(0))
    CLOSE(run(through={"1": torch.arange(8) < 3}), each[:3].sum(0))
    CLOSE(run(through={"1": torch.arange(8) / 4}), (each * (torch.arange(8) / 4)[:, None, None, None]).sum(0))


def test_branches_are_explained_apart_and_add_up():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
            self.double()

        def forward(self, x):
            return self.out(self.a(x).tanh() * self.b(x))

    f, params = functionalize(Branches())
    x, baseline = data(5, 3)
    options = {"targets": 0, "baselines": baseline}
    got = layer_conductance(f, params, x, at=["b", "a"], **options)
    CLOSE(got["a"], layer_conductance(f, params, x, at="a", **options)["a"])
    CLOSE(got["a"].sum(1) + got["b"].sum(1), (f(params, x) - f(params, baseline))[:, 0], rtol=1e-9)
    whole = {"a": slice(None), "b": slice(None)}
    CLOSE(neuron_conductance(f, params, x, through=whole, **options), integrated_gradients(f, params, x, **options))


def test_several_inputs_and_structures():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = nn.Identity()

        def forward(self, a, b, n):
            return self.product(a * b).sum(-1) * n

    f, params = functionalize(Product())
    a, b = data(3, 4)
    n = torch.tensor([1, 2, 3])
    inputs = {"a": a, "b": b, "n": n}
    CLOSE(layer_conductance(f, params, inputs, at="product")["product"], a * b * n[:, None])
    mean = internal_influence(f, params, (a, b, n), at="product")["product"]
    CLOSE(mean, n[:, None].expand(3, 4).double())
    got = neuron_conductance(f, params, inputs, through={"product": 1})
    assert got["n"] is None and got["a"][:, [0, 2, 3]].abs().max() == 0
    CLOSE(got["b"][:, 1], (a * b)[:, 1] * n / 2)
    packed = neuron_conductance(f, params, TensorDict(inputs, [3]), through={"product": 1}, targets=[lambda out: out] * 2)
    assert packed.batch_size == (2, 3)
    CLOSE(packed["a"][1], got["a"])


def test_along_the_embedding_of_token_ids():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Tanh(), nn.Flatten(-2), nn.Linear(15, 2)).double()
    f, params = functionalize(model)
    ids, others = torch.tensor([[1, 4, 7]]), torch.tensor([[0, 0, 0]])
    options = {"along": "0", "baselines": others, "targets": [1, 0], "steps": 20}
    got = layer_conductance(f, params, ids, at="2", **options)["2"]
    CLOSE(got.sum((-1, -2))[:, 0], (f(params, ids) - f(params, others))[0, [1, 0]], rtol=1e-9)
    each = neuron_conductance(f, params, ids, through={"2": slice(None)}, **options)
    at_site = {"targets": [1, 0], "baselines": others, "steps": 20, "at": "0"}
    CLOSE(each["0"], integrated_gradients(f, params, ids, **at_site)["0"])
    by_site = internal_influence(f, params, ids, at="2", targets=1, along="0", baselines={"0": 0.0})
    assert by_site["2"].shape == (1, 3, 5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for fused attention on CPUs
def test_layer_conductance_through_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 2)
            self.double()

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])[:, -1]

    f, params = functionalize(Attention())
    x, baseline = data(2, 3, 4)
    got = layer_conductance(f, params, x, at=["out:in", "qkv"], targets=1, baselines=baseline)
    for value in got.values():
        CLOSE(value.sum((1, 2)), (f(params, x) - f(params, baseline))[:, 1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 1000])
@pytest.mark.parametrize("name", METHODS)
def test_chunks_change_nothing(name, chunk_size):
    f, params = functionalize(mlp())
    x, baseline = data(3, 6)
    run = partial(METHODS[name], f, params, x, targets=[0, 4, 2], baselines=baseline, steps=5)
    for a, b in zip(flat(run(chunk_size=chunk_size)), flat(run())):
        CLOSE(a, b)


@pytest.mark.parametrize("name", METHODS)
def test_under_vmap_over_examples_and_models(name):
    models = [functionalize(mlp()), functionalize(cnn())][:1]
    f, params = models[0]
    x, baseline = data(3, 6)

    def run(params, x, baseline):
        (got,) = flat(METHODS[name](f, params, x, targets=[0, 1], baselines=baseline, steps=4))
        return got

    whole = run(params, x, baseline)
    CLOSE(vmap(partial(run, params))(x, baseline), whole.transpose(0, 1))
    both = vmap(lambda p: run(p, x, baseline))(torch.stack([params, params * 2]))
    CLOSE(both[0], whole)
    CLOSE(both[1], run(params * 2, x, baseline))


@pytest.mark.compile
@pytest.mark.parametrize("name", METHODS)
def test_compiled_equals_eager(name):
    torch._dynamo.reset()
    f, params = functionalize(mlp())
    x, baseline = data(3, 6)

    def run(f, params, x, baseline):
        return METHODS[name](f, params, x, targets=[0, 1], baselines=baseline, steps=4, chunk_size=3)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for shift in range(2):
        for a, b in zip(flat(compiled(f, params, x + shift, baseline)), flat(run(f, params, x + shift, baseline))):
            CLOSE(a, b)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", METHODS)
def test_the_dtype_of_the_data_is_kept(name, dtype, tolerance):
    f, params = functionalize(mlp())
    x, _ = data(1, 6)
    (truth,) = flat(METHODS[name](f, params, x, targets=0, steps=4))
    f, params = functionalize(mlp().to(dtype))
    (got,) = flat(METHODS[name](f, params, x.to(dtype), targets=0, steps=4))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_of_the_caller_is_changed(name):
    f, params = functionalize(mlp())
    x, baseline = data(3, 6)
    before = [t.clone() for t in (x, baseline)]
    state = torch.get_rng_state()
    METHODS[name](f, params, x, targets=0, baselines=baseline, steps=2)
    assert torch.equal(x, before[0]) and torch.equal(baseline, before[1]) and torch.equal(torch.get_rng_state(), state)


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else list(result.values())


# Errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, errors.InputError, "steps is an integer of at least 1"),
        ({"quadrature": "simpson"}, errors.InputError, "quadrature='simpson' is unknown"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None"),
        ({"baselines": torch.ones(4, 9).double()}, errors.InputError, "which does not broadcast"),
        ({"targets": 7}, errors.TargetError, "index=7 is out of range"),
        ({"targets": "0"}, errors.TargetError, "targets is None, an int"),
        ({"along": "9"}, errors.SiteError, "the model has no module '9'"),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_bad_input(name, options, error, message):
    f, params = functionalize(mlp())
    with pytest.raises(error, match=message):
        METHODS[name](f, params, data(3, 6)[0], **{"targets": 0, **options})


@pytest.mark.parametrize(
    ("through", "error", "message"),
    [
        ({}, errors.InputError, "through is a mapping from sites to units"),
        ("1", errors.InputError, "through is a mapping from sites to units, got '1'"),
        ({"1": 8}, errors.InputError, r"through\['1'\] is 8 .* does not fit a float64 tensor of shape \[3, 8\]"),
        ({"1": (0, 0, 0)}, errors.InputError, "does not fit"),
        ({"1": ()}, errors.InputError, "give an int, a slice, a tuple of them, or a mask"),
        ({"1": "first"}, errors.InputError, "is 'first' of type str; give an int"),
        ({"1": True}, errors.InputError, "give an int"),
        ({"1": torch.ones(7)}, errors.InputError, r"shape \[7\], which does not fit"),
        ({"*": 0}, errors.SiteError, r"through takes exact sites, got the pattern '\*'"),
    ],
)
def test_units_that_do_not_fit_are_refused(through, error, message):
    f, params = functionalize(mlp())
    with pytest.raises(error, match=message):
        neuron_conductance(f, params, data(3, 6)[0], through=through, targets=0)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_needed(name):
    f, params = functionalize(mlp())
    x = data(3, 6)[0]
    with pytest.raises(errors.InputError, match=r"int64 tensor .* for token ids pass along=<site of the embedding>"):
        METHODS[name](f, params, x.long(), targets=0)
    with torch.no_grad(), pytest.raises(errors.GradientError, match="needs gradients, but grad mode is off"):
        METHODS[name](f, params, x, targets=0)
    with pytest.raises(errors.ModelError, match="has no sites"):
        METHODS[name](lambda params, x: x.sum(-1), {}, x)
    stochastic, params = functionalize(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).train())
    with pytest.warns(errors.TdhookWarning, match="the model is in train mode"):
        METHODS[name](stochastic, params, x.float(), targets=0, steps=2)
