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
from ka_attention.evaluations.memory import cache_size
from ka_attention.harness import peers as recurrent
from ka_attention.harness import perplexity
from ka_attention.harness.arms import Arm, arm, build
from ka_attention.harness.data import Sequences, Text, prepare
from ka_attention.harness.models import is_softmax
from ka_attention.harness.progress import console
from ka_attention.harness.settings import PYTHIA_70M
from ka_attention.harness.store import Json, Store
from ka_attention.harness.tasks import NOT_ASKED, Examples, Plan, Task, TaskSettings, learn
from ka_attention.harness.training import train
from ka_attention.hf import KAConfig
from ka_attention.report.document import Section
from ka_attention.studies.dereference.study import Dereference
from ka_attention.studies.position.study import PositionRecipe
from ka_attention.studies.window.report import sections

BATCH_TOKENS = 4096  # read at once by an evaluation
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

    arms:         those of ``arms.arm``; ``mix-softmax-w8``, ``mix-ka-w8``: every other layer with a window, the rest
                  full softmax attention; and ``gla``, ``deltanet``, ``mamba2``: recurrent layers in attention's place.
                  The first is what the others are compared with. Windows that no sequence fills are left out.
    task_arms:    the arms that are also trained on the tasks.
    task_length, task_samples, task_layers: statements in a sequence, training sequences, layers.
    """

    task_arms: tuple[str, ...]
    task_length: int
    task_samples: int
    task_batch_size: int
    task_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
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


_KINDS = ("softmax", "ka", "ka-head")
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
    "epochs": 3,
    "schedule": "cosine",
    "warmup_steps": 20,
    "task_arms": (*_FULL, "softmax-w8", "ka-w8", "ka-head-w8", "mix-ka-w8"),
    "task_length": 128,
    "task_samples": 256 * 200,
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
            summary="a small GPT-NeoX, contexts 512 and 2,048, also beside GLA, DeltaNet and Mamba-2 of "
            "flash-linear-attention (--data FOLDER --seeds 3): minutes a seed on a GPU",
            lengths=(512, 2048),
            arms=(
                *_FULL,
                *("softmax-w8", "ka-w8", "ka-head-w8", "softmax-w32", "ka-w32", "softmax-w256", "ka-w256"),
                "mix-ka-w8",
                *recurrent.LABELS,
            ),
            **GPU | {"task_arms": (*GPU["task_arms"], *recurrent.LABELS)},
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
    """An arm of ``arms.arm``, a recurrent one, or a mix: layers 0, 2, … have the window, the rest is full softmax."""
    if name in recurrent.LABELS:
        return recurrent.peer(name)
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
            distinct = [each for each in arms if each is arms[0] or not each.ka or _narrower(each.ka.window, length)]
            for each in distinct:
                bytes_ = _cache_bytes(settings[length], each)
                entries[each.name] = {"label": each.label, "cache_bytes": bytes_, "seeds": []}
            for seed in range(seeds):
                for each in distinct:
                    part = f"seed{seed}/{length}/{each.name}"
                    work = partial(_one, each, settings[length], text, store, part, seed)
                    entries[each.name]["seeds"].append(store.part(part, work))
            runs.append({"length": length, "arms": entries})
        tasks = learn(plans, recipe.task_settings, store, seeds)
        return {"data": whole.description, "lengths": runs, "tasks": tasks}

    def sections(self, results: dict[str, Json]) -> list[Section]:
        """Perplexity against cache bytes at each length, then the tasks."""
        return sections(results)


def _narrower(window: Any, length: int) -> bool:
    return window is None or window < length


def _cache_bytes(settings: PositionRecipe, arm: Arm) -> int:
    if isinstance(arm, recurrent.Peer):
        return arm.state_bytes(settings.config())
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


WINDOW = WindowStudy()
