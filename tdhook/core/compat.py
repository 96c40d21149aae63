"""The few private parts of torch that the library looks at, and what older versions lack: to be checked with each new one."""

from __future__ import annotations

import torch
from torch import Tensor

_functorch = torch._C._functorch
_lazy_clone = getattr(torch, "_lazy_clone", torch.clone)
_SMALL = 2**16  # bytes, below which a copy takes no longer than putting it off


def _never() -> bool:
    return False


# torch 2.1 and 2.2 cannot compile over torch.func transforms, so there is nothing to tell apart.
is_compiling = getattr(torch.compiler, "is_compiling", _never)


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a vmap, grad or the like around us hides the values of a tensor."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def visible(*tensors: Tensor) -> bool:
    """Whether values can be looked at: outside of vmap, grad and compilation."""
    return not is_compiling() and not any(is_wrapped(t) or t.is_meta for t in tensors)


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory, as long as both are kept."""
    return tensor.untyped_storage()._cdata


def snapshot(tensor: Tensor) -> Tensor:
    """A copy; its memory is copied at the first write into either of the two where torch can do that, elsewhere at once."""
    lazy = (
        not is_compiling()
        and tensor.nbytes >= _SMALL
        and _functorch.peek_interpreter_stack() is None
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        # of a part of a larger memory a lazy copy would keep the whole alive
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    )
    if not lazy:
        return tensor.clone()
    try:
        return _lazy_clone(tensor)
    except RuntimeError:  # memory that is not torch's own: of numpy, of a file, shared between processes
        return tensor.clone()


def is_batched(tensor: Tensor) -> bool:
    """Whether a vmap around us has given a tensor a hidden axis."""
    return _functorch.is_batchedtensor(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor below all transforms."""
    while is_wrapped(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def grad_depth(tensor: Tensor) -> int:
    """How many derivatives are being taken with respect to what a tensor was computed from."""
    depth = 0
    while is_wrapped(tensor):
        depth += _functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad
        tensor = _functorch.get_unwrapped(tensor)
    return depth + tensor.requires_grad


def level_of(tensor: Tensor) -> int:
    """How many transforms deep the innermost one is that a tensor belongs to."""
    return max(0, _functorch.maybe_get_level(tensor))


def current_level() -> int:
    """How many transforms are at work."""
    innermost = _functorch.peek_interpreter_stack()
    return 0 if innermost is None else innermost.level()
