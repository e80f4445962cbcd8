"""The mechanism: the operator, its approximation by hops and its diagnostics. Imports torch only."""

from ka_attention.ops.api import cache_values, ka_attention

__all__ = ["cache_values", "ka_attention"]
