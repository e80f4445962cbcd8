"""What stands at the edges of the operator: numbers in the place of tensors, and tensors of size zero."""

import pytest
import torch

from ka_attention import ka_attention


@pytest.mark.parametrize("backend", ["reference", "blocked", None])
def test_a_number_is_as_exact_as_the_inputs(backend):
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64).unbind()
    as_number = ka_attention(q, k, v, gate=0.7, backend=backend)
    as_tensor = ka_attention(q, k, v, gate=torch.full((4,), 0.7, dtype=torch.float64), backend=backend)
    torch.testing.assert_close(as_number, as_tensor, rtol=0, atol=1e-15)


@pytest.mark.parametrize("backend", ["reference", "blocked", None])
@pytest.mark.parametrize("shape", [(0, 4, 9, 8), (2, 4, 0, 8), (2, 4, 9, 0)])
def test_sizes_of_zero_have_gradients_of_zero(backend, shape):
    leaves = [torch.randn(shape, requires_grad=True) for _ in range(3)] + [torch.rand(4, requires_grad=True)]
    out = ka_attention(*leaves[:3], gate=leaves[3], backend=backend)
    assert out.shape == shape
    for grad, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()
