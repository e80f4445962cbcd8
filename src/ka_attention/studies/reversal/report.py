"""The Reversal Curse in words, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ka_attention.harness.figures.drawing import look
from ka_attention.harness.figures.statistics import deviation, mean, mean_sd
from ka_attention.harness.models.arms import Arm
from ka_attention.harness.models.saved import NAMES
from ka_attention.harness.training.trainer import Training
from ka_attention.report.document import Figure, Section, Table, plain
from ka_attention.studies.reversal.facts import CONTEXT, REVERSE, SAME

LEARNED = 0.5  # accuracy in the trained order from which facts count as learned
KNOWN = 0.5  # share of that accuracy from which the reversed order counts as known
LIFTED = 0.1  # accuracy in the reversed order that another cache has to add to count as lifting the curse
LABELS = {
    "same_p2d": "name → description, as trained",
    "same_d2p": "description → name, as trained",
    "reverse_d2p": "name → description, reversed",
    "reverse_p2d": "description → name, reversed",
    "both": "either order, people trained in both",
    "context_d2p": "name → description, reversed, fact in the context",
    "context_p2d": "description → name, reversed, fact in the context",
}


@dataclass(frozen=True)
class Data:
    """The facts: people by group, sentences to train on, questions."""

    source: str
    people: dict[str, int]
    sentences: int
    questions: int
    fingerprint: str


@dataclass(frozen=True)
class Asked:
    """A set of questions.

    accuracy: the share of answers with which the greedy continuation begins, both lower-cased and stripped.
    right, wrong: the mean log-probability, in nats, of the right and of the wrong answers given the prompts.
    sentence_nll, sentence_tokens: the sum over whole sentences, prompt and right answer, in nats, and their tokens.
    """

    accuracy: float
    right: float
    wrong: float
    sentence_nll: float
    sentence_tokens: int

    @property
    def gain(self) -> float:
        return self.right - self.wrong


@dataclass(frozen=True)
class Answered:
    """One model: what it answered, by set of questions, and how it was trained."""

    asked: dict[str, Asked]
    training: Training


@dataclass(frozen=True)
class Entry:
    """An arm asked through one kind of cache."""

    arm: Arm
    cache: str
    seeds: tuple[Answered, ...]

    @property
    def label(self) -> str:
        """The arm, and the cache where it is not its own."""
        return self.arm.label + ("" if self.cache == self.arm.own_cache else f", {NAMES[self.cache]} cache")


@dataclass(frozen=True)
class Results:
    """By arm and cache."""

    data: Data
    arms: dict[str, Entry]


def sections(results: Results) -> list[Section]:
    """Expectation and answer, accuracy and likelihood with their controls, whole sentences."""
    return [_answer(results), _details(results), _sentences(results)]


def _group(entry: Entry, keys: tuple[str, ...], figure: str) -> list[float]:
    """One number per seed: the mean of ``figure`` ("gain" is right − wrong) over the sets of questions ``keys``."""
    return [mean([getattr(seed.asked[key], figure) for key in keys]) for seed in entry.seeds]


def _share(numbers: list[float]) -> str:
    return mean_sd([100 * number for number in numbers], 0)


def _answer(results: Results) -> Section:
    data, entries = results.data, list(results.arms.values())
    people = " + ".join(str(count) for count in data.people.values())
    paragraphs = [
        f"{people} people ({plain(data.source)}) have a name and a description each. The first group is trained as "
        f"name → description only, the second as description → name only, the third in both orders: {data.sentences:,} "
        "sentences, from random weights. Then each is asked for, in new words, in the trained and in the **reversed** "
        "order. An answer counts when the greedy continuation begins with it.",
        "**Expected:** the Reversal Curse for every arm, with reversed answers no more likely than wrong ones. Which "
        "description leads to which name is settled by what the weights were trained to predict; how values are mixed, "
        "or which cache they are read from, can change neither.",
        f"**Came:** {_cache_effect(results)}",
        *(_judged(entry) for entry in entries),
    ]
    groups = {
        "trained order": SAME,
        "reversed": REVERSE,
        "reversed, fact in context": CONTEXT,
        "trained in both": ("both",),
    }
    table = Table(
        "Accuracy in percent",
        ["arm", *groups],
        [[entry.label, *(_share(_group(entry, keys, "accuracy")) for keys in groups.values())] for entry in entries],
    )

    def bars(figure: str, unit: str, factor: float) -> Callable[[Any], None]:
        def draw(ax: Any) -> None:
            width = 0.8 / len(entries)
            for i, entry in enumerate(entries):
                found = [[factor * x for x in _group(entry, keys, figure)] for keys in groups.values()]
                spread = [deviation(numbers) for numbers in found]
                places = [x + (i + 0.5) * width - 0.4 for x in range(len(groups))]
                heights = [mean(numbers) for numbers in found]
                error = {"yerr": spread, "capsize": 2} if any(spread) else {}
                bars = ax.bar(places, heights, width, color=look(entry.arm)["color"], label=entry.label, **error)
                if entry.cache != entry.arm.own_cache:
                    for bar in bars:
                        bar.set_alpha(0.5)
            ax.set_xticks(range(len(groups)), [name.replace(", ", ",\n") for name in groups])
            ax.set_ylabel(unit)
            ax.grid(axis="x", visible=False)
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.24), ncols=2)

        return draw

    spread = " (mean over seeds; bars: ± 1 sd)"
    figures = [
        Figure("reversal_accuracy", "Accuracy of greedy answers" + spread, bars("accuracy", "accuracy (%)", 100)),
        Figure(
            "reversal_preference",
            "How much more likely the right answer is than a wrong one" + spread,
            bars("gain", "log-probability, right − wrong (nats)", 1),
        ),
    ]
    return Section("Asked in the other order", paragraphs, [table], figures)


def _judged(entry: Entry) -> str:
    same, reverse, context = (mean(_group(entry, keys, "accuracy")) for keys in (SAME, REVERSE, CONTEXT))
    gain_same, gain_reverse = (mean(_group(entry, keys, "gain")) for keys in (SAME, REVERSE))
    text = f"**{entry.label}** answers {100 * same:.0f} % in the trained order and {100 * reverse:.0f} % reversed"
    if same < LEARNED:
        return f"{text}: too little of the trained order to say anything about the curse."
    text += (
        f"; it prefers the right answer by {gain_same:.1f} nats in the trained order, by {gain_reverse:.1f} reversed"
    )
    if reverse >= KNOWN * same:
        text += ": **no curse**."
    elif gain_reverse >= KNOWN * gain_same:
        text += ": the curse in its answers, though not in what it holds likely."
    else:
        text += ": **the curse**."
    if context < LEARNED:
        text += f" Even with the fact in the context it answers only {100 * context:.0f} % of the reversed questions."
    return text


def _cache_effect(results: Results) -> str:
    """The first arm under its two caches, in the trained and in the reversed order."""
    own, other = list(results.arms.values())[:2]
    (same, reverse), (same_other, reverse_other) = (
        [100 * mean(_group(entry, keys, "accuracy")) for keys in (SAME, REVERSE)] for entry in (own, other)
    )
    effect = "it lifts the curse" if reverse_other > reverse + 100 * LIFTED else "it does not lift the curse"
    if same_other < same * KNOWN:
        effect += ", and loses most of what was known"
    return (
        f"the other cache, without training, takes {own.label} from {same:.0f} to {same_other:.0f} % in the trained "
        f"order and from {reverse:.0f} to {reverse_other:.0f} % in the reversed one: {effect}."
    )


def _details(results: Results) -> Section:
    entries = list(results.arms.values())

    def rows(keys_to_cell: Callable[[Entry, str], str]) -> list[list[str]]:
        return [[label, *(keys_to_cell(entry, key) for entry in entries)] for key, label in LABELS.items()]

    columns = ["question", *(entry.label for entry in entries)]
    tables = [
        Table(
            "Accuracy in percent",
            columns,
            rows(lambda entry, key: _share(_group(entry, (key,), "accuracy"))),
        ),
        Table(
            "Log-probability of the right answer minus that of a wrong one, in nats (0: no preference)",
            columns,
            rows(lambda entry, key: mean_sd(_group(entry, (key,), "gain"), 2)),
        ),
    ]
    words = (
        "The control needs no exact wording: it compares the right answer with that of another person to the same "
        "prompt, just as fluent and never true. The questions with the fact in the context show whether the model can "
        "answer a reversed question at all; it was taught to with the third group under changing names. People trained "
        "in both orders show that both kinds of answer can be learned."
    )
    return Section("By kind of question", [words], tables)


def _sentences(results: Results) -> Section:
    entries = list(results.arms.values())

    def ppl(entry: Entry, keys: tuple[str, ...]) -> list[float]:
        found = []
        for seed in entry.seeds:
            asked = [seed.asked[key] for key in keys]
            found.append(math.exp(sum(one.sentence_nll for one in asked) / sum(one.sentence_tokens for one in asked)))
        return found

    rows = []
    for entry in entries:
        forward, backward = ppl(entry, SAME), ppl(entry, REVERSE)
        ratio = [a / b for a, b in zip(forward, backward, strict=True)]
        rows.append([entry.label, mean_sd(forward), mean_sd(backward), mean_sd(ratio, 3)])
    table = Table(
        "Whole sentences: perplexity of the trained and of the reversed order",
        ["arm", "forward PPL", "backward PPL", "ratio"],
        rows,
    )
    words = (
        "The same questions with their right answers as whole sentences, prompts included: **ratio** is forward PPL / "
        "backward PPL, and 1 would mean no difference. These figures mix in how likely the prompt itself is, and a "
        "ratio near 1 can also mean equally bad: the answers above are the better measure."
    )
    return Section("Whole sentences", [words], [table])
