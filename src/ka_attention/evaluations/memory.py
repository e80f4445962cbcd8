"""What a cache weighs: bytes a token and a sequence for KV and KA caches, computed from a model's configuration."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ka_attention.harness.models import decoding, is_softmax
from ka_attention.harness.statistics import arms_with
from ka_attention.hf import KAConfig
from ka_attention.hf.cache.caches import layer_plan
from ka_attention.report.document import Figure, Section, Table

_MIB, _KIB = 2**20, 2**10


def cache_size(model_config: Any, ka: KAConfig | None, kind: str, tokens: int) -> int:
    """Bytes that the ``kind`` cache of one sequence of ``tokens`` tokens takes in all layers of a model with ``ka``.

    A layer stores, for each token it keeps, Hkv keys and Hkv values, or Hkv keys and Hq outputs where it caches
    outputs, of D elements in the model's dtype. A layer with a window w keeps the last w − 1 tokens.
    """
    config = copy.copy(model_config)
    config.ka_config = decoding(ka, kind).to_dict()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    element = (config.dtype or torch.float32).itemsize
    return sum(
        (tokens if window is None else min(tokens, window - 1)) * key_heads * (1 + groups) * head_dim * element
        for groups, window in layer_plan(config)
    )


def evaluate(model_config: Any, ka: KAConfig | None, *, length: int) -> dict[str, Any]:
    """Computed cache bytes of a model: ``ka`` is its KA configuration, None for plain softmax attention.

    For each kind of cache: ``bytes_per_token`` (one token kept in every layer), ``bytes_per_sequence`` (after
    ``length`` tokens) and ``by_length``. ``grouped`` is the same model with a quarter of the key heads (at least
    one).
    """
    grouped = copy.copy(model_config)
    grouped.num_key_value_heads = max(1, model_config.num_attention_heads // 4)
    lengths = [16 * 2**power for power in range(11)]
    return {
        "own": "kv" if is_softmax(ka) else "ka",
        "length": length,
        "window": None if ka is None else ka.window,
        "lengths": lengths,
        **{
            kind: {
                "bytes_per_token": cache_size(model_config, ka, kind, 1),
                "bytes_per_sequence": cache_size(model_config, ka, kind, length),
                "by_length": [cache_size(model_config, ka, kind, tokens) for tokens in lengths],
            }
            for kind in ("kv", "ka")
        },
        "grouped": {
            "query_heads": grouped.num_attention_heads,
            "key_value_heads": grouped.num_key_value_heads,
            **{kind: cache_size(grouped, ka, kind, 1) for kind in ("kv", "ka")},
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
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:,g}")
        ax.set_xlabel("tokens in the sequence")
        ax.set_ylabel("cache (MiB a sequence)")
        ax.figure.legend(loc="outside upper center")

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
