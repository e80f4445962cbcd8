"""KA-attention as a layer, for people who build their own models."""

from typing import Any

import torch
from torch import Tensor, nn

from ka_attention.ops import cache_values, ka_attention


class KAAttention(nn.Module):
    """Multi-head KA-attention with its four projections, and a cache of constant size where it has a window.

    Args:
        embed_dim: size of the inputs and outputs, a multiple of num_heads.
        num_heads: query heads, each of embed_dim // num_heads.
        num_kv_heads: key and value heads, a divisor of num_heads; num_heads by default.
        gate: 0 is softmax attention, 1 is KA-attention.
        learn_gate: make the gate a parameter, one number a head, that starts at `gate`.
        window: a token attends to the last `window` tokens only, itself included.
        bias: whether the projections have one.
        device, dtype: of the parameters.

    Positions are not encoded: add them to the inputs. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        gate: float = 1.0,
        learn_gate: bool = False,
        window: int | None = None,
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
        self.num_heads, self.num_kv_heads, self.window = num_heads, num_kv_heads, window
        kv_dim = num_kv_heads * (embed_dim // num_heads)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.gate = nn.Parameter(torch.full((num_heads,), float(gate), **factory)) if learn_gate else gate

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """[B, T, embed_dim] → [B, T, embed_dim]; attn_mask and cu_seqlens as for `ka_attention`."""
        q, k, v = self._project(x)
        return self._merge(
            ka_attention(q, k, v, gate=self.gate, window=self.window, attn_mask=attn_mask, cu_seqlens=cu_seqlens)
        )

    def extend(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None = None, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The outputs of the tokens x [B, T, embed_dim] after a cached past, and the cache for the tokens after them.

        A cache is (K [B, Hkv, P, D], U [B, Hq, P, D]); with a window it keeps the last window − 1 tokens. `attn_mask`
        covers the cached tokens and the new ones.
        """
        q, k, v = self._project(x)
        a = ka_attention(q, k, v, gate=self.gate, window=self.window, past=past, attn_mask=attn_mask)
        u = cache_values(v, a, self.gate)
        if past is not None:
            k, u = torch.cat([past[0], k], dim=2), torch.cat([past[1], u], dim=2)
        if self.window is not None:
            start = max(0, k.shape[2] - self.window + 1)
            k, u = k[:, :, start:], u[:, :, start:]
        return self._merge(a), (k, u)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for proj, heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_kv_heads),
                (self.v_proj, self.num_kv_heads),
            )
        )
        return q, k, v

    def _merge(self, a: Tensor) -> Tensor:
        return self.out_proj(a.transpose(1, 2).flatten(2))
