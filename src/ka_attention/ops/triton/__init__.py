"""Triton kernels for CUDA devices: forward and backward."""

from ka_attention.ops.triton.backend import backward, forward, outputs, paged, store
from ka_attention.ops.triton.ring import step

__all__ = ["backward", "forward", "outputs", "paged", "step", "store"]
