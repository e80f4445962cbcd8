"""What README.md and docs/data.md show works: ``ka`` and ``make`` lines of console blocks exist, python blocks run."""

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
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.name, text) for page in PAGES for text in fence.findall(page.read_text(encoding="utf-8"))]


def commands():
    """The words after ``ka`` or ``make`` in every line that calls one, whatever stands before (``$``, torchrun)."""
    for page, block in blocks("console"):
        for line in block.replace("\\\n", " ").splitlines():
            called = re.search(r"(?:^|[ /])(ka_attention\.cli|ka|make) (.*)", line)
            if called:
                program = "make" if called[1] == "make" else "ka"
                yield pytest.param(program, shlex.split(called[2], comments=True), id=f"{page}: {line}")


@pytest.mark.parametrize(("program", "words"), commands())
def test_every_command_shown_exists_with_its_options(program, words):
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words) <= set(targets)
        return
    group = typer.main.get_command(app)
    if words[0] == "--help":
        return
    assert words[0] in group.commands
    if "--help" not in words:
        group.commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: value.strip().splitlines()[0][:60])
def test_every_python_block_runs(page, code, tmp_path):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, f"{page}: {run.stderr}"
