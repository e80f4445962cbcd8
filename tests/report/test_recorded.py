"""The recorded results: each page is what `ka report` makes of its results.json."""

import json
from pathlib import Path

import pytest

from ka_attention.harness.run import study
from ka_attention.studies import catalogue

RECORDED = sorted(Path(__file__).parents[2].glob("docs/results/*/results.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parent.name)
def test_report_follows_from_results(path, tmp_path):
    results = json.loads(path.read_text(encoding="utf-8"))
    study.report(catalogue.study(results["study"]), results, tmp_path)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert page == path.with_name("report.md").read_text(encoding="utf-8")
    assert ("note" in results) == (page.split("\n## ")[2].partition("\n")[0] == "Note on this run")
    drawn = {figure.name for figure in (tmp_path / "figures").glob("*")}
    assert drawn == {figure.name for figure in (path.parent / "figures").glob("*")}


def test_something_is_recorded():
    assert len(RECORDED) > 5
