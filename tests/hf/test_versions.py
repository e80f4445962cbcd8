"""The versions of transformers that are promised are those that are tested."""

import re
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[2]


def pinned(name):
    return re.search(r"^transformers==([\d.]+)", (ROOT / "requirements" / f"{name}.txt").read_text(), re.MULTILINE)[1]


def test_the_oldest_version_tested_is_the_oldest_allowed():
    allowed = re.search(r"transformers>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]
    assert pinned("oldest") == f"{allowed}.0"


def test_this_version_is_between_the_two():
    low, here, high = (
        tuple(map(int, v.split(".")[:2])) for v in (pinned("oldest"), transformers.__version__, pinned("newest"))
    )
    assert low <= here <= high
