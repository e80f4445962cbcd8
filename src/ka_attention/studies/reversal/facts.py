"""Facts told in one order and asked in the other, in the format of Berglund et al. (arXiv 2309.12288, experiment 1)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from ka_attention.errors import UserError

BUILT_IN = "built-in"
TRAIN = ("p2d_prompts_train", "d2p_prompts_train", "both_prompts_train")
# What a result is called, and the file it is asked from.
TESTS = {
    "same_p2d": "p2d_prompts_test",
    "same_d2p": "d2p_prompts_test",
    "reverse_d2p": "d2p_reverse_prompts_test",
    "reverse_p2d": "p2d_reverse_prompts_test",
    "both": "both_prompts_test",
}
IN_CONTEXT = {"context_d2p": "reverse_d2p", "context_p2d": "reverse_p2d"}
SAME, REVERSE, CONTEXT = ("same_p2d", "same_d2p"), ("reverse_d2p", "reverse_p2d"), tuple(IN_CONTEXT)


class Row(NamedTuple):
    """A question and its answer; the answer begins with a space, and the text is one after the other."""

    prompt: str
    answer: str


Question = tuple[Row, Row]  # with the right answer, and with a wrong one


@dataclass(frozen=True)
class Facts:
    """People with a name and a description each; every person is in one of three groups.

    p2d is trained as name → description, d2p as description → name, both in both orders. ``files`` holds the rows by
    file name without ``.jsonl``; a row tells of the person whose name is in it.
    """

    source: str
    names: Sequence[str]
    files: dict[str, list[Row]]

    @cached_property
    def people(self) -> dict[str, dict[str, list[Row]]]:
        """The rows of each file that is used, by name."""
        found: dict[str, dict[str, list[Row]]] = {}
        for file in (*TRAIN, *TESTS.values()):
            found[file] = {}
            for row in self.files[file]:
                text = row.prompt + row.answer
                name = next((name for name in self.names if name in text), None)
                if name is None:
                    raise UserError(f"--data: {self.source}, {file}.jsonl: none of names.txt is in {text!r}")
                found[file].setdefault(name, []).append(row)
        return found

    def sentences(self) -> list[Row]:
        """All sentences to train on."""
        return [row for file in TRAIN for row in self.files[file]]

    def lessons(self) -> list[Row]:
        """A fact in one order, then a question in the other: as many as there are sentences of the both group.

        They tell of that group under random names that nobody has, so that the answer is in the context alone.
        """
        rng = random.Random(0)
        first, last = zip(*((name.split()[0], name.split()[-1]) for name in self.names), strict=True)
        lessons = []
        for name, rows in self.people[TRAIN[2]].items():
            for question in rows:
                reverse = [row for row in rows if (name in row.prompt) != (name in question.prompt)]
                if reverse:
                    alias = name
                    while alias in self.names:
                        alias = f"{rng.choice(first)} {rng.choice(last)}"
                    lesson = _after(rng.choice(reverse), question)
                    lessons.append(Row(lesson.prompt.replace(name, alias), lesson.answer.replace(name, alias)))
        return lessons

    def questions(self) -> dict[str, list[Question]]:
        """The questions of each of TESTS, and of IN_CONTEXT: the reversed ones after a training sentence with the fact.

        The wrong answer is the one that the next person's question of the same phrasing has: as fluent, never true.
        """
        asked = {key: self._asked(file) for key, file in TESTS.items()}
        told = self.people[TRAIN[0]] | self.people[TRAIN[1]]
        for key, reverse in IN_CONTEXT.items():
            people = self.people[TESTS[reverse]]
            missing = [name for name in people if name not in told]
            if missing:
                raise UserError(f"--data: {self.source}: no training sentence about {missing[0]}")
            given = [told[name][i % len(told[name])] for name, rows in people.items() for i in range(len(rows))]
            asked[key] = [
                (_after(fact, right), _after(fact, wrong))
                for fact, (right, wrong) in zip(given, asked[reverse], strict=True)
            ]
        return asked

    def _asked(self, file: str) -> list[Question]:
        people = list(self.people[file].values())
        return [
            (row, Row(row.prompt, others[i % len(others)].answer))
            for rows, others in zip(people, people[1:] + people[:1], strict=True)
            for i, row in enumerate(rows)
        ]


def _after(fact: Row, question: Row) -> Row:
    return Row(f"{fact.prompt}{fact.answer} {question.prompt}", question.answer)


def load(source: str, people: int) -> Facts:
    """The facts of ``source``: "built-in", with ``people`` people a group, or a folder.

    The folder holds ``{p2d,d2p,both}_prompts_{train,test}.jsonl`` and ``{p2d,d2p}_reverse_prompts_test.jsonl`` with
    lines of ``{"prompt", "completion"}``, and ``names.txt`` with a name a line. UserError for anything else.
    """
    if source == BUILT_IN:
        return built_in(people)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"--data: no folder {source}; allowed are {BUILT_IN} and a folder of jsonl files")
    try:
        names = [line.strip() for line in (folder / "names.txt").read_text(encoding="utf-8").splitlines()]
        files = {file: _read(folder / f"{file}.jsonl") for file in (*TRAIN, *TESTS.values())}
    except OSError as error:
        raise UserError(f"--data: cannot read {error.filename}") from None
    return Facts(source, [name for name in names if name], files)


def _read(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            rows.append(Row(record["prompt"], record["completion"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f'--data: {path} line {number}: expected {{"prompt": …, "completion": …}}') from None
    if not rows:
        raise UserError(f"--data: {path} is empty")
    return rows


def built_in(people: int) -> Facts:
    """Invented facts: three groups of ``people``, 16 training and 4 test phrasings an order; always the same."""
    parts = json.loads(resources.files(__package__).joinpath("facts.json").read_text(encoding="utf-8"))
    if not 2 <= people <= 100:
        raise UserError(f"--set people: expected 2 to 100, got {people}")
    rng = random.Random(0)
    names = rng.sample([f"{first} {last}" for first in parts["first"] for last in parts["last"]], 3 * people)
    texts = rng.sample([f"{role} {thing}" for role in parts["role"] for thing in parts["thing"]], 3 * people)
    facts = list(zip(names, texts, strict=True))
    p2d, d2p, both = facts[:people], facts[people : 2 * people], facts[2 * people :]

    def told(group: list[tuple[str, str]], order: str, split: str) -> list[Row]:
        cut = len(parts[order]) - parts["held_out"]
        phrasings = parts[order][:cut] if split == "train" else parts[order][cut:]
        end = "." if split == "train" else ""
        return [
            Row(
                phrasing.format(name=name, description=text, Description=text[0].upper() + text[1:]),
                f" {text if order == 'p2d' else name}{end}",
            )
            for name, text in group
            for phrasing in phrasings
        ]

    files = {
        "p2d_reverse_prompts_test": told(p2d, "d2p", "test"),
        "d2p_reverse_prompts_test": told(d2p, "p2d", "test"),
    }
    for split in ("train", "test"):
        files[f"p2d_prompts_{split}"] = told(p2d, "p2d", split)
        files[f"d2p_prompts_{split}"] = told(d2p, "d2p", split)
        files[f"both_prompts_{split}"] = told(both, "p2d", split) + told(both, "d2p", split)
    return Facts(BUILT_IN, names, files)
