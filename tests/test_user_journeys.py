"""What README.md and the pages of docs show works: ``ka`` and ``make`` lines of console blocks, and python blocks."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ka_attention.cli import app
from ka_attention.harness.text.tokenizer import train as train_tokenizer
from ka_attention.hf import register

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DATA = ROOT / "docs" / "data.md"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    """(line, program, words after it) of every line that calls ``ka`` or ``make``, whatever stands before it."""
    for block in blocks(page, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            called = re.search(r"(?:^|[ /])(ka_attention\.cli|ka|make) (.*)", line)
            if called:
                yield line, "make" if called[1] == "make" else "ka", shlex.split(called[2], comments=True)


@pytest.mark.parametrize(
    ("program", "words"),
    [pytest.param(*called, id=f"{page.name}: {line}") for page in (README, DATA) for line, *called in commands(page)],
)
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


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    """With small files of the names shown, a small recipe of two arms, and one seed; what else a line says is kept."""
    monkeypatch.chdir(tmp_path)
    ran = set()
    for line, program, words in commands(README):
        if program == "make":
            continue
        for option, path in pairwise(words):
            if option == "--data":
                Path(path).mkdir()
                Path(path, "text.txt").write_text("\n".join(tiny.documents()))
            elif option == "--tokenizer":
                train_tokenizer(tiny.documents(), 300).backend_tokenizer.save(path)
        if words[0] == "compare":
            words = [words[0], *tiny.arguments(epochs=1, arms=("softmax-w4", "ka-w4")), *words[1:], "--seeds", "1"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{line}: {result.output}"
        ran.add(words[0])
    assert ran == {"compare", "recipes"}
    left = "runs/mine/weights/seed0/ka-w4"  # what docs/data.md says a run leaves
    register()
    assert AutoModelForCausalLM.from_pretrained(left).config.ka_config["window"] == 4
    assert AutoTokenizer.from_pretrained(left)("text")["input_ids"]
