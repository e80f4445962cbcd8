"""What the kernels are to reach, judged from measured figures.

`python -m benchmarks.goals kernels.json [training.json …]` prints the goals and all tables as Markdown. A file holds
`machine` and `records`; a record is one row: its section, case, shape, pass, `ms` by peer, and what else was measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import table

Record = dict[str, Any]
Figure = Callable[[Record], float | None]
MAIN = ("causal", "grouped and packed")  # the sections whose rows the goals for attention are about


def rows(
    sections: Collection[str], passes: Collection[str], peer: str, where: Callable[[Record], bool] = lambda _: True
) -> Figure:
    """KA's time over that of ``peer`` in the records of these sections and passes that hold it; None in others."""

    def figure(record: Record) -> float | None:
        fits = record["section"] in sections and record["pass"] in passes and peer in record["ms"] and where(record)
        return record["ms"]["KA"] / record["ms"][peer] if fits else None

    return figure


def fastest(section: str, passes: Collection[str], where: Callable[[Record], bool] = lambda _: True) -> Figure:
    """KA's time over that of the fastest peer in the records of this section and these passes."""

    def figure(record: Record) -> float | None:
        if record["section"] != section or record["pass"] not in passes or not where(record):
            return None
        return record["ms"]["KA"] / min(time for name, time in record["ms"].items() if name != "KA")

    return figure


def between(section: str, mine: str, other: str, where: Callable[[Record], bool] = lambda _: True) -> Figure:
    """The time of one of our own models over that of another."""

    def figure(record: Record) -> float | None:
        fits = record["section"] == section and {mine, other} <= record["ms"].keys() and where(record)
        return record["ms"][mine] / record["ms"][other] if fits else None

    return figure


def compiled_later(record: Record) -> float | None:
    """Kernels that calls compiled which differ from the first in T, B and the window's value alone."""
    return record.get("compiled_later") if record["pass"] == "fresh" and "window" in record["case"] else None


def speedup(figure: Figure) -> Figure:
    """The inverse ratio: the peer's time over KA's."""

    def inverse(record: Record) -> float | None:
        found = figure(record)
        return None if found is None else 1 / found

    return inverse


def memory(record: Record) -> float | None:
    """KA's peak memory over SDPA's."""
    peaks = record.get("peak_mib", {})
    return peaks["KA"] / peaks["FA2"] if record["pass"] == "both" and "FA2" in peaks else None


def first_call(record: Record) -> float | None:
    """Seconds of the first call with nothing compiled yet."""
    return record["ms"]["KA"] / 1e3 if record["section"] == "first call" and record["pass"] == "fresh" else None


@dataclass(frozen=True)
class Goal:
    """``figure`` must be at most ``must`` in every record that has one, and is aimed to be at most ``aim``."""

    name: str
    must: float
    aim: float
    figure: Figure
    at_least: bool = False  # the bounds are lower ones

    def row(self, records: Iterable[Record]) -> list[str]:
        """Name, bounds, what was measured and where the bounds hold."""
        found = [(figure, record) for record in records for figure in [self.figure(record)] if figure is not None]
        sign = "≥" if self.at_least else "≤"
        bounds = [self.name, f"{sign} {self.must:g}", f"{sign} {self.aim:g}"]
        if not found:
            return [*bounds, "not measured", "", ""]
        figures = [figure for figure, _ in found]
        low, high = f"{min(figures):.3g}", f"{max(figures):.3g}"
        return [*bounds, low if low == high else f"{low} to {high}", self._holds(found, self.must), *self._aim(figures)]

    def _holds(self, found: list[tuple[float, Record]], bound: float) -> str:
        failed = sorted(((f, r) for f, r in found if not self._within(f, bound)), key=lambda pair: pair[0])
        if not failed:
            return "yes"
        figure, record = failed[0 if self.at_least else -1]
        at = f"{record['case']} {_shape(record)}: {figure:.3g}"
        return f"no ({at})" if len(found) == 1 else f"at {len(found) - len(failed)} of {len(found)} (worst: {at})"

    def _aim(self, figures: list[float]) -> list[str]:
        reached = sum(self._within(figure, self.aim) for figure in figures)
        return ["yes" if reached == len(figures) else f"at {reached} of {len(figures)}" if reached else "no"]

    def _within(self, figure: float, bound: float) -> bool:
        return figure >= bound if self.at_least else figure <= bound


