"""The pieces of Python on the pages run, one after the other."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.compile
@pytest.mark.parametrize(
    "page",
    ["getting_started.md", "attribution.md", "rules.md", "weights.md", "representations.md", "interventions.md", "index.md"],
)
def test_the_pieces_of_a_page_run(page):
    text = (DOCS / page).read_text("utf-8")
    pieces = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert pieces
    names = {"__name__": page}
    for piece in pieces:
        line = text.count("\n", 0, piece.start(1))
        # as many empty lines as stand before it, so that an error names the line of the page
        exec(compile("\n" * line + piece[1], str(DOCS / page), "exec"), names)
