"""Does an error accumulate along the sequence? Perplexity by position, KA against softmax, for growing lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ka_attention.errors import UserError
from ka_attention.harness import perplexity
from ka_attention.harness.arms import arm, build
from ka_attention.harness.data import Sequences, Text, prepare
from ka_attention.harness.progress import console
from ka_attention.harness.settings import PYTHIA_70M, ModelSettings, TextSettings, TrainingSettings
from ka_attention.harness.statistics import changes, deviation, mean, mean_sd, percent, verdict
from ka_attention.harness.store import Json, Store
from ka_attention.harness.training import train
from ka_attention.report.document import Figure, Section, Table

BATCH_TOKENS = 4096  # read at once by an evaluation


@dataclass(frozen=True, kw_only=True)
class PositionRecipe(TextSettings, ModelSettings, TrainingSettings):
    """Models trained from scratch at each length, on the same number of tokens and of tokens a step.

    lengths:         sequence lengths, ascending multiples of ``sequence_length``. ``train_samples``,
                     ``validation_samples`` and ``batch_size`` are those at ``sequence_length``; at n times the length
                     there are n times fewer.
    arms:            attention configurations; the first is what the others are compared with.
    """

    name: str
    summary: str
    lengths: tuple[int, ...]
    arms: tuple[str, ...] = ("softmax", "ka")

    def at(self, length: int) -> PositionRecipe:
        """The settings of one length; UserError where it does not divide the samples and the batch."""
        times, rest = divmod(length, self.sequence_length)
        counts = {name: getattr(self, name) for name in ("train_samples", "validation_samples", "batch_size")}
        for name, count in counts.items():
            if rest or not times or count % times:
                raise UserError(
                    f"--set lengths: expected multiples of sequence_length = {self.sequence_length} by numbers that "
                    f"divide {name} = {count}, got {length}"
                )
        return replace(self, sequence_length=length, **{name: count // times for name, count in counts.items()})


RECIPES = {
    recipe.name: recipe
    for recipe in (
        PositionRecipe(
            name="quick",
            summary="a small GPT-NeoX, lengths 128 and 512, on the Python standard library: minutes on two CPU cores",
            lengths=(128, 512),
            vocab_size=2048,
            hidden_size=128,
            layers=2,
            heads=4,
            intermediate_size=512,
            train_samples=2048,
            validation_samples=256,
            batch_size=16,
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=20,
            epochs=3,
            patience=3,
        ),
        PositionRecipe(
            name="h100",
            summary="Pythia-70M, lengths 128 to 2,048 (--data FOLDER --tokenizer FILE --seeds 3): minutes on a GPU",
            lengths=(128, 512, 2048),
            **PYTHIA_70M,
            train_samples=10_000,
            validation_samples=960,
            batch_size=32,
        ),
    )
}


class Position:
    """Train each arm at each length and read its perplexity by position."""

    name = "position"
    question = "Does KA-attention lose its way in long sequences?"
    recipes: Mapping[str, Any] = RECIPES

    def run(self, recipe: PositionRecipe, store: Store, seeds: int) -> dict[str, Json]:
        """Train and evaluate every arm at every length with every seed."""
        if not recipe.lengths or list(recipe.lengths) != sorted(set(recipe.lengths)):
            raise UserError(f"--set lengths: expected ascending numbers, got {','.join(map(str, recipe.lengths))}")
        settings = {length: recipe.at(length) for length in recipe.lengths}
        arms = [arm(name) for name in recipe.arms]
        with console.status("reading the text"):
            whole = prepare(settings[recipe.lengths[-1]], recipe.vocab_size)
        store.identify(data=whole.description)
        runs: list[Json] = []
        for length in recipe.lengths:
            text = replace(
                whole, train=whole.train.reshape(-1, length), validation=whole.validation.reshape(-1, length)
            )
            entries: dict[str, Json] = {each.name: {"label": each.label, "seeds": []} for each in arms}
            for seed in range(seeds):
                for each in arms:
                    name = f"seed{seed}/{length}/{each.name}"
                    entries[each.name]["seeds"].append(
                        store.part(name, lambda: _one(each, settings[length], text, store, name, seed))  # noqa: B023
                    )
            runs.append({"length": length, "arms": entries})
        return {"data": whole.description, "lengths": runs}

    def sections(self, results: dict[str, Json]) -> list[Section]:
        """What was expected and what came, then a table and a figure for each length."""
        return [_summary(results), *(_at(run) for run in results["lengths"])]


def _one(arm: Any, settings: PositionRecipe, text: Text, store: Store, name: str, seed: int) -> Json:
    model = build(arm, settings, seed)
    length = settings.sequence_length
    label = f"{arm.label}, {length} tokens"
    data = Sequences(text.train), Sequences(text.validation)
    training = train(model, *data, settings, store.folder(f"weights/{name}"), seed=seed, label=label)
    with console.status(f"{label}: reading"):
        found = perplexity.evaluate(model, text.validation, batch_size=max(1, BATCH_TOKENS // length))
    return {"training": training, "perplexity": found}


def by_octave(runs: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Perplexity of positions 0–15, 16–31, 32–63, 64–127, … from that of runs of 16 positions."""
    octaves: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        octaves.setdefault((run["first"] // perplexity.BUCKET).bit_length(), []).append(run)
    found = []
    for group in octaves.values():
        sizes = [run["last"] - run["first"] + 1 for run in group]
        loss = sum(size * math.log(run["ppl"]) for size, run in zip(sizes, group, strict=True)) / sum(sizes)
        found.append((f"{group[0]['first']}–{group[-1]['last']}", math.exp(loss)))
    return found


def _table(run: dict[str, Json]) -> tuple[list[str], dict[str, list[list[float]]]]:
    """The names of the octaves, and for each arm and octave one perplexity a seed."""
    found: dict[str, list[list[float]]] = {}
    names: list[str] = []
    for entry in run["arms"].values():
        seeds = [by_octave(seed["perplexity"]["by_position"]) for seed in entry["seeds"]]
        names = [name for name, _ in seeds[0]]
        found[entry["label"]] = [[seed[i][1] for seed in seeds] for i in range(len(names))]
    return names, found


def _summary(results: dict[str, Json]) -> Section:
    recipe = results["recipe"]
    tokens = recipe["train_samples"] * recipe["sequence_length"]
    paragraphs = [
        f"Every arm is trained from scratch at each length, from the same weights, on the same {tokens:,} tokens an "
        "epoch with as many tokens a step. Both the training and the validation text are the same, cut at that length.",
        "**Expected:** no accumulation. An output of KA-attention is an average of values, however many steps lead to "
        "it, so an error is averaged and not amplified; the distance to softmax should not grow along the sequence.",
        "**Came:** " + " ".join(sentence for run in results["lengths"] for sentence in _came(run)),
    ]
    labels = [entry["label"] for entry in results["lengths"][0]["arms"].values()]
    rows = [
        [
            f"{run['length']:,}",
            *(mean_sd([seed["perplexity"]["ppl"] for seed in entry["seeds"]]) for entry in run["arms"].values()),
        ]
        for run in results["lengths"]
    ]
    return Section("By length", paragraphs, [Table("Validation PPL over all positions", ["tokens", *labels], rows)])


def _came(run: dict[str, Json]) -> list[str]:
    """For each arm after the first: its distance to the first in the first and in the last octave, and the growth."""
    names, found = _table(run)
    base, *others = found
    sentences = []
    for label in others:
        start, end = (changes(found[label][i], found[base][i]) for i in (0, -1))
        growth = [b - a for a, b in zip(start, end, strict=True)]
        sentences.append(
            f"At {run['length']:,} tokens **{label}** stands at {percent(start)} PPL against {base} in the positions "
            f"{names[0]} and at {percent(end)} in {names[-1]} (the distance: {verdict(growth)} at the end)."
        )
    return sentences


def _at(run: dict[str, Json]) -> Section:
    names, found = _table(run)
    base, *others = found
    rows = [
        [name, *(mean_sd(found[label][i]) for label in found)]
        + [percent(changes(found[label][i], found[base][i])) for label in others]
        for i, name in enumerate(names)
    ]
    columns = ["positions", *found, *(f"{label} against {base}" for label in others)]

    def draw(ax: Any) -> None:
        for label, octaves in found.items():
            spread = [deviation(numbers) for numbers in octaves]
            means = [mean(numbers) for numbers in octaves]
            ax.errorbar(range(len(names)), means, yerr=spread if any(spread) else None, capsize=2, label=label)
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
        ax.set_xlabel("position in the sequence (tokens)")
        ax.set_ylabel("validation PPL")
        ax.legend()

    caption = f"Validation PPL by position at {run['length']:,} tokens, lower is better (mean over seeds; bars: ± 1 sd)"
    figure = Figure(f"position_{run['length']}", caption, draw)
    table = Table(f"Validation PPL by position at {run['length']:,} tokens", columns, rows)
    return Section(f"{run['length']:,} tokens", (), [table], [figure])


POSITION = Position()
