"""Activation patching against plain hooks and closed forms."""

from __future__ import annotations

import copy
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import tdhook
from tdhook import functionalize, intervene
from tdhook.core import errors
from tdhook.latent import Patching, activation_patching

from ..core import zoo

# vmap runs torch's fused attention for the CPU in a loop, and says so
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def language_model(make):
    torch.manual_seed(0)
    model = make()[0].double()
    clean = torch.randint(0, 30, (2, 6))
    corrupted = clean.clone()
    corrupted[:, 2] = (corrupted[:, 2] + 1) % 30
    return model, clean, corrupted


def difference(output):
    return output.logits[:, -1, 3] - output.logits[:, -1, 5]


def mean_difference(output):
    return difference(output).mean()


def first(output):
    return output if isinstance(output, Tensor) else output[0]


def by_hooks(model, source, base, metric, modules, positions):
    """One hooked forward per patch."""
    values = {}

    def keep(module, args, output):
        values[module] = first(output)

    def write(position, module, args, output):
        patched = first(output).clone()
        patched[:, position] = values[module][:, position]
        return patched if isinstance(output, Tensor) else (patched, *output[1:])

    handles = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        model(source)
        for handle in handles:
            handle.remove()
        rows = []
        for module in modules:
            for position in positions:
                handle = module.register_forward_hook(partial(write, position))
                rows.append(metric(model(base)))
                handle.remove()
        return torch.stack(rows).unflatten(0, (len(modules), len(positions)))


SITES = {
    zoo._gpt2: (["transformer.h.{}", "transformer.h.{}.attn:out[0]", "transformer.h.{}.mlp"], "transformer.wte"),
    zoo._llama: (["model.layers.{}", "model.layers.{}.self_attn:out[0]", "model.layers.{}.mlp"], "model.embed_tokens"),
}


def sites_of(model, make):
    kinds, embedding = SITES[make]
    sites = [embedding, *(kind.format(i) for i in range(2) for kind in kinds)]
    return sites, [model.get_submodule(site.split(":")[0]) for site in sites]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("make", [zoo._gpt2, zoo._llama])
@pytest.mark.parametrize("metric", [difference, mean_difference])
def test_language_models_equal_one_hooked_forward_per_patch(make, direction, metric):
    model, clean, corrupted = language_model(make)
    f, params = functionalize(model)
    sites, modules = sites_of(model, make)
    got = activation_patching(f, params, clean, corrupted, metric, sites=sites, direction=direction)
    source, base = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    CLOSE(got.patched, by_hooks(model, source, base, metric, modules, range(6)))
    CLOSE(got.clean, metric(model(clean)).detach())
    CLOSE(got.corrupted, metric(model(corrupted)).detach())
    assert got.patched.shape == (7, 6, *got.clean.shape)


def test_some_positions_also_counted_from_the_end():
    model, clean, corrupted = language_model(zoo._gpt2)
    f, params = functionalize(model)
    sites, modules = sites_of(model, zoo._gpt2)
    got = activation_patching(f, params, clean, corrupted, difference, sites=sites, positions=[-1, 2, 2])
    CLOSE(got.patched, by_hooks(model, clean, corrupted, difference, modules, [5, 2, 2]))


@pytest.mark.parametrize("positions", [torch.tensor([-1, 2]), range(5, 1, -3), (5, 2)])
def test_positions_come_in_any_sequence(positions):
    model, clean, corrupted = language_model(zoo._gpt2)
    f, params = functionalize(model)
    run = partial(activation_patching, f, params, clean, corrupted, difference, sites="transformer.h.0")
    assert torch.equal(run(positions=positions).patched, run(positions=[5, 2]).patched)


def test_named_inputs_with_a_mask():
    model, clean, corrupted = language_model(zoo._llama)
    f, params = functionalize(model)
    mask = torch.ones_like(clean)
    run = partial(activation_patching, metric=difference, sites="model.layers.0")
    named = run(f, params, {"input_ids": clean, "attention_mask": mask}, {"attention_mask": mask, "input_ids": corrupted})
    CLOSE(named.patched, run(f, params, clean, corrupted).patched)


