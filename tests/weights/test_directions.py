"""Weight orthogonalisation: what was removed is never written again, and nothing else changes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import vmap

from tdhook import capture, functionalize
from tdhook.core import errors
from tdhook.weights.directions import orthogonalize

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
WRITERS = {"embed.weight": 1, "out.*.weight": 0, "out.*.bias": 0}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.up = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.stream = nn.ModuleList(nn.Identity() for _ in range(3))

    def forward(self, ids):
        h = self.stream[0](self.embed(ids))
        for up, out, stream in zip(self.up, self.out, self.stream[1:]):
            h = stream(h + out(up(h).relu()))
        return h


def setting():
    torch.manual_seed(0)
    f, params = functionalize(Residual().double())
    return f, params, torch.randint(10, (3, 4)), torch.randn(6).double()


@pytest.mark.parametrize("scale", [1.0, 100.0, -1e-3])
def test_nothing_writes_along_the_direction(scale):
    f, params, ids, direction = setting()
    edited = orthogonalize(params, direction * scale, WRITERS)
    _, streams = capture(f, "stream.*")(edited, ids)
    for value in streams.values():
        assert (value @ direction).abs().max() < 1e-12


def test_everything_across_the_direction_stays():
    _, params, _, direction = setting()
    edited = orthogonalize(params, direction, WRITERS)
    across = torch.randn(6).double()
    across = across - direction * (across @ direction) / (direction @ direction)
    CLOSE(across @ edited["out", "0", "weight"], across @ params["out", "0", "weight"])
    CLOSE(edited["embed", "weight"] @ across, params["embed", "weight"] @ across)
    CLOSE(edited["out", "0", "bias"] @ across, params["out", "0", "bias"] @ across)
    assert torch.equal(edited["up", "0", "weight"], params["up", "0", "weight"])


def test_the_formula_and_that_it_is_a_projection():
    _, params, _, direction = setting()
    edited = orthogonalize(params, direction, WRITERS)
    p = torch.eye(6).double() - torch.outer(direction, direction) / (direction @ direction)
    CLOSE(edited["out", "1", "weight"], p @ params["out", "1", "weight"])
    CLOSE(edited["embed", "weight"], params["embed", "weight"] @ p)
    again = orthogonalize(edited, direction, WRITERS)
    CLOSE(again["embed", "weight"], edited["embed", "weight"])


def test_a_subspace_is_all_its_directions_one_after_the_other():
    _, params, _, _ = setting()
    torch.manual_seed(1)
    rows = torch.linalg.qr(torch.randn(6, 2).double()).Q.mT
    mixed = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).double() @ rows
    together = orthogonalize(params, mixed, WRITERS)
    one_by_one = orthogonalize(orthogonalize(params, rows[0], WRITERS), rows[1], WRITERS)
    for key in together.keys(True, True):
        CLOSE(together[key], one_by_one[key])


def test_the_axis_is_found_where_only_one_fits():
    torch.manual_seed(0)
    _, params = functionalize(nn.ModuleDict({"embed": nn.Embedding(10, 6), "out": nn.Linear(4, 6)}).double())
    direction = torch.randn(6).double()
    edited = orthogonalize(params, direction, ["embed", "out"])
    assert (edited["embed", "weight"] @ direction).abs().max() < 1e-12
    assert (direction @ edited["out", "weight"]).abs().max() < 1e-12
    assert (direction @ edited["out", "bias"]).abs() < 1e-12


def test_strengths_under_vmap():
    _, params, _, direction = setting()
    half, reflected = vmap(lambda s: orthogonalize(params, direction, WRITERS, strength=s)["embed", "weight"])(
        torch.tensor([0.5, 2.0]).double()
    )
    written = params["embed", "weight"] @ direction
    CLOSE(half @ direction, written / 2)
    CLOSE(reflected @ direction, -written)
    CLOSE(orthogonalize(params, direction, WRITERS, strength=0.0)["embed", "weight"], params["embed", "weight"])


@pytest.mark.compile
def test_compiled():
    _, params, _, direction = setting()

    def edit(params, direction):
        return orthogonalize(params, direction, WRITERS)["embed", "weight"]

    CLOSE(torch.compile(edit, backend="aot_eager", fullgraph=True)(params, direction), edit(params, direction))


def test_dtypes_and_the_params_that_were_given():
    _, params, _, direction = setting()
    low = params.apply(lambda p: p.bfloat16())
    before = low.clone()
    edited = orthogonalize(low, direction.float(), WRITERS)
    assert edited["embed", "weight"].dtype == torch.bfloat16
    assert all(torch.equal(low[key], before[key]) for key in before.keys(True, True))


def test_memory_mapped_parameters_stay_mapped():
    _, params, _, direction = setting()
    mapped = params.memmap()
    edited = orthogonalize(mapped, direction, WRITERS)
    assert type(edited["up", "0", "weight"]) is type(mapped["up", "0", "weight"])
    CLOSE(edited["embed", "weight"], orthogonalize(params, direction, WRITERS)["embed", "weight"])


def test_bad_input():
    _, params, _, direction = setting()
    with pytest.raises(errors.InputError, match="more than one axis could write 6 numbers"):
        orthogonalize(params, direction, "out.0.weight")
    with pytest.raises(errors.InputError, match=r"direction has 5 numbers, but 'embed.weight' has shape"):
        orthogonalize(params, direction[:5], "embed")
    with pytest.raises(errors.InputError, match=r"writers says axis 0 of 'embed.weight'"):
        orthogonalize(params, direction, {"embed.weight": 0})
    with pytest.raises(errors.InputError, match="direction is zero"):
        orthogonalize(params, direction * 0, WRITERS)
    with pytest.raises(errors.InputError, match="depend on each other linearly"):
        orthogonalize(params, torch.stack([direction, -direction]), WRITERS)
    with pytest.raises(errors.InputError, match="give a floating-point tensor"):
        orthogonalize(params, torch.ones(6, dtype=torch.long), WRITERS)
    with pytest.raises(errors.ParamsError, match="no such parameter or module"):
        orthogonalize(params, direction, "outputs.*.weight")
