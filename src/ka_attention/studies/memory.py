"""What a cache weighs: bytes a token and a sequence for KV and KA caches, computed from a model's configuration."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ka_attention.hf.config import KAConfig
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.statistics import arms_with

_MIB, _KIB = 2**20, 2**10


def is_softmax(ka: KAConfig | None) -> bool:
    """Whether a model with this configuration computes softmax attention in every layer."""
    return ka is None or (ka.gate == "fixed" and ka.gate_init == 0)


def cache_size(model_config: Any, ka: KAConfig | None, kind: str, tokens: int) -> int:
    """Bytes that the ``kind`` ("kv" or "ka") cache of one sequence of ``tokens`` tokens takes in all layers.

    A layer stores, for each token it keeps, Hkv keys and Hkv values (kv) or Hkv keys and Hq outputs (ka) of D
    elements in the model's dtype. A layer with a window w keeps the last w − 1 tokens. Layers outside ``ka.layers``
    keep all tokens, as keys and values.
    """
    query_heads = model_config.num_attention_heads
    key_heads = getattr(model_config, "num_key_value_heads", None) or query_heads
    head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // query_heads
    itemsize = (model_config.dtype or torch.get_default_dtype()).itemsize
    size = 0
    for layer in range(model_config.num_hidden_layers):
        inside = ka is None or ka.enabled(layer)
        kept = min(tokens, ka.window - 1) if inside and ka is not None and ka.window is not None else tokens
        heads = key_heads + (query_heads if inside and kind == "ka" else key_heads)
        size += kept * heads * head_dim * itemsize
    return size


def evaluate(model_config: Any, ka: KAConfig | None, *, length: int) -> dict[str, Any]:
    """Computed cache bytes of a model: ``ka`` is its KA configuration, None for plain softmax attention.

    For each kind of cache: ``bytes_per_token`` (one token kept in every layer), ``bytes_per_sequence`` (after
    ``length`` tokens) and ``by_length``. ``grouped`` is the same model with a quarter of the key heads (at least
    one).
    """
    grouped = copy.deepcopy(model_config)
    grouped.num_key_value_heads = max(1, model_config.num_attention_heads // 4)
    unbounded = None if ka is None else KAConfig(layers=ka.layers)
    lengths = [16 * 2**power for power in range(11)]
    return {
        "own": "kv" if is_softmax(ka) else "ka",
        "length": length,
        "window": None if ka is None else ka.window,
        "lengths": lengths,
        **{
            kind: {
                "bytes_per_token": cache_size(model_config, unbounded, kind, 1),
                "bytes_per_sequence": cache_size(model_config, ka, kind, length),
                "by_length": [cache_size(model_config, ka, kind, tokens) for tokens in lengths],
            }
            for kind in ("kv", "ka")
        },
        "grouped": {
            "query_heads": grouped.num_attention_heads,
            "key_value_heads": grouped.num_key_value_heads,
            **{kind: cache_size(grouped, unbounded, kind, 1) for kind in ("kv", "ka")},
        },
    }


def sections(results: dict[str, Any]) -> list[Section]:
    """Cache bytes of every arm, what grouped queries and windows change."""
    arms = [(label, arm["seeds"][0]["memory"]) for label, arm in arms_with(results, "memory")]
    if not arms:
        return []
    length = arms[0][1]["length"]
    table = Table(
        f"Cache of one sequence of {length} tokens, computed",
        [
            "arm",
            "its cache",
            "window",
            "bytes a token",
            f"KiB at {length} tokens",
            f"KiB at {arms[0][1]['lengths'][-1]:,} tokens",
        ],
        [
            [
                label,
                memory["own"].upper(),
                "–" if memory["window"] is None else str(memory["window"]),
                f"{memory[memory['own']]['bytes_per_token']:,}",
                f"{memory[memory['own']]['bytes_per_sequence'] / _KIB:,.1f}",
                f"{memory[memory['own']]['by_length'][-1] / _KIB:,.1f}",
            ]
            for label, memory in arms
        ],
    )
    curves: dict[tuple[float, ...], list[str]] = {}
    for label, memory in arms:
        curves.setdefault(tuple(memory[memory["own"]]["by_length"]), []).append(label)

    def draw(ax: Any) -> None:
        for sizes, labels in curves.items():
            ax.plot(arms[0][1]["lengths"], [size / _MIB for size in sizes], label=" and ".join(labels))
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xlabel("tokens in the sequence")
        ax.set_ylabel("cache (MiB a sequence)")
        ax.legend()

    figure = Figure(
        "cache_memory", "Cache of one sequence against its length, computed (arms of equal size share a line)", draw
    )
    return [Section("Memory", _words(arms), [table], [figure])]


def _words(arms: list[tuple[str, dict[str, Any]]]) -> list[str]:
    first = arms[0][1]
    kv, ka, grouped = first["kv"]["bytes_per_token"], first["ka"]["bytes_per_token"], first["grouped"]
    if ka == kv:
        same = f"A KA cache is **not smaller** than a KV cache: both take {kv:,} bytes a token in this model, because "
        same += "an attention output is as large as the value it replaces."
    else:
        same = f"In this model a KV cache takes {kv:,} bytes a token and a KA cache {ka:,} ({ka / kv:.2f} ×)."
    paragraphs = [
        same,
        "With grouped queries it is larger: outputs belong to query heads, so a KA cache keeps Hkv + Hq heads a "
        f"token where a KV cache keeps 2 Hkv. With {grouped['query_heads']} query heads on "
        f"{grouped['key_value_heads']} key head{'s' if grouped['key_value_heads'] > 1 else ''} this model would take "
        f"{grouped['kv']:,} bytes a token as KV and {grouped['ka']:,} as KA ({grouped['ka'] / grouped['kv']:.2f} ×).",
    ]
    windows = sorted({memory["window"] for _, memory in arms if memory["window"] is not None})
    if windows:
        paragraphs.append(
            "A window w makes a cache of constant size for either kind: only the last w − 1 tokens are kept, here "
            + " and ".join(f"{window - 1} with w = {window}" for window in windows)
            + ". A windowed softmax layer then sees no further than its window; in a windowed KA layer what is kept "
            "are attention outputs, which still carry what earlier tokens resolved."
        )
    return paragraphs
