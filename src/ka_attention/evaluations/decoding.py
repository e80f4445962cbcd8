"""Speed of both caches against context: tokens/s of prefill and of single-token steps, and the caches' bytes."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from ka_attention.harness.figures.drawing import COLOURS, name_lines, powers_of_two
from ka_attention.harness.figures.statistics import mean
from ka_attention.harness.models.arms import ArmResults
from ka_attention.harness.run.timing import in_turns
from ka_attention.harness.training.trained import Trained
from ka_attention.hf import KACache, attach, bytes_per_token, cache_bytes
from ka_attention.report.document import Figure, Section, Table

STEPS = 8  # timed tokens per turn
# Contexts, batch sizes and turns: what the goals name where there is an accelerator, a few seconds of it elsewhere.
CUDA = (128, 512, 2048, 8192), (1, 32), 8
CPU = (32, 128, 512, 1024), (1,), 3


@dataclass(frozen=True)
class Measured:
    """One kind of cache at one context.

    prefill_tokens_per_s: of one parallel pass over the context that fills the cache.
    tokens_per_s:         of single-token steps after it, all sequences of the batch together.
    bytes_a_token:        of the filled cache, from its tensors; ``allocated_a_token``: what CUDA's allocator holds
                          more (None elsewhere); ``computed``: from the configuration.
    """

    bytes_a_token: float
    allocated_a_token: float | None
    computed: int
    prefill_tokens_per_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Row:
    """The stock model with its KV cache and KA-attention with a KA cache, after ``context`` tokens per sequence."""

    batch: int
    context: int
    kv: Measured
    ka: Measured


@dataclass(frozen=True)
class Decoding:
    """Rows of the softmax model ("MHA") and of its grouped-query sibling ("GQA")."""

    models: dict[str, tuple[Row, ...]]


def run(trained: Trained) -> Decoding | None:
    """Of the first seed of a plain softmax model: speed depends on the model's shape, not on its weights."""
    return evaluate(trained.model) if trained.is_plain_softmax and trained.seed == 0 else None


def grouped(config: Any) -> Any:
    """A Llama of the same size with a quarter of the key heads (at least one), random weights: speed and bytes only."""
    heads = config.num_attention_heads
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
        )
    )


@torch.inference_mode()
def evaluate(model: Any, *, contexts: tuple[int, ...] = (), batch_sizes: tuple[int, ...] = ()) -> Decoding:
    """Time a softmax model and its grouped-query sibling with both kinds of cache.

    The two kinds take turns token by token; the medians count. On CUDA both run in bfloat16, with 128 to 8,192 tokens
    and batches of 1 and 32 unless given.
    """
    cuda = model.device.type == "cuda"
    usual = CUDA if cuda else CPU
    contexts, batch_sizes, turns = contexts or usual[0], batch_sizes or usual[1], usual[2]
    rows = {}
    for name, each in (("MHA", copy.deepcopy(model)), ("GQA", grouped(model.config))):
        softmax = each.to(model.device, torch.bfloat16 if cuda else model.dtype).eval()
        shared = {id(parameter): parameter for parameter in softmax.parameters()}
        models = {"kv": softmax, "ka": attach(copy.deepcopy(softmax, shared))}
        rows[name] = tuple(_row(models, batch, context, turns) for batch in batch_sizes for context in contexts)
    return Decoding(rows)


@torch.inference_mode()
def _row(models: dict[str, Any], batch: int, context: int, turns: int) -> Row:
    device = models["kv"].device
    ids = torch.randint(models["kv"].config.vocab_size, (batch, context), device=device)
    prefill: dict[str, list[float]] = {kind: [] for kind in models}
    step: dict[str, list[float]] = {kind: [] for kind in models}
    caches: dict[str, Any] = {}
    allocated: dict[str, int] = {}

    def fill(kind: str) -> None:
        before = _allocated(device)
        caches[kind] = (KACache if kind == "ka" else DynamicCache)(config=models[kind].config)
        _read(models[kind], ids, caches[kind])
        allocated[kind] = _allocated(device) - before

    sizes: dict[str, float] = {}
    for turn in range(turns + 1):  # the first one warms up
        caches.clear()
        for kind, seconds, _ in in_turns({kind: partial(fill, kind) for kind in models}, device):
            prefill[kind] += [seconds] if turn else []
            sizes[kind] = cache_bytes(caches[kind]) / ids.numel()
        steps = {kind: partial(_read, models[kind], ids[:, :1], caches[kind]) for kind in models}
        for kind, seconds, _ in in_turns(steps, device, STEPS):
            step[kind] += [seconds] if turn else []
    measured = {
        kind: Measured(
            bytes_a_token=sizes[kind],
            allocated_a_token=allocated[kind] / ids.numel() if device.type == "cuda" else None,
            computed=bytes_per_token(model.config, kind, model.dtype),
            prefill_tokens_per_s=ids.numel() / statistics.median(prefill[kind]),
            tokens_per_s=batch / statistics.median(step[kind]),
        )
        for kind, model in models.items()
    }
    return Row(batch, context, **measured)