def test_whole_sites():
    model, clean, corrupted = language_model(zoo._gpt2)
    f, params = functionalize(model)
    sites, modules = sites_of(model, zoo._gpt2)
    got = activation_patching(f, params, clean, corrupted, difference, sites=sites, axis=None)
    CLOSE(got.patched, by_hooks(model, clean, corrupted, difference, modules, [slice(None)])[:, 0])
    CLOSE(got.normalized[[0, 1, 4]], torch.ones(3, 2).double())  # embedding and blocks: the whole residual stream


@pytest.mark.parametrize(
    ("attention", "op"), [("sdpa", "scaled_dot_product_attention"), ("eager", "matmul@1"), ("eager", "softmax")]
)
def test_heads(attention, op):
    """A head patched at the attention operation is that slice of the input of the output projection."""
    model, clean, corrupted = language_model(zoo._gpt2)
    model.set_attn_implementation(attention)
    f, params = functionalize(model)
    site = f"transformer.h.1.attn/{op}"
    got = activation_patching(f, params, clean, corrupted, difference, sites=site, axis=1)
    assert got.patched.shape == (1, 2, 2)
    if op == "softmax":  # a pattern: patching both heads at once is patching the site
        return
    _, values = tdhook.capture(f, "transformer.h.1.attn.c_proj:in")(params, clean)
    for head in range(2):
        columns = slice(4 * head, 4 * head + 4)

        def write(value, columns=columns):
            value[..., columns] = values["transformer.h.1.attn.c_proj:in"][..., columns]
            return value

        expected = difference(intervene(f, {"transformer.h.1.attn.c_proj:in": write})(params, corrupted))
        CLOSE(got.patched[0, head], expected)


# Closed forms and laws -------------------------------------------------------------------------------------------------


def test_identity():
    """Unit 0 of [10, 20, 30] patched from [1, 2, 3] gives [1, 20, 30]."""
    f, params = functionalize(nn.Sequential(nn.Identity()))
    run = partial(activation_patching, f, params, torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 20, 30]]), sites="0")
    for weights in torch.eye(3):
        got = run(lambda out: (out * weights).sum(), positions=[0])  # noqa: B023
        assert got.patched.item() == weights @ torch.tensor([1.0, 20, 30])


def test_linear_closed_form():
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Linear(4, 1)))
    clean, corrupted = torch.randn(3, 4), torch.randn(3, 4)
    got = activation_patching(f, params, clean, corrupted, lambda out: out[:, 0], sites="0")
    effect = params["1", "weight"][0] * (clean - corrupted)
    torch.testing.assert_close(got.patched[0] - got.corrupted, effect.T)
    back = activation_patching(f, params, clean, corrupted, lambda out: out[:, 0], sites="0", direction="noise")
    torch.testing.assert_close(back.patched[0] - back.clean, -effect.T)


def test_patching_the_last_value_restores_the_clean_run():
    model, clean, corrupted = language_model(zoo._gpt2)
    f, params = functionalize(model)
    got = activation_patching(f, params, clean, corrupted, difference, sites=["transformer.ln_f", "lm_head"], axis=None)
    CLOSE(got.normalized, torch.ones(2, 2).double())
    last = activation_patching(f, params, clean, corrupted, difference, sites="transformer.ln_f", positions=[-1, 0])
    CLOSE(last.normalized, torch.tensor([[[1.0, 1], [0, 0]]]).double())


def test_equal_runs_give_the_baseline_everywhere():
    model, clean, _ = language_model(zoo._llama)
    f, params = functionalize(model)
    got = activation_patching(f, params, clean, clean.clone(), difference, sites="model.layers.*.mlp")
    assert torch.equal(got.patched, got.clean.expand_as(got.patched)) and torch.equal(got.clean, got.corrupted)


