"""Activation data against plain hooks; what is on disk after interruptions; memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import tdhook
from tdhook import functionalize
from tdhook.core import errors
from tdhook.latent.activation_store import open_activations
from tdhook.latent.collection import collect

from ..core import zoo

EXACT = partial(torch.testing.assert_close, rtol=0, atol=0)


def hooked(model, batches, paths, index=0):
    """What forward hooks see, a list of values by path."""
    found = {path: [] for path in paths}

    def keep(path, module, args, output):
        found[path].append((output if isinstance(output, Tensor) else output[index]).clone())

    handles = [model.get_submodule(path).register_forward_hook(partial(keep, path)) for path in paths]
    with torch.no_grad():
        for batch in batches:
            zoo.call(model, batch)
    for handle in handles:
        handle.remove()
    return found


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def sequences():
    """A model of tokens [B, L, 3] -> [B, L, 2] with its function and parameters."""
    return functionalize(mlp())


def language_model():
    torch.manual_seed(0)
    return zoo._gpt2()[0]


def padded(left: bool, lengths=(4, 1, 3), width=5):
    """Token ids with a mask; what stands at the padding is random, too."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(1, 30, (len(lengths), width), generator=generator)
    steps = torch.arange(width).expand(len(lengths), width)
    n = torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": ((steps >= width - n) if left else (steps < n)).long()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Boom(Exception):
    pass


def interrupted(batches, at):
    for number, batch in enumerate(batches):
        if number == at:
            raise Boom
        yield batch


# What is collected ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_rows_are_what_hooks_see(size):
    model, x = mlp(), torch.randn(7, 3)
    f, params = functionalize(model)
    rows = collect(f, params, x.split(size), ["2", "0"])
    seen = hooked(model, x.split(size), ["0", "2"])
    assert list(rows.keys()) == ["2", "0"] and rows.batch_size == (7,)
    for site in ("0", "2"):
        EXACT(rows[site], torch.cat(seen[site]))


def test_language_model_with_patterns_masks_and_the_output():
    model, batches = language_model(), [padded(False), padded(True, (2, 5))]
    f, params = functionalize(model, use_cache=False)
    rows = collect(f, params, batches, ["transformer.h.*.mlp", "transformer.h.*.attn:out[0]", ":out[logits]"], pool="rows")
    sites = [
        "transformer.h.0.mlp",
        "transformer.h.1.mlp",
        "transformer.h.0.attn:out[0]",
        "transformer.h.1.attn:out[0]",
        ":out[logits]",
    ]
    assert list(rows.keys()) == [*sites, "example", "position"]
    seen = hooked(model, batches, ["transformer.h.0.mlp", "transformer.h.1.attn", "lm_head"])
    masks = [batch["attention_mask"].bool() for batch in batches]
    for site, path in (
        ("transformer.h.0.mlp",) * 2,
        ("transformer.h.1.attn:out[0]", "transformer.h.1.attn"),
        (":out[logits]", "lm_head"),
    ):
        EXACT(rows[site], torch.cat([value[mask] for value, mask in zip(seen[path], masks)]))
    assert rows["example"].tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 4, 4, 4, 4, 4]
    assert rows["position"].tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_vision_transformer():
    case = zoo.named("vit")[0]
    model, inputs = case()
    f, params = functionalize(model)
    path = next(name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm) and "1" in name)
    seen = hooked(model, [inputs], [path])[path][0]
    EXACT(collect(f, params, [inputs], path, pool=0)[path], seen[:, 0])
    torch.testing.assert_close(collect(f, params, [inputs], path, pool="mean")[path], seen.mean(1))


def test_tuples_tensordicts_and_several_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.LSTM(3, 4, batch_first=True)

        def forward(self, a, b):
            return self.inner(a + b)

    f, params = functionalize(Two())
    a, b = torch.randn(5, 6, 3), torch.randn(5, 6, 3)
    sites = ["inner:out[0]", "inner:in"]
    from_tuples = collect(f, params, [(a[:3], b[:3]), (a[3:], b[3:])], sites)
    EXACT(from_tuples["inner:in"], a + b)
    for batch_size in ([5], []):
        for chunk_size in (None, 2):
            batches = [TensorDict({"a": a, "b": b}, batch_size=batch_size)]
            rows = collect(f, params, batches, sites, chunk_size=chunk_size)
            torch.testing.assert_close(rows["inner:out[0]"], from_tuples["inner:out[0]"])


