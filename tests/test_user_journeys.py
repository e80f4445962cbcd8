"""What the README shows works: commands parse, Python blocks run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from ka_attention.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "README.md", ROOT / "docs" / "data.md") if path.exists()]


def blocks(language):
    for page in PAGES:
        for text in re.findall(
            rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            yield pytest.param(text, id=f"{page.name}: {text.strip().splitlines()[0][:60]}")


def commands():
    """Lines of console blocks that begin with ``$``, comments cut off."""
    for block in blocks("console"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                yield pytest.param(shlex.split(line[2:], comments=True), id=line[2:70])


@pytest.mark.parametrize("words", commands())
def test_every_command_shown_is_one_that_exists(words):
    """`ka` lines parse with the real options, `make` lines name a target; git and cd are the reader's own."""
    while words and ("=" in words[0] or words[0].startswith(("torchrun", "-", ".venv")) or words[0].isdigit()):
        if words[0].endswith("/ka"):
            words[0] = "ka"
            break
        words = words[1:]
    if words[0] == "ka":
        context = typer.main.get_command(app).make_context("ka", [*words[1:]], resilient_parsing=False)
        name, *rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        command = context.command.get_command(context, name)
        assert command, f"ka has no command {name}"
        command.make_context(name, rest)
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    else:
        assert words[0] in ("git", "cd", "python", "pip"), f"no test knows the command {words[0]}"


@pytest.mark.parametrize("code", blocks("python"))
def test_every_python_block_runs(code, tmp_path):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
