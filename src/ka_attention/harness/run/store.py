"""A run's folder: finished parts are kept on disk, so that a stopped run continues where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch.distributed as dist

from ka_attention.errors import UserError
from ka_attention.files import hold, read_object, refuse_link, shown, write_atomically
from ka_attention.harness.run.records import Json, from_json, to_json

Result = TypeVar("Result")


def main_process() -> bool:
    """Whether this process is the one that writes and prints: the only one, or the first of those under torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def leave() -> None:
    """Give back the group of processes under torchrun: where its threads outlive Python, they abort the process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def agreed(value: Json) -> Json:
    """``value`` as the main process has it, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


class Store:
    """The parts of one run under ``out``.

    A part is a named unit of work with a typed result, for example ``training/seed0/softmax``. ``part`` runs it once,
    writes ``out/parts/<name>.json`` atomically with a checksum, and returns the stored result from then on; UserError
    where that is damaged. ``identity`` (recipe, data, version of the results' schema) is stored with the first part; a
    folder that belongs to another identity raises UserError, so that results of two settings are never mixed, and so
    does one that holds files and no run, so that none of them is overwritten. Nothing is written before the first part;
    from then on the run is this process's: another one that opens it is refused until this one has ended.

    Under torchrun every process calls the same methods; the main one alone decides what is finished and writes.
    """

    def __init__(self, out: Path, identity: dict[str, Json]) -> None:
        self.out = Path(out)
        self.identity: dict[str, Json] = {}
        self.on_part: Callable[[int], None] = lambda _: None  # called with 1 after each part
        for folder in (self.out, *self.out.parents):
            if folder.exists():
                if not folder.is_dir():
                    raise UserError(f"--out: {folder} is a file; name a folder")
                if not os.access(folder, os.W_OK):
                    raise UserError(f"--out: cannot write in {folder}")
                break
        for name in ("parts", "checkpoints"):
            refuse_link(self.out / name, "--out")
        if agreed(not self._marker.exists() and _holds_files(self.out)):
            raise UserError(
                f"--out: {shown(self.out)} holds files that are no run of ka; name an empty or a new folder"
            )
        self.alone(ask=True)
        self.identify(**identity)

    @property
    def _marker(self) -> Path:
        return self.out / "parts" / "identity.json"

    def identify(self, **identity: Json) -> None:
        """Add to what the run is about, before its first part; UserError where the folder's run differs in it."""
        identity = json.loads(json.dumps(to_json(identity)))
        if self._marker.exists():
            stored = read_object(self._marker, "--out")
            changed = sorted(key for key in identity if stored.get(key) != identity[key])
            if changed:
                names = ", ".join(name for key in changed for name in _differences(key, stored.get(key), identity[key]))
                raise UserError(f"--out: {self.out} holds a run with another {names}; name another folder or delete it")
        self.identity |= identity

    def part(self, name: str, work: Callable[..., Result], *args: Any) -> Result:
        """The result of part ``name``: stored if it was finished before, else ``work(*args)`` is run and stored.

        It goes through JSON by the type that ``work`` is annotated to return (``records``), also the first time, so
        that a continued run sees exactly what a first one saw.
        """
        path = self._path(name)
        text = agreed(path.read_text(encoding="utf-8", errors="replace") if path.exists() else None)
        if text is None:
            self.alone()
            self.identify(**self.identity)  # the folder may have become another run's meanwhile
            if main_process() and not self._marker.exists():
                write_atomically(self._marker, json.dumps(self.identity, indent=2))
            result = json.loads(json.dumps(to_json(work(*args))))
            text = agreed(json.dumps({"sha256": _digest(result), "result": result}, indent=2))
            if main_process():
                write_atomically(path, text)
        try:
            stored = json.loads(text)
            whole = stored["sha256"] == _digest(stored["result"])
            found = from_json(get_type_hints(work).get("return", Any), stored["result"])
        except (LookupError, TypeError, ValueError, RecursionError):
            whole = False
        if not whole:
            raise UserError(f"--out: {path} is damaged: delete it, and the same command makes it again")
        self.on_part(1)
        return found

    def done(self, name: str) -> bool:
        """Whether part ``name`` is finished."""
        return agreed(self._path(name).exists())

    def folder(self, name: str) -> Path:
        """A folder for the files of a part (checkpoints, weights), made if absent."""
        path = self.out / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def alone(self, *, ask: bool = False) -> None:
        """Make the run this process's, and of those it starts; UserError where it is another's. ``ask``: only look."""
        if not agreed(not main_process() or hold(self.out / "parts" / ".lock", ask=ask)):
            raise UserError(f"--out: another process works in {shown(self.out)}; wait for it, or name another folder")

    def _path(self, name: str) -> Path:
        return self.out / "parts" / f"{name}.json"


def _digest(result: Json) -> str:
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()


def _holds_files(folder: Path) -> bool:
    """Whether any file is below ``folder``; hidden ones (a file manager's, one left by a killed write) do not count."""
    return any(not path.is_dir() and not path.name.startswith(".") for path in folder.rglob("*"))


def _differences(key: str, stored: Json, given: Json) -> list[str]:
    """The names of what differs: the fields of two dictionaries, else the key itself."""
    if isinstance(stored, dict) and isinstance(given, dict):
        return [
            f"{key}.{field}" for field in sorted(stored.keys() | given.keys()) if stored.get(field) != given.get(field)
        ]
    return [key]
