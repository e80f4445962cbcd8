import json
import os
import signal
import subprocess
import sys

import pytest

from ka_attention.errors import UserError
from ka_attention.files import write_atomically
from ka_attention.harness.run.store import Store


def test_a_part_is_worked_once_and_read_from_then_on(tmp_path):
    calls = []

    def work():
        calls.append(1)
        return {"x": (1, 2), "y": 0.1}

    first = Store(tmp_path / "run", {"recipe": {"a": 1}}).part("training/seed0/ka", work)
    again = Store(tmp_path / "run", {"recipe": {"a": 1}}).part("training/seed0/ka", work)
    assert first == again == {"x": [1, 2], "y": 0.1}
    assert len(calls) == 1


def test_a_part_that_fails_leaves_nothing_and_is_tried_again(tmp_path):
    store = Store(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        store.part("a", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not store.done("a")
    assert store.part("a", lambda: 3) == 3
    assert store.done("a")


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"sha256": "", "result": 3}', '{"result": 3}'])
def test_a_damaged_part_is_refused(tmp_path, text):
    store = Store(tmp_path, {})
    store.part("a", lambda: 3)
    (tmp_path / "parts" / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"--out: .*a\.json is damaged: delete it"):
        store.part("a", lambda: 3)
    (tmp_path / "parts" / "a.json").unlink()
    assert store.part("a", lambda: 4) == 4


def test_nothing_is_written_before_the_first_part(tmp_path):
    store = Store(tmp_path / "a" / "b", {"recipe": 1})
    store.identify(data={"fingerprint": "f"})
    assert list(tmp_path.iterdir()) == []
    store.part("x", lambda: 1)
    stored = json.loads((tmp_path / "a" / "b" / "parts" / "identity.json").read_text())
    assert stored == {"recipe": 1, "data": {"fingerprint": "f"}}


def test_a_folder_of_another_run_is_refused_with_what_differs(tmp_path):
    store = Store(tmp_path, {"recipe": {"epochs": 3, "arms": ("ka",)}})
    store.identify(data={"fingerprint": "f"})
    store.part("x", lambda: 1)
    with pytest.raises(UserError, match=r"another recipe\.epochs; name another folder"):
        Store(tmp_path, {"recipe": {"epochs": 4, "arms": ("ka",)}})
    same = Store(tmp_path, {"recipe": {"epochs": 3, "arms": ("ka",)}})
    with pytest.raises(UserError, match=r"another data\.fingerprint"):
        same.identify(data={"fingerprint": "g"})


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    for name in ("report.html", "parts/notes.json", "weights/a/b.txt"):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("precious")
        with pytest.raises(UserError, match=r"--out: .* holds files that are no run of ka; name an empty"):
            Store(out, {})
        assert [path for path in out.rglob("*") if path.is_file()] == [out / name]
        assert (out / name).read_text() == "precious"


def test_empty_folders_hidden_files_and_a_stopped_run_are_no_obstacle(tmp_path):
    (tmp_path / "weights" / "seed0").mkdir(parents=True)
    (tmp_path / ".DS_Store").write_text("")
    store = Store(tmp_path, {"recipe": 1})
    store.part("x", lambda: 1)
    (tmp_path / "notes.txt").write_text("mine")
    assert Store(tmp_path, {"recipe": 1}).part("x", lambda: 2) == 1


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--out: .* is a file"):
            Store(out, {})


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_read_only_output_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="--out: cannot write"):
        Store(tmp_path / "run", {})


def test_an_interrupted_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):  # noqa: PT011
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_will_be_deleted_may_not_be_a_link(tmp_path):
    (tmp_path / "precious").mkdir()
    for name in ("checkpoints", "parts"):
        run = tmp_path / f"run-{name}"
        run.mkdir()
        (run / name).symlink_to(tmp_path / "precious")
        with pytest.raises(UserError, match=f"--out: .*/{name} is a link"):
            Store(run, {})


WORKS = """
import sys, time
from pathlib import Path
from ka_attention.harness.run.store import Store

def work():
    print("works", flush=True)
    time.sleep(60)

Store(Path(sys.argv[1]), {"recipe": 1}).part("x", work)
"""


def works(out, environment=None):
    """A process that works on a part of ``out``, and the first thing that it says."""
    environment = {**os.environ, "KA_ATTENTION_HOLDS": "", **(environment or {})}
    process = subprocess.Popen([sys.executable, "-c", WORKS, str(out)], stdout=subprocess.PIPE, env=environment)
    return process, process.stdout.readline().decode().strip()


def test_a_run_belongs_to_one_process_until_that_ends_however_it_ends(tmp_path):
    out = tmp_path / "run"
    first, said = works(out)
    assert said == "works"
    with pytest.raises(UserError) as refused:
        Store(out, {"recipe": 1})
    assert str(refused.value) == f"--out: another process works in {out}; wait for it, or name another folder"
    child, said = works(out, {"KA_ATTENTION_HOLDS": str(out / "parts" / ".lock")})
    assert said == "works", "what the holder starts works under its lock"
    for process in (child, first):
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert Store(out, {"recipe": 1}).part("x", lambda: 3) == 3
    assert Store(out, {"recipe": 1}).part("x", lambda: 4) == 3


def test_a_folder_that_became_another_run_s_is_refused_at_the_first_part(tmp_path):
    waiting = Store(tmp_path, {"recipe": 1})
    Store(tmp_path, {"recipe": 2}).part("x", lambda: 1)
    with pytest.raises(UserError, match="another recipe"):
        waiting.part("y", lambda: 2)
