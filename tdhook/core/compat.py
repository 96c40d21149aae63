"""What older versions of torch lack."""

from __future__ import annotations

import torch


def _never() -> bool:
    return False


# torch 2.1 and 2.2 cannot compile over torch.func transforms, so there is nothing to tell apart.
is_compiling = getattr(torch.compiler, "is_compiling", _never)
