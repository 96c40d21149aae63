"""`functionalize`: what it takes, what it gives, and what can be done with `f` and `params`."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import UserDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import grad, vmap

from tdhook import Site, capture, functionalize, intervene, perturb, stop_at

from . import zoo
from .plain import assert_same, leaves, prepared, unchanged

pytestmark = [
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning"),
]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
X = torch.ones(2, 3)

# f -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", zoo.everything, ids=repr)
def test_f_can_be_pickled_and_called(case: zoo.Case) -> None:
    if case.pickles is not True:
        pytest.skip(str(case.pickles))
    f, params, inputs = prepared(case)
    site = next(iter(capture(f, "**")(params, inputs)[1].keys()))
    g = capture(intervene(f, {site: abs_or_same}), "**")
    for model in (f, g):
        again = pickle.loads(pickle.dumps(model))
        assert repr(again) == repr(model)
        assert_same(_values(again(params, inputs)), _values(model(params, inputs)))


def abs_or_same(value: Tensor) -> Tensor:
    return value.abs() if value.dtype.is_floating_point else value


def _values(output: Any) -> Any:
    if isinstance(output, tuple) and isinstance(output[-1], TensorDict):
        return [leaves(output[0]), dict(output[1].items())]
    return output


def test_a_pickle_of_f_holds_no_parameters() -> None:
    for model in (nn.Linear(500, 500), nn.LSTM(200, 200)):
        f, _ = functionalize(model)
        assert len(pickle.dumps(f)) < 10_000


def test_f_is_hashable_immutable_and_its_own_copy() -> None:
    f, _ = functionalize(nn.Linear(3, 2))
    for g in (f, capture(f, ":in"), stop_at(f, ":in")):
        assert {g: 1}[g] == 1
        assert copy.deepcopy(g) is g
        with pytest.raises(AttributeError, match="'x'"):
            g.x = 1


def test_f_shows_what_it_is_made_of() -> None:
    f, _ = functionalize(nn.Sequential(nn.Linear(3, 2)), input=X)
    g = capture(f, ["0", "0:in"])
    assert repr(g).startswith("capture(functionalize(Sequential, input=tensor(")
    assert repr(g).endswith(", ['0', '0:in'])")
    assert f.tree.paths == ((), ("0",))
    assert g.base is f


def test_a_thread_may_be_the_first_to_call_f() -> None:
    f, params = functionalize(nn.Linear(3, 2))
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(f(params, X)))
    thread.start()
    thread.join()
    assert_same(found[0], f(params, X))


# params --------------------------------------------------------------------------------------------------------------


def test_params_are_what_the_model_has_by_name() -> None:
    for case in zoo.everything:
        if case.name in ("complex64", "old_weight_norm", "compiled", "mha", "tied", "gpt2"):
            continue  # a warning, an alias, a prefix, tied names
        model, _ = case()
        _, params = functionalize(model)
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        flat = params.flatten_keys(".")
        assert set(flat.keys()) == set(named)
        for name, tensor in named.items():
            assert flat[name].data_ptr() == tensor.data_ptr()
            assert not flat[name].requires_grad


def test_params_may_be_moved_edited_and_mapped() -> None:
    f, params, x = prepared(*zoo.named("mlp"))
    assert_same(f(params.to(torch.float64), x.double()), f(params, x).double(), **CLOSE)
    assert_same(f(params * 1, x), f(params, x))
    edited = params.copy()
    edited["layers", "2", "bias"] = params["layers", "2", "bias"] + 1
    assert_same(f(edited, x), f(params, x) + 1, **CLOSE)


def test_norms_follow_the_params() -> None:
    f, params, x = prepared(*zoo.named("weight_norm"))
    edited = params.copy()
    g = params["0", "parametrizations", "weight", "original0"]
    edited["0", "parametrizations", "weight", "original0"] = g * 2
    bias = params["0", "bias"]
    before, after = (capture(f, "0")(p, x)[1]["0"] for p in (params, edited))
    assert_same(after - bias, 2 * (before - bias), **CLOSE)


def test_running_statistics_of_the_params_never_change_and_are_used() -> None:
    model, x = zoo.named("batchnorm_train")[0]()
    f, params = functionalize(model)
    with unchanged(model, params):
        h = capture(f, "0")(params, x)[1]["0"]
        f(params, x)
    expected = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    assert_same(f(params, x), expected.relu(), **CLOSE)
    f, params = functionalize(model.eval())
    mean, var = params["1", "running_mean"], params["1", "running_var"]
    assert_same(f(params, x), ((h - mean) / (var + 1e-5).sqrt()).relu(), **CLOSE)


def test_an_embedding_that_renormalises_its_weight_does_not_change_params() -> None:
    model = nn.Embedding(5, 3, max_norm=0.1)
    f, params = functionalize(model)
    with unchanged(model, params):
        assert f(params, torch.arange(5)).norm(dim=-1).max() <= 0.11


def test_a_model_without_parameters_has_empty_params() -> None:
    f, params = functionalize(nn.Tanh())
    assert params.is_empty()
    assert_same(f({}, X), X.tanh())


def test_a_model_on_meta_gives_shapes_and_takes_real_params() -> None:
    with torch.device("meta"):
        model = zoo.MLP(3, 4, 2)
    f, params = functionalize(model)
    output, values = capture(f, "layers.0")(params, torch.empty(5, 3, device="meta"))
    assert output.is_meta
    assert values["layers.0"].shape == (5, 4)
    real = zoo.MLP(3, 4, 2)
    assert_same(f(functionalize(real)[1], torch.ones(5, 3)), real(torch.ones(5, 3)))


# The model -----------------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_taken_off_its_wrapper() -> None:
    case = zoo.named("compiled")[0]
    model, x = case()
    f, params = functionalize(model)
    assert list(params.keys()) == ["layers"]
    with unchanged(params, x):
        values = capture(f, ["layers.0", "layers.1:in", "act"])(params, x)[1]
    assert_same(values["layers.1:in"], values["layers.0"].relu())
    assert_same(values["act"], values["layers.0"].relu())


def test_a_ddp_model_is_taken_off_its_wrapper(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Linear(3, 2)
        wrapped = nn.parallel.DistributedDataParallel(model)
        f, params = functionalize(wrapped)
        with unchanged(model, wrapped.module):
            assert_same(f(params, X), nn.functional.linear(X, model.weight.detach(), model.bias.detach()))
        assert set(params.keys()) == {"weight", "bias"}
    finally:
        dist.destroy_process_group()


def test_hooks_of_the_user_run_and_stay_the_users() -> None:
    seen: list[int] = []
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity())
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(1) or output * 2)
    f, params = functionalize(model)
    expected = 2 * nn.functional.linear(X, params["0", "weight"], params["0", "bias"])
    assert_same(f(params, X), expected)
    handle.remove()
    assert_same(f(params, X), expected)  # f is what the model was
    assert len(seen) == 2
    assert not model[0]._forward_hooks


def test_the_mode_is_the_one_the_model_was_in() -> None:
    model = nn.Dropout(0.5).eval()
    f, params = functionalize(model)
    model.train()
    assert_same(f(params, X), X)


def test_a_stochastic_model_draws_what_the_model_draws() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    f, params = functionalize(model)
    torch.manual_seed(3)
    expected = model(X)
    torch.manual_seed(3)
    assert_same(f(params, X), expected)


def test_children_of_a_fused_encoder_are_reached_in_inference() -> None:
    f, params, x = prepared(*zoo.named("encoder"))
    with torch.no_grad():
        values = capture(f, ["layers[:].self_attn", "layers[:].linear1", "layers[1].norm2"])(params, x)[1]
    assert values["layers.0.linear1"].shape == (4, 5, 16)
    assert_same(f(params, x), values["layers.1.norm2"])
    padded = torch.zeros(4, 5, dtype=torch.bool)
    padded[0, 3:] = True
    model, _ = zoo.named("encoder")[0]()
    expected = model(x, src_key_padding_mask=padded)
    found = f(params, {"src": x, "src_key_padding_mask": padded})
    assert_same(found[~padded], expected[~padded], **CLOSE)


def test_a_submodule_the_model_ties_to_itself_is_traversed_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.__dict__["me"] = model
    model.again = [model]
    f, params = functionalize(model)
    assert_same(f(params, X), model(X).detach())


class Auxiliary(nn.Module):
    """Children report into a list that they share with their parent, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        losses: list[Tensor] = []
        self.losses = losses
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        for expert in self.experts:
            expert.register_forward_hook(_report)
            expert.losses = losses

    def forward(self, x: Tensor) -> Tensor:
        for expert in self.experts:
            x = expert(x)
        return torch.stack(self.losses).sum()