def test_chunks_change_nothing():
    f, params = functionalize(language_model(), use_cache=False)
    batches = [padded(True), padded(False, (5, 1, 2, 4))]
    for pool in ("rows", "mean", "last"):
        whole = collect(f, params, batches, "transformer.h.1.mlp", pool=pool)
        for chunk_size in (1, 2, 50):
            parts = collect(f, params, batches, "transformer.h.1.mlp", pool=pool, chunk_size=chunk_size)
            for name in whole.keys():
                torch.testing.assert_close(parts[name], whole[name])


def test_labels_are_kept_next_to_the_rows():
    f, params = sequences()
    data = torch.utils.data.TensorDataset(torch.randn(5, 2, 3), torch.arange(5) * 10)
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    options = dict(inputs_of=lambda batch: batch[0], keep=lambda batch: {"label": batch[1]})
    assert collect(f, params, loader, "0", **options)["label"].tolist() == [0, 10, 20, 30, 40]
    assert collect(f, params, loader, "0", pool="rows", chunk_size=1, **options)["label"].tolist() == [
        label for label in range(0, 50, 10) for _ in range(2)
    ]


def test_the_result_shares_nothing_with_the_caller():
    f, params = sequences()
    x, labels = torch.randn(5, 3), torch.arange(5)
    rows = collect(f, params, [x], "0:in", keep=lambda batch: {"label": labels})
    rows["0:in"].zero_()
    rows["label"].zero_()
    assert x.abs().sum() > 0 and labels.tolist() == [0, 1, 2, 3, 4]


# Positions --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("pool", "expected"), [
    ("mean", lambda value: value.mean(0)),
    ("max", lambda value: value.amax(0)),
    ("last", lambda value: value[-1]),
    (-1, lambda value: value[-1]),
    (0, lambda value: value[0]),
])  # fmt: skip
def test_pools_see_no_padding(left, pool, expected):
    f, params = sequences()
    lengths = (4, 1, 3)
    mask = padded(left, lengths)["attention_mask"].bool()
    x = torch.randn(3, 5, 3).masked_fill(~mask[..., None], torch.nan)
    rows = collect(f, params, [x], "0", pool=pool, positions=lambda batch: mask)["0"]
    real = [tdhook.stop_at(f, "0")(params, x[i][mask[i]]) for i in range(3)]
    torch.testing.assert_close(rows, torch.stack([expected(value) for value in real]))


def test_without_a_mask_all_positions_count():
    f, params = sequences()
    x = torch.randn(4, 6, 3)
    value = tdhook.stop_at(f, "0")(params, x)
    for pool, expected in (("mean", value.mean(1)), ("max", value.amax(1)), ("last", value[:, -1]), (2, value[:, 2])):
        torch.testing.assert_close(collect(f, params, [x], "0", pool=pool)["0"], expected)
    EXACT(collect(f, params, [x], "0", pool=-3)["0"], value[:, 3])
    EXACT(collect(f, params, [x], "0", pool="rows")["0"], value.flatten(0, 1))


def test_a_mask_by_name_and_by_function():
    f, params = functionalize(language_model(), use_cache=False)
    batch = padded(False)
    by_default = collect(f, params, [batch], "transformer.h.0.mlp", pool="mean")
    by_name = collect(f, params, [batch], "transformer.h.0.mlp", pool="mean", positions="attention_mask")
    EXACT(by_name["transformer.h.0.mlp"], by_default["transformer.h.0.mlp"])
    ids = batch["input_ids"]
    rows = collect(
        f, params, [{"input_ids": ids}], "transformer.h.0.mlp", pool="rows", positions=lambda b: b["input_ids"] != ids[0, 0]
    )
    assert torch.equal(ids[rows["example"], rows["position"]], ids[ids != ids[0, 0]])


