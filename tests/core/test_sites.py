"""The grammar of sites: what parses, how it is printed, what patterns mean, and what is said about a wrong one."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import tdhook
from tdhook import Site, capture, functionalize
from tdhook.core.errors import SiteError
from tdhook.core.sites import Glob, Index, Slice, Tree

from . import zoo
from .plain import assert_same, prepared

# Spelling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("h.3.mlp", Site(("h", "3", "mlp"))),
        ("h[3].mlp:out", Site(("h", "3", "mlp"))),
        ("encoder:in", Site(("encoder",), port="in")),
        ("lstm:out[0]", Site(("lstm",), keys=(0,))),
        ("lstm:out[1][-1]", Site(("lstm",), keys=(1, -1))),
        ("m:in[mask]", Site(("m",), port="in", keys=("mask",))),
        ('m:out["a]b"]["0"]', Site(("m",), keys=("a]b", "0"))),
        ("act@2", Site(("act",), call=2)),
        ("act@*", Site(("act",), call="*")),
        ("h.0.attn/softmax", Site(("h", "0", "attn"), "softmax")),
        ("h.0.attn/matmul@1:in[0]", Site(("h", "0", "attn"), "matmul", 1, "in", (0,))),
        ("/relu", Site((), "relu")),
        ("a/*", Site(("a",), "*")),
        (":out", Site()),
        (":in", Site(port="in")),
        ("@1:out[x]", Site(call=1, keys=("x",))),
        ("h[-1].mlp", Site(("h", Index(-1), "mlp"))),
        ("h[2:8:2]", Site(("h", Slice(2, 8, 2)))),
        ("h[:]", Site(("h", Slice(None, None, None)))),
        ("h.*.attn", Site(("h", Glob("*"), "attn"))),
        ("**.mlp", Site((Glob("**"), "mlp"))),
        ('blocks["a b"].x', Site(("blocks", "a b", "x"))),
        (r'["q\"\\"]', Site(('q"\\',))),
        ("  h.3  ", Site(("h", "3"))),
    ],
)
def test_an_address_reads_as(text: str, site: Site) -> None:
    assert Site.parse(text) == site
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("h[3].mlp:out", "h.3.mlp"),
        ('h["3"]["mlp"]', "h.3.mlp"),
        ('h.["a b"]', 'h["a b"]'),
        (":out", ":out"),
        ("h:out[007]", "h:out[7]"),
        ('h:out["name"]', "h:out[name]"),
        ("h[::]", "h[:]"),
    ],
)
def test_an_address_has_one_canonical_spelling(text: str, canonical: str) -> None:
    assert str(Site.parse(text)) == canonical
    assert repr(Site.parse(text)) == f"Site({canonical!r})"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("a..b", r"malformed at '\.\.b'"),
        (".a", "malformed"),
        ("a.", "malformed"),
        ("a b", "malformed"),
        ("a:left", "malformed at ':left'"),
        ("a:out[", "malformed"),
        ("a:out[]", "malformed"),
        ("a:out@1", "malformed"),
        ("a@x", "malformed at '@x'"),
        ("a@-1", "malformed"),
        ("a/", "malformed"),
        ("a[1:2:0]", "step 0"),
        ("a[b]", "malformed"),
        ('a["b', "malformed"),
        ("h[" + "9" * 5000 + "]", "malformed"),
        ("h@" + "9" * 5000, "malformed"),
    ],
)
def test_a_malformed_address_is_an_error_that_shows_where(text: str, said: str) -> None:
    with pytest.raises(SiteError, match=said):
        Site.parse(text)


@pytest.mark.parametrize("value", [None, 3, b"h", ["h"]])
def test_an_address_is_a_string(value: object) -> None:
    with pytest.raises(SiteError, match=f"got {re.escape(repr(value))} of type {type(value).__name__}"):
        Site.parse(value)


names = st.text(max_size=6)
components = st.one_of(
    names,
    st.integers(-99, -1).map(Index),
    st.builds(Slice, *[st.one_of(st.none(), st.integers(-9, 9))] * 2, st.one_of(st.none(), st.integers(1, 9))),
    st.sampled_from(["*", "**", "a*", "*-b*"]).map(Glob),
)
sites = st.builds(
    Site,
    st.lists(components, max_size=4).map(tuple),
    st.one_of(st.none(), st.from_regex(r"\A[A-Za-z_]\w{0,5}\Z"), st.just("*")),
    st.one_of(st.none(), st.integers(0, 99), st.just("*")),
    st.sampled_from(["in", "out"]),
    st.lists(st.one_of(st.integers(-99, 99), names), max_size=3).map(tuple),
)


@settings(max_examples=1500, deadline=None)
@given(sites)
def test_what_is_printed_reads_as_the_same_site(site: Site) -> None:
    assert Site.parse(str(site)) == site


@settings(max_examples=2500, deadline=None)
@given(st.one_of(st.text(max_size=20), st.text(alphabet='ab01.*[]:@/"\\- inout', max_size=24)))
@example('a["\\"]')
@example("٣[٣]@٣:out[٣]")
@example("a:out[\n]")
def test_any_text_parses_to_a_site_that_prints_and_parses_to_itself_or_is_a_site_error(text: str) -> None:
    try:
        site = Site.parse(text)
    except SiteError:
        return
    assert Site.parse(str(site)) == site
    assert str(Site.parse(str(site))) == str(site)


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(max_size=12), st.text(alphabet='ab01.*[]:@/"\\- inout', max_size=16)))
def test_any_text_is_resolved_or_is_a_site_error(text: str) -> None:
    f, _, _ = prepared(*zoo.named("odd_keys"))
    try:
        wants = f.tree.resolve(text)
    except SiteError:
        return
    assert all(want.site.path in f.tree.paths for want in wants)


def test_every_module_has_a_canonical_path_that_resolves_to_it_alone() -> None:
    f, params, x = prepared(*zoo.named("odd_keys"))
    output, values = capture(f, "**")(params, x)
    h = x
    for name in zoo.OddKeys.names:
        spelled = name.replace("\\", "\\\\").replace('"', '\\"')
        assert_same(
            capture(f, f'blocks["{spelled}"]')(params, x)[1],
            {str(Site(("blocks", name))): h @ params["blocks", name, "weight"].T + params["blocks", name, "bias"]},
            rtol=1e-5,
            atol=1e-6,
        )
        h = values[str(Site(("blocks", name)))].tanh()
    assert_same(h, output)


# Patterns ------------------------------------------------------------------------------------------------------------

TREE = Tree(
    tuple(
        tuple(path.split(".")) if path else ()
        for path in [
            "",
            "h",
            *(f"h.{i}{child}" for i in range(11) for child in ("", ".attn", ".mlp", ".mlp.act")),
            "ln",
            "ln_f",
        ]
    )
)


def paths(pattern: object) -> list[str]:
    return [".".join(want.site.path) for want in TREE.resolve(pattern)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("h[-1].mlp", ["h.10.mlp"]),
        ("h[-11]", ["h.0"]),
        ("h[2:8:2]", ["h.2", "h.4", "h.6"]),
        ("h[-2:].attn", ["h.9.attn", "h.10.attn"]),
        ("h[::-5]", ["h.0", "h.5", "h.10"]),
        ("h.*.mlp", [f"h.{i}.mlp" for i in range(11)]),
        ("h.1*", ["h.1", "h.10"]),
        ("ln*", ["ln", "ln_f"]),
        ("**.act", [f"h.{i}.mlp.act" for i in range(11)]),
        ("h.3.**", ["h.3", "h.3.attn", "h.3.mlp", "h.3.mlp.act"]),
        ("h.3.**.act", ["h.3.mlp.act"]),
        ("*", ["h", "ln", "ln_f"]),
        (re.compile(r"h\.(3|5)\.attn"), ["h.3.attn", "h.5.attn"]),
        (lambda path: path.endswith("_f"), ["ln_f"]),
        (["ln", "h[0]", "h.0", "ln"], ["ln", "h.0"]),
        ([Site(("ln",))], ["ln"]),
    ],
)
def test_a_pattern_means(pattern: object, expected: list[str]) -> None:
    assert paths(pattern) == expected


def test_two_stars_mean_every_module_the_model_itself_included() -> None:
    assert len(paths("**")) == len(TREE.paths)


def test_an_index_counts_numbered_children_only() -> None:
    tree = Tree((("h",), ("h", "norm"), ("h", "2"), ("h", "0"), ("h", "²")))
    assert [want.site.path[-1] for want in tree.resolve("h[:]")] == ["2", "0"]
    assert [want.site.path[-1] for want in tree.resolve("h[-1]")] == ["2"]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ("h.3.mpl", "unknown site 'h.3.mpl'.*'h.3.mlp'"),
        ("layers.3.mlp", r"unknown site.*Did you mean"),
        ("transformer.h.3.attn:in", "unknown site 'transformer.h.3.attn:in'.*'h.3.attn'"),
        ("h[11]", "unknown site 'h.11'"),
        ("h[-12]", r"unknown site 'h\[-12\]'"),
        ("zzzzz", "It has 'h', 'h.0', 'h.0.attn', 'h.0.mlp' and 43 more"),
        (re.compile("nothing"), "no module path of the model matches 'nothing'"),
        (lambda path: False, "no module path of the model matches"),
        ([], "no site was given"),
        ([3], "got 3 of type int"),
    ],
)
def test_an_unknown_address_is_an_error_with_near_matches(request_: object, said: str) -> None:
    with pytest.raises(SiteError, match=said):
        TREE.resolve(request_)


def test_what_resolve_was_asked_exactly_is_kept_beside_a_pattern() -> None:
    f, params, x = prepared(*zoo.named("reused"))
    with pytest.raises(SiteError, match="called more than once"):
        capture(f, ["*", "1"])(params, x)


# Values at sites -----------------------------------------------------------------------------------------------------


def test_a_pattern_gives_every_tensor_of_a_structured_value_under_its_own_address() -> None:
    f, params, x = prepared(*zoo.named("structured"))
    values = capture(f, "**")(params, x)[1]
    assert set(values.keys()) == {
        "linear", "tuple:out[0]", "tuple:out[2][0]", "named:out[0]", "named:out[1]", 'dict:out["1"]', 'dict:out["0"]',
        'dict:out[deep][0]["odd ]key["]', "record:out[score]", "record:out[pair][0]", "record:out[pair][1]",
        ":out[record][score]", ":out[record][pair][0]", ":out[record][pair][1]", ":out[list][0]",
    }  # fmt: skip
    for name, value in values.items():
        assert_same(capture(f, name)(params, x)[1], {name: value})


def test_elements_are_addressed_by_index_or_name() -> None:
    f, params, x = prepared(*zoo.named("structured"))
    h = x @ params["linear", "weight"].T + params["linear", "bias"]
    a, b = h + 1, h - 1
    sites = [
        "named:out[left]",
        "named:out[0]",
        "named:out[-2]",
        'dict:out["0"]',
        "dict:out[0]",
        "record:out[pair][right]",
    ]
    values = capture(f, sites)(params, x)[1]
    left, right = (a + b) * 2, (a + b).sin()
    for site in sites[:3]:
        torch.testing.assert_close(values[site], left)
    torch.testing.assert_close(values['dict:out["0"]'], (left - right) * 3)
    torch.testing.assert_close(values["dict:out[0]"], left - right)  # the first one: the model has no key 0
    total = (left - right) * 5 + (left - right).cos()
    torch.testing.assert_close(values["record:out[pair][right]"], total.sin())


class Numbered(nn.Module):
    def forward(self, x: torch.Tensor) -> dict:
        return {1: x, 0: x * 2, ("a", 1): x * 3, None: x * 4}


def test_keys_of_a_mapping_that_are_no_strings_are_addressed_by_what_they_print() -> None:
    f, params = functionalize(Numbered())
    x = torch.ones(2)
    output, values = capture(f, "**")(params, x)
    assert [float(v[0]) for v in values.values()] == [1, 2, 3, 4]
    for i, site in enumerate(values.keys()):
        written = tdhook.intervene(f, {site: -1})(params, x)
        assert [float(v[0]) for v in written.values()] == [-1 if i == j else j + 1.0 for j in range(4)]
        assert list(written) == list(output)


def test_arguments_are_addressed_by_position_or_by_name() -> None:
    f, params, inputs = prepared(*zoo.named("several"))
    a, b = inputs["a"], inputs["b"]
    values = capture(f, [":in[a]", ":in[0]", ":in[1]", "left:in", "left:in[input]", "right:in"])(params, inputs)[1]
    assert_same(dict(values.items()), {":in[a]": a, ":in[0]": a, ":in[1]": b, "left:in": a, "left:in[input]": a, "right:in": b})
    values = capture(f, [":in[b]", ":in[a]"])(params, (a, b))[1]
    assert_same(dict(values.items()), {":in[b]": b, ":in[a]": a})


def test_a_tensordict_is_addressed_by_key() -> None:
    f, params, td = prepared(*zoo.named("tensordict_sequential"))
    values = capture(f, ["module.0:in[0][x]", "module.0:out[h]", "module.1:out[h]"])(params, td)[1]
    assert_same(values["module.0:in[0][x]"], td["x"])
    assert_same(values["module.1:out[h]"], values["module.0:out[h]"].relu())
    with pytest.raises(SiteError, match=r"has no element \[y\].*'x', 'h'"):
        capture(f, "module.0:out[y]")(params, td)
