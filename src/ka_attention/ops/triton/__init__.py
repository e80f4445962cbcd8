"""Triton kernels for CUDA devices: forward and backward."""

from ka_attention.ops.triton.launch import backward, forward, saved_shape

__all__ = ["backward", "forward", "saved_shape"]
