"""Arms and recipes of the window study."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ka_attention.errors import UserError
from ka_attention.harness.models.arms import Arm, arm
from ka_attention.harness.run.settings import PYTHIA_70M
from ka_attention.harness.tasks.learning import Task, TaskSettings
from ka_attention.harness.tasks.statements import Dereference, Recall
from ka_attention.harness.training.lengths import LengthSettings
from ka_attention.hf import KAConfig
from ka_attention.studies.window import peers

MIX = re.compile(r"mix-(?P<kind>softmax|ka)-w(?P<window>[1-9]\d*)")
MIX_KINDS = {"softmax": "softmax, every other layer with a window", "ka": "softmax, every other layer KA"}


@dataclass(frozen=True, kw_only=True)
class WindowRecipe(LengthSettings):
    """Text at each length and synthetic tasks, for each arm.

    arms:         those of ``arms.arm``; ``mix-softmax-w8``, ``mix-ka-w8``: every other layer with a window, the rest
                  full softmax attention; and ``gla``, ``deltanet``, ``mamba2``: recurrent layers in attention's place.
                  The first is what the others are compared with. Windows that no sequence fills are left out.
    task_arms:    the arms that are also trained on the tasks.
    task_length, task_samples, task_layers: statements in a sequence, training sequences, layers.
    """

    name: str
    summary: str
    task_arms: tuple[str, ...]
    task_length: int
    task_samples: int
    task_batch_size: int
    task_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_length < 16:
            raise UserError(f"--set task_length: expected 16 or more, got {self.task_length}")

    @property
    def tasks(self) -> dict[str, Task]:
        """The synthetic tasks by name."""
        return {
            "dereference": Dereference(self.task_length, literals=16, chains=4),
            "recall": Recall(64, 16, pairs=8),
            "passkey": Recall(64, 16, pairs=1),
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
                *peers.KINDS,
            ),
            **GPU | {"task_arms": (*GPU["task_arms"], *peers.KINDS)},
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
    if name in peers.KINDS:
        return peers.peer(name)
    match = MIX.fullmatch(name)
    if not match:
        return arm(name)
    gate = 1.0 if match["kind"] == "ka" else 0.0
    ka = KAConfig(layers=tuple(range(0, layers, 2)), window=int(match["window"]), gate_init=gate)
    return Arm(name, MIX_KINDS[match["kind"]], ka)
