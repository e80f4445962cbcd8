"""Pasts in pages: packed sequences, each after its own, give what each gives alone."""

import pytest
import torch
from paged_calls import PagedCall

from ka_attention import ka_attention
from ka_attention.ops import paged
from ka_attention.ops.inputs import Past

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_random_calls(backend, dtype):
    for seed in range(60 if dtype == torch.float64 else 15):
        call = PagedCall(seed, dtype)
        expected = call.expected()
        error = (call(backend=backend).double() - expected).norm()
        assert error <= TOLERANCE[dtype] * expected.norm(), seed


def example(**changes):
    """Two sequences of 3 and 1 new tokens after 5 and 0, in pages of 4."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    tables = {
        "past": (torch.randn(3, 2, 4, 8), torch.randn(3, 4, 4, 8)),
        "cu_seqlens": torch.tensor([0, 3, 4], dtype=torch.int32),
        "block_table": torch.tensor([[2, 0], [1, 1]], dtype=torch.int32),
        "cache_seqlens": torch.tensor([5, 0], dtype=torch.int32),
    }
    return ka_attention(q, k, v, **{**tables, **changes})


INT = {"dtype": torch.int32}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cache_seqlens": None}, ValueError, "block_table and cache_seqlens are given together, with cu_seqlens"),
        ({"past": None}, ValueError, "are given together"),
        ({"cu_seqlens": None}, ValueError, "are given together"),
        ({"attn_mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, "block_table cannot be combined"),
        ({"past": torch.randn(3, 2, 4, 8)}, TypeError, r"past must be the pair \(k_pages, u_pages\)"),
        ({"past": (torch.randn(3, 1, 4, 8),) * 2}, ValueError, r"past\[0\] \(k_pages\) must be \['any', 2, 'any', 8\]"),
        ({"past": (torch.randn(3, 2, 4, 8),) * 2}, ValueError, r"past\[1\] \(u_pages\) must be \[3, 4, 4, 8\]"),
        ({"block_table": torch.zeros(2, 2)}, TypeError, "block_table must be an int32 tensor, got a"),
        ({"block_table": torch.zeros(3, 2, **INT)}, ValueError, r"block_table must be \[N, width\] with N = 2"),
        ({"cache_seqlens": torch.zeros(3, **INT)}, ValueError, r"cache_seqlens must be \[N\] with N = 2"),
        ({"cache_seqlens": torch.tensor([9, 0], **INT)}, ValueError, r"between 0 and the 8 tokens .* got \[9, 0\]"),
        ({"cache_seqlens": torch.tensor([-1, 0], **INT)}, ValueError, "cache_seqlens must be between 0"),
        ({"block_table": torch.tensor([[2, 3], [1, 1]], **INT)}, ValueError, "block_table must name pages .*, 0 to 2"),
        ({"past": (torch.randn(3, 2, 4, 8), torch.randn(3, 4, 4, 8).requires_grad_())}, RuntimeError, "for inference"),
    ],
)  # fmt: skip
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        example(**changes)


def test_what_is_out_of_sight_may_be_gone():
    inside = example(window=2)
    for table in ([[7, 0], [-1, 9]], [[0], [9]]):  # no such pages; a ring of one page, which token 4 came to last
        assert torch.equal(example(window=2, block_table=torch.tensor(table, **INT)), inside)
    with pytest.raises(ValueError, match="name pages"):
        example(window=3, block_table=torch.tensor([[7, 0], [-1, 9]], **INT))


def test_a_table_is_looked_at_again_when_it_changes():
    table, lengths = torch.tensor([[2, 0], [1, 1]], **INT), torch.tensor([5, 0], **INT)
    example(block_table=table, cache_seqlens=lengths)
    table[0, 0] = 5
    with pytest.raises(ValueError, match="name pages"):
        example(block_table=table, cache_seqlens=lengths)
    table[0, 0], lengths[0] = 2, 9
    with pytest.raises(ValueError, match="between 0 and the 8"):
        example(block_table=table, cache_seqlens=lengths)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_tokens_after_the_last_end_change_nothing(backend):
    call = PagedCall(3)
    options = {"scale": 0.5, "window": None, "softcap": None}
    past, ends = (
        Past(*call.tables["past"], call.tables["block_table"], call.tables["cache_seqlens"]),
        call.tables["cu_seqlens"],
    )
    padded = (torch.cat([x, torch.full_like(x[:, :, :1], torch.nan)], dim=2) for x in call.new)
    out = paged.run(*padded, None, past, ends, options, False, backend)
    assert torch.equal(out[:, :, :-1], paged.run(*call.new, None, past, ends, options, False, backend))


def test_compiled_code_sees_one_operator():
    call = PagedCall(7)
    compiled = torch.compile(lambda: call(), backend="eager", fullgraph=False)
    assert torch.equal(compiled(), call())
    names = "past", "block_table", "cache_seqlens", "cu_seqlens"
    (k_pages, u_pages), *tables = (call.tables[name] for name in names)
    arguments = *call.new, None, k_pages.nan_to_num(), u_pages.nan_to_num(), *tables
    torch.library.opcheck(paged.forward, (*arguments, 0.5, None, None, False, *paged.UNBOUNDED, "blocked", "0"))


def test_sizes_of_zero():
    none = torch.zeros(2, 0, **INT)
    empty = {"cu_seqlens": torch.zeros(3, **INT), "block_table": none, "cache_seqlens": torch.zeros(2, **INT)}
    q = torch.randn(1, 2, 0, 8)
    assert ka_attention(q, q, q, past=(torch.randn(0, 2, 4, 8),) * 2, **empty).shape == q.shape


def test_first_tokens_need_no_pages():
    q = torch.randn(1, 2, 3, 8)
    tables = {"cu_seqlens": torch.tensor([0, 1, 3], **INT), "cache_seqlens": torch.zeros(2, **INT)}
    a = ka_attention(q, q, q, past=(torch.randn(0, 2, 4, 8),) * 2, block_table=torch.zeros(2, 0, **INT), **tables)
    assert torch.allclose(a, ka_attention(q, q, q, cu_seqlens=tables["cu_seqlens"]), atol=1e-6)
