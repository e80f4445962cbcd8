"""The report of the window study: perplexity against cache bytes, right answers beyond the window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from ka_attention.harness.figures.drawing import look, name_lines, powers_between, powers_of_two
from ka_attention.harness.figures.statistics import changes, mean, mean_sd, percent
from ka_attention.harness.models.arms import ATTENTION, ArmResults
from ka_attention.harness.tasks.learning import SOLVED, Learned, draw_groups
from ka_attention.harness.text.data import Description
from ka_attention.harness.training.lengths import AtLength, Read, draw_octaves, octaves
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.window.recipes import WindowRecipe

WITH_LEGEND_ABOVE = (4.5, 4.4)  # inches: many arms, whose lines fill the axes
TASKS = {"dereference": "dereference", "recall": "recall of 8 pairs", "passkey": "recall of 1 pair (passkey)"}
KIB = 1024


@dataclass(frozen=True)
class Results:
    """Text: every arm at every length, and the bytes of its cache; synthetic tasks."""

    data: Description
    lengths: tuple[AtLength, ...]
    cache_bytes: dict[int, dict[str, int]]  # of one sequence, by length and arm
    tasks: dict[str, Learned]


@dataclass(frozen=True)
class Sized:
    """An arm at one length with the bytes of its cache."""

    of: ArmResults[Read]
    bytes: int

    @property
    def label(self) -> str:
        return self.of.label

    @property
    def ppl(self) -> list[float]:
        return self.of.each(lambda read: read.ppl)

    @property
    def has_attention(self) -> bool:
        return self.of.arm.mixer == ATTENTION


def sections(recipe: WindowRecipe, results: Results) -> list[Section]:
    """Perplexity against cache bytes at each length, then the tasks."""
    setting = (
        "A layer with window w attends to the last w tokens, and its cache keeps w − 1 of them, however long the "
        "text is. Models are trained from scratch at each length on the same tokens."
    )
    runs = [(run.length, _sized(run, results.cache_bytes[run.length])) for run in results.lengths]
    if not all(arm.has_attention for _, arms in runs for arm in arms):
        setting += (
            " GLA, DeltaNet and Mamba-2 are recurrent layers in the place of attention, with MLPs that make up for "
            "their parameters; their cache is their state. They compute in bfloat16, also where they are evaluated."
        )
    expected = (
        "**Expected:** an attention output already carries what its token resolved, so a KA layer reaches beyond "
        "its window. At the same cache bytes KA should beat windowed softmax, and come near full softmax at a "
        "fraction of its cache. What must fit through a few vectors, as recall of many pairs, should break it."
    )
    came = [f"**Came:** {_came(length, arms)}" for length, arms in runs]
    summary = Section("Windows", [setting, expected, *came], (), [_against_bytes(*runs[-1])])
    texts = [_text(length, arms, against_bytes=length != runs[-1][0]) for length, arms in runs]
    return [summary, *texts, _tasks(recipe, list(results.tasks.values()))]


def _sized(run: AtLength, sizes: dict[str, int]) -> list[Sized]:
    return [Sized(arm, sizes[name]) for name, arm in run.arms.items()]


def _came(length: int, arms: list[Sized]) -> str:
    pairs = [(one, other) for one in arms for other in arms if one.of.arm.window and one.of.arm.softened(other.of.arm)]
    said = [f"{one.label} {percent(changes(one.ppl, other.ppl))}" for one, other in pairs]
    text = f"At {length:,} tokens, PPL against softmax with the same window: {'; '.join(said)}. " if said else ""
    text += _beside_peers(arms)
    first, small = arms[0], [arm for arm in arms if arm.has_attention and arm.bytes < arms[0].bytes]
    if small:
        best = min(small, key=lambda arm: mean(arm.ppl))
        text += (
            f"Best with a smaller cache than {first.label} is {best.label}: {100 * best.bytes / first.bytes:.2g} % of "
            f"the bytes, PPL {percent(changes(best.ppl, first.ppl))} against {first.label}."
        )
    return text


def _beside_peers(arms: list[Sized]) -> str:
    """Each recurrent peer against the KA arm with a window whose cache is nearest to the peer's state."""
    windowed = [
        arm for arm in arms if arm.of.arm.is_ka and arm.of.arm.window and arm.of.arm.ka and not arm.of.arm.ka.layers
    ]
    said = []
    for peer in (arm for arm in arms if not arm.has_attention and windowed):
        near = min(windowed, key=lambda ka: abs(math.log(ka.bytes / peer.bytes)))
        said.append(
            f"{peer.label} ({peer.bytes / KIB:,.0f} KiB) {percent(changes(peer.ppl, near.ppl))} "
            f"against {near.label} ({near.bytes / KIB:,.0f} KiB)"
        )
    return f"Recurrent peers beside the KA cache nearest in size: {'; '.join(said)}. " if said else ""


