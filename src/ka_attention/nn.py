"""KA-attention as a layer, for people who build their own models."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ka_attention.ops import cache_values, clamp_gate, ka_attention

Cache = tuple[Tensor, ...]
Positions = tuple[Tensor, Tensor] | Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class KAAttention(nn.Module):
    """Multi-head KA-attention with its projections, and a cache of constant size where it has a window.

    Args:
        embed_dim: size of the inputs and outputs, a multiple of num_heads.
        num_heads: query heads, each of head_dim = embed_dim // num_heads.
        num_kv_heads: key and value heads, a divisor of num_heads; num_heads by default.
        gate: 0 is softmax attention, 1 is KA-attention.
        learn_gate: make the gate a parameter, one number per head, that starts at `gate`.
        gate_bounds: where a learned gate is kept, by `ka_attention.ops.clamp_gate`; within [-1, 1].
        window: a token attends to the last `window` tokens only, itself included.
        output_gate: multiply A by silu(W_g x) before the output projection.
        convolution: so many tokens, itself included, a causal convolution of each channel of queries, keys and values
            reads before they are attended with (`short_convolution`); it starts as PyTorch's do.
        qk_norm: put each head of queries and keys through an RMSNorm, one for queries and one for keys, after the
            convolution and before positions: x / √(mean x² + 1e-6) · weight (QK norm, arXiv 2010.04245).
        bias: whether the projections have one (W_g has none).
        device, dtype: of the parameters.

    Raises ValueError for sizes that do not divide, a gate beyond its bounds, a convolution of fewer than two tokens.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        gate: float = 1.0,
        learn_gate: bool = False,
        gate_bounds: tuple[float, float] = (0.0, 1.0),
        window: int | None = None,
        output_gate: bool = False,
        convolution: int | None = None,
        qk_norm: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        low, high = gate_bounds if learn_gate else (-1, 1)
        if not -1 <= low <= gate <= high <= 1:
            raise ValueError(f"gate must be between {low} and {high}, which lie in [-1, 1], got {gate}")
        if convolution is not None and convolution < 2:
            raise ValueError(f"convolution must be None or at least 2 tokens, got {convolution}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, embed_dim // num_heads
        self.window, self.gate_bounds = window, gate_bounds
        kv_dim = num_kv_heads * self.head_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias, **factory)
        self.g_proj = nn.Linear(embed_dim, embed_dim, False, **factory) if output_gate else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.gate = nn.Parameter(torch.full((num_heads,), float(gate), **factory)) if learn_gate else gate
        self.q_norm = nn.RMSNorm(self.head_dim, 1e-6, **factory) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, 1e-6, **factory) if qk_norm else None
        self.convolution = None
        if convolution is not None:
            self.convolution = nn.Parameter(torch.empty(convolution, embed_dim + 2 * kv_dim, **factory))
            nn.init.uniform_(self.convolution, -(convolution**-0.5), convolution**-0.5)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_embeddings: Positions | None = None,
    ) -> Tensor:
        """[B, T, embed_dim] → [B, T, embed_dim]; attn_mask and cu_seqlens as for `ka_attention`.

        With a convolution, which reads what a mask hides, there is no attn_mask: ValueError.

        position_embeddings: (cos, sin), each [B or 1, T, R] with an even R ≤ head_dim, as transformers' rotary
            embeddings return them (the first R numbers of queries and keys are rotated, in halves), or a function of
            (q, k), both [B, H, T, head_dim], that returns what is attended with. Without it positions are not encoded.
        """
        q, k, v = self._heads(self._project(x, None, attn_mask, cu_seqlens)[0], position_embeddings)
        a = ka_attention(q, k, v, gate=self._gate(), window=self.window, attn_mask=attn_mask, cu_seqlens=cu_seqlens)
        return self._merge(a, x)

    def extend(
        self,
        x: Tensor,
        past: Cache | None = None,
        attn_mask: Tensor | None = None,
        position_embeddings: Positions | None = None,
    ) -> tuple[Tensor, Cache]:
        """The outputs of the tokens x [B, T, embed_dim] after a cached past, and the cache for the tokens after them.

        A cache is (K [B, Hkv, P, D], U [B, Hq, P, D]); with a window it keeps the last window − 1 tokens. `attn_mask`
        covers the cached tokens and the new ones, `position_embeddings` the new ones: cached keys are normed and
        rotated already. With a convolution of N tokens it ends with what the projections made of the last N − 1 tokens,
        [B, N − 1, embed_dim + 2 Hkv D].
        """
        if past is not None and len(past) != (2 if self.convolution is None else 3):
            raise ValueError(f"past must be what extend returned, got {len(past)} tensors")
        earlier = None if past is None or self.convolution is None else past[2]
        projected, joined = self._project(x, earlier, attn_mask, None)
        q, k, v = self._heads(projected, position_embeddings)
        gate = self._gate()
        kept = None if past is None else (past[0], past[1])
        a = ka_attention(q, k, v, gate=gate, window=self.window, past=kept, attn_mask=attn_mask)
        u = cache_values(v, a, gate)
        if past is not None:
            k, u = torch.cat([past[0], k], dim=2), torch.cat([past[1], u], dim=2)
        if self.window is not None:
            start = max(0, k.shape[2] - self.window + 1)
            k, u = k[:, :, start:], u[:, :, start:]
        if self.convolution is None or joined is None:
            return self._merge(a, x), (k, u)
        return self._merge(a, x), (k, u, carried(earlier, joined, len(self.convolution)))

    def _gate(self) -> float | Tensor:
        return clamp_gate(self.gate, *self.gate_bounds) if isinstance(self.gate, Tensor) else self.gate

    def _project(
        self, x: Tensor, past: Tensor | None, attn_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Cache, Tensor | None]:
        """Queries, keys and values [B, T, H D], convolved after ``past``; and what was convolved, all three in one."""
        projected = tuple(proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.convolution is None:
            return projected, None
        if attn_mask is not None:
            raise ValueError(
                "attn_mask must be None with a convolution, which reads the tokens before whatever a mask hides; "
                "pack sequences with cu_seqlens"
            )
        joined = torch.cat(projected, -1)
        y = short_convolution(joined, self.convolution, past, cu_seqlens)
        return y.split([each.shape[-1] for each in projected], -1), joined

    def _heads(self, projected: Cache, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        """Heads [B, H, T, D] of queries, keys and values, normed and with their positions."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast norms in float32
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if positions is not None:
            q, k = positions(q, k) if callable(positions) else (_rotate(y, *positions) for y in (q, k))
        return q, k, v

    def _merge(self, a: Tensor, x: Tensor) -> Tensor:
        a = a.transpose(1, 2).flatten(2)
        return self.out_proj(a if self.g_proj is None else F.silu(self.g_proj(x)) * a)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    past: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """``y_t = Σ_i weight_i · x_{t−i}``, i < N, each channel apart (depthwise, causal), in the dtype of x.

    x:          ``[B, T, C]``, to the same.
    weight:     ``[N, C]``; the present token has the first row.
    past:       ``[B, N − 1, C]``, what came before x; zeros by default.
    cu_seqlens: ends of packed sequences, 0, …, T, as for `ka_attention`: none reads another.
    seen:       ``[N, B or 1, T]``, whether a token reads the one i before it; all do by default.
    """
    taps, length = weight.shape[0], x.shape[1]
    weight = weight.to(x.dtype)
    earlier = F.pad(x, (0, 0, taps - 1, 0)) if past is None else torch.cat([past, x], 1)
    if cu_seqlens is not None:
        own = in_own_sequence(cu_seqlens, 0, length, taps)
        seen = own if seen is None else seen & own
    if length == 1:  # a step of decoding, in few operations
        read = earlier if seen is None else torch.where(seen.flip(0).transpose(0, 1), earlier, 0)
        return (read * weight.flip(0)).sum(1, keepdim=True)
    # A sum of shifted products, which a compiler fuses with what stands around it.
    products = [weight[i] * earlier[:, taps - 1 - i : taps - 1 - i + length] for i in range(taps)]
    if seen is not None:
        products = [torch.where(seen[i, :, :, None], each, 0) for i, each in enumerate(products)]
    return sum(products)  # type: ignore[return-value]


def in_own_sequence(cu_seqlens: Tensor, first: int, length: int, taps: int) -> Tensor:
    """Whether the one i before a token is of its packed sequence, i < taps, for ``length`` tokens from ``first`` on.

    ``[taps, 1, length]``; cu_seqlens as for `ka_attention`.
    """
    tokens = torch.arange(first, first + length, device=cu_seqlens.device)
    ends = cu_seqlens.to(tokens.dtype)
    place = tokens - ends[torch.searchsorted(ends, tokens, right=True) - 1]  # of a token in its sequence
    return (place >= torch.arange(taps, device=tokens.device)[:, None])[:, None]


def carried(past: Tensor | None, x: Tensor, taps: int) -> Tensor:
    """The ``past`` of the tokens after x ``[B, T, C]`` for a `short_convolution` of so many taps: the last of both."""
    kept = taps - 1
    earlier = x.new_zeros(x.shape[0], kept, x.shape[2]) if past is None else past
    return torch.cat([earlier, x[:, -kept:]], 1)[:, -kept:]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embeddings (arXiv 2104.09864) of the first R numbers of x [B, H, T, D]; cos and sin [B or 1, T, R]."""
    (B, _, T, D), R = x.shape, cos.shape[-1]
    if cos.ndim != 3 or cos.shape != sin.shape or cos.shape[:2] not in ((B, T), (1, T)) or R % 2 or R > D:
        raise ValueError(
            f"position_embeddings must be (cos, sin), each [B or 1, T, R] = [{B} or 1, {T}, R] with an even R up to "
            f"{D}, got {list(cos.shape)} and {list(sin.shape)}"
        )
    turned, rest = x.split([R, D - R], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
