"""The page of `ka inspect`: it holds its data, loads nothing, escapes everything, and names what is pointed at."""

import base64
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from ka_attention.report.inspect import Inspection, write

TOKENS = ["<b>bold</b>", " fox", "</script>", "\n", " größe", "'\"&"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def inspection() -> Inspection:
    rng = np.random.default_rng(0)
    T = len(TOKENS)
    weights = np.tril(rng.random((2, 3, T, T)))
    weights /= weights.sum(-1, keepdims=True)
    past, own = np.tril(weights, -1), np.einsum("...ii->...i", weights)
    steps = np.linalg.inv(np.eye(T) - past)
    layers = ["KA", "KA, window 8"]
    return Inspection(
        "<i>tiny</i>", "A & B.", TOKENS, layers, weights, steps * own[..., None, :], (steps @ past).sum(-1)
    )


@pytest.fixture
def page(inspection, tmp_path):
    write(inspection, tmp_path / "page.html")
    return tmp_path / "page.html"


def test_data_come_back(inspection, page):
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL).group(1))
    assert data["tokens"] == TOKENS
    rows, columns = np.tril_indices(len(TOKENS))
    for name, matrices in (("W", inspection.weights), ("R", inspection.sources)):
        steps = np.frombuffer(base64.b64decode(data[name]["base64"]), "<i2").reshape(2, 3, -1)
        np.testing.assert_allclose(
            steps * data[name]["scale"], matrices[..., rows, columns], atol=data[name]["scale"] / 2
        )


def test_page_is_self_contained_and_escaped(page):
    text = page.read_text(encoding="utf-8")
    assert "<b>bold" not in text
    assert "<i>tiny" not in text
    assert "&lt;i&gt;tiny&lt;/i&gt;" in text
    assert text.count("</script>") == 2
    assert not re.search(r"https?:|src=|@import|url\(", text)


def test_wrong_shapes_are_refused(inspection):
    with pytest.raises(ValueError, match=r"sources: expected shape \(2, 3, 6, 6\), got \(2, 3, 6\)"):
        Inspection("", "", TOKENS, ["a", "b"], inspection.weights, inspection.hops, inspection.hops)
    with pytest.raises(ValueError, match="tokens: expected at least 2, got 1"):
        Inspection("", "", TOKENS[:1], ["a", "b"], inspection.weights, inspection.sources, inspection.hops)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_browser_names_the_cell(inspection, page, tmp_path):
    dom = _dom(f"{page.as_uri()}#1.2.4.1", tmp_path)
    w, r, sink = (m[1, 2, 4, c] for m, c in ((inspection.weights, 1), (inspection.sources, 1), (inspection.sources, 0)))
    cell = html.unescape(re.search(r'id="cell"[^>]*>(.*?)</p>', dom).group(1))
    assert cell == (
        f"“␣größe” (4) from “␣fox” (1): W {100 * w:.1f} %, R {100 * r:.1f} %. "
        f"From “␣größe” (4): {inspection.hops[1, 2, 4]:.2f} hops, {100 * sink:.1f} % absorbed at token 0."
    )
    assert "Layer 1, head 2 (KA, window 8)" in dom
    strip = re.search(r'id="tokens-W">(.*?)</div>', dom).group(1)
    shown = [html.unescape(token) for token in re.findall(r"<button[^>]*>(.*?)</button>", strip)]
    assert shown == ["<b>bold</b>", "␣fox", "</script>", "↵", "␣größe", "'\"&"]
    beyond = _dom(f"{page.as_uri()}#9.9.99.99", tmp_path)
    assert "Layer 1, head 2" in beyond
    assert "(5) from “'" in html.unescape(beyond)


def _dom(address, tmp_path):
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --dump-dom"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", address]
    return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode()
