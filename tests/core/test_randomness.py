"""Random numbers: generators, devices, draws that chunks do not change."""

from __future__ import annotations

import pytest
import torch

from tdhook.core import errors
from tdhook.core.randomness import (
    integers,
    normal,
    normal_like,
    require_generator,
    stacked,
    uniform,
    uniform_like,
    uniform_rows,
)

CPU = torch.device("cpu")
DRAWS = {
    "uniform": lambda generator, device=CPU: uniform((3, 4), generator, device, torch.float64),
    "normal": lambda generator, device=CPU: normal((3, 4), generator, device, torch.float64),
    "integers": lambda generator, device=CPU: integers(0, 10**9, (3, 4), generator, device),
    "uniform_like": lambda generator, device=CPU: uniform_like(
        torch.empty(3, 4, dtype=torch.float64, device=device), generator
    ),
    "normal_like": lambda generator, device=CPU: normal_like(torch.empty(3, 4, dtype=torch.float64, device=device), generator),
}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@every_draw
def test_a_generator_is_the_only_source(draw):
    before = torch.get_rng_state()
    generator = seeded()
    first = draw(generator)
    assert first.shape == (3, 4) and torch.equal(draw(seeded()), first) and not torch.equal(draw(generator), first)
    assert torch.equal(torch.get_rng_state(), before)


@every_draw
def test_without_a_generator_torchs_own_is_the_source(draw):
    torch.manual_seed(0)
    first = draw(None)
    torch.manual_seed(0)
    assert torch.equal(draw(None), first)


@every_draw
def test_a_generator_draws_on_its_own_device(draw):
    moved, left = seeded(), seeded()
    assert draw(moved, torch.device("meta")).device.type == "meta"
    draw(left)
    assert torch.equal(moved.get_state(), left.get_state())


def test_ranges_and_dtypes():
    drawn = uniform((10_000,), seeded(), CPU)
    assert drawn.dtype == torch.float32 and 0 <= drawn.min() < 0.01 and 0.99 < drawn.max() < 1
    drawn = normal((10_000,), seeded(), CPU)
    assert drawn.mean().abs() < 0.05 and (drawn.std() - 1).abs() < 0.05
    assert integers(-1, 2, (1000,), seeded(), CPU).unique().tolist() == [-1, 0, 1]
    assert normal_like(torch.ones(2, dtype=torch.bfloat16), seeded()).dtype == torch.bfloat16


def test_chunks_of_draws_are_parts_of_one():
    pair = lambda generator: lambda: [uniform((2,), generator, CPU), normal((3, 1), generator, CPU)]  # noqa: E731
    whole = stacked(pair(seeded()), 7)
    generator = seeded()
    parts = [stacked(pair(generator), n) for n in (3, 1, 3)]
    assert [each.shape for each in whole] == [(7, 2), (7, 3, 1)]
    assert all(torch.equal(torch.cat(each), w) for each, w in zip(zip(*parts), whole))
    generator = seeded()
    rows = torch.cat([uniform_rows(n, 20, generator, CPU) for n in (5, 2)])
    assert torch.equal(rows, uniform_rows(7, 20, seeded(), CPU))


def test_what_is_no_generator():
    require_generator(None)
    require_generator(seeded())
    with pytest.raises(errors.InputError, match=r"generator is 0 of type int; give a torch.Generator, torch.Generator\(\)"):
        require_generator(0)
