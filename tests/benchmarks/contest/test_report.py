"""The report as written: its tables, figures, and what it leaves out."""

import re

import matplotlib.image
from support.report_cells import FC6, make_cell, paper_cells, rows

from benchmarks.contest import cells, report


def test_the_report(tmp_path):
    results, output = tmp_path / "results", tmp_path / "report"
    for cell in paper_cells():
        name = f"{cell.method['name']}.json"
        cells.write(results / cell.problem["name"] / name, cell)
    (results / FC6 / "adam.json").write_text("{")
    (results / FC6 / "adam_z.json.corrupt").write_text("{")
    text = report.write(results, output)
    assert (output / "report.md").read_text() == text
    assert "## The paper's claims" in text
    assert "## Learning rates beside" in text
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert links == ["figure-3-1.png", "figure-4-1.png", "figure-4-2.png"]
    for link in links:
        assert matplotlib.image.imread(output / link).ndim == 3
    assert len(rows(text)) == 3 + 1 + 4 + 1
    assert f"- `{FC6}/adam.json`, corrupt: no JSON" in text
    assert f"- `{FC6}/adam_z.json.corrupt`: set aside as corrupt" in text
    assert "- `cnn-cifar10-b1-raw/batchnorm`: diverged at every rate" in text
    assert text.index("### Title of fc-mnist") < text.index(f"### Title of {FC6}")


def test_a_report_without_the_papers_problems(tmp_path):
    cells.write(tmp_path / "friedman-raw" / "sgd.json", make_cell("friedman-raw"))
    text = report.write(tmp_path, tmp_path / "report")
    assert "The paper's" not in text
    assert "Learning rates beside" not in text
    assert "Title of friedman-raw" in text


def test_a_report_of_nothing(tmp_path):
    text = report.write(tmp_path / "nowhere", tmp_path / "report")
    assert "No results in `nowhere`." in text
    assert rows(text) == []