def test_places_of_an_image_are_positions():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
    f, params = functionalize(model)
    x = torch.randn(3, 2, 5, 6)
    value = model(x).detach()
    rows = collect(f, params, [x], "1", pool="rows", axis=(2, 3))
    EXACT(rows["1"], value.movedim(1, -1).reshape(-1, 4))
    assert rows["position"][:12].tolist() == list(range(12)) and rows["example"][12] == 1
    torch.testing.assert_close(collect(f, params, [x], "1", pool="mean", axis=(-2, -1))["1"], value.mean((2, 3)))
    own = collect(f, params, [x], "1", pool=lambda value, mask: value.amax((2, 3)))
    EXACT(own["1"], value.amax((2, 3)))


def test_a_mean_is_taken_in_float32_at_least():
    f, params = functionalize(nn.Identity())
    x = torch.cat([torch.full((1, 1000, 1), 1.0), torch.full((1, 1000, 1), 1 + 2**-7)], 1).bfloat16()
    exact = collect(f, params, [x], ":out", pool="mean", dtype=torch.float32)[":out"]
    assert exact.item() == 1 + 2**-8
    assert collect(f, params, [x], ":out", pool="mean")[":out"].dtype == torch.bfloat16
    assert collect(f, params, [torch.tensor([[1, 2]])], ":out", pool="mean")[":out"].item() == 1.5


# On disk ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("total", [None, 35])
def test_what_is_on_disk_is_what_is_in_memory(tmp_path, dtype, total):
    f, params = sequences()
    options = dict(pool="rows", dtype=dtype, total=total, keep=lambda x: {"flag": x[:, 0, 0] > 0, "nothing": x[:, 0, :0]})
    batches = torch.randn(7, 5, 3).split(3)
    rows = collect(f, params, batches, ["0", "2"], **options)
    written = collect(f, params, iter(batches), ["0", "2"], path=tmp_path / "new" / "folder", **options)
    assert written["0"].dtype == rows["0"].dtype == dtype and rows["flag"].dtype == torch.bool
    assert list(written.keys()) == list(rows.keys()) and written.batch_size == rows.batch_size == (35,)
    for name in rows.keys():
        EXACT(written[name], rows[name])


@pytest.mark.parametrize("total", [None, 35, 50])
def test_resumed_at_every_batch_it_is_bit_for_bit_the_same(tmp_path, total):
    f, params = sequences()
    batches = torch.randn(7, 5, 3).split(2)
    run = partial(collect, f, params, sites=["0", "2"], pool="rows", total=total)
    run(batches, path=tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert set(expected) == {"activations.json", "0.rows", "1.rows", "2.rows", "3.rows"}
    for at in range(len(batches) + 1):
        folder = tmp_path / str(at)
        if at < len(batches):
            with pytest.raises(Boom):
                run(interrupted(batches, at), path=folder, resume=True)
        run(batches, path=folder, resume=True)
        assert contents(folder) == expected
        run(batches, path=folder, resume=True)
        assert contents(folder) == expected


def test_half_a_batch_is_forgotten(tmp_path):
    """Interrupted between the files of a batch: some have more rows than the record says."""
    f, params = sequences()
    batches = torch.randn(6, 3).split(2)
    collect(f, params, batches, ["0", "2"], path=tmp_path / "whole")
    with pytest.raises(Boom):
        collect(f, params, interrupted(batches, 2), ["0", "2"], path=tmp_path / "half")
    with (tmp_path / "half" / "0.rows").open("ab") as file:
        file.write(b"half of a row")
    assert open_activations(tmp_path / "half").batch_size == (4,)
    collect(f, params, batches, ["0", "2"], path=tmp_path / "half", resume=True)
    assert contents(tmp_path / "half") == contents(tmp_path / "whole")


def test_what_is_there_is_not_computed_again(tmp_path):
    f, params = sequences()
    calls = []

    def pool(value, mask):
        calls.append(len(value))
        return value

    batches = torch.randn(6, 3).split(2)
    with pytest.raises(Boom):
        collect(f, params, interrupted(batches, 2), "0", pool=pool, path=tmp_path)
    assert len(calls) == 2
    collect(f, params, batches, "0", pool=pool, path=tmp_path, resume=True)
    assert len(calls) == 3


def test_another_process_reads_while_it_grows(tmp_path):
    f, params = sequences()
    batches = torch.randn(6, 3).split(2)
    read = "import sys; from tdhook.latent.activation_store import open_activations as o; print(o(sys.argv[1])['0'].tolist())"
    seen = []

    def watched():
        for number, batch in enumerate(batches):
            if number == 2:
                printed = subprocess.run([sys.executable, "-c", read, str(tmp_path)], stdout=subprocess.PIPE, check=True)
                seen.append(torch.tensor(json.loads(printed.stdout)))
                seen.append(open_activations(tmp_path)["0"])
            yield batch

    rows = collect(f, params, watched(), "0", path=tmp_path, total=6)
    assert len(seen[0]) == 4
    EXACT(seen[0], rows["0"][:4])
    EXACT(seen[1], rows["0"][:4])


def test_writing_into_what_was_opened_leaves_the_file(tmp_path):
    f, params = sequences()
    rows = collect(f, params, torch.randn(6, 3).split(2), "0", path=tmp_path)
    before = rows["0"].clone()
    rows["0"].zero_()
    EXACT(open_activations(tmp_path)["0"], before)


# Laws -------------------------------------------------------------------------------------------------------------------


class Raises(nn.Module):
    def forward(self, x):
        raise AssertionError("ran")


def test_nothing_runs_after_the_last_site():
    f, params = functionalize(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Identity()), Raises()))
    x = torch.randn(4, 3)
    for sites in (["1", "0"], "1.*", ["0", "2:in"], ["1:in", "1.0"]):
        assert collect(f, params, [x], sites).batch_size == (4,)


