"""The report of the hybrid study: loss against the bytes of the state, the time of training and that of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ka_attention.harness.figures.drawing import digits
from ka_attention.harness.figures.statistics import cell, mean, verdict
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.hybrid import curves, rates
from ka_attention.studies.hybrid.differences import (
    ENOUGH,
    Arms,
    beside_softmax,
    best,
    difference,
    first_arm,
    kind_of,
    leading,
    paired,
    paired_alike,
)
from ka_attention.studies.hybrid.differences import section as differences
from ka_attention.studies.hybrid.labels import Labels
from ka_attention.studies.hybrid.looks import LEGEND_ABOVE, axes, colour, look, marks
from ka_attention.studies.hybrid.models import arm
from ka_attention.studies.hybrid.recipes import HybridRecipe
from ka_attention.studies.hybrid.results import HybridResults, TrainedArm

EXPECTED = (
    "Of models of 47.7 M parameters and 72 M tokens, written before they were trained (what concerns starts, windows, "
    "convolutions and peers after the first five arms and a smaller model): a hybrid with three narrow layers to a full"
    " one beats full softmax by 0.05 to 0.1 "
    "nats at a quarter of its state. No mixing is the worst of them. With output gates everywhere KA and softmax with"
    " a window of 4 are level within 0.015 nats, KA a little ahead; gates that start at 0 and at 0.5 are level within"
    " 0.005. A gated convolution that starts at random is level with softmax with a window of 4, and full softmax "
    "with a convolution in front with KA, at four times its state. Gated DeltaNet is 0.02 ahead of windows of 4, "
    "Mamba-2 level with them. Windows of 2 are level with 4 and wider ones worse, by 0.005 at 8, 0.015 at 16 and 0.04"
    " at 64, where KA is behind softmax by 0.02; a window of 1 is 0.03 better than no mixing. Models windowed "
    "throughout are 0.12 and more behind full softmax, KA's 0.05 ahead of softmax's. Without output gates all are "
    "0.03 worse, in the same order. With convolutions on q, k, v (said after one seed) KA is 0.015 below softmax, "
    "Gated DeltaNet with them in its full layers 0.03 behind KA, Mamba-2 0.05, and full softmax 0.07. With twice the "
    "learning rate (said when all had been trained with 0.002) the hybrids with convolutions are 0.01 better and full "
    "softmax is not, with half of it all are 0.03 worse; fast gates bring KA with convolutions 0.012. Norms "
    "on queries and keys (said last) let arms without convolutions take twice the rate too, which brings KA 0.023, and "
    "bring it 0.005 beside convolutions."
)
_KIB = 1024


def sections(recipe: HybridRecipe, results: HybridResults) -> list[Section]:
    """Every arm, best first; differences; rates; windows; the way there; positions; gates; what was expected."""
    arms = {name: arm(name) for name in sorted(results.arms, key=lambda name: mean(_losses(results, name)))}
    labels = Labels(arms.values())
    made = (
        _summary(recipe, results, arms, labels),
        differences(results, arms, labels),
        rates.section(results, arms, labels),
        _windows(results, arms, labels),
        curves.on_the_way(results, arms, labels),
        curves.by_position(results, arms, labels),
        _gates(results, arms, labels),
        Section("What was expected", [EXPECTED]) if len(arms) > 1 else None,
    )
    return [section for section in made if section]


def _losses(results: HybridResults, name: str) -> list[float]:
    return [one.loss for one in results.arms[name]]


def _summary(recipe: HybridRecipe, results: HybridResults, arms: Arms, labels: Labels) -> Section:
    training = results.arms[first_arm(results)][0].training
    parameters = [one.parameters / 1e6 for runs in results.arms.values() for one in runs]
    sizes = " to ".join(dict.fromkeys(f"{size:.2f}" for size in (min(parameters), max(parameters))))
    words = [
        _verdict(results, arms, labels),
        labels.notes(),
        f"Llama-like models of {sizes} M parameters ({recipe.layers} layers × {recipe.hidden_size}, {recipe.heads} "
        f"heads, a vocabulary of {recipe.vocab_size:,}), trained on {training.tokens:,} tokens of text in sequences of "
        f"{recipe.sequence_length:,}: each token is read {training.epochs:.2f} times. MLPs are wider or narrower so "
        "that all arms have as many parameters. In a seed all arms read the same batches in the same order, and what "
        "two models have in common starts alike. "
        f"{rates.sentence(results)} "
        f"Trained on {'; '.join(sorted({_machine(one) for runs in results.arms.values() for one in runs}))}.",
    ]
    figures = [_kinds(results, arms, labels)]
    measures: dict[str, tuple[str, Callable[[str], float | None]]] = {
        "state": ("state (KiB a sequence)", partial(_state, results)),
        "training": ("training (s)", partial(_seconds, results)),
        "decoding": (f"a step of {_sequences(recipe)} (ms)", partial(_step, results)),
    }
    for name, (axis, value) in measures.items():
        if any(value(each) for each in arms):
            figures.append(_against(results, arms, labels, name, axis, value))
    return Section("Hybrids", words, [_table(recipe, results, arms, labels)], figures if len(arms) > 1 else ())


def _sequences(recipe: HybridRecipe) -> str:
    """How many decode together."""
    return f"{recipe.decode_batch} sequences" if recipe.decode_batch > 1 else "one sequence"


def _state(results: HybridResults, name: str) -> float:
    return results.decoding[name].computed_bytes / _KIB


def _seconds(results: HybridResults, name: str) -> float | None:
    """Of training the fastest seed that had its GPU to itself."""
    return min((one.training.seconds for one in results.arms[name] if one.alone), default=None)


def _step(results: HybridResults, name: str) -> float | None:
    seconds = results.decoding[name].seconds
    return None if seconds is None else 1000 * seconds


def _speed(results: HybridResults, name: str) -> str:
    """Thousands of tokens a second, of the seed of `_seconds`."""
    alone = [one for one in results.arms[name] if one.alone]
    if not alone:
        return "–"
    fastest = max(alone, key=lambda one: one.training.tokens_per_s)
    text = digits(fastest.training.tokens_per_s / 1000)
    if fastest.utilisation is None:
        return text
    return f"{text} ({100 * fastest.utilisation:.0f} %)" + ("" if fastest.graphs else " †")


def _table(recipe: HybridRecipe, results: HybridResults, arms: Arms, labels: Labels) -> Table:
    """A row an arm; no columns that say nothing."""
    base, counts = first_arm(results), {len(runs) for runs in results.arms.values()}
    several = sorted(counts - {1})
    speeds = [_speed(results, name) for name in arms]
    speed = "1,000 tokens/s" + (" (MFU)" if any("%" in each for each in speeds) else "")
    columns: dict[str, list[str]] = {
        "arm": [labels(each) for each in arms.values()],
        "state (KiB)": [f"{_state(results, name):,.0f}" for name in arms],
        "loss (nats)": [cell(_losses(results, name), 3) for name in arms],
    }
    if len(several) > 1:
        columns["seeds"] = [str(len(results.arms[name])) for name in arms]
    if len(counts) > 1:
        columns["seed 0"] = [f"{_losses(results, name)[0]:.3f}" for name in arms]
    if len({rates.peak(results, name) for name in arms}) > 1:
        columns["rate"] = [f"{rates.peak(results, name):g}" for name in arms]
    columns[f"against {labels(arms[base])}"] = [
        "–" if name == base else difference(paired(results, name, base), 3).removesuffix(" *") for name in arms
    ]
    columns[speed] = speeds
    steps = [_step(results, name) for name in arms]
    columns["decoding (ms)"] = ["–" if step is None else f"{step:.2f}" for step in steps]
    shown = {column: cells for column, cells in columns.items() if set(cells) != {"–"}}
    over = _seeds(several[0]) if len(several) == 1 else "seeds"
    said = [
        f"State: what decoding keeps of {recipe.sequence_length:,} tokens; loss: of validation after training, "
        + (f"mean ± sd over {over}{' (without ±: one)' if 1 in counts else ''}" if several else "one seed")
    ]
    if len(arms) > 1:
        said.append("differences: paired by seed" + (", ± 95 % confidence interval" if several else ""))
    if speed in shown:
        graphs = " (†: without CUDA graphs)" if any("†" in each for each in speeds) else ""
        said.append(f"tokens/s: in training, of the fastest seed{graphs}")
    if "decoding (ms)" in shown:
        said.append(f"decoding: a step of {_sequences(recipe)}")
    caption = "; ".join(said) + "; –: not measured, or beside other work"
    return Table(caption, list(shown), list(zip(*shown.values(), strict=True)))


def _verdict(results: HybridResults, arms: Arms, labels: Labels) -> str:
    """What has the lowest loss, against what, with how large a state; what is nearest; KA beside softmax."""
    base, first = first_arm(results), best(results, arms)
    count, counts = len(results.arms[first]), [len(runs) for runs in results.arms.values()]
    loss = f"{mean(_losses(results, first)):.3f} nats"
    if len(arms) == 1:
        return f"One arm reads text, **{labels(arms[first])}**: {loss} ({_seeds(count)})."
    enough = min(count, ENOUGH)
    text = f"**{labels(arms[first])}** has the lowest loss"
    text += f" of the arms with {_or_more(enough, max(counts))}" if min(counts) < enough else ""
    text += f", {loss} ({_seeds(count)})"
    if first != base:
        share = _state(results, first) / _state(results, base)
        text += f": {_apart(paired(results, first, base))} {labels(arms[base])}, at {100 * share:.0f} % of its state"
    others = [name for name in arms if arms[name].mixer != arms[first].mixer and name != base]
    ka = [name for name in others if arms[name].mixer == "ka"]
    nearest = min(others, key=lambda name: mean(paired(results, name, first)), default=None)
    if nearest:
        text += f". The nearest arm of another kind is {_beyond(results, arms, labels, nearest, first)}"
        if ka and nearest not in ka:
            text += f". The best with KA is {_beyond(results, arms, labels, best(results, ka), first)}"
    return text + "." + _beside(results, arms)


def _beyond(results: HybridResults, arms: Arms, labels: Labels, name: str, first: str) -> str:
    found = paired(results, name, first)
    text = f"{labels(arms[name])}, {_apart(found)} it"
    if len(found) == 1:
        return f"{text} in one seed: undecided"
    return text if verdict(found) in ("lower", "higher") else f"{text}: not told apart"


def _seeds(count: int) -> str:
    return f"{count} seeds" if count > 1 else "one seed"


def _or_more(enough: int, most: int) -> str:
    return _seeds(enough) + (" or more" if most > enough else "")


def _apart(numbers: Sequence[float]) -> str:
    """``0.143 ± 0.065 below``."""
    text = difference(numbers, 3).removesuffix(" *")
    return text[1:] + (" below" if text.startswith("−") else " above")


def _beside(results: HybridResults, arms: Arms) -> str:
    """How KA compares with softmax in its place, in pairs with as many seeds as any pair has, or ENOUGH."""
    pairs = [losses for pair in beside_softmax(arms) if (losses := paired_alike(results, *pair))]
    most = max(map(len, pairs), default=0)
    enough = min(most, ENOUGH)
    if most < 2:
        below = sum(found[0] < 0 for found in pairs)
        where = f"{_apart(pairs[0])} softmax" if len(pairs) == 1 else f"below softmax in {below} of {len(pairs)} pairs"
        return f" With all else alike KA is {where}, in one seed." if pairs else ""
    found = [verdict(each) for each in pairs if len(each) >= enough]
    counts = {"below softmax": found.count("lower"), "above softmax": found.count("higher")}
    counts["not told apart from softmax"] = len(found) - sum(counts.values())
    said = [f"{text} in {count}" for text, count in counts.items() if count]
    said[0] += f" of {len(found)} pairs with {_or_more(enough, most)}"
    return f" With all else alike KA is {', '.join(said)}."


def _machine(one: TrainedArm) -> str:
    where = one.trained_on
    return f"{where['accelerator'] or where['processor']}, PyTorch {where['torch']}"


def _windows(results: HybridResults, arms: Arms, labels: Labels) -> Section | None:
    """Loss against the window, for what was trained with several."""
    found: dict[str, dict[int, str]] = {}
    for name, each in arms.items():
        if isinstance(each.window, int):
            found.setdefault(labels(each, "window"), {})[each.window] = name
    series = {label: dict(sorted(names.items())) for label, names in sorted(found.items()) if len(names) > 1}
    if not series:
        return None
    widths = sorted({window for names in series.values() for window in names})
    rows = [
        [str(w), *(cell(_losses(results, names[w]), 4) if w in names else "–" for names in series.values())]
        for w in widths
    ]

    def draw(ax: Any) -> None:
        for label, names in series.items():
            points = [mean(_losses(results, name)) for name in names.values()]
            ax.plot(list(names), points, label=label, **look(arms[next(iter(names.values()))]) | {"marker": "."})
        base = first_arm(results)
        ax.axhline(mean(_losses(results, base)), color=colour(arms[base]), label=labels(arms[base]))
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, map(str, widths))
        axes(ax, "window (tokens)")

    table = Table("Validation loss by window (tokens), mean ± sd; without ±: one seed", ["window", *series], rows)
    figure = Figure("hybrid_windows", "Validation loss by window (mean over seeds)", draw, LEGEND_ABOVE)
    return Section("Windows", (), [table], [figure])


def _gates(results: HybridResults, arms: Arms, labels: Labels) -> Section | None:
    """What the loss becomes without them, and where the best arms have them; all arms' folded."""
    gated = {name: each for name, each in arms.items() if each.mixer == "ka" and each.gate != "fixed"}
    if not gated:
        return None
    lost = {
        name: [one.ungated_loss - one.loss for one in results.arms[name] if one.ungated_loss is not None]
        for name in gated
    }
    rows = [[labels(gated[name]), difference(found), str(len(found))] for name, found in lost.items() if found]
    caption = "Loss with gates set to 0 after training, less that with them (nats)"
    tables = [Table(caption, ["arm", "without gates", "seeds"], rows)] if rows else []
    folded = [_each_gate(results, name, labels(each)) for name, each in gated.items()]
    figures = []
    for name in (name for name in leading(results, gated) if name in gated):
        each = gated[name]
        suffix = "".join(f"_{part}" for part in kind_of(each)[1:] if part)
        caption = f"{labels(each)}: gates after training, all heads and seeds"
        figures.append(Figure(f"hybrid_gates{suffix}", caption, partial(_draw_gates, results.arms[name])))
    return Section("Gates", (), tables, figures, folded)


