"""KV cache against KA cache on one model: perplexity from the first token, speed of the token loop, bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ka_attention.evaluations.memory import cache_size
from ka_attention.harness.models import NAMES, attention, own_cache, own_config
from ka_attention.harness.perplexity import token_losses
from ka_attention.harness.statistics import (
    arms_with,
    caution,
    cell,
    changes,
    deviation,
    mean,
    percent_cell,
    seeds_of,
    values,
    verdict,
)
from ka_attention.harness.timing import now
from ka_attention.hf import KACache, cache_bytes
from ka_attention.report.document import Figure, Section, Table

MEASURED = ("bytes_per_token_measured", "bytes_per_sequence_measured")
WARM_UP = 4  # tokens decoded before the clock starts


@torch.inference_mode()
def evaluate(
    model: Any, sequences: Tensor, *, batch_size: int, caches: Sequence[str] = ("kv", "ka")
) -> dict[str, dict[str, Any]]:
    """Decode ``sequences`` (int64 [N, T]) token by token from the first token through each kind of cache.

    No prefill: every step reads one token and the cache that earlier steps wrote. Position i predicts token i + 1, so
    ``loss`` and ``ppl`` are over the same T − 1 tokens a sequence as those of the parallel pass. ``seconds`` is the
    whole loop over N · T tokens, scoring included; the kinds take turns batch by batch, so that a slow moment of the
    machine touches all of them. Bytes are read from the cache (``measured``: growth by the first token, and after T
    tokens) and computed from the configuration.
    """
    training = model.training
    model.eval()
    length = sequences.shape[1]
    result: dict[str, dict[str, Any]] = {}
    for kind in caches:
        with attention(model, kind):
            _decode(model, sequences[:batch_size, :WARM_UP])
        result[kind] = {
            "own": kind == own_cache(model),
            "nll": 0.0,
            "seconds": 0.0,
            "tokens": sequences.numel(),
            "bytes_per_token_computed": cache_size(model.config, own_config(model), kind, 1),
            "bytes_per_sequence_computed": cache_size(model.config, own_config(model), kind, length),
        }
    for batch in sequences.split(batch_size):
        for kind, row in result.items():
            with attention(model, kind):
                nll, seconds, first, last = _decode(model, batch)
            row["nll"] += nll
            row["seconds"] += seconds
            row["bytes_per_token_measured"], row["bytes_per_sequence_measured"] = first / len(batch), last / len(batch)
    model.train(training)
    for row in result.values():
        row["loss"] = row.pop("nll") / (len(sequences) * (length - 1))
        row["ppl"] = math.exp(row["loss"])
        row["tokens_per_s"] = row["tokens"] / row["seconds"]
    return result


def _decode(model: Any, batch: Tensor) -> tuple[float, float, int, int]:
    """Summed negative log-likelihood, seconds, and the cache's bytes after one token and after all."""
    batch = batch.to(model.device)
    cache = KACache(model.config) if model.config._attn_implementation == "ka" else DynamicCache(config=model.config)
    nll = torch.zeros((), dtype=torch.float64, device=batch.device)
    first = 0
    start = now(batch.device)
    for i, token in enumerate(batch.split(1, dim=1)):
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
        if i == 0:
            first = cache_bytes(cache)
        if i + 1 < batch.shape[1]:
            nll += token_losses(logits, batch[:, i + 1]).sum()
    return nll.item(), now(batch.device) - start, first, cache_bytes(cache)


