"""The report of the window study: perplexity against cache bytes, right answers beyond the window."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

from ka_attention.harness.peers import LABELS as PEERS
from ka_attention.harness.statistics import changes, mean, mean_sd, percent, values
from ka_attention.harness.store import Json
from ka_attention.harness.tasks import by_group, percents
from ka_attention.report.document import Figure, Section, Table
from ka_attention.studies.position.study import by_octave

SOLVED = 95  # percent of right answers from which a task counts as solved
WITH_LEGEND_ABOVE = (4.5, 4.4)  # inches: many arms, whose lines fill the axes


def sections(results: dict[str, Json]) -> list[Section]:
    """Perplexity against cache bytes at each length, then the tasks."""
    setting = (
        "A layer with window w attends to the last w tokens, and its cache keeps w − 1 of them, however long the "
        "text is. Models are trained from scratch at each length on the same tokens."
    )
    if any(name in PEERS for run in results["lengths"] for name in run["arms"]):
        setting += (
            " GLA, DeltaNet and Mamba-2 are recurrent layers in the place of attention, with MLPs that make up for "
            "their parameters; their cache is their state. They compute in bfloat16, also where they are evaluated."
        )
    expected = (
        "**Expected:** an attention output already carries what its token resolved, so a KA layer reaches beyond "
        "its window. At the same cache bytes KA should beat windowed softmax, and come near full softmax at a "
        "fraction of its cache. What must fit through a few vectors, as recall of many pairs, should break it."
    )
    came = "**Came:** " + " ".join(_came(run) for run in results["lengths"])
    summary = Section("Windows", [setting, expected, came])
    return [summary, *(_text(run) for run in results["lengths"]), _tasks(results)]


def _ppl(entry: dict[str, Json]) -> list[float]:
    return values(entry, "perplexity", "ppl")


def _octaves(entry: dict[str, Json]) -> list[tuple[str, list[float]]]:
    """Ranges of positions, each twice the one before, and in each one perplexity a seed."""
    seeds = [by_octave(one["perplexity"]["by_position"]) for one in entry["seeds"]]
    return [(each[0][0], [ppl for _, ppl in each]) for each in zip(*seeds, strict=True)]


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
    text = f"At {run['length']:,} tokens, PPL against softmax with the same window: {'; '.join(said)}. " if said else ""
    text += _beside_peers(run)
    attention = [entry for name, entry in arms.items() if name not in PEERS]
    small = [entry for entry in attention if entry["cache_bytes"] < first["cache_bytes"]]
    if small:
        best = min(small, key=lambda entry: mean(_ppl(entry)))
        share = 100 * best["cache_bytes"] / first["cache_bytes"]
        text += f"Best with a smaller cache than {first['label']} is {best['label']}: {share:.2g} % of the bytes, PPL "
        text += f"{percent(changes(_ppl(best), _ppl(first)))} against {first['label']}."
    return text


def _beside_peers(run: dict[str, Json]) -> str:
    """Each recurrent peer against the KA arm with a window whose cache is nearest to the peer's state."""
    arms = run["arms"]
    peers = [entry for name, entry in arms.items() if name in PEERS]
    windowed = [entry for name, entry in arms.items() if name.startswith("ka-") and "-w" in name]
    said = []
    for entry in peers if windowed else ():
        near = min(windowed, key=lambda ka: abs(math.log(ka["cache_bytes"] / entry["cache_bytes"])))
        said.append(
            f"{entry['label']} ({entry['cache_bytes'] / 1024:,.0f} KiB) {percent(changes(_ppl(entry), _ppl(near)))} "
            f"against {near['label']} ({near['cache_bytes'] / 1024:,.0f} KiB)"
        )
    return f"Recurrent peers beside the KA cache nearest in size: {'; '.join(said)}. " if said else ""


def _text(run: dict[str, Json]) -> Section:
    arms = run["arms"]
    base = next(iter(arms.values()))
    rows = []
    for entry in sorted(arms.values(), key=lambda entry: entry["cache_bytes"]):
        positions, last = _octaves(entry)[-1]
        change = percent(changes(_ppl(entry), _ppl(base)))
        rows.append(
            [entry["label"], f"{entry['cache_bytes'] / 1024:,.1f}", mean_sd(_ppl(entry)), change, mean_sd(last)]
        )
    columns = ["arm", "cache (KiB)", "validation PPL", f"against {base['label']}", f"PPL of {positions}"]
    table = Table(f"{run['length']:,} tokens: cache of one sequence, computed, and validation PPL", columns, rows)
    figures = [
        Figure(
            f"window_{run['length']}",
            f"Validation PPL against the cache of one sequence of {run['length']:,} tokens; best is low and left",
            partial(_draw_text, arms),
        ),
        Figure(
            f"window_{run['length']}_position",
            f"Validation PPL by position, {run['length']:,} tokens (mean over seeds)",
            partial(_draw_position, arms),
            WITH_LEGEND_ABOVE,
        ),
    ]
    return Section(f"Text of {run['length']:,} tokens", (), [table], figures)


def _draw_text(arms: dict[str, Json], ax: Any) -> None:
    kinds: dict[str, list[dict[str, Json]]] = {}
    for entry in arms.values():
        kinds.setdefault(re.sub(r", window \d+$", "", entry["label"]), []).append(entry)
    for kind, entries in kinds.items():
        entries.sort(key=lambda entry: entry["cache_bytes"])
        sizes = [entry["cache_bytes"] / 1024 for entry in entries]
        ax.plot(sizes, [mean(_ppl(entry)) for entry in entries], label=kind)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("cache (KiB a sequence)")
    ax.set_ylabel("validation PPL")
    ax.legend()


def _draw_position(arms: dict[str, Json], ax: Any) -> None:
    for entry in arms.values():
        octaves = _octaves(entry)
        ax.plot([mean(ppl) for _, ppl in octaves], label=entry["label"])
    ax.set_xticks(range(len(octaves)), [name for name, _ in octaves], rotation=45, ha="right")
    ax.set_xlabel("position in the sequence (tokens)")
    ax.set_ylabel("validation PPL")
    ax.figure.legend(loc="outside upper center", ncols=2, fontsize=7)


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
        Figure(
            f"window_{name}",
            f"Right answers by {unit}: {heading}",
            partial(_draw_groups, by_arm, name, unit),
            WITH_LEGEND_ABOVE,
        )
        for name, heading in zip(names, headings, strict=True)
        for unit in ["depth (references)" if name == "dereference" else "distance (tokens, rounded down to 2^n)"]
    ]
    table = Table("Right answers (%)", ["arm", *headings], rows)
    return Section("Reach beyond the window", words, [table], figures)


def _draw_groups(by_arm: dict[str, dict[str, dict[str, Json]]], name: str, unit: str, ax: Any) -> None:
    for kind, found in by_arm.items():
        groups = by_group(found[name], 0)
        ax.plot(list(groups), [100 * right for right in groups.values()], label=kind)
    if name != "dereference":
        ax.set_xscale("log", base=2)
    ax.set_ylim(0, 103)
    ax.set_xlabel(unit)
    ax.set_ylabel("right answers (%)")
    ax.figure.legend(loc="outside upper center", ncols=2, fontsize=7)
