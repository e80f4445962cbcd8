"""One text over several processes is the operator on the whole text: outputs, gradients, packed sequences, refusals."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from processes import together

from ka_attention import ka_attention
from ka_attention.ops.ranks import Share, share_heads, share_of

T, D = 24, 4
PACKED = (None, [0, 3, 3, 10, T], [0, T // 2, T], [0, 1, T - 1, T])
CASES = list(product((1, 2, 6, 7, None), ("number", "head", "token"), PACKED))


def gate_of(kind, heads):
    if kind == "number":
        return 0.75
    shape = (heads,) if kind == "head" else (1, heads, T)
    return (2 * torch.rand(shape, dtype=torch.float64) - 1).requires_grad_()


def errors(group, window, gate_kind, ends):
    """The largest error of this rank's outputs, and of the gradients summed over ranks."""
    torch.manual_seed(0)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    Hq, Hkv = (10, 5) if window == 6 else (12, 6)  # which cannot be shared out, but windows wider than D would
    q, k, v = (torch.randn(1, heads, T, D, dtype=torch.float64).requires_grad_() for heads in (Hq, Hkv, Hkv))
    gate, grad = gate_of(gate_kind, Hq), torch.randn(1, Hq, T, D, dtype=torch.float64)
    assert share_heads(group, q, k, window) == (window in (7, None))
    leaves = [x for x in (q, k, v, gate) if isinstance(x, torch.Tensor)]
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    whole = ka_attention(q, k, v, gate=gate, window=window, cu_seqlens=cu_seqlens, softcap=3.0)
    expected = torch.autograd.grad(whole, leaves, grad)
    own = slice(rank * T // size, (rank + 1) * T // size)
    share = [x[:, :, own] for x in (q, k, v)]
    part = gate[:, :, own] if gate_kind == "token" else gate
    out = ka_attention(*share, gate=part, window=window, cu_seqlens=cu_seqlens, softcap=3.0, group=group)
    grads = torch.autograd.grad(out, leaves, grad[:, :, own])
    for found in grads:
        dist.all_reduce(found)
    apart = [(out - whole[:, :, own]).abs().max(), *((a - b).abs().max() for a, b in zip(grads, expected, strict=True))]
    return torch.stack(apart).max()


def refusals(group):
    x = torch.randn(1, 2, 8, D)
    for arguments, words in (
        ({"window": 10, "q": x[:, :1], "k": x[:, :1], "v": x[:, :1]}, "window − 1 = 9"),
        ({"window": 2, "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "must end at"),
        ({"past": (x, x)}, "past or attn_mask"),
        ({"q": x[:, :1], "k": x[:, :1], "v": x[:, :1]}, "query heads are shared out, got 1"),
    ):
        with pytest.raises(ValueError, match=words):
            ka_attention(**({"q": x, "k": x, "v": x} | arguments), group=group)
    with pytest.raises(RuntimeError, match="'reference' does not take a group"):
        ka_attention(x, x, x, window=2, group=group, backend="reference")


def compiled(group):
    """Messages are no part of a graph; what is around them is."""
    x = torch.randn(1, 4, 8, D, dtype=torch.float64).requires_grad_()
    loss = lambda x: (2 * ka_attention(x, x, x + 1, gate=0.5, window=3, group=group)).sum()  # noqa: E731
    found, expected = (torch.autograd.grad(f(x), x)[0] for f in (torch.compile(loss, backend="eager"), loss))
    assert torch.allclose(found, expected, rtol=1e-12)


def twice(group):
    x = torch.randn(1, 6, 8, D, dtype=torch.float64).requires_grad_()
    for window in (3, None):
        out = ka_attention(x, x, x + 1, window=window, group=group)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(out.sum(), x, create_graph=True)[0].sum().backward()


def work(folder):
    for case in CASES:
        assert errors(dist.group.WORLD, *case) < 1e-12, case
    refusals(dist.group.WORLD)
    compiled(dist.group.WORLD)
    twice(dist.group.WORLD)


@pytest.mark.parametrize("size", [2, 3])
def test_shares_are_the_whole(size, tmp_path):
    together(work, size, tmp_path)


def test_how_sequences_lie_in_a_share():
    # 8 tokens a rank; the second rank's first token is the third of a sequence that ends two tokens later.
    assert share_of(1, 8, 4, [0, 6, 10, 16]) == Share(seen=2, carried=2, ends=[0, 6])
    assert share_of(1, 8, 2, [0, 6, 10, 16]) == Share(seen=1, carried=2, ends=[0, 6])
    assert share_of(1, 8, 4, [0, 8, 16]) == Share(seen=0, carried=0, ends=[0, 8])
    assert share_of(0, 8, 4, [0, 3, 16]) == Share(seen=0, carried=0, ends=[0, 3, 8])
    assert share_of(1, 8, 4, [0, 16]) == Share(seen=3, carried=8, ends=[0])
