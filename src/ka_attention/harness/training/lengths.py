"""Language models trained from scratch at several sequence lengths, on the same text and the same number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ka_attention.errors import UserError
from ka_attention.harness.figures.drawing import line, look
from ka_attention.harness.models.arms import Arm, ArmResults
from ka_attention.harness.run.progress import console
from ka_attention.harness.run.settings import LanguageModelSettings
from ka_attention.harness.run.store import Store
from ka_attention.harness.text.data import Description, Text, prepare
from ka_attention.harness.training import perplexity
from ka_attention.harness.training.perplexity import Perplexity
from ka_attention.harness.training.trained import Trained, train_arm
from ka_attention.harness.training.trainer import Training

BATCH_TOKENS = 4096  # read at once by an evaluation
Settings = TypeVar("Settings", bound="LengthSettings")


@dataclass(frozen=True, kw_only=True)
class LengthSettings(LanguageModelSettings):
    """Models trained from scratch at each length, on the same number of tokens and of tokens per step.

    lengths: sequence lengths, ascending multiples of ``sequence_length``. ``train_samples``, ``validation_samples``
             and ``batch_size`` are those at ``sequence_length``; at n times the length there are n times fewer.
    arms:    attention configurations; the first is what the others are compared with.
    """

    lengths: tuple[int, ...]
    arms: tuple[str, ...] = ("softmax", "ka")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise UserError(f"--set lengths: expected ascending numbers, got {','.join(map(str, self.lengths))}")

    def at(self: Settings, length: int) -> Settings:
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


@dataclass(frozen=True)
class Read:
    """One model: how it was trained, and its perplexity on the validation text."""

    training: Training
    perplexity: Perplexity

    @property
    def ppl(self) -> float:
        return self.perplexity.ppl


@dataclass(frozen=True)
class AtLength:
    """Every arm at one length, by the arm's name."""

    length: int
    arms: dict[str, ArmResults[Read]]


def train_at_lengths(
    recipe: LengthSettings,
    arms: Callable[[int], Sequence[Arm]],
    store: Store,
    seeds: int,
) -> tuple[Description, tuple[AtLength, ...]]:
    """Train and read every arm at every length with every seed; ``arms`` gives those of a length."""
    settings = {length: recipe.at(length) for length in recipe.lengths}
    with console.status("reading the text"):
        whole = prepare(settings[recipe.lengths[-1]], recipe.vocab_size)
    store.identify(data=whole.description)
    found = []
    for length, at in settings.items():
        text = replace(whole, train=whole.train.view(-1, length), validation=whole.validation.view(-1, length))
        chosen = arms(length)
        read: dict[str, list[Read]] = {each.name: [] for each in chosen}
        for seed in range(seeds):
            for each in chosen:
                part = f"seed{seed}/{length}/{each.name}"
                read[each.name].append(store.part(part, _one, each, at, text, store, part, seed))
        found.append(AtLength(length, {each.name: ArmResults(each, tuple(read[each.name])) for each in chosen}))
    return whole.description, tuple(found)


def _one(arm: Arm, settings: LengthSettings, text: Text, store: Store, part: str, seed: int) -> Read:
    label = f"{arm.label}, {settings.sequence_length:,} tokens"
    folder = store.folder(f"weights/{part}")
    trained = Trained(arm, settings, text, seed, train_arm(arm, settings, text, folder, seed, label), folder, 1)
    with console.status(f"{label}: reading"):
        batch = max(1, BATCH_TOKENS // settings.sequence_length)
        return Read(trained.training, perplexity.evaluate(trained.model, text.validation, batch_size=batch))


def octaves(arm: ArmResults[Read]) -> dict[str, list[float]]:
    """Ranges of positions, each twice the one before, and in each one perplexity per seed."""
    found: dict[str, list[float]] = {}
    for seed in arm.seeds:
        for run in seed.perplexity.by_octave():
            found.setdefault(run.name, []).append(run.ppl)
    return found


def draw_octaves(arms: Sequence[ArmResults[Read]], ax: Any) -> None:
    """Perplexity by position, a line an arm."""
    for arm in arms:
        ranges = octaves(arm)
        line(ax, range(len(ranges)), list(ranges.values()), label=arm.label, **look(arm.arm))
    ax.set_xticks(range(len(ranges)), list(ranges), rotation=45, ha="right")
    ax.set_xlabel("position in the sequence (tokens)")
    ax.set_ylabel("validation PPL")
