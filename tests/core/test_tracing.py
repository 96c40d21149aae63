"""`trace`: the table of all sites, without computing anything."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.func import vmap

from tdhook import capture, expand, functionalize, intervene, perturb, start_from, trace
from tdhook.core.errors import InputError, ModelError, SiteError

from . import zoo
from .plain import prepared

pytestmark = [
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning"),
]


def modules(f, params, inputs, *extra):
    return trace(f, params, inputs, *extra, operations=False).sites


def test_prints_an_aligned_tree():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    assert str(trace(f, params, torch.ones(5, 3))).splitlines() == [
        ":out          Sequential  float32[5, 2]",
        "  0           Linear      float32[5, 2]",
        "    0/linear  operation   float32[5, 2]",
        "  1           ReLU        float32[5, 2]",
        "    1/relu    operation   float32[5, 2]",
    ]


def test_repr_is_compact():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    assert repr(trace(f, params, torch.ones(5, 3))) == "Trace(3 module sites, 2 operation sites)"
    assert repr(trace(f, params, torch.ones(5, 3), operations=False)) == "Trace(3 module sites, 0 operation sites)"


def test_rows_hold_site_kind_shape_and_dtype():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).double())
    table = trace(f, params, torch.ones(5, 3, dtype=torch.float64))
    row = table["1/relu"]
    assert (row.site, row.kind, row.shape, row.dtype, row.depth) == ("1/relu", "operation", (5, 2), torch.float64, 2)
    assert len(table) == 5 and [r.site for r in table] == table.sites


def test_execution_order_not_registration_order():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.first(x))

    f, params = functionalize(Backwards())
    assert modules(f, params, torch.ones(1, 3)) == [":out", "first", "last"]
    assert expand(f, "*") == ["last", "first"]


def test_every_call_of_a_reused_module_has_a_row():
    f, params = functionalize(zoo._reused()[0])
    assert modules(f, params, torch.ones(4, 3)) == [":out", "0", "1@0", "2", "1@1", "4", "1@2"]


def test_a_module_that_is_not_called_has_no_row():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    f, params = functionalize(Lazy())
    assert modules(f, params, torch.ones(1, 3)) == [":out", "used"]


def test_structured_values_have_a_row_per_tensor():
    f, params = functionalize(zoo.Structured())
    assert modules(f, params, torch.ones(4, 3)) == [
        ":out[record][score]",
        ":out[record][pair][0]",
        ":out[record][pair][1]",
        ":out[list][0]",
        "linear",
        "tuple:out[0]",
        "tuple:out[2][0]",
        "named:out[0]",
        "named:out[1]",
        'dict:out["1"]',
        'dict:out["0"]',
        'dict:out[deep][0]["odd ]key["]',
        "record:out[score]",
        "record:out[pair][0]",
        "record:out[pair][1]",
    ]


def test_operations_are_listed_where_they_run():
    f, params = functionalize(zoo.Residual())
    operations = [row.site for row in trace(f, params, torch.ones(2, 4)) if row.kind == "operation"]
    assert operations == ["up/linear", "/relu", "/add@0", "down/linear", "/softmax", "/add@1"]


def test_lstm():
    f, params = functionalize(nn.LSTM(3, 4, batch_first=True))
    assert modules(f, params, torch.ones(2, 5, 3)) == [":out[0]", ":out[1][0]", ":out[1][1]"]


def test_tensordict_module():
    model = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 4), in_keys=["x"], out_keys=["h"]),
        TensorDictModule(nn.Linear(4, 2), in_keys=["h"], out_keys=["y"]),
    )
    f, params = functionalize(model)
    table = trace(f, params, TensorDict({"x": torch.ones(4, 3)}, [4]), operations=False)
    assert [s for s in table.sites if s.endswith("module")] == expand(f, "module.*.module")
    assert table["module.1:out[y]"].shape == (4, 2)


@pytest.mark.parametrize(
    ("name", "blocks"), [("gpt2", "transformer.h.*"), ("llama", "model.layers.*"), ("bert", "bert.encoder.layer.*")]
)
def test_language_models(name, blocks):
    case = next(case for case in zoo.transformers if case.name == name)
    model, inputs = case()
    f, params = functionalize(model)
    table = trace(f, params, inputs)
    outputs = table.select(blocks)
    assert [s.removesuffix(":out[0]") for s in outputs] == expand(f, blocks)
    assert all(table[s].shape == (4, 6, 8) for s in outputs)
    assert table[":out[logits]"].shape[0] == 4


# the fused kernel of nn.MultiheadAttention returns None for its weights, on fake tensors an empty tensor
@pytest.mark.parametrize("case", [case for case in zoo.everything if case.name != "encoder"], ids=repr)
def test_rows_tell_what_a_real_run_returns(case):
    f, params, inputs = prepared(case)
    table = trace(f, params, inputs, operations=False)
    tensors = [row for row in table if row.site != ":out"]
    _, values = capture(f, [row.site for row in tensors])(params, inputs)
    assert {site: (tuple(v.shape), v.dtype) for site, v in values.items()} == {r.site: (r.shape, r.dtype) for r in tensors}


# Choosing --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    f, params = functionalize(zoo.MLP(3, 4, 4, 2))
    return trace(f, params, torch.ones(1, 3))


def test_select_modules_by_pattern(table):
    assert table.select("layers.*") == ["layers.0", "layers.1", "layers.2"]
    assert table.select("layers[-1]") == ["layers.2"]
    assert table.select("layers[:2]") == ["layers.0", "layers.1"]
    assert table.select("**") == [":out", "layers.0", "act@0", "layers.1", "act@1", "layers.2"]


def test_select_calls(table):
    assert table.select("act") == ["act@0", "act@1"]
    assert table.select("act@1") == ["act@1"]
    assert table.select("act@*") == ["act@0", "act@1"]


def test_select_operations(table):
    assert table.select("**/relu") == ["act/relu@0", "act/relu@1"]
    assert table.select("layers.1/*") == ["layers.1/linear"]


def test_select_by_regular_expression_and_by_predicate(table):
    assert table.select(re.compile(r"layers\.\d")) == ["layers.0", "layers.1", "layers.2"]
    assert table.select(lambda site: "@" in site and "/" not in site) == ["act@0", "act@1"]


def test_select_one_tensor_of_a_structured_value():
    f, params = functionalize(nn.LSTM(3, 4, batch_first=True))
    assert trace(f, params, torch.ones(2, 5, 3)).select(":out[1][0]") == [":out[1][0]"]


def test_select_raises_for_an_unknown_module_and_for_inputs(table):
    with pytest.raises(SiteError, match=r"no module 'layer.0'.*Did you mean 'layers.0'"):
        table.select("layer.0")
    with pytest.raises(SiteError, match="a trace lists outputs, not 'act:in'"):
        table.select("act:in")


def test_an_unknown_row_is_an_error_with_near_matches(table):
    with pytest.raises(SiteError, match=r"no site 'act@2'.*'act@"):
        table["act@2"]


# Nothing is computed ---------------------------------------------------------------------------------------------------


def test_shapes_that_fit_no_memory():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 1_000_000, device="meta"), nn.ReLU()))
    huge = torch.empty(1_000_000, 3, device="meta")
    assert trace(f, params, huge)["1"].shape == (1_000_000, 1_000_000)  # 4 terabytes


def test_real_parameters_are_only_looked_at():
    class Explode(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            return self.linear(x).expand(10**7, 10**7, -1, -1) + 1  # 1.6 petabytes

    f, params = functionalize(Explode())
    assert trace(f, params, torch.ones(2, 2))["/add"].shape == (10**7, 10**7, 2, 2)


def test_nothing_is_changed():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    f, params = functionalize(model)
    before, state = params.clone(), torch.get_rng_state()
    trace(f, params, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert (params == before).all()


def test_a_key_value_cache_is_left_as_it_is():
    """The symptom: the caller's cache held fake tensors afterwards."""
    model, inputs = zoo._gpt2()
    cache = model(inputs["input_ids"], use_cache=True).past_key_values
    f, params = functionalize(model)
    keys = cache.layers[0].keys
    table = trace(f, params, {"input_ids": inputs["input_ids"][:, :1], "past_key_values": cache})
    assert table[":out[logits]"].shape == (4, 1, 30)
    assert cache.layers[0].keys is keys and keys.shape[2] == 6


