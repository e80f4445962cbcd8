"""Chunked recurrences against the same, token by token, in float64."""

import pytest
import torch

from ka_attention.harness.models.recurrent import inverse, scan


def naive(q, k, v, decay, beta):
    """S_t = e^a S_{t−1} + k uᵀ, out = Sᵀ q; u = v, or β (v − (e^a S_{t−1})ᵀ k)."""
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        state = decay[:, :, t, None, None].exp() * state
        u = v[:, :, t]
        if beta is not None:
            u = beta[:, :, t, None] * (u - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t]))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, :, t], u)
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(out, 2)


@pytest.mark.parametrize("length", [1, 8, 29])
@pytest.mark.parametrize("delta", [False, True])
def test_chunks_give_what_single_steps_give_and_their_gradients(delta, length):
    q, k, v = (torch.randn(2, 3, length, d, dtype=torch.double) for d in (6, 6, 5))
    k = k / k.norm(dim=-1, keepdim=True)
    decay, beta = -torch.rand(2, 3, length).double(), torch.rand(2, 3, length).double()
    inputs = [x.requires_grad_() for x in (q, k, v, decay, *([beta] if delta else []))]
    want, found = naive(q, k, v, decay, beta if delta else None), scan(*inputs, chunk=8)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(want)
    for one, other in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (found, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_decays_that_leave_nothing_are_finite():
    q, k, v = (torch.randn(1, 1, 128, 4) for _ in range(3))
    decay = torch.full((1, 1, 128), -30.0, requires_grad=True)
    out = scan(q, k, v, decay, torch.ones(1, 1, 128))
    out.sum().backward()
    assert torch.cat([out.flatten(), decay.grad.flatten()]).isfinite().all()


def test_inverses_of_like_keys_stay_exact():
    below = torch.ones(64, 64).tril(-1)[None]  # all keys alike, β 1: powers of it reach 1e18
    torch.testing.assert_close(inverse(below) @ (torch.eye(64) + below), torch.eye(64)[None], rtol=0, atol=1e-5)
