"""Reading, writing and naming files."""

import json
import os
from pathlib import Path
from typing import Any

from ka_attention.errors import UserError


def user_path(text: str) -> Path:
    """The path that ``text`` names, with ``~`` as the home folder where there is such a user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        return Path(text)


def shown(path: Path | str) -> str:
    """``path`` for a message: on one line, and printable also where the name is not UTF-8."""
    text = os.fsencode(path).decode(errors="backslashreplace") if isinstance(path, Path) else path
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def read_object(path: Path, argument: str) -> dict[str, Any]:
    """The JSON object in a file; UserError that names ``argument`` where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{argument}: {path} is damaged, it holds no JSON object; name another folder")
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is either whole or absent, also when the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if one of the two failed
