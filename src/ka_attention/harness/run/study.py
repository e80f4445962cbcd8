"""The narrow interface of a study: a question with named recipes, a resumable run, and sections in the report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from ka_attention.errors import UserError
from ka_attention.files import read_object, write_atomically
from ka_attention.harness.run import environment
from ka_attention.harness.run.progress import console, quiet_libraries, show
from ka_attention.harness.run.records import Json, from_json, to_json
from ka_attention.harness.run.settings import override, restore
from ka_attention.harness.run.store import Store, main_process
from ka_attention.report.document import Section
from ka_attention.report.render import render

SCHEMA_VERSION = 2


class Study(Protocol):
    """One question. A study lives in one folder, which ends with an instance listed in ``studies/catalogue.py``."""

    name: str
    question: str
    recipes: Mapping[str, Any]  # name -> frozen dataclass; the first is the default, and runs in minutes on two cores

    @property
    def results(self) -> type[Any]:
        """The frozen dataclass that ``run`` returns; a class attribute does."""
        ...

    def run(self, recipe: Any, store: Store, seeds: int) -> Any:
        """Answer the question: call ``store.part`` for each unit of work and return the results.

        A study that reads text has a recipe with ``settings.TextSettings`` and calls ``store.identify`` with the
        description of the text before its first part.
        """
        ...

    def sections(self, recipe: Any, results: Any) -> list[Section]:
        """The results in words, tables and figures: what was expected, what came, what it does not show."""
        ...


def choose(study: Study, name: str | None, assignments: Sequence[str]) -> Any:
    """The recipe called ``name`` (default: the study's first) with ``key=value`` assignments applied."""
    name = name or next(iter(study.recipes))
    if name not in study.recipes:
        raise UserError(f"RECIPE: no recipe {name!r} in {study.name}; allowed are {', '.join(study.recipes)}")
    return override(study.recipes[name], assignments)


def open_store(study: Study, recipe: Any, out: Path) -> Store:
    """The folder of a run; also readies libraries and, under torchrun, the group of processes.

    A recipe may name ``choices``: settings that a continued run may have otherwise, as its parts do not depend on them.
    """
    quiet_libraries()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    kept = {name: value for name, value in to_json(recipe).items() if name not in getattr(recipe, "choices", ())}
    return Store(out, {"schema_version": SCHEMA_VERSION, "study": study.name, "recipe": kept})


def publish(study: Study, recipe: Any, store: Store, seeds: int, results: Any) -> None:
    """Write ``results.json`` and the report into the run's folder."""
    if not main_process():
        return
    stored = {
        "schema_version": SCHEMA_VERSION,
        "study": study.name,
        "recipe": to_json(recipe),
        "seeds": seeds,
        "environment": environment.describe(),
        **to_json(results),
    }
    write_atomically(store.out / "results.json", json.dumps(stored, indent=2))
    report(study, stored, store.out)


def report(study: Study, stored: Json, out: Path) -> None:
    """Render what ``results.json`` holds into ``out`` and print the first table.

    A ``note`` that someone added follows the summary.
    """
    recipe = restore(type(next(iter(study.recipes.values()))), stored["recipe"])
    names = [field.name for field in fields(study.results)]
    results = from_json(study.results, {name: stored[name] for name in names if name in stored}, "results")
    note = [Section("Note on this run", [stored["note"]])] if "note" in stored else []
    summary, *rest = study.sections(recipe, results)
    render(study.question, [summary, *note, *rest], stored["environment"], out)
    for table in [table for section in (summary, *rest) for table in section.tables][:1]:
        show(table)
    console.print(f"\nReport: {out / 'report.html'} (and report.md, results.json)", soft_wrap=True, markup=False)


def read(out: Path, name: str) -> Json:
    """A JSON file of the run in ``out``; UserError where ``out`` holds none, or one of another schema."""
    path = out / name
    if not path.exists():
        raise UserError(f"OUT: {out} holds no {name}; name the folder of a run")
    stored = read_object(path, "OUT")
    if stored.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"OUT: {path} has schema {stored.get('schema_version')}, this version reads {SCHEMA_VERSION}")
    return stored


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Within it only ``path`` is read, so what goes wrong is its content: a UserError says so."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"OUT: {path} is damaged or of another version ({reason}); run its command again") from error
