"""Triton kernels for CUDA devices: forward and backward."""

from ka_attention.ops.triton.backend import backward, forward, open, outputs, paged, state_gradient, store
from ka_attention.ops.triton.ring import step

__all__ = ["backward", "forward", "open", "outputs", "paged", "state_gradient", "step", "store"]