def test_the_result_is_a_tensorclass():
    f, params = functionalize(nn.Sequential(nn.Identity()))
    got = activation_patching(f, params, torch.ones(1, 2), torch.zeros(1, 2), lambda out: out.sum(), sites="0")
    assert isinstance(got, Patching) and got.normalized.tolist() == [[0.5, 0.5]]
    assert got.double().patched.dtype == torch.float64


def test_the_ratio_of_means_over_examples():
    """Pairs with a gap of 1 and of 3: site 0 restores all of the first and none of the second."""
    f, params = functionalize(nn.Sequential(nn.Identity()))
    clean, corrupted = torch.tensor([[1.0, 0], [0, 3]]), torch.zeros(2, 2)
    got = activation_patching(f, params, clean, corrupted, lambda out: out.sum(1), sites="0")
    assert got.ratio_of_means.tolist() == [[0.25, 0.75]] and got.normalized.mean(-1).tolist() == [[0.5, 0.5]]
    one = activation_patching(f, params, clean, corrupted, lambda out: out.sum(1).mean(), sites="0")
    assert one.ratio_of_means.tolist() == [[0.25, 0.75]]
    even = activation_patching(f, params, clean, clean.flip(1), lambda out: out[:, 0], sites="0")
    assert even.ratio_of_means.tolist() == [[1, 0]]
    none = activation_patching(f, params, clean[:, :1], clean[:, :1].flip(0), lambda out: out[:, 0], sites="0")
    with pytest.raises(errors.InputError, match="run have the same metric"):
        _ = none.ratio_of_means


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 5, 100])
def test_chunks_change_nothing(chunk_size):
    model, clean, corrupted = language_model(zoo._gpt2)
    f, params = functionalize(model)
    run = partial(activation_patching, f, params, clean, corrupted, difference, sites="transformer.h.*.mlp")
    CLOSE(run(chunk_size=chunk_size).patched, run().patched)


@pytest.mark.parametrize(
    "case", [c for c in zoo.plain if c.name in ("in_place", "cnn", "reused", "residual", "encoder")], ids=repr
)
def test_every_site_of_a_model_equals_a_write(case):
    torch.manual_seed(0)
    model, corrupted = case()
    f, params = functionalize(model)
    clean = torch.randn_like(corrupted)
    table = tdhook.trace(f, params, clean, operations=False)
    sites = [s for s in table.sites if table[s].shape and len(table[s].shape) > 1 and "self_attn:" not in s]
    _, values = tdhook.capture(f, sites)(params, clean)
    for site in sites:
        got = activation_patching(f, params, clean, corrupted, lambda out: out.flatten(1).sum(1), sites=site, positions=[1])

        def write(value, site=site):
            value[:, 1] = values[site][:, 1]
            return value

        expected = intervene(f, {site: write})(params, corrupted).flatten(1).sum(1)
        torch.testing.assert_close(got.patched[0, 0], expected)


def test_an_in_place_cnn():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

        def forward(self, x):
            out = self.relu(self.norm(self.conv(x)))
            out += x
            return self.relu(out)

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(75, 2)).double().eval()
    f, params = functionalize(model)
    clean, corrupted = torch.randn(2, 3, 5, 5).double(), torch.randn(2, 3, 5, 5).double()
    metric = lambda out: out[:, 0]  # noqa: E731
    sites = ["0.conv", "0.norm", "0", "1.conv", "1"]
    got = activation_patching(f, params, clean, corrupted, metric, sites=sites)
    CLOSE(got.patched, by_hooks_cnn(model, clean, corrupted, metric, sites))


def by_hooks_cnn(model, clean, corrupted, metric, sites):
    rows = []
    for site in sites:
        module, kept = model.get_submodule(site), []
        handle = module.register_forward_hook(lambda m, a, out: kept.append(out.clone()))  # noqa: B023
        model(clean)
        handle.remove()
        for channel in range(3):

            def write(m, a, out, channel=channel, kept=kept):
                out = out.clone()
                out[:, channel] = kept[0][:, channel]
                return out

            handle = module.register_forward_hook(write)
            rows.append(metric(model(corrupted)).detach())
            handle.remove()
    return torch.stack(rows).unflatten(0, (len(sites), 3))


