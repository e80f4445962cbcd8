"""Speed of both caches against context: tokens/s of prefill and of single-token steps, and the caches' bytes."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from ka_attention.harness.statistics import mean
from ka_attention.harness.store import Json
from ka_attention.harness.timing import now
from ka_attention.hf import KACache, attach, bytes_per_token, cache_bytes
from ka_attention.report.document import Figure, Section, Table

STEPS = 8  # timed tokens a turn
# Contexts, batch sizes and turns: what the goals name where there is an accelerator, a few seconds of it elsewhere.
CUDA = (128, 512, 2048, 8192), (1, 32), 8
CPU = (32, 128, 512, 1024), (1,), 3


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
def evaluate(
    model: Any, *, contexts: tuple[int, ...] = (), batch_sizes: tuple[int, ...] = ()
) -> dict[str, list[dict[str, Json]]]:
    """For a softmax model ("MHA") and its grouped-query sibling ("GQA"): speed and bytes with both kinds of cache.

    Rows of ``batch``, ``context`` and, under "kv" (the stock model) and "ka", ``prefill_tokens_per_s`` (one parallel
    pass over ``context`` random tokens that fills the cache), ``tokens_per_s`` (single-token steps after it),
    ``bytes_a_token`` of the filled cache, measured from its tensors, as what CUDA's allocator holds more
    (``allocated_a_token``, None elsewhere) and ``computed`` from the configuration. The two kinds take turns token by
    token; the medians count. On CUDA both run in bfloat16, with 128 to 8,192 tokens and batches of 1 and 32 unless
    given.
    """
    cuda = model.device.type == "cuda"
    usual = CUDA if cuda else CPU
    contexts, batch_sizes, turns = contexts or usual[0], batch_sizes or usual[1], usual[2]
    rows: dict[str, list[dict[str, Json]]] = {}
    for name, each in (("MHA", copy.deepcopy(model)), ("GQA", grouped(model.config))):
        softmax = each.to(model.device, torch.bfloat16 if cuda else model.dtype).eval()
        shared = {id(parameter): parameter for parameter in softmax.parameters()}
        models = {"kv": softmax, "ka": attach(copy.deepcopy(softmax, shared))}
        rows[name] = [_row(models, batch, context, turns) for batch in batch_sizes for context in contexts]
    return rows


def _row(models: dict[str, Any], batch: int, context: int, turns: int) -> dict[str, Json]:
    device = models["kv"].device
    ids = torch.randint(models["kv"].config.vocab_size, (batch, context), device=device)
    prefill: dict[str, list[float]] = {kind: [] for kind in models}
    step: dict[str, list[float]] = {kind: [] for kind in models}
    row: dict[str, Json] = {"batch": batch, "context": context}
    for turn in range(turns + 1):
        caches: dict[str, Any] = {}
        for kind, model in models.items():
            cache = caches[kind] = (KACache if kind == "ka" else DynamicCache)(config=model.config)
            before = _allocated(device)
            seconds = _timed(model, ids, cache)
            row[kind] = {
                "bytes_a_token": cache_bytes(cache) / ids.numel(),
                "allocated_a_token": (_allocated(device) - before) / ids.numel() if device.type == "cuda" else None,
                "computed": bytes_per_token(model.config, kind, model.dtype),
            }
            if turn:  # the first one warms up
                prefill[kind].append(seconds)
        for _ in range(STEPS):
            for kind, model in models.items():
                seconds = _timed(model, ids[:, :1], caches[kind])
                if turn:
                    step[kind].append(seconds)
    for kind in models:
        row[kind]["prefill_tokens_per_s"] = ids.numel() / statistics.median(prefill[kind])
        row[kind]["tokens_per_s"] = batch / statistics.median(step[kind])
    return row


def _timed(model: Any, ids: torch.Tensor, cache: Any) -> float:
    start = now(ids.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return now(ids.device) - start


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def sections(results: dict[str, Json]) -> list[Section]:
    """Speed against context and bytes a token, for query heads with and without shared keys."""
    seeds = [seed["decoding"] for arm in results["arms"].values() for seed in arm["seeds"] if seed.get("decoding")]
    if not seeds:
        return []
    rows = [(name, i, row) for name, found in seeds[0].items() for i, row in enumerate(found)]

    def speeds(name: str, i: int, key: str) -> list[float]:
        return [mean([seed[name][i][kind][key] for seed in seeds]) for kind in ("kv", "ka")]

    def table(title: str, key: str) -> Table:
        return Table(
            title,
            ["heads", "batch", "context", "KV tokens/s", "KA tokens/s", "KA / KV"],
            [
                [name, str(row["batch"]), f"{row['context']:,}", f"{kv:,.0f}", f"{ka:,.0f}", f"{ka / kv:.2f}"]
                for name, i, row in rows
                for kv, ka in [speeds(name, i, key)]
            ],
        )

    def ratios(key: str) -> str:
        found = [ka / kv for name, i, _ in rows for kv, ka in [speeds(name, i, key)]]
        return f"{mean(found):.2f} × ({min(found):.2f} to {max(found):.2f})"

    last = {name: found[-1] for name, found in seeds[0].items()}
    words = [
        "A cache is filled by one parallel pass (prefill) and then grows by single tokens; the stock model with its KV "
        "cache and KA-attention with a KA cache take turns token by token on the same machine. Ratios compare, "
        f"absolute figures belong to that machine. KA over KV: decoding {ratios('tokens_per_s')}, prefill "
        f"{ratios('prefill_tokens_per_s')}. MHA has a key head for every query head, GQA a quarter of them.",
        "A KA cache does not save memory: MHA takes "
        f"{last['MHA']['ka']['bytes_a_token'] / last['MHA']['kv']['bytes_a_token']:.2f} × the bytes of a KV cache, "
        f"GQA {last['GQA']['ka']['bytes_a_token'] / last['GQA']['kv']['bytes_a_token']:.2f} ×, since outputs belong to "
        "query heads.",
    ]
    sizes = Table(
        "Bytes a token",
        ["heads", "cache", "computed", "in the cache", "allocator"],
        [
            [
                name,
                kind.upper(),
                *("–" if row[kind][key] is None else f"{row[kind][key]:,.0f}"
                  for key in ("computed", "bytes_a_token", "allocated_a_token")),
            ]
            for name, row in last.items()
            for kind in ("kv", "ka")
        ],
    )  # fmt: skip
    tables = [table("Decoding", "tokens_per_s"), table("Prefill", "prefill_tokens_per_s"), sizes]
    return [Section("Decoding speed", words, tables, [_figure(rows, speeds, n) for n in _batches(rows)])]


def _batches(rows: list[tuple[str, int, dict[str, Json]]]) -> list[int]:
    return sorted({row["batch"] for _, _, row in rows})


def _figure(rows: list[tuple[str, int, dict[str, Json]]], speeds: Any, batch: int) -> Figure:
    def draw(axes: Any) -> None:
        for name in dict.fromkeys(name for name, _, _ in rows):
            points = [(row["context"], *speeds(name, i, "tokens_per_s")) for own, i, row in rows
                      if own == name and row["batch"] == batch]  # fmt: skip
            contexts, *series = zip(*points, strict=True)
            for kind, speed in zip(("KV", "KA"), series, strict=True):
                axes.plot(contexts, speed, marker="o", label=f"{name}, {kind} cache")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel("tokens/s")
        axes.legend()

    return Figure(f"speed_by_context_{batch}", f"Decoding speed against context, batch {batch}, higher is better", draw)
