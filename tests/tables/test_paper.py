"""All tables of a model in a folder: links lead somewhere, nothing empty is drawn, the same records the same bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from builders.records import make_run

from slm_exp.cli.main import main
from slm_exp.core.errors import ConfigError
from slm_exp.runs.statistics.runs import Measured
from slm_exp.tables.definition import read_table, table_names
from slm_exp.tables.grid import fill, missing_commands
from slm_exp.tables.paper import tables_of, write_paper
from slm_exp.tables.records import find_runs

TABLES = [read_table("rules", {"sizes": [27]}), read_table("thresholds", {"thresholds": [0.9, 0.8], "curve": [27, 25]}),
          read_table("speed", {"sizes": [27]})]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    """Two rows of `rules`, all of `thresholds`, nothing of `speed`."""
    root = tmp_path_factory.mktemp("runs")
    for i, cell in enumerate([*TABLES[0].cells()[:2], *TABLES[1].cells()]):
        make_run(root, cell, 0.5 + 0.02 * i, n=20, luck=i)
    return find_runs([root])


def test_a_folder_holds_every_table_that_has_runs(runs: list[Measured], tmp_path: Path) -> None:
    drawn = write_paper(TABLES, runs, tmp_path, {"rules": "3 runs, 2 PFLOP"})
    rules, thresholds, speed = drawn
    assert (rules.filled, rules.rows, thresholds.filled, thresholds.rows) == (2, 5, 4, 4)
    assert (speed.filled, speed.files, speed.why) == (0, [], "no run yet")
    made = [path for one in drawn for path in (*one.files, *one.figures)]
    assert {p.name for p in made} == {f"{name}.{kind}" for name in ("rules", "thresholds")
                                      for kind in ("md", "tex", "csv", "html", "pdf")}
    assert all((tmp_path / f"{name}.pdf").read_bytes()[:5] == b"%PDF-" for name in ("rules", "thresholds"))
    page = (tmp_path / "index.html").read_text()
    links = re.findall(r'href="([^"]+)"', page)
    assert set(links) == {p.name for p in made} | {"paper.tex", "missing.sh"}
    assert all((tmp_path / link).is_file() for link in links)
    assert "3 runs, 2 PFLOP" in page
    lines = [line for line in (tmp_path / "missing.sh").read_text().splitlines() if not line.startswith("#")]
    assert lines == [command for table in TABLES for command in missing_commands(fill(table, runs))]
    assert re.findall(r"\\input{(\w+)}", (tmp_path / "paper.tex").read_text()) == ["rules", "thresholds"]


def test_the_same_records_give_the_same_bytes(runs: list[Measured], tmp_path: Path) -> None:
    for name in "ab":
        write_paper(TABLES[:2], runs, tmp_path / name, {})
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_every_table_is_listed_and_what_cannot_be_made_says_why() -> None:
    tables, left = tables_of({"model": "vicuna_13b"})
    assert [t.name for t in tables][:3] == ["main", "main_lora", "speed"]
    assert {t.name for t in tables} | {line.partition(":")[0] for line in left} == set(table_names())
    assert all("nothing is known for model = vicuna_13b" in line for line in left)
    with pytest.raises(ConfigError, match=r"sizse.*Did you mean sizes"):
        tables_of({"sizse": [27]})


def test_wrong_calls_of_paper_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in ((["paper", "--missing"], "slm tables paper: --missing; expected PARAM=VALUE"),
                        (["rules", "--tflops", "300"], "slm plan table=rules --tflops 300"),
                        (["papr"], "Did you mean paper")):
        assert main(["tables", *words]) == 2
        assert said in capsys.readouterr().err