def test_control_flow_on_values_falls_back_to_a_real_run():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.positive, self.negative = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.positive(x) if x.sum() > 0 else self.negative(x)

    f, params = functionalize(Branch())
    assert modules(f, params, torch.ones(1, 3)) == [":out", "positive"]
    assert modules(f, params, -torch.ones(1, 3)) == [":out", "negative"]
    with pytest.raises(ModelError, match="control flow of the model depends on values"):
        vmap(lambda x: len(modules(f, params, x)) * x)(torch.ones(2, 3))


def test_a_model_that_leaves_torch_falls_back_to_a_real_run():
    class Numpy(nn.Module):
        def forward(self, x):
            return x * float(x.numpy().max())

    f, params = functionalize(nn.Sequential(Numpy()))
    assert modules(f, params, torch.ones(1, 3)) == [":out", "0"]


# With transforms -------------------------------------------------------------------------------------------------------


def test_inside_vmap_and_grad():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    seen = []

    def loss(x):
        seen.append(trace(f, params, x)["0"].shape)
        return f(params, x).sum()

    vmap(torch.func.grad(loss))(torch.ones(4, 3))
    assert seen == [(2,)]


def test_of_a_transformed_model():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    x = torch.ones(4, 3)
    plain = trace(f, params, x).sites
    assert trace(intervene(f, {"0": 1.0}), params, x).sites == plain
    assert trace(capture(f, "*"), params, x).sites == plain
    assert trace(perturb(f, "0"), params, x, {"0": torch.zeros(4, 2)}).sites == plain


