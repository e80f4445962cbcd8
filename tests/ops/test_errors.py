"""Every mistake gets one line that names the argument."""

import warnings

import pytest
import torch

from ka_attention import ka_attention, truncated, walk

Q, KV = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
PAST = torch.randn(2, 2, 3, 8), torch.randn(2, 4, 3, 8)
BAD = [
    ({"q": 1}, TypeError, "q must be a floating-point tensor of 16 to 64 bits, got int"),
    ({"q": Q.int()}, TypeError, "q must be a floating-point tensor .* got a torch.int32 tensor"),
    ({"q": Q.to(torch.float8_e5m2)}, TypeError, "q must be a floating-point tensor .* got a torch.float8_e5m2 tensor"),
    ({"q": Q[0]}, ValueError, r"q must be \[B, H, T, D\], got \[4, 6, 8\]"),
    ({"k": KV.double()}, TypeError, "k must have q's dtype torch.float32, got torch.float64"),
    ({"k": KV.to("meta")}, ValueError, "k must be on q's device cpu, got meta"),
    ({"k": KV[:, :, :5]}, ValueError, r"k must be \[2, 'any', 6, 8\] for q \[2, 4, 6, 8\], got \[2, 2, 5, 8\]"),
    ({"k": KV.repeat(1, 2, 1, 1)[:, :3]}, ValueError, "multiple of k's heads, got 4 query heads and 3 key heads"),
    ({"v": KV[:, :1]}, ValueError, r"v must be \[2, 2, 6, 8\]"),
    ({"v": KV[..., :4]}, ValueError, r"v must be \[2, 2, 6, 8\]"),
    ({"gate": "high"}, TypeError, "gate must be a number or a floating-point tensor, got str"),
    ({"gate": True}, TypeError, "gate must be a number or a floating-point tensor, got bool"),
    ({"gate": float("nan")}, ValueError, "gate must be finite, got nan"),
    ({"gate": 1.5}, ValueError, "gate must be between -1 and 1, got 1.5"),
    ({"gate": -1.001}, ValueError, "gate must be between -1 and 1, got -1.001"),
    ({"gate": torch.ones(4, dtype=torch.int)}, TypeError, "gate must be .* got a torch.int32 tensor"),
    ({"gate": torch.ones(2)}, ValueError, r"gate must be a number, \[Hq\] = \[4\] or .* got \[2\]"),
    ({"gate": torch.ones(4, device="meta")}, ValueError, "gate must be on q's device cpu, got meta"),
    ({"scale": "1"}, TypeError, "scale must be None or a number, got str"),
    ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    ({"window": 2.0}, TypeError, "window must be None or an int, got float"),
    ({"softcap": 0.0}, ValueError, "softcap must be finite and above 0, got 0.0"),
    ({"softcap": float("inf")}, ValueError, "softcap must be finite and above 0, got inf"),
    ({"softcap": float("nan")}, ValueError, "softcap must be finite and above 0, got nan"),
    ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ({"softcap": True}, TypeError, "softcap must be None or a number, got bool"),
    ({"dropout": 0.1}, ValueError, r"dropout must be 0.0 .* got 0.1"),
    ({"backend": "flash"}, ValueError, "backend must be None or one of reference, blocked, triton, got 'flash'"),
    ({"past": PAST[0]}, TypeError, r"past must be None or the pair \(k_past, u_past\)"),
    ({"past": (PAST[1], PAST[1])}, ValueError, r"past\[0\] \(k_past\) must be \[2, 2, 'any', 8\]"),
    ({"past": (PAST[0], PAST[0])}, ValueError, r"past\[1\] \(u_past\) must be \[2, 4, 3, 8\]"),
    ({"past": (PAST[0].half(), PAST[1])}, TypeError, "past.* must have q's dtype"),
    ({"attn_mask": torch.ones(2, 6)}, TypeError, "attn_mask must be a bool tensor .* got a torch.float32 tensor"),
    ({"attn_mask": torch.ones(2, 5).bool()}, ValueError, r"attn_mask must be \[B, P \+ T\] = \[2, 6\]"),
    ({"attn_mask": torch.ones(2, 6).bool(), "past": PAST}, ValueError, r"attn_mask must be \[B, P \+ T\] = \[2, 9\]"),
    ({"attn_mask": torch.ones(6, 6).bool()}, ValueError, "attn_mask must be"),
    ({"attn_mask": torch.ones(2, 3, 6, 6).bool()}, ValueError, "attn_mask must be"),
    ({"attn_mask": torch.ones(2, 6, device="meta").bool()}, ValueError, "attn_mask must be on q's device"),
]
PACKED_BAD = [
    ([0, 6], TypeError, "cu_seqlens must be an int32 tensor, got list"),
    (torch.tensor([0, 6]), TypeError, "cu_seqlens must be an int32 tensor, got a torch.int64 tensor"),
    (torch.tensor([0], dtype=torch.int32), ValueError, r"cu_seqlens must be \[N \+ 1\] with N ≥ 1"),
    (torch.tensor([0, 5], dtype=torch.int32), ValueError, r"cu_seqlens must rise from 0 to T = 6 .* got \[0, 5\]"),
    (torch.tensor([1, 6], dtype=torch.int32), ValueError, "cu_seqlens must rise from 0"),
    (torch.tensor([0, 4, 3, 6], dtype=torch.int32), ValueError, "cu_seqlens must rise from 0"),
    (torch.tensor([0, 6], dtype=torch.int32, device="meta"), ValueError, "cu_seqlens must be on q's device"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_argument(wrong, error, message):
    with pytest.raises(error, match=message) as caught:
        ka_attention(**{"q": Q, "k": KV, "v": KV} | wrong)
    assert "\n" not in str(caught.value)


TOKENS_FIRST = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8)  # [B, T, H, D]


@pytest.mark.parametrize(
    ("k", "options"),
    [
        (TOKENS_FIRST[1], {}),
        (TOKENS_FIRST[1], {"past": (torch.randn(2, 3, 2, 8), torch.randn(2, 3, 4, 8))}),
        (TOKENS_FIRST[0], {"attn_mask": torch.ones(2, 6).bool()}),
        (TOKENS_FIRST[0], {"gate": torch.ones(4)}),
        (TOKENS_FIRST[0][:1], {"cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32)}),
    ],
)
def test_tokens_before_heads(k, options):
    """Where shapes make sense only when transposed, the error says so."""
    q = TOKENS_FIRST[0][: len(k)]
    with pytest.raises(ValueError, match=r"\[B, T, H, D\]: transpose them") as caught:
        ka_attention(q, k, k, **options)
    assert "\n" not in str(caught.value)
    past = options.get("past")
    swapped = options if past is None else {"past": tuple(x.transpose(1, 2) for x in past)}
    assert ka_attention(*(x.transpose(1, 2) for x in (q, k, k)), **swapped).shape == (len(k), 4, 6, 8)


def test_other_mistakes_do_not_speak_of_transposing():
    for wrong, error, _ in BAD:
        with pytest.raises(error) as caught:
            ka_attention(**{"q": Q, "k": KV, "v": KV} | wrong)
        assert "transpose" not in str(caught.value)


def test_a_gate_tensor_beyond_one_warns():
    for gate in (torch.tensor([0.0, 1.0, 0.5, 1.2]), -2 * torch.ones(2, 4, 6)):
        with pytest.warns(UserWarning, match=r"gate goes from .* beyond \[-1, 1\]") as caught:
            ka_attention(Q, KV, KV, gate=gate)
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ka_attention(Q, KV, KV, gate=torch.tensor([-1.0, 1.0, 0.0, 0.5]))


@pytest.mark.parametrize(("cu", "error", "message"), PACKED_BAD)
def test_bad_cu_seqlens(cu, error, message):
    with pytest.raises(error, match=message):
        ka_attention(Q[:1], KV[:1], KV[:1], cu_seqlens=cu)


@pytest.mark.parametrize("other", [{"past": (PAST[0][:1], PAST[1][:1])}, {"attn_mask": torch.ones(1, 6).bool()}])
def test_packed_excludes(other):
    with pytest.raises(ValueError, match="cu_seqlens cannot be combined with past or attn_mask"):
        ka_attention(Q[:1], KV[:1], KV[:1], cu_seqlens=torch.tensor([0, 6], dtype=torch.int32), **other)


def test_packed_needs_one_row():
    with pytest.raises(ValueError, match=r"for a batch of 1, got .* for a batch of 2"):
        ka_attention(Q, KV, KV, cu_seqlens=torch.tensor([0, 6], dtype=torch.int32))


@pytest.mark.parametrize("hops", [0, -1, 1.5, True])
def test_bad_hops(hops):
    with pytest.raises(ValueError, match="hops must be an int of at least 1"):
        truncated(Q, KV, KV, hops=hops)


def test_walk_checks_too():
    with pytest.raises(ValueError, match="window must be at least 1"):
        walk(Q, KV, window=0)
    with pytest.raises(ValueError, match=r"past\[0\] \(k_past\) must be"):
        walk(Q, KV, k_past=PAST[1])


def test_values_of_cu_seqlens_are_read_once_a_tensor_and_again_when_they_change(monkeypatch):
    q = torch.randn(1, 2, 5, 8)
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    reads = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x, read=torch.Tensor.tolist: reads.append(x) or read(x))
    ka_attention(q, q, q, cu_seqlens=cu, backend="reference")
    once = len(reads)
    ka_attention(q, q, q, cu_seqlens=cu, backend="reference")
    assert sum(x is cu for x in reads[once:]) == sum(x is cu for x in reads[:once]) - 1
    with pytest.raises(ValueError, match="from 0 to T = 4"):
        ka_attention(*(x[:, :, :4] for x in (q, q, q)), cu_seqlens=cu)
    cu[1] = 7
    with pytest.raises(ValueError, match="without falling"):
        ka_attention(q, q, q, cu_seqlens=cu)
    with torch.inference_mode():
        ka_attention(q, q, q, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
