"""What each transform does, alone and around others, at module sites and at operation sites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

from tdhook import capture, edit_gradient, freeze, functionalize, intervene, perturb, stop_at
from tdhook.core.errors import SiteError

from . import zoo
from .plain import assert_same, fingerprint, prepared

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
torch.manual_seed(0)
X = torch.randn(4, 4)


def add(number: float) -> Any:
    return lambda value: value + number


class Chain(nn.Module):
    """x -> a(x) = 2x -> b = a + 1 -> sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Double(), Increment(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Increment(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


chain, empty = functionalize(Chain())

# Order ---------------------------------------------------------------------------------------------------------------


def test_a_capture_outside_a_write_reads_the_written_value_and_one_inside_reads_the_value_before() -> None:
    inner = capture(chain, "a")
    g = capture(intervene(inner, {"a": add(10)}), "a")
    (output, before), after = g(empty, X)
    assert_same(before["a"], 2 * X)
    assert_same(after["a"], 2 * X + 10)
    assert_same(output, 2 * X + 11)


def test_a_function_of_an_outer_write_gets_what_the_inner_one_wrote() -> None:
    g = intervene(intervene(chain, {"a": add(10)}), {"a": lambda value: value * 3})
    assert_same(g(empty, X), (2 * X + 10) * 3 + 1)


def test_input_and_output_of_a_module_are_two_sites() -> None:
    output, values = capture(intervene(chain, {"b:in": add(10), "b": add(100)}), ["a", "b:in", "b", "c:in"])(empty, X)
    assert_same(dict(values.items()), {"a": 2 * X, "b:in": 2 * X + 10, "b": 2 * X + 111, "c:in": 2 * X + 111}, **CLOSE)
    assert_same(output, 2 * X + 111, **CLOSE)


def test_nested_perturbs_take_their_deltas_from_the_outside_in() -> None:
    g = perturb(perturb(chain, "a"), "b")
    assert_same(g(empty, X, {"b": X}, {"a": 5 * X}), 2 * X + 5 * X + 1 + X)


def test_every_transform_around_every_other_sees_the_same_model() -> None:
    transforms = {
        "capture": lambda f: capture(f, "b"),
        "intervene": lambda f: intervene(f, {"b": lambda value: value * 1}),
        "freeze": lambda f: freeze(f, "b"),
        "edit_gradient": lambda f: edit_gradient(f, {"b": torch.neg}),
    }
    for outer in transforms.values():
        for inner in transforms.values():
            output = outer(inner(chain))(empty, X)
            while isinstance(output, tuple):
                output = output[0]
            assert_same(output, 2 * X + 1)


def test_values_come_in_the_order_asked_for() -> None:
    assert list(capture(chain, ["c", "a:in", "b"])(empty, X)[1].keys()) == ["c", "a:in", "b"]


# Writes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 3.0, True])
def test_a_number_fills_the_site(number: float) -> None:
    assert_same(intervene(chain, {"a": number})(empty, X), torch.full_like(X, number) + 1)


def test_a_function_may_write_into_what_it_is_given() -> None:
    f, params = functionalize(Skip())

    def zero_first(value: Tensor) -> Tensor:
        value[:, 0] = 0
        return value

    expected = X.clone()
    expected[:, 0] = 0
    assert_same(intervene(f, {"block:in": zero_first})(params, X), X + expected)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def test_the_written_tensor_is_not_changed_by_a_model_that_goes_on_in_place() -> None:
    f, params, x = prepared(*zoo.named("in_place"))
    values = {site: torch.randn(4, 4) for site in (":in", "up", "act", "down")}
    before = fingerprint(values)
    intervene(f, values)(params, x)
    assert fingerprint(values) == before


def test_what_was_read_is_not_changed_by_what_the_model_does_later_in_place() -> None:
    f, params, x = prepared(*zoo.named("in_place"))
    linear = {name: lambda v, p=params[name]: F.linear(v, p["weight"], p["bias"]) for name in ("up", "down")}
    up = linear["up"](2 * x)
    h = (up + 2 * x).relu()
    expected = {":in": x, "up": up, "act": h, "down": linear["down"](h), ":out": linear["down"](h).relu()}
    for run in (lambda g: g(params, x), lambda g: torch.inference_mode()(g)(params, x)):
        f, _ = functionalize(zoo.named("in_place")[0]()[0])
        output, values = run(capture(f, list(expected)))
        assert_same(dict(values.items()), expected, **CLOSE)
        assert_same(output, expected[":out"], **CLOSE)
    read = lambda x: dict(capture(f, list(expected))(params, x)[1].items())  # noqa: E731
    assert_same(vmap(read)(x), expected, **CLOSE)
    assert_same(vjp(read, x)[0], expected, **CLOSE)


def test_a_capture_draws_no_more_random_numbers_than_the_model() -> None:
    f, params = functionalize(nn.Sequential(nn.Dropout(0.5), nn.ReLU(inplace=True)))
    torch.manual_seed(0)
    expected = f(params, X)
    torch.manual_seed(0)
    output, values = capture(f, "0")(params, X)
    assert_same(output, expected)
    assert_same(values["0"].relu(), expected)


def test_a_write_may_call_the_model_that_it_writes_into() -> None:
    f, params, x = prepared(*zoo.named("residual"))
    g = intervene(f, {"up": lambda value: capture(f, ["down", "/add@1"])(params, x)[1]["down"]})
    down = capture(f, "down")(params, x)[1]["down"]
    assert_same(g(params, x), intervene(f, {"up": down})(params, x))
    assert_same(capture(g, "/add@*")(params, x)[0], g(params, x))


# Gradients -----------------------------------------------------------------------------------------------------------


def test_freeze_stops_the_gradient_at_its_site_only() -> None:
    f, params, x = prepared(*zoo.named("residual"))
    found = grad(lambda x: freeze(f, "up")(params, x).sum())(x)
    with_constant = intervene(f, {"up": capture(f, "up")(params, x)[1]["up"]})
    assert_same(found, grad(lambda x: with_constant(params, x).sum())(x))


def test_freeze_stops_tangents_too() -> None:
    _, tangent = jvp(lambda x: freeze(chain, "b")(empty, x), (X,), (X,))
    assert_same(tangent, torch.zeros_like(X))


def test_an_edited_gradient_is_the_function_of_the_cotangent() -> None:
    g = edit_gradient(chain, {"a": lambda cotangent: cotangent**2 + 1})
    output, pullback = vjp(lambda x: g(empty, x), X)
    assert_same(output, 2 * X + 1)
    assert_same(pullback(X)[0], 2 * (X**2 + 1))


def test_of_two_edits_the_outer_one_meets_the_cotangent_first() -> None:
    g = edit_gradient(edit_gradient(chain, {"a": add(1)}), {"a": lambda cotangent: cotangent * 10})
    assert_same(vjp(lambda x: g(empty, x), X)[1](X)[0], 2 * (X * 10 + 1))


def test_tangents_pass_an_edit_unchanged() -> None:
    _, tangent = jvp(lambda x: edit_gradient(chain, {"a": torch.zeros_like})(empty, x), (X,), (X,))
    assert_same(tangent, 2 * X)


def test_edits_hold_under_vmap_and_for_second_derivatives() -> None:
    g = edit_gradient(chain, {"a": lambda cotangent: cotangent * 5})
    assert_same(vmap(grad(lambda x: g(empty, x).square().sum()))(X), 5 * 4 * (2 * X + 1), **CLOSE)
    _, pullback = vjp(lambda x: g(empty, x), X)
    cotangents = torch.randn(3, 4, 4)
    assert_same(vmap(pullback)(cotangents)[0], 10 * cotangents)
    second = grad(lambda x: grad(lambda x: g(empty, x).square().sum())(x).sum())(X)
    assert_same(second, torch.full_like(X, 5 * 5 * 8))  # of 5 * 4 * (2x + 1), through the site once more


@pytest.mark.compile
def test_compiled_edits_are_not_dropped_at_the_input_of_a_transform() -> None:
    g = edit_gradient(chain, {":in": lambda cotangent: cotangent * 5, "c": add(1)})
    torch._dynamo.reset()
    run = torch.compile(grad(lambda x: g(empty, x).sum()), fullgraph=True, backend="aot_eager")
    assert_same(run(X), torch.full_like(X, 20))


@pytest.mark.compile
def test_compiled_edits_hold_for_many_cotangents() -> None:
    g = edit_gradient(chain, {":in": lambda cotangent: cotangent * 5, "c": add(1)})

    def pull(x: Tensor, cotangents: Tensor) -> Tensor:
        return vmap(vjp(lambda x: g(empty, x), x)[1])(cotangents)[0]

    torch._dynamo.reset()
    cotangents = torch.randn(3, 4, 4)
    run = torch.compile(pull, fullgraph=True, backend="aot_eager")
    assert_same(run(X, cotangents), 10 * (cotangents + 1), **CLOSE)


@pytest.mark.compile
def test_compiled_numbers_are_written() -> None:
    torch._dynamo.reset()
    run = torch.compile(intervene(chain, {"a": 3, "c": 2.0}), fullgraph=True, backend="aot_eager")
    assert_same(run(empty, X), torch.full_like(X, 2))


def test_deltas_at_several_sites_get_all_gradients_in_one_backward() -> None:
    sites = [":in", "a", "b:in", "c"]
    deltas = {site: torch.zeros_like(X) for site in sites}
    found = grad(lambda d: (perturb(chain, sites)(empty, X, d) * X).sum())(deltas)
    assert_same(found, {":in": 2 * X, "a": X, "b:in": X, "c": X})


def test_deltas_may_be_a_tensordict_batched_by_vmap() -> None:
    from tensordict import TensorDict

    deltas = TensorDict({"a": torch.randn(3, 4, 4), "b": torch.randn(3, 4, 4)}, [3])
    found = vmap(lambda d: perturb(chain, ["a", "b"])(empty, X, d))(deltas)
    assert_same(found, 2 * X + 1 + deltas["a"] + deltas["b"], **CLOSE)


# Stopping ------------------------------------------------------------------------------------------------------------


class Bomb(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("ran")


class Armed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bomb = Double(), Increment(), Bomb()

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = F.relu(self.b(self.a(x)))
        except Exception:
            return x
        return self.bomb(x)


armed, _ = functionalize(Armed())


def test_nothing_after_the_last_site_runs() -> None:
    assert_same(stop_at(armed, "b")(empty, X), 2 * X + 1)
    assert_same(stop_at(armed, "bomb:in")(empty, X), (2 * X + 1).relu())
    assert_same(stop_at(armed, "/relu")(empty, X), (2 * X + 1).relu())
    assert_same(dict(stop_at(armed, ["b", "a"])(empty, X).items()), {"b": 2 * X + 1, "a": 2 * X})


def test_a_capture_inside_a_head_reads_nothing_but_lets_it_stop() -> None:
    assert_same(stop_at(capture(armed, "a"), "b")(empty, X), 2 * X + 1)


def test_a_capture_around_a_head_reads_what_runs_before_the_stop() -> None:
    value, read = capture(stop_at(armed, "b"), "a")(empty, X)
    assert_same(value, 2 * X + 1)
    assert_same(read["a"], 2 * X)


def test_a_capture_around_a_head_of_what_comes_after_the_stop_is_an_error() -> None:
    with pytest.raises(SiteError, match="'bomb' was not reached"):
        capture(stop_at(armed, "b"), "bomb")(empty, X)


def test_of_two_heads_the_earlier_one_ends_the_run() -> None:
    assert_same(stop_at(stop_at(armed, "b"), "a")(empty, X), 2 * X)
    with pytest.raises(SiteError, match="'b' was not reached"):
        stop_at(stop_at(armed, "a"), "b")(empty, X)


def test_a_head_inside_a_write_stops_itself_and_nothing_else() -> None:
    g = intervene(chain, {"a": lambda value: value + stop_at(chain, "b")(empty, X)})
    assert_same(g(empty, X), 2 * X + 2 * X + 1 + 1)
    assert_same(stop_at(g, "b")(empty, X), 4 * X + 2)


def test_a_head_has_gradients_and_can_be_written_and_batched() -> None:
    g = stop_at(intervene(armed, {"a": lambda value: value * 3}), "b")
    assert_same(vmap(grad(lambda x: g(empty, x).sum()))(X), torch.full_like(X, 6))


@pytest.mark.compile
def test_a_compiled_head_equals_the_eager_one() -> None:
    f, params, x = prepared(*zoo.named("mlp"))
    torch._dynamo.reset()
    run = torch.compile(stop_at(f, "layers.1"), fullgraph=True, backend="aot_eager")
    assert_same(run(params, x), stop_at(f, "layers.1")(params, x), **CLOSE)


# Operations ----------------------------------------------------------------------------------------------------------


def residual(params: Any, x: Tensor, relu: Any = F.relu, probabilities: Any = lambda v: v, sum_: Any = lambda v: v) -> Any:
    """`zoo.Residual` written out, with what to do at its operations."""
    linear = {name: lambda v, p=params[name]: F.linear(v, p["weight"], p["bias"]) for name in ("up", "down")}
    h = sum_(x + relu(linear["up"](x)))
    return h + probabilities(linear["down"](h).softmax(-1))


def test_operations_are_read_by_name_and_call() -> None:
    f, params, x = prepared(*zoo.named("residual"))
    output, values = capture(f, ["/relu", "/add@0", "/softmax:in", "/softmax", "/add@1", "up/linear"])(params, x)
    up = F.linear(x, params["up", "weight"], params["up", "bias"])
    assert_same(values["up/linear"], up)
    assert_same(values["/relu"], up.relu())
    assert_same(values["/add@0"], x + up.relu())
    assert_same(values["/softmax"], values["/softmax:in"].softmax(-1))
    assert_same(values["/add@1"], output)
    assert_same(output, residual(params, x), **CLOSE)


def test_operations_are_written() -> None:
    f, params, x = prepared(*zoo.named("residual"))
    g = intervene(f, {"/relu": torch.neg, "/softmax": 0.25, "/add@0": add(1)})
    written = residual(params, x, lambda v: -v.relu(), lambda v: torch.full_like(v, 0.25), add(1))
    assert_same(g(params, x), written, **CLOSE)


def test_operations_are_perturbed_and_frozen() -> None:
    f, params, x = prepared(*zoo.named("residual"))
    delta = {"/softmax": torch.zeros_like(x), "/relu": torch.zeros_like(x)}
    weight = torch.randn_like(x)
    found = grad(lambda d: (perturb(f, list(delta))(params, x, d) * weight).sum())(delta)
    assert_same(found["/softmax"], weight)
    by_hand = grad(lambda d: (residual(params, x, lambda v: v.relu() + d) * weight).sum())(torch.zeros_like(x))
    assert_same(found["/relu"], by_hand, **CLOSE)
    frozen = grad(lambda x: (freeze(f, "/softmax")(params, x) * weight).sum())(x)
    assert_same(frozen, grad(lambda x: (residual(params, x, probabilities=Tensor.detach) * weight).sum())(x), **CLOSE)
    edited = grad(lambda x: (edit_gradient(f, {"/softmax": torch.zeros_like})(params, x) * weight).sum())(x)
    assert_same(edited, frozen, **CLOSE)


@pytest.mark.compile
def test_operations_are_read_and_written_under_vmap_and_compile() -> None:
    f, params, x = prepared(*zoo.named("residual"))
    g = capture(intervene(f, {"/relu": torch.neg}), ["/softmax", "/relu:in"])
    expected, values = g(params, x)
    for run in (vmap(g, (None, 0)), torch.compile(g, fullgraph=True, backend="aot_eager")):
        output, read = run(params, x)
        assert_same(output, expected, **CLOSE)
        assert_same(dict(read.items()), dict(values.items()), **CLOSE)


def test_attention_is_an_operation_with_arguments() -> None:
    f, params, x = prepared(*zoo.named("attention"))
    op = "/scaled_dot_product_attention"
    _, values = capture(f, [f"{op}:in[0]", f"{op}:in[1]", f"{op}:in[2]", op])(params, x)
    q, k, v, out = values.values()
    assert_same(out, (q @ k.mT / 2).softmax(-1) @ v, **CLOSE)
    zeroed = intervene(f, {f"{op}:in[0]": 0.0})(params, x)
    mean = v.mean(-2, keepdim=True).expand_as(v).transpose(-2, -3).flatten(-2)
    assert_same(zeroed, F.linear(mean, params["out", "weight"], params["out", "bias"]), **CLOSE)


class InPlaceOperations(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 1
        alias = h
        h += 1
        h.relu_()
        h = F.relu(h, inplace=True)
        torch.neg_(h)
        return alias + 0 * h


def test_operations_in_place_have_the_name_of_the_operation_and_are_written_in_place() -> None:
    f, params = functionalize(InPlaceOperations())
    _, values = capture(f, "/*")(params, X)
    assert list(values.keys()) == ["/mul@0", "/add@0", "/relu@0", "/relu@1", "/neg", "/mul@1", "/add@1"]
    h = (X + 1).relu()
    for site, value in zip(values.keys(), [X, X + 1, h, h, -h, -h * 0, -h]):
        assert_same(values[site], value, **CLOSE)
    assert_same(intervene(f, {"/add@0": add(1)})(params, X), -(X + 2).relu(), **CLOSE)
    assert_same(intervene(f, {"/relu@0": 3.0})(params, X), torch.full_like(X, -3))
    assert_same(intervene(f, {"/neg": 7.0})(params, X), torch.full_like(X, 7))
    assert_same(grad(lambda x: freeze(f, "/relu@0")(params, x).sum())(X), torch.zeros_like(X))


class Arithmetic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = 1 + x
        x = torch.add(x, 1)
        x = 2 - x
        x = torch.stack([x, x], 0)[0]
        return torch.cat([x, 1 / x], 0).max(0).values


def test_operators_and_functions_share_names() -> None:
    f, params = functionalize(Arithmetic())
    _, values = capture(f, "/*")(params, X)
    names = [name.partition("@")[0].partition(":")[0] for name in values.keys()]
    assert names == ["/add", "/add", "/rsub", "/stack", "/getitem", "/rdiv", "/cat", "/max", "/max"]
    _, values = capture(f, ["/cat:in[0][1]", "/max:out[0]"])(params, X)
    assert_same(values["/cat:in[0][1]"], 1 / -X, rtol=1e-3, atol=1e-4)
    assert_same(intervene(f, {"/max:out[0]": 1.0})(params, X), torch.ones(4))


def test_what_a_write_computes_is_no_operation_of_the_model() -> None:
    f, params, x = prepared(*zoo.named("residual"))
    g = intervene(f, {"up": lambda value: F.relu(value + value)})
    assert list(capture(g, "/add@*")(params, x)[1].keys()) == ["/add@0", "/add@1"]


# Transforms of the model's own ---------------------------------------------------------------------------------------


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.energy, self.each, self.last = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        force = grad(lambda x: self.energy(x).square().sum())(x)
        return self.last(force + vmap(self.each)(x))


def test_sites_inside_a_vmap_or_grad_of_the_model_are_written_per_example_and_cannot_be_read() -> None:
    f, params = functionalize(Inside())
    assert_same(f(params, X), 3 * X)
    g = intervene(f, {"energy": lambda v: v * 2, "each": lambda v: v / v.norm()})
    assert_same(g(params, X), 8 * X + X / X.norm(dim=-1, keepdim=True), **CLOSE)
    assert_same(capture(g, "last:in")(params, X)[1]["last:in"], g(params, X))
    for site in ("energy", "each"):
        for read in (capture(f, site), stop_at(f, site)):
            with pytest.raises(SiteError, match=f"'{site}' lies inside a vmap or grad of the model's own"):
                read(params, X)
