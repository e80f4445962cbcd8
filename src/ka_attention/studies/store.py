"""A run's folder: finished parts are kept on disk, so that a stopped run continues where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ka_attention.errors import UserError

Json = Any  # what json.dumps accepts


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is either whole or absent, also when the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class Store:
    """The parts of one run under ``out``.

    A part is a named unit of work with a JSON result, for example ``train/seed0/softmax``. ``part`` runs it once, writes
    ``out/parts/<name>.json`` atomically, and returns the stored result from then on. ``identity`` (recipe, data, versions of
    the results' schema) is stored with the first part; a folder that belongs to another identity raises UserError, so that
    results of two settings are never mixed.
    """

    def __init__(self, out: Path, identity: dict[str, Json]) -> None:
        self.out = Path(out)
        marker = self.out / "parts" / "identity.json"
        identity = json.loads(json.dumps(identity))
        if marker.exists():
            stored = json.loads(marker.read_text(encoding="utf-8"))
            if stored != identity:
                changed = sorted(k for k in stored.keys() | identity.keys() if stored.get(k) != identity.get(k))
                raise UserError(
                    f"--out: {self.out} holds a run with another {', '.join(changed)}; name another folder or delete it"
                )
        else:
            write_atomically(marker, json.dumps(identity, indent=2))

    def part(self, name: str, work: Callable[[], Json]) -> Json:
        """The result of part ``name``: stored if it was finished before, else ``work()`` is run and stored."""
        path = self.out / "parts" / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        # Through JSON also the first time, so that a continued run sees exactly what a first one saw.
        text = json.dumps(work(), indent=2)
        write_atomically(path, text)
        return json.loads(text)

    def done(self, name: str) -> bool:
        """Whether part ``name`` is finished."""
        return (self.out / "parts" / f"{name}.json").exists()

    def folder(self, name: str) -> Path:
        """A folder for the files of a part (checkpoints, weights), made if absent."""
        path = self.out / name
        path.mkdir(parents=True, exist_ok=True)
        return path
