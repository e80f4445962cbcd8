"""The report of the hybrid study: loss against the bytes of the state, the time of training and that of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ka_attention.harness.figures import drawing
from ka_attention.harness.figures.statistics import interval, mean, mean_sd, verdict
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.hybrid.models import HybridArm, arm
from ka_attention.studies.hybrid.recipes import HybridRecipe
from ka_attention.studies.hybrid.results import HybridResults, TrainedArm

COLOURS = {  # of mixers, those of the other reports where these have them
    "full": drawing.COLOURS["softmax"],
    "softmax": drawing.COLOURS["softmax, every other layer with a window"],
    "ka": drawing.COLOURS["KA"],
    "conv": "C2",
    "none": "C3",
    "gdn": drawing.COLOURS["DeltaNet"],
    "mamba2": drawing.COLOURS["Mamba-2"],
}
MARKERS: dict[Any, str] = {None: "o", 1: "v", 2: "^", 4: "s", 8: "D", 16: "P", 64: "X"}
LEGEND_ABOVE = (4.8, 5.2)  # inches
EXPECTED = (
    "**Expected** (written before the run; what concerns starts, windows, convolutions and peers after the first five"
    " arms and a smaller model): a hybrid with three narrow layers to a full one beats full softmax by 0.05 to 0.1 "
    "nats at a quarter of its state. No mixing is the worst of them. With output gates everywhere KA and softmax with"
    " a window of 4 are level within 0.015 nats, KA a little ahead; gates that start at 0 and at 0.5 are level within"
    " 0.005. A gated convolution that starts at random is level with softmax with a window of 4, and full softmax "
    "with a convolution in front with KA, at four times its state. Gated DeltaNet is 0.02 ahead of windows of 4, "
    "Mamba-2 level with them. Windows of 2 are level with 4 and wider ones worse, by 0.005 at 8, 0.015 at 16 and 0.04"
    " at 64, where KA is behind softmax by 0.02; a window of 1 is 0.03 better than no mixing. Models windowed "
    "throughout are 0.12 and more behind full softmax, KA's 0.05 ahead of softmax's. Without output gates all are "
    "0.03 worse, in the same order. With convolutions on q, k, v (said after one seed) KA is 0.015 below softmax, "
    "Gated DeltaNet with them in its full layers 0.03 behind KA, Mamba-2 0.05, and full softmax 0.07."
)
_WINDOWS = "▾ 1, ▴ 2, ■ 4, ◆ 8, ✚ 16, ✖ 64; hollow: without output gate; ringed: convolutions on q, k, v"
_KIB = 1024


def sections(recipe: HybridRecipe, results: HybridResults) -> list[Section]:
    """Every arm; differences; the way there; positions; gates; tasks."""
    arms = {name: arm(name) for name in results.arms}
    made = (
        _summary(recipe, results, arms),
        _differences(results, arms),
        _windows(results, arms),
        _way(results, arms),
        _positions(results, arms),
        _gates(results, arms),
    )
    return [section for section in made if section]


def _losses(results: HybridResults, name: str) -> list[float]:
    return [one.loss for one in results.arms[name]]


def _nats(numbers: Sequence[float]) -> str:
    """A paired difference in nats with its 95 % confidence interval."""
    middle, half = interval(numbers)
    text = f"{middle + 0.0:+.4f}".replace("-", "−")
    return f"{text} (one seed)" if half is None else f"{text} ± {half:.4f}"


def _paired(results: HybridResults, name: str, other: str) -> list[float]:
    pairs = zip(_losses(results, name), _losses(results, other), strict=False)  # seeds that both have, counted from 0
    return [loss - base for loss, base in pairs]


def _summary(recipe: HybridRecipe, results: HybridResults, arms: dict[str, HybridArm]) -> Section:
    base = next(iter(arms))
    first = results.arms[base][0]
    tokens, epochs = first.training.tokens, first.training.epochs
    parameters = [one.parameters for runs in results.arms.values() for one in runs]
    words = [
        _verdict(results, arms),
        f"Llama-like models of {min(parameters) / 1e6:.2f} to {max(parameters) / 1e6:.2f} M parameters "
        f"({recipe.layers} layers × {recipe.hidden_size}, {recipe.heads} heads, a vocabulary of "
        f"{recipe.vocab_size:,}), trained on "
        f"{tokens:,} tokens of text in sequences of {recipe.sequence_length:,}: each token is read {epochs:.2f} times. "
        "MLPs are wider or narrower so that all arms have as many parameters. In a seed all arms read the same batches "
        "in the same order, and what two models have in common starts alike.",
        "Learning rate at its peak: " + "; ".join(f"{rate:g} ({mixer})" for mixer, rate in results.rates.items()) + ".",
        EXPECTED,
        "**Came:** " + _came(results, arms),
        "Trained on: " + "; ".join(sorted({_machine(one) for runs in results.arms.values() for one in runs})) + ".",
    ]
    rows = []
    for name in sorted(arms, key=lambda name: mean(_losses(results, name))):
        runs, decoding = results.arms[name], results.decoding[name]
        fastest = max((one for one in runs if one.alone), key=lambda one: one.training.tokens_per_s, default=None)
        speed = "–" if fastest is None else f"{fastest.training.tokens_per_s:,.0f}"
        if fastest is not None and fastest.utilisation is not None:
            speed += f" ({100 * fastest.utilisation:.0f} %)" + ("" if fastest.graphs else ", without graphs")
        rows.append(
            [
                arms[name].label,
                f"{decoding.computed_bytes / _KIB:,.0f}",
                mean_sd(_losses(results, name), 4),
                "–" if name == base else _nats(_paired(results, name, base)),
                "–" if fastest is None else f"{fastest.training.seconds:,.1f}",
                speed,
                "–" if decoding.seconds is None else f"{1000 * decoding.seconds:.2f}",
            ]
        )
    columns = ["arm", "state (KiB)", "validation loss (nats)", f"against {arms[base].label}"]
    columns += ["training (s)", "tokens/s (MFU)", "decoding (ms a step)"]
    caption = (
        f"State of a sequence of {recipe.sequence_length:,} tokens; loss after training, mean ± sd; paired differences "
        "± 95 % confidence interval over seeds that both have; training of the fastest seed; a step of decoding "
        f"{recipe.decode_batch} sequences; –: not measured, or beside other work"
    )

    def state(name: str) -> float:
        return results.decoding[name].computed_bytes / _KIB

    def training(name: str) -> float:
        return min((one.training.seconds for one in results.arms[name] if one.alone), default=float("nan"))

    figures = [
        _against(results, arms, "state", "state (KiB a sequence)", state),
        _against(results, arms, "training", "training (s)", training),
    ]
    if any(each.seconds for each in results.decoding.values()):

        def decoding_time(name: str) -> float:
            return 1000 * (results.decoding[name].seconds or float("nan"))

        axis = f"a step of {recipe.decode_batch} sequences (ms)"
        figures.append(_against(results, arms, "decoding", axis, decoding_time))
    return Section("Hybrids", words, [Table(caption, columns, rows)], figures)


def _verdict(results: HybridResults, arms: dict[str, HybridArm]) -> str:
    """The best arm of those with the most seeds, what beats it in fewer, and KA beside softmax, the window the same."""
    base, known = next(iter(arms)), _most_seeds(results, arms)
    best = min(known, key=lambda name: mean(_losses(results, name)))
    other = min(arms, key=lambda name: mean(_paired(results, name, best)))
    share = 100 * results.decoding[best].computed_bytes / results.decoding[base].computed_bytes
    which = "" if len(known) == len(arms) else f" of those with {len(_losses(results, best))} seeds"
    text = f"The lowest loss{which} has **{arms[best].label}**"
    if best != base:
        text += (
            f": {_nats(_paired(results, best, base))} nats against {arms[base].label}, at {share:.0f} % of its state"
        )
    if other not in known:
        count = len(_losses(results, other))
        text += f". With {count} seed{'s' if count > 1 else ''} {arms[other].label} is lower by"
        text += f" {-mean(_paired(results, other, best)):.4f}"
    windows = [pair for pair in _pairs(arms) if [arms[name].mixer for name in pair] == ["ka", "softmax"]]
    beside = {pair: _paired(results, *pair) for pair in windows}
    for (name, _), found in beside.items():
        if len(found) == max(map(len, beside.values())):
            text += f". {arms[name].label} against softmax with the same window: {_nats(found)} nats, {verdict(found)}"
    return text + "."


def _machine(one: TrainedArm) -> str:
    where = one.trained_on
    return f"{where['accelerator'] or where['processor']}, PyTorch {where['torch']}"


def _came(results: HybridResults, arms: dict[str, HybridArm]) -> str:
    lost = []
    for name, each in arms.items():
        if each.mixer == "ka" and each.gate != "fixed" and len(results.arms[name]) > 1:
            found = [(one.ungated_loss or 0.0) - one.loss for one in results.arms[name]]
            lost.append(f"{each.label} {_nats(found)}")
    said = "The table has the arms from best to worst."
    return said + (f" With gates set to 0 after training they lose: {'; '.join(lost)}." if lost else "")


def _pairs(arms: dict[str, HybridArm]) -> list[tuple[str, str]]:
    """Arms to compare, all else alike: a window and what could stand in its place; a mixer that starts in two ways, or
    has convolutions or biases beside one that has none.

    In the place of KA, and of softmax with a window: other mixers, and full softmax with a convolution in front; in
    KA's place also softmax with the same window. Recurrent layers have convolutions of their own: they are compared
    with attention that has some and with attention that has none.
    """
    found: list[tuple[str, str]] = []
    for name, each in arms.items():
        for other, its in arms.items():
            own = replace(its, convolution=each.convolution) if its.mixer in ("gdn", "mamba2") else its
            alike = _surroundings(own) == _surroundings(each)
            added = each != its == replace(each, convolution=None, bias=False)
            peer = each.window and its.mixer not in (each.mixer, "ka", "full") and its.window in (None, each.window)
            begins = (its.mixer, its.window) == (each.mixer, each.window) and its.start != each.start
            canon = each.window and its.mixer == "full" and its.convolution in ("front", each.convolution or "front")
            chosen = canon or added or (alike and (peer or begins))
            if chosen and its.output_gate == each.output_gate and (other, name) not in found:
                found.append((name, other))
    return found


def _surroundings(each: HybridArm) -> tuple[Any, ...]:
    return each.pattern, each.first, each.convolution, each.bias


def _differences(results: HybridResults, arms: dict[str, HybridArm]) -> Section | None:
    """Windows beside their peers, most seeds first."""

    def row(name: str, other: str) -> list[str]:
        found = _paired(results, name, other)
        return [arms[name].label, arms[other].label, _nats(found), str(len(found)), verdict(found)]

    pairs = sorted(_pairs(arms), key=lambda pair: -len(_paired(results, *pair)))
    if not pairs:
        return None
    caption = "Loss of the first less that of the second"
    shown = f"{caption}, paired by seed, ± 95 % confidence interval (below 0: first better)"
    columns = ["arm", "against", "difference (nats)", "seeds", "its loss is"]
    several = [row(*pair) for pair in pairs if len(_paired(results, *pair)) > 1]
    single = [row(*pair) for pair in pairs if len(_paired(results, *pair)) == 1]
    words = ["A difference counts if 0 lies outside its interval. With one seed nothing is known of the spread."]
    folded = [Table(f"{caption}, one seed", columns, single)] if several and single else []
    return Section("Differences", words, [Table(shown, columns, several or single)], folded=folded)


def _windows(results: HybridResults, arms: dict[str, HybridArm]) -> Section | None:
    """Loss against the window, for what was trained with several."""
    found: dict[str, dict[int, str]] = {}
    for name, each in arms.items():
        if isinstance(each.window, int):
            found.setdefault(replace(each, window=None).label, {})[each.window] = name
    series = {label: dict(sorted(names.items())) for label, names in found.items() if len(names) > 1}
    if not series:
        return None
    widths = sorted({window for names in series.values() for window in names})
    rows = [
        [str(w), *(mean_sd(_losses(results, names[w]), 4) if w in names else "–" for names in series.values())]
        for w in widths
    ]

    def draw(ax: Any) -> None:
        for label, names in series.items():
            points = [mean(_losses(results, name)) for name in names.values()]
            ax.plot(list(names), points, label=label, **look(arms[next(iter(names.values()))]) | {"marker": "."})
        base = next(iter(arms))
        ax.axhline(mean(_losses(results, base)), color=_colour(arms[base]), label=arms[base].label)
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, map(str, widths))
        _axes(ax, "window (tokens)")

    tables = [Table("Validation loss by window (tokens)", ["window", *series], rows)]
    beside: dict[str, dict[int, str]] = {}
    for name, other in _pairs(arms):
        each = arms[name]
        if each.mixer == "ka" and arms[other].mixer == "softmax" and isinstance(each.window, int):
            beside.setdefault(replace(each, window=None).label, {})[each.window] = _nats(_paired(results, name, other))
    if beside:
        counts = sorted({window for found in beside.values() for window in found})
        rows = [[str(w), *(found.get(w, "–") for found in beside.values())] for w in counts]
        caption = "KA's loss less that of softmax with the same window, paired by seed, ± 95 % confidence interval"
        tables.append(Table(caption, ["window", *beside], rows))
    return Section("Windows", (), tables, [Figure("hybrid_windows", "Validation loss by window", draw, LEGEND_ABOVE)])


def _most_seeds(results: HybridResults, arms: dict[str, HybridArm]) -> dict[str, HybridArm]:
    """The arms with the most seeds; the curves of others are not shown."""
    most = max(map(len, results.arms.values()))
    return {name: each for name, each in arms.items() if len(results.arms[name]) == most}


def _way(results: HybridResults, arms: dict[str, HybridArm]) -> Section:
    counts = [row.tokens for row in next(iter(results.arms.values()))[0].training.rows]
    rows = [
        [
            each.label,
            *(mean_sd([one.training.rows[i].loss for one in results.arms[name]], 4) for i in range(len(counts))),
        ]
        for name, each in arms.items()
    ]
    table = Table("Validation loss on the way", ["arm", *(f"{tokens / 1e6:,.1f} M tokens" for tokens in counts)], rows)

    def draw(ax: Any) -> None:
        for name, each in _most_seeds(results, arms).items():
            points = [mean([one.training.rows[i].loss for one in results.arms[name]]) for i in range(len(counts))]
            ax.plot([tokens / 1e6 for tokens in counts], points, label=each.label, **look(each))
        _axes(ax, "tokens read (millions)")

    return Section("On the way", (), [table], [Figure("hybrid_way", "Validation loss on the way", draw, LEGEND_ABOVE)])


def _positions(results: HybridResults, arms: dict[str, HybridArm]) -> Section:
    base = next(iter(arms))
    octaves = results.arms[base][0].training.rows[-1].by_position
    names = [f"{octave.first}–{octave.last}" for octave in octaves]

    def losses(name: str) -> list[float]:
        return [
            mean([one.training.rows[-1].by_position[i].loss for one in results.arms[name]]) for i in range(len(octaves))
        ]

    def draw(ax: Any) -> None:
        for name, each in _most_seeds(results, arms).items():
            pairs = zip(losses(name), losses(base), strict=True)
            ax.plot([loss - other for loss, other in pairs], label=each.label, **look(each))
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        _axes(ax, "position in the sequence (tokens)", "difference (nats)")

    rows = [[each.label, *(f"{loss:.4f}" for loss in losses(name))] for name, each in arms.items()]
    table = Table("Validation loss by predicting position (mean over seeds)", ["arm", *names], rows)
    caption = f"Validation loss by position, less that of {arms[base].label} (mean over seeds)"
    return Section("By position", (), [table], [Figure("hybrid_position", caption, draw, LEGEND_ABOVE)])


def _gates(results: HybridResults, arms: dict[str, HybridArm]) -> Section | None:
    gated = {name: each for name, each in arms.items() if each.mixer == "ka" and each.gate != "fixed"}
    if not gated:
        return None
    tables, figures = [], []
    for name, each in gated.items():
        layers = results.arms[name][0].gates
        rows = [
            [
                str(layer),
                *(f"{mean([one.gates[layer][h] for one in results.arms[name]]):.2f}" for h in range(len(heads))),
            ]
            for layer, heads in layers.items()
        ]
        heads = [f"head {h}" for h in range(len(next(iter(layers.values()))))]
        tables.append(Table(f"{each.label}: gates after training (mean over seeds)", ["layer", *heads], rows))
        figures.append(
            Figure(
                f"gates_{name}",
                f"{each.label}: gates after training, all heads and seeds",
                partial(_draw_gates, results.arms[name]),
            )
        )
    return Section("Gates", (), folded=tables, figures=figures)


def _draw_gates(runs: Sequence[TrainedArm], ax: Any) -> None:
    points = [(layer, gate) for one in runs for layer, heads in one.gates.items() for gate in heads]
    ax.plot(*zip(*points, strict=True), "o", alpha=0.5)
    ax.set(xlabel="layer", xticks=list(runs[0].gates), ylabel="gate", ylim=(-0.03, 1.03))


def _against(
    results: HybridResults, arms: dict[str, HybridArm], name: str, axis: str, value: Callable[[str], float]
) -> Figure:
    def draw(ax: Any) -> None:
        for key, each in arms.items():
            losses = _losses(results, key)
            kind = replace(each, window=None, gate="fixed", output_gate=False).label
            ax.plot([value(key)] * len(losses), losses, label=kind, **look(each) | {"linestyle": ""})
        if name == "state":
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:,g}")
            ax.tick_params("x", rotation=30)
        _axes(ax, axis)

    return Figure(
        f"hybrid_{name}",
        f"Validation loss against {name}; best is low and left; windows: {_WINDOWS}",
        draw,
        LEGEND_ABOVE,
    )


def look(each: HybridArm) -> dict[str, Any]:
    """A colour a mixer, a marker a window; hollow without an output gate, dashed where no layers alternate, dotted and
    its markers ringed with convolutions on q, k, v."""
    from matplotlib import rcParams

    convolved = each.convolution == "qkv"
    return {
        "color": _colour(each),
        "marker": MARKERS.get(each.window, "*"),
        "linestyle": ":" if convolved else "--" if each.pattern == "all" else "-",
        "fillstyle": "full" if each.output_gate else "none",
        **({"markeredgecolor": rcParams["text.color"]} if convolved else {}),
    }


def _colour(each: HybridArm) -> tuple[float, ...]:
    """That of its mixer, lighter where gates or convolutions start otherwise or a convolution stands in front."""
    from matplotlib.colors import to_rgb

    lighter = {"drawn": 0.5, "spread": 0.7, 0.0: 0.45 if each.mixer == "ka" else 0.0}.get(each.start, 0.0)
    if each.convolution == "front" or each.bias:
        lighter = 0.5
    return tuple(1 - (1 - part) * (1 - lighter) for part in to_rgb(COLOURS[each.mixer]))


def _axes(ax: Any, x: str, y: str = "validation loss (nats)") -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    handles, labels = ax.get_legend_handles_labels()
    once = dict(zip(reversed(labels), reversed(handles), strict=True))
    columns = 1 + (sum(sorted(map(len, once))[-2:]) <= 80)  # as many letters fit side by side
    ax.figure.legend(once.values(), once.keys(), loc="outside upper center", ncols=columns, fontsize=7)
