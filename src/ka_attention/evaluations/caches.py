"""KV cache against KA cache on one model: perplexity from the first token, speed of the token loop, bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ka_attention.harness.figures.drawing import COLOURS, digits
from ka_attention.harness.figures.statistics import caution, cell, changes, deviation, judged, mean, seeds_of
from ka_attention.harness.models.arms import ArmResults
from ka_attention.harness.models.saved import NAMES, attention, cache_size, own_cache, own_config
from ka_attention.harness.run.timing import in_turns
from ka_attention.harness.training.perplexity import token_losses
from ka_attention.harness.training.trained import BATCH, Trained
from ka_attention.hf import KACache, cache_bytes
from ka_attention.report.document import Figure, Section, Table

SPEED = "Speed of the token loop, higher is better; the two caches of an arm took turns, the arms did not"
WARM_UP = 4  # tokens decoded before the clock starts


@dataclass(frozen=True)
class Decoded:
    """What one kind of cache did: ``seconds`` of the whole loop over ``tokens`` tokens, scoring included.

    ``own``: whether it is the model's own. Bytes are those of the cache after one token and after a sequence, read
    from it (``measured``) and worked out from the configuration (``computed``).
    """

    own: bool
    loss: float
    ppl: float
    tokens: int
    seconds: float
    tokens_per_s: float
    bytes_per_token_measured: float
    bytes_per_token_computed: int
    bytes_per_sequence_measured: float
    bytes_per_sequence_computed: int


@dataclass(frozen=True)
class Caches:
    """The same model through each kind of cache, "kv" and "ka"."""

    kinds: dict[str, Decoded]

    @property
    def own(self) -> str:
        """The kind that belongs to the model's attention."""
        return next(kind for kind, decoded in self.kinds.items() if decoded.own)


def run(trained: Trained) -> Caches:
    """The sample of the validation text, token by token through both caches."""
    return evaluate(trained.model, trained.sample, batch_size=BATCH)


@torch.inference_mode()
def evaluate(model: Any, sequences: Tensor, *, batch_size: int, caches: Sequence[str] = tuple(NAMES)) -> Caches:
    """Decode ``sequences`` (int64 [N, T]) token by token from the first token through each kind of cache.

    No prefill: every step reads one token and the cache that earlier steps wrote. Position i predicts token i + 1, so
    the loss is over the same T − 1 tokens per sequence as in the parallel pass. The kinds take turns batch by batch.
    """
    training = model.training
    model.eval()
    length = sequences.shape[1]
    nll, seconds = dict.fromkeys(caches, 0.0), dict.fromkeys(caches, 0.0)
    sizes: dict[str, tuple[float, float]] = {}
    for kind in caches:
        _decode(model, sequences[:batch_size, :WARM_UP], kind)
    for batch in sequences.split(batch_size):
        ways = {kind: partial(_decode, model, batch, kind) for kind in caches}
        for kind, taken, (lost, first, last) in in_turns(ways, model.device):
            nll[kind] += lost
            seconds[kind] += taken
            sizes[kind] = first / len(batch), last / len(batch)
    model.train(training)
    ka, found = own_config(model), {}
    for kind in caches:
        loss = nll[kind] / (len(sequences) * (length - 1))
        found[kind] = Decoded(
            own=kind == own_cache(model),
            loss=loss,
            ppl=math.exp(loss),
            tokens=sequences.numel(),
            seconds=seconds[kind],
            tokens_per_s=sequences.numel() / seconds[kind],
            bytes_per_token_measured=sizes[kind][0],
            bytes_per_token_computed=cache_size(model.config, ka, kind, 1),
            bytes_per_sequence_measured=sizes[kind][1],
            bytes_per_sequence_computed=cache_size(model.config, ka, kind, length),
        )
    return Caches(found)


def _decode(model: Any, batch: Tensor, kind: str) -> tuple[float, int, int]:
    """Summed negative log-likelihood, and the cache's bytes after one token and after all."""
    batch = batch.to(model.device)
    nll = torch.zeros((), dtype=torch.float64, device=batch.device)
    first = 0
    with attention(model, kind):
        ka = model.config._attn_implementation == "ka"
        cache = KACache(model.config) if ka else DynamicCache(config=model.config)
        for i, token in enumerate(batch.split(1, dim=1)):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
            if i == 0:
                first = cache_bytes(cache)
            if i + 1 < batch.shape[1]:
                nll += token_losses(logits, batch[:, i + 1]).sum()
    return nll.item(), first, cache_bytes(cache)