def test_of_a_tail_lists_what_still_runs():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.ReLU()))
    assert modules(start_from(f, "1"), params, torch.ones(4, 3), torch.ones(4, 2)) == [":out", "2"]


# Errors ----------------------------------------------------------------------------------------------------------------


def test_a_plain_function_has_no_sites():
    with pytest.raises(ModelError, match="has no sites"):
        trace(lambda params, x: x, {}, torch.ones(1))


def test_errors_of_the_call_come_through():
    f, params = functionalize(nn.Linear(3, 2))
    with pytest.raises(InputError, match="inputs is a tensor"):
        trace(f, params, 3)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        trace(f, params, torch.ones(1, 5))


def test_a_model_that_raises_raises_and_leaves_the_twin_usable():
    class Moody(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 1:
                raise ZeroDivisionError("one row")
            return x * 2

    f, params = functionalize(nn.Sequential(Moody()))
    with pytest.raises(ZeroDivisionError, match="one row"):
        trace(f, params, torch.ones(1, 3))
    assert torch.equal(f(params, torch.ones(2, 3)), 2 * torch.ones(2, 3))


@functools.lru_cache
def remembered(length):
    return torch.arange(length).float()


def test_fake_tensors_do_not_stay_in_what_the_model_remembers():
    """The symptom: after a trace the model itself returned a fake tensor."""

    class Positions(nn.Module):
        def forward(self, x):
            return x + remembered(len(x))

    f, params = functionalize(nn.Sequential(Positions()))
    trace(f, params, torch.zeros(3))
    assert type(f(params, torch.zeros(3))) is torch.Tensor
    kept = remembered(3)
    trace(f, params, torch.zeros(3))
    assert remembered(3) is kept
