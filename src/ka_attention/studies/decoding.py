"""Decoding speed against context: tokens/s of single-token steps with a KV and a KA cache, and the caches' bytes."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from ka_attention.hf import KACache, bytes_per_token, cache_bytes, use
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.statistics import mean
from ka_attention.studies.store import Json

STEPS = 8  # timed tokens a turn
TURNS = 3


def grouped(config: Any) -> Any:
    """A Llama of the same size with a quarter of the key heads (at least one), random weights: speed and bytes only."""
    heads = config.num_attention_heads
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
        )
    )
    return model.eval()


@torch.inference_mode()
def evaluate(model: Any, *, contexts: tuple[int, ...] = (), batch_size: int = 1) -> dict[str, Json]:
    """For a softmax model and its grouped-query sibling: tokens/s and bytes at every context, both kinds of cache.

    ``contexts`` are 128 to 8,192 tokens on CUDA and 32 to 1,024 elsewhere unless given.
    A cache is filled by one parallel pass over ``context`` random tokens; then single tokens are timed, the two kinds
    in turns, and the median over turns counts. ``bytes_a_token`` is measured from the cache after the fill, on CUDA
    also as what the allocator holds more (``allocated_a_token``), beside what the configuration says (``computed``).
    """
    contexts = contexts or ((128, 512, 2048, 8192) if model.device.type == "cuda" else (32, 128, 512, 1024))
    sibling = grouped(model.config).to(model.device, model.dtype)
    return {name: _times(each, contexts, batch_size) for name, each in (("MHA", model), ("GQA", sibling))}


def _times(model: Any, contexts: tuple[int, ...], batch_size: int) -> list[dict[str, Json]]:
    rows = []
    for context in contexts:
        ids = torch.randint(model.config.vocab_size, (batch_size, context), device=model.device)
        row: dict[str, Json] = {"context": context}
        seconds: dict[str, list[float]] = {"kv": [], "ka": []}
        for turn in range(TURNS + 1):
            for kind, times in seconds.items():
                taken = _turn(model, kind, ids, row)
                if turn:  # the first one warms up
                    times.append(taken)
        for kind, times in seconds.items():
            row[kind]["tokens_per_s"] = batch_size * STEPS / statistics.median(times)
            row[kind]["computed"] = bytes_per_token(model.config, kind, model.dtype)
        rows.append(row)
    return rows


def _turn(model: Any, kind: str, ids: torch.Tensor, row: dict[str, Json]) -> float:
    with use(model, gate=float(kind == "ka")):
        before = _allocated(model.device)
        cache = KACache(model.config) if kind == "ka" else DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        row[kind] = {"bytes_a_token": cache_bytes(cache) / ids.numel()}
        if model.device.type == "cuda":
            row[kind]["allocated_a_token"] = (_allocated(model.device) - before) / ids.numel()
        _wait(model.device)
        start = time.perf_counter()
        for _ in range(STEPS):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        _wait(model.device)
        return time.perf_counter() - start


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sections(results: dict[str, Json]) -> list[Section]:
    """Tokens/s against context, and bytes a token, for query heads with and without shared keys."""
    seeds = [seed["decoding"] for arm in results["arms"].values() for seed in arm["seeds"] if seed.get("decoding")]
    if not seeds:
        return []
    series = {
        (name, kind): [mean([seed[name][i][kind]["tokens_per_s"] for seed in seeds]) for i in range(len(rows))]
        for name, rows in seeds[0].items()
        for kind in ("kv", "ka")
    }
    contexts = [row["context"] for row in seeds[0]["MHA"]]
    ratios = {name: [a / b for a, b in zip(series[name, "ka"], series[name, "kv"], strict=True)] for name in seeds[0]}
    rows = [
        [
            name,
            f"{row['context']:,}",
            *(f"{series[name, kind][i]:,.0f}" for kind in ("kv", "ka")),
            f"{ratios[name][i]:.2f}",
            *(f"{row[kind]['bytes_a_token']:,.0f} ({row[kind]['computed']:,})" for kind in ("kv", "ka")),
        ]
        for name, found in seeds[0].items()
        for i, row in enumerate(found)
    ]
    last = {name: found[-1] for name, found in seeds[0].items()}
    words = [
        "Single-token steps after a cache of so many tokens, KV and KA in turns on the same machine; ratios compare, "
        f"absolute figures belong to that machine. KA over KV: {min(ratios['MHA']):.2f} to {max(ratios['MHA']):.2f} "
        f"with a key head for every query head (MHA), {min(ratios['GQA']):.2f} to {max(ratios['GQA']):.2f} with shared "
        "key heads (GQA).",
        "A KA cache does not save memory: MHA takes "
        f"{last['MHA']['ka']['bytes_a_token'] / last['MHA']['kv']['bytes_a_token']:.2f} × the bytes of a KV cache, "
        f"GQA {last['GQA']['ka']['bytes_a_token'] / last['GQA']['kv']['bytes_a_token']:.2f} ×, since outputs belong to "
        "query heads.",
    ]
    table = Table(
        "Decoding with both caches",
        ["heads", "context", "KV tokens/s", "KA tokens/s", "KA / KV", "KV bytes a token", "KA bytes a token"],
        rows,
    )

    def draw(axes: Any) -> None:
        for (name, kind), speeds in series.items():
            axes.plot(contexts, speeds, marker="o", label=f"{name}, {kind.upper()} cache")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel("tokens/s")
        axes.legend()

    figure = Figure("speed_by_context", "Decoding speed against context, higher is better", draw)
    return [Section("Decoding speed", words, [table], [figure])]
