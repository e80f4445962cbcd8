"""What a comparison says of itself: the answer in short, the training, and quality against cache bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
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
from ka_attention.harness.figures.drawing import digits, line, look, name_lines, powers_between, powers_of_two
from ka_attention.harness.figures.statistics import (
    caution,
    cell,
    changes,
    deviation,
    judged,
    mean,
    percent_cell,
    seeds_of,
    verdict,
)
from ka_attention.harness.models.arms import ArmResults
from ka_attention.harness.tasks.learning import SOLVED, Learned, draw_groups, reach
from ka_attention.harness.text.data import Description
from ka_attention.harness.training.perplexity import Perplexity
from ka_attention.harness.training.trainer import Training
from ka_attention.report.document import Figure, Section, Table, plain
from ka_attention.studies.compare.recipes import CompareRecipe

KIB = 1024
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
    chains: dict[str, Learned] = field(default_factory=dict)  # of the synthetic task, if it was asked for
    steps: dict[str, float] = field(default_factory=dict)  # seconds of a training step, which arms took in turns


def sections(recipe: CompareRecipe, results: Results) -> list[Section]:
    """The answer in short with the first figure, the training, then a section for each evaluation."""
    arms = list(results.arms.values())
    methods = _methods_figure(arms)
    figures = [*_chains_figure(recipe, results), *_bytes_figure(arms), *methods, _training_figure(arms)]
    found = [_summary(recipe, results, figures[0]), *_chains(recipe, results), *_bytes(recipe, figures[1:])]
    found.append(_training(recipe, arms, figures[1:]))
    for name, evaluation in EVALUATIONS.items():
        answered = _answered(arms, name)
        found += evaluation.sections(answered) if answered else []
        if name == "conversion" and methods and methods[0] is not figures[0]:
            words = "All ways to decode the softmax-trained model with a KA cache, in one figure."
            found.append(Section("Repairs side by side", [words], [], methods))
    return found


def _answered(arms: list[Answered], name: str) -> list[ArmResults[Any]]:
    """The arms that answered an evaluation, with the answers of the seeds that did."""
    answers = [(each.arm, [getattr(seed, name) for seed in each.seeds]) for each in arms]
    kept = [(arm, tuple(answer for answer in found if answer is not None)) for arm, found in answers]
    return [ArmResults(arm, found) for arm, found in kept if found]


def _ppl(arm: Answered) -> list[float]:
    return arm.each(lambda seed: seed.training.best_val_ppl)


def _summary(recipe: CompareRecipe, results: Results, figure: Figure) -> Section:
    data, arms = results.data, list(results.arms.values())
    base, seeds = arms[0], len(arms[0].seeds)
    setting = (
        f"Recipe `{recipe.name}` on {plain(data.source)}: {recipe.train_samples:,} training and "
        f"{recipe.validation_samples:,} validation sequences of {recipe.sequence_length} tokens from different "
        f"documents, {data.tokenizer_size:,} tokens in the vocabulary, {seeds} seed{'s' if seeds > 1 else ''}. "
        "All arms start from the same weights and see the same batches."
    )
    columns, caption = ["arm", "PPL", f"against {base.label}"], f"Validation PPL, lower is better ({seeds_of(arms)})"
    rows = []
    for arm in arms:
        change = changes(_ppl(arm), _ppl(base))
        rows.append([arm.label, cell(_ppl(arm)), "–" if arm is base else percent_cell(change)])
    if sizes := _sizes(arms):
        columns, caption = [*columns, "cache (KiB)"], f"{caption}; the arm's own cache of one sequence"
        rows = [[*row, f"{size:,.1f}"] for row, (_, size) in zip(rows, sizes, strict=True)]
    if times := results.steps:
        columns, caption = [*columns, "step"], f"{caption}; a training step's time, × {base.label}, taken in turns"
        ratios = [times[arm.arm.name] / times[base.arm.name] for arm in arms]
        rows = [[*row, f"{ratio:.2f}"] for row, ratio in zip(rows, ratios, strict=True)]
    words = [f"{_verdict(results)} {_on_text(arms)}", *_paragraph(_windows(arms), _swaps(arms)), caution(arms), setting]
    return Section("In short", words, [Table(caption, columns, rows)], [figure])


def _verdict(results: Results) -> str:
    """What KA-attention is, and what came of it where it should win, for somebody who has never heard of it."""
    what = (
        "In softmax attention a token reads the *values* of earlier tokens. In **KA-attention** it reads their "
        "*outputs*, in which they have already gathered what they were looking for, so that one layer can follow a "
        "chain of references."
    )
    learned = list(results.chains.values())
    ka, softmax = ([each for each in learned if each.arm.is_ka == is_ka] for is_ka in (True, False))
    if not ka or not softmax:
        return what
    told = [f"{mean(each.percents(0)):.0f} % with {_layers(each)} ({_far(each)})" for each in softmax]
    return (
        f"{what} On such chains {_layers(ka[0])} of KA-attention answers **{mean(ka[0].percents(0)):.0f} %** of the "
        f"questions right ({_far(ka[0])}); softmax attention answers {', '.join(told)}."
    )


def _on_text(arms: list[Answered]) -> str:
    """Whether KA-attention is better or worse than softmax attention on the text, as far as the seeds can say."""
    base, ka = arms[0], next((arm for arm in arms if arm.arm.is_ka), None)
    if ka is None or base.arm.is_ka:
        return ""
    change = changes(_ppl(ka), _ppl(base))
    ends = f"{cell(_ppl(ka))} against {cell(_ppl(base))}"
    if len(change) == 1:
        return (
            f"On ordinary text {ka.label} and {base.label} end at a perplexity of {ends} (lower is better); **one seed "
            "cannot tell** which is better."
        )
    how = {"higher": "**worse**", "lower": "**better**"}.get(verdict(change), "neither better nor worse")
    return (
        f"On ordinary text {ka.label} is {how} than {base.label}: a perplexity of {ends}, {percent_cell(change)} over "
        f"{len(change)} seeds; lower is better."
    )


def _layers(entry: Learned) -> str:
    return "one layer" if entry.layers == 1 else f"{entry.layers} layers"


def _far(entry: Learned) -> str:
    """How deep it follows."""
    depths = entry.by_group(0)
    far = reach(depths)
    return "chains of every length" if far == max(depths) else f"up to {max(far, 0)} reference{'s' if far != 1 else ''}"


def _chains(recipe: CompareRecipe, results: Results) -> list[Section]:
    learned = list(results.chains.values())
    if not learned:
        return []
    task, settings = recipe.chains
    seeds = len(learned[0].seeds)
    words = (
        f"Sequences of {settings.length} assignments, `a = 7`, `b = a`, …: after each, the model names the value. A "
        f"guess is right 1 time in {task.chains}; a depth counts as followed where {100 * SOLVED:.0f} % are right. A "
        "KA layer's output at a definition already is the resolved value; softmax layers can at best double the depth "
        f"that they resolve with every layer. Trained on {settings.train_samples:,} sequences, each seen once, with "
        f"{'one seed' if seeds == 1 else f'{seeds} seeds'}; `ka study dereference` goes further."
    )
    rows = [[each.label, cell(each.percents(0)), _far(each), f"{each.seeds[0].parameters:,}"] for each in learned]
    columns = ["arm", "right (%)", "follows", "parameters"]
    return [Section("Chains of references", [words], [Table("Right answers", columns, rows)])]


def _chains_figure(recipe: CompareRecipe, results: Results) -> list[Figure]:
    learned = list(results.chains.values())

    def draw(ax: Any) -> None:
        draw_groups(learned, 0, ax)
        ax.axhline(100 / recipe.chains[0].chains, color="gray", linewidth=1, linestyle="-")
        ax.set_xlabel("references to follow")
        name_lines(ax)

    caption = "Right answers by the length of the chain: `a = 7`, `b = a`, … (grey: a guess)".replace("`", "")
    return [Figure("chains", caption, draw)] if learned else []


def _windows(arms: list[Answered]) -> Iterator[str]:
    """Each KA arm with a window against softmax attention with the same window."""
    for arm in arms:
        for base in arms:
            if arm.arm.window and arm.arm.softened(base.arm):
                change = judged(changes(_ppl(arm), _ppl(base)))
                yield f"**{arm.label}**: a perplexity (PPL) of {cell(_ppl(arm))}, {change} against {base.label}."


def _paragraph(*sentences: Iterator[str]) -> list[str]:
    """One paragraph, or none."""
    return [text] if (text := " ".join(chain(*sentences))) else []


def _swaps(arms: list[Answered]) -> Iterator[str]:
    """What the other cache does to the models with full attention, in one sentence each."""
    for arm in arms:
        found = [seed.caches for seed in arm.seeds if arm.arm.is_plain and seed.caches]
        if found:
            own, other = found[0].own, "ka" if found[0].own == "kv" else "kv"
            before, after = ([each.kinds[kind].ppl for each in found] for kind in (own, other))
            yield (
                f"Decoding the {arm.label}-trained model with a **{other.upper()} cache**, without any further "
                f"training, takes its PPL on a sample from {cell(before)} to {cell(after)}: "
                f"{judged(changes(after, before))}."
            )


def _training_figure(arms: list[Answered]) -> Figure:
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
        name_lines(ax)

    return Figure("training", "Validation PPL by epoch, one line per seed, lower is better", draw)


def _training(recipe: CompareRecipe, arms: list[Answered], figures: list[Figure]) -> Section:
    words = (
        "Train PPL is the exponential of the mean training loss over the epoch, Val PPL that of the loss on the whole "
        "validation set after it. Time is that of the training steps alone; arms run one after the other, so their "
        f"times do not compare. * marks an improvement; training stops after {recipe.patience} epochs without one, "
        "and the best weights count."
    )
    columns = ["arm", "best epoch", "parameters"]
    rows = [
        [
            arm.label,
            ", ".join(str(seed.training.best_epoch) for seed in arm.seeds),
            f"{arm.seeds[0].training.parameters:,}",
        ]
        for arm in arms
    ]
    table = Table("The epoch whose weights were kept, by seed", columns, rows)
    drawn = [figure for figure in figures if figure.name == "training"]
    return Section("Training", [words], [table], drawn, [_epochs(arm) for arm in arms])


def _epochs(arm: Answered) -> Table:
    """The table of the run with seed 0, as it was printed."""
    training = arm.seeds[0].training
    rows = []
    for row in training.epochs:
        note = "* best" if row.epoch == training.best_epoch else "*" if row.best else ""
        rows.append([str(row.epoch), f"{row.train_ppl:,.1f}", f"{row.val_ppl:,.1f}", f"{row.seconds:.1f}s", note])
    return Table(f"Epochs of {arm.label}, seed 0", ["Epoch", "Train PPL", "Val PPL", "Time", "Note"], rows)


def _sizes(arms: list[Answered]) -> list[tuple[Answered, float]]:
    """KiB of each arm's own cache of one sequence, where they were asked for."""
    weights = [(arm, arm.seeds[0].memory) for arm in arms]
    return [(arm, memory.of_own.bytes_per_sequence / KIB) for arm, memory in weights if memory]


