"""Sections to pages: ``report.md``, one self-contained ``report.html`` and ``figures/*.svg``."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas

from ka_attention.files import write_atomically
from ka_attention.report.document import Figure, Section, Table, plain

# Stands for "the colour of the text around the figure" while matplotlib draws; becomes CSS's currentColor.
_INK = "#010203"
# Each has a contrast of at least 3.5 : 1 on white and on the dark page; line styles and markers differ besides.
_COLOURS = ("#2f7ed8", "#d9631e", "#1f9254", "#a857c9", "#c4404f", "#0f8f9c", "#8a7a1f", "#7d7d7d")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_CURVES = [(i, i + i // 8, i + 3 * (i // 8)) for i in range(24)]  # colours come again with other lines and markers
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.prop_cycle": cycler(color=[_COLOURS[i % 8] for i, _, _ in _CURVES])
    + cycler(linestyle=[_LINES[j % 4] for _, j, _ in _CURVES])
    + cycler(marker=[_MARKERS[k % 8] for _, _, k in _CURVES]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "figure.facecolor": "none",
    "font.size": 10,
    "grid.alpha": 0.18,
    "grid.color": _INK,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.markersize": 4,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: small, selectable, read aloud
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
# A figure's file brings its own page, light or dark.
_PAPER = (
    "<style>svg{color:#1b1f24;background:#fff}"
    "@media(prefers-color-scheme:dark){svg{color:#e6e8ea;background:#14171a}}</style>"
)

# The zero preset escapes everything; no images and no HTML, so no text can make the page fetch or run something.
_inline = MarkdownIt("zero").enable(["emphasis", "backticks", "escape", "link"])


def render(title: str, sections: Sequence[Section], environment: Mapping[str, Any], out: Path) -> None:
    """Write the report of ``sections`` into the folder ``out``.

    ``report.html`` is one file without network access or scripts, its figures inside; ``report.md`` links to
    ``figures/NAME.svg``. ``environment`` (what ran where: text, numbers, lists or one level of dictionaries) closes
    both. Nothing is written before all is made, and each file is replaced in one step: a reader never sees half of it.

    Raises ValueError if two figures share a name or a name is not a plain file stem.
    """
    out = Path(out)
    drawings: dict[str, str] = {}
    for figure in (figure for section in sections for figure in section.figures):
        if not re.fullmatch(r"[\w-]+", figure.name) or figure.name in drawings:
            raise ValueError(f"figure name: expected a file stem used once in the report, got {figure.name!r}")
        drawings[figure.name] = _draw(figure)
    page = {
        "title": title,
        "sections": sections,
        "environment": {str(key): _plain(value) for key, value in environment.items()},
        "drawings": {name: Markup(_for_html(name, svg)) for name, svg in drawings.items()},
    }
    pages = {f"report.{kind}": templates.get_template(f"template.{kind}").render(page) for kind in ("md", "html")}
    for name, svg in drawings.items():
        write_atomically(out / "figures" / f"{name}.svg", re.sub(r"(<svg[^>]*>)", rf"\g<1>{_PAPER}", svg, count=1))
    for name, text in pages.items():
        write_atomically(out / name, text)


def _draw(figure: Figure) -> str:
    """The figure as SVG whose ink is currentColor; the same input gives the same bytes."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": figure.name}):
        canvas = Canvas(figsize=figure.size, layout="constrained")
        figure.draw(canvas.subplots())
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().replace(_INK, "currentColor")


def _for_html(name: str, svg: str) -> str:
    """The SVG element alone, its ids made unique on the page, named by its caption for those who cannot see it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-labelledby="{name}-caption"', 1)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value)


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers, and so are aligned to the right; ratios, as 3:1, begin names."""
    return [all(re.match(r"[+\-−–]|\d+(?![\d:])|$", row[i]) for row in table.rows) for i in range(len(table.columns))]


def _linked(prose: str) -> str:
    """Markdown whose links lead to pages, files beside it and places in it, and nowhere else."""
    return re.sub(r"\](?=\((?!https?://|#|[\w./-]+\)))", r"\\]", prose)


def _prose(text: str) -> Markup:
    """Markdown as HTML, in which a number and its unit stay on one line."""
    return Markup(re.sub(r"(?<=\d) (?=[%×])", "\u00a0", _inline.renderInline(_linked(text))))


templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
templates.filters["prose"] = _prose
templates.filters["numeric"] = _numeric
templates.filters["markdown"] = plain
templates.filters["harmless"] = lambda text: _linked(re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", text))
