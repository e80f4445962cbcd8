"""What a report is made of. A study builds these; ``render`` turns them into pages."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a report's data needs no plotting library
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Table:
    """Rows of text. Numbers are formatted by whoever builds the table; every row has as many cells as ``columns``."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.caption!r}: a row has {len(row)} cells for {len(self.columns)} columns")


@dataclass(frozen=True)
class Figure:
    """A plot: ``draw`` draws on the axes it is given and sets labels with units. ``name`` is the file's stem.

    The page is read in the light and in the dark: leave text, axes and grid to the style, and take the colours of
    data from the cycle (``"C0"``, ``"C1"``, …), which is readable on both. ``size`` is in inches; text is legible on
    a phone up to a width of about 5.
    """

    name: str
    caption: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (4.5, 3.2)


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs of prose (Markdown emphasis, code and links allowed), then tables, then figures.

    Text from outside, as a file's name, goes through ``plain``. In a report's first section, the summary, the first
    paragraph is the verdict and the first figure stands beside it. ``folded`` tables are shown when asked for.
    """

    title: str
    paragraphs: Sequence[str] = field(default_factory=tuple)
    tables: Sequence[Table] = field(default_factory=tuple)
    figures: Sequence[Figure] = field(default_factory=tuple)
    folded: Sequence[Table] = field(default_factory=tuple)


def plain(text: str) -> str:
    """Text from outside as Markdown that shows exactly this text, in a paragraph or inside a table."""
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(text.split()))
