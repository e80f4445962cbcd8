"""Every Python block of every page runs, one page in one namespace, and prints something."""

import re
import socket
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/howto/*.md"))
    if "```python" in page.read_text()
]
# Run by a test of its own, which puts the files where they belong.
ELSEWHERE = {"CONTRIBUTING.md"}


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ELSEWHERE], ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:  # the page's own port may be taken, by another run of this test for one
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    namespace: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(block, page.name, "exec"), namespace)
        assert capsys.readouterr().out.strip(), block


def test_links_of_the_front_page_lead_somewhere():
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (ROOT / link).exists(), f"{name}: {link}"


def test_no_line_of_a_page_is_taken_for_a_comment():
    """A line that begins with % is one to MyST, and missing from the site."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        begins = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("%")]
        assert not begins, f"{page.name}: {begins[0]}"


def test_lines_of_findings_are_short():
    assert max(map(len, (ROOT / "docs" / "findings.md").read_text(encoding="utf-8").splitlines())) <= 120
