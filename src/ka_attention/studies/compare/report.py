"""What a comparison says of itself: the answer in short, the training, and quality against cache bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ka_attention.evaluations import (
    Evaluation,
    adapters,
    caches,
    conversion,
    decoding,
    heads,
    memory,
    perplexity,
    reversal,
)
from ka_attention.evaluations.adapters import Adapters
from ka_attention.evaluations.caches import Caches
from ka_attention.evaluations.conversion import Conversions
from ka_attention.evaluations.decoding import Decoding
from ka_attention.evaluations.heads import Heads
from ka_attention.evaluations.memory import Memory
from ka_attention.evaluations.reversal import Reversal
from ka_attention.harness.arms import ArmResults
from ka_attention.harness.data import Description
from ka_attention.harness.drawing import line, look, powers_of_two
from ka_attention.harness.perplexity import Perplexity
from ka_attention.harness.statistics import (
    caution,
    cell,
    changes,
    percent_cell,
    seeds_of,
    verdict,
)
from ka_attention.harness.training import Training
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.compare.recipes import CompareRecipe

# The questions to every trained model, in the order of the report. Each is a field of Answers.
EVALUATIONS: dict[str, Evaluation] = {
    "caches": caches,
    "perplexity": perplexity,
    "memory": memory,
    "adapters": adapters,
    "heads": heads,
    "conversion": conversion,
    "decoding": decoding,
    "reversal": reversal,
}


@dataclass(frozen=True)
class Answers:
    """What came of one arm and seed; None where a question was not asked or did not arise."""

    training: Training
    caches: Caches | None = None
    perplexity: Perplexity | None = None
    memory: Memory | None = None
    adapters: Adapters | None = None
    heads: Heads | None = None
    conversion: Conversions | None = None
    decoding: Decoding | None = None
    reversal: Reversal | None = None


Answered = ArmResults[Answers]


@dataclass(frozen=True)
class Results:
    """By the arm's name; the first arm is what the others are compared with."""

    data: Description
    arms: dict[str, ArmResults[Answers]]


def sections(recipe: CompareRecipe, results: Results) -> list[Section]:
    """The answer in short, the training, quality against cache bytes, then a section for each evaluation."""
    arms = list(results.arms.values())
    found = [_summary(recipe, results), _training(recipe, arms), *_against_cache(recipe, arms)]
    for name, evaluation in EVALUATIONS.items():
        answered = _answered(arms, name)
        found += evaluation.sections(answered) if answered else []
    return found


def _answered(arms: list[Answered], name: str) -> list[ArmResults[Any]]:
    """The arms that answered an evaluation, with the answers of the seeds that did."""
    answers = [(each.arm, [getattr(seed, name) for seed in each.seeds]) for each in arms]
    kept = [(arm, tuple(answer for answer in found if answer is not None)) for arm, found in answers]
    return [ArmResults(arm, found) for arm, found in kept if found]


def _ppl(arm: Answered) -> list[float]:
    return arm.each(lambda seed: seed.training.best_val_ppl)


def _judged(change: list[float]) -> str:
    """A change in percent; over several seeds also whether it counts. One seed is judged at the end."""
    return percent_cell(change) + (f" ({verdict(change)})" if len(change) > 1 else "")


def _summary(recipe: CompareRecipe, results: Results) -> Section:
    data, arms = results.data, list(results.arms.values())
    base, seeds = arms[0], len(arms[0].seeds)
    sentences = [f"**{base.label}** reaches a validation PPL of {cell(_ppl(base))}."]
    rows = []
    for arm in arms:
        change = changes(_ppl(arm), _ppl(base))
        if arm is not base:
            sentences.append(f"**{arm.label}** reaches {cell(_ppl(arm))}, {_judged(change)} against {base.label}.")
        rows.append(
            [
                arm.label,
                cell(_ppl(arm)),
                "–" if arm is base else percent_cell(change),
                f"{arm.seeds[0].training.parameters:,}",
                ", ".join(str(seed.training.best_epoch) for seed in arm.seeds),
            ]
        )
    setting = (
        f"Recipe `{recipe.name}` on {data.source}: {recipe.train_samples:,} training and "
        f"{recipe.validation_samples:,} validation sequences of {recipe.sequence_length} tokens from different "
        f"documents, {data.tokenizer_size:,} tokens in the vocabulary, {seeds} seed{'s' if seeds > 1 else ''}. "
        "All arms start from the same weights and see the same batches."
    )
    columns = ["arm", "best val PPL", f"against {base.label}", "parameters", "best epoch"]
    table = Table(f"Best validation PPL of each arm ({seeds_of(arms)})", columns, rows)
    words = [" ".join(sentences), *_joined(_swaps(arms)), *_joined(_at_equal_cache(arms)), caution(arms)]
    return Section("In short", [setting, *words], [table])


