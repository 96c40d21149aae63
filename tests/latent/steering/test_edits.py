"""Edits: the formulas, the positions, and what every write has to keep."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import vmap

import tdhook
from tdhook.core.errors import InputError, SiteError
from tdhook.latent.concepts import leace
from tdhook.latent.steering import Edit, Where, add, at, by_step, clamp, in_order, project_out, replace_component

from ..families import model

X = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
D = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
U = D / D.norm()
B = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
EDITS = {
    "add": lambda **k: add(D, 2.0, **k),
    "project_out": lambda **k: project_out(D, **k),
    "clamp": lambda **k: clamp(D, 0.7, **k),
    "replace_component": lambda **k: replace_component(D, B[0], **k),
}


def test_addition() -> None:
    torch.testing.assert_close(add(D, -1.5)(X), X - 1.5 * D)
    torch.testing.assert_close(add(SimpleNamespace(direction=D))(X), X + D)
    by_example = add(D, torch.tensor([0.0, 2.0]))(X)
    torch.testing.assert_close(by_example, torch.stack([X[0], X[1] + 2 * D]))


def test_strength_zero_is_the_identity_and_subtraction_undoes_addition() -> None:
    assert torch.equal(add(D, 0.0)(X), X) and torch.equal(project_out(B, strength=0.0)(X), X)
    torch.testing.assert_close(in_order(add(D, 3.0), add(D, -3.0))(X), X)


def test_a_direction_for_each_position() -> None:
    rows = torch.stack([D, 10 * D])
    expected = X.clone()
    expected[:, 3] += 2 * D
    expected[:, 1] += 20 * D
    torch.testing.assert_close(add(rows, 2.0, positions=[3, 1])(X), expected)
    torch.testing.assert_close(add(rows, positions=slice(0, 2))(X)[:, :2], X[:, :2] + rows)
    with pytest.raises(InputError, match="direction has 2 rows for 3 positions"):
        add(rows, positions=slice(0, 3))(X)


def test_projection_removes_the_span_and_nothing_else() -> None:
    removed = project_out(B)(X)
    torch.testing.assert_close(removed @ B.mT, torch.zeros(2, 5, 2, dtype=torch.float64))
    basis = torch.linalg.qr(B.mT).Q
    torch.testing.assert_close(removed, X - X @ basis @ basis.mT)
    torch.testing.assert_close(project_out(B)(removed), removed)
    torch.testing.assert_close(project_out(-7 * D, strength=2.0)(X), X - 2 * (X @ U)[..., None] * U)
    centre = B[0]
    torch.testing.assert_close(project_out(D, center=centre)(X), X - ((X - centre) @ U)[..., None] * U)


def test_clamping_sets_or_bounds_the_component_along_the_unit_vector() -> None:
    c = X @ U
    torch.testing.assert_close(clamp(5 * D, 0.7)(X), X + (0.7 - c)[..., None] * U)
    torch.testing.assert_close(clamp(D, torch.tensor([0.1, 0.2]))(X) @ U, torch.tensor([[0.1], [0.2]]).double().expand(2, 5))
    torch.testing.assert_close(clamp(D, minimum=-0.2, maximum=0.3)(X) @ U, c.clamp(-0.2, 0.3))
    torch.testing.assert_close(clamp(D, minimum=0.0)(X) @ U, c.clamp(min=0.0))


def test_a_component_of_another_activation() -> None:
    other = X.flip(0)
    replaced = replace_component(B, other)(X)
    torch.testing.assert_close(replaced @ B.mT, other @ B.mT)
    torch.testing.assert_close(project_out(B)(replaced), project_out(B)(X))
    torch.testing.assert_close(replace_component(torch.eye(4).double(), other)(X), other)
    torch.testing.assert_close(replace_component(B, X)(X), X)


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("prompt", [0, 1, 2, 3, 4]),
        ("generated", []),
        ("last", [4]),
        (1, [1]),
        (-2, [3]),
        ([0, -1], [0, 4]),
        (range(1, 3), [1, 2]),
        (slice(3, None), [3, 4]),
        (slice(-2, None), [3, 4]),
        (slice(None, -3), [0, 1]),
        (slice(0, 5, 2), [0, 2, 4]),
        (torch.tensor([True, False, False, True, False]), [0, 3]),
    ],
)
@pytest.mark.parametrize("name", EDITS)
def test_only_the_positions_asked_for_change(name: str, positions: object, chosen: list[int]) -> None:
    everywhere = EDITS[name]()(X)
    edited = EDITS[name](positions=positions)(X)
    expected = X.clone()
    expected[:, chosen] = everywhere[:, chosen]
    assert torch.equal(edited, expected)


def test_a_mask_of_each_example_also_for_values_by_heads() -> None:
    mask = torch.tensor([[True, False, False, False, False], [False, False, True, False, True]])
    assert torch.equal((add(D, positions=mask)(X) != X).any(-1), mask)
    heads = X[:, None].expand(2, 3, 5, 4)
    assert torch.equal((add(D, positions=mask)(heads) != heads).any(-1), mask[:, None].expand(2, 3, 5))


def test_positions_of_a_part_of_a_sequence_are_columns_of_the_whole() -> None:
    whole = torch.randn(2, 7, 4, dtype=torch.float64)
    mask = torch.tensor([False, True, False, False, True])
    rows = torch.stack([D, 2 * D])
    edits = [
        add(D, positions=[-1, 6]),
        add(D, positions="generated"),
        add(D, positions="prompt"),
        add(D, positions=slice(-2, 6)),
        add(D, positions=mask),
        add(rows, positions=[4, 6]),
        replace_component(D, torch.randn(2, 5, 4).double(), positions="prompt"),
        at([0, 5], torch.neg),
        in_order(add(D, positions=[5]), at("last", project_out(D))),
        by_step(lambda step: add(D, float(step))),
        by_step(lambda step: [None, 0.0, torch.neg][step]),
    ]
    for edit in edits:
        together = edit.placed(Where(0, 7, 5, 7))(whole)
        parts = [edit.placed(Where(a, b, 5, 7))(whole[:, a:b]) for a, b in [(0, 5), (5, 6), (6, 7)]]
        torch.testing.assert_close(torch.cat(parts, 1), together)
        assert not torch.equal(together, whole)


def test_by_step_is_about_the_positions_that_a_step_runs() -> None:
    whole = torch.zeros(1, 5, 4, dtype=torch.float64)
    edit = by_step(lambda step: add(D, 10.0**step) if step != 1 else None)
    written = edit.placed(Where(0, 5, 3, 5))(whole)[0] / D
    torch.testing.assert_close(written[:, 0], torch.tensor([1.0, 1, 1, 0, 100], dtype=torch.float64))
    torch.testing.assert_close(edit(whole), whole + D)


def test_order_is_that_of_the_arguments_and_of_nesting() -> None:
    model = nn.Sequential(nn.Identity())
    f, params = tdhook.functionalize(model)
    twice, after = in_order(project_out(D), add(D)), in_order(add(D), project_out(D))
    torch.testing.assert_close(twice(X) @ U, D.norm().expand(2, 5))
    torch.testing.assert_close(after(X) @ U, torch.zeros(2, 5).double())
    nested = tdhook.intervene(tdhook.intervene(f, {"0": project_out(D)}), {"0": add(D)})
    torch.testing.assert_close(nested(params, X), twice(X))


def test_earlier_positions_of_a_causal_model_do_not_change() -> None:
    f, params = tdhook.functionalize(nn.GRU(4, 4, batch_first=True).double())
    steered = tdhook.intervene(f, {":in": add(D, positions=slice(3, None))})
    before, after = f(params, X)[0], steered(params, X)[0]
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.allclose(before[:, 3:], after[:, 3:])


@pytest.mark.parametrize("name", EDITS)
def test_a_sweep_over_strengths_and_layers_is_one_call(name: str) -> None:
    f, params = tdhook.functionalize(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double())
    make = {
        "add": lambda s: add(D, s),
        "project_out": lambda s: project_out(D, strength=s),
        "clamp": lambda s: clamp(D, s),
        "replace_component": lambda s: replace_component(D, s * B[0]),
    }[name]

    def run(strengths: torch.Tensor) -> torch.Tensor:
        return tdhook.intervene(f, {site: make(strengths[i]) for i, site in enumerate(["0", "1", "2"])})(params, X)

    grid = (torch.tensor([0.5, 2.0]).double()[:, None, None] * torch.eye(3).double()).flatten(0, 1)
    torch.testing.assert_close(vmap(run)(grid), torch.stack([run(row) for row in grid]))


def test_directions_are_vmapped() -> None:
    directions = torch.randn(3, 2, 4, dtype=torch.float64)
    for make in (project_out, lambda d: replace_component(d, B[0]), lambda d: add(d[0], positions=[-1])):
        got = vmap(lambda d, make=make: make(d)(X))(directions)
        torch.testing.assert_close(got, torch.stack([make(d)(X) for d in directions]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", EDITS)
def test_the_dtype_of_the_value_stays(name: str, dtype: torch.dtype) -> None:
    edited = EDITS[name](positions=[1])(X.to(dtype))
    assert edited.dtype == dtype
    torch.testing.assert_close(edited.double(), EDITS[name](positions=[1])(X), rtol=0.02, atol=0.05)


@pytest.mark.compile
@pytest.mark.parametrize("name", EDITS)
def test_compiled(name: str) -> None:
    f, params = tdhook.functionalize(nn.Linear(4, 4).double())

    def run(params: object, x: torch.Tensor) -> torch.Tensor:
        return tdhook.intervene(f, {":out": in_order(EDITS[name](positions=[1, -1]), EDITS[name](positions="last"))})(params, x)

    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(params, X), run(params, X))


def test_any_function_at_positions() -> None:
    eraser = leace(X.flatten(0, 1), torch.arange(10) % 2 == 0)
    edited = at([0, 2], eraser)(X)
    assert torch.equal(edited[:, [1, 3, 4]], X[:, [1, 3, 4]])
    torch.testing.assert_close(edited[:, [0, 2]], eraser(X)[:, [0, 2]])
    with pytest.raises(SiteError, match="an edit"):
        at([0], lambda value: value[..., :2])(X)


def test_functions_that_write_in_place_change_what_was_asked_for() -> None:
    value = X.clone()
    for edit in (at([0], torch.Tensor.neg_), in_order(torch.Tensor.neg_), by_step(lambda step: torch.Tensor.neg_)):
        edited = edit(value)
        assert torch.equal(edited[:, 0], -X[:, 0]) and torch.equal(value, X)
    assert torch.equal(at([0], torch.Tensor.neg_)(X)[:, 1:], X[:, 1:])


def test_edits_are_hashable_immutable_and_differentiable() -> None:
    edit = add(D)
    assert isinstance(edit, Edit) and hash(edit) != hash(add(D)) and edit == edit
    with pytest.raises(AttributeError):
        edit.positions = 3  # type: ignore[misc]
    gradient = torch.func.grad(lambda s: add(D, s, positions=[0])(X).sum())(torch.tensor(1.0).double())
    torch.testing.assert_close(gradient, 2 * D.sum())


def test_nothing_of_the_caller_is_changed() -> None:
    before = [t.clone() for t in (X, D, B)]
    for make in EDITS.values():
        make(positions=[1])(X)
    assert all(torch.equal(a, b) for a, b in zip(before, (X, D, B)))


def test_bad_edits_say_what_to_give() -> None:
    for positions, message in [
        ("first", "positions='first' is unknown"),
        ([], r"positions is \[\]"),
        ([0.5], "positions is a list of 1"),
        (True, "positions is True"),
        (torch.tensor([1, 2]), r"give a boolean tensor \[S\] or \[B, S\], or a list of integers"),
        (slice(4, 0, -1), "no range that goes forward"),
    ]:
        with pytest.raises(InputError, match=message):
            add(D, positions=positions)  # type: ignore[arg-type]
    for positions, message in [
        ([5], "positions has 5, out of range for 5 positions"),
        (-6, "positions has -6"),
        (torch.ones(3, dtype=torch.bool), "a mask of 3 positions, the prompt has 5"),
        (torch.ones(3, 5, dtype=torch.bool), r"a mask \[3, 5\] of \[B, S\]"),
    ]:
        with pytest.raises(InputError, match=message):
            add(D, positions=positions)(X)
    with pytest.raises(InputError, match="positions count along axis -2"):
        add(D, positions=[0])(X[0, 0])
    with pytest.raises(InputError, match="of 6 positions that are run"):
        by_step(lambda step: add(D)).placed(Where(0, 6, 6, 8))(X)
    with pytest.raises(InputError, match="direction has 3 features"):
        add(D[:3])(X)
    with pytest.raises(InputError, match="strength has 3 numbers, one for each example"):
        add(D, torch.ones(3))(X)
    with pytest.raises(InputError, match=r"strength is .*nan"):
        add(D, float("nan"))
    with pytest.raises(InputError, match=r"strength is .*give a number, or a tensor \[\] or \[B\]"):
        add(D, torch.ones(2, 2))
    with pytest.raises(InputError, match="one for each position; say which"):
        add(B)
    with pytest.raises(InputError, match=r"direction has shape \[1, 2, 4\]"):
        add(B[None])
    with pytest.raises(InputError, match="direction is zero"):
        clamp(torch.zeros(4), 1.0)
    with pytest.raises(InputError, match="clamp takes a value, or minimum"):
        clamp(D)
    with pytest.raises(InputError, match=r"minimum=2 is above maximum=1"):
        clamp(D, minimum=2.0, maximum=1.0)
    with pytest.raises(InputError, match="strength holds NaN or infinity"):
        add(D, torch.tensor([1.0, torch.nan]))
    with pytest.raises(InputError, match="value holds NaN or infinity"):
        clamp(D, torch.tensor(torch.inf))
    for edit in (add(D, positions=[7]), add(D, positions=torch.ones(9, dtype=torch.bool))):
        with pytest.raises(InputError, match=r"positions (has 7, out of range|is a mask of 9 positions)"):
            edit.placed(Where(0, 6, 6, 7))
    with pytest.raises(InputError, match="clamp takes a value, or minimum"):
        clamp(D, 1.0, minimum=0.0)
    with pytest.raises(InputError, match=r"direction has shape \[2, 4\]; give \[D\]"):
        clamp(B, 1.0)
    with pytest.raises(InputError, match=r"center is .* for directions of 4 numbers"):
        project_out(D, center=torch.ones(3))
    with pytest.raises(InputError, match=r"source is 1\.0"):
        replace_component(D, 1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="source has 3 features"):
        replace_component(D, torch.ones(3))
    with pytest.raises(InputError, match="give what broadcasts"):
        replace_component(D, torch.ones(3, 1, 4))(X)
    with pytest.raises(InputError, match="source has 3 positions where 5 are run"):
        replace_component(D, torch.ones(2, 3, 4))(X)
    with pytest.raises(InputError, match="in_order got no edits"):
        in_order()
    with pytest.raises(InputError, match="function got 3 of type int"):
        at([0], 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="schedule got None"):
        by_step(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="an edit is for floating-point values"):
        add(D)(torch.ones(1, 5, 4, dtype=torch.long))


def test_ablation_where_the_stream_is_written_to_is_an_edit_of_the_weights() -> None:
    """Also in the middle of a block, which writes at the outputs of blocks do not reach."""
    f, params = tdhook.functionalize(model("llama"))
    ids = torch.randint(3, 50, (2, 5))
    directions = torch.randn(2, 32, dtype=torch.float64)
    basis = torch.linalg.qr(directions.T).Q
    keep = torch.eye(32, dtype=torch.float64) - basis @ basis.T
    edited = params.clone()
    edited["model", "embed_tokens", "weight"] = params["model", "embed_tokens", "weight"] @ keep
    for layer in ("0", "1"):
        for path in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            at_layer = ("model", "layers", layer, *path, "weight")
            edited[at_layer] = keep @ params[at_layer]
    sites = ["model.embed_tokens", "model.layers.*.self_attn.o_proj", "model.layers.*.mlp"]
    ablated = tdhook.intervene(f, dict.fromkeys(sites, project_out(directions)))
    torch.testing.assert_close(ablated(params, ids).logits, f(edited, ids).logits)
    blocks = tdhook.intervene(f, {"model.layers.*": project_out(directions)})
    assert not torch.allclose(blocks(params, ids).logits, f(edited, ids).logits)
