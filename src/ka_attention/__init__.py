"""KA-attention: causal attention in which a past token contributes its attention output instead of its value."""

from ka_attention.nn import KAAttention
from ka_attention.ops import Walk, cache_values, ka_attention, truncated, walk

__all__ = ["KAAttention", "Walk", "cache_values", "ka_attention", "truncated", "walk"]