def _bytes_figure(arms: list[Answered]) -> list[Figure]:
    sizes = _sizes(arms)

    def draw(ax: Any) -> None:
        for arm, size in sizes:
            line(ax, [size], [_ppl(arm)], label=arm.label, **look(arm.arm) | {"linestyle": ""})
        powers_of_two(ax.xaxis, powers_between(min(size for _, size in sizes), max(size for _, size in sizes)))
        ax.set_xlabel("cache (KiB per sequence)")
        ax.set_ylabel("validation PPL")
        name_lines(ax)

    caption = f"Validation PPL against cache bytes per sequence, down and left is better ({seeds_of(arms)})"
    return [Figure("ppl_by_cache_bytes", caption, draw)] if len(sizes) > 1 else []


def _bytes(recipe: CompareRecipe, figures: list[Figure]) -> list[Section]:
    words = (
        f"The best validation PPL of each arm against the bytes of its own cache after {recipe.sequence_length} "
        "tokens. A layer with a window keeps window − 1 tokens however long the sequence is. Windowed KA-attention "
        "still draws on the whole past, because each output that it keeps has gathered what came before it."
    )
    drawn = [figure for figure in figures if figure.name == "ppl_by_cache_bytes"]
    return [Section("PPL against cache bytes", [words], [], drawn)] if drawn else []


