"""Telling the edits inside a functional model where in the sequence the value that they get lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...core.transforms import Transform
from ...core.writing import Intervene
from ..steering.edits import Edit, placed
from ..steering.positions import Where


def place(f: Any, where: Where) -> Any:
    """The model `f` with every edit in it placed; a function that is no transform of a model stays as it is."""
    if not isinstance(f, Transform):
        return f
    inner = place(f.inner, where)
    if isinstance(f, Intervene) and any(isinstance(write, Edit) for write in f.writes.values()):
        writes: Mapping[Any, Any] = {want: placed(write, where) for want, write in f.writes.items()}
        return replace(f, inner=inner, writes=writes)
    return f if inner is f.inner else replace(f, inner=inner)
