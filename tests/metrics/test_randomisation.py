"""Randomisation of parameters and classes."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import scipy.stats
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import functional_call, vjp, vmap

from tdhook import functionalize
from tdhook.core import errors
from tdhook.metrics import model_parameter_randomisation, pearson, random_logit
from tdhook.metrics.reinitialisation import normal, permuted

CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
ORDERS = ("top_down", "bottom_up", "independent")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def gradient(f, params, x, targets=lambda out: out[..., 1]):
    output, pull = vjp(lambda x: targets(f(params, x)), x)
    return pull(torch.ones_like(output))[0]


def gradients(f, params, x, targets=None):
    """Plural: a leading dimension T."""
    choose = targets or (lambda out: out[..., [0, 2]])
    count = choose(f(params, x)).shape[-1]
    return torch.stack([gradient(f, params, x, lambda out, t=t: choose(out)[..., t]) for t in range(count)])


def mlp():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    return model, *functionalize(model)


def test_a_method_that_ignores_the_parameters_stays_the_same():
    _, f, params = mlp()
    for order in ORDERS:
        got = model_parameter_randomisation(f, params, draw(3, 6), lambda f, params, x: x, order=order)
        assert got.layers == (("4", "2", "0") if order == "top_down" else ("0", "2", "4"))
        CLOSE(got.similarity, torch.ones(3, 3).double())


def replaced(params, names, seed=0):
    """All tensors are drawn in the order of the parameters, whatever is used of them."""
    generator, result = seeded(seed), params.clone()
    for key in params.keys(True, True):
        new = normal("", params[key], generator)
        if key[0] in names:
            result[key] = new
    return result


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 9])
@pytest.mark.parametrize("order", ORDERS)
def test_equals_one_model_after_the_other(order, chunk_size):
    _, f, params = mlp()
    x = draw(3, 6)
    copy = params.clone()
    got = model_parameter_randomisation(f, params, x, gradient, order=order, chunk_size=chunk_size, generator=seeded())
    sets = {
        "top_down": [("4",), ("4", "2"), ("4", "2", "0")],
        "bottom_up": [("0",), ("0", "2"), ("0", "2", "4")],
        "independent": [("0",), ("2",), ("4",)],
    }[order]
    original = gradient(f, params, x)
    for row, names in zip(got.similarity, sets):
        other = gradient(f, replaced(params, names), x)
        expected = [scipy.stats.spearmanr(a.numpy(), b.numpy()).statistic for a, b in zip(original, other)]
        CLOSE(row, torch.tensor(expected, dtype=torch.float64))
    assert (params == copy).all()


def test_similarities_and_signs():
    _, f, params = mlp()
    x = draw(3, 6)
    run = partial(model_parameter_randomisation, f, params, x, order="independent")

    def flip(name, value, generator):
        return -value if name == "4.weight" else value

    last = run(gradient, initialise=flip)
    CLOSE(last.similarity, torch.tensor([[1.0], [1.0], [-1.0]]).double().expand(3, 3))
    CLOSE(run(gradient, initialise=flip, absolute=True).similarity, torch.ones(3, 3).double())
    by_name = run(gradient, similarity="pearson", generator=seeded())
    by_function = run(gradient, similarity=pearson, generator=seeded())
    assert torch.equal(by_name.similarity, by_function.similarity)


def test_layers_are_named_lowest_first_and_blocks_stand_for_what_is_inside():
    torch.manual_seed(0)

    def block():
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    f, params = functionalize(nn.Sequential(block(), block(), nn.Linear(6, 2)).double())
    x = draw(2, 6)
    run = partial(model_parameter_randomisation, f, params, x, gradient, generator=seeded())
    assert run().layers == ("2", "1.2", "1.0", "0.2", "0.0")
    got = model_parameter_randomisation(f, params, x, gradient, layers=["0", "1"], generator=seeded())
    assert got.layers == ("1", "0")
    seen = []

    def watch(f, params, x):
        return (seen.append(params.clone()), gradient(f, params, x))[1]

    model_parameter_randomisation(f, params, x, watch, layers=["0", "1"], chunk_size=1)
    changed = [{k[0] for k in params.keys(True, True) if not torch.equal(s[k], params[k])} for s in seen]
    assert changed == [set(), {"1"}, {"1", "0"}]


def test_permutations_keep_the_numbers_and_normal_draws_the_moments():
    value = draw(40, 50) * 3 + 1
    mixed = permuted("", value, seeded())
    CLOSE(mixed.flatten().sort().values, value.flatten().sort().values)
    assert not torch.equal(mixed, value)
    new = normal("", value, seeded(1))
    torch.testing.assert_close(torch.stack([new.mean(), new.std()]), torch.stack([value.mean(), value.std()]), rtol=0.1, atol=0)
    assert abs(pearson(new.flatten(), value.flatten())) < 0.1
    ones = torch.ones(5).bfloat16()
    assert torch.equal(normal("", ones, None), ones) and torch.equal(permuted("", ones, None), ones)


def test_buffers_stay():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(6), nn.Linear(6, 3)
            self.register_buffer("scale", torch.rand(6))

        def forward(self, x):
            return self.out(self.norm(x) * self.scale)

    model = Scaled().double().eval()
    f, params = functionalize(model)
    seen = []

    def watch(f, params, x):
        return (seen.append(params.clone()), gradient(f, params, x))[1]

    got = model_parameter_randomisation(
        f, params, draw(2, 6), watch, order="bottom_up", initialise=lambda n, v, g: v + 1, chunk_size=1
    )
    assert got.layers == ("norm", "out")
    for key in ("scale", ("norm", "running_mean"), ("norm", "running_var"), ("norm", "num_batches_tracked")):
        assert torch.equal(seen[-1][key], params[key])
    CLOSE(seen[-1]["norm", "weight"], params["norm", "weight"] + 1)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_plain_mappings_are_parameters_too(chunk_size):
    model, f, params = mlp()
    x = draw(3, 6)
    expected = model_parameter_randomisation(f, params, x, gradient, generator=seeded()).similarity
    flat = {name: value.detach() for name, value in model.named_parameters()}

    def plain(params, x):
        return functional_call(model, params, (x,))

    got = model_parameter_randomisation(plain, flat, x, gradient, generator=seeded(), chunk_size=chunk_size)
    assert got.layers == ("4", "2", "0")
    CLOSE(got.similarity, expected)
    nested = {"a": {"w": draw(6, 5)}, "b": {"w": draw(5, 4, seed=1), "names": "kept"}}

    def deep(params, x):
        return torch.tanh(x @ params["a"]["w"]) @ params["b"]["w"]

    got = model_parameter_randomisation(deep, nested, x, gradient, chunk_size=chunk_size)
    assert got.layers == ("b", "a") and set(nested["b"]) == {"w", "names"}


def test_parameters_of_a_single_module():
    f, params = functionalize(nn.Linear(6, 4).double())
    got = model_parameter_randomisation(f, params, draw(3, 6), gradient)
    assert got.layers == ("(root)",) and got.similarity.shape == (1, 3)


def test_plural_targets_and_structures():
    _, f, params = mlp()
    x = draw(3, 6)
    got = model_parameter_randomisation(f, params, x, gradients, batch_dims=2, generator=seeded())
    assert got.similarity.shape == (3, 2, 3)

    def one(f, params, x):
        return gradient(f, params, x, lambda out: out[:, 2])

    CLOSE(got.similarity[:, 1], model_parameter_randomisation(f, params, x, one, generator=seeded()).similarity)

    def packed(f, params, x):
        return TensorDict({"x": one(f, params, x)}, [3])

    CLOSE(got.similarity[:, 1], model_parameter_randomisation(f, params, x, packed, generator=seeded()).similarity)


def test_an_attribution_that_is_constant_is_not_a_number():
    _, f, params = mlp()
    assert model_parameter_randomisation(f, params, draw(3, 6), lambda f, p, x: 0 * x).similarity.isnan().all()


def rolled(f, params, order, x, batch_dims=1):
    """Randomisation without chance."""
    options = {"order": order, "initialise": lambda name, value, generator: value.roll(1, 0), "batch_dims": batch_dims}
    return model_parameter_randomisation(f, params, x, gradient, **options).similarity


@pytest.mark.parametrize("order", ORDERS)
def test_under_vmap_over_examples(order):
    _, f, params = mlp()
    x = draw(3, 6)
    CLOSE(vmap(partial(rolled, f, params, order, batch_dims=0), out_dims=1)(x), rolled(f, params, order, x))


@pytest.mark.compile
@pytest.mark.parametrize("order", ORDERS)
def test_compiled(order):
    torch.compiler.reset()
    _, f, params = mlp()
    x = draw(3, 6)
    run = partial(rolled, f, params, order)
    CLOSE(torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x))


def test_the_generator_decides():
    _, f, params = mlp()
    x, state = draw(3, 6), torch.get_rng_state()
    for initialise in ("normal", "permutation"):

        def run(seed, how=initialise):
            return model_parameter_randomisation(
                f, params, x, gradient, initialise=how, similarity="pearson", generator=seeded(seed)
            )

        assert torch.equal(run(0).similarity, run(0).similarity) and not torch.equal(run(0).similarity, run(1).similarity)
    random_logit(f, params, x, gradients, targets=1, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)


# Random logit ----------------------------------------------------------------------------------------------------------


def test_every_other_class_comes_and_never_the_target():
    f, params = functionalize(nn.Linear(6, 4, bias=False).double())
    seen = []

    def method(f, params, x, targets):
        seen.append(targets(torch.arange(4.0).expand(len(x), 4)))
        return gradients(f, params, x, targets)

    classes = torch.tensor([0, 3, 2])
    got = random_logit(f, params, draw(3, 6), method, targets=classes, samples=60, generator=seeded())
    chosen = seen[0].long()
    assert torch.equal(chosen[:, 0], classes)
    for row, target in zip(chosen[:, 1:].tolist(), classes.tolist()):
        assert set(row) == {0, 1, 2, 3} - {target}
        assert all(8 < row.count(c) < 35 for c in set(row))
    w = params["weight"]
    expected = torch.tensor(
        [[scipy.stats.spearmanr(w[row[0]].numpy(), w[c].numpy()).statistic for c in row[1:]] for row in chosen.tolist()],
        dtype=torch.float64,
    )
    CLOSE(got.value, expected.mean(1))
    CLOSE(got.standard_error, expected.std(1) / 60**0.5)


def test_an_attribution_that_ignores_the_class():
    _, f, params = mlp()

    def ignores(f, params, x, targets):
        return x.expand(targets(f(params, x)).shape[-1], *x.shape)

    got = random_logit(f, params, draw(3, 6), ignores, targets=-1, samples=3)
    CLOSE(got.value, torch.ones(3).double())
    assert random_logit(f, params, draw(3, 6), ignores, targets=0).standard_error.isnan().all()


@pytest.mark.compile
def test_random_logit_under_vmap_and_compiled():
    torch.compiler.reset()
    _, f, params = mlp()
    x = draw(3, 6)

    def run(x):
        return random_logit(f, params, x, gradients, targets=1, samples=2).value

    assert vmap(run, randomness="different")(x).shape == (3,)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        got = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
        torch.manual_seed(0)
        CLOSE(got, run(x))


# Bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": 3}, "method is 3"),
        ({"order": "random"}, "order is 'random' of type str; choose 'top_down'"),
        (
            {"initialise": "zeros"},
            "initialise is 'zeros' of type str; choose 'normal' or 'permutation'|'permutation' or 'normal'",
        ),
        ({"initialise": lambda n, v, g: v[0]}, "initialise returned .* for '0.weight'"),
        ({"similarity": "ssim"}, "similarity is 'ssim'"),
        ({"layers": "2"}, "layers is '2' of type str; give a sequence of names"),
        ({"layers": []}, r"layers is \[\]"),
        ({"layers": ["1"]}, "layers has '1', which holds no parameter"),
        ({"layers": ["2", "2"]}, "layers has '2' and '2', which share parameters"),
        ({"params": {"ids": torch.arange(3)}}, "holds no floating-point parameter"),
        ({"params": torch.ones(3)}, "params is a float32 tensor"),
        ({"chunk_size": 0}, "chunk_size is an integer"),
        ({"generator": 0}, "generator is 0"),
        ({"batch_dims": 5}, "batch_dims is 0, 1 or 2"),
    ],
)
def test_bad_input(options, message):
    _, _, params = mlp()
    arguments = {"f": lambda params, x: x, "params": params, "inputs": draw(2, 6), "method": lambda f, p, x: x, **options}
    with pytest.raises(errors.InputError, match=message):
        model_parameter_randomisation(**arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": 4}, errors.TargetError, "targets=4 is out of range for an output with 4 classes"),
        ({"targets": torch.tensor([0, 9])}, errors.TargetError, "targets holds class 9"),
        ({"targets": torch.tensor([0, 1, 2])}, errors.TargetError, r"targets has shape \[3\] for an output of shape \[2, 4\]"),
        ({"targets": torch.tensor([0.0, 1.0])}, errors.TargetError, "give an int or an integer tensor"),
        ({"targets": [0, 1]}, errors.TargetError, "give an int or an integer tensor"),
        ({"f": lambda params, x: x[:, :1]}, errors.TargetError, "at least two classes"),
        ({"samples": 0}, errors.InputError, "samples is an integer of at least 1"),
        ({"method": lambda f, p, x, targets: x}, errors.InputError, r"leading dimensions \[2, 6\] where \[2, 2\] are expected"),
        ({"similarity": None}, errors.InputError, "similarity is None"),
    ],
)
def test_bad_input_of_random_logit(options, error, message):
    _, f, params = mlp()
    arguments = {"f": f, "params": params, "inputs": draw(2, 6), "method": gradients, "targets": 0, **options}
    with pytest.raises(error, match=message):
        random_logit(**arguments)


def test_stacks_hold_only_what_differs():
    """Of three layers re-initialised top down, the first variant to the last differ in two."""
    from tdhook.metrics.reinitialisation import variants

    _, f, params = mlp()
    made = variants(f, params, None, "top_down", "normal", seeded())
    moving, _ = made.stacked(slice(0, 3))
    assert [tuple(m.shape) for m in moving] == [(3, 8, 6), (3, 8), (3, 7, 8), (3, 7)]
    for first, last in pairwise(range(4)):
        assert made.stacked(slice(first, last))[0] == []
