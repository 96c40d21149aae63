"""The progress callback for tqdm."""

from __future__ import annotations

import io
import sys

import pytest

from tdhook import tqdm_progress


def test_draws_a_bar_and_closes_it():
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    progress = tqdm_progress("patching", file=stream, mininterval=0)
    for done in range(1, 4):
        progress(done, 3)
    assert "patching: 100%" in stream.getvalue() and "3/3" in stream.getvalue()


def test_can_be_used_again():
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    progress = tqdm_progress("first", file=stream, mininterval=0)
    progress(2, 2)
    progress(5, 5)
    assert "2/2" in stream.getvalue() and "5/5" in stream.getvalue()


def test_prints_nothing_by_itself(capsys):
    pytest.importorskip("tqdm")
    tqdm_progress("silent", file=io.StringIO())(1, 2)
    assert capsys.readouterr() == ("", "")


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"tqdm_progress needs tqdm; install it with: pip install 'tdhook\[demo\]'"):
        tqdm_progress()