def _read(model: Any, ids: torch.Tensor, cache: Any) -> None:
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def sections(arms: Sequence[ArmResults[Decoding]]) -> list[Section]:
    """Speed against context and bytes per token, for query heads with and without shared keys."""
    models = arms[0].seeds[0].models
    rows = [(name, row) for name, found in models.items() for row in found]

    def table(title: str, key: str) -> Table:
        cells = []
        for name, row in rows:
            kv, ka = getattr(row.kv, key), getattr(row.ka, key)
            cells.append([name, str(row.batch), f"{row.context:,}", f"{kv:,.0f}", f"{ka:,.0f}", f"{ka / kv:.2f}"])
        return Table(title, ["heads", "batch", "context", "KV tokens/s", "KA tokens/s", "KA / KV"], cells)

    def ratios(key: str) -> str:
        found = [getattr(row.ka, key) / getattr(row.kv, key) for _, row in rows]
        return f"{mean(found):.2f} × ({min(found):.2f} to {max(found):.2f})"

    last = {name: found[-1] for name, found in models.items()}
    heavier = {name: row.ka.bytes_a_token / row.kv.bytes_a_token for name, row in last.items()}
    words = [
        "A cache is filled by one parallel pass (prefill) and then grows by single tokens; the stock model with its KV "
        "cache and KA-attention with a KA cache take turns token by token on the same machine. Ratios compare, "
        f"absolute figures belong to that machine. KA over KV: decoding {ratios('tokens_per_s')}, prefill "
        f"{ratios('prefill_tokens_per_s')}. MHA has a key head for every query head, GQA a quarter of them.",
        f"A KA cache does not save memory: MHA takes {heavier['MHA']:.2f} × the bytes of a KV cache, GQA "
        f"{heavier['GQA']:.2f} ×, since outputs belong to query heads.",
    ]
    sizes = [
        [name, kind, f"{each.computed:,}", f"{each.bytes_a_token:,.0f}", _or_dash(each.allocated_a_token)]
        for name, row in last.items()
        for kind, each in (("KV", row.kv), ("KA", row.ka))
    ]
    tables = [
        table("Decoding", "tokens_per_s"),
        table("Prefill", "prefill_tokens_per_s"),
        Table("Bytes a token", ["heads", "cache", "computed", "in the cache", "allocator"], sizes),
    ]
    return [Section("Decoding speed", words, tables, [_figure(models, n) for n in sorted({r.batch for _, r in rows})])]


def _or_dash(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}"


def _figure(models: dict[str, tuple[Row, ...]], batch: int) -> Figure:
    def draw(ax: Any) -> None:
        for name, style in zip(models, ("-", "--"), strict=True):
            rows = [row for row in models[name] if row.batch == batch]
            for kind, colour in (("kv", COLOURS["softmax"]), ("ka", COLOURS["KA"])):
                speed = [getattr(row, kind).tokens_per_s for row in rows]
                label = f"{name}, {kind.upper()} cache"
                ax.plot([row.context for row in rows], speed, color=colour, marker="o", linestyle=style, label=label)
        powers_of_two(ax.xaxis, [row.context for row in rows])
        ax.set_ylim(bottom=0)
        ax.set_xlabel("context (tokens)")
        ax.set_ylabel("tokens/s")
        name_lines(ax)

    return Figure(f"speed_by_context_{batch}", f"Decoding speed against context, batch {batch}, higher is better", draw)
