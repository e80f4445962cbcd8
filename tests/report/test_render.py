"""The pages: complete, self-contained, deterministic, and harmless whatever text they are given."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from ka_attention.report.document import Figure, Section, Table, plain
from ka_attention.report.render import render

HOSTILE = 'a|b <script>alert("1")</script> ![x](http://example.org/x.png) _c_ & `d`'


def line(ax):
    ax.plot([1, 2, 3], [3.0, 1.0, 2.0], label="arm")
    ax.set_xlabel("epoch")
    ax.legend()


def section(**changes):
    parts = {
        "title": "Perplexity",
        "paragraphs": ["A *small* and `exact` **claim**, [proved](https://example.org/proof)."],
        "tables": [Table("PPL by arm", ["arm", "PPL"], [["softmax", "442.2 ± 3.1"], ["KA", "449.3 ± 2.0"]])],
        "figures": [Figure("curve", "PPL by epoch", line), Figure("other-curve", "PPL by epoch again", line)],
    }
    return Section(**{**parts, **changes})


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def ids(self):
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


def pages(out, *sections, title="Report", environment=None):
    render(title, sections, environment or {"versions": {"torch": "2.13.0"}, "command": "ka compare"}, out)
    return (out / "report.md").read_text(), (out / "report.html").read_text()


def test_the_html_page_holds_everything_and_fetches_nothing(tmp_path):
    _, html = pages(tmp_path, section())
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("svg") == 2
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "default-src 'none'" in html
    # Addresses may be named (a link to follow, an XML namespace), never loaded.
    for tag, attributes in page.tags:
        assert "src" not in attributes
        for key in attributes.keys() & {"href", "xlink:href"}:
            assert tag == "a" or attributes[key].startswith("#")
    assert not re.search(r"@import|url\((?!#)", html)
    for text in ("PPL by arm", "442.2 ± 3.1", "PPL by epoch", "torch 2.13.0", "ka compare"):
        assert text in "".join(page.words)


def test_a_figure_has_its_caption_as_name_and_its_own_ids(tmp_path):
    _, html = pages(tmp_path, section())
    page = Page(html)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:url\(|href=")#([\w-]+)', html):
        assert target in ids
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids


def test_figures_follow_the_colours_of_the_page(tmp_path):
    _, html = pages(tmp_path, section())
    svg = (tmp_path / "figures" / "curve.svg").read_text()
    assert "currentColor" in html
    assert "#010203" not in html + svg
    assert all("fill: currentColor" in text for text in re.findall(r"<text[^>]*>", svg))
    assert "stroke: #000000" not in svg
    assert "prefers-color-scheme:dark" in svg
    ET.fromstring(svg)


def test_the_markdown_page_links_its_figures_and_aligns_numbers(tmp_path):
    markdown, _ = pages(tmp_path, section())
    for target in re.findall(r"!\[[^]]*\]\(([^)]*)\)", markdown):
        assert (tmp_path / target).is_file()
    assert "| arm | PPL |\n| --- | ---: |\n| softmax | 442.2 ± 3.1 |\n" in markdown
    assert "## How this was made" in markdown
    markdown, _ = pages(tmp_path, section(tables=[Table("t", ["hybrid", "loss"], [["3:1 KA", "3.4"], ["1:1 KA", ""]])]))
    assert "| hybrid | loss |\n| --- | ---: |\n" in markdown  # a ratio is no number


def test_text_from_outside_stays_text(tmp_path):
    hostile = section(
        title=HOSTILE,
        paragraphs=[HOSTILE],
        tables=[Table(HOSTILE, [HOSTILE], [[HOSTILE]])],
        figures=[Figure("f", HOSTILE, line)],
    )
    markdown, html = pages(tmp_path, hostile, title=HOSTILE, environment={HOSTILE: HOSTILE})
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "".join(page.words).count(HOSTILE) >= 6
    assert "<script" not in re.sub(r"\\<", "", markdown)
    row = next(row for row in markdown.splitlines() if row.startswith("| a"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 2, "one cell stays one cell"


@pytest.mark.parametrize("address", ["javascript:alert(1)", "JavaScript:alert(1)", "data:text/html,x", " vbscript:x"])
def test_only_links_to_pages_are_links(tmp_path, address):
    paragraphs = [f"[x]({address}) [y](https://example.org) [z](figures/curve.svg)", f"from {plain(f'a]({address})')}"]
    markdown, html = pages(tmp_path, section(paragraphs=paragraphs))
    links = [attributes["href"] for tag, attributes in Page(html).tags if tag == "a"]
    assert [link for link in links if link[0] != "#"] == ["https://example.org", "figures/curve.svg"]
    assert re.findall(r"(?<!\\)\]\(([^)]*)\)", markdown)[:2] == ["https://example.org", "figures/curve.svg"]


def test_plain_text_shows_as_it_is(tmp_path):
    name = "a_b*c`d`[e](http://x.org)<f>.txt"
    _, html = pages(tmp_path, section(paragraphs=[f"from {plain(name)}"]))
    page = Page(html)
    assert f"from {name}" in "".join(page.words)


def test_a_number_and_its_unit_stay_on_one_line(tmp_path):
    _, page = pages(tmp_path, section(paragraphs=["PPL is +1.5 % higher, 3 % of 7, 1.06 × as fast, a % b."]))
    words = "PPL is +1.5\xa0% higher, 3\xa0% of 7, 1.06\xa0× as fast, a % b."
    assert words in page


def test_the_first_figure_stands_in_the_summary_and_folded_tables_are_closed(tmp_path):
    folded = Table("Epochs", ["epoch", "PPL"], [["1", "9.0"]])
    markdown, html = pages(tmp_path, section(folded=[folded]), section(title="More", figures=[]))
    assert html.index('class="verdict"') < html.index('class="lead"') < html.index("PPL by arm") < html.index("<nav")
    assert html.index("<nav") < html.index(">More</h2>")
    assert re.search(r"<details>\s*<summary>Epochs</summary>", html)
    assert "<details>\n<summary>Epochs</summary>\n\n| epoch | PPL |\n| ---: | ---: |\n| 1 | 9.0 |" in markdown
    assert (
        markdown.index("figures/curve.svg") < markdown.index("PPL by arm") < markdown.index("figures/other-curve.svg")
    )


def test_rendering_again_gives_the_same_bytes_and_leaves_no_rest(tmp_path):
    pages(tmp_path, section())
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in files} == {"report.md", "report.html", "curve.svg", "other-curve.svg"}
    pages(tmp_path, section())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_two_dozen_curves_look_different(tmp_path):
    looks = []

    def curves(ax):
        lines = [ax.plot([1, 2])[0] for _ in range(24)]
        looks.extend((line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines)

    render("Curves", [section(figures=[Figure("curves", "Many", curves)])], {}, tmp_path)
    assert len(set(looks)) == len(looks) == 24
    assert len({colour for colour, _, _ in looks[:8]}) == 8


@pytest.mark.parametrize("names", [("twice", "twice"), ("../up",), ("a/b",), ("",)])
def test_a_bad_figure_name_is_refused_before_anything_is_written(tmp_path, names):
    with pytest.raises(ValueError, match="figure name: expected a file stem"):
        pages(tmp_path, section(figures=[Figure(name, "caption", line) for name in names]))
    assert not list(tmp_path.iterdir())


def test_a_table_with_a_short_row_is_refused():
    with pytest.raises(ValueError, match="a row has 1 cells for 2 columns"):
        Table("t", ["a", "b"], [["1"]])
