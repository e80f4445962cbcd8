"""Whole requests through transformers' continuous batching, of two models that take turns.

Prompts come in chunks of 8,192 tokens at most, on a GPU with CUDA graphs and asynchronous batches. All requests are
there before the first batch is made, so that the batches are the same each time; each model serves a case until it
captures no graph. Then one serves it and the other right after, first the one and next time the other, and what counts
is the ratio of their times: what slows the machine down for longer than a turn meets both. Turns in which a graph was
captured do not count. Both loops of batches run in this one thread, not in threads of the managers', of which now the
one and now the other is a third slower for seconds; nothing is collected within a turn.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from ka_attention.hf.batching import windows_of

Row = dict[str, Any]
PAGE, NEW, SHARE = 256, 64, 0.2
LEAST, MOST, WARM = 5, 41, 8  # pairs of a case; turns until no graph is captured


def in_pairs(models: dict[str, Any], cases: list[tuple[int, int]], new: int, seconds: float) -> Iterator[Row]:
    """Of each case (requests, context) a row "served" of both models, with medians of their ``times``, and one "pair":
    ``ratios`` of the second's time to the first's, so the first's speed over the second's, their median and its 95 %
    interval, ``low`` to ``high``, and ``first``, that of times to the first token. A case takes some ``seconds``.
    """
    most, longest = (max(numbers) for numbers in zip(*cases, strict=True))
    servers: dict[str, Server] = {}
    try:
        for arm, model in models.items():
            servers[arm] = Server(model, most, longest, new)
        gc.collect()
        gc.freeze()
        gc.disable()
        for requests, context in cases:
            arms = [arm for arm, server in servers.items() if requests * (context + new) <= server.tokens]
            for arm in arms:
                still = 0  # turns without a graph: batches have two sets of graphs, which take turns as well
                for _ in range(WARM):
                    still = 0 if servers[arm].serve(requests, context, new)["captured"] else still + 1
                    if still == 2:
                        break
            pairs: list[dict[str, Row]] = []
            end = time.perf_counter() + seconds
            for turn in range(MOST):
                if len(pairs) >= LEAST and time.perf_counter() > end:
                    break
                found = {arm: servers[arm].serve(requests, context, new) for arm in arms[:: 1 if turn % 2 else -1]}
                if not any(row["captured"] for row in found.values()):
                    pairs.append(found)
            if not pairs:
                raise RuntimeError(f"{requests} requests of {context}: graphs are captured in every turn")
            yield from ({"kind": "served", "arm": arm, **_median([pair[arm] for pair in pairs])} for arm in arms)
            if len(arms) == 2:
                yield {"kind": "pair", "requests": requests, "context": context, "new": new, **_ratio(arms, pairs)}
    finally:
        gc.enable()
        gc.unfreeze()
        for server in servers.values():
            server.manager.destroy()


def _median(rows: list[Row]) -> Row:
    """The row of one case, of several times."""
    row = rows[0] | {name: statistics.median(row[name] for row in rows) for name in ("seconds", "first_token_s")}
    speed = row["requests"] / row["seconds"]
    return row | {
        "times": [row["seconds"] for row in rows],
        "requests_per_s": speed,
        "tokens_per_s": speed * row["new"],
    }


def _ratio(arms: list[str], pairs: list[dict[str, Row]]) -> Row:
    one, other = arms
    ratios = [pair[other]["seconds"] / pair[one]["seconds"] for pair in pairs]
    low, high = interval(ratios)
    first = statistics.median(pair[one]["first_token_s"] / pair[other]["first_token_s"] for pair in pairs)
    return {
        "arms": arms,
        "ratios": ratios,
        "median": statistics.median(ratios),
        "low": low,
        "high": high,
        "first": first,
    }


def interval(x: list[float]) -> tuple[float, float]:
    """Where the median of what ``x`` was drawn from is with 95 % probability, whatever its distribution: the numbers of
    certain ranks, or, of five or less, the least and the greatest.
    """
    n, below, rank = len(x), 0.0, 0
    while (below := below + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    lowest = max(0, rank - 1)
    return sorted(x)[lowest], sorted(x)[n - 1 - lowest]


class Server:
    """A manager whose loop of batches `serve` runs; for so many requests at most."""

    def __init__(self, model: Any, requests: int, context: int, new: int) -> None:
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=new)
        fields: dict[str, Any] = {"max_batch_tokens": 8192, "max_requests_per_batch": requests}
        if torch.cuda.is_available():
            fields |= {"use_cuda_graph": True, "use_async_batching": True, "max_memory_percent": SHARE}
        else:
            pages = context // PAGE + 1 if None in windows_of(model) else 1
            fields |= {"num_blocks": requests * pages + 8, "max_memory_percent": 0.5}
        self.manager = manager = model.init_continuous_batching(greedy, ContinuousBatchingConfig(**fields))
        manager.warmup()
        manager.current_batch, self.captured = 0, 0
        self.processor = processor = manager.batch_processor
        self.begins = processor.use_async_batching  # the first batch of all has none before it to wait for
        capture = processor.model_runner._capture_graph

        def count_and_capture(*arguments: Any) -> None:
            self.captured += 1
            capture(*arguments)

        processor.model_runner._capture_graph = count_and_capture
        is_full = any(group.ring is None for group in processor.cache.groups.values())
        self.tokens = processor.cache.num_blocks * PAGE if is_full else math.inf
        self.vocabulary = model.config.vocab_size

    @torch.no_grad()
    def serve(self, requests: int, context: int, new: int) -> Row:
        """All requests at once, to their last tokens."""
        captured, results = self.captured, self.manager.output_router.output_queue
        first: list[float] = []
        for prompt in torch.randint(2, self.vocabulary, (requests, context)).tolist():
            self.manager.add_request(prompt, record_timestamps=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        while len(first) < requests:
            self.begins &= self.manager._generation_loop_body(self.processor, self.begins)
            while not results.empty():
                result = results.get()
                if result.error:
                    raise RuntimeError(f"{requests} requests of {context}: {result.error}")
                first.append(result.timestamps[0] - start)
        seconds, captured = time.perf_counter() - start, self.captured - captured
        return {
            "requests": requests, "context": context, "new": new, "seconds": seconds,
            "first_token_s": statistics.median(first), "captured": captured,
        }  # fmt: skip
