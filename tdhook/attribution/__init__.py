"""Attribution: which inputs, activations or weights made an output."""

from .integrated_gradients import convergence_delta, integrated_gradients

__all__ = ["convergence_delta", "integrated_gradients"]
