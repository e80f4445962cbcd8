"""Many requests at once to a Llama of 47 M parameters with random weights: time, memory, and how many fit.

`python -m benchmarks serving` writes each row into docs/results/serving as it comes, `<device>.json`, at last the
tables, `<device>.md`. All arms have the same shapes and run through the same kernels: softmax is the operator with its
gate at 0. Kinds of rows:

step    one token more for each of so many requests with so much context: the model as it decodes, over pages of random
        numbers. On a GPU a replayed CUDA graph, so the GPU's time alone; on a CPU arms take turns.
chunk   8,192 new tokens of so many requests, each after so much context: a chunk of prompts, in the same way, among as
        many sequences as the server has room for (`MOST`).
served  transformers' continuous batching from the first request to the last token, and
pair    the ratios of two arms that take turns (`benchmarks.served`).
fit     requests of 32,768 tokens to which transformers' cache, of nine tenths of the memory beside the model, gives
        blocks, one request after another until there are none.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, set_seed
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import RequestState

from benchmarks.harness import device_type, machine, medians, table
from benchmarks.models import LLAMA
from benchmarks.served import NEW, PAGE, in_pairs
from ka_attention.hf import KAConfig, attach
from ka_attention.hf.batching import windows_of
from ka_attention.hf.heads import Heads
from ka_attention.hf.layer import Layer
from ka_attention.hf.paged import FULL, SMALLEST, Group, KAPagedCache, cache_config, pages_of
from ka_attention.hf.support import attention_modules

Row = dict[str, Any]
OUT = Path(__file__).parents[1] / "docs" / "results" / "serving"
WINDOW, SECONDS, CHUNK, MOST = 8, 12.0, 8192, 256
ARMS = {
    "softmax": KAConfig(gate_init=0.0),
    "softmax window": KAConfig(window=WINDOW, gate_init=0.0),
    "KA window": KAConfig(window=WINDOW, gate="head", gate_init=0.5),
    "KA 3:1": KAConfig(window=WINDOW, gate="head", gate_init=0.5, pattern="3:1"),
}
PAIRS = {"served": ("KA window", "softmax window"), "hybrid": ("KA 3:1", "softmax")}
SHORT = [(requests, context) for context in (512, 4096) for requests in (1, 8, 64, 256)]
GPU: dict[str, Any] = {
    "step": [(requests, context) for context in (512, 4096, 32768, 65536) for requests in (1, 8, 64, 256)],
    "chunk": [(1, 0), (2, 4096), (16, 512), (64, 4096)],
    "served": [*SHORT, (1, 32768), (8, 32768), (1, 65536), (8, 65536), (64, 32768), (64, 65536)],
    "hybrid": [(64, 512), (64, 4096), (8, 32768), (8, 65536)],
    "fit": [32768],
}
CPU: dict[str, Any] = {
    "step": [(1, 512), (8, 512), (1, 4096), (8, 4096)],
    "served": [(1, 512), (8, 512)],
    "hybrid": [(8, 512)],
    "fit": [32768],
}


def build(arm: str, **sizes: int) -> Any:
    """A model with random weights, the same for all arms, in bfloat16 on a GPU."""
    set_seed(0)
    settings: dict[str, Any] = {**LLAMA, **sizes}
    config: Any = LlamaConfig(**settings)
    config._attn_implementation = "sdpa"
    model: Any = attach(LlamaForCausalLM(config), ARMS[arm]).eval()
    return model.to("cuda", torch.bfloat16) if torch.cuda.is_available() else model


class Filled:
    """What requests with ``context`` tokens each hold, in pages of random numbers, and room for ``new`` tokens more."""

    def __init__(self, model: Any, requests: int, context: int, new: int = 1) -> None:
        heads, device = Heads.of(model.config), model.device
        windows, page = windows_of(model), page_of(model)
        self.cache = cache = KAPagedCache.__new__(KAPagedCache)
        layers = [Layer.of(module) for module in attention_modules(model)]
        cache.ka, cache.pool_of, cache.group_of, cache.groups = layers[0].ka, {}, {}, {}
        sized, order, self.bytes = (
            cache_config(model.config, layers, windows, page),
            torch.Generator().manual_seed(0),
            0,
        )
        rooms: dict[int, Tensor] = {}
        for layer, (i, part) in zip(layers, sized.places, strict=True):
            index = int(sized.layer_types[i] != FULL)
            ring = -(-sized.sliding_window // page) if index else None
            each, tokens = ring or -(-(context + new) // page), page if ring is None else sized.sliding_window // ring
            if index not in cache.groups:
                places = torch.randperm(requests * each, generator=order).view(requests, each).tolist()
                tables = {str(i): row for i, row in enumerate(places)}
                cache.groups[index] = Group(index, tables, tokens, page, ring)
            cache.group_of[layer.index] = cache.groups[index]
            if i not in rooms:
                shape = requests * each, sized.num_key_value_heads, page * heads.dim
                rooms[i] = _random(shape, model.dtype, device).flatten(1)
                self.bytes += rooms[i].nbytes // requests
            keys = heads.key * page * heads.dim
            held = rooms[i].split((keys, rooms[i].shape[1] - keys), 1)
            cache.pool_of[layer.index] = pages_of(held, heads, layer.is_ka, tokens, part)
        self.arguments = self._arguments(requests, context, new, device)

    def _arguments(self, requests: int, context: int, new: int, device: torch.device) -> dict[str, Any]:
        """Those of the model's forward pass, as transformers gives them; chunks leave room for `MOST` requests."""
        read, write = [torch.empty(0)] * 2, [torch.empty(0)] * 2
        positions = torch.arange(context, context + new, device=device)
        for group in self.cache.groups.values():
            rows = [group.row(name, context) for name in group.tables]
            tables = torch.tensor(list(group.tables.values()), device=device)
            pages = tables[:, positions // group.page % tables.shape[1]].flatten()
            padding = [0] * (MOST * 2 if new > 1 else 0)
            read[group.index] = torch.tensor([*chain(*rows), *padding], device=device)
            places = pages * group.stride + (positions % group.page).repeat(requests)
            if group.ring is not None:  # transformers has the last tokens alone written
                gone = positions < context + new - group.ring * group.page
                places = places.masked_fill(gone.repeat(requests), group.trash)
            write[group.index] = places
        ends = torch.arange(requests + 1, dtype=torch.int32, device=device) * new
        if new > 1:
            ends = torch.cat((ends, ends[-1:].expand(max(0, MOST - requests))))
        return {
            "cache": self.cache, "read_index": read, "write_index": write, "max_length_k": context + new,
            "cu_seq_lens_q": ends, "position_ids": positions.repeat(requests)[None], "use_cache": False,
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        }  # fmt: skip


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers that repeat: to draw as many as a full card holds takes longer than to read them."""
    x = torch.empty(shape, dtype=dtype, device=device)
    some = torch.randn(min(x.numel(), 1 << 24) // shape[-1] * shape[-1], dtype=dtype, device=device)
    for part in x.view(-1).split(len(some)):
        part.copy_(some[: len(part)])
    return x


def bytes_of(model: Any, context: int) -> int:
    """Bytes that one request of ``context`` tokens takes, from the pages that it needs."""
    windows, page = windows_of(model), page_of(model)
    sized = cache_config(model.config, [Layer.of(module) for module in attention_modules(model)], windows, page)
    pages = [-(-(context if kind == FULL else sized.sliding_window) // page) for kind in sized.layer_types]
    return sum(pages) * page * sized.num_key_value_heads * Heads.of(model.config).dim * model.dtype.itemsize


def page_of(model: Any) -> int:
    """Tokens of a page: one holds what a request keeps where all layers have windows."""
    windows = windows_of(model)
    return PAGE if None in windows else max(SMALLEST, max(w for w in windows if w) - 1)


def step(model: Any, requests: int, context: int, new: int = 1) -> tuple[Callable[[], Tensor], Filled]:
    """A call that reads ``new`` tokens of each request, which can be repeated, and what it reads."""
    filled = Filled(model, requests, context, new)
    tokens = torch.randint(model.config.vocab_size, (1, requests * new), device=model.device)
    last = filled.arguments["cu_seq_lens_q"][1 : requests + 1].long() - 1
    return torch.no_grad()(lambda: model(tokens, logits_to_keep=last, **filled.arguments).logits.argmax(-1)), filled


def steps(kind: str, cases: list[tuple[int, int]], **sizes: int) -> Iterator[Row]:
    """Rows of kind "step" or "chunk"; ``ms`` is None where the context does not fit the card."""
    models = {arm: build(arm, **sizes) for arm in ARMS}
    for requests, context in cases:
        new = 1 if kind == "step" else CHUNK // requests
        calls: dict[str, Callable[[], object]] = {}
        held: dict[str, int] = {}
        took: dict[str, float | None] = {}
        for arm, model in models.items():
            held[arm] = bytes_of(model, context + new)
            if not _fits(requests * held[arm]):
                took[arm] = None
                continue
            call, filled = step(model, requests, context, new)
            assert filled.bytes == held[arm]
            if torch.cuda.is_available():
                took[arm] = _replayed(call)
                del call, filled
            else:
                calls[arm] = call
        took |= medians(calls, 1.0) if calls else {}
        row = {"kind": kind, "requests": requests, "context": context}
        yield from (row | {"arm": arm, "ms": took[arm], "bytes": held[arm]} for arm in ARMS)


def _replayed(call: Callable[[], object], seconds: float = 0.05) -> float:
    """Milliseconds of a replay of the CUDA graph of a call, the median of some that follow one another."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    took: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(took) < 5:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        graph.replay()
        marks[1].record()
        torch.cuda.synchronize()
        took.append(marks[0].elapsed_time(marks[1]))
    return statistics.median(took[1:])


def _fits(needed: int) -> bool:
    if not torch.cuda.is_available():
        return needed < 2 << 30
    torch.cuda.empty_cache()
    return needed < 0.9 * torch.cuda.mem_get_info()[0]


def served(arms: tuple[str, str], new: int, sizes: dict[str, int], cases: list[tuple[int, int]]) -> Iterator[Row]:
    """Rows of kinds "served" and "pair" (`benchmarks.served`)."""
    yield from in_pairs({arm: build(arm, **sizes) for arm in arms}, cases, new, SECONDS)


def fit(context: int, blocks: int | None = None, **sizes: int) -> Iterator[Row]:
    """Rows of kind "fit": what transformers' cache gives one request after another until it has no more, of nine tenths
    of the memory beside a model, or of so many ``blocks``.
    """
    for arm in ARMS:
        model = build(arm, **sizes)
        row = {"kind": "fit", "arm": arm, "context": context, "bytes": bytes_of(model, context + 1), "requests": None}
        if blocks or torch.cuda.is_available():
            fields = {"num_blocks": blocks} if blocks else {"max_memory_percent": 0.9}
            settings = ContinuousBatchingConfig(max_batch_tokens=8192, max_requests_per_batch=256, **fields)
            manager = model.init_continuous_batching(GenerationConfig(eos_token_id=-1), settings)
            cache = manager._create_batch_processor().cache
            requests = next(i for i in itertools.count() if not _given(cache, f"{i}", context + 1))
            held = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in chain(*cache.pool_of.values())}
            row |= {"requests": requests, "allocated": sum(x.nbytes() for x in held.values())}
            del manager, cache, held
        yield row
        del model
        gc.collect()
        torch.cuda.empty_cache()


