"""Every wrong address, value or argument raises before anything is computed, says what is wrong and how to mend it, and
leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

import tdhook
from tdhook import capture, edit_gradient, freeze, functionalize, intervene, perturb, stop_at
from tdhook.core.checks import warn_if_stochastic
from tdhook.core.errors import InputError, ModelError, ParamsError, SiteError, TdhookError, TdhookWarning

from . import zoo
from .plain import assert_same, prepared, unchanged

X = torch.ones(2, 3)
MLP = zoo.named("mlp")[0]
f, params, x = prepared(MLP)


def test_every_error_is_a_tdhook_error_and_the_builtin_that_fits() -> None:
    for error in (SiteError, InputError, ParamsError):
        assert issubclass(error, (TdhookError, ValueError))
        assert issubclass(error, TdhookError)
    assert issubclass(ModelError, TypeError)


# The model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, lambda x: x, nn.Linear, "gpt2"])
def test_functionalize_takes_a_module(model: Any) -> None:
    with pytest.raises(ModelError, match=r"functionalize takes an nn\.Module, got"):
        functionalize(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_model_is_refused() -> None:
    scripted = torch.jit.script(nn.Linear(3, 2))
    with pytest.raises(ModelError, match=r"the model is a ScriptModule.*pass the eager module"):
        functionalize(scripted)
    with pytest.raises(ModelError, match="submodule '0' is a ScriptModule"):
        functionalize(nn.Sequential(scripted))


def test_a_lazy_model_is_refused_until_it_has_run() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ModelError, match="submodule '0' has a lazy parameter 'weight'; run the model once"):
        functionalize(model)
    model(X)
    functionalize(model)


@pytest.mark.parametrize("transform", [capture, intervene, perturb, freeze, edit_gradient, stop_at])
@pytest.mark.parametrize("model", [nn.Linear(3, 2), lambda p, x: x, None])
def test_a_transform_takes_a_functional_model(transform: Callable, model: Any) -> None:
    with pytest.raises(ModelError, match=r"f is .* which has no sites; pass what tdhook\.functionalize\(model\)"):
        transform(model, {"": 0})


# params --------------------------------------------------------------------------------------------------------------


def without(name: tuple) -> TensorDict:
    return params.exclude(name)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (None, "params is a TensorDict as functionalize returns it, got None of type NoneType"),
        ([1], "params is a TensorDict as functionalize returns it, got a list"),
        ({}, "params has no 'layers'; it needs the keys that functionalize returned"),
        (without(("layers", "1")), r"params has no 'layers\.1'"),
        (without(("layers", "1", "bias")), r"params has no 'layers\.1\.bias'"),
        ({"layers": 3}, r"params\['layers'\] is 3 of type int, not a mapping"),
        ({"layers": torch.ones(3)}, r"params\['layers'\] is a float32 tensor of shape \[3\], not a mapping"),
        (
            {"layers": {**params["layers"].to_dict(), "0": {"weight": None, "bias": torch.ones(4)}}},
            r"params\['layers\.0\.weight'\] is None of type NoneType, not a tensor",
        ),
        ({**params.to_dict(), "head": 1}, r"params has 'head', which the model does not use"),
        (
            {"layers": {**params["layers"].to_dict(), "3": {}}},
            r"params has 'layers\.3', which the model does not use\. Did you mean 'layers\.",
        ),
    ],
)
def test_params_have_the_keys_of_the_model(wrong: Any, said: str) -> None:
    with unchanged(params, x), pytest.raises((ParamsError, InputError), match=said):
        f(wrong, x)
    assert_same(f(params, x), f(params, x))


def test_the_output_of_the_model_is_addressed_by_element() -> None:
    g, p, inputs = prepared(*zoo.named("structured"))
    with pytest.raises(SiteError, match=r"site ':out' holds .*; address an element, such as ':out\[\w+\]'"):
        capture(g, ":out")(p, inputs)


def test_a_module_and_what_has_a_site_are_no_sites() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU()))
    g, _ = functionalize(model)
    for wrong in (model[0], model[1], [model[0]]):
        with pytest.raises(SiteError, match=r"got the module (Linear|Sequential); give its path"):
            capture(g, wrong)
    with pytest.raises(SiteError, match="of type SimpleNamespace; take its site, '0'"):
        capture(g, SimpleNamespace(site="0"))


def test_dropout_that_is_no_module_is_warned_of() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_dropout = 0.5

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, self.attention_dropout, self.training)

    model = nn.Sequential(nn.Linear(4, 4), Attention())
    with pytest.warns(TdhookWarning, match="method: the model is in train mode, where '1' drops"):
        warn_if_stochastic(functionalize(model)[0], "method")
    warn_if_stochastic(functionalize(model.eval())[0], "method")


# inputs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(3, "got 3 of type int"), ([x], "got a list of 1"), (None, "got None"), ("text", "got 'text'")],
)
def test_inputs_are_a_tensor_a_tuple_or_a_mapping(wrong: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"inputs is a tensor .* {said}.*wrap another kind of argument in a tuple"):
        f(params, wrong)


def test_inputs_do_not_repeat_what_is_bound() -> None:
    g, p = functionalize(nn.Linear(3, 2), input=X)
    with pytest.raises(
        InputError, match=r"inputs has 'input', which functionalize already bound to a float32 tensor of shape \[2, 3\]"
    ):
        g(p, {"input": X})


def test_there_are_two_arguments_unless_a_transform_adds_one() -> None:
    with pytest.raises(InputError, match=r"f\(params, inputs\) takes two arguments, got 1 more"):
        f(params, x, x)
    with pytest.raises(InputError, match=r"deltas is missing: call g\(params, inputs, deltas\)"):
        perturb(f, "act@0")(params, x)
    with pytest.raises(InputError, match="got 1 more"):
        perturb(f, "act@0")(params, x, {"act@0": torch.zeros(4, 4)}, 3)


# Addresses -----------------------------------------------------------------------------------------------------------

TRANSFORMS = {
    "capture": capture,
    "intervene": lambda f, site: intervene(f, {site: 0.0}),
    "perturb": perturb,
    "freeze": freeze,
    "edit_gradient": lambda f, site: edit_gradient(f, {site: torch.neg}),
    "stop_at": stop_at,
}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


class Ran(Exception):
    pass


class Mine(nn.Module):
    """Raises when it runs: what is wrong with an address is said before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise Ran