def sections(results: dict[str, Any]) -> list[Section]:
    """Every arm under both caches: perplexity, speed, bytes."""
    arms = list(arms_with(results, "caches"))
    if not arms:
        return []
    paragraphs = [
        "Each trained model reads the validation samples **token by token from the first token** through each kind "
        "of cache; nothing is prefilled. *KV* caches keys and values (softmax attention), *KA* caches keys and "
        "attention outputs. One of the two is the model's own; the other is a swap without any training.",
        *(_words(label, arm) for label, arm in arms),
        caution(arms),
        _speed(arms),
    ]
    rows = []
    for label, arm in arms:
        own = _own(arm)
        for kind in arm["seeds"][0]["caches"]:
            ppl = values(arm, "caches", kind, "ppl")
            rows.append(
                [
                    label,
                    NAMES[kind] + (" (own)" if kind == own else " (swap)"),
                    cell(ppl),
                    "–" if kind == own else percent_cell(changes(ppl, values(arm, "caches", own, "ppl"))),
                    cell(values(arm, "caches", kind, "tokens_per_s"), 0),
                    cell(values(arm, "caches", kind, "seconds")),
                    *(f"{mean(values(arm, 'caches', kind, key)):,.0f}" for key in MEASURED),
                ]
            )
    table = Table(
        f"One model, two caches ({seeds_of(arms)}; bytes are read from the cache)",
        ["trained as", "cache", "PPL", "against own", "tokens/s", "seconds", "bytes a token", "bytes a sequence"],
        rows,
    )
    return [
        Section(
            "KV cache against KA cache",
            paragraphs,
            [table],
            [
                _bars(
                    "ppl_by_cache", arms, "ppl", "validation PPL", "PPL of each trained model by cache, lower is better"
                ),
                _bars(
                    "speed_by_cache",
                    arms,
                    "tokens_per_s",
                    "tokens/s",
                    "Speed of the token loop by cache, higher is better",
                ),
            ],
        )
    ]


def _own(arm: dict[str, Any]) -> str:
    return next(kind for kind, row in arm["seeds"][0]["caches"].items() if row["own"])


def _words(label: str, arm: dict[str, Any]) -> str:
    own = _own(arm)
    text = f"**{label}**: PPL {cell(values(arm, 'caches', own, 'ppl'))} with its own {NAMES[own]} cache"
    for kind in arm["seeds"][0]["caches"]:
        if kind != own:
            ppl = values(arm, "caches", kind, "ppl")
            change = changes(ppl, values(arm, "caches", own, "ppl"))
            judgement = f"; {verdict(change)}" if len(change) > 1 else ""
            text += f", {cell(ppl)} with a {NAMES[kind]} cache ({percent_cell(change)}{judgement})"
    return text + "."


def _speed(arms: list[tuple[str, dict[str, Any]]]) -> str:
    """The KA cache's speed over the KV cache's, over all arms and seeds that have both."""
    ratios = [
        seed["caches"]["ka"]["tokens_per_s"] / seed["caches"]["kv"]["tokens_per_s"]
        for _, arm in arms
        for seed in arm["seeds"]
        if {"kv", "ka"} <= seed["caches"].keys()
    ]
    if not ratios:
        return "Speed: only one kind of cache was timed."
    return (
        f"Speed: the KA cache decodes at {mean(ratios):.2f} × the tokens/s of the KV cache (lowest "
        f"{min(ratios):.2f}, highest {max(ratios):.2f} over {len(ratios)} timing{'s' if len(ratios) > 1 else ''}). "
        "Both loops ran in turns on the same machine; ratios compare, absolute figures belong to that machine."
    )


def _bars(name: str, arms: list[tuple[str, dict[str, Any]]], key: str, unit: str, caption: str) -> Figure:
    def draw(ax: Any) -> None:
        height = 0.38
        for offset, kind in ((-0.5, "kv"), (0.5, "ka")):
            shown = [(y, values(arm, "caches", kind, key)) for y, (_, arm) in enumerate(arms)]
            shown = [(y, numbers) for y, numbers in shown if numbers]
            spread = [deviation(numbers) for _, numbers in shown]
            bars = ax.barh(
                [y + offset * height for y, _ in shown],
                [mean(numbers) for _, numbers in shown],
                height,
                xerr=spread if any(spread) else None,
                ecolor="C7",
                label=f"{NAMES[kind]} cache",
            )
            ax.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=9)
        ax.set_yticks(range(len(arms)), [label.replace(", ", ",\n") for label, _ in arms])
        ax.invert_yaxis()
        ax.set_xlabel(unit)
        ax.margins(x=0.14)
        ax.grid(axis="y", visible=False)
        ax.figure.legend(loc="outside upper center", ncols=2)

    return Figure(name, f"{caption} ({seeds_of(arms)})", draw)
