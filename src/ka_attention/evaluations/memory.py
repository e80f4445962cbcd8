"""What a cache weighs: bytes per token and a sequence for KV and KA caches, computed from a model's configuration."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ka_attention.harness.figures.drawing import look, powers_between, powers_of_two
from ka_attention.harness.models.arms import ArmResults
from ka_attention.harness.models.saved import NAMES, cache_size, is_softmax
from ka_attention.harness.training.trained import Trained
from ka_attention.hf import KAConfig
from ka_attention.report.document import Figure, Section, Table

_KIB = 1024
LENGTHS = tuple(16 * 2**power for power in range(11))


@dataclass(frozen=True)
class Weight:
    """Bytes of one kind of cache: one token kept in every layer, a sequence, and one of each of ``Memory.lengths``."""

    bytes_per_token: int
    bytes_per_sequence: int
    by_length: tuple[int, ...]


@dataclass(frozen=True)
class Grouped:
    """Bytes a token of the same model with a quarter of the key heads (at least one)."""

    query_heads: int
    key_value_heads: int
    kv: int
    ka: int


@dataclass(frozen=True)
class Memory:
    """Computed cache bytes; ``own`` is the kind of the model's attention, ``length`` the tokens of a sequence."""

    own: str
    length: int
    window: int | None
    lengths: tuple[int, ...]
    kv: Weight
    ka: Weight
    grouped: Grouped

    @property
    def of_own(self) -> Weight:
        """The weight of the model's own cache."""
        return self.kv if self.own == "kv" else self.ka


def run(trained: Trained) -> Memory:
    """Of the model, at the length that it was trained with."""
    return evaluate(trained.model.config, trained.arm.ka, length=trained.settings.sequence_length)


def evaluate(model_config: Any, ka: KAConfig | None, *, length: int) -> Memory:
    """Computed cache bytes of a model: ``ka`` is its KA configuration, None for plain softmax attention."""
    grouped = copy.copy(model_config)
    grouped.num_key_value_heads = max(1, model_config.num_attention_heads // 4)

    def weight(kind: str) -> Weight:
        return Weight(
            cache_size(model_config, ka, kind, 1),
            cache_size(model_config, ka, kind, length),
            tuple(cache_size(model_config, ka, kind, tokens) for tokens in LENGTHS),
        )

    return Memory(
        own="kv" if is_softmax(ka) else "ka",
        length=length,
        window=ka.window if ka is not None and isinstance(ka.window, int) else None,
        lengths=LENGTHS,
        kv=weight("kv"),
        ka=weight("ka"),
        grouped=Grouped(
            grouped.num_attention_heads,
            grouped.num_key_value_heads,
            *(cache_size(grouped, ka, kind, 1) for kind in NAMES),
        ),
    )


def sections(arms: Sequence[ArmResults[Memory]]) -> list[Section]:
    """Cache bytes of every arm, what grouped queries and windows change."""
    found = [(arm.label, arm.seeds[0]) for arm in arms]
    first = found[0][1]
    table = Table(
        f"Cache of one sequence of {first.length} tokens, computed",
        [
            "arm",
            "its cache",
            "window",
            "bytes per token",
            f"KiB at {first.length} tokens",
            f"KiB at {first.lengths[-1]:,} tokens",
        ],
        [
            [
                label,
                NAMES[memory.own],
                "–" if memory.window is None else str(memory.window),
                f"{memory.of_own.bytes_per_token:,}",
                f"{memory.of_own.bytes_per_sequence / _KIB:,.1f}",
                f"{memory.of_own.by_length[-1] / _KIB:,.1f}",
            ]
            for label, memory in found
        ],
    )
    curves: dict[tuple[int, ...], list[str]] = {}
    for label, memory in found:
        curves.setdefault(memory.of_own.by_length, []).append(label)
    looks = {arm.seeds[0].of_own.by_length: look(arm.arm) for arm in reversed(arms)}

    def draw(ax: Any) -> None:
        for sizes, labels in curves.items():
            kib = [size / _KIB for size in sizes]
            ax.plot(first.lengths, kib, label=" and ".join(labels), **looks[sizes])
        powers_of_two(ax.xaxis, first.lengths[::2])
        ends = [size / _KIB for sizes in curves for size in (sizes[0], sizes[-1])]
        powers_of_two(ax.yaxis, powers_between(min(ends), max(ends)))
        ax.set_xlabel("tokens in the sequence")
        ax.set_ylabel("cache (KiB per sequence)")
        ax.figure.legend(loc="outside upper center")

    figure = Figure(
        "cache_memory", "Cache of one sequence against its length, computed (arms of equal size share a line)", draw
    )
    return [Section("Memory", _words([memory for _, memory in found]), [table], [figure])]


def _words(found: list[Memory]) -> list[str]:
    kv, ka, grouped = found[0].kv.bytes_per_token, found[0].ka.bytes_per_token, found[0].grouped
    if ka == kv:
        same = (
            f"A KA cache is **not smaller** than a KV cache: both take {kv:,} bytes per token in this model, because "
        )
        same += "an attention output is as large as the value it replaces."
    else:
        same = f"In this model a KV cache takes {kv:,} bytes per token and a KA cache {ka:,} ({ka / kv:.2f} ×)."
    paragraphs = [
        same,
        "With grouped queries it is larger: outputs belong to query heads, so a KA cache keeps Hkv + Hq heads per "
        f"token where a KV cache keeps 2 Hkv. With {grouped.query_heads} query heads on {grouped.key_value_heads} key "
        f"head{'s' if grouped.key_value_heads > 1 else ''} this model would take {grouped.kv:,} bytes per token as KV "
        f"and {grouped.ka:,} as KA ({grouped.ka / grouped.kv:.2f} ×).",
    ]
    windows = sorted({memory.window for memory in found if memory.window is not None})
    if windows:
        paragraphs.append(
            "A window w makes a cache of constant size for either kind: only the last w − 1 tokens are kept, here "
            + " and ".join(f"{window - 1} with w = {window}" for window in windows)
            + ". A windowed softmax layer then sees no further than its window; in a windowed KA layer what is kept "
            "are attention outputs, which still carry what earlier tokens resolved."
        )
    return paragraphs