def _length(record: Record) -> int:
    return record["shape"][2]


def _is(*shape: int) -> Callable[[Record], bool]:
    return lambda record: record["shape"] == list(shape)


def _window(*windows: int) -> Callable[[Record], bool]:
    return lambda record: record["case"] in [f"window {w}" for w in windows]


def _cudnn(record: Record) -> bool:
    return record["shape"][3] == 128 and _length(record) >= 4096


_DELTAFORMER = ("DeltaFormer",)
GOALS = [
    Goal(
        "forward / FlashAttention-2, T ≥ 2048", 1.1, 0.8, rows(MAIN, ["forward"], "FA2", lambda r: _length(r) >= 2048)
    ),
    Goal("forward / FlashAttention-2, T < 2048", 1.3, 0.8, rows(MAIN, ["forward"], "FA2", lambda r: _length(r) < 2048)),
    Goal("backward / FlashAttention-2", 1.0, 0.8, rows(MAIN, ["backward"], "FA2")),
    Goal("forward + backward / cuDNN, D = 128, T ≥ 4096", 1.6, 1.15, rows(MAIN, ["both"], "cuDNN", _cudnn)),
    Goal("decode step through a cache / SDPA's through a KV cache", 1.02, 1.0, rows(["decode"], ["decode"], "KV")),
    Goal(
        "fla DeltaFormer (its recursion) / KA, forward + backward at 1, 32, 8192, 128",
        5,
        10,
        speedup(rows(_DELTAFORMER, ["both"], "peer", _is(1, 32, 8192, 128))),
        at_least=True,
    ),
    Goal(
        "the same at T ≤ 2048",
        50,
        100,
        speedup(rows(_DELTAFORMER, ["both"], "peer", lambda r: _length(r) <= 2048)),
        at_least=True,
    ),
    *(
        Goal(
            f"windows 2 to 16 / the faster of FlexAttention and FlashAttention-2, {x}",
            1.0,
            aim,
            fastest("narrow window", [x], _window(2, 4, 8, 16)),
        )
        for x, aim in (("forward", 0.6), ("backward", 0.7))
    ),
    *(
        Goal(f"window 64, likewise, {x}", 1.1, 0.9, fastest("narrow window", [x], _window(64)))
        for x in ("forward", "backward")
    ),
    Goal("window 256, likewise, forward + backward", 1.4, 1.1, fastest("window", ["both"], _window(256))),
    Goal("window 1024, likewise, forward + backward", 1.5, 1.1, fastest("window", ["both"], _window(1024))),
    Goal(
        "window 8 / FlashAttention-2 without one, T ≤ 512, forward + backward",
        1.1,
        0.8,
        fastest("short window", ["both"]),
    ),
    Goal(
        "windows 16 and 64 / fla chunk_delta_rule, forward + backward", 1.0, 0.5, rows(["delta rule"], ["both"], "peer")
    ),
    Goal("peak memory / SDPA", 1.1, 1.0, memory),
    Goal("training step of Pythia-70M, KA / softmax", 1.1, 1.02, rows(["training"], ["step"], "softmax")),
    Goal(
        "training step, 47 M: KA hybrid / softmax-window hybrid",
        1.02,
        1.0,
        between("models, training", "KA 3:1", "softmax window 3:1"),
    ),
    Goal(
        "training step, 47 M: KA hybrid / full softmax, T = 2048",
        1.0,
        0.9,
        between("models, training", "KA 3:1", "softmax", lambda r: r["shape"][1] == 2048),
    ),
    Goal(
        "training step, 47 M: KA hybrid / full softmax, T = 8192",
        0.85,
        0.75,
        between("models, training", "KA 3:1", "softmax", lambda r: r["shape"][1] == 8192),
    ),
    Goal(
        "decoding, 47 M: windowed KA / windowed softmax",
        1 / 0.98,
        1.0,
        between("models, decoding", "KA window 8", "softmax window 8"),
    ),
    Goal(
        "decoding, 47 M: full softmax / KA hybrid, 65,536 tokens",
        3,
        4,
        between("models, decoding", "softmax", "KA 3:1", lambda r: r["shape"][1] == 65536),
        at_least=True,
    ),
    Goal("first call, nothing compiled (seconds)", 10, 5, first_call),
    Goal("kernels compiled for another T, B or narrow window", 0, 0, compiled_later),
]


