"""KA-attention: causal attention in which a past token contributes its attention output instead of its value."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ka_attention.nn import KAAttention
    from ka_attention.ops import Walk, cache_values, ka_attention, truncated, walk

__all__ = ["KAAttention", "Walk", "cache_values", "ka_attention", "truncated", "walk"]


def __getattr__(name: str) -> Any:
    """Import torch with the first name that is used, so that ``ka --help`` answers without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("ka_attention.nn" if name == "KAAttention" else "ka_attention.ops"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
