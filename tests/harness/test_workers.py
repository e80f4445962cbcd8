"""Workers end with the process that started them, however it ends, and another one does the rest."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ka_attention.harness.run import workers
from ka_attention.harness.run.store import Store

SECONDS = 60.0  # until something must have happened


def work(folder: str, seconds: float) -> int:
    Path(folder, f"{os.getpid()}.pid").touch()
    time.sleep(seconds)
    return os.getpid()


def finish(folder: str, seconds: float, count: int = 2) -> None:
    """Three parts, of which one is done at once."""
    parts = [workers.Part(f"part{i}", work, (folder, seconds if i else 0.0)) for i in range(3)]
    workers.finish(parts, Store(Path(folder, "run"), {}), count)


def until(holds):
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end, holds
        time.sleep(0.05)


def is_running(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_workers_end_with_their_parent_and_the_rest_is_done_after_it(tmp_path):
    begin = f"import test_workers; test_workers.finish({str(tmp_path)!r}, 1e6)"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen([sys.executable, "-c", begin], env=os.environ | {"PYTHONPATH": path})
    first, begun = tmp_path / "run/parts/part0.json", lambda: [int(file.stem) for file in tmp_path.glob("*.pid")]
    try:
        until(lambda: first.exists() and len(begun()) == 2)
        stored = first.read_bytes()
        parent.kill()
        parent.wait(SECONDS)
        until(lambda: not any(map(is_running, begun())))
    finally:
        for pid in filter(is_running, [parent.pid, *begun()]):
            os.kill(pid, signal.SIGKILL)
    assert sorted(file.name for file in first.parent.iterdir()) == [".lock", "identity.json", "part0.json"]
    finish(str(tmp_path), 0.0, count=1)
    assert first.read_bytes() == stored
    assert Store(tmp_path / "run", {}).done("part2")