def test_memory_is_flat(tmp_path):
    """No batch and no value outlives its turn."""
    f, params = sequences()
    alive: list[weakref.ref] = []
    most = 0

    def batches():
        nonlocal most
        for _ in range(6):
            most = max(most, sum(reference() is not None for reference in alive))
            batch = torch.randn(5, 4, 3)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    def pool(value, mask):
        nonlocal most
        alive.append(weakref.ref(value))
        most = max(most, sum(reference() is not None for reference in alive))
        return value[:, 0]

    for path in (None, tmp_path):
        alive.clear()
        rows = collect(f, params, batches(), ["0", "2"], pool=pool, path=path)
        # one batch, and its values at the two sites
        assert len(alive) == 18 and most == 3
    del rows
    # nor is the whole value kept alive by the row that is a part of it
    rows = collect(f, params, [torch.randn(5, 4, 3)], "0", pool=lambda value, mask: value[:, 0])
    assert rows["0"].untyped_storage().nbytes() == rows["0"].numel() * 4


def test_without_gradients_and_the_caller_in_its_own_mode():
    model = mlp()
    f, params = functionalize(model)
    params = params.apply(lambda t: t.requires_grad_())
    modes = []

    def batches():
        for batch in torch.randn(4, 3).split(2):
            modes.append(torch.is_grad_enabled())
            yield batch

    state = torch.get_rng_state()
    rows = collect(f, params, torch.randn(4, 3, generator=torch.Generator()).split(2), ["0", "2"])
    assert torch.equal(state, torch.get_rng_state()) and not any(row.requires_grad for row in rows.values())
    collect(f, params, batches(), "0", chunk_size=1)
    assert modes == [True, True] and torch.is_grad_enabled()
    with pytest.raises(errors.InputError):
        collect(f, params, [torch.randn(4, 3)], "0", pool=lambda value, mask: None)
    assert torch.is_grad_enabled() and not model._forward_hooks and not any(m._forward_hooks for m in model.modules())
    with torch.inference_mode():
        assert collect(f, params, [torch.randn(4, 3)], "0").batch_size == (4,)


def test_progress():
    f, params = sequences()
    for batches, expected in (
        (torch.randn(5, 3).split(2), [(0, 3), (1, 3), (2, 3), (3, 3)]),
        (iter(torch.randn(5, 3).split(2)), [(0, 1), (1, 2), (2, 3), (3, 3)]),
    ):
        calls = []
        collect(f, params, batches, "0", progress=lambda *call, calls=calls: calls.append(call))
        assert calls == expected


