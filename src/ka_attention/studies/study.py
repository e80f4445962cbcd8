"""The narrow interface of a study: a question with named recipes, a resumable run, and sections in the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ka_attention.report.document import Section
from ka_attention.studies.store import Json, Store


class Study(Protocol):
    """One question. A study lives in one file, which ends with an instance listed in ``studies/catalogue.py``."""

    name: str
    question: str
    recipes: Mapping[str, Any]  # name -> frozen dataclass; the first is the default, and runs in minutes on two cores

    def run(self, recipe: Any, store: Store, seeds: int) -> dict[str, Json]:
        """Answer the question: call ``store.part`` for each unit of work and return the results as JSON."""
        ...

    def sections(self, results: dict[str, Json]) -> list[Section]:
        """The results in words, tables and figures: what was expected, what came, what it does not show."""
        ...