def _report(module: nn.Module, args: tuple, output: Tensor) -> None:
    module.losses.append(output.square().sum())


def test_a_list_shared_among_modules_stays_shared_and_starts_anew_in_each_run() -> None:
    model = Auxiliary()
    f, params = functionalize(model)
    expected = copy.deepcopy(model)(X)
    with unchanged(model):
        assert_same(f(params, X), expected.detach())
        assert_same(f(params, X), expected.detach())
        assert_same(vmap(lambda x: f(params, x))(X).sum(), expected.detach(), **CLOSE)


# inputs --------------------------------------------------------------------------------------------------------------


def test_inputs_are_positional_named_or_bound_once() -> None:
    model, inputs = zoo.named("several")[0]()
    a, b, mask = inputs["a"], inputs["b"], torch.rand(4, 4)
    f, params = functionalize(model)
    expected = model(a, b).detach()
    assert_same(f(params, (a, b)), expected)
    assert_same(f(params, TensorDict(inputs, [4])), expected)
    assert_same(f(params, UserDict(inputs)), expected)
    assert_same(f(params, (a, b, None)), expected)
    assert_same(f(params, {**inputs, "mask": None, "scale": 2.0}), 2 * expected)
    g, _ = functionalize(model, scale=2.0, mode="product", mask=mask)
    assert_same(g(params, (a, b)), model(a, b, mask, scale=2.0, mode="product").detach())