def test_an_iterable_data_set():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from torch.arange(12.0).reshape(4, 3)

    f, params = sequences()
    loader = torch.utils.data.DataLoader(Endless(), batch_size=3)
    assert collect(f, params, loader, "0").batch_size == (4,)


# Bad input --------------------------------------------------------------------------------------------------------------

X = torch.ones(4, 5, 3)


@pytest.mark.parametrize(
    ("batches", "options", "match"),
    [
        (X, {}, r"batches is a float32 tensor of shape \[4, 5, 3\]; give an iterable of batches, such as x.split"),
        ({"x": X}, {}, "batches is a dict with 'x'; give an iterable"),
        (3, {}, "batches is 3 of type int"),
        ([], {}, "batches is empty; give at least one batch"),
        (iter([]), {}, "batches is empty"),
        ([X[:0]], {}, r"holds a float32 tensor of shape \[0, 5, 3\], with no example"),
        ([X, X[:, :4]], {}, r"'0' gives rows like a float32 tensor of shape \[1, 4, 4\].*\[1, 5, 4\]; bring .* or pool them"),
        ([X], {"pool": "median"}, "pool='median' is unknown; choose from mean, max, last, rows"),
        ([X], {"pool": 0.5}, "pool is 0.5 of type float"),
        ([X], {"pool": 5}, "pool=5 is out of range at '0': an example has only 5 positions"),
        ([X], {"pool": -6}, "pool=-6 is out of range"),
        ([X], {"pool": lambda value, mask: value.sum()}, r"pool returned a float32 tensor of shape \[\] at '0'; return .* B=4"),
        ([X], {"axis": 1.5}, "axis=1.5 is no axis"),
        ([X], {"axis": (1, 1)}, r"axis=\(1, 1\) is no axis"),
        ([X], {"dtype": torch.int64}, "dtype is torch.int64 .*; give a floating-point torch.dtype"),
        ([X], {"chunk_size": 0}, "chunk_size is an integer of at least 1"),
        ([X], {"total": 0}, "total is an integer of at least 1"),
        ([X, X], {"total": 7}, "total=7 is less than the rows that there are"),
        ([X], {"resume": True}, "resume=True goes on with what is on disk; give path"),
        ([X], {"path": "x", "device": "cpu"}, "device='cpu' has no meaning with path"),
        ([X], {"inputs_of": 0}, "inputs_of is 0 of type int; give a function of the batch"),
        ([X], {"positions": 3}, "positions is 3 of type int; give a function"),
        ([X], {"positions": "mask"}, "positions='mask' names no entry of the inputs"),
        ([X], {"positions": lambda x: x[..., 0]}, r"positions gives a float32 tensor .* for 4 examples; give a bool"),
        ([X], {"positions": lambda x: x[..., 0] > 1}, "positions leaves an example without any position"),
        ([X], {"keep": 0}, "keep is 0 of type int"),
        ([X], {"keep": lambda x: x}, "keep returned a float32 tensor .*; return a mapping"),
        ([X], {"keep": lambda x: {"a": x[:2]}}, r"keep gives a float32 tensor of shape \[2, 5, 3\] as 'a' for 4 examples"),
        ([X], {"keep": lambda x: {"0": x}}, "keep gives '0', which is the name of a site"),
        ([X], {"pool": "rows", "keep": lambda x: {"example": x}}, "keep gives 'example', which is the name"),
        ([X, X[:2]], {"keep": lambda x: {"a": x} if len(x) > 2 else {}}, "keep gives 'a' for some batches and not for others"),
    ],
)
def test_bad_input(batches, options, match):
    f, params = sequences()
    with pytest.raises(errors.InputError, match=match):
        collect(f, params, batches, "0", **options)


class Lacking(nn.Module):
    """Values with and without an axis of examples, and with another number of positions."""

    def __init__(self):
        super().__init__()
        self.table, self.total, self.some = nn.Identity(), nn.Identity(), nn.Identity()
        self.example = nn.Identity()

    def forward(self, x):
        return self.example(x) + self.table(torch.zeros(3)) + self.total(x.sum()) + self.some(x[:, 1:]).sum()


