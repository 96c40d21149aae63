"""The laws of the core: what holds for every model, every site and every transform."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import tdhook
from tdhook import capture, edit_gradient, freeze, functionalize, intervene, perturb, stop_at

from . import zoo
from .plain import assert_same, hooked_values, leaves, prepared, stacked, unchanged

pytestmark = [
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning"),
]
zoo_wide = pytest.mark.parametrize("case", zoo.everything, ids=repr)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def read(case: zoo.Case) -> dict[str, Tensor]:
    f, params, inputs = prepared(case)
    return dict(capture(f, "**")(params, inputs)[1].items())


def differentiable(case: zoo.Case) -> dict[str, Tensor]:
    return {site: v for site, v in read(case).items() if v.is_floating_point() or v.is_complex()}


def loss(output: Any) -> Tensor:
    """A real scalar that depends on every float in the output."""
    floats = [t for t in leaves(output).values() if t.is_floating_point() or t.is_complex()]
    return sum((t.abs().double() ** 2 + t.real.double().cos()).sum() for t in floats)


# 1. f is the model ---------------------------------------------------------------------------------------------------


@zoo_wide
def test_f_equals_the_model(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    model, same_inputs = case()
    model.requires_grad_(False)  # as params: torch takes other kernels for weights that need a gradient
    assert_same(f(params, inputs), zoo.call(model, same_inputs), **(CLOSE if case.fused else {}))


@zoo_wide
def test_f_gives_the_same_again(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    assert_same(f(params, inputs), f(params, inputs))


@zoo_wide
def test_transforms_that_write_nothing_change_nothing(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    expected = f(params, inputs)
    assert_same(capture(f, "**")(params, inputs)[0], expected)
    assert_same(capture(f, ["**:in", "**"])(params, inputs)[0], expected)
    assert_same(freeze(f, "**")(params, inputs), expected)
    assert_same(edit_gradient(f, {"**": lambda cotangent: cotangent})(params, inputs), expected)


@zoo_wide
def test_looking_at_operations_changes_nothing(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    output, values = capture(f, "**/*")(params, inputs)
    assert len(values.keys()) > 0
    assert_same(output, f(params, inputs), **(CLOSE if case.fused else {}))


@zoo_wide
def test_the_gradient_with_respect_to_params_is_the_models(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    model, same_inputs = case()
    loss(zoo.call(model, same_inputs)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = [tuple(name.removeprefix("_orig_mod.").split(".")) for name in expected]

    def at(floats: list[Tensor]) -> Tensor:
        edited = params.copy()
        for name, value in zip(names, floats):
            edited.set(name, value)
        return loss(f(edited, inputs))

    floats = [params[name].clone().requires_grad_() for name in names]
    for found, gradient in zip(torch.autograd.grad(at(floats), floats, materialize_grads=True), expected.values()):
        assert_same(found, gradient, **CLOSE)


# 2. Writing what was read --------------------------------------------------------------------------------------------


@zoo_wide
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_writing_what_was_read_changes_nothing(case: zoo.Case, data: st.DataObject) -> None:
    f, params, inputs = prepared(case)
    sites = data.draw(st.sets(st.sampled_from(sorted(read(case))), min_size=1))
    output, values = capture(f, list(sites))(params, inputs)
    assert set(values.keys()) == sites
    assert_same(intervene(f, values)(params, inputs), output)


@zoo_wide
def test_writing_every_value_changes_nothing(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    assert_same(intervene(f, read(case))(params, inputs), f(params, inputs))


# Reading is what a hook would read -----------------------------------------------------------------------------------


@zoo_wide
def test_what_is_read_is_what_a_hook_sees(case: zoo.Case) -> None:
    if case.name in ("compiled", "hooked", "own_forward"):
        pytest.skip("a hook is not called there, or comes after another")
    model, inputs = case()
    _, expected = hooked_values(model.requires_grad_(False), inputs)
    f, params, inputs = prepared(case)
    if case.name.startswith("tensordict") or case.name == "probabilistic":
        expected = {site: value for site, value in expected.items() if site in read(case)}
    assert_same(dict(capture(f, "**")(params, inputs)[1].items()), expected, **CLOSE)


# 4. Writes -----------------------------------------------------------------------------------------------------------


@zoo_wide
def test_a_write_of_the_output_makes_every_other_write_irrelevant(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    values = read(case)
    final = {site: value for site, value in values.items() if site.startswith(":out")}
    if not final:
        pytest.skip("the model returns an object whose elements are not addressed")
    others = {site: torch.zeros_like(value) for site, value in values.items() if site not in final}
    wanted = {site: torch.ones_like(value) for site, value in final.items()}
    found = leaves(intervene(f, {**others, **wanted})(params, inputs))
    assert found.keys() == leaves(f(params, inputs)).keys()
    assert all(torch.equal(value, torch.ones_like(value)) for value in found.values())


@pytest.mark.parametrize("case", zoo.named("mlp", "cnn", "float64", "odd_keys", "batchnorm_train", "weight_norm"), ids=repr)
def test_a_later_write_makes_an_earlier_one_irrelevant(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    values = [site for site in read(case) if not site.startswith(":") and "param" not in site]
    chain = [site for site in values if site != "blocks"]
    early, late = chain[0], chain[-2]
    write = {late: torch.randn_like(read(case)[late])}
    assert_same(intervene(f, {early: 3.0, **write})(params, inputs), intervene(f, write)(params, inputs))


@zoo_wide
def test_disjoint_writes_commute(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    values = differentiable(case)
    a, b = next(iter(values)), list(values)[len(values) // 2]
    if a == b:
        pytest.skip("the model has one value only")
    write_a, write_b = {a: lambda v: v * 2}, {b: torch.ones_like(values[b])}
    one = intervene(intervene(f, write_a), write_b)(params, inputs)
    assert_same(intervene(intervene(f, write_b), write_a)(params, inputs), one)
    assert_same(intervene(f, {**write_a, **write_b})(params, inputs), one)


@zoo_wide
def test_the_outer_of_two_writes_wins(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    for site, value in list(differentiable(case).items())[:4]:
        new = torch.randn_like(value)
        inner = intervene(f, {site: 5})
        assert_same(intervene(inner, {site: new})(params, inputs), intervene(f, {site: new})(params, inputs))
        assert_same(capture(inner, site)(params, inputs)[1][site], torch.full_like(value, 5))


# 3 (half of it). The head --------------------------------------------------------------------------------------------


@zoo_wide
def test_the_head_gives_what_capture_reads(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    values = read(case)
    for site, value in values.items():
        assert_same(stop_at(f, site)(params, inputs), value)
    assert_same(dict(stop_at(f, list(values))(params, inputs).items()), values)


# 5. Gradients at sites -----------------------------------------------------------------------------------------------


@zoo_wide
def test_the_gradient_of_a_zero_delta_is_what_retain_grad_gives(case: zoo.Case) -> None:
    if case.name in ("compiled", "hooked", "own_forward"):
        pytest.skip("a hook is not called there, or comes after another")
    f, params, inputs = prepared(case)
    model, same_inputs = case()
    deltas = {site: torch.zeros_like(value) for site, value in differentiable(case).items()}
    zeros = [delta.requires_grad_() for delta in deltas.values()]
    gradients = torch.autograd.grad(loss(perturb(f, list(deltas))(params, inputs, deltas)), zeros, allow_unused=True)
    found = dict(zip(deltas, gradients))
    kept: dict[str, list[Tensor]] = {}

    def keep(site: str, value: Tensor) -> Tensor:
        # A copy of the value, because what a model overwrites in place has no gradient of its own.
        new = value.clone()
        if new.requires_grad:
            new.retain_grad()
            kept.setdefault(site, []).append(new)
        return new

    output, _ = hooked_values(model, same_inputs, keep)
    loss(output).backward()
    for site, values in kept.items():
        for i, value in enumerate(values):
            name = site if len(values) == 1 else f"{site}@{i}"
            if name in found and value.grad is not None and case.name != "in_place":
                assert_same(found[name], value.grad, **CLOSE)


def test_the_gradient_at_a_site_that_is_overwritten_in_place_is_that_of_its_own_value() -> None:
    f, params, x = prepared(*zoo.named("in_place"))
    found = grad(lambda d: perturb(f, ["up", "act", "down"])(params, x, d).sum())(
        {"up": torch.zeros(4, 4), "act": torch.zeros(4, 4), "down": torch.zeros(4, 4)}
    )
    up, down = params["up"], params["down"]
    h = (2 * x) @ up["weight"].T + up["bias"] + 2 * x
    gate = (h.relu() @ down["weight"].T + down["bias"] > 0).float()
    assert_same(found["down"], gate)
    assert_same(found["act"], gate @ down["weight"], **CLOSE)
    assert_same(found["up"], gate @ down["weight"] * (h > 0), **CLOSE)


# 6. vmap is the loop -------------------------------------------------------------------------------------------------


def one_by_one(g: Any, inputs: Any) -> Any:
    """`g` of each example, stacked."""
    if isinstance(inputs, TensorDict):
        outputs = [g(example) for example in inputs]
    else:
        flat, spec = pytree.tree_flatten(inputs)
        outputs = [g(pytree.tree_unflatten([t[i] for t in flat], spec)) for i in range(len(flat[0]))]
    return stacked(outputs)


def requires_batching(case: zoo.Case) -> None:
    if case.batched is not True:
        pytest.skip(str(case.batched))


@zoo_wide
def test_vmap_over_examples_is_the_loop(case: zoo.Case) -> None:
    requires_batching(case)
    f, params, inputs = prepared(case)

    def run(x: Any) -> Any:
        g = capture(intervene(f, {site: lambda v: v * 2 for site in list(differentiable(case))[:1]}), "**")
        output, values = g(params, x)
        return list(leaves(output).values()), dict(values.items())

    rtol = {"rtol": 2e-2, "atol": 2e-2} if case.name == "bfloat16" else CLOSE
    assert_same(vmap(run)(inputs), one_by_one(run, inputs), **rtol)


@zoo_wide
def test_vmap_over_values_to_write_is_the_loop(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    site, value = next(iter(differentiable(case).items()))
    values = torch.randn(3, *value.shape, dtype=torch.float32).to(value.dtype)
    if case.name in ("in_place", "stateful"):
        site, values = ":out", torch.randn(3, 4, leaves(f(params, inputs))[()].shape[-1])

    def run(v: Tensor) -> Any:
        return list(leaves(intervene(f, {site: v})(params, inputs)).values())

    try:
        batched = vmap(run)(values)
    except RuntimeError as error:
        if "inplace arithmetic" not in str(error) or case.name != "batchnorm_train":
            raise
        pytest.skip("torch: a batched value cannot be written into running statistics that are not batched")
    expected = stacked(list(map(run, values)))
    rtol = {"rtol": 2e-2, "atol": 2e-2} if case.name == "bfloat16" else CLOSE
    assert_same(batched, expected, **rtol)


@pytest.mark.parametrize(
    "case", zoo.named("mlp", "residual", "attention", "tied", "buffers", "weight_norm", "stateful"), ids=repr
)
def test_vmap_over_stacked_params_runs_several_models(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    other = params.apply(lambda t: t + torch.ones_like(t) / 8)
    found = vmap(lambda p: capture(f, "**")(p, inputs)[0], (0,))(torch.stack([params, other]))
    expected = torch.stack([f(params, inputs), f(other, inputs)])
    assert_same(found, expected, **CLOSE)


def test_vmap_over_cotangents_gives_the_jacobian_at_a_site() -> None:
    f, params, x = prepared(*zoo.named("mlp"))
    _, pullback = vjp(lambda d: perturb(f, "layers.1")(params, x, {"layers.1": d}).sum(0), torch.zeros(4, 4))
    (rows,) = vmap(pullback)(torch.eye(2))
    gate = (read(zoo.named("mlp")[0])["layers.1"] > 0).float()
    assert_same(rows, params["layers", "2", "weight"][:, None] * gate, **CLOSE)


# 7. Compiled is eager ------------------------------------------------------------------------------------------------


def compiled_twice(g: Any, *arguments: Any, again: Any) -> tuple[Any, Any]:
    """The results of compiled `g` for two sets of arguments; the second must not compile anew."""
    torch._dynamo.reset()
    fast = torch.compile(g, fullgraph=True, backend="aot_eager")
    first = fast(*arguments)
    with torch._dynamo.config.patch(error_on_recompile=True):
        return first, fast(*again)


def moved(inputs: Any) -> Any:
    """Other inputs of the same shapes; one tensor passed twice stays one."""
    other: dict[int, Tensor] = {}
    return pytree.tree_map(lambda t: other.setdefault(id(t), t.flip(0)), inputs)


_SLOW = {"llama", "vit"}  # seconds each, and nothing in them that the other two do not have


@pytest.mark.compile
@pytest.mark.parametrize("case", [case for case in zoo.everything if case.name not in _SLOW], ids=repr)
def test_compiled_equals_eager_and_does_not_recompile(case: zoo.Case) -> None:
    if case.compiles is not True:
        pytest.skip(str(case.compiles))
    f, params, inputs = prepared(case)
    sites = list(differentiable(case))
    g = capture(intervene(f, {sites[0]: lambda v: v * 2}), sites)
    first, second = compiled_twice(g, params, inputs, again=(params + 0, moved(inputs)))
    tolerances = {"rtol": 2e-2, "atol": 2e-2} if case.name == "bfloat16" else CLOSE
    for (output, values), x in ((first, inputs), (second, moved(inputs))):
        expected, reads = g(params, x)
        assert_same(output, expected, **tolerances)
        assert_same(dict(values.items()), dict(reads.items()), **tolerances)


@pytest.mark.compile
@pytest.mark.parametrize("case", zoo.named("mlp", "residual", "in_place", "structured", "encoder", "weight_norm"), ids=repr)
def test_compiled_gradients_at_sites_equal_eager_ones(case: zoo.Case) -> None:
    f, params, inputs = prepared(case)
    deltas = {site: torch.zeros_like(value) for site, value in differentiable(case).items()}
    sites = list(deltas)

    def gradients(p: Any, x: Any, d: Any) -> Any:
        g = edit_gradient(perturb(f, sites), {sites[-1]: lambda cotangent: cotangent * 3})
        return grad(lambda d: loss(g(p, x, d)))(d)

    first, second = compiled_twice(
        gradients, params, inputs, deltas, again=(params, moved(inputs), {s: d + 0.1 for s, d in deltas.items()})
    )
    assert_same(first, gradients(params, inputs, deltas), **CLOSE)
    assert_same(second, gradients(params, moved(inputs), {s: d + 0.1 for s, d in deltas.items()}), **CLOSE)


@pytest.mark.compile
def test_two_functional_models_of_one_class_are_arguments_of_one_compiled_function() -> None:
    f, params, x = prepared(*zoo.named("mlp"))
    run = torch.compile(lambda g, p, x: g(p, x), fullgraph=True, backend="aot_eager")
    assert_same(run(f, params, x), f(params, x), **CLOSE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(run(f, params, x + 1), f(params, x + 1), **CLOSE)


# 8. Nothing changes --------------------------------------------------------------------------------------------------


class Surprise(Exception):
    pass


def surprise(value: Tensor) -> Tensor:
    raise Surprise


@zoo_wide
def test_nothing_is_changed_by_any_transform(case: zoo.Case) -> None:
    model, inputs = case()
    f, params = functionalize(model)
    sites = list(differentiable(case))
    deltas = {site: torch.zeros_like(v) for site, v in differentiable(case).items()}
    with unchanged(model, params, inputs, deltas):
        functionalize(model)
        f(params, inputs)
        capture(f, ["**", "**:in", "**/*"])(params, inputs)
        intervene(f, dict.fromkeys(sites, 1))(params, inputs)
        intervene(f, {sites[0]: lambda v: v.mul_(0)})(params, inputs)
        freeze(f, "**")(params, inputs)
        stop_at(f, sites[0])(params, inputs)
        grad(lambda d: loss(edit_gradient(perturb(f, sites), dict.fromkeys(sites, torch.neg))(params, inputs, d)))(deltas)


@zoo_wide
def test_nothing_is_changed_by_a_call_that_raises(case: zoo.Case) -> None:
    model, inputs = case()
    f, params = functionalize(model)
    expected = f(params, inputs)
    site = list(differentiable(case))[-1]
    with unchanged(model, params, inputs):
        for write in (surprise, torch.ones(1, 17), lambda v: v[..., None], lambda v: "text"):
            with pytest.raises((Surprise, tdhook.errors.SiteError)):
                intervene(f, {site: write})(params, inputs)
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the model says to such inputs
            capture(f, "**")(params, ("nonsense", 3, 4, 5))
        with pytest.raises(tdhook.errors.ParamsError):
            f({}, inputs)
    assert_same(f(params, inputs), expected)


@pytest.mark.parametrize("case", zoo.named("stateful", "batchnorm_train", "spectral_norm", "old_spectral_norm"), ids=repr)
def test_a_model_that_writes_into_itself_gives_the_same_after_a_call_that_raised(case: zoo.Case) -> None:
    model, inputs = case()
    f, params = functionalize(model.train())
    expected = f(params, inputs)
    with pytest.raises(Surprise):
        intervene(f, {":out": surprise})(params, inputs)
    assert_same(f(params, inputs), expected)


def test_later_changes_of_the_module_do_not_reach_f() -> None:
    model, x = zoo.named("stateful")[0]()
    f, params = functionalize(model)
    params = params.clone()
    expected = f(params, x)
    model(x)
    model.calls, model.linear = 100, nn.Identity()
    model.register_forward_hook(lambda *_: surprise(x))
    assert_same(f(params, x), expected)


def test_params_share_storage_with_the_module_and_take_no_part_in_its_gradients() -> None:
    model, x = zoo.named("holder")[0]()
    model.hidden = [nn.Parameter(torch.ones(3))]
    f, params = functionalize(model)
    assert params["a", "weight"].data_ptr() == model.a.weight.data_ptr()
    assert not f(params, x).requires_grad
    assert not any(p.requires_grad for p in params.values(True, True))


def test_every_value_comes_from_params_also_what_is_held_twice() -> None:
    for case in zoo.named("holder", "hidden", "own_forward", "compiled", "lstm", "tied", "hooked", "probabilistic"):
        model, inputs = case()
        f, params = functionalize(model)
        zeros = params.apply(torch.zeros_like)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            assert_same(f(zeros, inputs), zoo.call(model, inputs))
        f, params, _ = prepared(case)
        assert_same(f(params.apply(torch.zeros_like), inputs), f(zeros, inputs))


def test_nothing_of_a_run_stays_behind() -> None:
    f, params, x = prepared(*zoo.named("stateful"))
    first = f(params, x)
    g = intervene(f, {"linear": lambda v: v + f(params, x).sum()})
    nested = g(params, x)
    assert_same(f(params, x), first)
    assert_same(g(params, x), nested)
    assert_same(nested - first, (first.sum() * 4).expand(4, 3), rtol=1e-4, atol=1e-3)


def test_functional_models_of_one_module_are_independent() -> None:
    model, x = zoo.named("mlp")[0]()
    (f, p), (g, q) = functionalize(model), functionalize(model)
    expected = f(p, x)
    inside = intervene(f, {"layers.0": lambda v: v + 0 * g(q * 0, x).sum()})
    assert_same(inside(p, x), expected)
    assert_same(g(q, x), expected)


@pytest.mark.parametrize("case", zoo.named("mlp", "stateful", "lstm", "old_spectral_norm", "gpt2", "residual"), ids=repr)
def test_threads_do_not_disturb_each_other(case: zoo.Case) -> None:
    model, inputs = case()
    shared = functionalize(model)
    site = next(iter(differentiable(case)))
    expected = [leaves(intervene(shared[0], {site: lambda v, i=i: v * i})(shared[1], inputs)) for i in range(4)]
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def work(i: int) -> None:
        try:
            start.wait()
            for repeat in range(8):
                f, params = shared if repeat % 2 else functionalize(model)
                output, _ = capture(intervene(f, {site: lambda v: v * i}), [site, "**/*"])(params, inputs)
                assert_same(leaves(output), expected[i])
                f._run(params, inputs, (), tdhook.core.functional.Execution())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    with unchanged(model, shared[1], inputs):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]


# 9. Calls and ties ---------------------------------------------------------------------------------------------------


def test_a_module_called_k_times_has_k_values() -> None:
    model, x = zoo.named("reused")[0]()
    f, params = functionalize(model)
    _, values = capture(f, "1@*")(params, x)
    _, expected = hooked_values(model, x)
    assert list(values.keys()) == ["1@0", "1@1", "1@2"]
    assert_same(dict(values.items()), {name: expected[name] for name in values.keys()})


@pytest.mark.parametrize("call", [0, 1, 2])
def test_each_call_can_be_written_alone(call: int) -> None:
    model, x = zoo.named("reused")[0]()
    f, params = functionalize(model)
    h = x
    for i in range(3):
        h = model[2 * i](h).relu()
        h = torch.ones_like(h) if i == call else h
    assert_same(intervene(f, {f"1@{call}": 1.0})(params, x), h)


def test_tied_weights_are_edited_once_and_seen_everywhere() -> None:
    model, tokens = zoo.named("tied")[0]()
    f, params = functionalize(model)
    assert list(params.keys(True, True)) == [("embed", "weight")]
    weight = torch.randn(7, 4)
    assert_same(f({"embed": {"weight": weight}}, tokens), weight[tokens] @ weight.T, **CLOSE)
    found = grad(lambda w: f({"embed": {"weight": w}}, tokens).square().sum())(weight)
    assert_same(found, grad(lambda w: (w[tokens] @ w.T).square().sum())(weight), **CLOSE)


def test_params_may_be_nested_dicts() -> None:
    f, params, x = prepared(*zoo.named("mlp"))
    assert_same(f(params.to_dict(), x), f(params, x))


def test_a_shared_module_has_one_name_and_all_its_names_are_understood() -> None:
    f, params, x = prepared(*zoo.named("reused"))
    assert_same(capture(f, "5@2")(params, x)[1]["1@2"], f(params, x))


# Derivatives compose -------------------------------------------------------------------------------------------------


def test_gradients_with_respect_to_params_equal_functional_call() -> None:
    model, x = zoo.named("mlp")[0]()
    f, params = functionalize(model)
    found = grad(lambda p: capture(f, "act@*")(p, x)[1]["act@1"].square().sum())(params)
    names = {name: p.detach() for name, p in model.named_parameters()}

    def by_hand(p: dict) -> Tensor:
        h = x
        for i in range(2):
            h = torch.relu(h @ p[f"layers.{i}.weight"].T + p[f"layers.{i}.bias"])
        return h.square().sum()

    for name, gradient in grad(by_hand)(names).items():
        assert_same(found[tuple(name.split("."))], gradient, **CLOSE)
    assert_same(f(params, x), functional_call(model, names, x))


def test_forward_mode_passes_through_reads_and_writes() -> None:
    f, params, x = prepared(*zoo.named("float64"))
    g = capture(intervene(f, {"1": lambda v: v * 2}), "1")
    direction = torch.randn_like(x)
    (_, values), (tangent, read_tangent) = jvp(lambda x: g(params, x), (x,), (direction,))
    h = values["1"] / 2
    inner = (direction @ params["0", "weight"].T) * (1 - h**2) * 2
    assert_same(read_tangent["1"], inner, **CLOSE)
    assert_same(tangent, inner @ params["2", "weight"].T, **CLOSE)
