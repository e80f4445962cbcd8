"""The mechanism: the operator, its approximation by hops and its diagnostics. Imports torch only."""

from ka_attention.ops.api import cache_values, ka_attention
from ka_attention.ops.gates import clamp_gate
from ka_attention.ops.truncated import truncated
from ka_attention.ops.walk import Walk, walk

__all__ = ["Walk", "cache_values", "clamp_gate", "ka_attention", "truncated", "walk"]
