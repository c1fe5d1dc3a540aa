"""A sweep's page: every run once, what differs between them, and a link to each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from make_run import make_run

from slm_exp import report
from slm_exp.files import write_json
from slm_exp.reporting.sweep import is_sweep, write_sweep_report


def sweep(folder: Path) -> Path:
    for name, threshold, kind in (("ccc", 0.9, "finished"), ("aaa", 0.8, "finished"), ("bbb", 0.85, "failed")):
        path = make_run(folder / name, kind) / "record.json"
        record: dict[str, Any] = json.loads(path.read_text())
        record["config"]["method"]["threshold"] = threshold
        record["config"]["tracking"]["tags"] = name
        write_json(path, record)
    return folder


def test_every_run_is_a_row_ordered_by_what_differs(tmp_path: Path) -> None:
    page = write_sweep_report(sweep(tmp_path / "grid")).read_text()
    body = page.partition("<tbody>")[2]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", body, re.S)]
    cells = [[re.sub(r"<[^>]+>", "", cell).strip() for cell in row] for row in rows]
    assert [row[:2] for row in cells] == [["aaa", "0.8"], ["bbb", "0.85"], ["ccc", "0.9"]]
    assert cells[0][2:] == ["30 → 27", "7.9 %", "0.9053", "43.6", "−5.0", "finished"]
    assert cells[1][2:] == ["–", "–", "0.9053", "–", "–", "failed: OutOfMemoryError in evaluate"]
    assert "3 runs that differ in method.threshold." in page


def test_marks_link_to_pages_that_are_there(tmp_path: Path) -> None:
    page = write_sweep_report(sweep(tmp_path)).read_text()
    linked = re.findall(r'<a href="([^"]+)"', page)
    assert sorted(linked) == sorted(2 * ["aaa/report.html", "ccc/report.html"] + ["bbb/report.html"])
    assert all((tmp_path / target).is_file() for target in linked)
    assert len(re.findall(r"<circle", page)) == 3  # two finished runs and the dense model
    assert not re.search(r"https?:|<script", page)


def test_the_command_knows_a_sweep_from_a_run(tmp_path: Path) -> None:
    folder = sweep(tmp_path)
    assert is_sweep(folder)
    assert not is_sweep(folder / "aaa")
    assert report.main([str(folder), str(folder / "aaa")]) == 0
    assert (folder / "report.html").is_file()


def test_averages_of_different_protocols_are_not_shown_side_by_side(tmp_path: Path) -> None:
    folder = sweep(tmp_path)
    path = folder / "aaa" / "record.json"
    record = json.loads(path.read_text())
    for side in record["eval"].values():
        side["protocol"] = {"hash": "another", "fields": side["protocol"]["fields"] | {"limit": 3}}
    write_json(path, record)
    page = write_sweep_report(folder).read_text()
    assert re.search(r"No averages: .* were measured by different protocols \(limit: 3 and \d+\)", page)
    assert "43.6" not in page
    assert "Similarity to dense over parameters removed" in page
    assert report.main([str(folder), "--mixed-protocols"]) == 0
    page = (folder / "report.html").read_text()
    assert "43.6" in page
    assert "No averages" not in page