def test_inside_a_transformed_model():
    """The symptom: an inner write was not reached, because the prefix around it was replayed."""
    model, clean, corrupted = language_model(zoo._gpt2)
    f, params = functionalize(model)
    inner = intervene(f, {"transformer.h.0.mlp.c_fc": lambda value: value * 0.5})
    got = activation_patching(inner, params, clean, corrupted, difference, sites="transformer.h.1", positions=[2])
    _, values = tdhook.capture(inner, "transformer.h.1")(params, clean)

    def write(value):
        value[:, 2] = values["transformer.h.1"][:, 2]
        return value

    CLOSE(got.patched[0, 0], difference(intervene(inner, {"transformer.h.1": write})(params, corrupted)))


# Cost ------------------------------------------------------------------------------------------------------------------


class Calls(nn.Module):
    log: ClassVar[list[str]] = []

    def __init__(self, name):
        super().__init__()
        self.name, self.linear = name, nn.Linear(4, 4)

    def forward(self, x):
        Calls.log.append(self.name)
        return self.linear(x)


def test_only_what_lies_after_the_site_runs_once_per_chunk():
    f, params = functionalize(nn.Sequential(*map(Calls, "abcd")))
    Calls.log.clear()
    activation_patching(f, params, torch.randn(2, 4), torch.randn(2, 4), lambda out: out.sum(), sites=["1", "2"], chunk_size=2)
    assert "".join(Calls.log) == "abcd" * 2 + "cd" * 2 + "d" * 2


def test_patches_that_would_change_nothing_do_not_run():
    f, params = functionalize(nn.Sequential(*map(Calls, "ab")))
    clean = torch.randn(2, 4)
    Calls.log.clear()
    got = activation_patching(f, params, clean, clean.clone(), lambda out: out.sum(), sites="0")
    assert "".join(Calls.log) == "abab" and torch.equal(got.patched, got.clean.expand(1, 4))


def test_patches_that_are_skipped_have_the_same_numbers():
    model, clean, corrupted = language_model(zoo._gpt2)
    f, params = functionalize(model)
    run = partial(activation_patching, f, clean=clean, corrupted=corrupted, metric=difference, sites="transformer.h.*")
    skipping = run(params).patched
    whole = run(params.clone().requires_grad_()).patched  # with derivatives nothing is skipped
    assert whole.requires_grad and not skipping.requires_grad
    CLOSE(skipping, whole.detach())