def _given(cache: Any, name: str, tokens: int) -> bool:
    """Whether the cache had blocks for the tokens of another request."""
    if hasattr(cache, "can_store_request_tokens"):
        return cache.can_store_request_tokens(RequestState(name, []), tokens)
    return cache.allocate_blocks(-(-tokens // cache.block_size), name, 0) is not None  # transformers 5.17


SPEEDS: dict[str, tuple[str, Callable[[Row], float], str]] = {
    "tokens a second (step)": ("step", lambda row: 1e3 * row["requests"] / row["ms"], ",.0f"),
    "thousand tokens a second (chunk)": ("chunk", lambda row: CHUNK / row["ms"], ",.0f"),
    "requests a second (served)": ("served", lambda row: row["requests_per_s"], ".2f"),
    "seconds to the first token, median (served)": ("served", lambda row: row["first_token_s"], ".3f"),
}


def tables(rows: list[Row]) -> Iterator[str]:
    """The rows as Markdown."""
    for name, (kind, value, form) in SPEEDS.items():
        found = {(r["context"], r["requests"], r["arm"]): r for r in rows if r["kind"] == kind}
        lines = []
        for context, requests in sorted({key[:2] for key in found}):
            of = {arm: found.get((context, requests, arm)) for arm in ARMS}
            numbers = {arm: value(row) for arm, row in of.items() if row and row.get("ms", 1) is not None}
            cells = [f"{numbers[arm]:{form}}" if arm in numbers else "no room" if of[arm] else "" for arm in ARMS]
            ratios = [f"{numbers[a] / numbers[b]:.2f}" if {a, b} <= numbers.keys() else "" for a, b in PAIRS.values()]
            lines.append([f"{context:,}", str(requests), *cells, *ratios])
        if lines:
            yield f"**{name}**\n\n" + table(["context", "requests", *ARMS, *map(" / ".join, PAIRS.values())], lines)
    for arms in PAIRS.values():
        lines = []
        pairs = (row for row in rows if row["kind"] == "pair" and row["arms"] == list(arms))
        for row in sorted(pairs, key=lambda row: (row["context"], row["requests"])):
            spread = f"{row['low']:.3f} to {row['high']:.3f}"
            cells = [f"{row['median']:.3f}", spread, str(len(row["ratios"])), f"{row['first']:.2f}"]
            lines.append([f"{row['context']:,}", str(row["requests"]), *cells])
        if lines:
            header = ["context", "requests", "median of pairs", "95 %", "pairs", "time to first token"]
            yield f"**{' / '.join(arms)}, whole requests in turns**\n\n" + table(header, lines)
    fits = [row for row in rows if row["kind"] == "fit"]
    lines = [[r["arm"], f"{r['bytes']:,}", "" if r["requests"] is None else f"{r['requests']:,}"] for r in fits]
    if lines:
        yield f"**a request of {fits[0]['context']:,} tokens**\n\n" + table(["arm", "bytes", "fit one card"], lines)


def run(
    out: Path = OUT, plan: dict[str, Any] | None = None, seconds: float = 900.0, new: int = NEW, **sizes: int
) -> Iterator[str]:
    """All rows of a plan, or of parts of one, each saved as it comes, and the tables; none begins after ``seconds``."""
    plan = plan or (GPU if torch.cuda.is_available() else CPU)
    out.mkdir(parents=True, exist_ok=True)
    about, end = machine("transformers", "triton"), time.perf_counter() + seconds
    rows: list[Row] = []
    parts: dict[str, Callable[..., Iterator[Row]]] = {
        "fit": lambda cases: chain.from_iterable(fit(context, **sizes) for context in cases),
        "step": lambda cases: steps("step", cases, **sizes),
        "chunk": lambda cases: steps("chunk", cases, **sizes),
        **{name: partial(served, arms, new, sizes) for name, arms in PAIRS.items()},
    }
    for row in chain.from_iterable(parts[name](cases) for name, cases in plan.items()):
        rows.append(row)
        (out / f"{device_type()}.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1))
        if time.perf_counter() > end:
            break
    found = list(tables(rows))
    (out / f"{device_type()}.md").write_text(f"# Serving\n\n{about}\n\n" + "\n\n".join(found) + "\n")
    yield from found
