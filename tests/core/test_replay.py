"""`Tape`: when a run was at its sites, and runs that go on only until all is known."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from tdhook import capture, functionalize, intervene
from tdhook.core.replay import Tape
from tdhook.core.transforms import resolve

CLOSE = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
RUNS: list[str] = []


class Part(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name, self.linear = name, nn.Linear(3, 3)

    def forward(self, x):
        RUNS.append(self.name)
        return self.linear(x).tanh()


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = map(Part, "abcd")

    def forward(self, x):
        for part in (self.a, self.b, self.c, self.d):
            x = x + part(x)
        return x


@pytest.fixture
def taped():
    torch.manual_seed(0)
    f, params = functionalize(Stream().double())
    x = torch.randn(2, 3).double()

    def make(*sites):
        tape = Tape(f, params, x, resolve(f, list(sites)))
        RUNS.clear()
        return tape, *resolve(f, list(sites))

    yield f, params, x, make
    RUNS.clear()


def test_times_and_values_are_in_the_order_of_the_run(taped):
    *_, make = taped
    tape, out, after, inner, before = make("c", "d:in", "c.linear", "b:in")
    assert list(tape.values) == [before, inner, out, after]
    times = [tape.time_of(want) for want in (before, inner, out, after)]
    assert times == sorted(times) and len(set(times)) == 4


def test_two_values_at_one_time(taped):
    *_, make = taped
    tape, first, second = make("b/tanh:in", "b/tanh")
    assert tape.time_of(first) == tape.time_of(second)


def test_a_run_ends_at_the_last_value_asked_for(taped):
    f, params, x, make = taped
    tape, b, c, d = make("b", "c:in", "c")
    new = torch.ones(2, 3).double()
    found = tape.resume_until({b: new}, (c, d))
    assert RUNS == ["c"]
    _, expected = capture(intervene(f, {"b": new}), ["c:in", "c"])(params, x)
    CLOSE(found[c], expected["c:in"])
    CLOSE(found[d], expected["c"])


def test_values_are_read_before_they_are_written(taped):
    f, params, x, make = taped
    tape, b, c, d = make("b", "c", "d")
    found = tape.resume_until({b: lambda value: 2 * value, c: lambda value: 0 * value, d: lambda value: value + 1}, (c, b))
    CLOSE(found[b], tape.values[b])
    CLOSE(found[c], capture(intervene(f, {"b": lambda value: 2 * value}), "c")(params, x)[1]["c"])


def test_a_value_before_the_first_write_is_that_of_the_tape(taped):
    *_, make = taped
    tape, a, inner, c = make("a", "b.linear", "c")
    found = tape.resume_until({c: lambda value: 2 * value}, (a, inner))
    assert found[a] is tape.values[a] and found[inner] is tape.values[inner] and not RUNS
    later = tape.resume_until({inner: lambda value: 2 * value}, (a, c))
    assert later[a] is tape.values[a] and not later[c].equal(tape.values[c])


def test_under_vmap_and_grad(taped):
    f, params, x, make = taped
    tape, a, c = make("a", "c")
    values = torch.randn(4, 2, 3).double()
    together = vmap(lambda value: tape.resume_until({a: value}, (c,))[c])(values)
    CLOSE(together, torch.stack([tape.resume_until({a: value}, (c,))[c] for value in values]))
    slope = grad(lambda value: tape.resume_until({a: value}, (c,))[c].sum())(values[0])
    CLOSE(slope, grad(lambda value: capture(intervene(f, {"a": value}), "c")(params, x)[1]["c"].sum())(values[0]))


@pytest.mark.compile
def test_compiled(taped):
    f, params, x, _ = taped
    a, c = resolve(f, ["a", "c"])

    def run(x):
        return Tape(f, params, x, (a, c)).resume_until({a: lambda value: 2 * value}, (c,))[c]

    torch._dynamo.reset()
    CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))