def _joined(sentences: Iterator[str]) -> list[str]:
    """One paragraph, or none."""
    return [text] if (text := " ".join(sentences)) else []


def _swaps(arms: list[Answered]) -> Iterator[str]:
    """What the other cache does to the models with full attention, in one sentence each."""
    for arm in arms:
        found = [seed.caches for seed in arm.seeds if arm.arm.is_plain and seed.caches]
        if found:
            own, other = found[0].own, "ka" if found[0].own == "kv" else "kv"
            before, after = ([each.kinds[kind].ppl for each in found] for kind in (own, other))
            yield (
                f"Decoding the {arm.label}-trained model with a **{other.upper()} cache**, without any further "
                f"training, takes its PPL from {cell(before)} to {cell(after)}: {_judged(changes(after, before))}."
            )


def _at_equal_cache(arms: list[Answered]) -> Iterator[str]:
    """KA against softmax with the same window, where both were trained."""
    for arm in arms:
        for other in arms:
            if arm.arm.window and arm.arm.softened(other.arm):
                yield (
                    f"With the same small cache, the PPL of **{arm.label}** stands at "
                    f"{_judged(changes(_ppl(arm), _ppl(other)))} against that of {other.label}."
                )


def _training(recipe: CompareRecipe, arms: list[Answered]) -> Section:
    def draw(ax: Any) -> None:
        for arm in arms:
            for number, seed in enumerate(arm.seeds):
                epochs = seed.training.epochs
                label = None if number else arm.label
                ax.plot([row.epoch for row in epochs], [row.val_ppl for row in epochs], label=label, **look(arm.arm))
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylabel("validation PPL")
        ax.set_yscale("log")
        for which in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            which("{x:,g}")
        ax.legend()

    words = (
        "Train PPL is exp of the mean training loss over the epoch, Val PPL that of the whole validation set after it; "
        "Time is that of the training steps alone, which arms take one after the other, so that times of two arms do "
        f"not compare; * marks an improvement. Training stops after {recipe.patience} epochs without one, and the best "
        "weights count."
    )
    figure = Figure("training", "Validation PPL by epoch, one line a seed, lower is better", draw)
    return Section("Training", [words], [_epochs(arm) for arm in arms], [figure])


def _epochs(arm: Answered) -> Table:
    """The table of the run with seed 0, as it was printed."""
    training = arm.seeds[0].training
    rows = []
    for row in training.epochs:
        note = "* best" if row.epoch == training.best_epoch else "*" if row.best else ""
        rows.append([str(row.epoch), f"{row.train_ppl:,.1f}", f"{row.val_ppl:,.1f}", f"{row.seconds:.1f}s", note])
    return Table(f"{arm.label}, seed 0", ["Epoch", "Train PPL", "Val PPL", "Time", "Note"], rows)


def _against_cache(recipe: CompareRecipe, arms: list[Answered]) -> list[Section]:
    weights = [(arm, arm.seeds[0].memory) for arm in arms]
    sizes = [(arm, memory.of_own.bytes_per_sequence / 1024) for arm, memory in weights if memory]
    if not sizes:
        return []

    def draw(ax: Any) -> None:
        for arm, size in sizes:
            line(ax, [size], [_ppl(arm)], label=arm.label, **look(arm.arm) | {"linestyle": ""})
        powers_of_two(ax.xaxis, sorted({2.0 ** round(math.log2(size)) for _, size in sizes}))
        ax.set_xlabel("cache (KiB a sequence)")
        ax.set_ylabel("validation PPL")
        ax.legend()

    words = (
        f"The best validation PPL of each arm against the bytes of its own cache after {recipe.sequence_length} "
        "tokens; down and left is better. A layer with a window keeps window − 1 tokens however long the sequence is. "
        "Windowed KA-attention still draws on the whole past, because each output that it keeps has gathered what came "
        "before it."
    )
    caption = f"Validation PPL against cache bytes a sequence ({seeds_of(arms)})"
    return [Section("PPL against cache bytes", [words], [], [Figure("ppl_by_cache_bytes", caption, draw)])]
