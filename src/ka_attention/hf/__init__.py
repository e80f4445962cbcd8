"""KA-attention in Hugging Face transformers: attention function, masks, caches, gates."""

from ka_attention.hf.attach import attach, attention_modules, check_supported, detach, use
from ka_attention.hf.attention import register
from ka_attention.hf.cache import KACache, KAStaticCache, bytes_per_token, cache_bytes
from ka_attention.hf.config import KAConfig
from ka_attention.hf.gates import KAGate

__all__ = [
    "KACache",
    "KAConfig",
    "KAGate",
    "KAStaticCache",
    "attach",
    "attention_modules",
    "bytes_per_token",
    "cache_bytes",
    "check_supported",
    "detach",
    "register",
    "use",
]
