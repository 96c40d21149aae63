"""The main job on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tdhook import capture, functionalize, start_from, stop_at, trace
from tdhook.attribution import convergence_delta, integrated_gradients
from tdhook.core.errors import InputError
from tdhook.latent import activation_patching

from .core import zoo

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
]
CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


def both():
    """The same model and inputs on the CPU and on the GPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    f, params = functionalize(model)
    x, y = torch.randn(2, 3, 6).double()
    return f, (params, x, y), (params.to("cuda"), x.cuda(), y.cuda())


@pytest.mark.parametrize("at", [None, "2"])
def test_integrated_gradients_equal_those_of_the_cpu(at):
    f, (params, x, baseline), (gpu_params, gpu_x, gpu_baseline) = both()
    options = {"targets": [0, 3], "at": at, "chunk_size": 7}
    expected = integrated_gradients(f, params, x, baselines=baseline, **options)
    got = integrated_gradients(f, gpu_params, gpu_x, baselines=gpu_baseline, **options)
    pick = (lambda r: r) if at is None else (lambda r: r[at])
    assert pick(got).is_cuda
    CLOSE(pick(got).cpu(), pick(expected))
    delta = convergence_delta(f, gpu_params, gpu_x, got, targets=[0, 3], baselines=gpu_baseline, at=at)
    assert delta.is_cuda and delta.abs().max() < 1e-2


def test_patching_equals_that_of_the_cpu():
    f, (params, clean, corrupted), (gpu_params, gpu_clean, gpu_corrupted) = both()
    metric = lambda out: out[:, 0] - out[:, 1]  # noqa: E731
    expected = activation_patching(f, params, clean, corrupted, metric, sites=["0", "2"], chunk_size=3)
    got = activation_patching(f, gpu_params, gpu_clean, gpu_corrupted, metric, sites=["0", "2"], chunk_size=3)
    CLOSE(got.patched.cpu(), expected.patched)


def test_patching_a_language_model():
    torch.manual_seed(0)
    model, inputs = zoo._llama()
    f, params = functionalize(model.double().cuda(), use_cache=False)
    clean = inputs["input_ids"].cuda()
    corrupted = (clean + (torch.arange(6, device="cuda") == 2)) % 30
    metric = lambda out: out.logits[:, -1, 0]  # noqa: E731
    got = activation_patching(f, params, clean, corrupted, metric, sites=["model.layers.0", "model.layers.1"])
    for i in range(2):
        _, values = capture(f, f"model.layers.{i}")(params, clean)
        mixed = stop_at(f, f"model.layers.{i}")(params, corrupted)
        mixed[:, 2] = values[f"model.layers.{i}"][:, 2]
        CLOSE(got.patched[i, 2], metric(start_from(f, f"model.layers.{i}")(params, corrupted, mixed)))


def test_trace_computes_nothing_on_the_device():
    f, _, (params, x, _) = both()
    trace(f, params, x)  # whatever torch sets up once
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert trace(f, params, x)["4"].shape == (3, 5)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.compile
def test_compiled():
    torch._dynamo.reset()
    f, _, (params, x, y) = both()
    compiled = torch.compile(partial(integrated_gradients, targets=[0, 1], steps=8), fullgraph=True)
    CLOSE(compiled(f, params, x), integrated_gradients(f, params, x, targets=[0, 1], steps=8))

    def patch(clean, corrupted):
        return activation_patching(f, params, clean, corrupted, lambda out: out[:, 0], sites=["0", "2"]).patched

    CLOSE(torch.compile(patch, fullgraph=True)(x, y), patch(x, y))


def test_baselines_on_another_device_are_refused():
    f, _, (params, x, _) = both()
    with pytest.raises(InputError, match=r"on cpu for .* on cuda:0"):
        integrated_gradients(f, params, x, targets=0, baselines=x.cpu())
