"""Triton kernels for CUDA devices: forward, backward and decode."""
