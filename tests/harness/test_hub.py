"""Without a network a name that is nowhere is refused at once, in one line: no request is repeated."""

import socket

import pytest
from typer.testing import CliRunner

from ka_attention.cli import app
from ka_attention.harness.run import hub


@pytest.fixture
def offline(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s to ask again"))


@pytest.mark.parametrize(
    ("words", "argument"),
    [
        (["generate", "nobody/nothing", "text"], "MODEL"),
        (["inspect", "nothing", "text"], "MODEL"),
        (["generate", "no/such/folder", "text"], "MODEL"),
        (["adapt", "nobody/nothing"], "CHECKPOINT"),
        (["train", "--tokenizer", "nobody/nothing"], "--tokenizer"),
        (["train", "--data", "hf:nobody/nothing"], "--data"),
        (["train", "--data", "hf:"], "--data"),
    ],
)
def test_an_unknown_name_is_refused_at_once(words, argument, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"ka: {argument}: no file or folder ")
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_the_cache_of_the_hub_holds_needs_no_network(offline, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--model"
    (repository / "snapshots" / "0").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    hub.require("MODEL", "somebody/model")
