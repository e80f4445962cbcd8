"""The recipes of the hybrid study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ka_attention.errors import UserError
from ka_attention.harness.training.pretraining import PretrainingSettings
from ka_attention.studies.hybrid.models import HybridArm, LlamaSettings, arm

TASKS = ("dereference", "depo", "recall-1", "recall-8", "slots-3", "slots-5")
HEAD = 64  # the size of a head: of smaller ones 192 names cannot be told apart


@dataclass(frozen=True, kw_only=True)
class HybridRecipe(LlamaSettings, PretrainingSettings):
    """Models trained from scratch on plentiful text, and decoding with each of them.

    data, tokenizer: as elsewhere (docs/data.md).
    arms:            what mixes tokens in the layers (`models.arm`); the others are compared with the first.
                     Arms may be added to a run later.
    rates:           factors of ``learning_rate``. Each arm takes that with which its seed 0 has the lowest loss; its
                     other seeds are trained with that alone. Some may be added to a run later.
    gpus:            so many arms are trained side by side, each in a process with a GPU of its own (without a GPU:
                     processes).
    compiled:        where there is a GPU, compile the layers around their mixers and run steps as CUDA graphs.
    decode_batch, decode_steps: sequences that decode together after ``sequence_length`` tokens, steps that are timed.
    tasks:           synthetic tasks: dereference, depo, recall-1, recall-8, slots-3, slots-5.
    task_arms, task_layers, task_samples: which arms learn them, in how many layers, training sequences.
    task_length, task_hops: statements in a training sequence, and the most steps along a permutation.
    task_size, task_batch, task_rate: the models' hidden size (heads have 64), sequences a step, peak learning rate.
    """

    name: str
    summary: str
    data: str = "stdlib"
    tokenizer: str = "train"
    arms: tuple[str, ...]
    rates: tuple[float, ...] = (1.0,)
    gpus: int = 1
    compiled: bool = True
    decode_batch: int = 1
    decode_steps: int = 8
    tasks: tuple[str, ...] = ("dereference", "depo")
    task_arms: tuple[str, ...] = ()
    task_layers: tuple[int, ...] = (2,)
    task_samples: int = 6400
    task_length: int = 24
    task_hops: int = 4
    task_size: int = 64
    task_batch: int = 32
    task_rate: float = 3e-3

    # What a continued run may have otherwise: each part says by its name what it is of.
    choices: ClassVar[tuple[str, ...]] = (
        *("summary", "arms", "rates", "gpus"),
        *("tasks", "task_arms", "task_layers", "task_samples", "task_length", "task_hops"),
        *("task_size", "task_batch", "task_rate"),
    )

    def __post_init__(self) -> None:
        LlamaSettings.__post_init__(self)
        PretrainingSettings.__post_init__(self)
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise UserError(f"--set arms: expected different names, got {','.join(self.arms)}")
        self.chosen()
        if unknown := [name for name in self.tasks if name not in TASKS]:
            raise UserError(f"--set tasks: no task {unknown[0]!r}; allowed are {', '.join(TASKS)}")
        self._check_tasks()
        if not self.rates or min(self.rates) <= 0 or len(set(self.rates)) < len(self.rates):
            raise UserError(f"--set rates: expected different factors above 0, got {','.join(map(str, self.rates))}")

    def _check_tasks(self) -> None:
        """What `tasks.settings` would refuse under other names, and after the text."""
        for name in ("task_layers", "task_samples", "task_length", "task_hops", "task_size", "task_batch"):
            given = getattr(self, name)
            if min(given if isinstance(given, tuple) else (given,), default=1) < 1:
                raise UserError(f"--set {name}: expected at least 1, got {given}")
        step = 8 * max(1, self.task_size // HEAD)
        if self.task_size % step:
            raise UserError(f"--set task_size: expected a multiple of {step} (heads have {HEAD}), got {self.task_size}")
        if self.task_samples < self.task_batch:
            raise UserError(
                f"--set task_samples: expected task_batch = {self.task_batch} or more, got {self.task_samples}"
            )
        for name in self.task_arms:
            arm(name, "task_arms")

    def chosen(self) -> dict[str, HybridArm]:
        """The arms by name."""
        return {name: arm(name) for name in self.arms}


DECISIVE = (
    "full-gated",
    "3to1-ka-head-w4-gated",
    "3to1-softmax-w4-gated",
    "3to1-none-gated",
    "3to1-conv-drawn-gated",
    "canon-gated",
)
TABLE = (
    *DECISIVE,
    *("full", "3to1-ka-head-w4", "3to1-softmax-w4", "3to1-conv-drawn", "3to1-conv-gated", "canon"),
    *("3to1-softmax-w1", "3to1-softmax-w1-gated"),
    *(f"3to1-{kind}-w{w}{gate}" for w in (2, 8, 16, 64) for kind in ("ka-head", "softmax") for gate in ("", "-gated")),
    *(f"3to1-{peer}-gated" for peer in ("gdn", "mamba2")),
    *(f"all-{kind}-w{w}-gated" for w in (8, 16) for kind in ("ka-head", "softmax")),
)
_GPU: dict[str, Any] = {
    "vocab_size": 16_384,
    "sequence_length": 2048,
    "batch_size": 16,
    "evaluations": 4,
    "validation_sequences": 256,
    "arms": DECISIVE,
    "decode_batch": 64,
    "decode_steps": 16,
    "tasks": TASKS,
    "task_layers": (2, 4, 8, 12),
    "task_samples": 256 * 6000,
    "task_size": 256,
    "task_batch": 256,
    "task_rate": 1e-3,
    "task_length": 64,
    "task_hops": 16,
}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        HybridRecipe(
            name="quick",
            summary="0.8 M parameters, 256 tokens, on the Python standard library: minutes on two CPU cores",
            vocab_size=2048,
            hidden_size=96,
            layers=4,
            heads=3,
            intermediate_size=256,
            sequence_length=256,
            batch_size=8,
            train_tokens=2048 * 100,
            validation_sequences=64,
            evaluations=2,
            learning_rate=4e-3,
            warmup_steps=16,
            arms=DECISIVE,
            task_arms=("full-gated", "1to1-ka-head-w4-gated"),
            task_layers=(2,),
            task_samples=32 * 400,
        ),
        HybridRecipe(
            name="11m",
            summary="10.8 M parameters, 2,048 tokens, 32 M tokens an arm (--data FOLDER --seeds 3): 15 s each on a GPU",
            hidden_size=256,
            layers=8,
            heads=4,
            intermediate_size=728,
            train_tokens=32_000_000,
            learning_rate=4e-3,
            **_GPU,
        ),
        HybridRecipe(
            name="47m",
            summary="47.7 M parameters, 2,048 tokens, 72 M tokens an arm (--data FOLDER --seeds 3): 90 s each on a GPU",
            hidden_size=512,
            layers=12,
            heads=8,
            intermediate_size=1448,
            train_tokens=72_000_000,
            learning_rate=2e-3,
            **_GPU,
        ),
        HybridRecipe(
            name="table",
            summary="as 47m, with every arm of the question at three learning rates: four hours on a GPU with 3 seeds",
            hidden_size=512,
            layers=12,
            heads=8,
            intermediate_size=1448,
            train_tokens=72_000_000,
            learning_rate=2e-3,
            rates=(0.5, 1.0, 2.0),
            **_GPU | {"arms": TABLE},
        ),
        HybridRecipe(
            name="120m",
            summary="128 M parameters, 2,048 tokens, 144 M tokens an arm (--data FOLDER): minutes each on a GPU",
            hidden_size=768,
            layers=16,
            heads=12,
            intermediate_size=2104,
            train_tokens=144_000_000,
            learning_rate=1e-3,
            **_GPU,
        ),
    )
}
