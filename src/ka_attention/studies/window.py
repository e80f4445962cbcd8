"""Windows: how much quality does a cache of constant size keep, for softmax attention and for KA-attention?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ka_attention.errors import UserError
from ka_attention.hf import KAConfig
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies import perplexity
from ka_attention.studies.arms import Arm, arm, build
from ka_attention.studies.data import Sequences, Text, prepare
from ka_attention.studies.dereference import Dereference
from ka_attention.studies.memory import cache_size, is_softmax
from ka_attention.studies.position import PositionRecipe
from ka_attention.studies.progress import console
from ka_attention.studies.recipes import PYTHIA_70M
from ka_attention.studies.statistics import changes, mean, mean_sd, percent, values
from ka_attention.studies.store import Json, Store
from ka_attention.studies.synthetic import NOT_ASKED, Examples, Plan, Task, TaskSettings, by_group, learn, percents
from ka_attention.studies.training import train

BATCH_TOKENS = 4096  # read at once by an evaluation
SOLVED = 95  # percent of right answers from which a task counts as solved
MIX = re.compile(r"mix-(?P<kind>softmax|ka)-w(?P<window>[1-9]\d*)")
MIX_LABELS = {"softmax": "softmax, every other layer window {}", "ka": "softmax, every other layer KA with window {}"}


@dataclass(frozen=True)
class Recall:
    """``key = value`` somewhere in the first half, ``key = ?`` somewhere in the second: name the value.

    ``pairs`` different keys a sequence; everywhere else stands a filler with a value at random, which means nothing.
    One pair is the passkey test, several are multi-query associative recall. Groups are distances between definition
    and question, rounded down to a power of two. Symbols: keys, then values, then the filler's left side, then "?".
    """

    keys: int
    values: int
    pairs: int

    @property
    def symbols(self) -> int:
        return self.keys + self.values + 2

    def examples(self, count: int, length: int, random: np.random.Generator) -> Examples:
        """``count`` sequences of ``length`` statements, at least twice as many as pairs."""
        filler, question = self.symbols - 2, self.symbols - 1
        row, half = np.arange(count)[:, None], length // 2

        def some(of: int) -> np.ndarray:
            return random.permuted(np.tile(np.arange(of), (count, 1)), axis=1)[:, : self.pairs]

        defined, asked, keys = some(half), half + some(length - half), some(self.keys)
        meant = self.keys + random.integers(self.values, size=keys.shape)
        left = np.full((count, length), filler)
        right = self.keys + random.integers(self.values, size=left.shape)
        answers, groups = np.full_like(left, NOT_ASKED), np.zeros_like(left)
        left[row, defined], right[row, defined] = keys, meant
        left[row, asked], right[row, asked] = keys, question
        answers[row, asked] = meant
        groups[row, asked] = 2 ** np.log2(asked - defined).astype(int)
        return Examples(*map(torch.from_numpy, (left * self.symbols + right, answers, groups)))


@dataclass(frozen=True, kw_only=True)
class WindowRecipe(PositionRecipe):
    """Text at each length and made-up tasks, for each arm.

    arms:         those of ``arms.arm``, and ``mix-softmax-w8``, ``mix-ka-w8``: every other layer with a window, the
                  rest full softmax attention. The first is what the others are compared with.
    task_arms:    the arms that are also trained on the tasks.
    task_length, task_samples, task_layers: statements in a sequence, training sequences, layers.
    """

    task_arms: tuple[str, ...]
    task_length: int
    task_samples: int
    task_batch_size: int
    task_layers: int = 2

    def __post_init__(self) -> None:
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise UserError(f"--set lengths: expected ascending numbers, got {','.join(map(str, self.lengths))}")
        if self.task_length < 16:
            raise UserError(f"--set task_length: expected 16 or more, got {self.task_length}")

    @property
    def tasks(self) -> dict[str, tuple[str, Task]]:
        """The made-up tasks by name, with what a row of the report calls them."""
        return {
            "dereference": ("dereference", Dereference(self.task_length, literals=16, chains=4)),
            "recall": ("recall of 8 pairs", Recall(64, 16, pairs=8)),
            "passkey": ("recall of 1 pair (passkey)", Recall(64, 16, pairs=1)),
        }

    @property
    def task_settings(self) -> TaskSettings:
        """How models are trained on the tasks."""
        return TaskSettings(
            length=self.task_length,
            test_lengths=(self.task_length,),
            train_samples=self.task_samples,
            test_samples=512,
            batch_size=self.task_batch_size,
            least_seeds=1,
        )


_KINDS = ("softmax", "ka", "ka-token")
_FULL = ("softmax", "ka")


def _windowed(*windows: int) -> tuple[str, ...]:
    return tuple(f"{kind}-w{window}" for window in windows for kind in _KINDS)


GPU: dict[str, Any] = {
    **PYTHIA_70M,
    "vocab_size": 8192,
    "hidden_size": 256,
    "heads": 4,
    "intermediate_size": 1024,
    "train_samples": 8192,
    "validation_samples": 512,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "epochs": 2,
    "schedule": "cosine",
    "warmup_steps": 20,
    "task_arms": (*_FULL, "softmax-w8", "ka-w8", "ka-token-w8", "mix-ka-w8"),
    "task_length": 128,
    "task_samples": 256 * 300,
    "task_batch_size": 256,
}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        WindowRecipe(
            name="quick",
            summary="a very small GPT-NeoX, contexts 128 and 512, Python's standard library: minutes on two CPU cores",
            lengths=(128, 512),
            arms=("softmax", "ka", "softmax-w8", "ka-w8", "softmax-w32", "ka-w32", "ka-token-w8", "mix-ka-w8"),
            vocab_size=1024,
            hidden_size=64,
            layers=2,
            heads=2,
            intermediate_size=256,
            train_samples=2048,
            validation_samples=256,
            batch_size=16,
            learning_rate=4e-3,
            schedule="cosine",
            warmup_steps=20,
            epochs=1,
            patience=1,
            task_arms=("softmax", "ka", "softmax-w8", "ka-w8"),
            task_length=48,
            task_samples=32 * 200,
            task_batch_size=32,
        ),
        WindowRecipe(
            name="h100",
            summary="a small GPT-NeoX, contexts 128 and 2,048 (--data FOLDER --seeds 3): minutes a seed on a GPU",
            lengths=(128, 2048),
            arms=(*_FULL, *_windowed(8, 32, 256), "mix-softmax-w8", "mix-ka-w8"),
            **GPU,
        ),
        WindowRecipe(
            name="grid",
            summary="as h100, for contexts 128, 512 and 2,048 and windows 4 to 256: an hour on a GPU",
            lengths=(128, 512, 2048),
            arms=(
                *_FULL,
                *_windowed(4, 8, 16, 32, 64, 256),
                *(f"mix-{kind}-w{w}" for w in (8, 16) for kind in _KINDS[:2]),
            ),
            **GPU,
        ),
    )
}


def window_arm(name: str, layers: int) -> Arm:
    """An arm of ``arms.arm``, or a mix like ``mix-ka-w8``: layers 0, 2, … have the window, the rest is full softmax."""
    match = MIX.fullmatch(name)
    if not match:
        return arm(name)
    gate = 1.0 if match["kind"] == "ka" else 0.0
    ka = KAConfig(layers=tuple(range(0, layers, 2)), window=int(match["window"]), gate_init=gate)
    return Arm(name, MIX_LABELS[match["kind"]].format(match["window"]), ka)


class WindowStudy:
    """Perplexity and made-up tasks against the bytes of the cache."""

    name = "window"
    question = "What does a short window cost, and does KA-attention reach beyond it?"
    recipes: Mapping[str, Any] = RECIPES

    def run(self, recipe: WindowRecipe, store: Store, seeds: int) -> dict[str, Json]:
        """Train every arm on text at every length, and some on the tasks."""
        settings = {length: recipe.at(length) for length in recipe.lengths}
        arms = [window_arm(name, recipe.layers) for name in recipe.arms]
        plans = {
            f"tasks/{task}/{name}": Plan(made, each, recipe.task_layers, f"{called}: {each.label}")
            for task, (called, made) in recipe.tasks.items()
            for name in recipe.task_arms
            for each in [window_arm(name, recipe.task_layers)]
        }
        with console.status("reading the text"):
            whole = prepare(settings[recipe.lengths[-1]], recipe.vocab_size)
        store.identify(data=whole.description)
        runs: list[Json] = []
        for length in recipe.lengths:
            text = replace(whole, train=whole.train.view(-1, length), validation=whole.validation.view(-1, length))
            entries: dict[str, Json] = {}
            for each in arms:
                bytes_ = _cache_bytes(settings[length], each)
                entries[each.name] = {"label": each.label, "cache_bytes": bytes_, "seeds": []}
            for seed in range(seeds):
                for each in arms:
                    part = f"seed{seed}/{length}/{each.name}"
                    work = partial(_one, each, settings[length], text, store, part, seed)
                    entries[each.name]["seeds"].append(store.part(part, work))
            runs.append({"length": length, "arms": entries})
        tasks = learn(plans, recipe.task_settings, store, seeds)
        return {"data": whole.description, "lengths": runs, "tasks": tasks}

    def sections(self, results: dict[str, Json]) -> list[Section]:
        """Perplexity against cache bytes at each length, then the tasks."""
        setting = (
            "A layer with window w attends to the last w tokens, and its cache keeps w − 1 of them, however long the "
            "text is. Models are trained from scratch at each length on the same tokens."
        )
        expected = (
            "**Expected:** an attention output already carries what its token resolved, so a KA layer reaches beyond "
            "its window. At the same cache bytes KA should beat windowed softmax, and come near full softmax at a "
            "fraction of its cache. What must fit through a few vectors, as recall of many pairs, should break it."
        )
        came = "**Came:** " + " ".join(_came(run) for run in results["lengths"])
        summary = Section("Windows", [setting, expected, came])
        return [summary, *(_text(run) for run in results["lengths"]), _tasks(results)]


def _cache_bytes(settings: PositionRecipe, arm: Arm) -> int:
    kind = "kv" if is_softmax(arm.ka) else "ka"
    return cache_size(settings.config(), arm.ka, kind, settings.sequence_length)


def _one(arm: Arm, settings: PositionRecipe, text: Text, store: Store, part: str, seed: int) -> Json:
    model = build(arm, settings, seed)
    label = f"{arm.label}, {settings.sequence_length} tokens"
    data = Sequences(text.train), Sequences(text.validation)
    training = train(model, *data, settings, store.folder(f"weights/{part}"), seed=seed, label=label)
    with console.status(f"{label}: reading"):
        batch = max(1, BATCH_TOKENS // settings.sequence_length)
        found = perplexity.evaluate(model, text.validation, batch_size=batch)
    return {"training": training, "perplexity": found}


def _ppl(entry: dict[str, Json]) -> list[float]:
    return values(entry, "perplexity", "ppl")


def _pairs(arms: dict[str, Json]) -> list[tuple[str, str]]:
    """Names of arms (KA with a window, softmax with the same window) that both are there."""
    windowed = [name for name in arms if name.startswith(("ka-", "mix-ka-")) and "-w" in name]
    others = [re.sub(r"^(mix-)?ka(-head|-token)?", r"\1softmax", name) for name in windowed]
    return [(name, other) for name, other in zip(windowed, others, strict=True) if other in arms]


def _came(run: dict[str, Json]) -> str:
    arms = run["arms"]
    first = next(iter(arms.values()))
    said = []
    for name, other in _pairs(arms):
        said.append(f"{arms[name]['label']} {percent(changes(_ppl(arms[name]), _ppl(arms[other])))}")
    text = f"At {run['length']} tokens, PPL against softmax with the same window: {'; '.join(said)}. " if said else ""
    small = [entry for entry in arms.values() if entry["cache_bytes"] < first["cache_bytes"]]
    if small:
        best = min(small, key=lambda entry: mean(_ppl(entry)))
        share = 100 * best["cache_bytes"] / first["cache_bytes"]
        text += f"Best with a smaller cache than {first['label']} is {best['label']}: {share:.0f} % of the bytes, PPL "
        text += f"{percent(changes(_ppl(best), _ppl(first)))} against {first['label']}."
    return text


def _text(run: dict[str, Json]) -> Section:
    arms = run["arms"]
    base = next(iter(arms.values()))
    rows = []
    for entry in sorted(arms.values(), key=lambda entry: entry["cache_bytes"]):
        last = [one["perplexity"]["by_position"][-1]["ppl"] for one in entry["seeds"]]
        change = percent(changes(_ppl(entry), _ppl(base)))
        rows.append(
            [entry["label"], f"{entry['cache_bytes'] / 1024:,.1f}", mean_sd(_ppl(entry)), change, mean_sd(last)]
        )
    columns = ["arm", "cache (KiB)", "validation PPL", f"against {base['label']}", "PPL of the last positions"]
    table = Table(f"{run['length']} tokens: cache of one sequence, computed, and validation PPL", columns, rows)
    figures = [
        Figure(
            f"window_{run['length']}",
            f"Validation PPL against the cache of one sequence of {run['length']} tokens; best is low and left",
            partial(_draw_text, arms),
        ),
        Figure(
            f"window_{run['length']}_position",
            f"Validation PPL by position, {run['length']} tokens (mean over seeds)",
            partial(_draw_position, arms),
        ),
    ]
    return Section(f"Text of {run['length']} tokens", (), [table], figures)


def _draw_text(arms: dict[str, Json], ax: Any) -> None:
    kinds: dict[str, list[dict[str, Json]]] = {}
    for name, entry in arms.items():
        kinds.setdefault(re.sub(r"-w\d+$", "", name), []).append(entry)
    for kind, entries in kinds.items():
        entries.sort(key=lambda entry: entry["cache_bytes"])
        sizes = [entry["cache_bytes"] / 1024 for entry in entries]
        ax.plot(sizes, [mean(_ppl(entry)) for entry in entries], marker="o", label=kind)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("cache (KiB a sequence)")
    ax.set_ylabel("validation PPL")
    ax.legend()


def _draw_position(arms: dict[str, Json], ax: Any) -> None:
    for entry in arms.values():
        runs = [one["perplexity"]["by_position"] for one in entry["seeds"]]
        ppl = [mean([run[i]["ppl"] for run in runs]) for i in range(len(runs[0]))]
        ax.plot([(run["first"] + run["last"]) / 2 for run in runs[0]], ppl, label=entry["label"])
    ax.set_xlabel("position (tokens)")
    ax.set_ylabel("validation PPL")
    ax.legend(fontsize=7)


def _tasks(results: dict[str, Json]) -> Section:
    tasks, length = results["tasks"], results["recipe"]["task_length"]
    names = list(dict.fromkeys(key.split("/")[1] for key in tasks))
    by_arm: dict[str, dict[str, dict[str, Json]]] = {}
    for key, entry in tasks.items():
        by_arm.setdefault(entry["kind"], {})[key.split("/")[1]] = entry
    rows = [[kind, *(mean_sd(percents(found[name], 0)) for name in names)] for kind, found in by_arm.items()]
    headings = [next(found[name]["label"] for found in by_arm.values()).rpartition(":")[0] for name in names]
    came = []
    for name, heading in zip(names, headings, strict=True):
        solved = [kind for kind, found in by_arm.items() if mean(percents(found[name], 0)) >= SOLVED]
        came.append(f"{heading} is solved by {'; '.join(solved) or 'none'}.")
    words = [
        f"Made-up tasks of {length} statements, one a token, for models of {results['recipe']['task_layers']} layers. "
        "*Dereference*: chains of assignments; the variable copied from may stand further back than the window. "
        "*Recall*: name the value that a key was given in the first half, past fillers that carry values too. Of one "
        "pair this is the passkey test, of 8 multi-query recall.",
        f"**Came** (solved: at least {SOLVED} % right): " + " ".join(came),
    ]
    figures = [
        Figure(f"window_{name}", f"Right answers by {unit}: {heading}", partial(_draw_groups, by_arm, name, unit))
        for name, heading in zip(names, headings, strict=True)
        for unit in ["depth (references)" if name == "dereference" else "distance (tokens, rounded down to 2^n)"]
    ]
    table = Table("Right answers (%)", ["arm", *headings], rows)
    return Section("Reach beyond the window", words, [table], figures)


def _draw_groups(by_arm: dict[str, dict[str, dict[str, Json]]], name: str, unit: str, ax: Any) -> None:
    for kind, found in by_arm.items():
        groups = by_group(found[name], 0)
        ax.plot(list(groups), [100 * right for right in groups.values()], marker="o", label=kind)
    if name != "dereference":
        ax.set_xscale("log", base=2)
    ax.set_ylim(0, 103)
    ax.set_xlabel(unit)
    ax.set_ylabel("right answers (%)")
    ax.legend(fontsize=7)


WINDOW = WindowStudy()
