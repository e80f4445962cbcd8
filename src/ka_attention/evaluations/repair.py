"""What a KA cache costs a softmax-trained model and what repairs it, in words: swap, adapters, heads, conversion."""

from __future__ import annotations

from typing import Any

from ka_attention.evaluations.conversion import SHARES, SIDE
from ka_attention.harness.statistics import (
    cell,
    changes,
    deviation,
    mean,
    mean_sd,
    percent,
    percent_cell,
    values,
    verdict,
)
from ka_attention.harness.store import Json
from ka_attention.report.document import Figure, Section, Table

AIM = 1.0  # percent above the softmax model


def _asked(results: dict[str, Json], evaluation: str) -> tuple[dict[str, Json], str] | None:
    """The arm that was asked (trained with plain softmax attention) and the seeds in words; None without one."""
    for arm in results["arms"].values():
        if arm["seeds"] and all(seed.get(evaluation) for seed in arm["seeds"]):
            count = len(arm["seeds"])
            return arm, "one seed" if count == 1 else f"mean ± sd over {count} seeds"
    return None


def adapters(results: dict[str, Json]) -> list[Section]:
    """The swap, every gate without training, and each adapter."""
    asked = _asked(results, "adapters")
    return [_adapters(*asked)] if asked else []


def heads(results: dict[str, Json]) -> list[Section]:
    """What each head costs, and PPL against the share of heads on the KA cache."""
    asked = _asked(results, "heads")
    return [_heads(*asked)] if asked else []


def conversion(results: dict[str, Json]) -> list[Section]:
    """PPL against conversion tokens, with a control and free gates, and PPL against the window."""
    asked = _asked(results, "conversion")
    return [_conversion(*asked), _windows(*asked)] if asked else []


