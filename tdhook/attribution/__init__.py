"""Attribution: which inputs, activations or weights made an output."""

from .integrated_gradients import convergence_delta as convergence_delta
from .integrated_gradients import integrated_gradients as integrated_gradients
