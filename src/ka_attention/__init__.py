"""KA-attention: causal attention in which a past token contributes its attention output instead of its value."""

from ka_attention.ops import cache_values, ka_attention

__all__ = ["cache_values", "ka_attention"]