def _adapters(arm: dict[str, Json], seeds: str) -> Section:
    base, swap = values(arm, "adapters", "base"), values(arm, "adapters", "swap")
    methods = arm["seeds"][0]["adapters"]["methods"]
    ppl = {name: values(arm, "adapters", "methods", name, "ppl") for name in methods}
    best = min(ppl, key=lambda name: mean(ppl[name]))
    helped = [methods[name]["label"] for name in methods if mean(ppl[name]) < mean(swap)]
    against_swap = changes(ppl[best], swap)
    words = [
        "Expected: a learned map A → V̂ repairs part of the damage, at most as far as an output still contains its own "
        "token's value: A_j = Σ W_jk V_k holds V_j with the weight W_jj only.",
        f"What came: the swap alone stands at {percent(changes(swap, base))} PPL against softmax attention. "
        + (f"Better than the swap: {'; '.join(helped)}. " if helped else "No adapter is better than the swap. ")
        + f"The best is **{methods[best]['label']}** with {percent(changes(ppl[best], base))} against softmax, "
        f"{percent(against_swap)} against the swap ({verdict(against_swap)}).",
        "A map that regresses V best in the mean is not the one that decodes best: its errors feed back through every "
        "later output. Only training end to end sees that.",
    ]
    gates = arm["seeds"][0]["adapters"]["gates"]
    by_gate = {
        row["gate"]: [seed["adapters"]["gates"][i]["ppl"] for seed in arm["seeds"]] for i, row in enumerate(gates)
    }
    rows = [["softmax, own KV cache", cell(base), "–", "–", "–"], ["swap", cell(swap), _change(swap, base), "0", "0"]]
    for name, method in methods.items():
        seconds = values(arm, "adapters", "methods", name, "seconds")
        change = _change(ppl[name], base)
        rows.append([method["label"], cell(ppl[name]), change, f"{method['tokens']:,}", f"{mean(seconds):,.1f}"])
    tables = [
        Table(f"Adapters, base frozen ({seeds})", ["method", "PPL", "against softmax", "tokens", "seconds"], rows),
        Table(
            f"Without training, every gate at g ({seeds})",
            ["g", "PPL", "against softmax"],
            [[f"{gate:g}", cell(numbers), _change(numbers, base)] for gate, numbers in by_gate.items()],
        ),
    ]
    named = {"softmax": base, "swap": swap, **{methods[name]["label"]: numbers for name, numbers in ppl.items()}}
    if "conversion" in arm["seeds"][0]:
        last = f"{SHARES[-1]:g}"
        named[f"conversion, {100 * SHARES[-1]:.0f} % of the tokens"] = values(arm, "conversion", "runs", last, "ppl")

    def draw(axes: Any) -> None:
        labels = list(named)
        means = [mean(named[label]) for label in labels]
        bars = axes.barh(labels, means, xerr=[deviation(named[label]) for label in labels] if len(base) > 1 else None)
        axes.bar_label(bars, fmt="{:,.1f}", padding=2, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("validation PPL")
        axes.grid(axis="y", visible=False)

    figure = Figure("ppl_by_method", f"PPL of the softmax-trained model by method, lower is better ({seeds})", draw)
    return Section("Adapters", words, tables, [figure])


def _heads(arm: dict[str, Json], seeds: str) -> Section:
    curve = arm["seeds"][0]["heads"]["curve"]
    ppl = [[seed["heads"]["curve"][i]["ppl"] for seed in arm["seeds"]] for i in range(len(curve))]
    within = max(row["share"] for row, numbers in zip(curve, ppl, strict=True) if mean(changes(numbers, ppl[0])) <= AIM)
    words = [
        "Each head's cost is what it adds to the loss on training text when it alone reads attention outputs. The "
        "cheapest heads move to the KA cache first; the others keep reading values. Nothing is trained.",
        f"Within {AIM:.0f} % of the softmax PPL up to {100 * within:.0f} % of the heads; all of them cost "
        f"{percent(changes(ppl[-1], ppl[0]))}.",
    ]
    cost = [[mean([seed["heads"]["cost"][i][j] for seed in arm["seeds"]]) for j in range(len(row))]
            for i, row in enumerate(arm["seeds"][0]["heads"]["cost"])]  # fmt: skip
    tables = [
        Table(
            f"PPL against the share of heads on KA ({seeds})",
            ["heads", "share", "PPL", "against softmax"],
            [
                [str(row["heads"]), f"{100 * row['share']:.0f} %", cell(numbers), _change(numbers, ppl[0])]
                for row, numbers in zip(curve, ppl, strict=True)
            ],
        ),
        Table(
            f"Added loss of one head on KA, nats a token ({seeds}; head numbers above)",
            ["layer", *(str(j) for j in range(len(cost[0])))],
            [[str(i), *(f"{value:+.3f}" for value in row)] for i, row in enumerate(cost)],
        ),
    ]

    def draw(axes: Any) -> None:
        _line(axes, [100 * row["share"] for row in curve], ppl, "o-", "cheapest heads first")
        axes.set_xlabel("heads on the KA cache (%)")
        axes.set_ylabel("validation PPL")

    figure = Figure("ppl_by_heads", f"PPL against the share of heads on KA, cheapest first ({seeds})", draw)
    return Section("Which heads", words, tables, [figure])


def _conversion(arm: dict[str, Json], seeds: str) -> Section:
    first = arm["seeds"][0]["conversion"]
    base, swap = (values(arm, "conversion", name) for name in ("base", "swap"))
    shares = [f"{share:g}" for share in first["shares"]]
    ppl = {name: values(arm, "conversion", "runs", name, "ppl") for name in first["runs"]}
    reached = next((share for share in shares if mean(changes(ppl[share], base)) <= AIM), None)
    gates = [gate for seed in arm["seeds"] for row in seed["conversion"]["runs"]["learned"]["gates"] for gate in row]
    outcome = (
        f"reached with {100 * float(reached):.0f} % of the tokens"
        if reached
        else f"**not reached**: {percent(changes(ppl[shares[-1]], base))} after {100 * float(shares[-1]):.0f} %"
    )
    words = [
        "The gates rise from 0, where the model is its softmax self, to 1 while it trains: first following the frozen "
        "softmax model, then on the text. Every budget is a conversion of its own, from the start.",
        f"The aim, within {AIM:.0f} % of the softmax model's PPL after at most 10 % of its "
        f"{first['original_tokens']:,} training tokens, is {outcome}. "
        f"Without training the swap costs {percent(changes(swap, base))}.",
        "Control: the softmax model trained on for the same tokens as the largest budget moves to "
        f"{mean_sd(ppl['control'])} ({percent(changes(ppl['control'], base))}).",
        f"Gates left free, one a head from 0, end at {mean(gates):.2f} on average (lowest {min(gates):.2f}, highest "
        f"{max(gates):.2f}): "
        + ("the model pulls towards KA-attention." if mean(gates) > 0.5 else "the model does not ask for much of it.")
        + f" PPL {mean_sd(ppl['learned'])}.",
    ]
    labels = {"control": "softmax, trained on", "learned": "free gates"}
    rows = [["KA (swap)", "0", cell(swap), _change(swap, base), "0"]]
    for name, run in first["runs"].items():
        seconds = mean(values(arm, "conversion", "runs", name, "seconds"))
        label = labels.get(name) or f"KA, {100 * float(name):.0f} %"
        rows.append([label, f"{run['tokens']:,}", cell(ppl[name]), _change(ppl[name], base), f"{seconds:,.1f}"])
    table = Table(
        f"Conversion of the softmax model ({seeds}); its own PPL is {mean_sd(base)}",
        ["converted to", "tokens", "PPL", "against softmax", "seconds"],
        rows,
    )

    def draw(axes: Any) -> None:
        percents = [0, *(100 * share for share in first["shares"])]
        _line(axes, percents, [swap, *(ppl[share] for share in shares)], "o-", "KA")
        end = 100 * first["runs"]["control"]["tokens"] / first["original_tokens"]
        _line(axes, [0, end], [base, ppl["control"]], "o--", labels["control"])
        axes.set_xlabel("conversion tokens (% of the training tokens)")
        axes.set_ylabel("validation PPL")
        axes.legend()

    figure = Figure("ppl_by_conversion", f"PPL against conversion tokens, lower is better ({seeds})", draw)
    return Section("Conversion", words, [table], [figure])


def _windows(arm: dict[str, Json], seeds: str) -> Section:
    """Conversion into a window, where the cache really shrinks, beside softmax attention in the same window."""
    found = [seed["conversion"] for seed in arm["seeds"]]
    base, windows = values(arm, "conversion", "base"), [row["window"] for row in found[0]["windows"]]

    def ppl(kind: str, i: int, key: str) -> list[float]:
        return [each["windows"][i][kind][key] for each in found]

    tokens = found[0]["windows"][0]["ka"]["tokens"]
    gains = {window: changes(ppl("ka", i, "ppl"), ppl("softmax", i, "ppl")) for i, window in enumerate(windows)}
    words = [
        "A layer with window w keeps w − 1 tokens, so here the cache really shrinks. Softmax attention then sees no "
        "further than its window; a KA layer reads outputs, which carry what earlier tokens resolved. Both start from "
        f"the same softmax model and follow it for {tokens:,} tokens.",
        "KA against softmax in the same window: "
        + "; ".join(f"w = {window}: {percent(gain)} ({verdict(gain)})" for window, gain in gains.items())
        + ".",
    ]
    rows = [
        [str(window), f"{spent:,}", *(text for kind in ("softmax", "ka") for text in
         (cell(ppl(kind, i, key)), _change(ppl(kind, i, key), base)))]
        for i, window in enumerate(windows)
        for key, spent in (("untrained", 0), ("ppl", tokens))
    ]  # fmt: skip
    table = Table(
        f"Converted to a window ({seeds}); the softmax model without one has {mean_sd(base)}",
        ["window", "tokens", "softmax PPL", "against no window", "KA PPL", "against no window"],
        rows,
    )
    unlimited = {"ka": values(arm, "conversion", "runs", f"{SIDE:g}", "ppl"), "softmax": base}

    def draw(axes: Any) -> None:
        for kind, name in (("softmax", "softmax"), ("ka", "KA")):
            for key, style, how in (("ppl", "o-", "converted"), ("untrained", "o--", "untrained")):
                full = values(arm, "conversion", "swap") if (kind, key) == ("ka", "untrained") else unlimited[kind]
                points = [*(ppl(kind, i, key) for i in range(len(windows))), full]
                _line(axes, range(len(points)), points, style, f"{name}, {how}")
        axes.set_xticks(range(len(windows) + 1), [*map(str, windows), "all"])
        axes.set_xlabel("window (tokens)")
        axes.set_ylabel("validation PPL")
        axes.legend()

    figure = Figure("ppl_by_conversion_window", f"PPL of converted models by window, lower is better ({seeds})", draw)
    return Section("Conversion to a window", words, [table], [figure])


def _line(axes: Any, x: Any, points: list[list[float]], style: str, label: str) -> None:
    spread = [deviation(numbers) for numbers in points]
    axes.errorbar(x, list(map(mean, points)), yerr=spread if any(spread) else None, fmt=style, capsize=2, label=label)


def _change(numbers: list[float], base: list[float]) -> str:
    return percent_cell(changes(numbers, base))
