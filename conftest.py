"""Names that the examples in docstrings use without importing them."""

import pytest
import torch

import tdhook


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict) -> None:
    doctest_namespace.update(torch=torch, tdhook=tdhook)
