"""KA-attention in Hugging Face transformers: attention function, masks, caches, gates."""

from ka_attention.hf.attach import attach, detach, is_attached, use
from ka_attention.hf.cache.caches import KACache, KAStaticCache, bytes_per_token, cache_bytes
from ka_attention.hf.config import KAConfig
from ka_attention.hf.gates import KAGate
from ka_attention.hf.layer import reconfigure
from ka_attention.hf.ranks import SequenceParallelMixin, sequence_parallel, share, share_batches
from ka_attention.hf.saving import load_adapter, save_adapter
from ka_attention.hf.support import attention_modules, check_supported
from ka_attention.hf.types import ka_classes, register

__all__ = [
    "KACache",
    "KAConfig",
    "KAGate",
    "KAStaticCache",
    "SequenceParallelMixin",
    "attach",
    "attention_modules",
    "bytes_per_token",
    "cache_bytes",
    "check_supported",
    "detach",
    "is_attached",
    "ka_classes",
    "load_adapter",
    "reconfigure",
    "register",
    "save_adapter",
    "sequence_parallel",
    "share",
    "share_batches",
    "use",
]