def sections(arms: Sequence[ArmResults[Caches]]) -> list[Section]:
    """Every arm under both caches: perplexity, speed, bytes."""
    paragraphs = [
        "Each trained model reads the validation samples **token by token from the first token** through each kind "
        "of cache; nothing is prefilled. *KV* caches keys and values (softmax attention), *KA* caches keys and "
        "attention outputs. One of the two is the model's own; the other is a swap without any training.",
        caution(arms),
        _speed(arms),
    ]
    rows = []
    for arm in arms:
        own = arm.seeds[0].own
        for kind in arm.seeds[0].kinds:
            ppl = _figure(arm, kind, "ppl")
            rows.append(
                [
                    arm.label,
                    NAMES[kind] + (" (own)" if kind == own else " (swap)"),
                    cell(ppl),
                    "–" if kind == own else judged(changes(ppl, _figure(arm, own, "ppl"))),
                    cell(_figure(arm, kind, "tokens_per_s"), 0),
                    cell(_figure(arm, kind, "seconds")),
                    f"{mean(_figure(arm, kind, 'bytes_per_token_measured')):,.0f}",
                    f"{mean(_figure(arm, kind, 'bytes_per_sequence_measured')):,.0f}",
                ]
            )
    table = Table(
        f"One model, two caches ({seeds_of(arms)}; bytes are read from the cache)",
        ["trained as", "cache", "PPL", "against own", "tokens/s", "seconds", "bytes per token", "bytes per sequence"],
        rows,
    )
    bars = [
        ("ppl_by_cache", "ppl", "validation PPL", "PPL of each trained model by cache, lower is better"),
        ("speed_by_cache", "tokens_per_s", "tokens/s", SPEED),
    ]
    figures = [
        Figure(name, f"{title} ({seeds_of(arms)})", partial(_bars, arms, key, unit)) for name, key, unit, title in bars
    ]
    return [Section("KV cache against KA cache", paragraphs, [table], figures)]


def _figure(arm: ArmResults[Caches], kind: str, key: str) -> list[float]:
    return arm.each(lambda found: getattr(found.kinds[kind], key))


def _speed(arms: Sequence[ArmResults[Caches]]) -> str:
    """The KA cache's speed over the KV cache's, over all arms and seeds that have both."""
    ratios = [
        seed.kinds["ka"].tokens_per_s / seed.kinds["kv"].tokens_per_s
        for arm in arms
        for seed in arm.seeds
        if {"kv", "ka"} <= seed.kinds.keys()
    ]
    if not ratios:
        return "Speed: only one kind of cache was timed."
    return (
        f"Speed: the KA cache decodes at {mean(ratios):.2f} × the tokens/s of the KV cache (lowest "
        f"{min(ratios):.2f}, highest {max(ratios):.2f} over {len(ratios)} timing{'s' if len(ratios) > 1 else ''}). "
        "Both loops ran in turns on the same machine; ratios compare, absolute figures belong to that machine."
    )


def _bars(arms: Sequence[ArmResults[Caches]], key: str, unit: str, ax: Any) -> None:
    height = 0.38
    for offset, kind in ((-0.5, "kv"), (0.5, "ka")):
        shown = [(y, _figure(arm, kind, key)) for y, arm in enumerate(arms) if kind in arm.seeds[0].kinds]
        spread = [deviation(numbers) for _, numbers in shown]
        bars = ax.barh(
            [y + offset * height for y, _ in shown],
            [mean(numbers) for _, numbers in shown],
            height,
            xerr=spread if any(spread) else None,
            ecolor="C7",
            color=COLOURS["softmax" if kind == "kv" else "KA"],
            label=f"{NAMES[kind]} cache",
        )
        ax.bar_label(bars, labels=[digits(mean(numbers)) for _, numbers in shown], padding=3, fontsize=9)
    ax.set_yticks(range(len(arms)), [arm.label.replace(", ", ",\n") for arm in arms])
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.set_xlabel(unit)
    ax.margins(x=0.14)
    ax.grid(axis="y", visible=False)
    ax.figure.legend(loc="outside upper center", ncols=2)