def _methods_figure(arms: list[Answered]) -> list[Figure]:
    """Every way to decode a softmax-trained model with a KA cache, in one figure."""
    for arm in arms:
        fitted = [seed.adapters for seed in arm.seeds if seed.adapters]
        converted = [seed.conversion for seed in arm.seeds if seed.conversion]
        if fitted and converted:
            ppl = {"softmax": [each.base for each in fitted], "swap": [each.swap for each in fitted]}
            for name, method in fitted[0].methods.items():
                ppl[method.label] = [each.methods[name].ppl for each in fitted]
            share = converted[0].shares[-1]
            last = [each.runs[f"{share:g}"].ppl for each in converted]
            ppl[f"conversion, {100 * share:.0f} % of the tokens"] = last
            caption = f"PPL of the softmax-trained model by method, lower is better ({seeds_of([arm])})"
            return [Figure("ppl_by_method", caption, partial(_bars, ppl))]
    return []


def _bars(named: dict[str, list[float]], ax: Any) -> None:
    spread = [deviation(numbers) for numbers in named.values()]
    means = [mean(numbers) for numbers in named.values()]
    bars = ax.barh(list(named), means, xerr=spread if any(spread) else None, ecolor="C7", color="C1")
    bars[0].set_color("C0")
    ax.bar_label(bars, labels=list(map(digits, means)), padding=3, fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set_xlabel("validation PPL")
    ax.grid(axis="y", visible=False)
