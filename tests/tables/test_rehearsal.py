"""Part of `make rehearse`: two tables of a model of Llama-2-7B's shape, run, filled and written."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from slm_exp.tables.definition import read_table
from slm_exp.tables.facts import published_of
from slm_exp.tables.paper import ORDER

spec = importlib.util.spec_from_file_location(
    "rehearse", Path(__file__).resolve().parents[2] / "benchmarks" / "rehearse.py")
assert spec
assert spec.loader
rehearse = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rehearse)


def test_every_row_of_every_table_is_rehearsed(tmp_path: Path) -> None:
    """The rows of Llama-2-7B's own tables (fewer thresholds and sizes of a curve), at the real sizes and ranges."""
    tables = {table.name: table for table in rehearse.tables_for(tmp_path, tau=0.9)}
    assert list(tables) == list(ORDER)
    assert tables["main"].params["sizes"] == [26, 21]
    assert tables["agreement"].params["published"] == published_of("llama2_7b")
    for name in ("main", "depth_width", "rules", "similarity", "methods", "recovery"):
        real = [row.label for block in read_table(name, {"model": "llama2_7b"}).blocks for row in block.rows]
        mine = [row.label for block in tables[name].blocks for row in block.rows]
        assert {label.replace("0.9", "0.68") for label in mine} == set(real), name
    share = 32 * tables["main"].params["per_layer"] / tables["main"].params["parameters"]
    assert share == pytest.approx(0.96, abs=0.001)


def test_two_tables_run_and_are_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = rehearse.tables_for(tmp_path, ["thresholds", "agreement"], tau=0.9, curve=[],
                                 published=["linearpatch/llama2_7b/shortgpt_7"])
    cells = [cell for table in tables for cell in table.cells()]
    assert len(cells) == 3
    assert [rehearse.work(tmp_path, cell)[0] for cell in cells] == [""] * 3
    assert rehearse.rehearse(tmp_path, tables, 1) == 0, capsys.readouterr().out
    assert (tmp_path / "paper" / "thresholds.pdf").is_file()
    assert "stands_in_for_the_hub" in (next((tmp_path / "runs").iterdir()) / "record.json").read_text()
    other = rehearse.tables_for(tmp_path, ["thresholds"], tau=0.8, curve=[])
    assert [rehearse.empty(t, rehearse.fill(t, [])) != [] for t in other] == [True]