def judged(records: Iterable[Record]) -> str:
    """The table of goals."""
    records = [record for record in records if "skipped" not in record]
    return table(["goal", "must", "aim", "measured", "must holds", "aim holds"], [goal.row(records) for goal in GOALS])


def section_table(records: Collection[Record]) -> str:
    """One section's rows; a ratio is KA's time over the peer's. What was not measured is said below, and why."""
    measured = [record for record in records if "skipped" not in record]
    notes = [f"{r['case']} at {_shape(r)}: not measured, {r['skipped']}" for r in records if "skipped" in r]
    if not measured:
        return "\n\n".join(notes)
    names = list(dict.fromkeys(name for record in measured for name in record["ms"] if name != "KA"))
    if not any("KA" in record["ms"] for record in measured):
        return "\n\n".join([_several(measured, names), *notes])
    has_rate = any("tflops" in record for record in measured)
    weighed = names[:1] if any("peak_mib" in record for record in measured) else []
    header = ["case", "shape", "pass", *(f"{name} ms" for name in names), "KA ms", *["KA TFLOP/s"] * has_rate]
    header += [f"KA / {name}" for name in names] + [f"memory / {name}" for name in weighed]
    lines = []
    for record in measured:
        ms = record["ms"]
        cells = [record["case"], _shape(record), record["pass"]]
        cells += [f"{ms[name]:.4g}" if name in ms else "" for name in (*names, "KA")]
        cells += [f"{record['tflops']:.0f}" if "tflops" in record else ""] * has_rate
        cells += [f"{ms['KA'] / ms[name]:.3g}" if name in ms else "" for name in names]
        peaks = record.get("peak_mib", {})
        cells += [f"{peaks['KA'] / peaks[name]:.2f}" if name in peaks else "" for name in weighed]
        lines.append(cells)
    return "\n\n".join([table(header, lines), *notes])


def _several(records: Collection[Record], names: list[str]) -> str:
    """Rows of models that are all ours: their times, and their bytes where these were counted."""
    sized = any("bytes" in record for record in records)
    header = ["case", "shape", *(f"{name} ms" for name in names), *(f"{name} MiB" for name in names if sized)]
    lines = [
        [
            record["case"],
            _shape(record),
            *(f"{record['ms'][name]:.4g}" if name in record["ms"] else "" for name in names),
        ]
        + [f"{record['bytes'][name] / 2**20:.4g}" if name in record["bytes"] else "" for name in names if sized]
        for record in records
    ]
    return table(header, lines)


def markdown(files: Iterable[dict[str, Any]]) -> str:
    """Everything that the files hold: the goals, then each section."""
    files = list(files)
    machines = list(dict.fromkeys(file["machine"] for file in files))
    sections: dict[str, list[Record]] = {}
    for file in files:
        for record in file["records"]:
            sections.setdefault(record["section"], []).append(record)
    texts = [*machines, "## Against the goals", judged(record for found in sections.values() for record in found)]
    for name, found in sections.items():
        texts += [f"## {name[0].upper()}{name[1:]}", section_table(found)]
    return "\n\n".join(texts)


def _shape(record: Record) -> str:
    return ", ".join(map(str, record["shape"]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what `--json FILE` of a benchmark wrote")
    print(markdown(json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args(argv).files))


if __name__ == "__main__":
    main()