@every_transform
def test_an_unknown_site_is_an_error_before_anything_runs(transform: Callable) -> None:
    mine, _ = functionalize(Mine())
    with pytest.raises(SiteError, match=r"unknown site 'lyer': the model has no module 'lyer'. Did you mean 'layer'?"):
        transform(mine, "lyer")
    with pytest.raises(SiteError, match="malformed"):
        transform(mine, "layer:up")
    with pytest.raises(SiteError):
        transform(mine, [3] if transform in (capture, perturb, freeze, stop_at) else 3)


def deltas_if_needed(transform: Callable, site: str, shape: tuple) -> tuple:
    return ({site: torch.zeros(shape)},) if transform is perturb else ()


class Half(nn.Module):
    """Has a child that it never calls, and one whose weight it uses without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.taken = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) @ self.taken.weight


half, half_params = functionalize(Half())


@every_transform
@pytest.mark.parametrize("site", ["unused", "taken:in"])
def test_a_site_that_is_never_reached_is_an_error(transform: Callable, site: str) -> None:
    with (
        unchanged(half_params, X),
        pytest.raises(SiteError, match=f"site '{site}' was not reached: the model never called this module"),
    ):
        transform(half, site)(half_params, X, *deltas_if_needed(transform, site, (2, 3)))


@every_transform
def test_an_operation_that_does_not_run_is_an_error_that_lists_those_that_do(transform: Callable) -> None:
    with pytest.raises(SiteError, match=r"site '/softmax' was not reached: the module ran the operations matmul\."):
        transform(half, "/softmax")(half_params, X, *deltas_if_needed(transform, "/softmax", (2, 3)))
    with pytest.raises(SiteError, match="site 'unused/linear' was not reached: the module ran no operation of its own"):
        transform(half, "unused/linear")(half_params, X, *deltas_if_needed(transform, "unused/linear", (2, 3)))


@every_transform
def test_a_call_that_does_not_happen_is_an_error_that_says_which_do(transform: Callable) -> None:
    for site, said in [
        ("act@2", "only @0 to @1 exist"),
        ("layers.0@1", "only @0 exists"),
        ("layers.0/linear@5", "only @0 exists"),
    ]:
        with pytest.raises(SiteError, match=f"site '{site}' was not reached: {said}"):
            transform(f, site)(params, x, *deltas_if_needed(transform, site, (4, 4)))


@every_transform
def test_a_module_called_several_times_is_addressed_by_call(transform: Callable) -> None:
    if transform is stop_at:
        return  # it ends the run at the first call, before there is a second
    with pytest.raises(SiteError, match=r"site 'act' is called more than once; .*'act@0', 'act@1'.*'act@\*'"):
        transform(f, "act")(params, x, *deltas_if_needed(transform, "act", (4, 4)))
    with pytest.raises(SiteError, match=r"'act@0:in', 'act@1:in'"):
        transform(f, "act:in")(params, x, *deltas_if_needed(transform, "act:in", (4, 4)))


@every_transform
def test_a_structured_value_is_addressed_by_element(transform: Callable) -> None:
    g, p, inputs = prepared(*zoo.named("structured"))
    for site, said in [
        ("tuple", r"holds a tuple of 3, not a tensor; address an element, such as 'tuple:out\[0\]'"),
        ("record", r"holds a Record with 'score', 'note', 'pair', not a tensor; .* 'record:out\[score\]'"),
        ("tuple:out[1]", r"holds 'text' of type str, not a tensor"),
        ("tuple:out[2]", r"not a tensor; address an element, such as 'tuple:out\[2\]\[0\]'"),
        ("tuple:out[3]", r"has no element \[3\]: the value there is a tuple of 3"),
        ("record:out[scores]", r"has no element \[scores\]: the value there is a Record"),
        ("linear:out[0]", r"has no element \[0\]: the value there is a float32 tensor of shape \[4, 3\]"),
    ]:
        with pytest.raises(SiteError, match=said):
            transform(g, site)(p, inputs, *deltas_if_needed(transform, site, (4, 3)))


@every_transform
def test_an_argument_that_was_not_passed_is_an_error(transform: Callable) -> None:
    g, p, inputs = prepared(*zoo.named("several"))
    with pytest.raises(SiteError, match=r"site ':in\[mask\]': the call got no argument 'mask', it got 'b', 'a'"):
        transform(g, ":in[mask]")(p, inputs, *deltas_if_needed(transform, ":in[mask]", (4, 3)))
    with pytest.raises(SiteError, match=r"site ':in' is ambiguous: the call got 'b', 'a'; say ':in\[name\]'"):
        transform(g, ":in")(p, inputs, *deltas_if_needed(transform, ":in", (4, 3)))


@pytest.mark.parametrize("transform", [perturb, stop_at])
@pytest.mark.parametrize("pattern", ["layers.*", "act@*", "layers[:]", "layers.0/*"])
def test_a_pattern_where_single_sites_are_needed_is_an_error(transform: Callable, pattern: str) -> None:
    with pytest.raises(SiteError, match="takes exact sites, got the pattern"):
        transform(f, pattern)


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (
            torch.ones(4),
            r"is a float32 tensor of shape \[4\] on cpu, the site holds a float32 tensor of shape \[4, 4\] on cpu; expand it",
        ),
        (torch.ones(4, 4).double(), r"is a float64 tensor .* convert it with \.to\(value\)"),
        (torch.ones(4, 4, dtype=torch.complex64), r"is a complex64 tensor .* convert it"),
        (torch.ones(4, 4, device="meta"), r"is .* on meta, the site holds .* on cpu; convert it"),
        (1j, "is 1j, the site holds a float32 tensor"),
        (lambda value: None, "is None of type NoneType; give a tensor like a float32 tensor of shape"),
        (lambda value: (value,), "is a tuple of 1; give a tensor like"),
        (lambda value: value[0], r"is a float32 tensor of shape \[4\]"),
    ],
)
def test_a_value_that_does_not_fit_its_site_is_an_error(write: Any, said: str) -> None:
    with unchanged(params, x), pytest.raises(SiteError, match=f"the write at 'layers.0' {said}"):
        intervene(f, {"layers.0": write})(params, x)


def test_a_fraction_is_not_written_into_integers() -> None:
    g, p, tokens = prepared(*zoo.named("tied"))
    with pytest.raises(SiteError, match=r"the write at 'embed:in' is 1\.5, the site holds a int64 tensor"):
        intervene(g, {"embed:in": 1.5})(p, tokens)
    assert_same(intervene(g, {"embed:in": 1})(p, tokens), g(p, torch.ones_like(tokens)))


@pytest.mark.parametrize("writes", [None, 3, ["act@0"], "act@0"])
def test_writes_are_a_mapping(writes: Any) -> None:
    with pytest.raises(InputError, match="writes is a mapping from sites, got"):
        intervene(f, writes)
    with pytest.raises(InputError, match="edits is a mapping from sites, got"):
        edit_gradient(f, writes)


def test_nothing_to_do_is_an_error() -> None:
    with pytest.raises(SiteError, match="writes is empty; give at least one site"):
        intervene(f, {})
    for transform in (capture, freeze, perturb, stop_at):
        with pytest.raises(SiteError, match="no site was given"):
            transform(f, [])


def test_what_is_written_is_a_tensor_a_number_or_a_function() -> None:
    with pytest.raises(InputError, match=r"writes\['act@0'\] is 'zero' of type str; give a tensor, a number or a function"):
        intervene(f, {"act@0": "zero"})
    with pytest.raises(InputError, match=r"edits\['act@0'\] is 0 of type int; give a function of the cotangent"):
        edit_gradient(f, {"act@0": 0})


@pytest.mark.parametrize(
    "writes", [{"layers[0]": 1, "layers.0": 2}, {"layers.0": 1, "layers.*": 2}, {"layers[:1]": 1, "**": 2}]
)
def test_a_site_named_twice_in_one_mapping_is_an_error(writes: dict) -> None:
    with pytest.raises(SiteError, match=r"writes means 'layers\.0' twice, by .* and by .*nest two transforms"):
        intervene(f, writes)


def test_a_pattern_does_not_write_one_value_into_all_elements_of_a_structure() -> None:
    g, p, inputs = prepared(*zoo.named("structured"))
    with pytest.raises(SiteError, match=r"site 'tup\*' matches a structured value at 'tuple@0:out\[0\]'; address the element"):
        intervene(g, {"tup*": 0.0})(p, inputs)


@pytest.mark.parametrize(
    ("deltas", "said"),
    [
        (3, "deltas is a mapping from sites to tensors, got 3"),
        ({}, r"deltas has no 'layers\.0'; it has nothing"),
        ({"layers.1": torch.zeros(4, 4)}, r"deltas has no 'layers\.0'; it has 'layers\.1'"),
        (
            {"layers.0": torch.zeros(4, 4), "layer.0": 1},
            r"deltas has 'layer\.0', which is not asked for\. Did you mean 'layers\.0'",
        ),
        (
            {"layers.0": 0.0},
            r"the delta at 'layers\.0' is 0\.0 of type float; give a tensor like a float32 tensor of shape",
        ),
        ({"layers.0": torch.zeros(4)}, r"the delta at 'layers\.0' is a float32 tensor of shape \[4\].*expand it"),
        ({"layers.0": torch.zeros(4, 4).double()}, r"the delta at 'layers\.0' is a float64 tensor.*convert it"),
    ],
)
def test_deltas_fit_their_sites(deltas: Any, said: str) -> None:
    with unchanged(params, x), pytest.raises((SiteError, InputError), match=said):
        perturb(f, "layers.0")(params, x, deltas)


@pytest.mark.parametrize("edit", [lambda cotangent: None, lambda cotangent: cotangent[0], lambda cotangent: 3])
def test_an_edit_that_returns_no_cotangent_of_that_shape_is_an_error(edit: Callable) -> None:
    g = edit_gradient(f, {"layers.0": edit})
    with pytest.raises(SiteError, match=r"the edit at 'layers\.0' is .* float32 tensor of shape \[4, 4\]"):
        torch.func.grad(lambda x: g(params, x).sum())(x)


def test_the_namespace_has_the_errors() -> None:
    assert tdhook.TdhookError is TdhookError