def test_progress_is_called_after_every_site():
    f, params = functionalize(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    seen = []
    options = {"sites": "*", "progress": lambda done, total: seen.append((done, total))}
    activation_patching(f, params, torch.ones(1, 2), torch.zeros(1, 2), lambda out: out.sum(), **options)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_nothing_of_the_caller_is_changed(capsys):
    model, clean, corrupted = language_model(zoo._gpt2)
    f, params = functionalize(model)
    before, state = copy.deepcopy((clean, corrupted, params.clone())), torch.get_rng_state()
    activation_patching(f, params, clean, corrupted, difference, sites="transformer.h.*")
    assert torch.equal(clean, before[0]) and torch.equal(corrupted, before[1]) and (params == before[2]).all()
    assert torch.equal(torch.get_rng_state(), state) and capsys.readouterr() == ("", "")


# Composition -----------------------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    f, params = functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    return f, params, torch.randn(5, 3).double(), torch.randn(5, 3).double()


def test_under_vmap_over_pairs():
    f, params, clean, corrupted = small()
    run = lambda a, b: activation_patching(f, params, a, b, lambda out: out[..., 0], sites=["0", "2"], axis=-1).patched  # noqa: E731
    CLOSE(vmap(run)(clean, corrupted), run(clean, corrupted).movedim(-1, 0))


def test_under_vmap_over_models_and_metrics():
    f, params, clean, corrupted = small()
    stacked = torch.stack([params, params * 0.5])

    def run(params, weights):
        return activation_patching(f, params, clean, corrupted, lambda out: out @ weights, sites=["0", "2"]).patched

    weights = torch.randn(2, 2).double()
    CLOSE(vmap(run)(stacked, weights), torch.stack([run(p, w) for p, w in zip(stacked, weights)]))


def test_the_gradient_of_a_patch():
    f, params, clean, corrupted = small()

    def patched(clean):
        return activation_patching(f, params, clean, corrupted, lambda out: out[:, 0].sum(), sites="2", axis=None).patched[0]

    # patching all of site 2 makes the output that of the clean run
    CLOSE(patched(clean), f(params, clean)[:, 0].sum())
    CLOSE(grad(patched)(clean), grad(lambda x: f(params, x)[:, 0].sum())(clean))


def test_gradients_reach_the_parameters():
    f, params, clean, corrupted = small()
    run = lambda p: activation_patching(f, p, clean, corrupted, lambda out: out[:, 0], sites="0").patched.square().sum()  # noqa: E731
    leaf = params.clone().requires_grad_()
    run(leaf).backward()
    got = grad(run)(params)
    for key in params.keys(True, True):
        CLOSE(got[key], leaf[key].grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    model, clean, corrupted = language_model(zoo._gpt2)
    f, params = functionalize(model)
    run = partial(activation_patching, f, params, clean, corrupted, difference, sites="transformer.h.*")
    with mode():
        got = run()
    CLOSE(got.patched, run().patched)


@pytest.mark.compile
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_compiled_equals_eager_and_does_not_recompile(chunk_size):
    torch._dynamo.reset()
    f, params, clean, corrupted = small()

    def run(params, clean, corrupted):
        got = activation_patching(f, params, clean, corrupted, lambda out: out[:, 0], sites=["0", "2"], chunk_size=chunk_size)
        return got.patched, got.normalized

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 2.0):
        with torch._dynamo.config.patch(error_on_recompile=True):
            for a, b in zip(compiled(params, clean * scale, corrupted), run(params, clean * scale, corrupted)):
                CLOSE(a, b)


@pytest.mark.compile
def test_compiled_language_model():
    torch._dynamo.reset()
    model, clean, corrupted = language_model(zoo._gpt2)
    f, params = functionalize(model, use_cache=False)
    run = lambda a, b: activation_patching(f, params, a, b, difference, sites="transformer.h.*", positions=[2, 5]).patched  # noqa: E731
    CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(clean, corrupted), run(clean, corrupted))


# Warnings and errors ---------------------------------------------------------------------------------------------------


def test_a_model_in_train_mode_is_warned_about():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train())
    with pytest.warns(errors.TdhookWarning, match="activation_patching: the model is in train mode, where '1'"):
        activation_patching(f, params, torch.ones(1, 3), torch.zeros(1, 3), lambda out: out.sum(), sites="0")


