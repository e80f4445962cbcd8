"""What a comparison says of itself: the answer in short, the training, and quality against cache bytes."""

from __future__ import annotations

from typing import Any

from ka_attention.harness.statistics import (
    caution,
    cell,
    changes,
    mean,
    percent_cell,
    values,
    verdict,
)
from ka_attention.harness.store import Json
from ka_attention.report.document import Figure, Section, Table


def sections(results: dict[str, Json]) -> list[Section]:
    """The sections that need only the training and the size of the caches."""
    return [_summary(results), _training(results), *_against_cache(results)]


def _ppl(entry: dict[str, Json]) -> list[float]:
    return values(entry, "training", "best_val_ppl")


def _seconds(entry: dict[str, Json]) -> float:
    return mean(values(entry, "training", "seconds_per_epoch"))


def _judged(change: list[float]) -> str:
    """A change in percent; over several seeds also whether it counts. One seed is judged at the end."""
    return percent_cell(change) + (f" ({verdict(change)})" if len(change) > 1 else "")


def _summary(results: dict[str, Json]) -> Section:
    recipe, data, seeds = results["recipe"], results["data"], results["seeds"]
    base = next(iter(results["arms"].values()))
    arms = [(entry["label"], entry) for entry in results["arms"].values()]
    sentences = [f"**{base['label']}** reaches a validation PPL of {cell(_ppl(base))}."]
    rows = []
    for entry in results["arms"].values():
        change = changes(_ppl(entry), _ppl(base))
        time = _seconds(entry) / _seconds(base)
        if entry is not base:
            sentences.append(
                f"**{entry['label']}** reaches {cell(_ppl(entry))}, {_judged(change)} against {base['label']}, in "
                f"{time:.2f} × the training time an epoch."
            )
        rows.append(
            [
                entry["label"],
                f"{entry['seeds'][0]['training']['parameters']:,}",
                cell(_ppl(entry)),
                "–" if entry is base else percent_cell(change),
                ", ".join(str(epoch) for epoch in values(entry, "training", "best_epoch")),
                f"{_seconds(entry):,.1f}",
                f"{time:.2f}",
            ]
        )
    against = base["label"]
    columns = ["arm", "parameters", "best val PPL", f"against {against}", "best epoch", "s/epoch", f"× {against}"]
    setting = (
        f"Recipe `{recipe['name']}` on {data['source']}: {recipe['train_samples']:,} training and "
        f"{recipe['validation_samples']:,} validation sequences of {recipe['sequence_length']} tokens from different "
        f"documents, {data['tokenizer_size']:,} tokens in the vocabulary, {seeds} seed{'s' if seeds > 1 else ''}. "
        "All arms start from the same weights and see the same batches."
    )
    table = Table("Best validation PPL of each arm, and what an epoch of training costs", columns, rows)
    words = [" ".join(sentences), *_swaps(results), *_at_equal_cache(results), caution(arms)]
    return Section("In short", [setting, *words], [table])


def _swaps(results: dict[str, Json]) -> list[str]:
    """What the other cache does to the models with full attention, in one sentence each."""
    sentences = []
    for name, own, other in (("softmax", "kv", "ka"), ("ka", "ka", "kv")):
        entry = results["arms"].get(name)
        if entry and values(entry, "caches"):
            before, after = (values(entry, "caches", kind, "ppl") for kind in (own, other))
            sentences.append(
                f"Decoding the {entry['label']}-trained model with a **{other.upper()} cache**, without any further "
                f"training, takes its PPL from {cell(before)} to {cell(after)}: {_judged(changes(after, before))}."
            )
    return [" ".join(sentences)] if sentences else []


def _at_equal_cache(results: dict[str, Json]) -> list[str]:
    """KA against softmax with the same window, where both were trained."""
    sentences = []
    for name, entry in results["arms"].items():
        softmax = results["arms"].get(name.replace("ka", "softmax", 1))
        if name.startswith("ka-w") and softmax:
            change = changes(_ppl(entry), _ppl(softmax))
            sentences.append(
                f"With the same small cache, the PPL of **{entry['label']}** stands at {_judged(change)} against that "
                f"of {softmax['label']}."
            )
    return [" ".join(sentences)] if sentences else []


def _training(results: dict[str, Json]) -> Section:
    entries = list(results["arms"].values())

    def draw(axes: Any) -> None:
        for number, entry in enumerate(entries):
            for seed, answers in enumerate(entry["seeds"]):
                rows = answers["training"]["epochs"]
                axes.plot(
                    [row["epoch"] for row in rows],
                    [row["val_ppl"] for row in rows],
                    marker="o",
                    color=f"C{number}",
                    label=None if seed else entry["label"],
                )
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("validation PPL")
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        axes.legend()

    words = (
        "Train PPL is exp of the mean training loss over the epoch, Val PPL that of the whole validation set after it; "
        "Time is that of the training steps alone; * marks an improvement. Training stops after "
        f"{results['recipe']['patience']} epochs without one, and the best weights count."
    )
    figure = Figure("training", "Validation PPL by epoch, one line a seed, lower is better", draw)
    return Section("Training", [words], [_epochs(entry) for entry in entries], [figure])


def _plain_numbers(axis: Any) -> None:
    """Numbers instead of powers on a logarithmic axis."""
    for which in (axis.set_major_formatter, axis.set_minor_formatter):
        which("{x:,g}")


def _epochs(entry: dict[str, Json]) -> Table:
    """The table of the run with seed 0, as it was printed."""
    training = entry["seeds"][0]["training"]
    rows = []
    for row in training["epochs"]:
        note = "* best" if row["epoch"] == training["best_epoch"] else "*" if row["best"] else ""
        ppls = [f"{row['train_ppl']:,.1f}", f"{row['val_ppl']:,.1f}"]
        rows.append([str(row["epoch"]), *ppls, f"{row['seconds']:.1f}s", note])
    return Table(f"{entry['label']}, seed 0", ["Epoch", "Train PPL", "Val PPL", "Time", "Note"], rows)


def _against_cache(results: dict[str, Json]) -> list[Section]:
    points = []
    for entry in results["arms"].values():
        memory = entry["seeds"][0].get("memory")
        if memory:
            points.append((entry["label"], memory[memory["own"]]["bytes_per_sequence"], entry["val_ppl"]))
    if not points:
        return []

    def draw(axes: Any) -> None:
        for label, size, ppl in points:
            axes.errorbar([size / 1024], [ppl["mean"]], yerr=[ppl["sd"]], fmt="o", capsize=3, label=label)
        axes.set_xscale("log", base=2)
        _plain_numbers(axes.xaxis)
        axes.set_xlabel("cache (KiB a sequence)")
        axes.set_ylabel("validation PPL")
        axes.legend()

    words = (
        f"The best validation PPL of each arm against the bytes of its own cache after "
        f"{results['recipe']['sequence_length']} tokens; down and left is better. A layer with a window keeps "
        "window − 1 tokens however long the sequence is. Windowed KA-attention still draws on the whole past, because "
        "each output that it keeps has gathered what came before it."
    )
    figure = Figure("ppl_by_cache_bytes", "Validation PPL against cache bytes a sequence (bars: ± 1 sd)", draw)
    return [Section("PPL against cache bytes", [words], [], [figure])]