@pytest.mark.parametrize(
    ("sites", "options", "match"),
    [
        ("total", {}, r"'total' holds a float32 tensor of shape \[\], whose first dimension is not that of the 4 examples"),
        ("table", {}, r"'table' holds .* \[3\], whose first dimension"),
        ("nothing", {}, "unknown site 'nothing'"),
        ("example@*", {}, r"collect takes exact sites, got the pattern 'example@\*'"),
        ("some", {"pool": "mean", "axis": 3}, r"'some' holds .* where axis 3 does not count positions; give axis"),
        ("some", {"pool": "mean", "axis": 0}, "where axis 0 does not count positions"),
        (
            "some",
            {"pool": "rows", "positions": lambda x: x[..., 0] > 0},
            r"'some' has 4 positions for each example where the mask is a bool tensor of shape \[4, 5\]",
        ),
    ],
)
def test_bad_sites(sites, options, match):
    f, params = functionalize(Lacking())
    with pytest.raises(errors.SiteError, match=match):
        collect(f, params, [X], sites, **options)


def test_other_bad_requests():
    f, params = functionalize(Lacking())
    with pytest.raises(errors.InputError, match="a site named 'example' or 'position' has the name of a column"):
        collect(f, params, [X], "example", pool="rows")
    with pytest.raises(errors.InputError, match="'example:in' gives 20 rows and 'some' 16; collect what has other positions"):
        collect(f, params, [X], ["example:in", "some"], pool="rows")
    with pytest.raises(errors.ModelError, match="which has no sites"):
        collect(lambda params, x: x, params, [X], "example")
    f, params = functionalize(nn.Sequential(nn.Linear(3, 3), nn.Dropout()))
    with pytest.warns(errors.TdhookWarning, match="collect: the model is in train mode"):
        collect(f, params, [X], "0")


def test_bad_folders(tmp_path):
    f, params = sequences()
    batches = torch.randn(6, 5, 3).split(2)
    run = partial(collect, f, params, batches, path=tmp_path / "a", pool="mean")
    with pytest.raises(errors.InputError, match="holds no activations"):
        open_activations(tmp_path / "a")
    run("0")
    with pytest.raises(errors.InputError, match="holds 6 rows already; resume=True goes on after them"):
        run("0")
    for sites, options, match in (
        (["0", "2"], {}, re.escape("sites=['0', '2'] is not what path=")),
        ("0", {"pool": "last"}, "pool='last' is not what .* was begun with, 'mean'"),
        ("0", {"dtype": torch.float64}, "dtype='torch.float64' is not what .*, None"),
        ("0", {"axis": 2}, r"axis=\[2\] is not what .*, \[1\]"),
    ):
        with pytest.raises(errors.InputError, match=match):
            run(sites, resume=True, **options)
    before = contents(tmp_path / "a")
    for other, match in (
        ([*batches[:2], batches[0]], "batch 2 is not what it was when .*same order"),
        (batches[:2], "batches has 2, but path=.* holds 3 already"),
    ):
        with pytest.raises(errors.InputError, match=match):
            collect(f, params, other, "0", pool="mean", path=tmp_path / "a", resume=True)
    assert contents(tmp_path / "a") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.InputError, match="is a file; give a folder"):
        collect(f, params, batches, "0", path=tmp_path / "file")
    with pytest.raises(errors.InputError, match=r"holds other files \(.*\); give a folder that is new or empty"):
        collect(f, params, batches, "0", path=tmp_path)
    (tmp_path / "a" / "0.rows").write_bytes(b"short")
    for damaged in (lambda: open_activations(tmp_path / "a"), lambda: run("0", resume=True)):
        with pytest.raises(errors.InputError, match=r"0.rows is damaged: it has 5 bytes of 96"):
            damaged()
    (tmp_path / "a" / "activations.json").write_text('{"format": 7}')
    with pytest.raises(errors.InputError, match="has format 7; this version of tdhook reads 1"):
        open_activations(tmp_path / "a")
    (tmp_path / "a" / "activations.json").write_text("{")
    with pytest.raises(errors.InputError, match=r"activations.json is damaged; delete the folder"):
        open_activations(tmp_path / "a")
