"""Reading, writing and naming files."""

import json
import os
import warnings
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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


_held: dict[Path, IO[bytes]] = {}
_HOLDER = "KA_ATTENTION_HOLDS"  # in the environment: the lock that a process and those it starts work under


def hold(lock: Path, *, ask: bool = False) -> bool:
    """Hold the file ``lock`` until this process ends, however it ends; False while another process holds it.

    A process that the holder started works under its lock. With ``ask`` nothing is held and no file is made.
    """
    lock = lock.resolve()
    if fcntl is None or lock in _held or os.environ.get(_HOLDER) == str(lock):
        return True
    if ask and not lock.exists():
        return True
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = lock.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    except OSError as error:  # some file systems of clusters have no locks
        warnings.warn(f"{lock.parent} cannot be locked ({error.strerror}): run one process in it", stacklevel=2)
    if ask:
        file.close()
        return True
    _held[lock] = file
    os.environ[_HOLDER] = str(lock)
    return True


def refuse_link(folder: Path, argument: str) -> None:
    """UserError where ``folder``, which will be deleted when it has served, is a link to another one."""
    if folder.is_symlink():
        raise UserError(f"{argument}: {shown(folder)} is a link; delete it, or name another folder")


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
