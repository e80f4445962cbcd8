"""Named settings of the comparison as frozen dataclasses, and how ``--set key=value`` changes them."""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ka_attention.errors import UserError
from ka_attention.harness.run.records import Json, from_json

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig


SCHEDULES = ("constant", "linear", "cosine")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
LARGEST = 2**31 - 1
MAY_BE_ZERO = ("warmup_steps", "weight_decay", "locality", "chain_samples")


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Which text a study reads, and how much of it.

    data:               "stdlib", the path of a file or folder, or "hf:NAME[/CONFIG]" (docs/data.md).
    tokenizer:          "train" for a byte-level BPE trained on the training split, else a tokenizer file or Hub name.
    sequence_length:    tokens in a sequence; the corpus is one stream of documents cut into sequences.
    train_samples:      training sequences.
    validation_samples: validation sequences, from documents that are not trained on.
    """

    data: str = "stdlib"
    tokenizer: str = "train"
    sequence_length: int = 128
    train_samples: int
    validation_samples: int


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """GPT-NeoX with Pythia's choices, parallel residual and untied embeddings.

    rotary_share: how much of each head the rotary embeddings turn; Pythia's choice is a quarter.
    rotary_base:  pair i of a head's n turned dimensions goes round once in 2π · base^(2i/n) tokens.
    locality:     how much heads prefer near tokens before training: the biases of head h of H add
                  c² Σ_i cos(distance · base^(−2i/n)), c = locality · h / (H − 1), to q · k. 0 is transformers' start.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    rotary_share: float = 0.25
    rotary_base: float = 10_000.0
    locality: float = 0.0

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 8:
            raise UserError(
                f"--set hidden_size: expected heads × a multiple of 8 (heads = {self.heads}), got {self.hidden_size}"
            )
        head = self.hidden_size // self.heads
        if self.rotary_share > 1 or head * self.rotary_share % 2:
            raise UserError(
                f"--set rotary_share: expected at most 1 and an even number of a head's {head} dimensions, "
                f"got {self.rotary_share:g}"
            )

    def config(self) -> GPTNeoXConfig:
        """The transformers configuration."""
        from transformers import GPTNeoXConfig

        return GPTNeoXConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate_size,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": self.rotary_base,
                "partial_rotary_factor": self.rotary_share,
            },
            use_parallel_residual=True,
            tie_word_embeddings=False,
        )


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a model is trained: AdamW (betas 0.9, 0.999), gradients clipped to norm 1, bfloat16 autocast on CUDA, else
    float32.

    batch_size:    sequences a step, over all processes together; a last incomplete batch of an epoch is dropped.
    learning_rate: the peak; ``schedule`` "constant", "linear" or "cosine" follows ``warmup_steps`` of linear increase.
    epochs:        at most so many passes over the training sequences.
    patience:      stop after so many epochs in a row without a better validation loss.
    report_to:     "tensorboard", "wandb" or "trackio", which then is given the losses of every epoch; else "none".
    """

    batch_size: int
    learning_rate: float
    epochs: int
    patience: int
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    report_to: str = "none"

    @property
    def mean_learning_rate(self) -> float:
        """Over the whole training, warm-up left aside."""
        return self.learning_rate / (1 if self.schedule == "constant" else 2)


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings(TextSettings, ModelSettings, TrainingSettings):
    """Language models trained on text: what is read, which model, how it is trained."""


PYTHIA_70M: dict[str, Any] = {
    "vocab_size": 50_304,
    "hidden_size": 512,
    "layers": 6,
    "heads": 8,
    "intermediate_size": 2048,
    "sequence_length": 128,
    "learning_rate": 1e-4,
    "epochs": 10,
    # The second report states a patience of 1, but its table runs three epochs past the best one.
    "patience": 3,
}


Recipe = TypeVar("Recipe", bound=Any)


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """``recipe`` with every ``key=value`` applied; UserError names an unknown key or a value of the wrong type."""
    of_class = get_type_hints(type(recipe))
    hints = {field.name: of_class[field.name] for field in fields(recipe) if field.name not in ("name", "summary")}
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set: expected key=value, got {assignment!r}")
        if key not in hints:
            raise UserError(f"--set: no setting {key!r}; the settings are {', '.join(hints)}")
        try:
            changes[key] = _parse(text, hints[key])
        except ValueError:
            raise UserError(f"--set {key}: expected {_describe(hints[key])}, got {text!r}") from None
        _check(key, changes[key])
    return replace(recipe, **changes)


def restore(kind: type[Recipe], stored: Json) -> Recipe:
    """The recipe that was stored as JSON; ValueError where it is none, or holds a value that no setting can have."""
    recipe = from_json(kind, stored, "recipe")
    for key, value in vars(recipe).items():
        _check(key, value)
    return recipe


def _check(key: str, value: Any) -> None:
    """Whether a number is one that a setting of its kind can have: a count from 1 on, a positive rate."""
    least = 0 if key in MAY_BE_ZERO else 1
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, int) and not isinstance(item, bool) and item < least:
            raise UserError(f"--set {key}: expected an integer >= {least}, got {item}")
        if isinstance(item, int) and item > LARGEST:
            raise UserError(f"--set {key}: expected an integer <= {LARGEST}, got {item}")
        if isinstance(item, float) and not (0 <= item < float("inf") and (item > 0 or least == 0)):
            raise UserError(f"--set {key}: expected a {'number >= 0' if least == 0 else 'positive number'}, got {item}")
    for name, allowed in (("schedule", SCHEDULES), ("report_to", TRACKERS)):
        if key == name and value not in allowed:
            raise UserError(f"--set {name}: expected {', '.join(allowed)}, got {value!r}")


def _parse(text: str, hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):  # X | None
        inner = next(kind for kind in get_args(hint) if kind is not types.NoneType)
        return None if text == "none" else _parse(text, inner)
    if get_origin(hint) is tuple:
        return tuple(_parse(item.strip(), get_args(hint)[0]) for item in text.split(",") if item.strip())
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    return hint(text)


def _describe(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("none" if kind is types.NoneType else _describe(kind) for kind in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a comma-separated list, each {_describe(get_args(hint)[0])}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[hint]