def _each_gate(results: HybridResults, name: str, label: str) -> Table:
    layers = results.arms[name][0].gates
    heads = range(len(next(iter(layers.values()))))
    rows = [
        [str(layer), *(f"{mean([one.gates[layer][h] for one in results.arms[name]]):.2f}" for h in heads)]
        for layer in layers
    ]
    return Table(f"{label}: gates after training (mean over seeds)", ["layer", *(f"head {h}" for h in heads)], rows)


def _draw_gates(runs: Sequence[TrainedArm], ax: Any) -> None:
    points = [(layer, gate) for one in runs for layer, heads in one.gates.items() for gate in heads]
    ax.plot(*zip(*points, strict=True), "o", alpha=0.5)
    ax.set(xlabel="layer", xticks=list(runs[0].gates), ylabel="gate", ylim=(-0.03, 1.03))


def _kinds(results: HybridResults, arms: Arms, labels: Labels) -> Figure:
    """A row for the best arm of each kind, a point a seed."""
    leaders = sorted(leading(results, arms), key=list(arms).index, reverse=True)

    def draw(ax: Any) -> None:
        for row, name in enumerate(leaders):
            ax.plot(_losses(results, name), [row] * len(results.arms[name]), **look(arms[name]) | {"linestyle": ""})
        ax.set_yticks(range(len(leaders)), [labels(arms[name]) for name in leaders], fontsize=8)
        ax.set(xlabel="validation loss (nats)", ylim=(-0.6, len(leaders) - 0.4))

    caption = "The best arm of each kind, a mixer with or without convolutions and norms; a point a seed"
    width = 2.4 + 0.06 * max(len(labels(arms[name])) for name in leaders)
    return Figure("hybrid_kinds", caption, draw, (min(max(4.8, width), 5.5), 1 + 0.2 * len(leaders)))


def _against(
    results: HybridResults, arms: Arms, labels: Labels, name: str, axis: str, value: Callable[[str], float | None]
) -> Figure:
    """Loss against ``value``, a point a seed; arms that have none are not shown."""

    def draw(ax: Any) -> None:
        for key, each in arms.items():
            x, losses = value(key), _losses(results, key)
            if x is not None:
                kind = labels(each, "window", "gate", "start", "output_gate")
                ax.plot([x] * len(losses), losses, label=kind, **look(each) | {"linestyle": ""})
        if name == "state":
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:,g}")
            ax.tick_params("x", rotation=30)
        axes(ax, axis)

    meaning = marks(arms.values())
    caption = f"Validation loss against {name}; best is low and left" + (f"; {meaning}" if meaning else "")
    return Figure(f"hybrid_{name}", caption, draw, LEGEND_ABOVE)
