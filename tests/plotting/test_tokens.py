"""Tokens coloured by their scores."""

import html.parser
import re

import numpy
import pytest
import torch
from matplotlib import pyplot

from tdhook import errors
from tdhook.plotting import token_matrix, tokens_html, tokens_terminal
from tdhook.plotting.canvas import columns_of
from tdhook.plotting.colors import diverging_rgb, text_rgb

TOKENS = ["I", " am", "\n", "<b>&\"'"]
SCORES = torch.tensor([0.0, 2.0, -4.0, 1.0])
NAN = float("nan")


class Page(html.parser.HTMLParser):
    """The coloured tokens of a page as (text, style, score), its whole text, and the tags that are open."""

    def __init__(self, page):
        super().__init__()
        self.tokens, self.text, self.tags, self.open = [], "", set(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        if tag not in ("br", "wbr"):
            self.open.append(attributes)
        if "title" in attributes:
            self.tokens.append(["", attributes["style"], attributes["title"]])

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        self.text += data
        if any("title" in attributes for attributes in self.open):
            self.tokens[-1][0] += data


def contrast(first, second):
    """WCAG's ratio of two colours."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_red_is_positive_blue_is_negative_and_both_read():
    assert diverging_rgb(0) == (247, 247, 247)
    red, _, blue = diverging_rgb(0.9)
    assert red > blue + 100
    red, _, blue = diverging_rgb(-0.9)
    assert blue > red + 100
    for share in numpy.linspace(-1, 1, 101):
        background = diverging_rgb(share)
        assert contrast(background, text_rgb(background)) >= 4.5


def test_html_holds_every_token_its_color_and_its_score():
    page = Page(tokens_html(TOKENS, SCORES))
    assert [token[0] for token in page.tokens] == ["I", "␣am", "⏎", "<b>&\"'"]
    assert [float(token[2]) for token in page.tokens] == SCORES.tolist()
    for (_, style, _), score in zip(page.tokens, SCORES.tolist()):
        background = diverging_rgb(score / 4)  # symmetric: the largest magnitude is 4
        assert "background:rgb({},{},{});".format(*background) in style
        assert ";color:rgb({},{},{});".format(*text_rgb(background)) in style
    assert page.open == [] and page.tags <= {"div", "span", "br", "wbr"}


def test_html_escapes_everything_and_is_ascii():
    evil = '<script>alert("é")</script>'
    page = tokens_html([evil], [1.0], titles=[evil], title=evil, label=evil)
    assert "<script" not in page and page.isascii()
    assert Page(page).text.count(evil) == 4


def test_html_of_several_targets_has_one_range_for_all():
    scores = torch.tensor([[1.0, 0.0], [0.0, -10.0]])
    page = Page(tokens_html(["a", "b"], scores, titles=["cat", "dog"], title="why", label="relevance"))
    assert [token[0] for token in page.tokens] == ["a", "b", "a", "b"]
    assert "rgb({},{},{})".format(*diverging_rgb(0.1)) in page.tokens[0][1]
    for text in ("cat", "dog", "why", "relevance", "−10", "+10"):
        assert text in page.text


def test_a_line_break_breaks_the_line_after_its_token():
    assert "</span><br>" in tokens_html(["a\n", "b"], [1.0, 2.0])
    assert "<br>" not in tokens_html(["a", "b"], [1.0, 2.0])


def test_the_percentile_ends_the_range():
    scores = torch.tensor([1.0] * 99 + [1000.0])
    assert "+1</span>" in tokens_html(["a"] * 100, scores, percentile=90)
    assert "+1e+03</span>" in tokens_html(["a"] * 100, scores)


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_the_terminal_gets_a_color_of_ground_and_letters_for_each_token():
    text = tokens_terminal(TOKENS, SCORES)
    cells = re.findall(r"\x1b\[48;2;([0-9;]+)m\x1b\[38;2;([0-9;]+)m([^\x1b]*)\x1b\[0m", text)[:4]
    assert [cell[2] for cell in cells] == ["I", "␣am", "⏎", "<b>&\"'"]
    for (ground, letters, _), score in zip(cells, SCORES.tolist()):
        background = diverging_rgb(score / 4)
        assert tuple(map(int, ground.split(";"))) == background
        assert tuple(map(int, letters.split(";"))) == text_rgb(background)
    assert plain(text).split("\n")[:2] == ["I␣am⏎", "<b>&\"'"]


def test_no_color_leaks_over_the_end_of_a_line():
    for line in tokens_terminal(["word "] * 30, torch.randn(30), width=20).split("\n"):
        assert line.count("\x1b[48;2;") == line.count("\x1b[38;2;") == line.count("\x1b[0m")
        assert line.endswith("\x1b[0m") or "\x1b" not in line.rpartition("\x1b[0m")[2]


def test_a_token_cannot_steer_the_terminal():
    text = plain(
        tokens_terminal(["\x1b[2J", "\x07\r", "\u202e"], [1.0, 1.0, 1.0], titles=["\x1b]0;x"], title="\x1b[H", label="\x1b[m")
    )
    assert "\x1b" not in text and "\r" not in text and "\u202e" not in text
    assert r"\x1b[2J\x07\r\u202e" in text


def test_long_texts_are_broken_between_tokens_and_rows_are_aligned():
    text = tokens_terminal(["word"] * 7, torch.ones(2, 7), titles=["cat", "a dog"], title="why", label="score", width=17)
    first, *rows, legend = plain(text).split("\n")
    assert first == "why"
    assert rows == [
        "  cat  wordword", "       wordword", "       wordword", "       word",
        "a dog  wordword", "       wordword", "       wordword", "       word",
    ]  # fmt: skip
    assert legend.split() == ["−1", "+1", "score"]


def test_wide_letters_take_two_columns_and_accents_none():
    assert columns_of("東京") == 4 and columns_of("e\u0301a") == 2
    rows = plain(tokens_terminal(["東京"] * 3, torch.ones(3), width=8)).split("\n")
    assert rows[:2] == ["東京東京", "東京"]


def test_scores_of_zeros_are_white():
    assert diverging_rgb(0) == (247, 247, 247)
    assert tokens_terminal(["a"], [0.0]).startswith("\x1b[48;2;247;247;247m\x1b[38;2;0;0;0ma\x1b[0m")


@pytest.mark.parametrize("write", [tokens_html, tokens_terminal])
@pytest.mark.parametrize(
    ("tokens", "scores", "options", "message"),
    [
        (TOKENS, torch.ones(3), {}, r"scores has shape \[3\], there are 4 tokens; give \[P\] or \[T, P\]"),
        (TOKENS, torch.ones(1, 1, 4), {}, r"scores has shape \[1, 1, 4\]"),
        (TOKENS, torch.ones(4, 2), {}, r"scores has shape \[4, 2\], there are 4 tokens"),
        ([], torch.ones(0), {}, r"scores has shape \[0\], there are 0 tokens"),
        (TOKENS, torch.tensor([0, 1, NAN, 2]), {}, "scores holds NaN"),
        ("text", torch.ones(4), {}, "tokens is or holds 'text'.*; give a list of texts"),
        (torch.arange(4), torch.ones(4), {}, r"tokens is or holds .*what they decode to"),
        ([1, 2, 3, 4], torch.ones(4), {}, "tokens is or holds 1"),
        (TOKENS, torch.ones(2, 4), {"titles": ["one"]}, "hold 2 targets, titles 1"),
        (TOKENS, torch.ones(4), {"titles": "one"}, "titles is or holds 'one'"),
        (TOKENS, torch.ones(4), {"percentile": 0}, "percentile is above 0"),
    ],
)
def test_wrong_arguments_raise(write, tokens, scores, options, message):
    with pytest.raises(errors.InputError, match=message):
        write(tokens, scores, **options)


def test_a_terminal_has_columns():
    with pytest.raises(errors.InputError, match="width is at least 1 column, got 0"):
        tokens_terminal(["a"], [1.0], width=0)


CAUSAL = torch.tensor([[1.0, NAN, NAN], [-2.0, 0.5, NAN]])


def test_generated_tokens_go_down_and_source_tokens_to_the_right():
    figure = token_matrix(CAUSAL, ["I", " am", " $"], [" am", "\n"], title="why", label="relevance")
    axes, bar = figure.axes
    (image,) = axes.images
    assert image.origin == "upper" and image.get_array().shape == (2, 3)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["I", "␣am", "␣$"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["␣am", "⏎"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("source token", "generated token", "why")
    assert bar.get_ylabel() == "relevance"


def test_pairs_that_cannot_attend_are_blank_and_zeros_have_an_outline(tmp_path):
    figure = token_matrix(CAUSAL, ["a", "b", "$"], ["d", "e"])
    axes = figure.axes[0]
    drawn = axes.images[0].get_array()
    assert drawn.mask.tolist() == CAUSAL.isnan().tolist()
    assert drawn.compressed().tolist() == [1.0, -2.0, 0.5]
    (outline,) = axes.collections
    corners = {tuple(path.vertices.min(0)) for path in outline.get_paths()}
    assert corners == {(-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)}
    figure.savefig(tmp_path / "matrix.png")
    pixels = pyplot.imread(tmp_path / "matrix.png")
    figure.canvas.draw()
    x, y = axes.transData.transform((2, 0)).round().astype(int)  # the upper right cell
    assert pixels[len(pixels) - y, x, :3].tolist() == [1, 1, 1]


def test_the_range_of_a_matrix_is_symmetric_unless_nothing_is_negative():
    def look(matrix, **options):
        image = token_matrix(matrix, ["a", "b"], ["c"], **options).axes[0].images[0]
        return image.get_clim(), image.get_cmap().name

    assert look([[1.0, -4.0]]) == ((-4, 4), "RdBu_r")
    assert look([[1.0, 4.0]]) == ((0, 4), "viridis")
    assert look([[0.0, NAN]]) == ((-1, 1), "RdBu_r")
    assert look([[1.0, -4.0]], limits=(-1, 1)) == ((-1, 1), "RdBu_r")
    assert look([[1.0, -4.0]], limits=(0, 1), colors="magma") == ((0, 1), "magma")


def test_a_long_matrix_gets_fewer_labels():
    axes = token_matrix(torch.randn(100, 200), ["a"] * 200, ["b"] * 100).axes[0]
    assert len(axes.get_xticklabels()) <= 48 and len(axes.get_yticklabels()) <= 48
    assert [round(tick) for tick in axes.get_yticks()] == list(range(0, 100, 3))


def test_pyplot_and_the_matrix_are_left_alone():
    matrix, before = CAUSAL.clone(), dict(pyplot.rcParams)
    token_matrix(matrix, ["a", "b", "c"], ["d", "e"])
    assert pyplot.get_fignums() == [] and dict(pyplot.rcParams) == before
    torch.testing.assert_close(matrix, CAUSAL, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (
            torch.ones(3, 2),
            {},
            r"matrix has shape \[3, 2\], there are 2 target_tokens and 3 source_tokens; give",
        ),
        (torch.full((2, 3), NAN), {}, "matrix holds no finite number"),
        (torch.where(CAUSAL.isnan(), float("-inf"), CAUSAL), {}, "matrix holds infinity; give NaN"),
        (CAUSAL, {"limits": (1, 1)}, "ascending"),
        (CAUSAL, {"percentile": 101}, "percentile"),
        (CAUSAL.to(torch.complex64), {}, "real numbers"),
    ],
)
def test_wrong_matrices_raise(matrix, options, message):
    with pytest.raises(errors.InputError, match=message):
        token_matrix(matrix, ["a", "b", "c"], ["d", "e"], **options)


def test_a_matrix_wants_lists_of_tokens():
    with pytest.raises(errors.InputError, match="source_tokens is or holds 'abc'"):
        token_matrix(CAUSAL, "abc", ["d", "e"])
    with pytest.raises(errors.InputError, match="target_tokens is or holds 7"):
        token_matrix(CAUSAL, ["a", "b", "c"], [7, 8])