def _text(length: int, arms: list[Sized], *, against_bytes: bool) -> Section:
    base = arms[0]
    rows = []
    for arm in sorted(arms, key=lambda arm: arm.bytes):
        change = percent(changes(arm.ppl, base.ppl))
        positions, last = list(octaves(arm.of).items())[-1]
        rows.append([arm.label, f"{arm.bytes / KIB:,.1f}", mean_sd(arm.ppl), change, mean_sd(last)])
    columns = ["arm", "cache (KiB)", "validation PPL", f"against {base.label}", f"PPL of {positions}"]
    table = Table(f"{length:,} tokens: cache of one sequence, computed, and validation PPL", columns, rows)
    figures = [
        *([_against_bytes(length, arms)] if against_bytes else []),
        Figure(
            f"window_{length}_position",
            f"Validation PPL by position, {length:,} tokens (mean over seeds)",
            partial(_draw_position, [arm.of for arm in arms]),
            WITH_LEGEND_ABOVE,
        ),
    ]
    return Section(f"Text of {length:,} tokens", (), [table], figures)


def _against_bytes(length: int, arms: list[Sized]) -> Figure:
    caption = f"Validation PPL against the cache of one sequence of {length:,} tokens; best is low and left"
    return Figure(f"window_{length}", caption, partial(_draw_text, arms))


def _draw_text(arms: list[Sized], ax: Any) -> None:
    kinds: dict[str, list[Sized]] = {}
    for arm in sorted(arms, key=lambda arm: arm.bytes):
        kinds.setdefault(arm.of.arm.kind, []).append(arm)
    for kind, found in kinds.items():
        style = look(found[-1].of.arm) | {"linestyle": "-", "marker": "o"}
        ax.plot([arm.bytes / KIB for arm in found], [mean(arm.ppl) for arm in found], label=kind, **style)
    powers_of_two(ax.xaxis, powers_between(min(arm.bytes for arm in arms) / KIB, max(arm.bytes for arm in arms) / KIB))
    ax.set_xlabel("cache (KiB per sequence)")
    ax.set_ylabel("validation PPL")
    name_lines(ax)


def _draw_position(arms: list[ArmResults[Read]], ax: Any) -> None:
    draw_octaves(arms, ax)
    name_lines(ax)


def _tasks(recipe: WindowRecipe, learned: list[Learned]) -> Section:
    tasks = {
        task: [entry for entry in learned if entry.task == task] for task in {entry.task: None for entry in learned}
    }
    labels = {entry.arm.label: None for entry in learned}
    rows = [
        [
            label,
            *(mean_sd(entry.percents(0)) for found in tasks.values() for entry in found if entry.arm.label == label),
        ]
        for label in labels
    ]
    came = []
    for task, found in tasks.items():
        solved = [entry.arm.label for entry in found if mean(entry.percents(0)) >= 100 * SOLVED]
        came.append(f"{TASKS[task]} is solved by {'; '.join(solved) or 'none'}.")
    words = [
        f"Synthetic tasks of {recipe.task_length} statements, one a token, for models of {recipe.task_layers} layers. "
        "*Dereference*: chains of assignments; the variable copied from may stand further back than the window. "
        "*Recall*: name the value that a key was given in the first half, past fillers that carry values too. Of one "
        "pair this is the passkey test, of 8 multi-query recall.",
        f"**Came** (solved: at least {100 * SOLVED:.0f} % right): " + " ".join(came),
    ]
    figures = [
        Figure(
            f"window_{task}",
            f"Right answers by {unit}: {TASKS[task]}",
            partial(_draw_groups, found, task, unit),
            WITH_LEGEND_ABOVE,
        )
        for task, found in tasks.items()
        for unit in ["depth (references)" if task == "dereference" else "distance (tokens, rounded down to 2^n)"]
    ]
    table = Table("Right answers (%)", ["arm", *(TASKS[task] for task in tasks)], rows)
    return Section("Reach beyond the window", words, [table], figures)


def _draw_groups(found: list[Learned], task: str, unit: str, ax: Any) -> None:
    draw_groups(found, 0, ax)
    if task != "dereference":
        powers_of_two(ax.xaxis, list(found[0].by_group(0)))
    ax.set_xlabel(unit)
    name_lines(ax)
