"""Pasts in pages in the Triton kernels. Runs as tests/ops/test_triton.py does."""

import pytest
import torch
from paged_calls import PagedCall
from test_triton import CUDA, DEVICE, HALVES, KERNELS, in_the_interpreter, kernels

if not KERNELS:

    def test_pasts_in_pages_in_the_interpreter():
        in_the_interpreter(__file__)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    "seed", range(150) if CUDA else (2, 3, 4, 5, 9, 14, 18, 23)
)  # chains, rings, pieces, all gates
def test_random_calls(seed, dtype):
    sizes = ((1, 4, 64, 256), 300, (8, 64, 128)) if CUDA else ((1, 4, 16), 24, (8,))
    call = PagedCall(seed, dtype, *sizes)
    expected = call.expected()
    error = (call(DEVICE, backend="triton").double() - expected).norm()
    assert error <= {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] * expected.norm()
