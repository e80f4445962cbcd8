"""KA-attention: causal attention in which a past token contributes its attention output instead of its value."""

from ka_attention.ops import ka_attention

__all__ = ["ka_attention"]
