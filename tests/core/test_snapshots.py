"""Copies that are made at the first write: what was read stays what it was, whatever is written where, and by whom."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tdhook import capture, functionalize
from tdhook.core.compat import snapshot

WRITES = {
    "add": lambda x: x.add_(1),
    "relu": lambda x: nn.functional.relu(x, inplace=True),
    "slice": lambda x: x[:, 1:].zero_(),
    "view": lambda x: x.view(-1)[3:].mul_(2),
    "out": lambda x: torch.neg(x, out=x),
    "mask": lambda x: x.masked_fill_(x > 0, 0),
    "foreach": lambda x: torch._foreach_add_([x], 1.0),
    "numpy": lambda x: x.numpy().fill(0),
}
lazily = pytest.mark.skipif(not hasattr(torch, "_lazy_clone"), reason="this torch copies at once")
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


@lazily
def test_a_small_tensor_is_copied_at_once():
    x = torch.randn(3)
    taken = snapshot(x)
    assert not torch._C._is_cow_tensor(x) and torch.equal(taken, x) and taken is not x


@every_write
def test_a_write_into_one_does_not_show_in_the_other(write):
    for first in (True, False):
        x = torch.randn(200, 200)
        before, taken = x.clone(), snapshot(x)
        write(x if first else taken)
        assert torch.equal(taken if first else x, before)
        assert not torch.equal(x, taken)


def test_many_of_one_tensor():
    x = torch.randn(200, 200)
    before = x.clone()
    first, second = snapshot(x), snapshot(snapshot(x))
    first.zero_()
    x.add_(1)
    assert torch.equal(second, before) and torch.equal(x, before + 1) and not first.any()


@lazily
def test_no_memory_is_taken_before_a_write():
    x = torch.randn(200, 200)
    key = lambda t: t.storage_offset() if torch._C._is_cow_tensor(t) else None  # noqa: E731
    taken = snapshot(x)
    assert key(x) == key(taken) == 0
    taken.add_(1)
    assert key(taken) is None


@lazily
@pytest.mark.parametrize(
    "part",
    [lambda x: x[:200], lambda x: x[:, :200], lambda x: x.T, lambda x: x[:1].expand(400, 400)],
    ids=["rows", "column", "transposed", "expanded"],
)
def test_of_a_part_the_whole_is_not_kept(part):
    x = torch.randn(400, 400)
    taken = snapshot(part(x))
    assert torch.equal(taken, part(x)) and not torch._C._is_cow_tensor(taken)
    taken.zero_()
    assert x.any()


@lazily
def test_memory_that_is_not_torchs_own(tmp_path):
    array, ones = np.ones(40000, dtype=np.float32), torch.ones(40000)
    torch.save(ones, tmp_path / "file")
    for x in (torch.from_numpy(array), torch.load(tmp_path / "file", mmap=True), ones.clone().share_memory_()):
        taken = snapshot(x)
        x.add_(1)
        assert torch.equal(taken, ones)
    assert array[0] == 2  # written through, as ever


def test_gradients_pass():
    x = torch.randn(40000, requires_grad=True)
    taken = snapshot(x * 2)
    (gradient,) = torch.autograd.grad((taken**2).sum(), x, create_graph=True)
    assert torch.allclose(gradient, 8 * x)
    y = x * 3
    taken = snapshot(y)
    y.relu_()
    assert torch.equal(torch.autograd.grad(taken.sum(), x)[0], torch.full_like(x, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_dtypes(dtype):
    x = torch.ones(70000, dtype=dtype)
    assert torch.equal(snapshot(x), x) and snapshot(x).dtype == dtype


@lazily
def test_under_transforms_compilation_and_inference_mode():
    x = torch.randn(200, 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(torch.vmap(snapshot)(x), x)
        assert torch.equal(torch.func.grad(lambda x: snapshot(x).sum())(x), torch.ones_like(x))
        assert torch.equal(torch.compile(snapshot, fullgraph=True, backend="aot_eager")(x), x)
    with torch.inference_mode():
        taken = snapshot(y := x * 1)
        y.zero_()
        assert torch.equal(taken, x)


def test_copying_and_saving_what_was_taken():
    x = torch.randn(40000)
    taken = snapshot(x)
    file = io.BytesIO()
    torch.save(taken, file)
    file.seek(0)
    assert torch.equal(torch.load(file), x) and torch.equal(copy.deepcopy(taken), x)


def test_a_value_read_twice_and_returned_may_be_written_into_each_by_itself():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 200), nn.Identity(), nn.Dropout()).eval())
    x = torch.randn(200, 3)
    with torch.no_grad():
        output, values = capture(f, ["0", "1", "2:in", "2"])(params, x)
        before = output.clone()
        output.zero_()
        values["1"].add_(1)
        assert all(torch.equal(values[site], before) for site in ("0", "2:in", "2"))
        assert torch.equal(f(params, x), before)
