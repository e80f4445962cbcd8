"""How many heads a decoder's attention has, and how large they are."""

from __future__ import annotations

from typing import Any, NamedTuple


class Heads(NamedTuple):
    """``query`` heads read ``key`` heads (as many, or a divisor) of ``dim`` numbers each."""

    query: int
    key: int
    dim: int

    @classmethod
    def of(cls, text: Any) -> Heads:
        """Those of a decoder's configuration, where keys and the head dimension may be left to follow."""
        query = text.num_attention_heads
        key = getattr(text, "num_key_value_heads", None) or query
        return cls(query, key, getattr(text, "head_dim", None) or text.hidden_size // query)
