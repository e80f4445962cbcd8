"""How few tokens turn a softmax-trained model into a KA model: PPL against conversion tokens, gates and windows."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ka_attention.conversion.raising import Conversion, convert
from ka_attention.harness.figures.drawing import COLOURS, line, name_lines
from ka_attention.harness.figures.statistics import cell, changes, judged, mean, percent_cell, seeds_of
from ka_attention.harness.models.arms import ArmResults
from ka_attention.harness.text.data import Sequences
from ka_attention.harness.training import perplexity
from ka_attention.harness.training.trained import BATCH, Trained, steps_for
from ka_attention.hf import KAConfig, attention_modules, use
from ka_attention.report.document import Figure, Section, Table

SHARES = (0.01, 0.02, 0.05, 0.10)  # of the tokens that the softmax model was trained on
SIDE = 0.02  # the share for the side questions: free gates and windows
WINDOWS = (8, 16, 32)


CONTROL, LEARNED = "control", "learned"
AIM = 1.0  # percent above the softmax model


@dataclass(frozen=True)
class Converted:
    """One conversion: what it read and took, the PPL after it, and the gates of layers that learn theirs."""

    steps: int
    tokens: int
    seconds: float
    ppl: float
    gates: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Windowed(Converted):
    """A conversion into a window, and what the window gives without training."""

    untrained: float


@dataclass(frozen=True)
class Window:
    """The two attentions in one window."""

    window: int
    ka: Windowed
    softmax: Windowed


@dataclass(frozen=True)
class Conversions:
    """PPL of the softmax model (``base``), of the untrained ``swap``, and after each conversion.

    ``runs``: KA by share of the original tokens (``shares``); "control", the same training without KA-attention on the
    text alone (nothing to follow); and "learned", with free gates.
    """

    original_tokens: int
    shares: tuple[float, ...]
    base: float
    swap: float
    runs: dict[str, Converted]
    windows: tuple[Window, ...]


def run(trained: Trained) -> Conversions | None:
    """Of a model trained with plain softmax attention."""
    if not trained.is_plain_softmax:
        return None
    return evaluate(
        trained.model,
        trained.text.train,
        trained.sample,
        original_tokens=trained.tokens,
        learning_rate=trained.settings.mean_learning_rate,  # at a schedule's peak even softmax would get worse
        batch_size=BATCH,
        seed=trained.seed,
    )


def evaluate(
    model: Any,
    train: Tensor,
    sequences: Tensor,
    *,
    original_tokens: int,
    learning_rate: float,
    batch_size: int,
    seed: int = 0,
) -> Conversions:
    """Convert copies of a softmax ``model``, each from the start with a budget of its own."""

    def ppl(of: Any) -> float:
        return perplexity.evaluate(of, sequences, batch_size=batch_size).ppl

    def untrained(ka: KAConfig) -> float:
        with use(model, ka):
            return ppl(model)

    def run(plan: Conversion) -> dict[str, Any]:
        converted = copy.deepcopy(model)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            convert(converted, Sequences(train), plan, Path(folder), seed=seed, evaluations=0)
        learned = [module.ka_gate(None) for module in attention_modules(converted) if hasattr(module, "ka_gate")]
        return {
            "steps": plan.steps,
            "tokens": plan.steps * plan.batch_size * train.shape[1],
            "seconds": time.perf_counter() - start,
            "ppl": ppl(converted),
            "gates": tuple(tuple(gates.tolist()) for gates in learned),
        }

    def plan(share: float, **settings: Any) -> Conversion:
        steps = steps_for(share, original_tokens, train.shape[1], Conversion.batch_size)
        return Conversion(steps=steps, learning_rate=learning_rate, **settings)

    def windowed(window: int, target: str, gate: float) -> Windowed:
        before = untrained(KAConfig(window=window, gate_init=gate))
        return Windowed(untrained=before, **run(plan(SIDE, window=window, target=target)))

    return Conversions(
        original_tokens=original_tokens,
        shares=SHARES,
        base=ppl(model),
        swap=untrained(KAConfig()),
        runs={
            **{_name(share): Converted(**run(plan(share))) for share in SHARES},
            CONTROL: Converted(**run(plan(SHARES[-1], target="softmax", stage_one=0.0))),
            LEARNED: Converted(**run(plan(SIDE, target="learned", stage_one=0.0))),
        },
        windows=tuple(Window(w, windowed(w, "ka", 1.0), windowed(w, "softmax", 0.0)) for w in WINDOWS),
    )


def _name(share: float) -> str:
    return f"{share:g}"


def sections(arms: Sequence[ArmResults[Conversions]]) -> list[Section]:
    """PPL against conversion tokens, with a control and free gates, and PPL against the window."""
    return [_by_tokens(arms[0], seeds_of(arms[:1])), _by_window(arms[0], seeds_of(arms[:1]))]


def _by_tokens(arm: ArmResults[Conversions], seeds: str) -> Section:
    first = arm.seeds[0]
    base, swap = arm.each(lambda found: found.base), arm.each(lambda found: found.swap)
    shares = [_name(share) for share in first.shares]
    ppl = {name: [found.runs[name].ppl for found in arm.seeds] for name in first.runs}
    reached = next((share for share in shares if mean(changes(ppl[share], base)) <= AIM), None)
    gates = [gate for found in arm.seeds for row in found.runs[LEARNED].gates for gate in row]
    outcome = (
        f"reached with {100 * float(reached):.0f} % of the tokens"
        if reached
        else f"**not reached**: {percent_cell(changes(ppl[shares[-1]], base))} after {100 * float(shares[-1]):.0f} %"
    )
    words = [
        "The gates rise from 0, where the model is its softmax self, to 1 while it trains: first following the frozen "
        "softmax model, then on the text. Every budget is a conversion of its own, from the start.",
        f"The aim, within {AIM:.0f} % of the softmax model's PPL after at most {100 * first.shares[-1]:.0f} % of its "
        f"{first.original_tokens:,} training tokens, is {outcome}. "
        f"Without training the swap costs {percent_cell(changes(swap, base))}.",
        "Control: trained on for as many tokens as the largest budget, the softmax model moves to "
        f"{cell(ppl[CONTROL])} ({percent_cell(changes(ppl[CONTROL], base))}).",
        f"Free gates, one per head, start at 0 and end at {mean(gates):.2f} on average ({min(gates):.2f} to "
        f"{max(gates):.2f}): the model makes {'much' if mean(gates) > 0.5 else 'little'} use of KA-attention.",
    ]
    labels = {CONTROL: "softmax, trained on", LEARNED: "free gates"}
    rows = [["KA (swap)", "0", cell(swap), _change(swap, base), "0"]]
    for name, run in first.runs.items():
        seconds = mean([found.runs[name].seconds for found in arm.seeds])
        label = labels.get(name) or f"KA, {100 * float(name):.0f} %"
        rows.append([label, f"{run.tokens:,}", cell(ppl[name]), _change(ppl[name], base), f"{seconds:,.1f}"])
    table = Table(
        f"Conversion of the softmax model ({seeds}); its own PPL is {cell(base)}",
        ["converted to", "tokens", "PPL", "against softmax", "seconds"],
        rows,
    )

    def draw(ax: Any) -> None:
        percents = [0, *(100 * share for share in first.shares)]
        line(ax, percents, [swap, *(ppl[share] for share in shares)], color=COLOURS["KA"], marker="o", label="KA")
        end = 100 * first.runs[CONTROL].tokens / first.original_tokens
        line(ax, [0, end], [base, ppl[CONTROL]], color=COLOURS["softmax"], marker="o", label=labels[CONTROL])
        ax.set_xlabel("conversion tokens (% of the training tokens)")
        ax.set_ylabel("validation PPL")
        name_lines(ax)

    figure = Figure("ppl_by_conversion", f"PPL against conversion tokens, lower is better ({seeds})", draw)
    return Section("Conversion", words, [table], [figure])


def _by_window(arm: ArmResults[Conversions], seeds: str) -> Section:
    """Conversion into a window, where the cache really shrinks, beside softmax attention in the same window."""
    base, swap = arm.each(lambda found: found.base), arm.each(lambda found: found.swap)
    windows = [row.window for row in arm.seeds[0].windows]

    def ppl(i: int, figure: Callable[[Window], float]) -> list[float]:
        return [figure(found.windows[i]) for found in arm.seeds]

    tokens = arm.seeds[0].windows[0].ka.tokens
    gains = {
        window: changes(ppl(i, lambda row: row.ka.ppl), ppl(i, lambda row: row.softmax.ppl))
        for i, window in enumerate(windows)
    }
    words = [
        "A layer with window w keeps w − 1 tokens, so here the cache really shrinks. Softmax attention then sees no "
        "further than its window; a KA layer reads outputs, which carry what earlier tokens resolved. Both start from "
        f"the same softmax model and follow it for {tokens:,} tokens.",
        "KA against softmax in the same window: "
        + "; ".join(f"w = {window}: {judged(gain)}" for window, gain in gains.items())
        + ".",
    ]
    curves: dict[tuple[str, str], Callable[[Window], float]] = {
        ("softmax", "untrained"): lambda row: row.softmax.untrained,
        ("KA", "untrained"): lambda row: row.ka.untrained,
        ("softmax", "converted"): lambda row: row.softmax.ppl,
        ("KA", "converted"): lambda row: row.ka.ppl,
    }
    rows = []
    for i, window in enumerate(windows):
        for how, spent in (("untrained", 0), ("converted", tokens)):
            both = [ppl(i, curves[kind, how]) for kind in ("softmax", "KA")]
            cells = [text for numbers in both for text in (cell(numbers), _change(numbers, base))]
            rows.append([str(window), f"{spent:,}", *cells])
    table = Table(
        f"Converted to a window ({seeds}); the softmax model without one has {cell(base)}",
        ["window", "tokens", "softmax PPL", "against no window", "KA PPL", "against no window"],
        rows,
    )
    converted = [found.runs[_name(SIDE)].ppl for found in arm.seeds]
    unlimited = {("KA", "untrained"): swap, ("KA", "converted"): converted}

    def draw(ax: Any) -> None:
        for (kind, how), figure in curves.items():
            points = [*(ppl(i, figure) for i in range(len(windows))), unlimited.get((kind, how), base)]
            style = {"color": COLOURS[kind], "marker": "o", "linestyle": "-" if how == "converted" else "--"}
            line(ax, range(len(points)), points, label=f"{kind}, {how}", **style)
        ax.set_xticks(range(len(windows) + 1), [*map(str, windows), "all"])
        ax.set_xlabel("window (tokens)")
        ax.set_ylabel("validation PPL")
        name_lines(ax)

    figure = Figure("ppl_by_conversion_window", f"PPL of converted models by window, lower is better ({seeds})", draw)
    return Section("Conversion to a window", words, [table], [figure])


def _change(numbers: list[float], base: list[float]) -> str:
    return percent_cell(changes(numbers, base))