class Overwriting(nn.Module):
    def forward(self, x: Tensor, more: Any = None, constant: Tensor | None = None) -> Tensor:
        x += 1
        if more is not None:
            more["y"][0] += x
            more["y"].append(x)
            x = x + more["y"][0]
        if constant is not None:
            constant += 1
            x = x * constant
        return x


def test_what_the_caller_passed_is_never_written_into() -> None:
    constant, more = torch.ones(()), {"y": [X * 2]}
    model = Overwriting()
    f, params = functionalize(model, constant=constant)
    with unchanged(X, more, constant):
        for inputs in ((X, more), {"x": X, "more": more}, UserDict(x=X, more=more)):
            assert_same(f(params, inputs), torch.full_like(X, 12))
    wide = torch.ones(3).expand(2, 3)
    with unchanged(wide):
        assert_same(f(params, wide), torch.full_like(X, 4))


def test_one_tensor_passed_twice_stays_one_tensor() -> None:
    class Alias(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x += 1
            return y

    f, params = functionalize(Alias())
    assert_same(f(params, (X, X)), X + 1)
    assert_same(f(params, (X, X.clone())), X)


def test_inputs_need_not_be_contiguous() -> None:
    f, params, _ = prepared(*zoo.named("mlp"))
    x = torch.randn(3, 8)[:, ::2].T
    assert_same(f(params, x), f(params, x.contiguous()), **CLOSE)


def test_hugging_face_models_record_what_they_offer_to_record() -> None:
    for case in zoo.transformers:
        model, inputs = case()
        f, params = functionalize(model, output_hidden_states=True)
        blocks = {"gpt2": "transformer.h[:]", "llama": "model.layers[:]", "bert": "bert.encoder.layer[:]"}
        site = blocks.get(
            case.name,
            "vit.encoder.layer[:]" if hasattr(model.vit if case.name == "vit" else 0, "encoder") else "vit.layers[:]",
        )
        output, values = capture(f, site)(params, inputs)
        assert_same(output, zoo.call(model.requires_grad_(False), inputs, output_hidden_states=True), **CLOSE)
        first = next(iter(values.values()))
        assert_same(output.hidden_states[1], first)
        assert len(values.keys()) == 2


def test_patched_hidden_states_are_those_of_a_plain_hook() -> None:
    model, inputs = zoo.named("gpt2")[0]()
    f, params = functionalize(model, use_cache=False)
    new = torch.randn(4, 6, 8)
    handle = model.transformer.h[0].register_forward_hook(
        lambda module, args, output: (new, *output[1:]) if isinstance(output, tuple) else new
    )
    expected = model(**inputs, use_cache=False).logits.detach()
    handle.remove()
    with torch.no_grad():
        site = "transformer.h.0" if isinstance(model.transformer.h[0](new), Tensor) else "transformer.h.0:out[0]"
    assert_same(intervene(f, {site: new})(params, inputs).logits, expected, **CLOSE)


def test_a_site_object_is_as_good_as_its_spelling() -> None:
    f, params, x = prepared(*zoo.named("mlp"))
    site = Site(("layers", "0"))
    assert list(capture(f, site)(params, x)[1].keys()) == ["layers.0"]
    assert_same(stop_at(f, site)(params, x), capture(f, [site])(params, x)[1]["layers.0"])
    assert_same(intervene(f, {site: 0.0})(params, x), intervene(f, {"layers.0": 0.0})(params, x))
    found = grad(lambda d: perturb(f, site)(params, x, {"layers.0": d}).sum())(torch.zeros(4, 4))
    assert found.shape == (4, 4)