A, B = torch.ones(2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"direction": "both"}, errors.InputError, "direction='both' is unknown; choose 'denoise'"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size is an integer of at least 1 or None, got 0"),
        ({"corrupted": torch.zeros(2, 4)}, errors.InputError, r"shape \[2, 3\] but corrupted .* \[2, 4\]; .* same length"),
        ({"corrupted": B.double()}, errors.InputError, "float32 .* but corrupted a float64"),
        ({"corrupted": (B, B)}, errors.InputError, "give inputs of the same structure"),
        ({"sites": "9"}, errors.SiteError, "the model has no module '9'"),
        ({"sites": []}, errors.SiteError, "no site was given"),
        ({"sites": "0/*"}, errors.SiteError, r"'0/\*', which stands for several values"),
        ({"sites": "0@1"}, errors.SiteError, "'0@1' was not reached: only @0 exists"),
        ({"positions": [3]}, errors.InputError, "positions has 3, out of range for 3 positions at '0'"),
        ({"positions": [-4]}, errors.InputError, "positions has -4, out of range"),
        ({"positions": []}, errors.InputError, "positions is empty"),
        ({"positions": 1}, errors.InputError, "positions has 1 of type int for one axis; give a sequence of integers"),
        ({"positions": ["1"]}, errors.InputError, "positions has a list of 1 for one axis; give a sequence of integers"),
        ({"positions": [True]}, errors.InputError, "give a sequence of integers"),
        ({"positions": [0, 1], "axis": (0, 1)}, errors.InputError, "positions has 0 of type int for one axis"),
        ({"positions": 1, "axis": (0, 1)}, errors.InputError, "positions has 1 entries for 2 axes"),
        ({"positions": [0], "axis": None}, errors.InputError, r"positions=\[0\] count along an axis; give axis too"),
        ({"axis": 2}, errors.InputError, "axis=2 is out of range at '0'"),
        ({"axis": -3}, errors.InputError, "axis=-3 is out of range at '0'"),
        ({"axis": (1, -1)}, errors.InputError, r"axis=\(1, -1\) means one axis twice at '0'"),
        ({"axis": 1.5}, errors.InputError, "axis=1.5 is no axis"),
        ({"sites": {"0": [1]}}, errors.SiteError, "sites is a dict with '0'; give addresses alone"),
        ({"sites": ["0", "1"]}, errors.InputError, "positions=None needs the same length along axis at all sites"),
        ({"metric": lambda out: out}, errors.TargetError, r"metric returned a float32 tensor of shape \[2, 5\]"),
        ({"metric": lambda out: 1.0}, errors.TargetError, "metric returned 1.0 of type float"),
        ({"metric": lambda out: out.argmax(-1)}, errors.TargetError, "metric returned a int64 tensor"),
        ({"f": lambda params, x: x}, errors.ModelError, "has no sites"),
    ],
)
def test_bad_input(arguments, error, message):
    f, params = functionalize(nn.Sequential(nn.Identity(), nn.Linear(3, 5)))
    given = {"f": f, "params": params, "clean": A, "corrupted": B, "metric": lambda out: out.sum(), "sites": "0"}
    with pytest.raises(error, match=message):
        activation_patching(**{**given, **arguments})


def test_a_model_that_writes_into_its_own_tensors_runs_once_per_patch():
    """The symptom: vmap refuses to write a patched value into a tensor that is not patched."""

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

        def forward(self, x):
            x = x * 1
            for block in self.blocks:
                x += block(x)
            return x

    f, params = functionalize(Stream().double())
    clean, corrupted = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    sites = [f"blocks.{i}" for i in range(3)]
    with pytest.warns(errors.TdhookWarning, match="vmap cannot run this model"):
        got = activation_patching(f, params, clean, corrupted, lambda out: out.sum(-1), sites=sites)
    _, values = tdhook.capture(f, sites)(params, clean)
    for i, site in enumerate(sites):
        for p in range(3):
            write = lambda value, p=p, site=site: torch.where(torch.arange(3) == p, values[site], value)  # noqa: E731
            CLOSE(got.patched[i, p], intervene(f, {site: write})(params, corrupted).sum(-1))


def test_an_error_of_the_metric_comes_through():
    f, params, clean, corrupted = small()
    seen = []

    def moody(out):
        seen.append(None)
        if len(seen) > 2:
            raise RuntimeError("no more")
        return out.sum()

    with pytest.raises(RuntimeError, match="no more"):
        activation_patching(f, params, clean, corrupted, moody, sites="0")


def test_one_axis_in_a_list_takes_a_list_of_one() -> None:
    f, params = functionalize(nn.Sequential(nn.Identity()))
    run = (f, params, torch.ones(1, 3), torch.zeros(1, 3), lambda out: (out * torch.arange(3.0)).sum())
    assert activation_patching(*run, sites="0", axis=(1,), positions=[[0, 2]]).patched.tolist() == [[0.0, 2.0]]
    assert activation_patching(*run, sites="0", axis=1, positions=[2]).patched.tolist() == [[2.0]]
