"""The narrow interface of a study: a question with named recipes, a resumable run, and sections in the report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ka_attention.errors import UserError
from ka_attention.files import read_object, write_atomically
from ka_attention.harness import environment
from ka_attention.harness.progress import console, quiet_libraries
from ka_attention.harness.settings import override
from ka_attention.harness.store import Json, Store, main_process
from ka_attention.report.document import Section
from ka_attention.report.render import render

SCHEMA_VERSION = 1


class Study(Protocol):
    """One question. A study lives in one file, which ends with an instance listed in ``studies/catalogue.py``."""

    name: str
    question: str
    recipes: Mapping[str, Any]  # name -> frozen dataclass; the first is the default, and runs in minutes on two cores

    def run(self, recipe: Any, store: Store, seeds: int) -> dict[str, Json]:
        """Answer the question: call ``store.part`` for each unit of work and return the results as JSON.

        A study that reads text has a recipe with ``recipes.TextSettings`` and calls ``store.identify`` with the
        description of the text before its first part.
        """
        ...

    def sections(self, results: dict[str, Json]) -> list[Section]:
        """The results in words, tables and figures: what was expected, what came, what it does not show."""
        ...


def choose(study: Study, name: str | None, assignments: Sequence[str]) -> Any:
    """The recipe called ``name`` (default: the study's first) with ``key=value`` assignments applied."""
    name = name or next(iter(study.recipes))
    if name not in study.recipes:
        raise UserError(f"RECIPE: no recipe {name!r} in {study.name}; allowed are {', '.join(study.recipes)}")
    return override(study.recipes[name], assignments)


def open_store(study: Study, recipe: Any, out: Path) -> Store:
    """The folder of a run; also readies libraries and, under torchrun, the group of processes."""
    quiet_libraries()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    identity = {"schema_version": SCHEMA_VERSION, "study": study.name, "recipe": asdict(recipe)}
    return Store(out, identity)


def publish(study: Study, recipe: Any, store: Store, seeds: int, answer: dict[str, Json]) -> None:
    """Write ``results.json`` and the report into the run's folder."""
    if not main_process():
        return
    results = {
        "schema_version": SCHEMA_VERSION,
        "study": study.name,
        "recipe": asdict(recipe),
        "seeds": seeds,
        "environment": environment.describe(),
        **answer,
    }
    write_atomically(store.out / "results.json", json.dumps(results, indent=2))
    report(study, results, store.out)


def report(study: Study, results: dict[str, Json], out: Path) -> None:
    """Render ``results`` into ``out``; a ``note`` that someone added to recorded results comes first."""
    note = [Section("Note on this run", [results["note"]])] if "note" in results else []
    render(study.question, [*note, *study.sections(results)], results["environment"], out)
    console.print(f"\nReport: {out / 'report.html'} (and report.md, results.json)", soft_wrap=True)


def read(out: Path, name: str) -> dict[str, Json]:
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
