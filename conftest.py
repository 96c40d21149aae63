"""What every test gets: names for the examples in docstrings, and a reason where torch is too old to compile."""

import pytest
import torch

import tdhook


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict) -> None:
    doctest_namespace.update(torch=torch, tdhook=tdhook)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not hasattr(torch.compiler, "is_compiling"):
        too_old = pytest.mark.skip(reason=f"torch {torch.__version__} cannot compile over torch.func transforms")
        for item in items:
            if item.get_closest_marker("compile"):
                item.add_marker(too_old)
