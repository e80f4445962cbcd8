"""Triton kernels for CUDA devices: forward and backward."""

from ka_attention.ops.triton.backend import backward, forward, outputs, paged, store

__all__ = ["backward", "forward", "outputs", "paged", "store"]
