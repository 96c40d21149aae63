"""Low-rank updates against their mathematics written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn
from torch.func import grad, vmap

from tdhook import functionalize
from tdhook.core.errors import InputError, ParamsError
from tdhook.weights.lora import energy_ranks, lora_from_difference, lora_init, lora_merge, lora_unmerge
from tdhook.weights.selection import flat


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)).double()


def filled(lora, seed=0):
    torch.manual_seed(seed)
    return lora.apply(torch.randn_like)


def test_the_forward_of_a_linear_layer_is_that_of_peft():
    """y = W x + b + (alpha / r) B A x."""
    linear = nn.Linear(6, 4).double()
    f, params = functionalize(linear)
    lora, x = filled(lora_init(params, 2)), torch.randn(3, 6).double()
    expected = linear(x) + (16 / 2) * (x @ lora["weight", "down"].T) @ lora["weight", "up"].T
    torch.testing.assert_close(f(lora_merge(params, lora, 16 / 2), x), expected.detach())


def test_the_forward_of_a_convolution_is_that_of_peft():
    """A is a convolution to r channels with the kernel, B one of size 1."""
    conv = nn.Conv2d(2, 4, 3, stride=2, padding=1).double()
    f, params = functionalize(conv)
    lora, x = filled(lora_init(params, 3)), torch.randn(2, 2, 7, 7).double()
    assert lora["weight", "down"].shape == (3, 2, 3, 3)
    update = F.conv2d(F.conv2d(x, lora["weight", "down"], stride=2, padding=1), lora["weight", "up"][:, :, None, None])
    torch.testing.assert_close(f(lora_merge(params, lora, 0.5), x), (conv(x) + 0.5 * update).detach())


def test_a_new_update_changes_nothing_and_is_bounded(net):
    _, params = functionalize(net)
    lora = lora_init(params, 2, generator=torch.Generator().manual_seed(0))
    merged = lora_merge(params, lora)
    assert all(torch.equal(a, b) for a, b in zip(flat(merged).values(), flat(params).values()))
    down = lora["3", "weight", "down"]
    assert 0.9 / 6 < down.abs().max() <= 1 / 6 and down.min() < 0 < down.max()


def test_the_generator_decides_and_the_global_one_is_left(net):
    _, params = functionalize(net)
    state = torch.get_rng_state()
    a, b = (lora_init(params, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert (a == b).all()


def test_unmerge_is_the_reverse(net):
    _, params = functionalize(net)
    lora = filled(lora_init(params, 2))
    back = lora_unmerge(lora_merge(params, lora, 0.3), lora, 0.3)
    for key, tensor in flat(params).items():
        torch.testing.assert_close(flat(back)[key], tensor)


def test_what_has_no_update_is_shared_and_nothing_is_changed(net):
    _, params = functionalize(net)
    before = params.clone()
    merged = lora_merge(params, filled(lora_init(params, 2, select="3.weight")))
    assert merged["0", "weight"] is params["0", "weight"] and merged["3", "bias"] is params["3", "bias"]
    assert not torch.equal(merged["3", "weight"], params["3", "weight"])
    assert (params == before).all()


def test_gradient_steps_reduce_a_loss_and_leave_the_model(net):
    f, params = functionalize(net)
    before = params.clone()
    torch.manual_seed(1)
    x, y = torch.randn(8, 2, 5, 5).double(), torch.randint(5, (8,))
    lora = lora_init(params, 2)

    def loss(lora):
        return F.cross_entropy(f(lora_merge(params, lora), x), y)

    losses = []
    for _ in range(40):
        losses.append(loss(lora))
        lora = lora - 0.3 * grad(loss)(lora)
    assert losses[-1] < 0.5 * losses[0]
    assert (params == before).all()


def test_many_scales_and_many_updates_at_once(net):
    f, params = functionalize(net)
    x = torch.randn(2, 2, 5, 5).double()
    loras = [filled(lora_init(params, 2), seed) for seed in range(3)]
    scales = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    by_scale = vmap(lambda s: f(lora_merge(params, loras[0], s), x))(scales)
    torch.testing.assert_close(by_scale, torch.stack([f(lora_merge(params, loras[0], float(s)), x) for s in scales]))
    by_lora = vmap(lambda lora: f(lora_merge(params, lora), x))(torch.stack(loras))
    torch.testing.assert_close(by_lora, torch.stack([f(lora_merge(params, lora), x) for lora in loras]))


def test_the_update_from_a_difference_is_the_best_of_its_rank():
    torch.manual_seed(0)
    base = TensorDict(w=torch.randn(5, 7).double(), b=torch.randn(5).double())
    tuned = TensorDict(w=torch.randn(5, 7).double(), b=torch.randn(5).double())
    singular = torch.linalg.svdvals(tuned["w"] - base["w"])
    for r in range(1, 6):
        merged = lora_merge(base, lora_from_difference(tuned, base, r))
        torch.testing.assert_close((tuned["w"] - merged["w"]).norm(), singular[r:].square().sum().sqrt(), atol=1e-12, rtol=1e-9)
        assert merged["b"] is base["b"]


def test_the_update_of_a_convolution_from_a_difference(net):
    _, base = functionalize(net)
    lora = filled(lora_init(base, 2))
    tuned = lora_merge(base, lora)
    got = lora_from_difference(tuned, base, 2)
    torch.testing.assert_close(lora_merge(base, got)["0", "weight"], tuned["0", "weight"])


def test_ranks_from_the_spectrum(net):
    _, base = functionalize(net)
    tuned = lora_merge(base, filled(lora_init(base, {"0": 1, "3": 3})))
    assert energy_ranks(tuned, base, 1 - 1e-9) == {"0.weight": 1, "3.weight": 3}
    assert energy_ranks(base, base) == {"0.weight": 1, "3.weight": 1}
    ranks = energy_ranks(tuned, base, 0.5)
    lora = lora_from_difference(tuned, base, ranks)
    left = lora_merge(base, lora)["3", "weight"] - tuned["3", "weight"]
    whole = tuned["3", "weight"] - base["3", "weight"]
    assert left.square().sum() <= 0.5 * whole.square().sum()
    assert energy_ranks(TensorDict(w=torch.eye(4)), TensorDict(w=torch.zeros(4, 4)), 1.0) == {"w": 4}


def test_dtypes_are_kept(net):
    half = functionalize(net.to(torch.bfloat16))[1]
    lora = lora_init(half, 2)
    assert all(t.dtype is torch.bfloat16 for t in flat(lora).values())
    assert lora_merge(half, lora, torch.tensor(0.5))["3", "weight"].dtype is torch.bfloat16
    assert lora_from_difference(half, half, 1)["3", "weight", "up"].dtype is torch.bfloat16


def test_memory_mapped_params(net, tmp_path):
    mapped = functionalize(net)[1].memmap(tmp_path)
    merged = lora_merge(mapped, filled(lora_init(mapped, 1, select="3.weight")))
    assert merged["0"].get("weight") is mapped["0"].get("weight")
    assert not torch.equal(merged["3", "weight"], mapped["3", "weight"])


@pytest.mark.compile
def test_compiled_equals_eager(net):
    f, params = functionalize(net)
    lora, x = filled(lora_init(params, 2)), torch.randn(2, 2, 5, 5).double()
    run = torch.compile(lambda lora: f(lora_merge(params, lora, 0.5), x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(lora), f(lora_merge(params, lora, 0.5), x))


def test_bad_ranks(net):
    _, params = functionalize(net)
    with pytest.raises(InputError, match=r"rank=5 is more than '0.weight' can have: 4"):
        lora_init(params, 5)
    with pytest.raises(InputError, match=r"rank=6 is more than '3.weight' can have: 5"):
        lora_from_difference(params, params, 6, select="3.weight")
    with pytest.raises(InputError, match="rank is an integer of at least 1"):
        lora_init(params, 0)
    with pytest.raises(ParamsError, match="rank='9': params has no such parameter"):
        lora_init(params, {"9": 2})
    with pytest.raises(ParamsError, match="rank names no weight of two dimensions"):
        lora_init(params, {"3": 2}, select="0.weight")
    with pytest.raises(ParamsError, match="with 2 dimensions or more"):
        lora_init(params, 2, select="3.bias")
    for energy in (0.0, 1.5, True):
        with pytest.raises(InputError, match=r"energy=.* is a share"):
            energy_ranks(params, params, energy)
    with pytest.raises(InputError, match="chooses shapes by value"):
        vmap(lambda p: torch.tensor(energy_ranks(p, p)["0.weight"]))(torch.stack([params, params]))


def test_updates_and_params_that_do_not_fit(net):
    _, params = functionalize(net)
    lora = lora_init(params, 2)
    with pytest.raises(ParamsError, match=r"lora updates '0.weight', which params has not"):
        lora_merge(params.select("3"), lora)
    with pytest.raises(ParamsError, match="which do not fit"):
        lora_merge(params, TensorDict({"3": {"weight": {"down": torch.ones(2, 35), "up": torch.ones(5, 2)}}}))
    with pytest.raises(ParamsError, match="which do not fit"):
        lora_merge(params, TensorDict({"3": {"weight": {"down": torch.ones(3, 36), "up": torch.ones(5, 2)}}}))
    with pytest.raises(ParamsError, match="lora holds 'down' and 'up'"):
        lora_merge(params, params)
    with pytest.raises(ParamsError, match=r"base has no '3.weight', which finetuned has"):
        lora_from_difference(params, params.exclude(("3", "weight")), 1)
