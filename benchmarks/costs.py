"""What a step over ranks costs: a model of compute, latency and bandwidth, fitted to small measurements.

A step of L_w windowed and L_f full layers on a text of T tokens over n ranks takes

    t = max(a + (b + d L_f) T / n + c L_f T² / n     the work of the GPU
            + L_w (λ + e T / n),                     if n > 1: small kernels, what is read twice
            h + L_w η (⌈log₂ n⌉ + 2))                its launches by the host; η if n > 1
      + 3 α (L_w (⌈log₂ n⌉ + 1) + 4 L_f)             three passes: keys, maps, composing those; heads, four times
      + (L_w m n + L_f f T / n) / β                  bytes: maps of all ranks, heads for tokens
      + 3 · 2 P (n − 1) / (n β)                      FSDP: parameters in bfloat16 twice, gradients in float32 once

a, b: windowed steps of one GPU at two lengths; c, d: what full layers add there; λ, e: a windowed layer in one of two
shares beside the same share alone, behind other work and without messages; h, η: windowed steps of next to no tokens,
whole and in one of eight; α, β: a small and a large all-to-all. Nothing is fitted to the rows that are predicted.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import table

Row = dict[str, Any]
WINDOWED, HYBRID, HEADS = "KA window 8", "KA 3:1", "softmax, all-to-all"
# Assumed, not measured. Between hosts: 400 Gbit/s a GPU at 80 %, and the latency of a switched network. Within a host,
# where messages were not measured: NVLink's 450 GB/s each way at 80 %.
HOST, NETWORK_BYTES_PER_MS, NETWORK_LATENCY_MS = 8, 40e6, 0.02
LINK_BYTES_PER_MS, LINK_LATENCY_MS = 360e6, 0.02
NEAR = 0.15  # what a prediction may be off by
CONSTANTS = {"calibration", "a windowed layer", "launches", "bytes"}  # parts


@dataclass(frozen=True)
class Costs:
    """Milliseconds, tokens and bytes; see above."""

    a: float
    b: float
    c: float
    d: float
    extra: float  # λ
    e: float
    host: float  # h
    host_share: float  # η
    alpha: float
    beta: float
    map_bytes: float  # m, of a windowed layer and another rank
    token_bytes: float  # f, of a full layer and a token, with n → ∞

    def step(self, tokens: float, ranks: int, windowed: int, full: int, parameters: int) -> tuple[float, float]:
        """Milliseconds of a step, and of them what is communication."""
        share = tokens / ranks
        compute = self.a + (self.b + self.d * full) * share + self.c * full * tokens * share
        if ranks == 1:
            return max(compute, self.host), 0.0
        others = ranks - 1
        sent = windowed * self.map_bytes * others
        if full:
            sent += full * self.token_bytes * share * others / ranks
        sent += 3 * 2 * parameters * others / ranks
        waits = 3 * self.alpha * (windowed * (_levels(ranks) + 1) + 4 * full)
        messages = sent / self.beta + waits
        compute += windowed * (self.extra + self.e * share)
        launches = self.host + windowed * self.host_share * (_levels(ranks) + 2)
        return max(compute, launches) + messages, messages


def _levels(ranks: int) -> int:
    """Steps in which the maps of all ranks are composed."""
    return (ranks - 1).bit_length()


def fit(rows: list[Row]) -> Costs:
    """The constants, from the rows of the parts that `CONSTANTS` names, and of "messages" where there are any."""
    steps = {(row["arm"], row["tokens"]): row for row in rows if row["part"] == "calibration"}
    short, long = sorted({tokens for _, tokens in steps})
    windowed = {T: statistics.median(steps[WINDOWED, T]["ms"]) for T in (short, long)}
    b = (windowed[long] - windowed[short]) / (long - short)
    full = steps[HYBRID, short]["full_layers"]
    more = {T: (statistics.median(steps[HYBRID, T]["ms"]) - windowed[T]) / full for T in (short, long)}
    c = (more[long] / long - more[short] / short) / (long - short)
    messages = sorted((row for row in rows if row["part"] == "messages"), key=lambda row: row["bytes"])
    layers = [row for row in rows if row["part"] == "a windowed layer"]
    shared = {row["tokens"]: row for row in layers if row["ranks"] == 2}
    extra = {row["tokens"]: shared[row["tokens"]]["ms"] - row["ms"] for row in layers if row["ranks"] == 1}
    first, *_, last = sorted(extra)
    e = (extra[last] - extra[first]) / (last - first)
    whole, *_, shares = sorted((row for row in rows if row["part"] == "launches"), key=lambda row: row["ranks"])
    host = statistics.median(whole["ms"])
    sent = [row for row in rows if row["part"] == "bytes" and "full" in row]
    return Costs(
        a=windowed[short] - b * short,
        b=b,
        c=c,
        d=more[short] / short - c * short,
        extra=extra[first] - e * first,
        e=e,
        host=host,
        host_share=(statistics.median(shares["ms"]) - host) / (shares["ka_layers"] * (_levels(shares["ranks"]) + 2)),
        alpha=messages[0]["ms"] if messages else LINK_LATENCY_MS,
        beta=_bandwidth(*messages) if messages else LINK_BYTES_PER_MS,
        map_bytes=sent[-1]["windowed"] / (sent[-1]["ranks"] - 1),
        token_bytes=_token_bytes(sent[-1]),
    )


def _bandwidth(small: Row, large: Row) -> float:
    return (large["bytes"] - small["bytes"]) / (large["ms"] - small["ms"])


def _token_bytes(row: Row) -> float:
    ranks = row["ranks"]
    return row["full"] / (row["tokens"] / ranks) * ranks / (ranks - 1)


def beyond(costs: Costs) -> Costs:
    """Between hosts, at the assumed network."""
    return replace(costs, alpha=costs.alpha + NETWORK_LATENCY_MS, beta=min(costs.beta, NETWORK_BYTES_PER_MS))


def kind(row: Row) -> tuple:
    """What a row measures, which is measured again by a row of the same kind. Data parallel rows are compared with one
    GPU of the same run, which a run on another number of GPUs therefore leaves in its place.
    """
    names = ("part", "model", "arm", "way", "ranks", "sent", "tokens", "dtype", "window", "packed")
    own = {"messages": row.get("bytes"), "data parallel": taken_on(row)}
    return (*map(row.get, names), own.get(row["part"]))


def taken_on(row: Row) -> str:
    """The GPUs of the run that took a row, without its software."""
    return row["machine"].partition(",")[0]


def report(rows: list[Row]) -> str:
    """The tables, in Markdown."""
    return "\n\n".join(section for section in _sections(rows) if section) + "\n"


def _sections(rows: list[Row]) -> Iterator[str]:
    measured = any(row["part"] == "messages" for row in rows)
    yield "# Training over GPUs"
    yield "Written by `python -m benchmarks.ranks`."
    yield _machines(rows)
    if not measured:
        yield (
            "**There was one GPU.** Of more ranks than one the middle one was measured by itself: its time and memory "
            "are real, its messages were counted and not sent. Rows of two and four GPUs, a ring beside them, and data "
            "parallel rows of more than one GPU are missing."
        )
    else:
        *fewer, most = map(str, sorted({row["ranks"] for row in rows if row.get("sent")}))
        counts = " and ".join(filter(None, [", ".join(fewer), most]))
        yield (
            f"Measured on {counts} GPUs, those of a run on one host; what more would do is predicted, at the end. "
            "A row is of the last run that took it, so rows may be of different days. Rows of one GPU were taken on "
            "all GPUs of their run at once, each by itself."
        )
    yield _exact(rows)
    yield "## Data parallel"
    yield "GPUs are compared with one GPU of the same run."
    yield _data([row for row in rows if row["part"] == "data parallel"])
    yield "## One long text in shares"
    yield "A step: forward, backward with recomputed layers, AdamW; FSDP2, bfloat16."
    yield _long([row for row in rows if row["part"] in ("calibration", "long texts") and "ms" in row])
    yield _missing([row for row in rows if "skipped" in row])
    yield "Bytes that one rank, the middle one, sends to all others for a layer of the 47 M model in a step, counted:"
    yield _bytes([row for row in rows if row["part"] == "bytes"])
    if layers := [row for row in rows if row["part"] == "a windowed layer"]:
        yield "A windowed layer, forward twice and backward, on a GPU with work before it; in a share without messages:"
        yield _layers(layers)
    if {row["part"] for row in rows} >= CONSTANTS:
        costs = fit(rows)
        yield "## The cost model"
        yield _constants(costs, measured)
        known = max([row["ranks"] for row in rows if row["part"] == "messages"], default=1)
        yield _judged(costs, [row for row in rows if row["part"] == "long texts"], known)
        yield "## More ranks, by the model"
        yield (
            f"The 47 M model, 131,072 tokens a rank. Hosts of {HOST} GPUs; between them "
            f"{NETWORK_BYTES_PER_MS / 1e6:.0f} GB/s a GPU and {1e3 * NETWORK_LATENCY_MS:.0f} µs a message, which are "
            "assumed and not measured. Hybrids on more ranks than the model's 8 key heads are arithmetic: all-to-all "
            "cannot split their full layers further."
        )
        yield _larger(costs, next(row for row in rows if row["part"] == "calibration"))


def _machines(rows: list[Row]) -> str:
    parts: dict[str, dict[str, None]] = {}
    for row in rows:
        parts.setdefault(row["machine"], {})[row["part"]] = None
    return "\n".join(f"- {machine}: {', '.join(found)}" for machine, found in parts.items())


def _exact(rows: list[Row]) -> str:
    found = [row for row in rows if row["part"] == "exact"]
    if not found:
        return ""
    cells = []
    for row in found:
        window = "none" if row["window"] is None else str(row["window"])
        kind = [row["dtype"], window, "yes" if row["packed"] else "no", str(row["ranks"]), f"{row['tokens']:,}"]
        cells.append([*kind, f"{row['one']:.1e}", f"{row['shares']:.1e}"])
    texts = [
        f"A hybrid trained for 20 steps, float32, {row['tokens']:,} tokens a text: its loss goes from "
        f"{row['first']:.4f} to {row['last']:.4f}, that of {row['ranks']} ranks is within {row['apart']:.1e} of it."
        for row in rows
        if row["part"] == "a training"
    ]
    about = (
        "The operator against itself in float32 in one process; the largest relative error of its output and gradients:"
    )
    head = ["dtype", "window", "packed", "ranks", "tokens", "one process", "shares"]
    return "\n\n".join(["## The same as one process", about, table(head, cells), *texts])


def _data(rows: list[Row]) -> str:
    alone = {(taken_on(row), row["way"]): row["tokens_per_s"] for row in rows if row["ranks"] == 1}
    cells = []
    for row in rows:
        speed = row["tokens_per_s"]
        share = speed / row["ranks"] / alone[taken_on(row), row["way"]]
        start = [row["model"], row["arm"], row["way"], str(row["batch"]), taken_on(row), str(row["ranks"])]
        cells.append([*start, f"{speed:,.0f}", f"{100 * share:.1f} %"])
    head = ["model", "attention", "", "texts a GPU", "taken on", "GPUs", "tokens/s", "of one GPU's, a GPU"]
    return table(head, cells)


def _long(rows: list[Row]) -> str:
    cells = []
    for row in sorted(rows, key=lambda row: (row["tokens"], row["model"], row["arm"], row["ranks"])):
        start = [f"{row['tokens']:,}", row["model"], row["arm"], _ranks(row)]
        cells.append([*start, f"{statistics.median(row['ms']) / 1e3:.3g}", f"{row['peak_gib']:.1f}", taken_on(row)])
    return table(["tokens", "model", "attention", "ranks", "s a step", "peak GiB", "taken on"], cells)


def _missing(rows: list[Row]) -> str:
    cases: dict[str, list[str]] = {}
    for row in rows:
        what = f"{row['arm']} {row['model']}, {row['tokens']:,} tokens, {_ranks(row)}"
        cases.setdefault(row["skipped"], []).append(what)
    return "\n".join(f"- Not measured, {reason}: {'; '.join(found)}." for reason, found in cases.items())


def _bytes(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        full = f"{row['full']:,}" if "full" in row else "more ranks than heads"
        cells.append([str(row["ranks"]), f"{row['tokens']:,}", f"{row['windowed']:,}", full])
    return table(["ranks", "tokens of the text", "a windowed layer", "a full layer"], cells)


def _layers(rows: list[Row]) -> str:
    alone, cells = {row["tokens"]: row["ms"] for row in rows if row["ranks"] == 1}, []
    for row in rows:
        size = "whole" if row["ranks"] == 1 else f"one of {row['ranks']}"
        cells.append([f"{row['tokens']:,}", size, f"{row['ms']:.3g}", f"{row['ms'] / alone[row['tokens']]:.2f}"])
    return table(["its tokens", "share", "ms", "over the layer alone"], cells)


def _constants(costs: Costs, measured: bool) -> str:
    assumed = "" if measured else ", assumed"
    microseconds = {
        "a step that computes nothing (a)": 1e3 * costs.a,
        "a token, windowed layers (b)": 1e3 * costs.b,
        "1,000 tokens squared, a full layer (c)": 1e9 * costs.c,
        "a token, a full layer in the place of a windowed one (d)": 1e3 * costs.d,
        "a windowed layer in shares (λ)": 1e3 * costs.extra,
        "a token of it (e)": 1e3 * costs.e,
        "the launches of a step (h)": 1e3 * costs.host,
        "more of them, a windowed layer in shares, times ⌈log₂ n⌉ + 2 (η)": 1e3 * costs.host_share,
        f"a small message (α{assumed})": 1e3 * costs.alpha,
    }
    cells = [[name, f"{value:.4g} µs"] for name, value in microseconds.items()]
    cells += [[f"bandwidth of a GPU to others (β{assumed})", f"{costs.beta / 1e6:.4g} GB/s"]]
    cells += [["a windowed layer's map, to another rank (m)", f"{costs.map_bytes:,.0f} bytes"]]
    cells += [["a token of a full layer (f)", f"{costs.token_bytes:,.0f} bytes"]]
    return table(["constant", ""], cells)


def _judged(costs: Costs, rows: list[Row], known: int) -> str:
    """``known``: the most GPUs on which a constant was measured."""
    cells, errors, further = [], [], []
    for row in rows:
        if "skipped" in row or row["model"] != "47M" or "ring" in row["arm"]:
            continue
        took = statistics.median(row["ms"])
        layers = row["ka_layers"], row["full_layers"]
        predicted, messages = costs.step(row["tokens"], row["ranks"], *layers, row["parameters"])
        predicted -= 0.0 if row["sent"] else messages
        start = [row["arm"], f"{row['tokens']:,}", _ranks(row)]
        cells.append([*start, f"{took:.4g}", f"{predicted:.4g}", f"{100 * (predicted / took - 1):+.1f} %"])
        errors.append((abs(predicted / took - 1), row["ranks"] > 1 and row["sent"]))
        if row["sent"] and row["ranks"] > known:
            further.append(abs(predicted / took - 1))
    near = [together for error, together in errors if error <= NEAR]
    counts = (
        f"Within {100 * NEAR:.0f} % are {len(near)} of {len(errors)} rows, to none of which the model is fitted; "
        f"of the {sum(together for _, together in errors)} that several GPUs took together, {sum(near)}."
    )
    if further:
        counts += (
            f" No constant was measured on more GPUs than {known}; rows of more, {len(further)}, are within "
            f"{100 * max(further):.1f} %."
        )
    return table(["attention", "tokens", "ranks", "measured ms", "predicted ms", ""], cells) + f"\n\n{counts}"


def _ranks(row: Row) -> str:
    return str(row["ranks"]) if row["sent"] or row["ranks"] == 1 else f"one of {row['ranks']}"


def _larger(costs: Costs, size: Row) -> str:
    layers, cells = size["ka_layers"] + size["full_layers"], []
    for name, full in ((WINDOWED, 0), (HYBRID, layers // 4)):
        for ranks in (1, 2, 4, 8, 64, 1024):
            tokens = ranks << 17
            used = costs if ranks <= HOST else beyond(costs)
            took, sent = used.step(tokens, ranks, layers - full, full, size["parameters"])
            speed = tokens / took * 1e3
            cells.append([name, str(ranks), f"{tokens:,}", f"{took / 1e3:.3g}", f"{100 * sent / took:.1f} %",
                          f"{speed:,.0f}"])  # fmt: skip
    return table(["attention", "ranks", "tokens", "s a step", "messages", "tokens/s"], cells)


def write(folder: Path) -> str:
    """``folder``/report.md from ``folder``/rows.json, and its text."""
    text = report(json.loads((folder / "rows.json").read_text()))
    (folder / "report.md").write_text(text)
    return text
